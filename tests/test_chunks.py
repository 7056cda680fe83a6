"""How long a chunk of the loss is, by value, and what it holds: counted on tensors without memory."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from skd_trl.loss.chunks import TENSORS_PER_CHUNK, DeviceMemory, default_chunk_size, even_chunk_size
from skd_trl.loss.distillation_loss import distillation_loss
from skd_trl.loss.divergences import DIVERGENCES
from skd_trl.loss.gates import GATES
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates
from skd_trl.loss.token_distributions import STATISTICS
from skd_trl.training.memory_count import Allocations


GIB = 2**30
CUDA = torch.device("cuda")
NUM, VOCABULARY, WIDTH = 400, 1000, 4


@pytest.mark.parametrize(
    ("vocab_size", "total", "free", "positions"),
    [
        (151936, 80 * GIB, 60 * GIB, 512),  # a sixteenth of 80 GiB holds 588
        (151936, 80 * GIB, 50 * GIB, 512),  # however much is free, as long as it is enough
        (151936, 80 * GIB, 6 * GIB, 256),  # half of 6 GiB holds 353
        (151936, 80 * GIB, 0, 110),  # 64 MiB of logits, as before; below that it is the caller's to say
        (151936, 24 * GIB, 20 * GIB, 128),
        (32000, 80 * GIB, 60 * GIB, 2688),
        (8192, 80 * GIB, 60 * GIB, 4096),
    ],
)
def test_on_a_gpu_a_chunk_follows_from_the_memory(vocab_size, total, free, positions):
    assert default_chunk_size(vocab_size, CUDA, DeviceMemory(total, free)) == positions


def test_a_cpu_is_not_asked_for_its_memory_and_chunks_are_of_one_size():
    assert DeviceMemory.of(torch.device("cpu")) is None
    assert [even_chunk_size(num, 8) for num in (17, 16, 1, 0)] == [6, 8, 1, 1]


def tensors_held(dtype: torch.dtype, divergence: str, gate: str, **options) -> float:
    """The most that a chunk holds, in tensors (N, V) of fp32."""
    with FakeTensorMode(), Allocations() as allocations:
        signals = [
            HiddenStates(
                torch.empty((NUM, WIDTH), dtype=dtype, requires_grad=trains),
                LMHead(nn.Parameter(torch.empty((VOCABULARY, WIDTH), dtype=dtype), requires_grad=trains)),
            )
            for trains in (True, False)
        ]
        facts = ResponseFacts.of(torch.zeros(NUM, dtype=torch.long), uniforms=torch.empty((NUM, 10)))
        before = allocations.live
        distillation_loss(
            *signals, facts, divergence=DIVERGENCES[divergence](), gate=GATES[gate](), vocab_size=VOCABULARY, chunk_size=NUM, **options
        )  # fmt: skip
        return (allocations.peak - before) / (4 * NUM * VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_no_chunk_holds_more_tensors_than_its_length_is_chosen_for(dtype, divergence):
    held = [
        tensors_held(dtype, divergence, gate, replaced_loss=replaced_loss, statistics=tuple(STATISTICS))
        for gate in ("greedy_top_k", "spec_k")
        for replaced_loss in ("divergence", "nll")
    ]
    assert TENSORS_PER_CHUNK / 2 < max(held) <= TENSORS_PER_CHUNK


def test_the_length_of_a_chunk_is_not_chosen_for_more_than_the_largest_one():
    most = tensors_held(torch.bfloat16, "jsd", "spec_k", replaced_loss="nll", statistics=tuple(STATISTICS))
    assert TENSORS_PER_CHUNK - 1 < most
