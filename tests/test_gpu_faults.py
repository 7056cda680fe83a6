"""What failed or was wrong on GPUs, shown on a CPU: by structure, with stand-ins for kernels that only a GPU has, or by value."""

import pytest
import torch
from test_skd_trainer import make_trainer


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
