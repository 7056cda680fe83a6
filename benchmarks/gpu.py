"""A sampling round, a window, an optimizer step and the loss at the size of real pairs, beside transformers and TRL. Under four minutes.

    python benchmarks/gpu.py            # or: make bench-gpu
    python benchmarks/gpu.py --small    # the same on a CPU, in small: whether it runs, not how fast
    python benchmarks/gpu.py --predict  # without a GPU: what follows from kernels and bytes of a round

Weights are random and built from configurations by size, and acceptance is forced, so nothing is downloaded. The floor of a round is
the bytes of weights and of keys and values that it has to read, at the bandwidth of a copy in the same run. Each line is a
separate case: one that fails says why, and the others go on; cases that no time is left for are named (`--limit_s 300` leaves time
for all). The table is written after each case. Peak memory is what the case takes at most, the models included.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without an installation

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from skd_trl import (  # noqa: E402
    DIVERGENCES,
    AcceptanceRule,
    Execution,
    SamplingParams,
    SKDConfig,
    SKDTrainer,
    interleaved_sample,
)
from skd_trl.loss.distillation_loss import distillation_loss  # noqa: E402
from skd_trl.loss.lm_head import LMHead  # noqa: E402
from skd_trl.loss.response_facts import ResponseFacts  # noqa: E402
from skd_trl.loss.teacher_signal import HiddenStates  # noqa: E402
from skd_trl.sampling.participants import LocalParticipant  # noqa: E402
from skd_trl.sampling.rounds import Rounds  # noqa: E402
from skd_trl.training.forward_patches import take_off_patches  # noqa: E402


# The published configurations; of the last two the sizes of a layer, and as many layers as fit one GPU beside the rest.
SIZES = {
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, True),
    "Qwen3-32B, 24 layers": (5120, 25600, 24, 64, 8, False),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, True),
    "teacher in small": (64, 128, 3, 4, 2, False),
    "student in small": (32, 64, 2, 4, 2, True),
}
PAIRS = {
    "8B": ("Qwen3-8B", "Qwen3-0.6B"),
    "32B": ("Qwen3-32B, 24 layers", "Qwen3-4B"),
    "small": ("teacher in small", "student in small"),
}
# Seconds that the cases should take on an H100 with their set-up, in their order. What has to be measured takes 218, and 10 go to
# making the models: less than the limit of 235. Most of the window in a graph are about ten captures, of a second each.
ESSENTIAL = {
    "sampling window, eager": 14,
    "sampling window, graph": 26,
    "transformers' generate, student": 5,
    "transformers' generate, teacher": 6,
    "loss of a micro-batch": 2,
    "step, SKDTrainer interleaved": 27,
    "step, SKDTrainer on-policy": 20,
    "step, DistillationTrainer at its defaults": 18,
    "sampling window, Inductor in a graph": 100,
}
MORE = {
    "step, DistillationTrainer without checkpointing": 17,
    "step, SKDTrainer on-policy without checkpointing": 19,
    "step, GKDTrainer at its defaults, on-policy": 20,
}
SECONDS = ESSENTIAL | MORE
# New tokens of a warm-up where nothing is captured.
FEW_TOKENS = 6


@dataclass(frozen=True)
class Forced(AcceptanceRule):
    """Accepts a proposal with probability `rate`, whatever the teacher says: acceptance as of a trained pair."""

    rate: float = 0.8

    def __call__(self, draft) -> torch.Tensor:
        return draft.coins < self.rate


@dataclass
class Bench:
    """What all cases need: the device, the shapes, the time that is left, and the table: its file, what is above it, its lines."""

    device: torch.device
    vocab_size: int
    num_rows: int
    prompt_tokens: int
    new_tokens: int
    num_draft: int
    stop_at: float
    path: Path
    head: list[str] = field(default_factory=list)
    lines: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def is_on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_on_gpu:
            torch.cuda.synchronize()

    def case(self, name: str, run: Callable[[], tuple[str, str]]) -> None:
        """A line of the table from what `run` returns (a figure, a note), if the time that it should take is left."""
        if time.perf_counter() + SECONDS[name] > self.stop_at:
            self.add(name, "not run", "", "no time was left")
            self.write()
            return
        try:
            gc.collect()
            if self.is_on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            figure, note = run()
        except Exception as error:  # out of memory, or whatever a release of a peer raises
            message = str(error).strip().partition("\n")[0][:120]
            figure, note = "failed", f"{type(error).__name__}: {message}" if message else type(error).__name__
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if self.is_on_gpu else "-"
        self.add(name, figure, peak, note)
        self.write()
        print(f"{name}: {figure} {note} (peak {peak} GiB)", flush=True)

    def add(self, *line: str) -> None:
        """A line of the table: what, its time, peak GiB, a note."""
        self.lines.append(line)

    def seconds_of(self, run: Callable[[], object], repeats: int = 3, num_warm_ups: int = 1) -> list[float]:
        """Seconds of `run`, after some that warm up."""
        found = []
        for turn in range(num_warm_ups + repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            if turn >= num_warm_ups:
                found.append(time.perf_counter() - start)
        return found

    @property
    def text(self) -> str:
        rows = (f"| {' | '.join(line)} |" for line in self.lines)
        return "\n".join([*self.head, "| what | time | peak GiB | |", "|---|---|---|---|", *rows, ""])

    def write(self) -> None:
        """Writes what there is: a run that is killed keeps it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text)


class WatchedRounds(Rounds):
    """Rounds that are waited for while `times` is a list, and timed into it."""

    def __init__(self, bench: Bench, **settings):
        super().__init__(**settings)
        self.bench, self.times = bench, None

    def run(self, *args):
        if self.times is None:
            return super().run(*args)
        self.bench.synchronize()
        start = time.perf_counter()
        result = super().run(*args)
        self.bench.synchronize()
        self.times.append(time.perf_counter() - start)
        return result

    def check_captured(self) -> None:
        if self.reason:
            raise RuntimeError(f"not captured: {self.reason}")


def build(name: str, vocab_size: int, device: torch.device, dtype: torch.dtype):
    """A model with random weights, made where it will be."""
    hidden, intermediate, layers, heads, key_heads, tied = SIZES[name]
    config = AutoConfig.for_model(
        "qwen3", vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=128 if hidden >= 1024 else 16,
        max_position_embeddings=8192, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # Logits as far apart as a trained model's, whose nuclei are small: random embeddings have a standard deviation of 0.02.
    model.model.norm.weight.data.fill_(max(1.6 / (0.02 * hidden**0.5), 1.0))
    return model


def bandwidth(bench: Bench) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 2**30 if bench.is_on_gpu else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(bench.seconds_of(lambda: target.copy_(source), 10))


def floor_of_round(bench: Bench, student, teacher, bytes_per_second: float) -> float:
    """Seconds to read once what a round cannot do without: G times the student's weights and its keys and values, once the
    teacher's."""
    context = bench.prompt_tokens + bench.new_tokens // 2
    total = 0
    for model, times in ((student, bench.num_draft), (teacher, 1)):
        config = model.config
        embedded = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # rows are looked up
        weights = (sum(p.numel() for p in model.parameters()) - embedded) * model.dtype.itemsize
        keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        total += times * (weights + keys * context * bench.num_rows)
    return total / bytes_per_second


def sampling(bench: Bench, student, teacher, floor: float, ways: dict[str, dict]) -> None:
    """Rounds and windows of ours, in `ways`: a name, and the arguments of `Rounds`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, bench.vocab_size - 5, (bench.num_rows, bench.prompt_tokens), generator=generator)
    ids = ids.to(bench.device)
    mask = torch.ones_like(ids)

    def window(rounds: Rounds, new_tokens: int = bench.new_tokens) -> None:
        # The noise is always the same, and so are the shapes of the rounds: those that come once are captured in the second window.
        interleaved_sample(
            LocalParticipant(student, SamplingParams(temperature=0.5, top_p=0.5)),
            LocalParticipant(teacher, SamplingParams(temperature=0.2, top_p=0.5)),
            ids, mask, accept=Forced(), max_new_tokens=new_tokens, eos_token_ids=[], noise=torch.Generator().manual_seed(1),
            execution=Execution(bench.num_draft, rounds=rounds),
        )  # fmt: skip

    def timed_eager(rounds: WatchedRounds) -> tuple[float, list[float], str]:
        """Seconds of a window, and of its rounds: without a graph the host waits after each one anyway."""
        window(rounds, FEW_TOKENS)
        rounds.times = []
        (seconds,) = bench.seconds_of(lambda: window(rounds), 1, num_warm_ups=0)
        return seconds, rounds.times, ""

    def timed_captured(rounds: WatchedRounds) -> tuple[float, list[float], str]:
        """Seconds of a window that nobody watches, and of the rounds of one more."""
        free = free_memory(bench)
        for _ in range(2):
            window(rounds)
            rounds.check_captured()
        (seconds,) = bench.seconds_of(lambda: window(rounds), 1, num_warm_ups=0)
        rounds.times = []
        window(rounds)
        rounds.check_captured()
        held = f"; {len(rounds.graphs)} graphs"
        if bench.is_on_gpu:
            caches = rounds.num_kept_bytes / 2**30
            held += f", free GiB {free:.1f} before and {free_memory(bench):.1f} after, of which {caches:.1f} went to caches"
        return seconds, rounds.times, held

    for way, settings in ways.items():

        def run(way=way, settings=settings) -> tuple[str, str]:
            rounds = WatchedRounds(bench, **settings)
            try:
                seconds, times, held = (timed_eager if way == "eager" else timed_captured)(rounds)
            finally:
                rounds.release()
            middle = statistics.median(times[: max(len(times) // 2, 1)])
            bench.add(
                f"round, {way}", f"{1000 * middle:.1f} ms", "-", f"{len(times)} rounds; floor {1000 * floor:.1f} ms"
            )
            return f"{seconds:.2f} s", f"{bench.num_rows * bench.new_tokens / seconds:.0f} tokens/s{held}"

        bench.case(f"sampling window, {way}", run)


def free_memory(bench: Bench) -> float:
    """GiB of the GPU that nothing holds."""
    if not bench.is_on_gpu:
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**30


def generation(bench: Bench, student, teacher) -> None:
    """transformers' generate of either model."""
    ids = torch.randint(5, bench.vocab_size - 5, (bench.num_rows, bench.prompt_tokens), device=bench.device)
    mask = torch.ones_like(ids)

    def generate(model, new_tokens: int) -> None:
        settings = GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, temperature=0.5, top_p=0.5, top_k=0,
            pad_token_id=0,
        )  # fmt: skip
        model.generate(ids, attention_mask=mask, generation_config=settings)

    for name, model in (("student", student), ("teacher", teacher)):

        def run(model=model) -> tuple[str, str]:
            generate(model, FEW_TOKENS)
            (seconds,) = bench.seconds_of(lambda: generate(model, bench.new_tokens), 1, num_warm_ups=0)
            return f"{seconds:.2f} s", f"{bench.num_rows * bench.new_tokens / seconds:.0f} tokens/s"

        bench.case(f"transformers' generate, {name}", run)


def loss(bench: Bench, student, teacher) -> None:
    """The loss of a micro-batch, forward and backward, from hidden states."""
    num = max(bench.num_rows * bench.new_tokens // 2, 8)

    def run() -> tuple[str, str]:
        dtype = student.dtype
        heads = [model.get_output_embeddings().weight.detach() for model in (student, teacher)]
        weight = heads[0].clone().requires_grad_()
        states = [torch.randn(num, head.shape[1], device=bench.device, dtype=dtype) for head in heads]
        states[0].requires_grad_()
        facts = ResponseFacts.of(torch.randint(bench.vocab_size, (num,), device=bench.device))
        signals = [HiddenStates(states[0], LMHead(weight)), HiddenStates(states[1], LMHead(heads[1]))]
        seconds = bench.seconds_of(
            lambda: distillation_loss(
                *signals, facts, divergence=DIVERGENCES["forward_kl"](), vocab_size=bench.vocab_size
            ).loss.backward()
        )
        return f"{1000 * statistics.median(seconds):.0f} ms", f"{num} positions"

    bench.case("loss of a micro-batch", run)


class Clock(TrainerCallback):
    """Seconds of each optimizer step, and how many graphs the trainer's `rounds` (ours alone has some) hold after it."""

    def __init__(self, bench: Bench):
        self.bench, self.seconds, self.num_graphs, self.rounds = bench, [], [], None

    def on_train_begin(self, *args, **kwargs):
        self.bench.synchronize()
        self.last = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.bench.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.num_graphs.append(len(self.rounds.graphs) if self.rounds is not None else 0)
        self.last = now


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word per id."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1", chat_template=template)


def steps(bench: Bench, pair: tuple[str, str], teacher, names: Iterable[str]) -> None:
    """An optimizer step of ours and of TRL's trainers, those of `names`: half the rows and half the prompt of the windows above.
    Of ours five steps, for the rounds of the first ones have shapes that are to be captured."""
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer, size = tokenizer_of(bench.vocab_size), max(bench.num_rows // 2, 1)
    generator = torch.Generator().manual_seed(1)

    def text(count: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(5, bench.vocab_size - 5, (count,), generator=generator))

    rows = [
        {
            "prompt": [{"role": "user", "content": text(bench.prompt_tokens // 2)}],
            "completion": [{"role": "assistant", "content": text(8)}],
        }
        for _ in range(2 * size)
    ]
    as_needed = {
        DistillationTrainer: [{"prompt": row["prompt"]} for row in rows],
        GKDTrainer: [{"messages": row["prompt"] + row["completion"]} for row in rows],
    }
    on_policy = {"rollout": "student", "temperature": 1.0, "student_top_p": 1.0}
    without = {"gradient_checkpointing": False}
    arms = {
        "step, SKDTrainer interleaved": (SKDTrainer, SKDConfig, {"accept": Forced()}),
        "step, SKDTrainer on-policy": (SKDTrainer, SKDConfig, on_policy),
        "step, DistillationTrainer at its defaults": (DistillationTrainer, DistillationConfig, {}),
        "step, DistillationTrainer without checkpointing": (DistillationTrainer, DistillationConfig, without),
        "step, SKDTrainer on-policy without checkpointing": (SKDTrainer, SKDConfig, on_policy | without),
        "step, GKDTrainer at its defaults, on-policy": (GKDTrainer, GKDConfig, {}),
    }
    for name in names:

        def run(name=name) -> tuple[str, str]:
            trainer_class, config_class, settings = arms[name]
            known = {field.name for field in fields(config_class)}
            limit = "max_completion_length" if "max_completion_length" in known else "max_new_tokens"
            if "lmbda" in known:
                settings = {"lmbda": 1.0, **settings}
            student, clock = build(pair[1], bench.vocab_size, bench.device, torch.float32), Clock(bench)
            on_cpu = {} if bench.is_on_gpu else {"bf16": False, "use_cpu": True}
            is_ours = trainer_class is SKDTrainer
            try:
                with tempfile.TemporaryDirectory() as directory:
                    trainer = trainer_class(
                        model=student,
                        teacher_model=teacher,
                        args=config_class(
                            output_dir=directory, per_device_train_batch_size=size, max_steps=5 if is_ours else 2,
                            report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=100, seed=3,
                            **{limit: bench.new_tokens}, **on_cpu, **settings,
                        ),
                        train_dataset=Dataset.from_list(as_needed.get(trainer_class, rows)),
                        processing_class=tokenizer,
                        callbacks=[clock],
                    )  # fmt: skip
                    clock.rounds = trainer._rounds if is_ours else None
                    trainer.train()
            finally:
                take_off_patches(teacher)
            if not is_ours:
                return f"{clock.seconds[-1]:.2f} s", f"the first took {clock.seconds[0]:.2f} s"
            for number, seconds in enumerate(clock.seconds):
                held = f"{clock.num_graphs[number]} graphs after it"
                bench.add(f"{name}, number {number + 1}", f"{seconds:.2f} s", "-", held)
            reason = f"; not captured: {clock.rounds.reason}" if clock.rounds.reason else ""
            return f"{statistics.median(clock.seconds[-2:]):.2f} s", f"median of the last two{reason}"

        bench.case(name, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--predict",
        action="store_true",
        help="counts kernels and bytes of a round, without a GPU, and prints what follows",
    )
    parser.add_argument("--small", action="store_true", help="tiny models on whatever is there")
    parser.add_argument("--pair", choices=list(PAIRS), help="default: 8B, or small with --small")
    parser.add_argument("--num_draft_tokens", type=int, default=5)
    parser.add_argument("--limit_s", type=float, default=235, help="no case is begun that this leaves no time for")
    parser.add_argument("--without_inductor", action="store_true", help="saves the two minutes that it compiles")
    parser.add_argument("--output", type=Path, help="default: results/gpu.md")
    args = parser.parse_args()
    if args.predict:
        from gpu_prediction import predict

        print("\n".join(predict(build, PAIRS["8B"], 151936, Forced(), args.num_draft_tokens)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.small:
        raise SystemExit("There is no GPU. Try the script with --small, or run it on a machine that has one.")
    transformers.logging.set_verbosity_error()
    pair = PAIRS[args.pair or ("small" if args.small else "8B")]
    shapes = (512, 4, 16, 12) if args.small else (151936, 32, 512, 128)
    path = args.output or Path(__file__).parent / "results" / "gpu.md"
    bench = Bench(device, *shapes, args.num_draft_tokens, time.perf_counter() + args.limit_s, path)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher, student = (build(name, bench.vocab_size, device, dtype) for name in pair)
    copied = bandwidth(bench)
    floor = floor_of_round(bench, student, teacher, copied)
    bench.head = head_of(bench, pair, copied)
    with torch.no_grad():
        sampling(bench, student, teacher, floor, {"eager": {"capture": False}})
        if bench.is_on_gpu:
            sampling(bench, student, teacher, floor, {"graph": {}})
        generation(bench, student, teacher)
    loss(bench, student, teacher)
    steps(bench, pair, teacher, [name for name in ESSENTIAL if name.startswith("step")])
    if bench.is_on_gpu and not args.without_inductor:
        with torch.no_grad():
            sampling(bench, student, teacher, floor, {"Inductor in a graph": {"compile": True}})
    steps(bench, pair, teacher, MORE)
    print(bench.text)


def head_of(bench: Bench, pair: tuple[str, str], copied: float) -> list[str]:
    """What is above the table: when, with what, on what."""
    name = torch.cuda.get_device_name() if bench.is_on_gpu else "CPU"
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    driver = "no CUDA"
    if bench.is_on_gpu:
        version = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = f"driver {version}, CUDA {torch.version.cuda}"
    return [
        "# Speed on one GPU", "",
        f"- {date.today()}, commit {commit}, command `python benchmarks/gpu.py {' '.join(sys.argv[1:])}`",
        f"- {name}, {driver}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}",
        f"- teacher {pair[0]}, student {pair[1]}, random weights, acceptance forced to {Forced().rate}, vocabulary {bench.vocab_size}; windows "
        f"of {bench.num_rows} prompts of {bench.prompt_tokens} tokens and {bench.new_tokens} new ones, G = {bench.num_draft}; steps of half as "
        f'many prompts, half as long, G = "auto"; a copy moves {copied / 1e12:.2f} TB/s', "",
    ]  # fmt: skip


def output_of(*command: str) -> str:
    """The first word that a command prints, where there is one."""
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.split()
    except OSError:  # a machine without it
        found = []
    return found[0] if found else "unknown"


if __name__ == "__main__":
    main()
