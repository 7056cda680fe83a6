"""What all benchmarks share: the pair of models, the prompts, the clock, the table.

Only ratios within one run mean anything: the arms of a comparison take turns, repeat by repeat, so other work of
the machine meets all of them, and the median of the repeats is reported.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer


HERE = Path(__file__).parent
ASSETS = HERE.parent / "examples" / "assets"


def parser(description: str, *, models: bool = True, **defaults) -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if models:
        own.add_argument("--assets", type=Path, default=ASSETS, help="directory made by examples/offline_assets.py")
        own.add_argument("--student", default="student-14", help="directory in assets, or a name or path")
        own.add_argument("--teacher", default="teacher", help="directory in assets, or a name or path")
    own.add_argument("--repeats", type=int, default=5, help="the median of these is reported")
    own.add_argument("--threads", type=int, default=1, help="more than one only on a machine that nobody else uses")
    own.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="'cpu' (with one thread) counts what this process got, whoever else is running",
    )
    own.add_argument("--output", type=Path, help="default: results/NAME.md")
    own.set_defaults(**defaults)
    return own


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def load_model(args: argparse.Namespace, role: str):
    name = getattr(args, role)
    path = args.assets / name
    return AutoModelForCausalLM.from_pretrained(path if path.exists() else name, dtype=torch.float32).eval()


def load_prompts(args: argparse.Namespace, count: int, shortest: int = 100, longest: int = 140):
    """`count` left-padded prompts (ids, mask) of `shortest` to `longest` tokens, from the test texts."""
    tokenizer = load_tokenizer(args)
    ids = []
    for conversation in load_rows(args, "test")["prompt"]:
        prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        if shortest <= len(prompt) <= longest:
            ids.append(prompt)
        if len(ids) == count:
            break
    if len(ids) < count:
        raise SystemExit(
            f"The test texts have {len(ids)} prompts of {shortest} to {longest} tokens, not {count}: ask for fewer."
        )
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in ids])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids])
    return padded, mask


def load_tokenizer(args: argparse.Namespace):
    path = args.assets / args.teacher
    return AutoTokenizer.from_pretrained(path if path.exists() else args.teacher)


def load_rows(args: argparse.Namespace, split: str) -> Dataset:
    file = args.assets / "text" / f"{split}.jsonl"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run `make assets`, or name a directory that has it with --assets.")
    return load_dataset("json", data_files=str(file), split="train")


def prepare(args: argparse.Namespace) -> Callable[[], float]:
    """Pins threads and seed, and returns the clock."""
    if args.clock == "cpu" and args.threads > 1:
        raise SystemExit("--clock cpu adds up the time of all threads; use --threads 1 with it.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    return CLOCKS[args.clock]


def take_turns(arms: dict[str, Callable[[], int]], repeats: int, clock: Callable[[], float], title: str = ""):
    """Seconds per token of each arm, a list of `repeats`; an arm returns how many tokens it made. The first turn of all is
    not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in track(range(repeats + 1), description=title, console=Console(stderr=True), transient=True):
        for name, arm in arms.items():
            torch.manual_seed(turn)
            start = clock()
            tokens = arm()
            if turn > 0:
                seconds[name].append((clock() - start) / tokens)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> str:
    """Smallest to largest in percent of the median: how far to trust it."""
    middle = median(values)
    return f"{100 * (min(values) / middle - 1):+.0f}..{100 * (max(values) / middle - 1):+.0f}%"


class Report:
    """Tables for the terminal, and the same in a markdown file with what is needed to run it again."""

    def __init__(self, name: str, title: str, args: argparse.Namespace):
        self.args, self.path = args, args.output or HERE / "results" / f"{name}.md"
        self.console = Console()
        self.lines = [f"# {title}", "", *self._circumstances(), ""]
        self.started = time.perf_counter()

    def table(self, title: str, header: list[str], rows: list[list], note: str = "") -> None:
        rows = [[_cell(value) for value in row] for row in rows]
        shown = Table(title=title, title_justify="left", caption=note, caption_justify="left")
        for i, name in enumerate(header):
            shown.add_column(name, justify="right" if i else "left")
        for row in rows:
            shown.add_row(*row)
        self.console.print(shown)
        self.lines += [f"## {title}", "", *([note, ""] if note else [])]
        self.lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        self.lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        self._write()  # a run that is cut short keeps what it has measured

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        took = f"Took {(time.perf_counter() - self.started) / 60:.1f} minutes."
        self.path.write_text("\n".join([*self.lines, took, ""]))

    def _circumstances(self) -> list[str]:
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        clock = "wall clock" if self.args.clock == "wall" else "processor time of the process"
        models = f"; student {self.args.student}, teacher {self.args.teacher}" if "student" in self.args else ""
        return [
            f"- {date.today()}, commit {_commit()}, command `{command}`",
            f"- {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), fp32, {clock}, "
            f"medians of {self.args.repeats}",
            f"- torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
            f"python {platform.python_version()}{models}",
        ]


def _cell(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        " with changes" if git("status", "--short", "..", ":!results") else ""
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split(":")[1].split() for line in lines if line.startswith("flags"))
        return name + (" (AVX-512)" if "avx512f" in flags else "")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
