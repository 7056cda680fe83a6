"""`skd check`: whether a student and a teacher work together, and what a training of them would hold in memory.

Makes every check that the trainers make before training. Exit code 1 if something is refused.
"""

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat import ModelConfig, get_peft_config  # pyright: ignore[reportPrivateImportUsage]
from ..data.vocabulary import shared_vocab_size
from ..skd_config import SKDConfig
from ..training.findings import Finding, Verdict, finding_of, is_incomplete
from ..training.launch_check import check_launch
from ..training.limits import room_for_prompts
from ..training.machine import Machine
from ..training.memory_advice import describe_plan
from ..training.memory_plan import fitted_plan
from ..training.pair_check import check_pair, check_placed
from ..training.teacher_loading import LoadedTeacher, connected, load_models
from .loading import check_folder, set_model_init_kwargs
from .options import Command, for_this_machine


@dataclass
class StudentName:
    """The student, by the name that the trainers give it; a training's file calls it `model_name_or_path`."""

    model: str | None = field(default=None, metadata={"help": "The student's name or path."})


PATIENCE = 20.0  # seconds for a server; a training waits longer, for one that is being restarted
CHECK = Command(
    "check",
    "Loads a student and a teacher, makes every check that SKDTrainer makes before training, and prints what it found. Exit code 1 "
    "if something is refused. The file may be a training's: what is not about the pair is ignored.",
    (StudentName, SKDConfig, ModelConfig),
    "  skd check --model STUDENT --teacher_model_name_or_path TEACHER",
    shares_files=True,
)


def run(arguments: list[str]) -> int:
    """The command itself."""
    student_name, args, model_args = CHECK.parse(arguments, **for_this_machine())
    model = student_name.model or model_args.model_name_or_path
    if model is None:
        CHECK.fail("--model is missing: the student's name or path.")
    with CHECK.one_line_errors():
        set_model_init_kwargs(args, model_args)
    if args.n_gpu > 1:
        args._n_gpu = 1  # a training has a process for each GPU, and this checks what one of them would
    student, loaded, tokenizer = load(model, args)
    peft_config = get_peft_config(model_args)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=precision)
    pairs = [
        (name, teacher, findings_about(student, teacher, tokenizer, args, accelerator, peft_config))
        for name, teacher in zip(loaded.names or ("",), loaded.models, strict=True)
    ]
    trained = student if peft_config is None else get_peft_model(student, peft_config)
    is_refused = False
    for name, teacher, findings in pairs:
        launch = {found.topic: found for found in check_launch(trained, teacher, args, accelerator)}
        findings = [launch.pop(found.topic, found) for found in findings] + list(launch.values())
        if loaded.is_served:
            findings.append(finding_of("server", check_answers, student, loaded, tokenizer, args))
        is_refused = is_refused or any(finding.verdict == Verdict.REFUSED for finding in findings)
        if accelerator.is_main_process:
            print_findings(findings, name)
            if not loaded.is_served:
                print_plan(trained, teacher, args, accelerator)
    return int(is_refused)


def load(model: str, args: SKDConfig) -> tuple[PreTrainedModel, LoadedTeacher, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer; the command ends if they cannot be had."""
    teachers: Any = args.teacher_models or {"teacher": args.teacher_model_name_or_path}
    try:
        check_folder("student", model)
        for name, path in teachers.items():
            check_folder(name, path)
        return load_models(model, None, None, args)
    except Exception as error:  # whatever the loading of a model raises
        names = " and ".join(repr(name) for name in (model, *teachers.values()) if name is not None)
        CHECK.fail(f"{names} cannot be loaded. {' '.join(str(error).split())}")


def findings_about(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SKDConfig,
    accelerator: Accelerator,
    peft_config: Any = None,
) -> list[Finding]:
    """What the trainers' checks find about a pair, each topic once."""
    findings = check_pair(student, teacher, tokenizer, args, peft_config)
    if is_incomplete(findings):
        later = {found.topic: found for found in check_placed(student, teacher, tokenizer, args, accelerator)}
        findings = [later.get(found.topic, found) for found in findings]
    return findings


def check_answers(
    student: PreTrainedModel, loaded: LoadedTeacher, tokenizer: PreTrainedTokenizerBase, args: SKDConfig
) -> tuple[Verdict, str]:
    """Whether the teacher's server is there, with the student's tokenizer and scores that agree with themselves."""
    args.teacher_server_patience = min(args.teacher_server_patience, PATIENCE)
    client = connected(loaded, args, tokenizer, shared_vocab_size(student, student))
    assert client is not None
    return Verdict.GOOD, f"{client.model} answers, with texts of up to {client.max_length} tokens."


def print_findings(findings: list[Finding], teacher: str = "") -> None:
    """A table of topic, verdict and detail; `teacher` is its name, if there are several."""
    styles = dict.fromkeys(Verdict, "dim") | {
        Verdict.GOOD: "green",
        Verdict.WARNING: "yellow",
        Verdict.REFUSED: "bold red",
    }
    table = Table(show_lines=True, title=f"With the teacher {teacher!r}" if teacher else None)
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
