"""A teacher that is given by its path, on two processes: whole where it is to be whole, and else in shards from the first byte on.

`loading_worker.py` trains a step in each engine and counts bytes while the teacher is loaded. The teacher is wide for what it is, 194 MiB, so that
its weights are most of what a process holds.
"""

import json

import pytest
from loading_worker import CASES
from processes import torchrun
from tiny import byte_tokenizer, tiny_model


WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loading")
    teacher = tiny_model(seed=2, initializer_range=0.05, **WIDE)
    teacher.save_pretrained(directory / "teacher")
    byte_tokenizer().save_pretrained(directory / "teacher")
    size = sum(p.numel() for p in teacher.parameters())
    largest = max(p.numel() for p in teacher.parameters())
    del teacher
    torchrun(["tests/loading_worker.py", str(directory)])
    return size, largest, [json.loads((directory / f"found-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_held_whole_or_by_halves_as_was_asked(found, name):
    size, _, ranks = found
    for rank in ranks:
        assert rank[name]["held"] / size == pytest.approx(0.5 if name.endswith("True") else 1.0, abs=0.01)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("True")])
def test_a_process_never_holds_more_than_its_share_of_it_and_a_few_tensors(found, name):
    size, largest, ranks = found
    limit = 4 * (size / 2 + 3 * largest) + 20 * 2**20
    assert ranks[1][name]["peak"] < limit < 0.9 * 4 * size


def test_how_it_was_loaded_does_not_change_what_it_teaches(found):
    _, _, ranks = found
    for rank in ranks:
        for name in CASES:
            assert rank[name]["loss"] == pytest.approx(ranks[0]["ddp-None"]["loss"], abs=1e-4)
