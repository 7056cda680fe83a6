"""What each of two processes runs for `test_trainer_faults.py`: evaluations whose last batch is filled up, of data sets and of streams in
shards of unequal length, a training on such a stream, and with one argument more a trainer that was not told to stay on the CPU."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from datasets import Dataset, IterableDataset
from test_skd_trainer import ROWS, losses, make_trainer

from skd_trl import SpecKDTrainer


def streamed(rows: list[dict]) -> IterableDataset:
    """A stream in two shards, the second with one row."""

    def read(shards):
        for shard in shards:
            yield from rows[:-1] if shard == 0 else rows[-1:]

    return IterableDataset.from_generator(read, gen_kwargs={"shards": [0, 1]})


if __name__ == "__main__":
    directory, num_rows = Path(sys.argv[1]), int(sys.argv[2])
    trainer = make_trainer(directory, per_device_eval_batch_size=2, use_cpu=len(sys.argv) == 3)
    metrics = trainer.evaluate(Dataset.from_list(ROWS[:num_rows]))
    prompts = [{"messages": row["messages"][:1]} for row in ROWS[:num_rows]]
    metrics |= trainer.evaluate(Dataset.from_list(prompts), metric_key_prefix="prompts")
    drawing = make_trainer(
        directory, trainer_class=SpecKDTrainer, gate="spec_k", per_device_eval_batch_size=2, use_cpu=len(sys.argv) == 3
    )
    for name, rows in (("stream", ROWS[:num_rows]), ("prompt_stream", prompts)):
        metrics |= trainer.evaluate(streamed(rows), metric_key_prefix=name)
    training = make_trainer(
        directory, streamed(ROWS[:num_rows]), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4,
        rollout="dataset", shuffle_dataset=False, use_cpu=len(sys.argv) == 3, ddp_timeout=120,
    )  # fmt: skip
    training.train()
    metrics["losses"] = losses(training)
    metrics["gated_loss"] = drawing.evaluate(Dataset.from_list(ROWS[:num_rows]))["eval_loss"]
    (directory / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(metrics))
    if dist.is_initialized():  # else a process that ends while the other one still waits aborts it
        dist.barrier()
        dist.destroy_process_group()
