"""`skd train`: a distillation from the command line or a YAML file, for every form of rows that the trainers take.

Ends with a table (before, after, change) on held-out prompts, and leaves metrics.json, training.png and samples.html in its output
directory. On several GPUs: `accelerate launch -m skd_trl train --config ...`.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback

from .._compat import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from ..evaluation.callback import HeldOutEvaluation
from ..evaluation.comparison import comparison_table
from ..evaluation.draft_model import Drafting
from ..evaluation.text_metrics import text_metrics
from ..skd_config import SKDConfig
from ..skd_trainer import SKDTrainer
from ..speckd_config import SpecKDConfig
from ..speckd_trainer import SpecKDTrainer
from ..training.console import LogLine
from ..training.run_files import LogFile, run_settings, write_settings
from .loading import check_folder, naming
from .options import Command
from .rows import from_templates, hold_out, load_rows, split_names
from .supervised import supervised_stage


TRAINERS = {"skd": (SKDConfig, SKDTrainer), "speckd": (SpecKDConfig, SpecKDTrainer)}


@dataclass
class TrainArguments(ScriptArguments):
    """What `skd train` takes beside the configuration of its trainer and TRL's `ModelConfig`; each is explained in its help."""

    trainer: str = field(default="skd", metadata={"help": "Which trainer.", "choices": list(TRAINERS)})
    teacher_sft: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fine-tune the whole teacher on the references first: fields of SFTConfig, such as "
            '\'{"max_steps": 80, "learning_rate": 2e-4}\'.'
        },
    )
    student_sft: dict[str, Any] | str | None = field(default=None, metadata={"help": "The same for the student."})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "For rows with other columns: what the user says, such as 'Summarize this dialogue.\\n\\n{dialogue}'."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={"help": "The same for the reference answer, such as '{summary}'. Default: prompts alone."},
    )
    num_train_rows: int = field(default=0, metadata={"help": "Rows to train on, a random sample; 0 is all."})
    num_eval_rows: int = field(
        default=200,
        metadata={
            "help": "Held-out prompts for the comparison before and after, a random sample; 0 is all. Without a test split they are "
            "taken out of the training rows, a tenth of these at most."
        },
    )
    compare: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to compare the student before and after on held-out prompts. Default: where the run has one teacher, in this "
            "process."
        },
    )
    compare_at_evaluation: bool = field(
        default=False,
        metadata={"help": "Whether the held-out prompts are also scored at each evaluation (see eval_strategy)."},
    )
    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": "Metrics of the student's texts: rouge, exact_match, or your own as module:function. Default: rouge, where "
            "rouge-score is installed."
        },
    )
    draft_rows: int = field(
        default=16,
        metadata={
            "help": "On how many held-out prompts the student is measured as the teacher's draft model; 0 is none of them."
        },
    )

    def __post_init__(self):
        if self.trainer not in TRAINERS:
            raise ValueError(f"trainer={self.trainer!r} is unknown; choose one of {', '.join(TRAINERS)}.")
        if not self.dataset_name:
            raise ValueError(
                "dataset_name is not set; give a data set of the hub, a .jsonl or .parquet file, or a folder of them."
            )
        for name in ("num_train_rows", "num_eval_rows", "draft_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be 0 or more.")
        for name in ("teacher_sft", "student_sft"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else value)
        if self.compare is not False:
            text_metrics(self.metrics)  # an unknown one is told before models are loaded


def run(arguments: list[str]) -> int:
    """The command itself."""
    command = train_command(chosen_trainer(arguments))
    script_args, training_args, model_args = command.parse(arguments, **for_this_machine())
    with command.one_line_errors(), PartialState().main_process_first():
        check_names(training_args, model_args)
        rows = load_train_and_test(script_args, training_args)
    train(script_args, training_args, model_args, *rows, command=command)
    return 0


def train_command(trainer: str = "skd") -> Command:
    """`skd train` for one trainer's configuration."""
    of_speckd = set(SpecKDConfig.__dataclass_fields__) - set(SKDConfig.__dataclass_fields__)
    return Command(
        "train",
        "Distils a teacher into a student: SKD, or with --trainer speckd SpecKD. Options may stand in a YAML file; the command "
        "line overrides it.",
        (TrainArguments, TRAINERS[trainer][0], ModelConfig),
        "  skd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \\\n"
        "      --dataset_name rows.jsonl --output_dir out",
        lambda name: "It belongs to SpecKD's trainer: add --trainer speckd." if name in of_speckd else None,
    )


def for_this_machine() -> dict[str, Any]:
    """Defaults of a machine without an accelerator, where TRL's `bf16=True` is refused; the command line and the file override them."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}


def chosen_trainer(arguments: list[str]) -> str:
    """`--trainer` of the command line, or else of the file, or else SKD; which fields there are depends on it."""
    parser = argparse.ArgumentParser(prog="skd train", usage=train_command().usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer", choices=list(TRAINERS))
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(arguments)
    if known.trainer is None and known.config is not None and known.config.is_file():
        with train_command().one_line_errors():
            settings = yaml.safe_load(known.config.read_text())
        known.trainer = settings.get("trainer") if isinstance(settings, dict) else None
    return known.trainer if known.trainer in TRAINERS else "skd"


def check_names(training_args: SKDConfig, model_args: ModelConfig) -> None:
    """Whether there is a student, and the folders that the options name: known before rows are read or a hub is asked."""
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the student's name or path.")
    for role, name in (
        ("student", model_args.model_name_or_path),
        ("teacher", training_args.teacher_model_name_or_path),
    ):
        check_folder(role, name)
    training_args.resume_from_checkpoint = checkpoint_to_resume(training_args)


def checkpoint_to_resume(args: SKDConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names; `true` is the last whole one of `output_dir`: the Trainer writes its state
    last, so a run that was killed while it saved leaves a folder without one."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    there_are = sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in there_are if (path / "trainer_state.json").exists()]
    if str(wanted).lower() == "true" and whole:
        return str(whole[-1])
    if Path(wanted).is_dir():
        return wanted
    raise ValueError(
        f"resume_from_checkpoint={wanted!r} is no folder; {args.output_dir} has "
        f"{', '.join(path.name for path in whole) or 'no whole checkpoint, so start without it'}."
    )


def decide_comparison(
    script_args: TrainArguments, training_args: SKDConfig, train_rows: Dataset | IterableDataset
) -> None:
    """Sets `compare` where nothing was given, and says why if there is no one teacher to compare with."""
    if script_args.compare is not None:
        return
    own_prompts = {"teacher_prompt", "privileged_context"} & set(train_rows.column_names or [])
    if training_args.teacher_model_kind is not None:
        reason = "the teacher is the student itself"
    elif training_args.teacher_model_name_or_path is None:
        reason = "there is no single teacher in this process"
    elif own_prompts:
        reason = f"the teacher reads prompts that differ from the student's ({own_prompts.pop()})"
    else:
        reason = None
    script_args.compare = reason is None
    if reason and PartialState().is_main_process:
        print(f"The student is not compared before and after: {reason}. See skd compare.")


def load_train_and_test(
    args: TrainArguments, training_args: SKDConfig
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """The rows to train on and those held out, if any are; decides whether the student is compared, where nothing was given."""
    seed = training_args.seed

    def load(split: str, num_rows: int, streaming: bool = False):
        rows = load_rows(
            args.dataset_name, split, config=args.dataset_config, num_rows=num_rows, seed=seed, streaming=streaming
        )
        if args.prompt_template is None and args.completion_template is None:
            return rows
        return from_templates(rows, args.prompt_template, args.completion_template)

    train_rows = load(args.dataset_train_split, args.num_train_rows, args.dataset_streaming)
    decide_comparison(args, training_args, train_rows)
    if not args.compare:
        return train_rows, None
    if args.dataset_test_split in split_names(args.dataset_name, args.dataset_config):
        return train_rows, load(args.dataset_test_split, args.num_eval_rows)
    if isinstance(train_rows, IterableDataset):
        raise ValueError(
            f"{args.dataset_name} has no split {args.dataset_test_split!r}, and no rows can be held out of a stream. Name one with "
            "--dataset_test_split, or give --compare false."
        )
    train_rows, test_rows = hold_out(train_rows, args.num_eval_rows, seed)
    if PartialState().is_main_process:
        print(
            f"{args.dataset_name} has no split {args.dataset_test_split!r}: {len(test_rows)} of its {args.dataset_train_split} rows "
            f"are held out, {len(train_rows)} are left to train on."
        )
    return train_rows, test_rows


def train(
    script_args: TrainArguments,
    training_args: SKDConfig,
    model_args: ModelConfig,
    train_rows: Dataset | IterableDataset,
    test_rows: Dataset | None,
    command: Command | None = None,
) -> None:
    """Trains on `train_rows`, and compares the student before and after on `test_rows`. Errors before the first step are told in
    one line, as `command` does."""
    command = command or train_command(script_args.trainer)
    with command.one_line_errors():
        trainer, settings = make_trainer(script_args, training_args, model_args, train_rows, test_rows)
        held_out = None
        if test_rows is not None:
            drafting = Drafting(num_rows=script_args.draft_rows) if script_args.draft_rows else None
            held_out = HeldOutEvaluation(
                trainer,
                test_rows,
                metrics=script_args.metrics,
                drafting=drafting,
                at_evaluation=script_args.compare_at_evaluation,
            )
            trainer.add_callback(held_out)
    output_dir = Path(training_args.output_dir)
    if trainer.is_world_process_zero():
        write_settings(output_dir, settings)

    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    seconds = time.perf_counter() - start - sum(held_out.seconds.values() if held_out else ())
    trainer.accelerator.print("✅ Training completed.")

    # Save it, then compare: an error in what follows costs no training
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    is_local = Path(script_args.dataset_name).exists()
    trainer.create_model_card(output_dir.resolve().name, None if is_local else script_args.dataset_name)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    outcome = held_out.compare_with(held_out.score("after")) if held_out else {}
    if trainer.is_world_process_zero():
        timing = {**(held_out.seconds if held_out else {}), "training": round(seconds, 1)}
        write_settings(output_dir, settings, seconds=timing, **outcome)
        if outcome:
            Console().print(comparison_table(outcome["comparison"]))
        report_if_possible(output_dir)

    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")


def report_if_possible(output_dir: Path) -> None:
    """The report, where what it is drawn with is installed."""
    try:
        from ..evaluation.report import write_report
    except ImportError as error:
        print(
            f"No report: {error.name} is not installed (pip install 'skd_trl[report]', then skd report {output_dir})."
        )
        return
    for path in write_report(output_dir):
        print(f"📈 {path}")


def make_trainer(
    script_args: TrainArguments,
    training_args: SKDConfig,
    model_args: ModelConfig,
    train_rows: Dataset | IterableDataset,
    test_rows: Dataset | None,
) -> tuple[SKDTrainer, dict[str, Any]]:
    """The trainer, after the supervised stages that the configuration asks for, and what a reader needs to place its figures."""
    set_model_init_kwargs(training_args, model_args)
    with naming("student", model_args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    models = {"student": model_args.model_name_or_path, "teacher": training_args.teacher_model_name_or_path}
    data = [script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split]
    stages = {"teacher": script_args.teacher_sft, "student": script_args.student_sft}
    for role, stage in stages.items():
        if stage is not None:
            models[role] = supervised_stage(role, models[role], stage, training_args, tokenizer, train_rows, data)
    if any(stage is not None for stage in stages.values()):
        # DeepSpeed and FSDP are set up by the arguments that were created last: those of a stage.
        training_args = replace(training_args)
    trainer = TRAINERS[script_args.trainer][1](
        model=models["student"],
        teacher_model=models["teacher"],
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(callback)
    trainer.add_callback(LogLine(with_bar=not training_args.disable_tqdm))
    if not any(isinstance(callback, LogFile) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(LogFile())
    dataset = {"dataset": script_args.dataset_name, "command": shlex.join(["skd", *sys.argv[1:]])}
    return trainer, {"trainer": script_args.trainer, **models, **dataset, **run_settings(trainer)}


def set_model_init_kwargs(training_args: SKDConfig, model_args: ModelConfig) -> None:
    """What ModelConfig says about loading holds for the student, and for the teacher unless its own settings differ."""
    common = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    student = {**common, "revision": model_args.model_revision}
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        student["quantization_config"] = quantization_config
    training_args.model_init_kwargs = {**student, **(training_args.model_init_kwargs or {})}
    training_args.teacher_model_init_kwargs = {**common, **(training_args.teacher_model_init_kwargs or {})}
