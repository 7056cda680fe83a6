"""The faster library computes what `nn.Linear` computes, and leaves no trace on the model."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from skd_trl import cpu_linear
from skd_trl.cpu_linear import fast_linear_layers, linear


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(1, 6), (5, 6), (2, 3, 6), (1, 1, 6)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_layer(shape, has_bias):
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(shape), torch.randn(4, 6), torch.randn(4) if has_bias else None
    outcomes = []
    for function in (nn.functional.linear, linear):
        leaves = [t.clone().requires_grad_() for t in (inputs, weight, bias) if t is not None]
        output = function(*leaves)
        gradients = torch.autograd.grad((output**3).sum(), leaves)
        outcomes.append([output.detach(), *gradients])
    for plain, fast in zip(*outcomes, strict=True):
        assert plain.shape == fast.shape
        # Sums of 6 products of numbers of order 1; gradients add up to 40 of order 100.
        assert (plain - fast).abs().max() <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()


def test_frozen_weights_get_no_gradient_and_no_rows_give_no_rows():
    weight = torch.randn(4, 6)
    inputs = torch.randn(3, 6, requires_grad=True)
    linear(inputs, weight).sum().backward()
    assert torch.allclose(inputs.grad, weight.sum(0).expand(3, 6), atol=1e-5)
    assert linear(torch.randn(0, 6), weight).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_autocast_are_left_to_pytorch(dtype):
    inputs, weight = torch.randn(3, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    assert torch.equal(linear(inputs, weight), nn.functional.linear(inputs, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(3, 6), torch.randn(4, 6)).dtype == torch.bfloat16


def test_a_model_trains_alike_and_comes_back_as_it_was_even_after_an_error():
    plain, fast = tiny_model(seed=1).train(), tiny_model(seed=1).train()
    fast.gradient_checkpointing_enable()
    before = {name: set(module.__dict__) for name, module in fast.named_modules()}
    ids = torch.arange(24).reshape(2, 12)
    plain(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ZeroDivisionError), fast_linear_layers(fast):
        assert "forward" in fast.lm_head.__dict__
        fast(input_ids=ids, labels=ids).loss.backward()
        raise ZeroDivisionError
    assert {name: set(module.__dict__) for name, module in fast.named_modules()} == before
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-4 * one.grad.abs().max(), name
