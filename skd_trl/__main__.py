"""`python -m skd_trl`: commands beside a training. Each adds its own parser and is a function of the parsed options.

Exit codes: 0, or 1 where a command's answer is no, or 2 for a command that cannot be understood or carried out.
"""

import argparse
import os
import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._compat import TrlParser
from .skd_config import SKDConfig
from .training.models import load_pair
from .training.pair_check import Finding, Verdict, check_launch, check_pair


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["score"]:
        from .training import score

        return score.main(arguments[1:])
    parser = argparse.ArgumentParser("python -m skd_trl", description="Speculative knowledge distillation for TRL.")
    commands = parser.add_subparsers(title="commands", metavar="command")
    for add_command in (add_check,):
        add_command(commands)
    commands.add_parser(
        "score", help="write a teacher's scores of given responses, for a training without it", add_help=False
    )
    options, rest = parser.parse_known_args(arguments)
    if "run" not in options:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 0
    return options.run(options, rest)


# check


@dataclass
class StudentName:
    """The student, by the name that the trainers give it or that TRL's scripts do."""

    model: str | None = None
    model_name_or_path: str | None = None


def add_check(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="whether a student and a teacher work together",
        description="Loads a student and a teacher, makes every check that SKDTrainer makes before training, and prints what it "
        "found. Exit code 1 if something is refused. Any other option is a field of SKDConfig, such as --rollout dataset or "
        "--max_new_tokens 256.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", "--model_name_or_path", help="the student's name or path")
    parser.add_argument("--teacher_model_name_or_path", help="the teacher's name or path")
    parser.add_argument(
        "--config", help="a YAML file of options, such as a training's; what is not about the pair is ignored"
    )
    parser.set_defaults(run=run_check, parser=parser)


def run_check(options: argparse.Namespace, rest: list[str]) -> int:
    for name in ("model", "teacher_model_name_or_path", "config"):
        if (value := getattr(options, name)) is not None:
            rest = [*rest, f"--{name}", value]
    fields = TrlParser((StudentName, SKDConfig), prog=options.parser.prog, usage=options.parser.format_usage()[7:])
    fields.set_defaults(bf16=False, use_cpu=not torch.cuda.is_available())  # SFTConfig's bf16 refuses many machines
    try:
        student_name, args = fields.parse_args_and_config(rest, fail_with_unknown_args=False)
    except (ValueError, TypeError, OSError) as error:
        options.parser.error(str(error))
    model = student_name.model or student_name.model_name_or_path
    try:
        student, teacher, tokenizer = load_pair(model, None, None, args)
    except Exception as error:  # whatever the loading of a model raises
        options.parser.error(f"{model!r} and {args.teacher_model_name_or_path!r} cannot be loaded. {error}")
    accelerator = Accelerator(cpu=args.use_cpu)
    findings = check_pair(student, teacher, tokenizer, args) + check_launch(student, teacher, args, accelerator)
    if accelerator.is_main_process:
        print_findings(findings)
    return int(any(finding.verdict == Verdict.REFUSED for finding in findings))


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """A table of topic, verdict and detail."""
    styles = {Verdict.GOOD: "green", Verdict.WARNING: "yellow", Verdict.REFUSED: "bold red", Verdict.UNCHECKED: "dim"}
    table = Table(show_lines=True)
    for column in ("topic", "verdict", "detail"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.topic, Text(finding.verdict, style=styles[finding.verdict]), Text(finding.detail))
    (console or Console()).print(table)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
