"""vLLM's side of the exact signal: what its workers keep for `skd serve`, and the head that makes logits of it.

A request whose `extra_args` name positions has the last hidden states at these kept as the model computes them, after its last norm and
before its head, until the server takes them. vLLM calls this a worker extension: its methods become the worker's. They look at what
`GPUModelRunner` hands to its prompt log-probabilities; the CPU's runner is a subclass. vLLM's own method
`extract_hidden_states` was not taken: it stores the states before the last norm beside every cached token, and few models have it.

Shapes: L positions asked for, H hidden, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save

from .wire import Head, pack_head


EXTENSION = f"{__name__}.HiddenStatesExtension"
ASKED = "skd_hidden_states"  # in extra_args: [key, first position, the position after the last]


@dataclass
class Kept:
    """Of one request the positions `first` to `stop`: their `states` (L, H) and which of them are there."""

    first: int
    stop: int
    states: torch.Tensor
    is_there: torch.Tensor

    def add(self, start: int, states: torch.Tensor) -> None:
        """The states of the positions from `start` on, of which some may be asked for."""
        low, high = max(start, self.first), min(start + len(states), self.stop)
        if low < high:
            self.states[low - self.first : high - self.first] = states[low - start : high - start].cpu()
            self.is_there[low - self.first : high - self.first] = True


@dataclass
class HiddenStatesKeeper:
    """Is called before a model runner's prompt log-probabilities, which see the hidden states of all that was computed in a step."""

    runner: Any
    kept: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self):
        self.prompt_logprobs = self.runner._get_prompt_logprobs_dict
        self.runner._get_prompt_logprobs_dict = self.see

    def see(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]):
        for request_id, num_tokens in num_scheduled_tokens.items():
            request = self.runner.requests.get(request_id)
            extra = getattr(request, "sampling_params", None) and request.sampling_params.extra_args
            if extra and ASKED in extra:
                key, first, stop = extra[ASKED]
                offset = int(self.runner.query_start_loc.np[self.runner.input_batch.req_id_to_index[request_id]])
                if key not in self.kept:
                    states = torch.zeros((stop - first, hidden_states.shape[-1]), dtype=hidden_states.dtype)
                    self.kept[key] = Kept(first, stop, states, torch.zeros(stop - first, dtype=torch.bool))
                self.kept[key].add(request.num_computed_tokens, hidden_states[offset : offset + num_tokens])
        return self.prompt_logprobs(hidden_states, num_scheduled_tokens)


class HiddenStatesExtension:
    """Methods of a vLLM worker. `model_runner` is the worker's."""

    model_runner: Any

    def skd_prepare_hidden_states(self) -> str:
        """Keeps hidden states from now on. Returns why this model or this vLLM cannot give them, or nothing."""
        runner = self.model_runner
        missing = [
            name
            for name in ("_get_prompt_logprobs_dict", "requests", "query_start_loc", "input_batch")
            if not hasattr(runner, name)
        ]
        if missing:
            return (
                f"the model runner of this vLLM has no {', '.join(missing)}; start it with VLLM_USE_V2_MODEL_RUNNER=0"
            )
        try:
            head_of(runner.get_model())
        except ValueError as error:
            return str(error)
        if not hasattr(self, "skd_keeper"):
            self.skd_keeper = HiddenStatesKeeper(runner)
        return ""

    def skd_take_hidden_states(self, keys: list[str]) -> bytes:
        """The states of these requests (L, H), by key, as safetensors; nothing on workers but the first of the last stage, and nothing
        of a request that lacks one."""
        kept = {key: self.skd_keeper.kept.pop(key) for key in keys if key in self.skd_keeper.kept}
        if not _speaks():
            return b""
        return save({key: of_one.states for key, of_one in kept.items() if of_one.is_there.all()})

    def skd_head(self) -> bytes:
        """The head, packed, whole; nothing on workers but the first of the last stage."""
        head = head_of(self.model_runner.get_model())  # together: the shards are gathered
        return pack_head(head) if _speaks() else b""


def _speaks() -> bool:
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    return get_pp_group().is_last_rank and get_tensor_model_parallel_rank() == 0


@torch.inference_mode()
def head_of(model: Any) -> Head:
    """
    What a vLLM model makes logits with, on the CPU.

    Raises:
        `ValueError`: for a head that is more than that, found by comparing with the model's own logits.
    """
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

    inner = model.get_language_model() if hasattr(model, "get_language_model") else model
    module, processor = getattr(inner, "lm_head", None), getattr(inner, "logits_processor", None)
    weight = getattr(module, "weight", None)
    if weight is None or processor is None or weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"the head of {type(inner).__name__} is not one matrix of numbers (it may be quantised)")
    bias, is_split = getattr(module, "bias", None), get_tensor_model_parallel_world_size() > 1
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    whole = {
        name: (tensor_model_parallel_all_gather(tensor.contiguous(), dim=0) if is_split else tensor)
        for name, tensor in tensors.items()
    }
    whole = {name: tensor[: processor.org_vocab_size].detach().cpu().contiguous() for name, tensor in whole.items()}
    scale, softcap = float(processor.scale), float(processor.soft_cap or 0.0)
    if softcap and scale != 1.0:
        raise ValueError(f"{type(inner).__name__} caps its logits and scales them afterwards")

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    expected = model.compute_logits(hidden)
    if expected is not None:  # on one worker of those that share a head
        expected = expected.float().cpu()
        logits = torch.nn.functional.linear(hidden.cpu(), whole["weight"], whole.get("bias")).float()
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits * scale
        rounding = 16 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        if logits.shape != expected.shape or (logits - expected).abs().max() > rounding * expected.abs().max():
            raise ValueError(f"{type(inner).__name__} makes its logits in a way that is not known here")
    return Head(whole["weight"], whole.get("bias"), scale, softcap)
