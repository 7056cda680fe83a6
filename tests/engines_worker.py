"""What each of several processes runs for `test_engines.py`: engines' configurations as people bring them, one after the other.

`torchrun ... engines_worker.py DIR` writes `DIR/<case>-<rank>.json`, and what a case saves under `DIR/saved/<case>`. Every case ends
by itself or with an error that is written down: `ddp_timeout` bounds what a process waits for another.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from cpu_processes.sitecustomize import fsdp_on_cpu, without_compiler
from distributed_worker import CONFIGS, DATASET, ROWS, STUDENT, enter, make_trainer
from processes import HANGS_AFTER
from tiny import tiny_model


@dataclass(frozen=True)
class Case:
    """A training of `mode`, with other settings of the trainer, of the accelerate configuration (`config`), or with a DeepSpeed file
    (`zero`).

    Attributes:
        refused: what the error has to say, if it is an error.
        does: what is done besides training and saving.
        num_processes: 4 where two cannot form the groups.
    """

    mode: str
    settings: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    zero: dict | None = None
    refused: str | None = None
    does: str = ""
    num_processes: int = 2


def zero_file(stage: int, zero_optimization: dict | None = None, **changes) -> dict:
    """A DeepSpeed configuration that leaves its numbers to the arguments and really splits tiny models."""
    block = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        **(zero_optimization or {}),
    }
    numbers = (
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    )
    return {"bf16": {"enabled": "auto"}, "zero_optimization": block, **dict.fromkeys(numbers, "auto"), **changes}


def parallel(**sizes: int) -> dict:
    return {"parallelism_config": {f"parallelism_config_{name}_size": size for name, size in sizes.items()}}


def infinite_slope(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """A divergence that is 0, with an infinite gradient on the first process alone."""
    squares = (student_logits - student_logits.detach()).pow(2).sum(-1)
    return squares.sqrt() if os.environ["RANK"] == "0" else squares


BF16_UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}
TWICE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
SHARDED = {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}
CHECKPOINTING = {"fsdp_config": {"fsdp_activation_checkpointing": True}}
UNGATHERED = zero_file(3, {"stage3_gather_16bit_weights_on_model_save": False})
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
# The first checkpoint is the best: the loss falls, and more is better.
BEST = {
    "eval_rows": ROWS,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}

CASES = {
    # Numbers of DeepSpeed's own.
    "zero1-accumulation": Case(
        "zero1", TWICE, {"deepspeed_config": {"gradient_accumulation_steps": 1}}, refused="gradient_accumulation_steps=1 there"
    ),
    "zero2-numbers": Case(
        "zero2", zero=zero_file(2, train_micro_batch_size_per_gpu=4, gradient_clipping=1.0), refused="max_grad_norm=1000000.0 here"
    ),
    "zero3-learning_rate": Case(
        "zero3", zero=zero_file(3, optimizer={"type": "Adam", "params": {"lr": 0.5}}), refused="learning_rate=0.1 here"
    ),
    "zero2-same_numbers": Case("zero2", zero=zero_file(2, train_micro_batch_size_per_gpu=2, train_batch_size=4)),
    "zero3-own_optimizer": Case(
        "zero3",
        zero=zero_file(3, optimizer={"type": "SGD", "params": {"lr": "auto"}}, zero_allow_untested_optimizer=True),
    ),
    # What only an engine with an optimizer can have.
    "zero3-hpz": Case("zero3", zero=zero_file(3, {"zero_hpz_partition_size": 2})),
    "zero3-offloaded": Case("zero3", zero=zero_file(3, OFFLOADED, zero_force_ds_cpu_optimizer=False)),
    "zero2-offloaded": Case(
        "zero2", zero=zero_file(2, {"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False)
    ),
    # Engines in the training arguments, in place of a configuration file.
    "ddp-deepspeed_argument": Case("ddp", {"deepspeed": zero_file(3)}),
    "ddp-fsdp_argument": Case(
        "ddp",
        {
            "fsdp": "full_shard",
            "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False},
        },
    ),
    # Ranks that share a row.
    "zero2-autotp": Case("zero2", zero=zero_file(2, tensor_parallel={"autotp_size": 2}), refused="autotp_size=2"),
    "fsdp2-context_parallel": Case("fsdp2", config=parallel(cp=2), refused="cp_size=2"),
    "zero3-sequence_parallel": Case("zero3", config=parallel(sp=2), refused="sp_size=2"),
    "ddp-tensor_parallel_student": Case(
        "ddp", {"from_path": True, "model_init_kwargs": {"tp_plan": "auto"}}, refused="model_init_kwargs['tp_plan']"
    ),
    "fsdp2-tensor_parallel_teacher": Case(
        "fsdp2", {"from_path": True, "teacher_model_init_kwargs": {"tp_size": 2}}, refused="teacher_model_init_kwargs['tp_size']"
    ),
    "fsdp2-hybrid": Case("fsdp2", config=parallel(dp_replicate=2, dp_shard=2), num_processes=4),
    # Quantised teachers.
    "ddp-quantized_teacher": Case("ddp", {"quantized_teacher": True}),
    "zero3-quantized_teacher": Case("zero3", {"quantized_teacher": True}),
    "fsdp2-quantized_teacher": Case("fsdp2", {"quantized_teacher": True, "shard_teacher": None}),
    "fsdp2-quantized_teacher_split": Case(
        "fsdp2", {"quantized_teacher": True, "shard_teacher": True}, refused="FSDP2 cannot split the teacher's quantised weights"
    ),
    # What is saved.
    "fsdp2-checkpointing": Case("fsdp2", config=CHECKPOINTING),
    "fsdp2-checkpointing_adapter": Case("fsdp2", {"lora": True}, CHECKPOINTING, refused="fsdp_activation_checkpointing"),
    "fsdp2-shards": Case("fsdp2", config=SHARDED),
    "fsdp2-shards_of_adapter": Case("fsdp2", {"lora": True}, SHARDED),
    "zero3-shards": Case("zero3", zero=UNGATHERED),
    "zero3-shards_of_adapter": Case("zero3", {"lora": True}, zero=UNGATHERED),
    **{
        f"{mode}-{which}_resumed": Case(
            mode,
            {"lora": "adapter" in which, "save_strategy": "steps", "save_steps": 2},
            SHARDED if mode == "fsdp2" else {},
            UNGATHERED if mode == "zero3" else None,
            does="resumes",
        )
        for mode in ("zero3", "fsdp2")
        for which in ("shards", "shards_of_adapter")
    },
    "zero3-best": Case("zero3", BEST),
    "fsdp2-best": Case("fsdp2", BEST),
    "fsdp2-best_adapter": Case("fsdp2", {"lora": True, **BEST}),
    "fsdp2-best_of_shards": Case("fsdp2", BEST, SHARDED, refused="SHARDED_STATE_DICT"),
    # Gradients that are not finite, on one process.
    **{
        f"{mode}-infinite_gradient": Case(mode, {"divergence": infinite_slope}, does="spoils")
        for mode in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    },
    "zero2-infinite_gradient_offloaded": Case(
        "zero2",
        {"divergence": infinite_slope},
        zero=zero_file(2, {"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False),
        does="spoils",
    ),
    "zero2-infinite_gradient_bf16": Case(
        "zero2", {"divergence": infinite_slope, "bf16": True}, zero=zero_file(2, bf16={"enabled": True}), does="spoils"
    ),
    "zero2-infinite_gradient_unchecked": Case(
        "zero2", {"divergence": infinite_slope, "bf16": True}, zero=zero_file(2, **BF16_UNCHECKED), does="spoils"
    ),
    # Before the first training, and after it.
    **{f"{mode}-evaluates_first": Case(mode, {"eval_rows": ROWS}, does="evaluates") for mode in ("ddp", "zero2", "fsdp2")},
    # An optimizer of DeepSpeed's own, which an evaluation takes out of the configuration.
    "zero3-evaluates_first": Case(
        "zero3",
        {"eval_rows": ROWS},
        zero=zero_file(3, optimizer={"type": "SGD", "params": {"lr": "auto"}}, zero_allow_untested_optimizer=True),
        does="evaluates",
    ),
    "fsdp2-adapter_evaluates_first": Case("fsdp2", {"lora": True, "eval_rows": ROWS}, does="evaluates"),
    **{f"{mode}-saves_first": Case(mode, does="saves") for mode in ("zero2", "zero3", "fsdp2")},
    **{
        f"{mode}-trains_twice": Case(mode, {"optim": "adamw_torch", "learning_rate": 1e-3}, does="trains again")
        for mode in ("ddp", "fsdp2")
    },
    **{
        f"{mode}-trains_twice": Case(mode, does="trains again", refused="train() is called a second time")
        for mode in ("zero2", "zero3")
    },
}  # fmt: skip


def write_config(directory: Path, name: str, case: Case) -> Path:
    """The accelerate configuration of a case, for this rank."""
    content = yaml.safe_load((CONFIGS / f"{case.mode}.yaml").read_text())
    for key, value in case.config.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    stem = directory / f"{name}-{os.environ['RANK']}"
    if case.zero is not None:
        stem.with_suffix(".zero.json").write_text(json.dumps(case.zero))
        content["deepspeed_config"] = {
            "deepspeed_config_file": str(stem.with_suffix(".zero.json")),
            "zero3_init_flag": False,
        }
        content.pop("mixed_precision", None)
    stem.with_suffix(".yaml").write_text(yaml.safe_dump(content))
    return stem.with_suffix(".yaml")


def run(directory: Path, name: str, case: Case, result: dict) -> None:
    """Fills `result`; what the case raises comes out."""
    enter(case.mode, write_config(directory, name, case))
    if "fsdp" in case.settings:
        fsdp_on_cpu()
    untrained = tiny_model("llama", seed=1, **STUDENT).state_dict()  # before ZeRO-3 shards every new model
    trainer = make_trainer(directory, name, **{**DATASET, **case.settings})
    saved = directory / "saved"
    try:
        if case.does == "evaluates":
            result["before"] = [trainer.evaluate()["eval_loss"] for _ in range(2)]
        if case.does == "saves":
            trainer.save_model(str(saved / f"{name}-before"))
        if case.does == "spoils":
            result.update(what_a_bad_gradient_does(trainer, untrained))
            return
        trainer.train()
        if case.does == "resumes":
            trainer.accelerator.free_memory()
            enter(case.mode, write_config(directory, name, case))
            trainer = make_trainer(directory, name, **{**DATASET, **case.settings})
            trainer.train(resume_from_checkpoint=str(directory / "runs" / name / "checkpoint-2"))
            result["num_steps"] = len(trainer.responses) // 2
        result["losses"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        trainer.save_model(str(saved / name))
        result["engine"] = type(trainer.model_wrapped).__name__
        result["best"] = trainer.state.best_model_checkpoint
        result["teacher_sharded"] = any(
            hasattr(p, "ds_id") or hasattr(p, "_local_tensor") for p in trainer._inner_teacher.parameters()
        )
        if case.does == "evaluates":
            result["after"] = trainer.evaluate()["eval_loss"]
        if case.does == "trains again":
            trainer.train()
            result["losses_again"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    finally:
        trainer.accelerator.free_memory()


def what_a_bad_gradient_does(trainer, before: dict[str, torch.Tensor]) -> dict:
    """What the training ends with, and (on the main process) the student's weights that are not as they were."""
    try:
        trainer.train()
        error = ""
    except FloatingPointError as stopped:
        error = str(stopped)
    after = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return {"stopped": error}
    moved = [
        name
        for name, value in before.items()
        if not torch.equal(after[name].float(), value.to(after[name].dtype).float())
    ]
    return {"stopped": error, "moved": moved, "num_weights": len(after)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(HANGS_AFTER - 60, exit=True)  # says where it hangs
    without_compiler()
    for name, case in CASES.items():
        if options.only not in name or case.num_processes != int(os.environ["WORLD_SIZE"]):
            continue
        result = {}
        try:
            run(options.directory, name, case, result)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
            if case.refused is None:
                traceback.print_exc()
        (options.directory / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))
        print(name, result.get("error"), flush=True)
    # gloo's threads abort at interpreter exit in about every third run.
    with contextlib.suppress(Exception):
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
