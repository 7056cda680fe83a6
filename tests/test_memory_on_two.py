"""Two processes: a teacher that is whole needs no communication while it judges, the main process tokenizes for both, and FSDP2 in
bf16 does not round the loss that is logged."""

import json

import pytest
import torch
from processes import torchrun


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    rows = [
        {"messages": [{"role": "user", "content": "q" * i}, {"role": "assistant", "content": "ab"}]}
        for i in range(4, 12)
    ]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torchrun(["tests/memory_worker.py", str(directory)])
    return [json.loads((directory / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_a_whole_teacher_saves_the_collectives_of_its_forwards(found, mode):
    for rank in found:
        whole, spread = rank[f"{mode}-None"], rank[f"{mode}-True"]
        assert not whole["is_spread"] and spread["is_spread"]
        # DeepSpeed makes a few of its own while the gathered student samples.
        assert 2 * whole["collectives"] < spread["collectives"] and (whole["collectives"] == 0 or mode == "zero3")
        assert whole["losses"] == pytest.approx(spread["losses"], abs=1e-4)
    assert sum(rank["zero3-None"]["rounds"] for rank in found) > 0


def test_a_data_set_on_disk_is_tokenized_by_the_main_process_alone(found):
    assert [rank["tokenized"] for rank in found] == [8, 0]


def test_fsdp2_in_bf16_does_not_round_the_loss(found):
    loss, _ = found[0]["bf16"]["losses"]
    assert loss != torch.tensor(loss).bfloat16().item()
    assert loss == pytest.approx(found[0]["fsdp2-None"]["losses"][0], rel=0.1)
