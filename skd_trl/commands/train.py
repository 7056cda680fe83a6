"""`skd train`: a distillation from the command line or a YAML file, for every form of rows that the trainers take.

Ends with a table (before, after, change) on held-out prompts, and leaves metrics.json, training.png and samples.html in its output
directory. On several GPUs: `accelerate launch -m skd_trl train --config ...`.
"""

import logging
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
from transformers.integrations import is_tensorboard_available, is_trackio_available, is_wandb_available

from .._compat import ModelConfig, get_peft_config
from ..evaluation.callback import HeldOutEvaluation
from ..evaluation.comparison import comparison_table
from ..evaluation.draft_model import Drafting
from ..skd_config import SKDConfig
from ..skd_trainer import SKDTrainer
from ..training.console import LogLine
from ..training.engine_settings import check_processes
from ..training.run_files import BEFORE, LogFile, run_settings, write_settings
from ..training.whole_checkpoints import is_whole, last_whole_checkpoint, whole_checkpoints
from .loading import check_folder, naming, set_model_init_kwargs, text_config
from .options import Command, for_this_machine
from .supervised import supervised_stage
from .train_options import TRAINERS, TrainArguments, chosen_trainer, train_command
from .train_rows import load_train_and_test


def run(arguments: list[str]) -> int:
    """The command itself."""
    command = train_command(chosen_trainer(arguments))
    if PartialState().is_main_process:
        show_notes()
    script_args, training_args, model_args = command.parse(arguments, **for_this_machine())
    with command.one_line_errors(), PartialState().main_process_first():
        check_names(training_args, model_args)
        rows = load_train_and_test(script_args, training_args)
    train(script_args, training_args, model_args, *rows, command=command)
    return 0


# Where a model is besides its name, as `from_pretrained` takes it.
ELSEWHERE = {"subfolder", "revision", "token", "cache_dir", "trust_remote_code", "config"}


def show_notes() -> None:
    """What the package notes, such as the memory that a training takes and the rounds that were captured, besides its warnings."""
    logger = logging.getLogger("skd_trl")
    if not logger.handlers:  # the root's would print what libraries print themselves
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def check_names(training_args: SKDConfig, model_args: ModelConfig) -> None:
    """Whether there is a student, the folders that the options name, and a process for each GPU: known before rows are read, a hub is
    asked or a supervised stage is trained."""
    if training_args.teacher_device is None:
        check_processes(training_args)
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the student's name or path.")
    check_trackers(training_args)
    for role, name in (
        ("student", model_args.model_name_or_path),
        ("teacher", training_args.teacher_model_name_or_path),
    ):
        check_folder(role, name)
    training_args.resume_from_checkpoint = checkpoint_to_resume(training_args)


def check_trackers(args: SKDConfig) -> None:
    """Raises `ValueError` for a tracker in `report_to` that is not installed."""
    known = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
    for name in args.report_to or ():
        if name in known and not known[name]():
            raise ValueError(f"report_to={name!r}, which is not installed: pip install {name}, or --report_to none.")


def checkpoint_to_resume(args: SKDConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names; `true` is the newest one of `output_dir` that is whole.

    Raises:
        `ValueError`: if it is not there, or not whole; the message names those that are.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true" and (newest := last_whole_checkpoint(args.output_dir)) is not None:
        return str(newest)
    if is_whole(Path(wanted)):
        return wanted
    found = "has no trainer_state.json that can be read to its end" if Path(wanted).is_dir() else "is no folder"
    whole = ", ".join(path.name for path in whole_checkpoints(args.output_dir))
    raise ValueError(
        f"resume_from_checkpoint={wanted!r} {found}; {args.output_dir} has "
        f"{whole or 'no whole checkpoint, so start without it'}."
    )


def train(
    script_args: TrainArguments,
    training_args: SKDConfig,
    model_args: ModelConfig,
    train_rows: Dataset | IterableDataset,
    test_rows: Dataset | None,
    command: Command | None = None,
) -> None:
    """Trains on `train_rows`, and compares the student before and after on `test_rows` (unless `script_args.compare` is `False`), on which it
    is also evaluated. Errors before the first step are told in one line, as `command` does."""
    command = command or train_command(script_args.trainer)
    with command.one_line_errors():
        trainer, settings = make_trainer(script_args, training_args, model_args, train_rows, test_rows)
        held_out = None
        if test_rows is not None and script_args.compare is not False:
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
        if training_args.resume_from_checkpoint is None:
            (output_dir / BEFORE).unlink(missing_ok=True)  # of an earlier run

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
    is_elsewhere = ELSEWHERE & set(training_args.teacher_model_init_kwargs or ())
    if (
        models["teacher"] is not None
        and models["teacher"] == training_args.teacher_model_name_or_path
        and not is_elsewhere
    ):
        text_config("teacher", models["teacher"], training_args.trust_remote_code)  # before the student is loaded
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
