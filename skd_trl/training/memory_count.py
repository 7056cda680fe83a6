"""Bytes of both models' forwards, counted on fake tensors: these have shapes, types and a device, and no memory.

Shapes: R places, B rows of a micro-batch, S their columns, P longest prompt, T longest response, G draft, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary, finalize

import torch
from accelerate.utils import extract_model_from_parallel as unwrapped
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..loss.chunks import DeviceMemory, default_chunk_size, even_chunk_size
from ..loss.distillation_loss import distillation_loss
from ..loss.lm_head import LMHead, backbone
from ..loss.response_facts import ResponseFacts
from ..loss.teacher_signal import HiddenStates
from ..sampling.prefill import MOST_TOKENS
from ..sampling.ragged_cache import RaggedDecoder, eval_mode
from .machine import Machine
from .models import base_model
from .router_logits import without_router_logits


# The longest draft that "auto" is likely to choose; logits of each of its tokens are held during a round.
LIKELY_DRAFT = 5


@dataclass(frozen=True)
class Window:
    """The shapes of an optimizer step on one device: R places for `num_prompts` prompts of up to P tokens, responses of up to T, and
    micro-batches of B rows, of which a step has `num_micro_batches`."""

    num_places: int
    num_prompts: int
    longest_prompt: int
    max_new_tokens: int
    num_rows: int
    num_micro_batches: int = 1
    num_draft_tokens: int = LIKELY_DRAFT


def likely_draft(args) -> int:
    """The draft length that a training's memory is counted with."""
    return args.num_draft_tokens if isinstance(args.num_draft_tokens, int) else LIKELY_DRAFT


class Allocations(TorchDispatchMode):
    """Follows the storages that are made inside: bytes that live now, and the most that did."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                finalize(storage, self._forget, key, size)
        return result

    def known_before(self, tensors) -> None:
        for tensor in tensors:
            self.known.add(tensor.untyped_storage()._cdata)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@contextmanager
def fake(
    model: nn.Module, device: torch.device, is_trained: bool = False, most_bytes: int = 8
) -> Iterator[tuple[FakeTensorMode, Allocations]]:
    """Inside, `model` has fake weights on `device`, in bf16 where `most_bytes` is 2, and what is allocated is followed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            shape = tensor.size() if isinstance(tensor, DTensor) else getattr(tensor, "ds_shape", tensor.shape)
            dtype = (
                torch.bfloat16 if tensor.is_floating_point() and tensor.element_size() > most_bytes else tensor.dtype
            )
            fake = torch.empty(shape, dtype=dtype, device=device)
            if tensor.requires_grad and is_trained:
                fake = nn.Parameter(fake)
            tensors[name] = fake
        allocations = Allocations()
        allocations.known_before(tensors.values())
        with _reparametrize_module(model, tensors, tie_weights=True), allocations:
            yield mode, allocations


def _counted_once(count: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[int, ...]]:
    """Keeps what `count` says of a model, machine and numbers: a plan for other places or another GPU asks the same again."""
    known: WeakKeyDictionary[nn.Module, tuple[dict[tuple, tuple[int, ...]], dict[tuple, str]]] = WeakKeyDictionary()

    def counted(model: nn.Module, machine: Machine, *numbers) -> tuple[int, ...]:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        key = (machine.device, machine.mixed_precision, trained, *numbers)
        found, failed = known.setdefault(model, ({}, {}))
        if key in failed:
            raise RuntimeError(failed[key])
        if key not in found:
            try:
                found[key] = count(model, machine, *numbers)
            except Exception as error:  # it would fail again, and at each window
                failed[key] = f"{type(error).__name__}: {error}"
                raise
        return found[key]

    return counted


def sampling_bytes(
    student: nn.Module, teacher: nn.Module, machine: Machine, window: Window, casts: bool, is_captured: bool
) -> tuple[dict[str, int], int]:
    """Bytes of a window's sampling by part, and those of one more place. With `casts` the student samples with weights of two
    bytes a number; with `is_captured` graphs have memory of a round for themselves, which the first rounds and the prompts cannot use."""
    places, draft, longest = window.num_places, window.num_draft_tokens, window.longest_prompt
    slots = longest + window.max_new_tokens + draft - 1
    few = min(places, 2)  # quick, and nothing but caches, masks, logits and activations grows with them
    rows = min(places, max(1, MOST_TOKENS // longest))
    caches, logits, of_blocks, of_prompts = 0, 0, 0, 0
    for model, block, kept, most in ((student, 1, draft, 2 if casts else 8), (teacher, draft, draft, 8)):
        cache, of_block, of_logits = _decoder(model, machine, few, slots, block, most)
        caches += cache * places // few
        logits += of_logits * kept * places // (block * few)
        of_blocks = max(of_blocks, of_block * places // few)
        of_prompts = max(of_prompts, _decoder(model, machine, rows, longest, longest, most, True)[1])
    # Prompts are read before a round, whose logits are given back at its end.
    in_round = {"logits of a draft": logits, "a forward": of_blocks}
    worse = {"prompts": of_prompts} if of_prompts > logits + of_blocks else in_round
    grows = of_prompts if places * longest <= MOST_TOKENS else 0  # else prompts take turns
    graphs = {"graphs": logits + of_blocks} if is_captured else {}
    per_place = (caches + max(logits + of_blocks, grows) + sum(graphs.values())) // places
    return {"caches": caches, **worse, **graphs}, per_place


@_counted_once
def _decoder(
    model: nn.Module, machine: Machine, rows: int, slots: int, block: int, most_bytes: int = 8, fills: bool = False
) -> tuple[int, int, int]:
    """Bytes of the caches of so many rows and slots, of what a forward of `block` tokens of each needs beside them, and of its
    logits; of a model whose numbers take at `most_bytes` so many."""
    inner = unwrapped(model)
    with (
        torch.no_grad(),
        eval_mode(inner),
        without_router_logits(*([inner] if hasattr(inner, "config") else [])),
        fake(inner, machine.device, most_bytes=most_bytes) as (_, allocations),
        machine.autocast(),
    ):
        tokens = torch.zeros((rows, block), dtype=torch.long, device=machine.device)
        positions = torch.arange(block, device=machine.device).expand(rows, block)
        decoder = RaggedDecoder(inner, rows, slots)
        before = allocations.live
        _, logits = decoder(tokens, positions, num_slots_in_use=slots, without_logits=fills)
        cache, size = decoder.num_bytes, logits.numel() * logits.element_size()
        return cache, allocations.peak - before - cache - size, size


def training_bytes(
    student: nn.Module, teacher: nn.Module, machine: Machine, args, window: Window, gradients: int, held: int
) -> dict[str, int]:
    """Bytes of a micro-batch at its worse moment, beside what is `held` throughout. In the loss: what the forward left for the
    backward, and a chunk. In the backward: that and what it makes, the gradients, and those that the loss hands out."""
    inner = unwrapped(student)
    accumulates = window.num_micro_batches > 1
    is_reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    columns = window.longest_prompt + window.max_new_tokens
    saved, backward = _backbone(
        inner, machine, window.num_rows, columns, accumulates, args.gradient_checkpointing, is_reentrant
    )
    chunk, handed = _loss(inner, teacher, machine, args, window, held + saved)
    kept = gradients if accumulates else 0  # of the micro-batches before
    moments = (
        {"activations": saved, "loss": chunk + handed, "gradients": kept},
        {"activations": backward, "loss": handed, "gradients": kept},
    )
    return max(moments, key=lambda parts: sum(parts.values()))


@_counted_once
def _backbone(
    student: nn.Module,
    machine: Machine,
    num_rows: int,
    columns: int,
    accumulates: bool,
    checkpoints: bool,
    is_reentrant: bool,
) -> tuple[int, int]:
    """Bytes after the backbone's forward, and the most in its backward, new gradients among them. Weights are not, nor what is in the
    gradients already where it `accumulates`."""
    base = base_model(student)
    body = backbone(base)
    modes = {module: module.training for module in base.modules()}
    switches = checkpoints and not any(getattr(m, "gradient_checkpointing", False) for m in modes)
    if switches:
        base.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    try:
        base.train()
        with fake(body, machine.device, is_trained=True) as (_, allocations), machine.autocast():
            if accumulates:
                for parameter in body.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            before = allocations.live
            ids = torch.zeros((num_rows, columns), dtype=torch.long, device=machine.device)
            hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            saved = allocations.live
            hidden.backward(torch.empty_like(hidden))
            return saved - before, max(allocations.peak, saved) - before
    finally:
        for module, mode in modes.items():
            module.training = mode
        if switches:
            base.gradient_checkpointing_disable()


def _loss(
    student: nn.Module, teacher: nn.Module, machine: Machine, args, window: Window, held: int
) -> tuple[int, int]:
    """Bytes of a chunk beside the gradients that the loss hands out, and of these, where `held` bytes are taken."""
    base = base_model(student)
    device, head = machine.device, LMHead.of(base)
    vocab_size = min(model.config.get_text_config().vocab_size for model in (base, teacher))
    positions = window.num_rows * window.max_new_tokens
    memory = DeviceMemory(machine.memory, max(machine.memory - held, 0)) if machine.is_gpu else None
    longest = args.loss_chunk_size or default_chunk_size(vocab_size, device, memory)
    num, trained = min(even_chunk_size(positions, longest), positions), bool(head.trainable_parameters())
    size = base.config.get_text_config().hidden_size
    handed = positions * size * 4 + sum(p.numel() * 4 for p in head.trainable_parameters())
    with FakeTensorMode(), Allocations() as allocations, machine.autocast():
        signals = []
        for model, trains in ((base, trained), (teacher, False)):
            width, kind = model.config.get_text_config().hidden_size, model.dtype
            weight = nn.Parameter(torch.empty((vocab_size, width), dtype=kind, device=device), requires_grad=trains)
            states = torch.empty((num, width), dtype=kind, device=device, requires_grad=model is base)
            signals.append(HiddenStates(states, LMHead(weight)))
        before = allocations.live
        distillation_loss(
            *signals,
            ResponseFacts.of(torch.zeros(num, dtype=torch.long, device=device)),
            divergence=args.make_divergence(),
            vocab_size=vocab_size,
            chunk_size=num,
            statistics=("student_entropy", "teacher_entropy"),
        )
        own = num * size * base.dtype.itemsize + (vocab_size * size * 4 if trained else 0)
        return max(allocations.peak - before - own, 0), handed


def whole_bytes(model: nn.Module, most: int = 8, without: nn.Module | None = None) -> int:
    """Bytes of all weights and buffers, whole; at `most` so many for a number. Tensors that the model `without` has too are not counted."""
    tensors = (*model.parameters(), *model.buffers())
    others = () if without is None else (*without.parameters(), *without.buffers())
    counted = {id(tensor) for tensor in others}
    return sum(
        math.prod(getattr(t, "ds_shape", t.shape)) * min(t.element_size(), most)
        for t in tensors
        if id(t) not in counted
    )


def largest_layer(model: nn.Module) -> int:
    """Bytes of the largest part that an engine gathers at once: a layer, or the embeddings and the head."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [whole_bytes(module) for module in model.modules() if type(module).__name__ in names]
    rest = whole_bytes(model) - sum(layers)
    return max([*layers, rest])


def hidden_bytes(teacher: nn.Module) -> int:
    """Bytes of the hidden state that is kept of a response token."""
    return teacher.config.get_text_config().hidden_size * teacher.dtype.itemsize
