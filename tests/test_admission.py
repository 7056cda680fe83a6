"""Models are admitted by running them: every admitted kind passes with room, every planted fault is seen."""

import copy

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from skd_trl.sampling import ragged_cache
from skd_trl.sampling.admission import positions_of, prove


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_sampler_runs_exactly_is_admitted_with_room_to_spare(architecture):
    """Three digits between rounding and what would be refused."""
    proof = prove(tiny_model(architecture, seed=1))
    assert proof.error < 1e-5 and proof.limit > 30 * proof.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_half_precision_is_admitted_by_its_own_rounding(architecture, dtype):
    proof = prove(tiny_model(architecture, seed=1).to(dtype))
    assert 0 < proof.error < proof.limit <= 0.1


def ignored_window(monkeypatch):
    spans = ragged_cache._attention_spans
    monkeypatch.setattr(ragged_cache, "_attention_spans", lambda config: dict.fromkeys(spans(config)))


def shifted_positions(monkeypatch):
    """Single tokens after the first block are read one position too far."""
    masks = ragged_cache.RaggedDecoder.masks

    def shifted(self, positions, *args):
        outcome = masks(self, positions, *args)
        if positions.shape[1] == 1:
            positions += 1
        return outcome

    monkeypatch.setattr(ragged_cache.RaggedDecoder, "masks", shifted)


def stale_keys(monkeypatch):
    """The last layer keeps what was written to a slot first: drafts that were rejected stay there."""
    update = ragged_cache.RaggedLayer.update

    def stale(self, key_states, value_states, *args, **kwargs):
        if self is not self.window.last_layer:
            return update(self, key_states, value_states, *args, **kwargs)
        index = self.window.index, slice(None), self.window.positions
        before = self.keys[index].clone() if self.is_initialized else None
        keys, values = update(self, key_states, value_states, *args, **kwargs)
        if before is not None:
            is_old = (before != 0).any(-1, keepdim=True)
            self.keys[index] = torch.where(is_old, before, self.keys[index])
        return self.keys[self.window.rows, :, : self.window.num_slots_in_use], values

    original = ragged_cache.RaggedDecoder.__init__

    def init(self, *arguments, **kwargs):
        original(self, *arguments, **kwargs)
        self.window.last_layer = self.layers[-1]

    monkeypatch.setattr(ragged_cache.RaggedDecoder, "__init__", init)
    monkeypatch.setattr(ragged_cache.RaggedLayer, "update", stale)


WINDOWED = ("qwen2", "mistral", "gemma3_text", "starcoder2")


@pytest.mark.parametrize(
    "fault, architecture",
    [(ignored_window, name) for name in WINDOWED]
    + [(fault, name) for fault in (shifted_positions, stale_keys) for name in ("llama", "gpt2", "gpt_neox", "phi3")],
)
def test_a_planted_fault_is_seen(monkeypatch, fault, architecture):
    model = tiny_model(architecture, seed=1)
    error = prove(copy.deepcopy(model)).error
    fault(monkeypatch)
    with pytest.raises(ValueError, match="other hidden states on the sampler's cache") as refusal:
        prove(model)
    figure = float(str(refusal.value).split("differ by ")[1].split()[0])
    assert figure > 100 * error


@pytest.mark.parametrize("fault", [shifted_positions, stale_keys])
def test_a_planted_fault_is_seen_in_bf16(monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(ValueError, match="other hidden states"):
        prove(tiny_model("llama", seed=1).bfloat16())


class RoundedLinear(torch.nn.Linear):
    """A linear layer as bitsandbytes' `Linear4bit`: computed in `compute_dtype`, returned in the type of the input. Products of several
    rows are rounded another way than those of one, as a kernel for another shape does."""

    def forward(self, x):
        product = torch.nn.functional.linear(x.to(self.compute_dtype).float(), self.weight.float())
        way = 1 + torch.finfo(self.compute_dtype).eps / 2 * (x.shape[0] > 1)
        return (product * way).to(self.compute_dtype).to(x.dtype)


def computed_in(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for module in model.get_decoder().layers.modules():
        if type(module) is torch.nn.Linear:
            module.__class__, module.compute_dtype = RoundedLinear, dtype
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_that_compute_in_a_coarser_type_than_they_return_are_admitted_by_its_rounding(monkeypatch, dtype):
    """fp32 hidden states out of products in half precision: fp32 explains 3e-4 and not what these do."""
    proof = prove(computed_in(tiny_model(seed=1), dtype))
    assert prove(tiny_model(seed=1)).limit < proof.error < proof.limit == torch.finfo(dtype).eps ** 0.5
    for fault in (shifted_positions, stale_keys):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="other hidden states"):
            fault(patch)
            prove(computed_in(tiny_model(seed=1), dtype))


def test_a_window_longer_than_the_proof_is_shortened_for_it_and_put_back(monkeypatch):
    model = tiny_model("mistral", seed=1, sliding_window=4096)
    prove(model)
    assert model.config.sliding_window == 4096
    ignored_window(monkeypatch)
    with pytest.raises(ValueError, match="other hidden states"):
        prove(tiny_model("mistral", seed=2, sliding_window=4096))


def test_a_model_is_proved_once_and_comes_back_as_it_was():
    model, calls = tiny_model(seed=1).train(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    state = torch.random.get_rng_state()
    prove(model)
    num_forwards = len(calls)
    prove(model)
    assert len(calls) == num_forwards > 3
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_what_does_not_run_on_the_cache_is_refused_with_what_was_raised():
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=259, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel.*does not run.*rollout='dataset'"):
        prove(gpt)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        prove(t5)


def test_attention_only_configurations_of_stateful_classes_are_admitted():
    """Whether layers have a state is for the proof to find, not for the name of the class."""
    config = AutoConfig.for_model(
        "granitemoehybrid", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["attention", "attention"], shared_intermediate_size=32, num_local_experts=2,
        num_experts_per_tok=1, initializer_range=0.4, mamba_n_heads=4, mamba_d_head=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert prove(model).error < 1e-4


def test_weights_that_are_not_numbers_are_refused():
    model = tiny_model(seed=1)
    model.get_decoder().layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        prove(model)


def test_positions_end_where_a_few_tokens_cannot_show_the_trouble():
    assert positions_of(AutoConfig.for_model("llama", max_position_embeddings=100)) == 100
    assert positions_of(GPTNeoConfig(window_size=60, max_position_embeddings=100)) == 60
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    phi = AutoConfig.for_model(
        "phi3", max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope, **sizes
    )
    assert positions_of(phi) == 32
    llama4 = AutoConfig.for_model(
        "llama4_text", floor_scale=64, attn_temperature_tuning=True, max_position_embeddings=512
    )
    assert positions_of(llama4) == 64
