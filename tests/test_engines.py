"""Engines' configurations as people bring them, on two processes (HSDP: four): each trains as one process does and saves what it has
trained, or is refused by name before training.

All cases run in one start (`engines_worker.py`). Updates are of plain gradient descent with numbers up to 1 and compared at 1e-5, as
in `test_distributed.py`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import STUDENT, quantize
from engines_worker import CASES, UNGATHERED, zero_file
from peft import LoraConfig, PeftModel, get_peft_model
from processes import launch, torchrun
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from skd_trl import SKDConfig
from skd_trl.training.engine_settings import (
    check_parallel_models,
    check_settings,
    describe_offloading,
    is_quantized,
    teacher_settings,
)
from skd_trl.training.saved_weights import check_saved, describe_shards


WORKER = "tests/engines_worker.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    launch(["distributed_worker", "single", str(directory)])
    torchrun([WORKER, str(directory)])
    torchrun([WORKER, str(directory)], num_processes=4)
    return directory


def results(directory: Path, name: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(directory.glob(f"{name}-[0-3].json"))]
    assert len(found) == CASES[name].num_processes
    return found


def reference(name: str) -> str:
    """The case of one process, or of DDP where the models are others, that has the same update."""
    if "quantized" in name:
        return "ddp-quantized_teacher"
    return "single-lora-dataset" if "adapter" in name else "single-full-dataset"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 3, 4, 5]])).logits


def reloaded(saved: Path) -> torch.nn.Module:
    """The student as a user loads it; an adapter onto what was trained."""
    if not (saved / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(saved)
    return PeftModel.from_pretrained(tiny_model("llama", seed=1, **STUDENT), saved)


def trained_by_one_process(directory: Path, name: str) -> torch.nn.Module:
    """The student with the weights that the reference ends with."""
    if "quantized" in name:
        return reloaded(directory / "saved" / reference(name))
    model, weights = tiny_model("llama", seed=1, **STUDENT), torch.load(directory / f"{reference(name)}.pt")
    if "adapter" in name:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    model.load_state_dict(weights)
    return model


BAD_GRADIENTS = [name for name, case in CASES.items() if case.does == "spoils"]
TRAINED = [
    name
    for name, case in CASES.items()
    if case.refused is None and "trains_twice" not in name and name not in BAD_GRADIENTS
]


@pytest.mark.distributed
@pytest.mark.parametrize("name", TRAINED)
def test_the_losses_are_those_of_one_process(directory, name):
    file = f"{reference(name)}-0.json"
    for result in results(directory, name):
        assert "error" not in result
        assert result["losses"] == pytest.approx(json.loads((directory / file).read_text())["losses"], abs=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in TRAINED if "best" not in name])
def test_what_is_saved_reloads_to_the_logits_that_one_process_trains(directory, name):
    expected = logits(trained_by_one_process(directory, name))
    untrained = logits(tiny_model("llama", seed=1, **STUDENT))
    assert (expected - untrained).abs().max() > 0.1
    torch.testing.assert_close(logits(reloaded(directory / "saved" / name)), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused is not None])
def test_what_cannot_be_trained_is_refused_by_name_on_all_processes(directory, name):
    for result in results(directory, name):
        assert CASES[name].refused in result.get("error", "") and result["error"].startswith("ValueError")
        assert "losses" not in result or "trains_twice" in name


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if "best" in name and CASES[name].refused is None])
def test_the_best_model_is_loaded_at_the_end_and_saved(directory, name):
    first, last = (results(directory, name)[0]["best"], directory / "runs" / name / "checkpoint-3")
    assert first.endswith("checkpoint-1")
    saved, best, final = (logits(reloaded(Path(path))) for path in (directory / "saved" / name, first, last))
    torch.testing.assert_close(saved, best, atol=1e-5, rtol=1e-5)
    assert (saved - final).abs().max() > 0.01


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if "evaluates_first" in name])
def test_an_evaluation_before_training_is_that_of_any_engine_and_changes_nothing(directory, name):
    expected = results(directory, "ddp-evaluates_first")[0]
    for result in results(directory, name):
        assert result["before"][0] == result["before"][1]
        if "adapter" not in name:
            assert result["before"][0] == pytest.approx(expected["before"][0], abs=1e-4)
            assert result["after"] == pytest.approx(expected["after"], abs=1e-4)
        assert result["after"] < result["before"][0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if "saves_first" in name])
def test_what_is_saved_before_training_is_the_student_as_it_was(directory, name):
    torch.testing.assert_close(
        logits(reloaded(directory / "saved" / f"{name}-before")), logits(tiny_model("llama", seed=1, **STUDENT))
    )


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if "resumed" in name])
def test_a_run_goes_on_from_a_checkpoint_of_shards(directory, name):
    for result in results(directory, name):
        assert result["num_steps"] == 1 and len(result["losses"]) == 3  # two of them are the checkpoint's record
    checkpoint = directory / "runs" / name / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_a_gradient_that_is_not_finite_on_one_process_ends_the_run_on_all_before_the_step(directory, name):
    first, second = results(directory, name)
    assert (
        first["stopped"] == second["stopped"] or "ddp" in name or "fsdp2" in name
    )  # these name the parameters they hold
    for result in (first, second):
        assert result["stopped"].startswith("Step 1: the loss is finite and its gradient is not")
        assert ("The step was not taken." in result["stopped"]) is ("unchecked" not in name)
    assert first["num_weights"] == 21
    if "unchecked" in name:  # DeepSpeed's own check is off: it is said what has happened
        assert "check_grad_overflow" in first["stopped"] and first["moved"]
    else:
        assert first["moved"] == []


@pytest.mark.distributed
def test_fsdp2_trains_a_second_time_as_ddp_does(directory):
    expected, result = (results(directory, f"{mode}-trains_twice")[0] for mode in ("ddp", "fsdp2"))
    assert result["losses_again"] == pytest.approx(expected["losses_again"], abs=1e-4)
    assert result["losses_again"] != result["losses"]


@pytest.mark.distributed
def test_a_quantised_teacher_is_split_by_zero_3_and_whole_under_fsdp2(directory):
    assert results(directory, "zero3-quantized_teacher")[0]["teacher_sharded"]
    assert not results(directory, "fsdp2-quantized_teacher")[0]["teacher_sharded"]
    assert results(directory, "fsdp2-hybrid")[0]["teacher_sharded"]


@pytest.mark.distributed
def test_an_engine_in_the_training_arguments_is_the_one_that_trains(directory):
    assert results(directory, "ddp-deepspeed_argument")[0]["engine"] == "DeepSpeedEngine"
    assert results(directory, "ddp-fsdp_argument")[0]["engine"].startswith("FSDP")


# Without processes


def test_the_teachers_engine_takes_over_types_and_placement_and_nothing_of_training():
    config = zero_file(
        3,
        {
            "zero_hpz_partition_size": 8,
            "zero_quantized_weights": True,
            "zero_quantized_gradients": True,
            "mics_shard_size": 8,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto",
        },
        optimizer={"type": "AdamW"},
        scheduler={"type": "WarmupLR"},
        flops_profiler={"enabled": True},
        tensorboard={"enabled": True},
        fp16={"enabled": False},
    )
    assert teacher_settings(config, hidden_size=10, shard=True) == {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_prefetch_bucket_size": 90,
            "offload_param": {"device": "cpu"},
        },
    }
    whole = teacher_settings(config, hidden_size=10, shard=False)["zero_optimization"]
    assert whole["stage"] == 0 and "offload_param" not in whole
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}  # the student's own


def launched(distributed_type, *, state=None, parallelism_config=None, even_batches=True):
    return SimpleNamespace(
        distributed_type=distributed_type,
        state=state,
        parallelism_config=parallelism_config,
        num_processes=2,
        even_batches=even_batches,
    )


def fsdp_accelerator(**settings):
    plugin = SimpleNamespace(activation_checkpointing=False, state_dict_type="FULL_STATE_DICT", **settings)
    return launched("FSDP", state=SimpleNamespace(fsdp_plugin=plugin))


def test_a_quantised_student_under_fsdp2_is_refused_and_zero_named():
    student, teacher = (tiny_model("llama", seed=seed) for seed in (1, 2))
    args = SKDConfig("unused", bf16=False, use_cpu=True)
    check_settings(args, fsdp_accelerator(), student, teacher)
    quantize(student)
    assert is_quantized(student) and not is_quantized(teacher)
    with pytest.raises(ValueError, match="quantised weights.*ZeRO"):
        check_settings(args, fsdp_accelerator(), student, teacher)


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_every_group_that_shares_a_row_is_refused_by_its_name_and_others_are_not(name):
    accelerator = launched("MULTI_GPU", parallelism_config=SimpleNamespace(**{name: 2}))
    with pytest.raises(ValueError, match=f"parallelism_config's {name}=2"):
        check_settings(None, accelerator, None, None)
    hybrid = SimpleNamespace(dp_replicate_size=2, dp_shard_size=4, tp_size=1, cp_size=1, sp_size=1)
    check_settings(None, launched("MULTI_GPU", parallelism_config=hybrid), None, None)


def test_a_model_that_was_loaded_with_tensor_parallelism_is_refused_by_name():
    args, model = SKDConfig("unused", bf16=False, use_cpu=True), tiny_model("llama")
    check_parallel_models(args, {"model": "some/path", "teacher_model": model})
    model._tp_size = 4
    with pytest.raises(ValueError, match="teacher_model was loaded with tensor parallelism over 4 ranks"):
        check_parallel_models(args, {"model": "some/path", "teacher_model": model})


def test_weights_that_are_missing_from_what_was_saved_are_an_error_with_both_counts(tmp_path):
    student = tiny_model("llama", seed=1, **STUDENT)
    student.save_pretrained(tmp_path)
    check_saved(student, str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="35,168 numbers of the student were trained.*20 tensors of 26,880 numbers"):
        check_saved(student, str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="0 tensors of 0 numbers"):
        check_saved(student, str(tmp_path))


def test_checkpoints_of_shards_are_announced_with_the_way_to_merge_them():
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config=UNGATHERED)
    zero = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    assert "zero_to_fp32.py" in describe_shards(zero)
    plugin.deepspeed_config = zero_file(3)
    assert describe_shards(zero) is None
    sharded = fsdp_accelerator()
    assert describe_shards(sharded) is None
    sharded.state.fsdp_plugin.state_dict_type = "SHARDED_STATE_DICT"
    assert "accelerate merge-weights" in describe_shards(sharded)


def test_an_optimizer_that_offloading_replaces_is_named_and_adamw_is_not():
    config = zero_file(2, {"offload_optimizer": {"device": "cpu"}})
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = launched("DEEPSPEED", state=SimpleNamespace(deepspeed_plugin=plugin))
    sgd, adamw = (SimpleNamespace(optim=name) for name in ("sgd", "adamw_torch_fused"))
    assert describe_offloading(adamw, accelerator) is None
    assert "DeepSpeedCPUAdam" in describe_offloading(sgd, accelerator)
    config["zero_force_ds_cpu_optimizer"] = False
    assert describe_offloading(sgd, accelerator) is None
    plugin.deepspeed_config = zero_file(2)
    assert describe_offloading(sgd, accelerator) is None
