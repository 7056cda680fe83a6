"""A supervised stage before the distillation: teacher or student fine-tuned on the references, as the SKD paper starts."""

import gc
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from .._compat import SFTConfig, SFTTrainer
from ..training.run_files import read_if_whole


STAGES = {"student": "model_init_kwargs", "teacher": "teacher_model_init_kwargs"}


def supervised_stage(
    role: str, model: str, settings: dict[str, Any], training_args, tokenizer, rows: Dataset, data: list
) -> str:
    """
    Fine-tunes `model` on the references and returns where it is saved: `{output_dir}/{role}_sft`.

    `settings` are fields of `SFTConfig`; precision, seed and the like are those of the distillation. A stage that the
    same settings finished before, on the same `data` (name, configuration, split), is not run again.
    """
    target = Path(training_args.output_dir) / f"{role}_sft"
    loading = getattr(training_args, STAGES[role])
    if loading.get("dtype") == "auto":  # of a teacher's file, in which small updates may be lost
        loading = {**loading, "dtype": training_args.model_init_kwargs["dtype"]}
    names = ("seed", "bf16", "fp16", "use_cpu", "gradient_checkpointing", "max_length", "report_to", "disable_tqdm")
    fields = {
        **{name: getattr(training_args, name) for name in names},
        "output_dir": str(target),
        "model_init_kwargs": loading,
        "save_strategy": "no",
        **settings,
    }
    recipe = {"model": model, "fields": fields, "data": data, "num_rows": len(rows)}
    recipe = json.loads(json.dumps(recipe, default=str))
    done = target / "supervised_stage.json"
    if read_if_whole(done) == recipe:
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
