"""A sampling round, a window, an optimizer step and the loss at the size of real pairs, beside transformers and TRL. Under four minutes.

    python benchmarks/gpu.py            # or: make bench-gpu
    python benchmarks/gpu.py --small    # the same on a CPU, in small: whether it runs, not how fast
    python benchmarks/gpu.py --predict  # without a GPU: what follows from kernels and bytes of a round

Weights are random and built from configurations by size, and acceptance is forced, so nothing is downloaded. The floor of a round is
the bytes of weights and of keys and values that it has to read, at the bandwidth of a copy in the same run. Each line is a
separate case: one that fails says why, and the others go on; cases that no time is left for are named. Peak memory is what the case takes at most,
the models included.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
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


@dataclass(frozen=True)
class Forced(AcceptanceRule):
    """Accepts a proposal with probability `rate`, whatever the teacher says: acceptance as of a trained pair."""

    rate: float = 0.8

    def __call__(self, draft) -> torch.Tensor:
        return draft.coins < self.rate


@dataclass
class Bench:
    """What all cases need: the device, the shapes, the time that is left, and the lines of the table."""

    device: torch.device
    vocab_size: int
    num_rows: int
    prompt_tokens: int
    new_tokens: int
    num_draft: int
    stop_at: float
    lines: list[tuple[str, str, str, str]]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def case(self, name: str, seconds: float, run: Callable[[], tuple[str, str]]) -> None:
        """A line of the table from what `run` returns (a figure, a note), if about `seconds` are left."""
        if time.perf_counter() + seconds > self.stop_at:
            self.lines.append((name, "not run", "", "no time was left"))
            return
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            figure, note = run()
        except Exception as error:  # out of memory, or whatever a release of a peer raises
            figure, note = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if self.device.type == "cuda" else "-"
        self.lines.append((name, figure, peak, note))
        print(f"{name}: {figure} {note} (peak {peak} GiB)", flush=True)

    def seconds_of(self, run: Callable[[], object], repeats: int = 3) -> list[float]:
        """Seconds of `run`, after one that warms up."""
        found = []
        for turn in range(repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            if turn > 0:
                found.append(time.perf_counter() - start)
        return found


def build(name: str, vocab_size: int, device: torch.device, dtype: torch.dtype):
    """A model with random weights, made where it will be."""
    hidden, intermediate, layers, heads, key_heads, tied = SIZES[name]
    config = AutoConfig.for_model(
        "qwen3", vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=128 if hidden >= 1024 else 16,
        max_position_embeddings=8192, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def bandwidth(bench: Bench) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 2**30 if bench.device.type == "cuda" else 2**26
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
    ids = torch.randint(5, bench.vocab_size - 5, (bench.num_rows, bench.prompt_tokens), generator=generator).to(
        bench.device
    )
    mask = torch.ones_like(ids)
    for way, settings in ways.items():
        rounds = Rounds(**settings)

        def window(rounds=rounds) -> None:
            interleaved_sample(
                LocalParticipant(student, SamplingParams(temperature=0.5, top_p=0.5)),
                LocalParticipant(teacher, SamplingParams(temperature=0.2, top_p=0.5)),
                ids, mask, accept=Forced(), max_new_tokens=bench.new_tokens, eos_token_ids=[], noise=generator,
                execution=Execution(bench.num_draft, rounds=rounds),
            )  # fmt: skip

        def run(window=window, way=way) -> tuple[str, str]:
            times, original = [], Rounds.run

            def timed(self, *args):
                start = time.perf_counter()
                result = original(self, *args)
                bench.synchronize()
                times.append(time.perf_counter() - start)
                return result

            seconds = bench.seconds_of(window, 1 if way == "eager" else 2)
            Rounds.run = timed
            try:
                window()
            finally:
                Rounds.run = original
            tokens = bench.num_rows * bench.new_tokens
            middle = statistics.median(times[: max(len(times) // 2, 1)])
            bench.lines.append(
                (f"round, {way}", f"{1000 * middle:.1f} ms", "-", f"{len(times)} rounds; floor {1000 * floor:.1f} ms")
            )
            return f"{min(seconds):.2f} s", f"{tokens / min(seconds):.0f} tokens/s"

        bench.case(f"sampling window, {way}", 130 if "Inductor" in way else 25, run)


def generation(bench: Bench, student, teacher) -> None:
    """transformers' generate of either model."""
    ids = torch.randint(5, bench.vocab_size - 5, (bench.num_rows, bench.prompt_tokens), device=bench.device)
    mask = torch.ones_like(ids)
    for name, model in (("student", student), ("teacher", teacher)):
        settings = GenerationConfig(
            max_new_tokens=bench.new_tokens, min_new_tokens=bench.new_tokens, do_sample=True, temperature=0.5, top_p=0.5,
            top_k=0, pad_token_id=0,
        )  # fmt: skip

        def generate(model=model, settings=settings) -> tuple[str, str]:
            seconds = bench.seconds_of(lambda: model.generate(ids, attention_mask=mask, generation_config=settings), 1)
            return f"{min(seconds):.2f} s", f"{bench.num_rows * bench.new_tokens / min(seconds):.0f} tokens/s"

        bench.case(f"transformers' generate, {name}", 12, generate)


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

    bench.case("loss of a micro-batch", 5, run)


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, bench: Bench):
        self.bench, self.seconds = bench, []

    def on_train_begin(self, *args, **kwargs):
        self.bench.synchronize()
        self.last = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.bench.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word per id."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1", chat_template=template)


def steps(bench: Bench, pair: tuple[str, str], teacher) -> None:
    """An optimizer step of ours and of TRL's trainers: half the rows and half the prompt of the windows above."""
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
    arms = (
        ("step, SKDTrainer interleaved", SKDTrainer, SKDConfig, {"accept": Forced()}),
        ("step, SKDTrainer on-policy", SKDTrainer, SKDConfig, on_policy),
        ("step, DistillationTrainer at its defaults", DistillationTrainer, DistillationConfig, {}),
        (
            "step, DistillationTrainer without checkpointing",
            DistillationTrainer,
            DistillationConfig,
            {"gradient_checkpointing": False},
        ),
        (
            "step, SKDTrainer on-policy without checkpointing",
            SKDTrainer,
            SKDConfig,
            {**on_policy, "gradient_checkpointing": False},
        ),
        ("step, GKDTrainer at its defaults, on-policy", GKDTrainer, GKDConfig, {}),
    )
    for name, trainer_class, config_class, settings in arms:

        def run(trainer_class=trainer_class, config_class=config_class, settings=settings) -> tuple[str, str]:
            known = {field.name for field in fields(config_class)}
            limit = "max_completion_length" if "max_completion_length" in known else "max_new_tokens"
            if "lmbda" in known:
                settings = {"lmbda": 1.0, **settings}
            student, clock = build(pair[1], bench.vocab_size, bench.device, torch.float32), Clock(bench)
            on_cpu = {} if bench.device.type == "cuda" else {"bf16": False, "use_cpu": True}
            with tempfile.TemporaryDirectory() as directory:
                trainer_class(
                    model=student,
                    teacher_model=teacher,
                    args=config_class(
                        output_dir=directory, per_device_train_batch_size=size, max_steps=2, report_to=[], save_strategy="no",
                        disable_tqdm=True, logging_steps=100, seed=3, **{limit: bench.new_tokens}, **on_cpu, **settings,
                    ),
                    train_dataset=Dataset.from_list(as_needed.get(trainer_class, rows)),
                    processing_class=tokenizer,
                    callbacks=[clock],
                ).train()  # fmt: skip
            return f"{clock.seconds[-1]:.2f} s", f"the first took {clock.seconds[0]:.2f} s"

        bench.case(name, 22, run)


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
    bench = Bench(device, *shapes, args.num_draft_tokens, time.perf_counter() + args.limit_s, [])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher, student = (build(name, bench.vocab_size, device, dtype) for name in pair)
    copied = bandwidth(bench)
    floor = floor_of_round(bench, student, teacher, copied)
    with torch.no_grad():
        sampling(bench, student, teacher, floor, {"eager": {"capture": False}})
        if device.type == "cuda":
            sampling(bench, student, teacher, floor, {"graph": {}})
        generation(bench, student, teacher)
    loss(bench, student, teacher)
    steps(bench, pair, teacher)
    if device.type == "cuda" and not args.without_inductor:  # last, for it compiles
        with torch.no_grad():
            sampling(bench, student, teacher, floor, {"Inductor in a graph": {"compile": True}})
    report(bench, pair, copied, args)


def report(bench: Bench, pair: tuple[str, str], copied: float, args: argparse.Namespace) -> None:
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    driver = "no CUDA"
    if bench.device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout.split()
        driver = f"driver {found[0] if found else 'unknown'}, CUDA {torch.version.cuda}"
    lines = [
        "# Speed on one GPU", "",
        f"- {date.today()}, commit {git.stdout.strip() or 'unknown'}, command `python benchmarks/gpu.py {' '.join(sys.argv[1:])}`",
        f"- {name}, {driver}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}",
        f"- teacher {pair[0]}, student {pair[1]}, random weights, acceptance forced to {Forced().rate}, G = {bench.num_draft}, vocabulary "
        f"{bench.vocab_size}; windows of {bench.num_rows} prompts of {bench.prompt_tokens} tokens and {bench.new_tokens} new ones, steps of "
        f"half as many prompts, half as long; a copy moves {copied / 1e12:.2f} TB/s", "",
        "| what | time | peak GiB | |", "|---|---|---|---|", *(f"| {' | '.join(line)} |" for line in dict.fromkeys(bench.lines)), "",
    ]  # fmt: skip
    path = args.output or here / "results" / "gpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
