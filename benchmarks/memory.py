"""Peak memory of the loss, forward and backward, above what the models and their inputs take: ours against GKDTrainer's.

Both start from last hidden states of B x (P + T) positions: GKDTrainer makes full logits of all of them, prompts included,
and compares the responses; `distillation_loss` gets the responses' positions. A separate process measures each case. Models
are not loaded: the heads have random weights.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from common import CLOCKS, Report, median, parser, prepare
from torch import nn
from trl.experimental.gkd import GKDTrainer

from skd_trl.loss.distillation_loss import distillation_loss
from skd_trl.loss.divergences import jsd
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates


def main() -> None:
    own = parser(__doc__.splitlines()[0], models=False, repeats=3)
    own.add_argument("--vocab_sizes", type=int, nargs="+", default=[49152, 151936])
    own.add_argument("--lengths", type=int, nargs="+", default=[64, 256])
    own.add_argument("--batch_size", type=int, default=8)
    own.add_argument("--prompt_tokens", type=int, default=0, help="0 favours GKDTrainer, which makes their logits too")
    own.add_argument("--hidden_sizes", type=int, nargs=2, default=[576, 576], help="student's and teacher's")
    own.add_argument("--limit_gib", type=float, default=8.0, help="GKDTrainer's larger cases are extrapolated")
    own.add_argument("--case", help=argparse.SUPPRESS)
    args = own.parse_args()
    if args.case:
        print(json.dumps(measure(**json.loads(args.case))))
        return
    prepare(args)
    report = Report("memory", "Peak memory of the loss", args)
    rows = []
    for vocab_size in args.vocab_sizes:
        for length in args.lengths:
            rows.append([vocab_size, length, *case(args, vocab_size, length)])
    report.table(
        f"B = {args.batch_size}, P = {args.prompt_tokens}, heads of {args.hidden_sizes[0]} (student) and {args.hidden_sizes[1]} "
        "columns, forward and backward, JSD with beta 0.5",
        ["V", "T", "GKDTrainer [MiB]", "skd_trl [MiB]", "share [%]", "GKDTrainer [s]", "skd_trl [s]"],
        rows,
        "Above the process before the loss. `~`: measured on fewer rows and scaled, as the whole does not fit.",
    )


def case(args, vocab_size: int, length: int) -> list:
    common = {"vocab_size": vocab_size, "length": length, "prompt_tokens": args.prompt_tokens}
    common |= {"hidden_sizes": args.hidden_sizes, "threads": args.threads, "clock": args.clock}
    logits = args.batch_size * (length + args.prompt_tokens) * vocab_size * 4
    # At its peak about 14 tensors of the logits' size.
    share = 1
    while 14 * logits / share > args.limit_gib * 2**30 and share < args.batch_size:
        share *= 2
    theirs, ours = run(
        args.repeats,
        {**common, "whose": "GKDTrainer", "batch_size": args.batch_size // share},
        {**common, "whose": "skd_trl", "batch_size": args.batch_size},
    )
    theirs = {name: value * share for name, value in theirs.items()}
    mark = "~" if share > 1 else ""
    return [
        f"{mark}{theirs['mib']:.0f}", f"{ours['mib']:.0f}", 100 * ours["mib"] / theirs["mib"],
        f"{mark}{theirs['seconds']:.1f}", f"{ours['seconds']:.1f}",
    ]  # fmt: skip


def run(repeats: int, *cases: dict) -> list[dict]:
    """The medians of each case, which take turns."""
    commands = [[sys.executable, __file__, "--case", json.dumps(settings)] for settings in cases]
    found = [[json.loads(_output(command)) for command in commands] for _ in range(repeats)]
    return [{name: median([turn[i][name] for turn in found]) for name in found[0][i]} for i in range(len(cases))]


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def measure(whose, vocab_size, length, prompt_tokens, batch_size, hidden_sizes, threads, clock) -> dict:
    """MiB and seconds of one loss with its backward."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    heads = [nn.Linear(size, vocab_size, bias=False) for size in hidden_sizes]
    heads[1].requires_grad_(False)
    width = prompt_tokens + length
    student_hidden = torch.randn(batch_size, width, hidden_sizes[0], requires_grad=True)
    teacher_hidden = torch.randn(batch_size, width, hidden_sizes[1])
    labels = torch.full((batch_size, width), -100)
    labels[:, prompt_tokens:] = torch.randint(vocab_size, (batch_size, length))
    for parameter in heads[0].parameters():
        parameter.grad = torch.zeros_like(parameter)  # belongs to the model
    loss_of = gkd_loss if whose == "GKDTrainer" else our_loss
    loss_of(student_hidden[:1, -1:], teacher_hidden[:1, -1:], heads, labels[:1, -1:]).backward()  # libraries load
    before, start = resident_mib(), CLOCKS[clock]()
    reset_peak()
    loss_of(student_hidden, teacher_hidden, heads, labels).backward()
    return {"mib": peak_mib() - before, "seconds": CLOCKS[clock]() - start}


def gkd_loss(student_hidden, teacher_hidden, heads, labels) -> torch.Tensor:
    student_logits = heads[0](student_hidden)
    with torch.no_grad():
        teacher_logits = heads[1](teacher_hidden)
    return GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.5)


def our_loss(student_hidden, teacher_hidden, heads, labels) -> torch.Tensor:
    where = labels != -100
    student, teacher = (LMHead(weight=head.weight) for head in heads)
    outcome = distillation_loss(
        HiddenStates(student_hidden[where], student), HiddenStates(teacher_hidden[where], teacher),
        ResponseFacts.of(labels[where]), divergence=jsd(0.5), vocab_size=len(heads[0].weight),
        statistics=("student_entropy", "teacher_entropy"),  # SKDTrainer's
    )  # fmt: skip
    return outcome.loss / where.sum()


def resident_mib() -> float:
    return _status("VmRSS")


def peak_mib() -> float:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Linux keeps the highest resident size of a process, and forgets it when told to."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(field: str) -> float:
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) / 1024 for line in file if line.startswith(field)), 0.0)


if __name__ == "__main__":
    main()
