import math
import warnings
from dataclasses import replace

import pytest
import reference_losses as reference
import torch
from memory import peak_bytes
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skd_trl.loss import chunks
from skd_trl.loss.chunks import default_chunk_size
from skd_trl.loss.distillation_loss import distillation_loss, gate_weights
from skd_trl.loss.divergences import DIVERGENCES
from skd_trl.loss.gates import GATE_CONTROLS, GATES, Gate, GateWeights
from skd_trl.loss.lm_head import LMHead, backbone
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates, top_log_probs
from skd_trl.loss.token_distributions import STATISTICS


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

GATE_PARAMETERS = {"greedy_top_k": {"k": 3}, "min_prob": {"alpha": 0.1}}
ALL_GATES = [*GATES, *GATE_CONTROLS]
# fp32 against float64: sums of V = 50 products of order 1, then of N = 17 positions.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _heads(seed=0, vocab_size=50, **shaping):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(vocab_size, generator=generator) if shaping.pop("bias", False) else None
    weights = [torch.randn(vocab_size, size, generator=generator) / size**0.5 * 2 for size in (8, 12)]
    student = LMHead(weights[0].requires_grad_(), None if bias is None else bias.requires_grad_(), **shaping)
    return student, LMHead(weights[1], scale=2.0)


def _hidden(num_positions=17, seed=1):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_positions, size, generator=generator) for size in (8, 12))
    labels = torch.randint(47, (num_positions,), generator=generator)  # below every vocab_size used
    return student.requires_grad_(), teacher, labels


def _gate(name, **parameters):
    """The named gate, or the named control of greedy_top_k; all with parameters that accept some and reject some."""
    if name in GATE_CONTROLS:
        return GATE_CONTROLS[name](_gate("greedy_top_k", **parameters))
    return GATES[name](**GATE_PARAMETERS.get(name, {}), **parameters)


def _facts(hidden, options):
    """Facts about the positions of `hidden`, out of the `options` that are about them."""
    labels = options.pop("labels", torch.zeros(len(hidden), dtype=torch.long))
    given = {name: options.pop(name) for name in ("uniforms", "replaced", "is_end", "position") if name in options}
    return ResponseFacts.of(labels, **given)


def _ours(student_hidden, student, teacher_hidden, teacher, divergence="forward_kl", **options):
    facts, options = _facts(student_hidden, options), {"vocab_size": 50, "chunk_size": 5, **options}
    divergence = DIVERGENCES[divergence]() if isinstance(divergence, str) else divergence
    pair = HiddenStates(student_hidden, student), HiddenStates(teacher_hidden, teacher)
    return distillation_loss(*pair, facts, divergence=divergence, **options)


def _gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.trainable_parameters()])


def _reference_logits(hidden, head, vocab_size):
    return reference.logits(hidden, head.weight, head.bias, head.scale, head.softcap)[:, :vocab_size]


@pytest.mark.parametrize("gate_name", [None, *ALL_GATES])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunks_give_the_value_and_gradient_of_full_logits(gate_name, divergence):
    student, teacher = _heads(softcap=5.0, scale=1.5, bias=True)
    hidden, teacher_hidden, labels = _hidden()
    gate = _gate(gate_name) if gate_name else None
    uniforms = torch.rand(17, gate.num_uniforms if gate else 0, generator=torch.Generator().manual_seed(2))
    out = _ours(
        hidden,
        student,
        teacher_hidden,
        teacher,
        divergence,
        gate=gate,
        labels=labels,
        uniforms=uniforms,
        vocab_size=47,
    )
    logits, teacher_logits = (
        _reference_logits(hidden, student, 47), _reference_logits(teacher_hidden, teacher, 47).detach()
    )  # fmt: skip
    weight = torch.ones(17, dtype=torch.float64)
    if gate:
        p, q = teacher_logits.softmax(-1), logits.detach().softmax(-1)
        own = GATE_PARAMETERS.get("greedy_top_k" if gate_name in GATE_CONTROLS else gate_name, {})
        weight = gate.floor + (1 - gate.floor) * reference.acceptances(gate_name, p, q, labels, uniforms, **own)
    expected = (weight * reference.divergence(divergence, logits, teacher_logits)).sum()
    torch.testing.assert_close(out.weight.double(), weight.double(), **CLOSE)
    torch.testing.assert_close(out.loss.double(), expected, **CLOSE)
    for gradient, wanted in zip(
        _gradients(out.loss, hidden, student), _gradients(expected, hidden, student), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


@pytest.mark.parametrize("gate_name", [None, *ALL_GATES])
def test_a_positions_values_do_not_depend_on_the_chunk_it_falls_into(gate_name):
    student, teacher = _heads()
    hidden, teacher_hidden, labels = _hidden()
    gate = _gate(gate_name) if gate_name else None
    uniforms = torch.rand(17, gate.num_uniforms if gate else 0)
    options = {"gate": gate, "labels": labels, "uniforms": uniforms, "statistics": STATISTICS}
    whole = _ours(hidden, student, teacher_hidden, teacher, **options, chunk_size=17)
    for chunk_size in (1, 4, None):
        cut = _ours(hidden, student, teacher_hidden, teacher, **options, chunk_size=chunk_size)
        for name in ("divergence", "weight", "accepted", "loss"):
            torch.testing.assert_close(getattr(cut, name), getattr(whole, name), **CLOSE)
        assert set(cut.statistics) == set(STATISTICS)
        for name, value in cut.statistics.items():
            torch.testing.assert_close(value, whole.statistics[name], **CLOSE)


@pytest.mark.parametrize("gate", [GATES["greedy_top_k"](k=50, floor=0.0), GATES["spec_k"](floor=1.0, exact=True)])
def test_a_gate_of_ones_is_the_ungated_loss_bit_for_bit(gate):
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    ungated, gated = (_ours(hidden, student, teacher_hidden, teacher, gate=choice) for choice in (None, gate))
    assert torch.equal(ungated.loss, gated.loss) and gated.weight.eq(1).all()
    for one, other in zip(
        _gradients(ungated.loss, hidden, student), _gradients(gated.loss, hidden, student), strict=True
    ):
        assert torch.equal(one, other)


def test_a_closed_gate_gives_exactly_no_gradient_at_its_positions():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    out = _ours(hidden, student, teacher_hidden, teacher, gate=GATES["greedy_top_k"](k=3, floor=0.0))
    gradient, weight_gradient = _gradients(out.loss, hidden, student)
    assert 0 < out.accepted.sum() < 17
    assert gradient[~out.accepted].eq(0).all() and gradient[out.accepted].ne(0).any(-1).all()
    only_open = _ours(hidden[out.accepted].detach(), student, teacher_hidden[out.accepted], teacher)
    torch.testing.assert_close(weight_gradient, torch.autograd.grad(only_open.loss, student.weight)[0], **CLOSE)


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_a_gate_over_fp32_states_under_autocast_gives_nearly_the_fp32_gradients(floor):
    """The products are bf16, the states' gradient fp32: also where it is put at chosen positions only."""
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    gate = GATES["greedy_top_k"](k=3, floor=floor)
    exact = _ours(hidden, student, teacher_hidden, teacher, gate=gate)
    with torch.autocast("cpu", torch.bfloat16):
        out = _ours(hidden, student, teacher_hidden, teacher, gate=GateWeights(exact.weight, exact.accepted))
        plain = _ours(hidden, student, teacher_hidden, teacher, gate=gate)  # may judge a close call otherwise
    assert torch.isfinite(plain.loss)
    for found, expected in zip(
        _gradients(out.loss, hidden, student), _gradients(exact.loss, hidden, student), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_positions_without_weight_cost_no_gradient():
    """2 x 50 x 8 operations a position for the hidden states' gradient and as many for the head's; the logits are for all."""
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()

    def operations(gate):
        with FlopCounterMode(display=False) as counter:
            out = _ours(hidden, student, teacher_hidden, teacher, gate=gate, chunk_size=17)
        return counter.get_total_flops(), out

    ungated, _ = operations(None)
    floored, _ = operations(GATES["greedy_top_k"](k=3, floor=0.01))
    gated, out = operations(GATES["greedy_top_k"](k=3, floor=0.0))
    num_rejected = int((~out.accepted).sum())
    assert num_rejected > 0
    assert floored == ungated and ungated - gated == num_rejected * 2 * (2 * 50 * 8)


def test_a_gate_that_closes_everything_gives_zero_and_not_nan():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    out = _ours(hidden, student, teacher_hidden, teacher, gate=GATES["student_entropy_top"](share=0.0))
    assert out.loss.item() == 0 and all(gradient.eq(0).all() for gradient in _gradients(out.loss, hidden, student))


@pytest.mark.parametrize("name", ALL_GATES)
def test_weights_computed_beforehand_are_the_gates_own(name):
    student, teacher = _heads()
    hidden, teacher_hidden, labels = _hidden()
    gate = replace(_gate(name), keep_eos=True)
    is_end = torch.arange(17) % 4 == 0
    options = {"labels": labels, "uniforms": torch.rand(17, gate.num_uniforms), "is_end": is_end}
    pair = HiddenStates(hidden, student), HiddenStates(teacher_hidden, teacher)
    weights = gate_weights(*pair, _facts(hidden, dict(options)), gate=gate, vocab_size=50, chunk_size=3)
    at_once = _ours(hidden, student, teacher_hidden, teacher, gate=gate, **options)
    beforehand = _ours(hidden, student, teacher_hidden, teacher, gate=weights)
    torch.testing.assert_close(beforehand.loss, at_once.loss, **CLOSE)
    assert torch.equal(weights.accepted, at_once.accepted) and not weights.weight.requires_grad
    assert at_once.weight[is_end].eq(1).all()


def test_kept_ends_of_sequence_weigh_one_and_still_count_as_rejected():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    gate = GATES["greedy_top_k"](k=3, floor=0.0)
    plain = _ours(hidden, student, teacher_hidden, teacher, gate=gate)
    unkept = _ours(hidden, student, teacher_hidden, teacher, gate=gate, is_end=~plain.accepted)
    assert torch.equal(unkept.weight, plain.weight)
    gate = replace(gate, keep_eos=True)
    kept = _ours(hidden, student, teacher_hidden, teacher, gate=gate, is_end=~plain.accepted)
    assert kept.weight.eq(1).all() and torch.equal(kept.accepted, plain.accepted)


def test_at_replaced_tokens_the_loss_is_their_negative_log_likelihood_if_asked_for():
    student, teacher = _heads()
    hidden, teacher_hidden, labels = _hidden()
    replaced = torch.arange(17) % 3 == 0
    out = _ours(hidden, student, teacher_hidden, teacher, labels=labels, replaced=replaced, replaced_loss="nll")
    logits, teacher_logits = (
        _reference_logits(hidden, student, 50), _reference_logits(teacher_hidden, teacher, 50).detach()
    )  # fmt: skip
    nll = nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = torch.where(replaced, nll, reference.divergence("forward_kl", logits, teacher_logits)).sum()
    torch.testing.assert_close(out.loss.double(), expected, **CLOSE)
    for gradient, wanted in zip(
        _gradients(out.loss, hidden, student), _gradients(expected, hidden, student), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


def test_statistics_are_what_their_names_say():
    student, teacher = _heads()
    hidden, teacher_hidden, labels = _hidden()
    labels[:5] = student.logits(hidden)[:5].argmax(-1)
    statistics = _ours(hidden, student, teacher_hidden, teacher, labels=labels, statistics=STATISTICS).statistics
    q = _reference_logits(hidden, student, 50).detach().softmax(-1)
    p = _reference_logits(teacher_hidden, teacher, 50).softmax(-1)
    expected = {
        "student_entropy": [reference.entropy(row) for row in q],
        "teacher_entropy": [reference.entropy(row) for row in p],
        "tv": [reference.total_variation(*rows) for rows in zip(p, q, strict=True)],
        "student_nll": [-math.log(row[label]) for row, label in zip(q, labels, strict=True)],
        "teacher_nll": [-math.log(row[label]) for row, label in zip(p, labels, strict=True)],
        "correct": [bool(row.argmax() == label) for row, label in zip(q, labels, strict=True)],
    }
    assert set(statistics) == set(expected)
    for name, values in expected.items():
        value = statistics[name]
        assert not value.requires_grad
        torch.testing.assert_close(value, torch.tensor(values).to(value.dtype), **CLOSE)
    assert _ours(hidden, student, teacher_hidden, teacher).statistics == {}


def test_a_plain_function_of_logits_serves_as_a_divergence():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()

    def total_variation(student_logits, teacher_logits):
        return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2

    out = _ours(hidden, student, teacher_hidden, teacher, total_variation, statistics=["tv"])
    torch.testing.assert_close(out.divergence, out.statistics["tv"], **CLOSE)


def mse(student, teacher):
    return (student - teacher).square().mean(-1)


@pytest.mark.parametrize(
    "shaping", [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 5.0, "scale": 1.5}], ids=str
)
def test_a_plain_functions_values_and_gradients_are_those_of_the_logits(shaping):
    student, teacher = _heads(**shaping)
    hidden, teacher_hidden, _ = _hidden()
    out = _ours(hidden, student, teacher_hidden, teacher, mse)
    expected = mse(_reference_logits(hidden, student, 50), _reference_logits(teacher_hidden, teacher, 50).detach())
    torch.testing.assert_close(out.divergence.double(), expected.detach(), **CLOSE)
    for gradient, wanted in zip(
        _gradients(out.loss, hidden, student), _gradients(expected.sum(), hidden, student), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


def test_a_plain_function_gets_logits_of_all_tokens_or_log_probabilities_of_k_and_the_rest():
    student, teacher = _heads()
    hidden, teacher_hidden, labels = _hidden()
    seen = []

    def spy(*both):
        seen.append([one.detach().double() for one in both])
        return mse(*both)

    facts = ResponseFacts.of(labels)
    top = top_log_probs(teacher_hidden, teacher, labels, 7, 50)
    for signal in (HiddenStates(teacher_hidden, teacher), top):
        settings = {"divergence": spy, "vocab_size": 50, "chunk_size": 17}
        out = distillation_loss(HiddenStates(hidden, student), signal, facts, **settings)
        torch.testing.assert_close(out.divergence.double(), mse(*seen[-1]), **CLOSE)
    logits = [_reference_logits(hidden, student, 50).detach(), _reference_logits(teacher_hidden, teacher, 50)]
    for given, wanted in zip(seen[0], logits, strict=True):
        torch.testing.assert_close(given, wanted, **CLOSE)
    for given, wanted in zip(seen[1], logits, strict=True):
        torch.testing.assert_close(given.exp(), reference.coarsened(wanted.softmax(-1), top.ids), **CLOSE)


def test_a_tied_heads_gradient_joins_that_of_the_embeddings_and_equals_autograd_on_full_logits():
    student = tiny_model("gemma2", tie_word_embeddings=True)
    teacher = tiny_model("cohere", seed=1)
    input_ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        teacher_logits = teacher(input_ids).logits.flatten(0, 1)
        teacher_hidden = backbone(teacher)(input_ids).last_hidden_state.flatten(0, 1)
    hidden = backbone(student)(input_ids).last_hidden_state.flatten(0, 1)
    out = _ours(hidden, LMHead.of(student), teacher_hidden, LMHead.of(teacher), vocab_size=259)
    out.loss.backward()
    ours = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    expected = DIVERGENCES["forward_kl"]()(student(input_ids).logits.flatten(0, 1), teacher_logits).sum()
    expected.backward()
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    for name, parameter in student.named_parameters():
        # Relative to the largest entry: gradients here reach 100s.
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item()
        )


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    ],
    ids=["frozen head", "saved head", "head under LoRA"],
)
def test_every_kind_of_peft_head_gets_the_gradient_of_full_logits(config):
    torch.manual_seed(0)
    student, teacher = get_peft_model(tiny_model("llama"), config), tiny_model("llama", seed=1)
    input_ids = torch.arange(12)[None]
    with torch.no_grad():
        teacher_logits = teacher(input_ids).logits[0]
        teacher_hidden = backbone(teacher)(input_ids).last_hidden_state[0]
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    hidden = backbone(student)(input_ids).last_hidden_state[0]
    out = _ours(hidden, LMHead.of(student), teacher_hidden, LMHead.of(teacher), vocab_size=259)
    ours = torch.autograd.grad(out.loss, trainable)
    expected = DIVERGENCES["forward_kl"]()(student(input_ids).logits[0], teacher_logits).sum()
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, trainable), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()))


def test_a_head_that_is_called_as_a_module_is_cut_to_the_shared_vocabulary_too():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    modules = []
    for head in (student, teacher):
        module = nn.Linear(head.weight.shape[1], 50, bias=False)
        module.weight = nn.Parameter(head.weight.detach().clone())
        modules.append(LMHead(weight=None, scale=head.scale, module=module))
    gate = GATES["student_entropy_top"](share=0.5)  # a pass of its weights comes first
    plain = _ours(hidden, student, teacher_hidden, teacher, gate=gate, vocab_size=47)
    called = _ours(hidden, modules[0], teacher_hidden, modules[1], gate=gate, vocab_size=47)
    torch.testing.assert_close(called.divergence, plain.divergence, **CLOSE)
    assert torch.equal(called.weight, plain.weight)
    for gradient, wanted in zip(
        _gradients(called.loss, hidden, modules[0]), _gradients(plain.loss, hidden, student), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, **CLOSE)


def test_the_heads_are_never_called_as_modules():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    heads = LMHead.of(student), LMHead.of(teacher)

    def refuse(module, args):
        raise AssertionError("a sharded head's hooks would run here")

    for model in (student, teacher):
        model.lm_head.register_forward_pre_hook(refuse)
    hidden = torch.randn(3, 32, requires_grad=True)
    _ours(hidden, heads[0], torch.randn(3, 32), heads[1], vocab_size=259).loss.backward()


def test_without_positions_the_loss_is_zero_and_every_parameter_gets_a_zero_gradient():
    student, teacher = _heads(bias=True)
    hidden, teacher_hidden, labels = _hidden(num_positions=0)
    for name in ALL_GATES:
        gate = _gate(name)
        out = _ours(
            hidden,
            student,
            teacher_hidden,
            teacher,
            gate=gate,
            labels=labels,
            uniforms=torch.rand(0, gate.num_uniforms),
            statistics=["tv"],
        )
        assert out.loss.item() == 0 and out.divergence.shape == out.statistics["tv"].shape == (0,)
        for gradient, tensor in zip(
            _gradients(out.loss, hidden, student), [hidden, *student.trainable_parameters()], strict=True
        ):
            assert gradient.shape == tensor.shape and gradient.eq(0).all()


def test_no_gradient_goes_through_weights_known_beforehand():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    weight = torch.rand(17, requires_grad=True)
    out = _ours(hidden, student, teacher_hidden, teacher, gate=GateWeights(weight, torch.ones(17).bool()))
    out.loss.backward()
    assert weight.grad is None and hidden.grad.ne(0).any()


def test_under_no_grad_the_value_is_the_same_and_nothing_is_differentiated():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    calls = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Spy():
        out = _ours(hidden, student, teacher_hidden, teacher)
    assert not out.loss.requires_grad and torch.autograd.grad not in calls
    assert torch.Tensor.addmm_ not in calls
    assert torch.equal(out.loss, _ours(hidden, student, teacher_hidden, teacher).loss.detach())


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unchanged(frozen):
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    by_hidden, by_weight = _gradients(_ours(hidden, student, teacher_hidden, teacher).loss, hidden, student)
    if frozen == "hidden":
        loss = _ours(hidden.detach(), student, teacher_hidden, teacher).loss
        torch.testing.assert_close(torch.autograd.grad(loss, student.weight)[0], by_weight, rtol=0, atol=0)
    else:
        student.weight.requires_grad_(False)
        loss = _ours(hidden, student, teacher_hidden, teacher).loss
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], by_hidden, rtol=0, atol=0)


def test_dividing_the_loss_divides_the_gradients():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    whole, eighth = (_ours(hidden, student, teacher_hidden, teacher).loss / divisor for divisor in (1, 8))
    for one, part in zip(_gradients(whole, hidden, student), _gradients(eighth, hidden, student), strict=True):
        assert torch.equal(one / 8, part)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_half_precision_is_as_close_to_the_truth_as_plain_autograd_in_it(autocast):
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden(num_positions=64)
    truth = DIVERGENCES["forward_kl"]()(
        _reference_logits(hidden, student, 50), _reference_logits(teacher_hidden, teacher, 50).detach()
    ).sum()
    exact = _gradients(truth, hidden, student)
    if not autocast:
        hidden, teacher_hidden = hidden.detach().bfloat16().requires_grad_(), teacher_hidden.bfloat16()
        student = LMHead(student.weight.detach().bfloat16().requires_grad_())
        teacher = LMHead(teacher.weight.bfloat16(), scale=2.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = _ours(hidden, student, teacher_hidden, teacher, chunk_size=3).loss
        logits = nn.functional.linear(hidden, student.weight).float()
        plain = DIVERGENCES["forward_kl"]()(
            logits, nn.functional.linear(teacher_hidden, teacher.weight).float() * 2
        ).sum()
    assert loss.dtype == torch.float32
    ours, theirs = (_gradients(value, hidden, student) for value in (loss, plain))
    for mine, others, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == others.dtype
        assert (mine - right).norm() <= 2 * (others - right).norm()


def test_head_gradients_are_summed_in_fp32_over_chunks():
    # 512 equal positions, one per chunk: a sum kept in bf16 stops growing at 256 of them.
    student, teacher = LMHead(torch.zeros(2, 1).bfloat16().requires_grad_()), LMHead(torch.ones(2, 1).bfloat16())
    hidden, teacher_bias = torch.ones(512, 1).bfloat16(), torch.tensor([1.0, -1.0]).bfloat16()
    teacher = LMHead(teacher.weight, teacher_bias)
    loss = _ours(hidden, student, hidden, teacher, vocab_size=2, chunk_size=1).loss
    # d KL / d weight = 512 x (q - p) x 1 with q = 1/2 and p = sigmoid(2); bf16 keeps 8 bits of q - p and of the
    # result.
    expected = 512 * (0.5 - torch.sigmoid(torch.tensor(2.0)).item())
    assert torch.autograd.grad(loss, student.weight)[0][0].item() == pytest.approx(expected, rel=2**-7)


def test_peak_memory_is_at_most_a_quarter_of_gkd_trainers():
    rows, prompt, response, vocab_size, size = 4, 256, 256, 49152, 64
    hidden = torch.randn(rows, prompt + response, size, requires_grad=True)
    teacher_hidden = torch.randn(rows, prompt + response, size)
    weight, teacher_weight = torch.randn(vocab_size, size, requires_grad=True), torch.randn(vocab_size, size)
    labels = torch.randint(vocab_size, (rows, prompt + response))
    labels[:, :prompt] = -100

    def gkd_loss():  # as its compute_loss: both models' logits live until it returns, before backward
        logits, teacher_logits = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        return GKDTrainer.generalized_jsd_loss(logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:], beta=0.5)

    def ours():
        positions = labels[:, 1:] != -100
        out = distillation_loss(
            HiddenStates(hidden[:, :-1][positions], LMHead(weight)),
            HiddenStates(teacher_hidden[:, :-1][positions], LMHead(teacher_weight)),
            ResponseFacts.of(labels[:, 1:][positions]),
            divergence=DIVERGENCES["jsd"](),
            gate=GATES["hellinger"](),
            vocab_size=vocab_size,
            statistics=STATISTICS,
        )
        (out.loss / positions.sum()).backward()

    our_peak, their_peak = peak_bytes(ours), peak_bytes(lambda: gkd_loss().backward())
    print(f"peak of the loss: {our_peak / 2**20:.0f} MiB, GKDTrainer's {their_peak / 2**20:.0f} MiB")
    assert our_peak <= their_peak / 4


@pytest.mark.parametrize("trained", [True, False])
def test_many_chunks_hold_no_more_than_one_and_what_belongs_to_their_positions(trained):
    vocab_size, chunk_size = 4000, 8
    student, teacher = _heads(vocab_size=vocab_size)
    student = LMHead(student.weight.detach().requires_grad_(trained))

    def peak(num_chunks):
        student_hidden, teacher_hidden, labels = _hidden(num_positions=num_chunks * chunk_size)
        facts = ResponseFacts.of(labels % vocab_size, position=labels, is_end=labels < 0)
        pair = HiddenStates(student_hidden.requires_grad_(), student), HiddenStates(teacher_hidden, teacher)
        settings = {"divergence": DIVERGENCES["forward_kl"](), "vocab_size": vocab_size, "chunk_size": chunk_size}
        return peak_bytes(lambda: distillation_loss(*pair, facts, **settings).loss.backward())

    logits_of_a_chunk = 4 * chunk_size * vocab_size
    assert peak(12) - peak(2) < logits_of_a_chunk / 2


def test_the_memory_tracker_counts_what_is_alive_at_once_and_forgets_what_was_freed():
    mebibyte = 2**20

    def function():
        first = torch.empty(3 * mebibyte, dtype=torch.uint8)
        del first
        second = torch.empty(2 * mebibyte, dtype=torch.uint8)
        return second + second

    assert peak_bytes(function) == 4 * mebibyte


@pytest.mark.parametrize(
    ("vocab_size", "on_cpu", "elsewhere"),
    [(49152, 85, 341), (151936, 40, 110), (262144, 30, 64), (10**9, 1, 1)],  # 16, 23, 30 MiB on CPU; 64 elsewhere
)
def test_a_default_chunk_is_as_long_as_its_memory_allows_but_never_empty(vocab_size, on_cpu, elsewhere):
    assert default_chunk_size(vocab_size, torch.device("cpu")) == on_cpu
    assert default_chunk_size(vocab_size, torch.device("meta")) == elsewhere


def test_default_chunks_are_of_one_size(monkeypatch):
    monkeypatch.setattr(chunks, "default_chunk_size", lambda vocab_size, device, memory: 8)
    sizes = []
    for num_positions in (17, 16, 1, 0):
        hidden = torch.zeros(num_positions, 4)
        sizes.append([len(hidden[rows]) for rows in chunks.chunks(len(hidden), 50, hidden.device)])
    assert sizes == [[6, 6, 5], [8, 8], [1], [0]]


def test_gradients_are_handed_out_once():
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    loss = _ours(hidden, student, teacher_hidden, teacher).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.long)}, "'student': 17, 'teacher': 17, 'facts': 3"),
        ({"gate": GateWeights(torch.ones(3), torch.ones(3).bool())}, "'facts': 17, 'gate': 3"),
        ({"uniforms": torch.ones(3, 1)}, "'labels': 17.*'uniforms': 3"),
        ({"replaced_loss": "sft"}, "replaced_loss='sft' is unknown; choose one of divergence, nll"),
        ({"vocab_size": 51}, "student's head has 50 rows, fewer than vocab_size=51"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"statistics": ["entropy"]}, r"\['entropy'\] do not exist; there are .*'tv'"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(options, message):
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()
    with pytest.raises(ValueError, match=message):
        _ours(hidden, student, teacher_hidden, teacher, **options)


SHAPES = {r"\(\)": torch.sum, r"\(\d+, 1\)": lambda values: values[:, None]}


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=["no dimension", "two dimensions"])
def test_a_divergence_that_does_not_give_one_number_for_each_position_is_refused(shape, with_gradients):
    student, teacher = _heads()
    hidden, teacher_hidden, _ = _hidden()

    def my_divergence(student_logits, teacher_logits):
        return SHAPES[shape](mse(student_logits, teacher_logits))

    message = f"divergence my_divergence gives {shape} for 5 positions"
    with torch.set_grad_enabled(with_gradients), pytest.raises(ValueError, match=message):
        _ours(hidden, student, teacher_hidden, teacher, my_divergence)


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("select", [None, lambda scores: scores], ids=["alone", "of a population"])
@pytest.mark.parametrize("shape", SHAPES, ids=["no dimension", "two dimensions"])
def test_a_gate_that_does_not_give_one_number_for_each_position_is_refused(shape, select, with_gradients):
    student, teacher = _heads()
    hidden, teacher_hidden, labels = _hidden()

    def score(distributions, facts):
        return SHAPES[shape](distributions.total_variation)

    gate = Gate(score, select=select, name="my_gate")
    pair = HiddenStates(hidden, student), HiddenStates(teacher_hidden, teacher)
    for weigh in (
        lambda: _ours(hidden, student, teacher_hidden, teacher, gate=gate),
        lambda: gate_weights(*pair, ResponseFacts.of(labels), gate=gate, vocab_size=50, chunk_size=5),
    ):
        message = rf"gate my_gate gives {shape} for \d+ positions"
        with torch.set_grad_enabled(with_gradients), pytest.raises(ValueError, match=message):
            weigh()
