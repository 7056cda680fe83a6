"""What failed or was wrong on GPUs, shown on a CPU: by structure, with stand-ins for kernels that only a GPU has, or by value."""

import pytest
import torch
from test_skd_trainer import make_trainer

from skd_trl.sampling import draft_length
from skd_trl.sampling.draft_length import AutoDraftLength, Round, expected_tokens


# torch_compile: on a GPU the loss, traced with the model, ended in an IndexError


@pytest.mark.parametrize("rollout", ["interleaved", "dataset"])
def test_torch_compile_is_shown_the_backbone_alone_and_once_for_all_shapes(tmp_path, rollout):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = {}
    for backend in (None, "eager"):
        trainer = make_trainer(
            tmp_path, rollout=rollout, max_steps=4, learning_rate=1e-2, torch_compile=backend is not None,
            torch_compile_backend=backend,
        )  # fmt: skip
        trainer.train()
        losses[backend] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses["eager"] == pytest.approx(losses[None], abs=1e-5)
    # One graph for the first shape and one for all others, where the traced loss made 137 of them in four steps.
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["total"] == counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


# Choosing a draft length took 2.4 ms a round at 256 rows


def test_choosing_a_draft_length_asks_once_for_all_rows_that_need_more_than_the_longest(monkeypatch):
    policy, asked = AutoDraftLength(), []
    for i in range(64):
        policy.observe(Round(256 - i, 3, 0.03, 0.02 + 1e-4 * i, 100, 80))
    remaining = [7 + i % 300 for i in range(256)]
    plain = min(range(1, 17), key=lambda length: policy.cost(length, remaining))
    monkeypatch.setattr(draft_length, "expected_tokens", lambda *pair: asked.append(pair) or expected_tokens(*pair))
    assert policy.choose(remaining) == plain
    assert len(asked) <= 16 * 16  # lengths times kinds of rows, where there were 16 times 256
