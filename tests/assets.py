"""A tiny pair and its rows in files, and the options of a short run on them: for the commands and the examples."""

import json
from pathlib import Path

from tiny import save_models


def save_assets(tmp_path: Path) -> Path:
    """A pair of tiny models and a data set in files, as `examples/offline_assets.py` lays them out."""
    save_models(tmp_path, {"teacher": 1, "student": 2})
    (tmp_path / "text").mkdir()
    for split, num_rows in (("train", 8), ("test", 5)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{split} {'x' * i}"}],
                "completion": [{"role": "assistant", "content": f"short {i}"}],
            }
            for i in range(num_rows)
        ]
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments_for(assets: Path, **more) -> list[str]:
    values = {
        "model_name_or_path": assets / "student",
        "teacher_model_name_or_path": assets / "teacher",
        "dataset_name": assets / "text",
        "output_dir": assets / "run",
        "max_new_tokens": 4,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "log_completions": True,
        "log_completions_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        **more,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
