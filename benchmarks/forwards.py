"""The forwards of one training step, written down while it runs and then run again with nothing between them: what no bookkeeping can save.

A product of few rows reads its whole weight from memory, which a product that is timed by itself, again and again, does not. So decoders
run whole here, each as often as in the step and in its order, at the same rows, tokens and slots, on the sampler's cache and with its
packed weights (packing is not counted); the head by its number of rows. The student's forward with gradients is run with its backward.

Shapes: N rows, Q new tokens of each, L slots.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from skd_trl.sampling.packed_weights import PAYS_AFTER, PackedWeights
from skd_trl.sampling.ragged_cache import RaggedDecoder, eval_mode


@dataclass(frozen=True)
class Call:
    """A forward of the decoder of `model`, or (without tokens) of its head on so many rows, in a `phase` of a step."""

    phase: str
    model: str
    num_rows: int
    num_tokens: int
    num_slots: int
    has_gradient: bool


class Forwards:
    """Inside, writes down the forwards of two models.

    Args:
        models (`dict`): by name, causal language models of transformers.
        phase (`Callable`): says in which phase of the step a model of that name runs.
    """

    def __init__(self, models: dict[str, nn.Module], phase: Callable[[str], str]):
        self.models, self.phase = models, phase
        self.calls: list[Call] = []  # in their order
        self.handles = []
        self.packed = PackedWeights()

    def __enter__(self) -> "Forwards":
        for name, model in self.models.items():
            decoder, head = model.get_decoder(), model.get_output_embeddings()
            self.handles += [
                decoder.register_forward_pre_hook(partial(self._decoder_runs, name), with_kwargs=True),
                head.register_forward_pre_hook(partial(self._head_runs, name)),
            ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _decoder_runs(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        mask, (num_rows, num_tokens) = kwargs.get("attention_mask"), tokens.shape[:2]
        num_slots = max(num_tokens, mask.shape[-1] if isinstance(mask, torch.Tensor) else 0)
        self.calls.append(Call(self.phase(name), name, num_rows, num_tokens, num_slots, torch.is_grad_enabled()))

    def _head_runs(self, name: str, module: nn.Module, args: tuple) -> None:
        num_rows = args[0].numel() // args[0].shape[-1]
        if num_rows and not torch.is_grad_enabled():
            self.calls.append(Call(self.phase(name), name, num_rows, 0, 0, False))

    def seconds(self, clock: Callable[[], float], backward: str) -> Counter:
        """Seconds of all of them by phase, run once more in their order; backwards are counted to that phase. They stay written down,
        until `forget`."""
        found, calls = Counter(), self.calls
        decoders = {name: self._decoder(name) for name in self.models}
        with ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(self.packed.products(model))
            self.calls = []  # not those of these runs
            for _ in range(max(PAYS_AFTER.values()) + 1):  # then weights are packed that are packed in a training
                for name, num_tokens in (("teacher", 4), ("student", 1)):
                    self._run(decoders[name], Call("", name, 4, num_tokens, 16, False), clock)
                    self._run(decoders[name], Call("", name, 4 * num_tokens, 0, 0, False), clock)
            for call in calls:
                forward, back = self._run(decoders[call.model], call, clock)
                found[call.phase] += forward
                found[backward] += back
        for decoder in decoders.values():
            decoder.head_input.close()
        self.calls = calls
        return found

    def forget(self) -> None:
        self.calls = []

    def _decoder(self, name: str) -> RaggedDecoder:
        """One on which all calls of a model without gradient find room, and the warm-up."""
        calls = [call for call in self.calls if call.model == name]
        num_rows = max((call.num_rows for call in calls if call.num_tokens), default=1)
        num_slots = max((call.num_slots for call in calls), default=1)
        return RaggedDecoder(self.models[name], max(num_rows, 4), max(num_slots, 16))

    def _run(self, decoder: RaggedDecoder, call: Call, clock: Callable[[], float]) -> tuple[float, float]:
        """Seconds of a forward and of its backward."""
        model = self.models[call.model]
        if call.num_tokens == 0:
            weight = model.get_output_embeddings().weight
            hidden = torch.randn(call.num_rows, weight.shape[1])
            start = clock()
            with torch.no_grad():
                functional.linear(hidden, weight)
            return clock() - start, 0.0
        tokens = torch.randint(5, model.config.get_text_config().vocab_size - 5, (call.num_rows, call.num_tokens))
        if call.has_gradient:
            return _with_backward(model, tokens, clock)
        positions = torch.arange(call.num_slots - call.num_tokens, call.num_slots).expand_as(tokens)
        with torch.no_grad(), eval_mode(model):
            start = clock()
            decoder(tokens, positions, num_slots_in_use=call.num_slots, without_logits=True)
            return clock() - start, 0.0


def _with_backward(model: nn.Module, tokens: torch.Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    model.train()
    start = clock()
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]
    between = clock()
    hidden.backward(torch.ones_like(hidden))
    end = clock()
    model.zero_grad()
    return between - start, end - between
