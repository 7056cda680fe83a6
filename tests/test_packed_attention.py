"""Query groups are packed: the values of plain attention, and no key or value is copied for a query head."""

from contextlib import nullcontext

import pytest
import torch
from test_sampler import sample
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skd_trl.sampling import packed_attention, ragged_cache
from skd_trl.sampling.admission import prove


@pytest.mark.parametrize("mask_heads", [1, 6])
@pytest.mark.parametrize("num_queries", [1, 4, 9])
@pytest.mark.parametrize("way", ["packed_attention", "attend_packed", "attend_by_member"])
def test_every_way_gives_the_values_of_repeated_keys(way, num_queries, mask_heads):
    """9 queries of a group of 3 are beyond what is packed on a CPU."""
    generator = torch.Generator().manual_seed(num_queries)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((6, num_queries), (2, 13), (2, 13))
    )
    mask = torch.rand(2, mask_heads, num_queries, 13, generator=generator) < 0.6
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    plain = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]
    if way == "packed_attention":
        output = packed_attention.packed_attention(module, query, key, value, mask, scaling=0.3)[0]
    else:
        output = getattr(packed_attention, way)(query, key, value, mask, 0.3).transpose(1, 2)
    assert torch.allclose(output, plain, atol=1e-6)


class CopiedKeys(TorchDispatchMode):
    """Collects what makes a new tensor of as many numbers as all slots in use have for all query heads."""

    def __init__(self, num_heads, head_size):
        super().__init__()
        self.per_slot, self.head_size, self.seen, self.num_attended = num_heads * head_size, head_size, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if "attention" in name:
            self.num_attended += 1
        elif isinstance(output, torch.Tensor) and not output._is_view() and output.ndim > 3:
            num_slots = output.shape[-2]
            if output.shape[-1] == self.head_size and num_slots > 7:
                if output.numel() >= output.shape[0] * num_slots * self.per_slot:
                    self.seen.append((name, tuple(output.shape)))
        return output


def copies(architecture, **settings):
    models = [tiny_model(architecture, seed=seed, head_dim=24, **settings) for seed in (1, 2)]
    for model in models:
        prove(model)
    with CopiedKeys(num_heads=4, head_size=24) as mode:
        sample(*models, prompts=[[1] * 3, [2, 3]], num_draft_tokens=5, max_new_tokens=14)
    assert mode.num_attended > 20
    return mode.seen


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_no_key_and_no_value_is_copied_for_a_query_head(monkeypatch, architecture):
    assert not copies(architecture)
    monkeypatch.setattr(ragged_cache, "packed_query_groups", nullcontext)
    assert copies(architecture)  # as transformers does it


def test_transformers_attention_is_as_it_was_after_a_forward_and_a_users_function_under_its_name_is_kept(monkeypatch):
    student, teacher, seen = tiny_model(seed=1), tiny_model(seed=2), []
    teacher.model.layers[0].register_forward_hook(lambda *_: seen.append(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    sample(student, teacher)
    assert packed_attention.packed_attention in seen
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    def own(*arguments, **settings):
        return sdpa_attention_forward(*arguments, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    seen.clear()
    sample(student, teacher)
    assert set(seen) == {own}
