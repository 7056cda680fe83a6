"""Teachers of every kind on two CPU processes: the update of one process, and the texts of any engine.

All trainings run in one start (`teachers_worker.py`). Tolerances are those of `test_distributed.py`: fp32 sums in another order.
"""

import json
from pathlib import Path

import pytest
import torch
from processes import launch, torchrun
from teachers_worker import matrix


pytestmark = pytest.mark.distributed
CASES = matrix()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("teachers")
    launch(["teachers_worker", "single", str(directory)])
    torchrun(["tests/teachers_worker.py", "two", str(directory)])
    return directory


def results(directory: Path, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob(f"{name}-[01].json"))]


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("dataset")])
def test_two_processes_take_the_steps_of_one(directory, name):
    single = "single-" + name.split("-", 1)[1]
    (one,), both = results(directory, single), results(directory, name)
    assert [result["num_processes"] for result in both] == [2, 2]
    for result in both:
        assert result["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert result["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-4)
    expected, trained = (torch.load(directory / f"{which}.pt") for which in (single, name))
    for key in expected:
        torch.testing.assert_close(trained[key], expected[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("ddp") and name.endswith("sampled")])
def test_what_is_sampled_does_not_depend_on_the_engine(directory, name):
    plain = results(directory, "ddp-" + name.split("-", 1)[1])
    for expected, result in zip(plain, results(directory, name), strict=True):
        assert result["responses"] == expected["responses"]
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "refused" in name])
def test_a_self_teacher_is_refused_by_name_where_the_students_tensors_are_spread(directory, name):
    for result in results(directory, name):
        assert "teacher_model_kind='live'" in result["refused"]
        assert "ZeRO-3 and FSDP2" in result["refused"] and "DDP, ZeRO-1 or ZeRO-2" in result["refused"]


def test_an_average_trains_in_an_engine_of_16_bits(directory):
    for result in results(directory, "zero2-bf16_average"):
        assert len(result["losses"]) == 3 and all(0 < loss < 20 for loss in result["losses"])
