"""What each of two processes runs for `test_engines.py`: engines' configurations as people bring them, one after the other.

`torchrun ... engines_worker.py DIR` writes `DIR/<case>-<rank>.json`, and what a case saves under `DIR/saved/<case>`.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

import torch.distributed as dist
import yaml
from cpu_processes.sitecustomize import without_compiler
from distributed_worker import CONFIGS, DATASET, ROWS, enter, make_trainer


def case(mode: str, *, config: dict | None = None, zero: dict | None = None, does: str = "trains", **settings) -> dict:
    """`config` changes the accelerate configuration, `zero` is a DeepSpeed configuration in a file of its own."""
    return {"mode": mode, "config": config or {}, "zero": zero, "does": does, "settings": {**DATASET, **settings}}


def zero_file(stage: int, **changes) -> dict:
    block = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **changes.pop("zero_optimization", {})}
    if stage == 3:
        block.setdefault("stage3_param_persistence_threshold", 0)
    numbers = (
        "gradient_accumulation_steps",
        "gradient_clipping",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    )
    return {"bf16": {"enabled": "auto"}, "zero_optimization": block, **dict.fromkeys(numbers, "auto"), **changes}


TWICE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
SHARDED = {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}
EVALUATED = {
    "eval_rows": ROWS,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def cases() -> dict[str, dict]:
    return {
        "zero1-accumulation": case("zero1", config={"deepspeed_config": {"gradient_accumulation_steps": 1}}, **TWICE),
        "zero2-numbers": case("zero2", zero=zero_file(2, train_micro_batch_size_per_gpu=4, gradient_clipping=1.0)),
        "zero2-equal_numbers": case("zero2", zero=zero_file(2, train_micro_batch_size_per_gpu=2, train_batch_size=4)),
        "zero2-optimizer": case(
            "zero2",
            zero=zero_file(2, optimizer={"type": "SGD", "params": {"lr": "auto"}}, zero_allow_untested_optimizer=True),
        ),
        "zero3-hpz": case("zero3", zero=zero_file(3, zero_optimization={"zero_hpz_partition_size": 2})),
        "zero3-quantized": case(
            "zero3",
            zero=zero_file(3, zero_optimization={"zero_quantized_weights": True, "zero_quantized_gradients": True}),
        ),
        "zero3-autotp": case("zero2", zero=zero_file(2, tensor_parallel={"autotp_size": 2})),
        "fsdp2-cp": case(
            "fsdp2",
            config={"parallelism_config": {"parallelism_config_cp_size": 2, "parallelism_config_dp_shard_size": 1}},
        ),
        "zero3-sp": case("zero3", config={"parallelism_config": {"parallelism_config_sp_size": 2}}),
        "fsdp2-tp": case("fsdp2", config={"parallelism_config": {"parallelism_config_tp_size": 2}}),
        "ddp-tp_plan": case("ddp", from_path=True, model_init_kwargs={"tp_plan": "auto"}),
        "ddp-teacher_tp_plan": case("ddp", from_path=True, teacher_model_init_kwargs={"tp_plan": "auto"}),
        "fsdp2-hsdp": case(
            "fsdp2",
            config={
                "parallelism_config": {
                    "parallelism_config_dp_replicate_size": 2,
                    "parallelism_config_dp_shard_size": 1,
                }
            },
        ),
        "fsdp2-activation_checkpointing": case(
            "fsdp2", config={"fsdp_config": {"fsdp_activation_checkpointing": True}}, does="saves"
        ),
        "fsdp2-activation_checkpointing_lora": case(
            "fsdp2", config={"fsdp_config": {"fsdp_activation_checkpointing": True}}, does="saves", lora=True
        ),
        "fsdp2-sharded_save": case("fsdp2", config=SHARDED, does="saves"),
        "fsdp2-sharded_save_lora": case("fsdp2", config=SHARDED, does="saves", lora=True),
        "fsdp2-best": case("fsdp2", does="saves", **EVALUATED),
        "fsdp2-sharded_best": case("fsdp2", config=SHARDED, does="saves", **EVALUATED),
        "zero3-no_gathering": case(
            "zero3",
            zero=zero_file(3, zero_optimization={"stage3_gather_16bit_weights_on_model_save": False}),
            does="saves",
        ),
        "zero3-no_gathering_lora": case(
            "zero3",
            zero=zero_file(3, zero_optimization={"stage3_gather_16bit_weights_on_model_save": False}),
            does="saves",
            lora=True,
        ),
        **{
            f"{mode}-evaluates_first": case(mode, does="evaluates_first", eval_rows=ROWS)
            for mode in ("ddp", "zero2", "zero3", "fsdp2")
        },
        **{f"{mode}-trains_twice": case(mode, does="trains_twice") for mode in ("ddp", "zero2", "zero3", "fsdp2")},
        **{f"{mode}-saves_first": case(mode, does="saves_first") for mode in ("ddp", "zero2", "zero3", "fsdp2")},
    }


def write_config(directory: Path, name: str, mode: str, changes: dict, zero: dict | None) -> Path:
    content = yaml.safe_load((CONFIGS / f"{mode}.yaml").read_text())
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    if zero is not None:
        (directory / f"{name}.zero.json").write_text(json.dumps(zero))
        content["deepspeed_config"] = {
            "deepspeed_config_file": str(directory / f"{name}.zero.json"),
            "zero3_init_flag": False,
        }
        content.pop("mixed_precision", None)
    path = directory / f"{name}-{os.environ['RANK']}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(directory: Path, name: str, mode: str, config: dict, zero: dict | None, does: str, settings: dict) -> dict:
    result = {"stage": "setting up"}
    try:
        enter(mode, write_config(directory, name, mode, config, zero))
        if "parallelism_config" in config:
            os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        trainer = make_trainer(directory, name, **settings)
        result["stage"] = "running"
        if does == "evaluates_first":
            result["before"] = trainer.evaluate()["eval_loss"]
        if does == "saves_first":
            trainer.save_model(str(directory / "saved" / (name + "_before")))
        trainer.train()
        result["losses"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        result["grad_norms"] = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
        if does == "trains_twice":
            trainer.train()
            result["losses_again"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        result["stage"] = "saving"
        trainer.save_model(str(directory / "saved" / name))
        if does == "evaluates_first":
            result["after"] = trainer.evaluate()["eval_loss"]
        result["stage"] = "done"
        result["best"] = trainer.state.best_model_checkpoint
    except Exception as error:
        result |= {"error": f"{type(error).__name__}: {error}"[:2500]}
        if os.environ["RANK"] == "0" and not isinstance(error, ValueError):
            traceback.print_exc()
    with contextlib.suppress(Exception):
        trainer.accelerator.free_memory()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(450, exit=True)
    without_compiler()
    for name, parts in cases().items():
        if options.only not in name:
            continue
        result = run(options.directory, name, **parts)
        (options.directory / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))
        print(name, os.environ["RANK"], result.get("error", result.get("losses")), result["stage"], flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
