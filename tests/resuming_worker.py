"""What each of two processes runs for `test_trainer_faults.py`: three epochs in each order of rows, and the second half of them again, from a
checkpoint within the second epoch."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from test_mixed_batches import spy_on_trained_batches
from test_skd_trainer import losses, make_trainer


ROWS = [{"prompt": "q" * (1 + 5 * i % 7), "completion": "ab" * (1 + i)} for i in range(12)]


def trained(directory: Path, strategy: str, checkpoint: str | None = None) -> dict:
    trainer = make_trainer(
        directory, ROWS, train_sampling_strategy=strategy, per_device_train_batch_size=2, max_steps=9, rollout="dataset",
        save_strategy="steps", save_steps=5, ddp_timeout=120,
    )  # fmt: skip
    seen = spy_on_trained_batches(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    return {"losses": losses(trainer), "batches": [batch["input_ids"].tolist() for batch in seen]}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = {}
    for strategy in sys.argv[2:]:
        whole = trained(directory / strategy, strategy)
        resumed = trained(directory / strategy, strategy, str(directory / strategy / "out" / "checkpoint-5"))
        found[strategy] = {"whole": whole, "resumed": resumed}
    rank = dist.get_rank()
    (directory / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # a process that ends while the other one still waits aborts it
    dist.destroy_process_group()
