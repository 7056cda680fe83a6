"""Optimizer steps of SKDTrainer beside TRL's on-policy trainers, fp32: DistillationTrainer and GKDTrainer, and where each spends its time.

All arms are trained at once and take turns, so other work of the machine meets all of them. Each has a process: pools of threads in one
process slow one another, even those that sleep. A turn is two steps, of which the second counts: the first takes up to a tenth more, as the
others' steps have emptied the caches and taken the free pages. The first turn is not counted. Each trainer runs at its defaults and at
its best for a CPU, without gradient checkpointing.

A step has two floors. Its matrix products alone: those of one step are written down, with attention as one of them, and each is
timed by itself on numbers in the same layout, at the end. A product of few rows then finds its weight in the processor's cache, where a
model's step has to read it from memory; so the second floor runs the decoders of that step whole, each as often and in that order, with
nothing between them (`forwards.py`), in each turn after the step, and of the loss its products with the head, and adds the optimizer's step
as it was. Neither has anything of the loss besides, nor draws or judgements.

    python benchmarks/peers.py --clock cpu
    python benchmarks/peers.py --threads 2 --max_new_tokens 16
    python benchmarks/peers.py --clock cpu --batch_size 2 --max_new_tokens 16 --output benchmarks/results/peers_gkd.md \
        --trainers "SKDTrainer interleaved" "SKDTrainer interleaved, best" GKDTrainer "GKDTrainer, best"
"""

import multiprocessing
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cache

import torch
from common import Report, load_model, load_tokenizer, median, parser, prepare, spread
from forwards import Forwards
from step import prompts_and_completions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from skd_trl import SKDConfig, SKDTrainer
from skd_trl.sampling.packed_weights import LIKELY_ROWS


ON_POLICY = {"rollout": "student", "temperature": 1.0, "student_top_p": 1.0}
BEST = {"gradient_checkpointing": False}
ARMS = {
    "SKDTrainer on-policy": (SKDTrainer, SKDConfig, ON_POLICY),
    "SKDTrainer on-policy, best": (SKDTrainer, SKDConfig, {**ON_POLICY, **BEST}),
    "SKDTrainer interleaved": (SKDTrainer, SKDConfig, {}),
    "SKDTrainer interleaved, best": (SKDTrainer, SKDConfig, BEST),
    "DistillationTrainer": (DistillationTrainer, DistillationConfig, {}),
    "DistillationTrainer, best": (DistillationTrainer, DistillationConfig, BEST),
    "GKDTrainer": (GKDTrainer, GKDConfig, {"lmbda": 1.0}),
    "GKDTrainer, best": (GKDTrainer, GKDConfig, {"lmbda": 1.0, **BEST}),
}
PHASES = ("writing", "teacher's forward", "student's forward and loss", "backward", "optimizer")
# Those with products of the head that are no forward of a decoder.
OF_LOSS = PHASES[2:4]
# What writes responses, by trainer.
WRITERS = {
    SKDTrainer: "_sample",
    DistillationTrainer: "_generate_and_score_completions",
    GKDTrainer: "generate_on_policy_outputs",
}


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--batch_size", type=int, default=4)
    own.add_argument("--max_new_tokens", type=int, default=32)
    own.add_argument("--prompt_tokens", type=int, nargs=2, default=[105, 135], help="shortest and longest prompt")
    own.add_argument("--trainers", nargs="+", choices=list(ARMS), default=list(ARMS)[:6], help="GKDTrainer's are slow")
    args = own.parse_args()
    prepare(args)
    report = Report("peers" if args.threads == 1 else f"peers_{args.threads}_threads", "Beside TRL's trainers", args)
    with tempfile.TemporaryDirectory() as directory:
        arms = train_in_turns(args, directory)
    shapes = f"{args.batch_size} prompts of {args.prompt_tokens[0]} to {args.prompt_tokens[1]} tokens, up to {args.max_new_tokens} new"
    report.table(
        f"Seconds of a step, medians: {shapes}",
        ["trainer", "step", "spread", *PHASES, "the rest"],
        [[name, median(arm.seconds), spread(arm.seconds), *arm.by_phase()] for name, arm in arms.items()],
    )
    report.table(
        "The floor: matrix products and attention of one step, each timed alone, in seconds",
        ["trainer", "step", *PHASES, "GFLOP", "GFLOP a second"],
        [
            [name, *floor_of(arm.products), arm.num_operations / 1e9, arm.num_operations / 1e9 / arm.products.total()]
            for name, arm in arms.items()
        ],
    )
    report.table(
        "The floor: the decoders' forwards and backward of one step and nothing between, the head's products and the optimizer, in seconds",
        ["trainer", "step", *PHASES, "forwards in writing: rows x tokens"],
        [[name, *arm.floor_of_forwards(), arm.forwards_in_words] for name, arm in arms.items()],
    )
    report.table(
        f"How many times as fast: {shapes}",
        [
            "ours",
            "theirs",
            "times as fast",
            "in its turns",
            "their time by our products",
            "by our forwards",
            "in its turns",
        ],
        [
            [
                ours,
                theirs,
                *ratio(arms[theirs].seconds, arms[ours].seconds),
                median(arms[theirs].seconds) / arms[ours].products.total(),
                *ratio(arms[theirs].seconds, [floor.total() for floor in arms[ours].forwards]),
            ]
            for ours, theirs in pairs(arms)
        ],  # fmt: skip
        "Medians of the ratios within a turn, and their ranges. The last columns are what we would reach if our step were one of its floors.",
    )


@dataclass(frozen=True)
class Measured:
    """What is known of an arm when it has ended: seconds of its steps, whole and by phase, and of its floors by phase."""

    seconds: list[float]
    phases: dict[str, list[float]]
    products: Counter
    num_operations: int
    forwards: list[Counter]
    forwards_in_words: str

    def by_phase(self) -> list[float]:
        """Median seconds of each phase, and of what is left of a step."""
        rest = [whole - sum(self.phases[phase][i] for phase in PHASES) for i, whole in enumerate(self.seconds)]
        return [*(median(self.phases[phase]) for phase in PHASES), median(rest)]

    def floor_of_forwards(self) -> list[float]:
        """Medians, of the whole and by phase."""
        return [median(column) for column in zip(*map(floor_of, self.forwards), strict=True)]


def floor_of(seconds: Counter) -> list[float]:
    return [seconds.total(), *(seconds.get(phase, 0.0) for phase in PHASES)]


def train_in_turns(args: Namespace, directory: str) -> dict[str, Measured]:
    """Trains all arms, a turn of each after the other; while one works, the others wait. Raises `SystemExit` for one that fails."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, {}
    for name in args.trainers:
        ends[name], of_arm = context.Pipe()
        processes[name] = context.Process(target=run_arm, args=(name, args, directory, of_arm), daemon=True)
        processes[name].start()
        of_arm.close()  # then an arm that is gone is noticed
        answer(name, ends[name])  # its models are loaded
    for _ in range(args.repeats + 1):
        for name, end in ends.items():
            end.send("turn")
            answer(name, end)
    measured = {}
    for name, end in ends.items():
        end.send("floors")
        measured[name] = answer(name, end)
        processes[name].join()  # an end takes seconds, from which the next one's floors would suffer
    return measured


def answer(name: str, end) -> Measured | None:
    try:
        said = end.recv()
    except EOFError:
        raise SystemExit(f"{name}: its process has ended.") from None
    if isinstance(said, str):
        raise SystemExit(f"{name} failed: {said}")
    return said


def run_arm(name: str, args: Namespace, directory: str, end) -> None:
    """The process of an arm: waits to be told before each turn, and says when it has taken it."""
    try:
        clock = prepare(args)
        arm = Arm(make_trainer(name, args, directory), clock, end)
        end.send(None)
        arm.train()
        end.recv()
        end.send(arm.measured())
    except Exception as error:
        end.send(repr(error))
        raise


def pairs(names):
    """Each of our arms and each of theirs with the same settings."""
    for ours in names:
        for theirs in names:
            is_pair = ours.startswith("SKDTrainer") and not theirs.startswith("SKDTrainer")
            if is_pair and ours.endswith("best") == theirs.endswith("best"):
                yield ours, theirs


def ratio(theirs: list[float], ours: list[float]) -> list:
    """The median of the ratios within a turn, and their range."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return [median(ratios), f"{min(ratios):.2f}..{max(ratios):.2f}"]


def make_trainer(name: str, args: Namespace, directory: str):
    trainer_class, config_class, settings = ARMS[name]
    num_steps = 2 * (args.repeats + 1)
    rows = prompts_and_completions(args, args.batch_size * num_steps)
    known = {field.name for field in fields(config_class)}
    limit = "max_completion_length" if "max_completion_length" in known else "max_new_tokens"
    prompts = rows.map(lambda row: {"prompt": row["messages"][:-1]}, remove_columns=rows.column_names)
    return trainer_class(
        model=load_model(args, "student"),
        teacher_model=load_model(args, "teacher"),
        args=config_class(
            f"{directory}/{name}", bf16=False, use_cpu=True, per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=1, max_steps=num_steps, learning_rate=1e-5, save_strategy="no",
            logging_steps=1000, report_to="none", disable_tqdm=True, dataloader_num_workers=0, seed=7,
            **{limit: args.max_new_tokens}, **settings,
        ),
        train_dataset=prompts if trainer_class is DistillationTrainer else rows,
        processing_class=load_tokenizer(args),
    )  # fmt: skip


class Arm:
    """A training, with the time of each turn's second step, by phase, and of its forwards; and the products of the first such step."""

    def __init__(self, trainer, clock: Callable[[], float], end):
        self.trainer, self.clock, self.end = trainer, clock, end
        self.seconds: list[float] = []
        self.phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.floors: list[Counter] = []
        self.now, self.products = Counter(), Products()
        unwrap = trainer.accelerator.unwrap_model
        models = {"student": unwrap(trainer.model), "teacher": unwrap(trainer.teacher_model)}
        self.forwards = Forwards(models, self.phase_of)
        self.stack: list[str] = []
        self.recording = ExitStack()
        writer = next(WRITERS[kind] for kind in type(trainer).__mro__ if kind in WRITERS)
        self._time(trainer, writer, "writing")
        self._time(trainer, "compute_loss", "student's forward and loss")
        self._time(trainer.accelerator, "backward", "backward")
        self._time(trainer.accelerator.unwrap_model(trainer.teacher_model).model, "forward", "teacher's forward")
        trainer.add_callback(_AtStepEnd(self))

    def train(self) -> None:
        self.end.recv()
        self.started = self.clock()
        with self.forwards:
            self.trainer.train()

    def step_ended(self) -> None:
        num, seconds = self.trainer.state.global_step, self.clock() - self.started
        self.recording.close()
        if num % 2 == 1:
            if num == 1:
                self.recording.enter_context(self.products.of(self))
            self._begin()
            return
        if num > 2:
            self.seconds.append(seconds)
            for phase in PHASES:
                self.phases[phase].append(self.now[phase])
            self.floors.append(self.seconds_of_forwards())
        self.end.send(None)
        if num < self.trainer.args.max_steps:
            self.end.recv()
            self._begin()

    def _begin(self) -> None:
        self.forwards.forget()
        self.now, self.started = Counter(), self.clock()

    def measured(self) -> Measured:
        """Times the floors."""
        return Measured(
            self.seconds, self.phases, self.products.seconds(self.clock), self.products.num_operations,
            self.floors, self.forwards_in_words(),
        )  # fmt: skip

    def phase_of(self, model: str) -> str:
        """In which phase a forward of `model` is, before it begins."""
        if model == "teacher" and "writing" not in self.stack:
            return "teacher's forward"
        return self.stack[-1] if self.stack else "the rest"

    def seconds_of_forwards(self) -> Counter:
        """By phase, run once more, with the loss's products with the head, and the optimizer's step as it just was."""
        vocab_size = self.trainer.model.config.vocab_size
        training = {
            phase: seconds
            for phase, seconds in self.products.seconds(self.clock, vocab_size).items()
            if phase in OF_LOSS
        }
        optimizer = {"optimizer": self.now["optimizer"]}
        return self.forwards.seconds(self.clock, backward="backward") + Counter(training) + Counter(optimizer)

    def forwards_in_words(self) -> str:
        """How often which forward ran in the writing of the last step."""
        counts = Counter()
        for call in self.forwards.calls:
            if call.phase == "writing" and call.num_tokens:
                counts[f"{call.model} {call.num_rows} x {call.num_tokens}"] += 1
        return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))

    def _time(self, owner, method: str, phase: str) -> None:
        """Counts the time inside `method` to `phase`, without that of phases inside it. A teacher that judges is part of the writing."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            if phase == "teacher's forward" and "writing" in self.stack:
                return original(*args, **kwargs)
            outer = self.stack[-1] if self.stack else None
            self.stack.append(phase)
            start = self.clock()
            try:
                return original(*args, **kwargs)
            finally:
                taken = self.clock() - start
                self.stack.pop()
                self.now[phase] += taken
                if outer is not None:
                    self.now[outer] -= taken

        setattr(owner, method, timed)


class _AtStepEnd(TrainerCallback):
    def __init__(self, arm: Arm):
        self.arm = arm

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.before = self.arm.clock()

    def on_optimizer_step(self, *args, **kwargs):
        self.arm.now["optimizer"] += self.arm.clock() - self.before

    def on_step_end(self, *args, **kwargs):
        self.arm.step_ended()


class Products(TorchDispatchMode):
    """Writes down the matrix products that run inside, and times them afterwards."""

    KINDS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "_linear_pointwise", "_scaled_dot_product")

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()
        self.num_operations = 0

    def of(self, arm: Arm) -> "Products":
        self.arm = arm
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.KINDS or name.startswith("_scaled_dot_product"):
            leaves, spec = tree_flatten((args, kwargs or {}))
            key = tuple(
                (tuple(leaf.shape), None if leaf.is_mkldnn else leaf.stride(), leaf.dtype)
                if isinstance(leaf, torch.Tensor)
                else leaf
                for leaf in leaves
            )
            phase = self.arm.stack[-1] if self.arm.stack else "the rest"
            self.calls[(phase, func, key, spec)] += 1
            self.num_operations += _operations(name, [arg for arg in args if isinstance(arg, torch.Tensor)])
        return func(*args, **(kwargs or {}))

    def seconds(self, clock, size: int | None = None) -> Counter:
        """Seconds of all products by phase, or of those with a tensor of this `size`, each kind timed alone (the shortest of three)."""
        found = Counter()
        for (phase, func, key, spec), count in self.calls.items():
            if size is None or any(size in leaf[0] for leaf in key if isinstance(leaf, tuple)):
                found[phase] += count * _seconds_alone(func, key, spec, clock)
        return found


@cache
def _seconds_alone(func, key, spec, clock) -> float:
    leaves = [_like(*leaf) if isinstance(leaf, tuple) else leaf for leaf in key]
    args, kwargs = tree_unflatten(leaves, spec)
    times = []
    with torch.no_grad():
        for _ in range(4):
            start, repeats = clock(), 0
            while repeats == 0 or (clock() - start < 0.002 and repeats < 50):
                func(*args, **kwargs)
                repeats += 1
            times.append((clock() - start) / repeats)
    return min(times[1:])


def _like(shape, stride, dtype) -> torch.Tensor:
    """A tensor in the same layout; without a stride, a packed weight."""
    if stride is None:
        return torch.ops.mkldnn._reorder_linear_weight(torch.rand(shape, dtype=dtype), LIKELY_ROWS)
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    numbers = torch.rand(max(size, 1)) if dtype.is_floating_point else torch.ones(max(size, 1))
    return numbers.to(dtype).as_strided(shape, stride)


def _operations(name: str, tensors: list[torch.Tensor]) -> int:
    """Multiplications and additions: of a product of (n, k) and (k, m), 2 n k m; of attention its two products, or in the backward five."""
    if name.startswith("_scaled_dot_product"):
        is_backward = "backward" in name
        query, keys = (tensors[1], tensors[2]) if is_backward else (tensors[0], tensors[1])
        return (10 if is_backward else 4) * query.numel() * keys.shape[-2]
    left, right = tensors[-2], tensors[-1]
    return 2 * left.numel() * (right.shape[0] if "linear" in name else right.shape[-1])


if __name__ == "__main__":
    main()
