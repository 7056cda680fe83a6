"""`skd`, or `python -m skd_trl`: its commands. Those of `COMMANDS` are modules of `commands/`; `check` is here.

Exit codes: 0, or 1 where a command's answer is no, or 2 for a command that cannot be understood or carried out.
"""

import argparse
import importlib
import os
import sys
import warnings
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._compat import TrlParser
from .commands.loading import check_folder
from .commands.options import Command
from .skd_config import SKDConfig
from .training.limits import room_for_prompts
from .training.machine import Machine
from .training.memory_advice import describe_plan
from .training.memory_plan import fitted_plan
from .training.pair_check import Finding, Verdict, check_launch, check_pair, check_placed, is_incomplete
from .training.teacher_loading import load_pair


# Name -> module of `commands/`, its function, and what it does.
COMMANDS = {
    "train": ("train", "run", "distil a teacher into a student"),
    "evaluate": ("evaluate", "run_evaluate", "score a student on held-out prompts"),
    "compare": ("evaluate", "run_compare", "score two students of one teacher on the same prompts"),
    "watch": ("watch", "run", "show one response being written, round by round"),
    "report": ("report", "run", "figures, plots and a page of a run, also of one that is not over"),
    "score": ("score", "run", "write a teacher's scores of given responses, for a training without it"),
    "serve": ("serve", "run", "a teacher on vLLM, for trainers on other machines"),
    "env": ("env", "run", "versions and devices, for issues"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` (by default those of the process) name, and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if (
        os.getcwd() not in sys.path and "" not in sys.path
    ):  # a console script does not look there for the user's own modules
        sys.path.insert(0, os.getcwd())
    # TRL gives transformers the name that all its releases know; whoever runs a command can do nothing about that.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    if arguments and arguments[0] in COMMANDS:
        module, function, _ = COMMANDS[arguments[0]]
        return getattr(importlib.import_module(f"skd_trl.commands.{module}"), function)(arguments[1:])
    parser = argparse.ArgumentParser("skd", description="Speculative knowledge distillation for TRL.")
    commands = parser.add_subparsers(title="commands", metavar="command")
    for name, (_, _, what) in COMMANDS.items():
        commands.add_parser(name, help=what)
    for add_command in (add_check,):
        add_command(commands)
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
    Command("check", "", (StudentName, SKDConfig)).refuse_unknown(rest)
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
    if model is None:
        options.parser.error("--model is missing: the student's name or path.")
    try:
        check_folder("student", model)
        check_folder("teacher", args.teacher_model_name_or_path)
        student, teacher, tokenizer = load_pair(model, None, None, args)
    except Exception as error:  # whatever the loading of a model raises
        pair = " and ".join(repr(name) for name in (model, args.teacher_model_name_or_path) if name is not None)
        options.parser.error(f"{pair} cannot be loaded. {' '.join(str(error).split())}")
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=precision)
    findings = check_pair(student, teacher, tokenizer, args)
    if is_incomplete(findings):
        later = {found.topic: found for found in check_placed(student, teacher, tokenizer, args, accelerator)}
        findings = [later.get(found.topic, found) for found in findings]
    findings += [found for found in check_launch(student, teacher, args, accelerator) if found not in findings]
    if accelerator.is_main_process:
        print_findings(findings)
        print_plan(student, teacher, args, accelerator)
    return int(any(finding.verdict == Verdict.REFUSED for finding in findings))


def print_plan(student, teacher, args: SKDConfig, accelerator: Accelerator) -> None:
    """What a training with prompts of the longest admitted length would hold on each device."""
    longest, machine = room_for_prompts(args, student, teacher) or 1024, Machine.of(accelerator)
    try:
        plan = fitted_plan(student, teacher, machine, args, longest)
    except Exception as error:  # whatever a model may do with tensors that hold nothing
        print(f"The memory could not be planned ({type(error).__name__}: {error}).")
    else:
        print(f"With prompts of {longest} tokens:\n{describe_plan(plan, machine, args)}")


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """A table of topic, verdict and detail."""
    styles = dict.fromkeys(Verdict, "dim") | {
        Verdict.GOOD: "green",
        Verdict.WARNING: "yellow",
        Verdict.REFUSED: "bold red",
    }
    table = Table(show_lines=True)
    for column in ("topic", "verdict", "detail"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.topic, Text(finding.verdict, style=styles[finding.verdict]), Text(finding.detail))
    (console or Console()).print(table)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
