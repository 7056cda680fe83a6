"""Two processes for `test_teacher_loading.py`: what a process holds of a teacher that is given by its path, while it is loaded."""

import ctypes
import gc
import json
import os
import sys
import threading
from pathlib import Path

import torch.distributed as dist
from datasets import Dataset
from distributed_worker import ROWS, STUDENT, enter, held, without_compiler
from tiny import byte_tokenizer, tiny_model

from skd_trl import SKDConfig, SKDTrainer


# Each with what the environment says beside the mode.
CASES = {
    "ddp-None": {},
    "zero2-True": {},
    "zero3-True": {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
    "zero3-None": {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
    "fsdp2-True": {},
    "fsdp2-None": {},
}


class Peak:
    """The most anonymous memory that this process has inside, in bytes beyond what it had before. What it maps of files is not
    counted: the system takes that back."""

    def __enter__(self):
        gc.collect()
        self.before = self.most = self.now()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.is_over.wait(0.002):
            self.most = max(self.most, self.now())

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def __exit__(self, *error):
        self.is_over.set()
        self.thread.join()
        self.bytes = self.most - self.before


def trained(directory: Path, name: str) -> dict:
    wish = {"None": None, "True": True}[name.split("-")[1]]
    student = tiny_model(seed=1, **STUDENT)
    args = SKDConfig(
        output_dir=str(directory / "runs" / name), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, max_length=64, max_new_tokens=4, max_steps=1, logging_steps=1, ddp_timeout=180,
        rollout="dataset", shard_teacher=wish, gradient_checkpointing=False,
    )  # fmt: skip
    with Peak() as peak:
        trainer = SKDTrainer(
            model=student,
            teacher_model=str(directory / "teacher"),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=byte_tokenizer(),
        )
    trainer.train()
    loss = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    found = {"peak": peak.bytes, "held": held(trainer._inner_teacher), "loss": loss}
    trainer.accelerator.free_memory()
    return found


def main() -> None:
    directory = Path(sys.argv[1])
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # what is freed goes back to the system, from a MiB on
    without_compiler()
    found = {}
    for name, environment in CASES.items():
        if only in name:
            enter(name.split("-")[0])
            os.environ.update(environment)
            found[name] = trained(directory, name)
            print(os.environ["RANK"], name, found[name], flush=True)
    (directory / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
