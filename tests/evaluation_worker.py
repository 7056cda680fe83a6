"""What each of two processes runs for `test_trainer_faults.py`: an evaluation whose last batch is filled up."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from test_skd_trainer import ROWS, make_trainer


if __name__ == "__main__":
    directory, num_rows = Path(sys.argv[1]), int(sys.argv[2])
    trainer = make_trainer(directory, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(Dataset.from_list(ROWS[:num_rows]))
    (directory / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(metrics))
