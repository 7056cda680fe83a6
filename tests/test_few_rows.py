"""Products of few rows on a CPU: the numbers are those of torch."""

import pytest
import torch
from torch.nn import functional

from skd_trl.sampling import few_rows
from skd_trl.sampling.few_rows import linear, products_of_few_rows


@pytest.mark.parametrize("inputs, outputs", [(48, 96), (96, 48), (64, 64), (1040, 16)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 2), (1, 8), (3, 3), (0, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_torch_up_to_rounding(shape, inputs, outputs, has_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours = linear(x, weight, bias)
    assert ours.shape == exact.shape and ours.is_contiguous()
    limit = 20 * inputs * torch.finfo(torch.float32).eps  # fp32 sums of `inputs` products of numbers of size 1
    assert not ours.numel() or (ours - exact).abs().max() < limit
    torch.testing.assert_close(linear(x.mT.contiguous().mT, weight, bias), ours, atol=limit, rtol=0)


def test_it_is_put_in_for_few_rows_in_fp32_on_a_cpu_and_taken_out_again(monkeypatch):
    monkeypatch.setattr(few_rows, "other_order_is_faster", lambda: True)
    swapped, mm, original = [], torch.mm, functional.linear
    monkeypatch.setattr(torch, "mm", lambda *args: swapped.append(args[1].shape[1]) or mm(*args))
    layer, narrow = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    with pytest.raises(RuntimeError, match="inside"), products_of_few_rows(torch.device("cpu")):
        with products_of_few_rows(torch.device("cpu")):
            assert functional.linear is few_rows.linear
        for num_rows in (1, 2, 8, 9):
            layer(torch.ones(num_rows, 8))
            narrow(torch.ones(num_rows, 16))
        layer.bfloat16()(torch.ones(4, 8, dtype=torch.bfloat16))
        raise RuntimeError("inside")
    assert swapped == [2, 2, 2, 2, 8] and functional.linear is original
    with torch.autocast("cpu", torch.bfloat16), products_of_few_rows(torch.device("cpu")):
        assert functional.linear is original
    with products_of_few_rows(torch.device("meta")):
        assert functional.linear is original


def test_where_the_other_order_is_slower_products_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(few_rows, "other_order_is_faster", lambda: False)
    original = functional.linear
    with products_of_few_rows(torch.device("cpu")):
        assert functional.linear is original


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("slow", ["linear", "mm"])
def test_a_trial_says_which_order_is_faster(monkeypatch, slow, bf16):
    """A machine on which one of them costs ten products, the other one; in fp32 also where the training has another type."""
    owner, name = (few_rows, "_linear") if slow == "linear" else (torch, "mm")
    product, dtypes = getattr(owner, name), []

    def slower(*args):
        for _ in range(10):
            output = product(*args)
        dtypes.append(output.dtype)
        return output

    monkeypatch.setattr(owner, name, slower)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert few_rows.other_order_is_faster.__wrapped__() == (slow == "linear")
    assert set(dtypes) == {torch.float32}
