"""Two processes on CPU, in every mode: what they compute, what each holds, what they save, and that they end.

All trainings run in one start of two processes (`distributed_worker.py`), then each mode's `accelerate launch` resumes its
killed one. Losses are compared at 1e-4 and updates, of plain gradient descent with numbers up to 1, at 1e-5: fp32 sums in
another order differ by about 1e-6.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from distributed_worker import CONFIGS, MODES, ROWS, STUDENT, TEACHER, matrix
from processes import ROOT, accelerate_launch, launch, torchrun
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model


pytestmark = pytest.mark.distributed
WORKER = "tests/distributed_worker.py"
ENGINES = {
    "ddp": "DistributedDataParallel",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDP",
}
CASES = matrix()


def sampled_reference(name: str) -> str:
    """The case that samples the same in the plainest engine there is."""
    _, case, _ = name.split("-")
    plain = {"own_engine": "full", "left_sharded": "full", "auto": "full", "hybrid_sharded": "hybrid"}
    case = {**plain, "per_prompt_gathered": "per_prompt"}.get(case, case)
    return f"ddp-{case}-sampled" if f"ddp-{case}-sampled" in CASES else f"fsdp2-{case}-sampled"


STUDENT_SIZE, TEACHER_SIZE = 35168, 61968


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("distributed")
    launch(["distributed_worker", "single", str(directory)])
    torchrun([WORKER, "matrix", str(directory)])
    return directory


def results(directory: Path, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob(f"{name}-[01].json"))]


def lengths(result: dict) -> list[int]:
    return [len(response) for response in result["responses"]]


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-dataset")])
def test_two_processes_take_the_steps_of_one_on_the_same_rows(directory, name):
    case = name.split("-", 1)[1].replace("from_path", "full")
    (single,), both = results(directory, f"single-{case}"), results(directory, name)
    assert [result["num_processes"] for result in both] == [2, 2]
    for result in both:
        assert result["losses"] == pytest.approx(single["losses"], abs=1e-4)
        assert result["grad_norms"] == pytest.approx(single["grad_norms"], rel=1e-4)
    expected, trained = (torch.load(directory / f"{which}.pt") for which in (f"single-{case}", name))
    assert trained.keys() == expected.keys()
    limit = 1e-4 if "hybrid" in name else 1e-5  # a recurrence passes a rounding on to all tokens after it
    for key in expected:
        torch.testing.assert_close(trained[key], expected[key], atol=limit, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_config_brings_up_its_engine(directory, mode):
    for result in results(directory, f"{mode}-full-dataset"):
        assert result["engine"].startswith(ENGINES[mode])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("uneven")])
def test_sampling_ends_when_one_rank_is_done_at_once_and_the_other_at_the_limit(directory, name):
    first, second = results(directory, name)
    assert set(lengths(first)) == {1}
    assert set(lengths(second)) == {8}
    assert len(lengths(first)) == len(lengths(second)) == 4


COMPARED = {
    name: sampled_reference(name)
    for name in CASES
    if name.endswith("-sampled") and "same" not in name and sampled_reference(name) != name
}


@pytest.mark.parametrize("name", COMPARED)
def test_sampled_runs_do_not_depend_on_the_engine(directory, name):
    for expected, result in zip(results(directory, COMPARED[name]), results(directory, name), strict=True):
        assert result["responses"] == expected["responses"]
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-4)


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_each_rank_saves_what_its_own_draft_length_has_learned(directory, mode):
    checkpoint = directory / "runs" / f"{mode}-auto-sampled" / "checkpoint-2"
    states = [json.loads((checkpoint / f"draft_length_{rank}.json").read_text())["state"] for rank in (0, 1)]
    assert all(state["num_rounds"] > 0 for state in states)
    assert states[0]["num_judged"] != states[1]["num_judged"]  # one rank's responses end at once


@pytest.mark.parametrize("mode", MODES)
def test_bf16_samples_and_trains_close_to_fp32(directory, mode):
    (single,) = results(directory, "single-full-dataset")
    for result in results(directory, f"{mode}-bf16"):
        # The first step has the same rows; 8 bits of mantissa, and errors of either sign in the mean over tokens.
        assert result["losses"][0] == pytest.approx(single["losses"][0], rel=2**-7)
        assert len(result["losses"]) == 2 and all(0 < loss < 20 for loss in result["losses"])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("full-dataset") or "own_engine" in name])
def test_the_teacher_is_held_by_halves_where_it_is_sharded_and_whole_elsewhere(directory, name):
    share = 0.5 if name.startswith(("zero3", "fsdp2")) or "own_engine" in name else 1.0
    for result in results(directory, name):
        assert result["teacher_held"] / TEACHER_SIZE == pytest.approx(share, abs=0.02)
        assert not result["teacher_training"]
        assert result["teacher_gradients"] == 0
    if name.startswith(("zero3", "fsdp2")):
        assert result["student_held"] / STUDENT_SIZE == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_an_error_while_the_student_is_gathered_leaves_it_sharded_and_with_its_hooks(directory, mode):
    for result in results(directory, f"{mode}-full-sampled"):
        outcome = result["after_error"]
        assert outcome["whole"] == STUDENT_SIZE
        assert outcome["after"] == outcome["before"]


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_resumed_by_accelerate_launch_goes_on_as_if_nothing_had_happened(directory, mode):
    accelerate_launch(mode, [WORKER, "resume", str(directory), "--mode", mode])
    for whole, killed, resumed in zip(
        results(directory, f"{mode}-uninterrupted"),
        results(directory, f"{mode}-killed"),
        results(directory, f"{mode}-resumed"),
        strict=True,
    ):
        assert resumed["num_processes"] == 2 and resumed["engine"] == whole["engine"]
        assert len(killed["losses"]) == 2 and len(whole["losses"]) == 4
        assert killed["losses"] == whole["losses"][:2]
        assert resumed["losses"] == whole["losses"]  # the first two are the checkpoint's record
        assert resumed["responses"] == whole["responses"][len(killed["responses"]) :]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("resumes")])
def test_a_run_of_a_hybrid_pair_goes_on_from_its_checkpoint_as_it_did(directory, name):
    for result in results(directory, name):
        assert len(result["losses"]) == 3 and result["resumed_losses"] == result["losses"]
        num_before = len(result["responses"]) * 2 // 3
        assert result["resumed_responses"] == result["responses"][num_before:]


def test_ranks_given_the_same_prompts_draw_different_responses_and_a_seed_draws_the_same_run_twice(directory):
    first, second = results(directory, "ddp-same_prompts-sampled")
    drawn = [tuple(response) for response in first["responses"] + second["responses"]]
    assert len(set(drawn)) == len(drawn) == 8
    again = results(directory, "ddp-same_prompts_again-sampled")
    assert [first["responses"], second["responses"]] == [result["responses"] for result in again]
    assert first["losses"] == again[0]["losses"]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_teacher_is_in_a_checkpoint(directory, mode):
    checkpoint = directory / "runs" / f"{mode}-uninterrupted" / "checkpoint-4"
    tensors = [tensor for path in checkpoint.rglob("*") if path.is_file() for tensor in tensors_in(path)]
    assert any(tensor.ndim == 2 and 32 in tensor.shape for tensor in tensors)
    assert not [tuple(tensor.shape) for tensor in tensors if tensor.ndim > 1 and {48, 80} & set(tensor.shape)]
    # At most: the weights twice, their fp32 copies, two moments. Flattened, the teacher would show by its size.
    assert sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()) <= 5.1 * STUDENT_SIZE


def tensors_in(path: Path) -> list[torch.Tensor]:
    if path.suffix == ".safetensors":
        return list(load_file(path).values())
    if path.suffix not in (".pt", ".bin", ".pth"):
        return []
    found, rest = [], [torch.load(path, map_location="cpu", weights_only=False)]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, (list, tuple)):
            rest += value
    return found


@pytest.mark.parametrize("name", [name for name in CASES if "-refused" in name])
def test_what_an_engine_cannot_do_is_refused_before_training(directory, name):
    for result in results(directory, name):
        assert CASES[name]["refused"] in result["refused"]


def test_a_rank_that_raises_ends_the_job_with_its_own_error(directory):
    outcome = torchrun([WORKER, "raises", str(directory)], expect_failure=True)
    assert outcome.returncode != 0
    assert "RuntimeError: rank 1 gives up" in outcome.output


def test_a_rank_that_hangs_ends_the_job_after_ddp_timeout(directory):
    outcome = torchrun([WORKER, "hangs", str(directory)], expect_failure=True)
    assert outcome.returncode != 0
    assert "[rank0]" in outcome.output and "imed out" in outcome.output


@pytest.mark.parametrize("mode", MODES)
def test_cpu_variants_differ_from_the_configs_for_gpus_in_device_lines_only(mode):
    gpu, cpu = (
        yaml.safe_load(path.read_text()) for path in (CONFIGS.parent / f"{mode}.yaml", CONFIGS / f"{mode}.yaml")
    )
    different = {key for key in gpu.keys() | cpu.keys() if gpu.get(key) != cpu.get(key)}
    assert different - {"mixed_precision", "num_processes"} <= ({"deepspeed_config"} if mode == "zero3" else set())
    if mode == "zero3":  # a file, because accelerate's own fields cannot say that a tiny tensor is to be sharded, too
        settings = json.loads((ROOT / cpu["deepspeed_config"]["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == gpu["deepspeed_config"]["zero_stage"] == 3


def test_the_readmes_command_for_several_gpus_runs_on_two_processes_of_a_cpu(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^accelerate launch --config_file ((?:.*\\\n)*.*)$", readme, re.MULTILINE)
    mode_config, script, option, config = shlex.split(command.replace("\\\n", " "))
    assert option == "--config"
    for name, seed, sizes in (("student", 1, STUDENT), ("teacher", 2, TEACHER)):
        tiny_model(seed=seed, **sizes).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    for split in ("train", "test"):
        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load((ROOT / config).read_text())
    for stage in ("teacher_sft", "student_sft"):
        settings[stage] = {**settings[stage], "max_steps": 1}
    settings |= {  # sizes and devices; everything else is the file's
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "max_prompt_length": 128,
        "max_new_tokens": 8,
        "max_length": 136,
        "max_steps": 2,
        "num_eval_rows": 4,
        "logging_steps": 1,
        "report_to": "none",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    mode = Path(mode_config).stem
    outcome = accelerate_launch(mode, [script, option, str(tmp_path / "config.yaml")])
    assert "Training completed" in outcome.output
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["settings"]["processes"] == 2
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == STUDENT_SIZE
