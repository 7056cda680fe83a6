"""Two processes on CPU for `test_memory_on_two.py`: what a whole teacher and the main process save, and what FSDP2 rounds."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from datasets import load_dataset
from distributed_worker import STUDENT, TEACHER, enter, make_trainer, without_compiler
from tiny import byte_tokenizer, tiny_model

from skd_trl import SKDConfig, SKDTrainer
from skd_trl.data import dataset as dataset_module
from skd_trl.sampling import interleaved
from skd_trl.training.distributed import is_sharded


def collectives_of_rounds(directory: Path, name: str, **settings) -> dict:
    """How many collective calls begin inside the last step's sampling, and how many rounds of rows there were."""
    trainer = make_trainer(directory, name, max_steps=2, uneven=True, **settings)
    counts = {"collectives": 0, "rounds": 0}
    inside: list[bool] = []

    def counted(function):
        def call(*args, **kwargs):
            counts["collectives"] += bool(inside)
            return function(*args, **kwargs)

        return call

    names = ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "broadcast")
    own = {name: getattr(dist, name) for name in names}
    round_ = interleaved.interleaved_sample

    def sample(*args, **kwargs):
        counts.update(collectives=0, rounds=0)  # of the last step: in the first models are proved
        inside.append(True)
        try:
            rollout = round_(*args, **kwargs)
        finally:
            inside.clear()
        counts["rounds"] += rollout.num_rounds
        return rollout

    import skd_trl.training.sampled_steps as trainer_module

    trainer_module.interleaved_sample = sample
    for each in names:
        setattr(dist, each, counted(own[each]))
    try:
        trainer.train()
    finally:
        trainer_module.interleaved_sample = round_
        for each in names:
            setattr(dist, each, own[each])
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    trainer.accelerator.free_memory()
    return {**counts, "losses": losses, "is_spread": is_sharded(trainer._inner_teacher)}


def tokenized_rows(directory: Path) -> int:
    """How many rows this process turns into tokens, of a data set on disk."""
    counted, original = [], dataset_module.tokenize_row
    dataset_module.tokenize_row = lambda *args, **kwargs: counted.append(1) or original(*args, **kwargs)
    rows = load_dataset(
        "json", data_files=str(directory / "rows.jsonl"), split="train", cache_dir=str(directory / "cache")
    )
    SKDTrainer(
        model=tiny_model(seed=1, **STUDENT),
        teacher_model=tiny_model(seed=2, **TEACHER),
        args=SKDConfig(
            output_dir=str(directory / "out"), use_cpu=True, bf16=False, report_to=[], max_length=128, max_new_tokens=8
        ),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
    )
    dataset_module.tokenize_row = original
    return len(counted)


def main() -> None:
    directory = Path(sys.argv[1])
    without_compiler()
    found = {}
    enter("ddp")
    found["tokenized"] = tokenized_rows(directory)
    for mode in ("zero3", "fsdp2"):
        for wish in (None, True):
            enter(mode)
            found[f"{mode}-{wish}"] = collectives_of_rounds(directory, f"{mode}-{wish}-sampled", shard_teacher=wish)
    enter("fsdp2")
    found["bf16"] = collectives_of_rounds(directory, "fsdp2-bf16-sampled", shard_teacher=None, bf16=True)
    (directory / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
