"""What `skd serve` adds to vLLM, on stand-ins for vLLM's engine and model runner: `make test-vllm` has the real ones."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load
from tiny import tiny_model

from skd_trl.loss.lm_head import backbone
from skd_trl.serving.server import Scoring
from skd_trl.serving.worker import ASKED, HiddenStatesExtension, head_of


H = 32


class Runner:
    """A model runner that computes texts in chunks, and calls what the extension puts before its log-probabilities."""

    def __init__(self, model):
        self.model, self.requests, self.num_called = model, {}, 0
        self.input_batch = SimpleNamespace(req_id_to_index={})
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, dtype=np.int32))

    def get_model(self):
        return VLLMModel(self.model)

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        self.num_called += 1
        return {}

    @torch.no_grad()
    def step(self, scheduled):
        """Computes the next tokens of requests: `scheduled` has (text, params, first position, number) by id."""
        states, counts = [], {}
        for row, (name, (text, params, start, number)) in enumerate(scheduled.items()):
            self.requests[name] = SimpleNamespace(sampling_params=params, num_computed_tokens=start)
            self.input_batch.req_id_to_index[name] = row
            self.query_start_loc.np[row] = sum(counts.values())
            counts[name] = number
            states.append(states_of(self.model, text)[start : start + number])
        return self._get_prompt_logprobs_dict(torch.cat(states), counts)


class VLLMModel:
    """A model as vLLM lays it out."""

    def __init__(self, model):
        weight = model.get_output_embeddings().weight.detach()
        self.lm_head = SimpleNamespace(weight=torch.cat([weight, torch.zeros(5, H)]))  # vLLM pads vocabularies
        self.logits_processor = SimpleNamespace(org_vocab_size=len(weight), scale=1.0, soft_cap=None)

    def compute_logits(self, hidden):
        return hidden @ self.lm_head.weight[: self.logits_processor.org_vocab_size].T


def states_of(model, text):
    return backbone(model)(input_ids=torch.tensor([text]), use_cache=False)[0][0]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The few names that are imported from it."""
    whole, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    whole.SamplingParams = lambda extra_args=None, skip_reading_prefix_cache=None, **_: SimpleNamespace(
        extra_args=extra_args, skips_cache=skip_reading_prefix_cache
    )
    distributed.get_tensor_model_parallel_world_size = lambda: 1
    distributed.get_tensor_model_parallel_rank = lambda: 0
    distributed.tensor_model_parallel_all_gather = None
    distributed.get_pp_group = lambda: SimpleNamespace(is_last_rank=True)
    monkeypatch.setitem(sys.modules, "vllm", whole)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=2)


def worker_of(model):
    worker = HiddenStatesExtension()
    worker.model_runner = Runner(model)
    assert worker.skd_prepare_hidden_states() == ""
    assert worker.skd_prepare_hidden_states() == ""  # asked for again by another process
    return worker


def asking(*asked):
    return SimpleNamespace(extra_args={ASKED: list(asked)})


def test_states_are_kept_by_position_however_texts_are_cut_and_batched(model):
    worker = worker_of(model)
    one, other, nothing = list(range(20)), list(range(50, 62)), SimpleNamespace(extra_args=None)
    run = worker.model_runner.step
    run({"a": (one, asking("one", 8, 15), 0, 5), "c": (other, nothing, 0, 12)})
    run(
        {
            "c": (one, nothing, 0, 3),
            "a": (one, asking("one", 8, 15), 5, 6),
            "b": (other, asking("other", 11, 12), 0, 12),
        }
    )
    run({"a": (one, asking("one", 8, 15), 11, 9)})
    states = load(worker.skd_take_hidden_states(["one", "other"]))
    torch.testing.assert_close(states["one"], states_of(model, one)[8:15].detach())
    torch.testing.assert_close(states["other"], states_of(model, other)[11:].detach())
    assert worker.model_runner.num_called == 3  # each step also makes its log-probabilities
    assert load(worker.skd_take_hidden_states(["one"])) == {}


def test_a_request_that_was_not_computed_whole_has_no_states(model):
    worker = worker_of(model)
    worker.model_runner.step(
        {"a": (list(range(20)), asking("one", 8, 15), 10, 10)}
    )  # ten positions came from the cache
    assert load(worker.skd_take_hidden_states(["one"])) == {}


def test_a_head_that_is_not_what_it_seems_is_refused_in_words(model):
    plain = VLLMModel(model)
    head = head_of(plain)
    assert (head.weight.shape, head.bias, head.scale, head.softcap) == ((259, H), None, 1.0, 0.0)
    plain.compute_logits = lambda hidden: 1.1 * hidden @ plain.lm_head.weight[:259].T
    with pytest.raises(ValueError, match="makes its logits in a way that is not known here"):
        head_of(plain)
    plain.lm_head.weight = plain.lm_head.weight.to(torch.int8)
    with pytest.raises(ValueError, match="not one matrix of numbers"):
        head_of(plain)
    worker = HiddenStatesExtension()
    worker.model_runner = SimpleNamespace(requests={})
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in worker.skd_prepare_hidden_states()


class Engine:
    """An engine with a prefix cache that holds beginnings of whole fours of tokens."""

    def __init__(self, model, num_copies=1):
        self.worker, self.cached = HiddenStatesExtension(), set()
        self.worker.model_runner = Runner(model)
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=num_copies))

    async def generate(self, prompt, params, request_id):
        text = prompt["prompt_token_ids"]
        blocks = [tuple(text[:end]) for end in range(4, len(text), 4)]
        found = max([len(block) for block in blocks if block in self.cached], default=0)
        start = 0 if params.skips_cache else found
        self.cached.update(blocks)
        self.worker.model_runner.step({request_id: (text, params, start, len(text) - start)})
        yield SimpleNamespace(num_cached_tokens=start)

    async def collective_rpc(self, name, args=()):
        return [getattr(self.worker, name)(*args)]


def test_asked_positions_that_came_from_the_prefix_cache_are_computed_once_more(model):
    scoring = Scoring(Engine(model), 20)
    texts = [list(range(14)), list(range(30, 44))]

    def ask(num_scored):
        states = asyncio.run(scoring.hidden_states(texts, num_scored))
        for row, text in zip(states, texts, strict=True):
            expected = states_of(model, text).detach()
            torch.testing.assert_close(row, expected[-1:] if num_scored == 0 else expected[-1 - num_scored : -1])

    ask(3)
    assert scoring.num_repeated == 0
    ask(1)  # positions 12: behind the twelve that are cached
    ask(0)
    assert scoring.num_repeated == 0
    ask(3)
    assert scoring.num_repeated == 2


def test_an_engine_of_several_copies_says_that_it_gives_no_hidden_states(model):
    scoring = Scoring(Engine(model, num_copies=2), 20)
    with pytest.raises(ValueError, match=r"gives no hidden states: .*serve replicas instead"):
        asyncio.run(scoring.hidden_states([[1, 2, 3]], 1))
    assert "replicas" in asyncio.run(scoring.why_no_hidden_states())
