"""`skd check`: whether a student and a teacher work together, and what a training of them would hold in memory.

Makes every check that the trainers make before training. Exit code 1 if something is refused.
"""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from ..skd_config import SKDConfig
from ..training.findings import Finding, Verdict, is_incomplete
from ..training.launch_check import check_launch
from ..training.limits import room_for_prompts
from ..training.machine import Machine
from ..training.memory_advice import describe_plan
from ..training.memory_plan import fitted_plan
from ..training.pair_check import check_pair, check_placed
from ..training.teacher_loading import load_pair
from .loading import check_folder
from .options import Command


@dataclass
class StudentName:
    """The student, by the name that the trainers give it or that TRL's scripts do."""

    model: str | None = field(default=None, metadata={"help": "The student's name or path."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The same, under the name that it has in a training's file."}
    )

    def __post_init__(self):
        self.model = self.model or self.model_name_or_path
        if self.model is None:
            raise ValueError("--model is missing: the student's name or path.")


CHECK = Command(
    "check",
    "Loads a student and a teacher, makes every check that SKDTrainer makes before training, and prints what it found. Exit code 1 "
    "if something is refused. The file may be a training's: what is not about the pair is ignored.",
    (StudentName, SKDConfig),
    "  skd check --model STUDENT --teacher_model_name_or_path TEACHER",
    shares_files=True,
)


def run(arguments: list[str]) -> int:
    """The command itself."""
    # SFTConfig's bf16 refuses many machines.
    student_name, args = CHECK.parse(arguments, bf16=False, use_cpu=not torch.cuda.is_available())
    student, teacher, tokenizer = loaded(student_name.model, args)
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


def loaded(model: str, args: SKDConfig) -> tuple:
    """Student, teacher and tokenizer; the command ends if they cannot be had."""
    try:
        check_folder("student", model)
        check_folder("teacher", args.teacher_model_name_or_path)
        return load_pair(model, None, None, args)
    except Exception as error:  # whatever the loading of a model raises
        pair = " and ".join(repr(name) for name in (model, args.teacher_model_name_or_path) if name is not None)
        CHECK.fail(f"{pair} cannot be loaded. {' '.join(str(error).split())}")


def print_findings(findings: list[Finding]) -> None:
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
    Console().print(table)


def print_plan(student: PreTrainedModel, teacher: PreTrainedModel, args: SKDConfig, accelerator: Accelerator) -> None:
    """What a training with prompts of the longest admitted length would hold on each device."""
    longest, machine = room_for_prompts(args, student, teacher) or 1024, Machine.of(accelerator)
    try:
        plan = fitted_plan(student, teacher, machine, args, longest)
    except Exception as error:  # whatever a model may do with tensors that hold nothing
        print(f"The memory could not be planned ({type(error).__name__}: {error}).")
    else:
        print(f"With prompts of {longest} tokens:\n{describe_plan(plan, machine, args)}")
