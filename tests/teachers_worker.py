"""What each of two processes runs for the tests of teachers: several trainings in one start, results as JSON.

`torchrun ... teachers_worker.py two DIR` writes `DIR/<case>-<rank>.json` and, of the trained student, `DIR/<case>.pt`; `single`
does the same in one process, on the same rows of each step. A third argument runs the cases alone whose names hold it.
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from cpu_processes.sitecustomize import without_compiler
from distributed_worker import ROWS, enter, run


CONTEXTS = ["a hint", "b", "first a, then b" * 2, "abab"]
OWN_PROMPTS = [{**row, "privileged_context": CONTEXTS[i % 4]} for i, row in enumerate(ROWS)]
# Plain gradient descent, unclipped: updates are as large as the gradients, and a wrong factor shows.
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e6, "max_steps": 2}
# Some micro-batches of a process have no row for one of the teachers.
SEVERAL = [{**row, "teacher_id": "ab"[i % 3 == 0]} for i, row in enumerate(ROWS)]
SELF_TEACHERS = {
    "base": {"teacher_model_kind": "base", "lora": True},
    "average": {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "lora": True},
    "live": {"teacher_model_kind": "live"},
}


def matrix() -> dict[str, dict]:
    """Settings by name of the case; names start with the mode."""
    cases = {}
    for mode in ("ddp", "zero3"):
        cases[f"{mode}-prompts-dataset"] = {**PLAIN, "rollout": "dataset", "rows": OWN_PROMPTS}
        cases[f"{mode}-prompts-sampled"] = {**PLAIN, "rows": OWN_PROMPTS}
    # Three steps, so that what moves with the student shows.
    own = {**PLAIN, "max_steps": 3, "rows": OWN_PROMPTS}
    for mode in ("ddp", "zero2"):
        for kind, settings in SELF_TEACHERS.items():
            cases[f"{mode}-{kind}-dataset"] = {**own, **settings, "rollout": "dataset"}
            cases[f"{mode}-{kind}-sampled"] = {**own, **settings}
    cases["zero2-bf16_average"] = {**own, **SELF_TEACHERS["average"], "bf16": True}
    for mode in ("ddp", "zero3"):
        several = {**PLAIN, "rows": SEVERAL, "teachers": 2}
        cases[f"{mode}-several-dataset"] = {**several, "rollout": "dataset"}
        cases[f"{mode}-several-sampled"] = several
    for mode in ("zero3", "fsdp2"):
        cases[f"{mode}-refused_live"] = {**own, **SELF_TEACHERS["live"], "refused": True, "shard_teacher": None}
    return cases


def main() -> None:
    what, directory = sys.argv[1], Path(sys.argv[2])
    if what == "single":
        for name, settings in matrix().items():
            if name.startswith("ddp") and name.endswith("dataset"):
                run(directory, name.replace("ddp", "single"), **settings)
        return
    without_compiler()
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    for name, settings in matrix().items():
        if only not in name:
            continue
        enter(name.split("-")[0])
        run(directory, name, **settings)
        print(name, flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort at interpreter exit in about every third run


if __name__ == "__main__":
    main()
