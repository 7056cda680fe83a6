"""Packed copies of weights on a CPU: the numbers are those of torch, also after the weight has changed in any way."""

import gc

import pytest
import torch
from test_skd_trainer import make_trainer
from tiny import tiny_model
from torch.nn import functional

from skd_trl import ACCEPTANCE_RULES
from skd_trl.sampling import few_rows, packed_weights
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.packed_weights import NUM_LOOKED_AT, PackedWeights, packed_bytes, some_numbers
from skd_trl.sampling.rounds import Rounds


MANY = 10**9


@pytest.fixture(autouse=True, params=[True, False], ids=["other order faster", "other order slower"])
def other_order_is_faster(request, monkeypatch):
    """Both kinds of processor, whatever this machine is."""
    monkeypatch.setattr(few_rows, "other_order_is_faster", lambda: request.param)
    return request.param


def pays_after():
    return packed_weights.PAYS_AFTER[few_rows.other_order_is_faster()]


def layer_of(inputs=256, outputs=512, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def used(packed, layer, num_rows=9, times=None):
    """The last of some products (by itself, as many as have a weight packed), and what float64 says of it."""
    x = torch.randn(num_rows, layer.in_features, dtype=layer.weight.dtype)
    with torch.no_grad(), packed.products(layer):
        for _ in range(pays_after() + 1 if times is None else times):
            y = layer(x)
    bias = None if layer.bias is None else layer.bias.double()
    return y, functional.linear(x.double(), layer.weight.double(), bias)


def check_close(found, expected, dtype=torch.float32):
    # Sums of a few hundred products, of which the largest sum says how large they are.
    assert (found.double() - expected).abs().max() < 50 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9, 40])
def test_a_packed_product_is_that_of_torch_up_to_rounding(num_rows, bias, dtype, other_order_is_faster):
    packed, layer = PackedWeights(MANY), layer_of(bias=bias, dtype=dtype)
    check_close(*used(packed, layer, num_rows), dtype)
    # Up to four rows of few columns in fp32 are as fast in the other order, or else three as PyTorch multiplies them.
    num_unpacked = 4 if other_order_is_faster else 3
    assert (packed.num_bytes > 0) == (num_rows > num_unpacked or dtype == torch.bfloat16)
    used(packed, layer, num_rows=9)
    check_close(*used(packed, layer, num_rows), dtype)


def test_a_weight_is_packed_once_it_has_been_used_a_few_times():
    packed, layer = PackedWeights(MANY), layer_of()
    used(packed, layer, times=pays_after())
    assert packed.num_bytes == 0
    used(packed, layer, times=1)
    assert packed.num_bytes == layer.weight.nbytes


@pytest.mark.parametrize("change", [
    lambda w: w.add_(1),
    lambda w: w.data.add_(1),
    lambda w: setattr(w, "data", w.data + 1),
    lambda w: w.copy_(torch.randn_like(w)),
    lambda w: w.data.copy_(torch.randn_like(w)),
], ids=["in place", "in place behind PyTorch's back", "other data", "copied over", "copied over behind PyTorch's back"])  # fmt: skip
@pytest.mark.parametrize("times", [1, None])
def test_a_weight_that_has_changed_is_multiplied_as_it_is_now(change, times):
    packed, layer = PackedWeights(MANY), layer_of()
    used(packed, layer)
    assert packed.num_bytes
    with torch.no_grad():
        change(layer.weight)
    check_close(*used(packed, layer, times=times))


@pytest.mark.parametrize("rows, columns", [(1024, 256), (512, 256), (49152, 576), (4096, 4096), (32000, 2048)])
def test_the_numbers_that_are_looked_at_are_of_many_rows_and_columns(rows, columns):
    column_of = torch.arange(columns, dtype=torch.int16).repeat(rows, 1)
    row_of = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, columns)
    for place_of in (row_of, column_of):
        assert len(some_numbers(place_of).unique()) > NUM_LOOKED_AT / 2


def test_a_change_of_some_rows_behind_pytorchs_back_is_seen():
    packed, head = PackedWeights(MANY), layer_of(256, 1024)
    used(packed, head)
    copy = packed.copies[id(head.weight)].packed
    head.weight.data[1:32].mul_(30)
    check_close(*used(packed, head))
    assert packed.copies[id(head.weight)].packed is not copy


def test_a_change_in_place_is_seen_within_one_time_too():
    packed, layer, x = PackedWeights(MANY), layer_of(), torch.randn(9, 256)
    with torch.no_grad(), packed.products(layer):
        for _ in range(pays_after() + 1):
            layer(x)
        layer.weight.mul_(3)
        check_close(layer(x), functional.linear(x.double(), layer.weight.double()))


def test_copies_go_with_their_weights_and_those_of_trained_weights_when_told():
    packed, layer, other = PackedWeights(MANY), layer_of(), layer_of()
    for one in (layer, other):
        used(packed, one)
    del other, one
    gc.collect()
    with packed.products(layer):
        assert len(packed.copies) == 1
    packed.forget_trained(layer)
    assert packed.num_bytes
    packed.forget_trained(layer.requires_grad_(True))
    assert len(packed.copies) == 0


def test_a_weight_that_an_engine_has_freed_is_forgotten_and_packed_again_when_it_is_back():
    packed, layer = PackedWeights(MANY), layer_of()
    used(packed, layer)
    storage, numbers = layer.weight.untyped_storage(), layer.weight.detach().clone()
    storage.resize_(0)
    with packed.products(torch.nn.Linear(1, 1)):
        assert len(packed.copies) == 0
    storage.resize_(numbers.nbytes)
    layer.weight.copy_(numbers)
    check_close(*used(packed, layer))
    assert packed.num_bytes == layer.weight.nbytes


def test_copies_take_no_more_than_they_may():
    first, second = layer_of(), layer_of()
    packed = PackedWeights(first.weight.nbytes + 1)
    for layer in (first, second):
        check_close(*used(packed, layer))
    assert packed.num_bytes == first.weight.nbytes
    model = torch.nn.ModuleList([first, second, layer_of(8, 8)])
    assert packed_bytes(model) == 2 * first.weight.nbytes
    assert packed_bytes(model, without=first) == first.weight.nbytes


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_in_the_type_of_autocast_is_packed_as_outside_of_it(bias):
    packed, layer = PackedWeights(MANY), layer_of(bias=bias, dtype=torch.bfloat16)
    if bias:
        layer.bias.data = layer.bias.data.float()  # autocast casts it
    x = torch.randn(9, layer.in_features)
    with torch.no_grad(), packed.products(layer), torch.autocast("cpu", torch.bfloat16):
        for _ in range(pays_after() + 2):
            y = layer(x)
    expected = functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert y.dtype == torch.bfloat16 and packed.num_bytes == layer.weight.nbytes
    check_close(y, expected, torch.bfloat16)


@pytest.mark.parametrize(
    "what", ["gradients", "autocast", "a sharded weight", "another type", "another device", "another model"]
)
def test_what_packing_is_not_for_is_left_as_it_is(what):
    packed, layer, original = PackedWeights(MANY), layer_of(), functional.linear
    x = torch.randn(9, 256)
    if what == "another device":
        with packed.products(layer.to("meta")):
            assert functional.linear is original
        return
    if what == "another model":
        with torch.no_grad(), packed.products(layer_of()):
            for _ in range(pays_after() + 2):
                layer(x)
        assert packed.num_bytes == 0
        return
    if what == "a sharded weight":
        layer.weight.ds_id = 0
    if what == "another type":
        layer, x = layer.double(), x.double()
    if what == "gradients":
        layer.requires_grad_(True)
    with (
        torch.set_grad_enabled(what == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"),
        packed.products(layer),
    ):
        for _ in range(pays_after() + 2):
            y = layer(x)
        expected = original(x, layer.weight)
    torch.testing.assert_close(y, expected)
    assert packed.num_bytes == 0 and functional.linear is original
    if what == "gradients":
        y.sum().backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("fault", ["wrong numbers", "no such operator", "no oneDNN"])
def test_a_pytorch_whose_packed_products_do_not_work_goes_without(monkeypatch, fault):
    class Operators:
        def __getattr__(self, name):
            if fault == "no such operator":
                raise AttributeError(name)
            if fault == "no oneDNN":
                raise RuntimeError(name)
            return {
                "_reorder_linear_weight": lambda weight, num_rows: weight,
                "_linear_pointwise": lambda x, weight, *rest: functional.linear(x, weight.flip(0)),
            }[name]

    monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    packed, layer = PackedWeights(MANY), layer_of()
    check_close(*used(packed, layer))
    check_close(*used(packed, layer, times=1))
    assert packed.is_proved is False


@pytest.mark.parametrize("num_draft", [1, 3])
def test_texts_are_the_same_with_and_without_copies_and_a_teacher_is_packed_once(monkeypatch, num_draft):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    prompts = torch.randint(5, 30, (6, 7), generator=torch.Generator().manual_seed(0))

    def texts(rounds):
        return interleaved_sample(
            student, teacher, prompts, torch.ones_like(prompts), accept=ACCEPTANCE_RULES["top_k"](k=3),
            max_new_tokens=24, eos_token_ids=[1], noise=torch.Generator().manual_seed(1),
            execution=Execution(num_draft, rounds=rounds),
        ).input_ids  # fmt: skip

    plain = texts(Rounds())
    monkeypatch.setattr(packed_weights, "LEAST_NUMBERS", 1)
    made, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: made.append(args) or reorder(*args), raising=False
    )
    rounds = Rounds()
    assert torch.equal(texts(rounds), plain)
    of_teacher = sum(1 for weight in teacher.parameters() if id(weight) in rounds.packed.copies)
    assert of_teacher and not any(id(weight) in rounds.packed.copies for weight in student.parameters())
    num_made = len(made)
    assert torch.equal(texts(rounds), plain)
    assert num_made < len(made) < 2 * num_made, "the student's alone are made again"


@pytest.mark.parametrize("rollout", ["student", "interleaved"])
def test_the_loss_multiplies_with_a_packed_copy_of_the_teachers_head_and_never_of_the_students(
    tmp_path, monkeypatch, rollout
):
    settings = {
        "rollout": rollout,
        "max_steps": pays_after() + 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    monkeypatch.setattr(packed_weights, "LEAST_NUMBERS", 1)
    trainer = make_trainer(tmp_path / "packed", **settings)
    in_loss, packed = [], trainer._rounds.packed
    loss, linear = trainer._distillation_loss, packed.linear

    def of_loss(*args):
        packed.linear = lambda input, weight, bias=None: in_loss.append(weight) or linear(input, weight, bias)
        try:
            return loss(*args)
        finally:
            packed.linear = linear

    monkeypatch.setattr(trainer, "_distillation_loss", of_loss)
    trainer.train()
    heads = {"student": trainer._inner_student().lm_head.weight, "teacher": trainer.teacher_model.lm_head.weight}
    seen = {name: sum(weight is head for weight in in_loss) for name, head in heads.items()}
    assert seen["teacher"] >= 4 and seen["student"] >= 4
    assert packed.copies[id(heads["teacher"])].packed is not None
    assert id(heads["student"]) not in packed.copies
    for name, trained in trainer.model.named_parameters():
        torch.testing.assert_close(trained, plain.model.get_parameter(name), rtol=2e-3, atol=2e-4)
