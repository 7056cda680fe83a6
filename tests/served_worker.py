"""What each of two processes runs for `test_served_training.py`: a training whose teacher's server is gone for the second of them after a
step, and which keeps completions, for which the processes wait for each other."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from teacher_server import serving
from test_served_training import At, served
from tiny import tiny_model

from skd_trl.serving.client import TeacherServerError


if __name__ == "__main__":
    directory, settings = Path(sys.argv[1]), {"max_steps": 3, "per_device_train_batch_size": 2, "ddp_timeout": 180}
    with serving(tiny_model(seed=2), top_k=50) as server:
        trainer = served(directory, server, log_completions=True, teacher_server_patience=0.5, **settings)
        rank = trainer.accelerator.process_index
        if rank == 1:
            trainer.add_callback(At(1, lambda: setattr(server, "fault", "error")))
        try:
            trainer.train()
            said = ""
        except TeacherServerError as error:
            said = str(error)
    (directory / f"{rank}.json").write_text(json.dumps([said, trainer.state.global_step]))
    dist.barrier()
    dist.destroy_process_group()
