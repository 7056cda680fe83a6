"""Two versions of the package against each other: sampling, optimizer steps and the loss, each version in another process.

The two take turns, with the same prompts and the same noise, and the median of the turns' ratios is reported: other work of the machine
meets both. The other version is a checkout; its benchmarks measure it, so they need the functions that are called here.

    git worktree add ../before COMMIT
    python benchmarks/paired.py --before ../before
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


HERE = Path(__file__).resolve().parent
SAMPLED = {"sampling": "auto", "sampling, G = 5": 5}
STEPS = {"step": "SKDTrainer", "step, G = 5": "SKDTrainer, G = 5"}
ARMS = [*SAMPLED, *STEPS, "loss"]
WORKER = "--worker"


def main() -> None:
    from common import Report, load_prompts, median, parser, prepare

    own = parser(__doc__.splitlines()[0], clock="cpu")
    own.add_argument("--before", type=Path, required=True, help="checkout of the other version")
    own.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    own.add_argument("--batch_size", type=int, default=8)
    own.add_argument(
        "--num_tokens", type=int, default=64, help="tokens written for each prompt, and of a response in a loss"
    )
    own.add_argument("--max_new_tokens", type=int, default=32, help="of a step's responses")
    args = own.parse_args()
    prepare(args)
    load_prompts(args, args.batch_size)  # an error about them comes before the processes start
    report, rows = Report("paired", "Two versions", args), []
    for arm in args.arms:
        before, after = zip(*turns(args, arm), strict=True)
        ratios = [new / old for old, new in zip(before, after, strict=True)]
        rows.append([arm, median(before), median(after), median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"])
        print(f"{arm}: {median(ratios):.3f}", file=sys.stderr, flush=True)
    report.table(
        f"This version and {commit(args.before)}",
        ["", "seconds before", "seconds now", "ratio", "of the turns"],
        rows,
        f"Sampling: {args.batch_size} prompts, {args.num_tokens} tokens each. A step: {args.batch_size} prompts, up to "
        f"{args.max_new_tokens} tokens. The loss: {args.batch_size} x {args.num_tokens} tokens, forward and backward.",
    )


def turns(args, arm: str) -> Iterator[tuple[float, float]]:
    """Seconds of both versions, before and now, in each turn but the first; which begins alternates."""
    checkouts = [args.before.resolve(), HERE.parent]
    workers = [start(checkout, arm, args) for checkout in checkouts]
    try:
        for turn in range(args.repeats + 1):
            took = [0.0, 0.0]
            for which in (0, 1) if turn % 2 else (1, 0):
                took[which] = ask(workers[which])
            if turn > 0:
                yield took[0], took[1]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def start(checkout: Path, arm: str, args: argparse.Namespace) -> subprocess.Popen:
    """A process that measures an arm once whenever it is told to."""
    paths = os.pathsep.join(map(str, (checkout, checkout / "benchmarks")))
    return subprocess.Popen(
        [sys.executable, __file__, WORKER, str(checkout), arm, json.dumps(vars(args), default=str)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(worker: subprocess.Popen) -> float:
    """One measurement of a process, in seconds."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("took "):
            return float(line.removeprefix("took "))
    raise SystemExit("A version cannot be measured; its error is above.")


def commit(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or str(checkout)


# In the process of one version


def wait() -> None:
    if not sys.stdin.readline():
        raise SystemExit


def tell(seconds: float) -> None:
    print(f"took {seconds}", flush=True)


def work(checkout: str, arm: str, settings: str) -> None:
    """Measures once for each line of the standard input, as long as there are any."""
    sys.path.remove(str(HERE))  # the benchmarks of this version, which come before those of `checkout`
    from common import prepare

    import skd_trl

    if Path(checkout) not in Path(skd_trl.__file__).parents:
        raise SystemExit(f"{checkout} is no checkout of the package: skd_trl comes from {skd_trl.__file__}.")
    args = argparse.Namespace(**json.loads(settings))
    args.assets, clock = Path(args.assets), prepare(args)
    if arm in SAMPLED:
        sample_in_turns(args, clock, SAMPLED[arm])
    elif arm in STEPS:
        train_in_turns(args, clock, STEPS[arm])
    else:
        import memory

        sizes = {"vocab_size": 49152, "length": args.num_tokens, "prompt_tokens": 0, "hidden_sizes": [576, 576]}
        sizes |= {"batch_size": args.batch_size, "threads": args.threads, "clock": args.clock}
        while True:
            wait()
            tell(memory.measure("skd_trl", **sizes)["seconds"])


def sample_in_turns(args, clock, num_draft_tokens) -> None:
    from common import load_model, load_prompts
    from sampler import TopK, measured_policy, sample

    args.accept_top_k = 25
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    pair = student, teacher, *load_prompts(args, args.batch_size), TopK(args.accept_top_k)
    if num_draft_tokens == "auto":
        num_draft_tokens = measured_policy(args, *pair)
    for turn in range(sys.maxsize):
        wait()
        torch.manual_seed(turn)
        start = clock()
        sample(args, *pair, num_draft_tokens=num_draft_tokens)
        tell(clock() - start)


def train_in_turns(args, clock, arm: str) -> None:
    import step

    class Timer(step.StepTimer):
        """Waits for its turn between two steps."""

        def on_train_begin(self, *unused, **named):
            wait()
            self.last = self.clock()

        def on_step_end(self, *unused, **named):
            tell(self.clock() - self.last)
            self.on_train_begin()

    step.StepTimer = Timer
    args.prompt_tokens = [105, 135]
    rows = step.prompts_and_completions(args, args.batch_size * (args.repeats + 1))
    step.run(args, rows, clock, *step.ARMS[arm])


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(*sys.argv[2:])
    else:
        main()
