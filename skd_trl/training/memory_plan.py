"""What a training holds on each device at its worst moments, counted before anything is allocated, and what would make it fit.

Two moments decide: the sampling of a window (caches, logits of a draft, hidden states of all responses) and a micro-batch (gradients,
activations, a chunk of the loss). Activations, caches and logits are counted by running both models' own forwards on fake tensors,
which have shapes, types and a device, and no memory; the rest is arithmetic. Not counted: what a device and its libraries take for
themselves, and what an allocator cannot use of what it has (see `RESERVE`).

Shapes: R places, B rows of a micro-batch, S their columns, P longest prompt, T longest response, G draft, V vocabulary.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import finalize

import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..loss.chunks import chunks
from ..loss.distillation_loss import distillation_loss
from ..loss.lm_head import LMHead, backbone
from ..loss.response_facts import ResponseFacts
from ..loss.teacher_signal import HiddenStates
from ..sampling.prefill import MOST_TOKENS
from ..sampling.ragged_cache import RaggedDecoder, eval_mode
from .router_logits import without_router_logits
from .sampling_copy import CopySettings, copied_bytes


logger = get_logger(__name__)
GIB = 2**30
# Of the memory that is free, what is left to the allocator and to libraries.
RESERVE = 0.1
# The longest draft that "auto" is likely to choose; logits of each of its tokens are held during a round.
LIKELY_DRAFT = 5


OPTIONS = {
    "sampling": "The memory ran out while responses were sampled. Lower rollout_batch_size (responses written at once; their caches are "
    "most of it), max_new_tokens or max_length; lower gradient_accumulation_steps (the teacher's hidden states of a whole step are "
    "kept); with several GPUs set shard_teacher=True, or under ZeRO-3 and FSDP2 ds3_gather_for_generation=False; or load the teacher "
    "quantised (teacher_model_init_kwargs).",
    "training": "The memory ran out in a training step. Lower per_device_train_batch_size (and raise gradient_accumulation_steps as "
    "much), set gradient_checkpointing=True, lower loss_chunk_size or max_length; train an adapter (peft_config); with several GPUs "
    "spread the student (ZeRO-3, FSDP2) or the teacher (shard_teacher=True).",
}


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


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. `held` is there throughout, `sampling` and `training` in turns; `per_place` is what one more row that is
    written at once costs, `free` what the device has for all of it (0: not known)."""

    held: dict[str, int]
    sampling: dict[str, int]
    training: dict[str, int]
    per_place: int
    num_places: int
    num_prompts: int
    free: int = 0

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(self.sampling.values()), sum(self.training.values()))

    @property
    def fits(self) -> bool:
        return self.peak <= self.free * (1 - RESERVE) or self.free == 0

    def table(self) -> str:
        """A line for each moment, in GiB."""
        lines = [
            f"Memory per device, planned: {_gib(self.peak)} at most" + (f" of {_gib(self.free)}" if self.free else "")
        ]
        for name, parts in (("always", self.held), ("sampling", self.sampling), ("a micro-batch", self.training)):
            shown = ", ".join(f"{part} {_gib(size)}" for part, size in parts.items() if size >= GIB / 1024)
            lines.append(f"  {name:<13} {_gib(sum(parts.values())):>10}  {shown}")
        return "\n".join(lines)


def plan_memory(
    student: nn.Module, teacher: nn.Module, accelerator: Accelerator, args, window: Window, is_spread: bool
) -> MemoryPlan:
    """
    The plan of a training.

    Args:
        student, teacher (`nn.Module`):
            Models of transformers; an adapter may be around the student. Their weights are not looked at and may be on the meta device.
        accelerator ([`~accelerate.Accelerator`]):
            Says which engine, how many processes, which precision and which device.
        args ([`SKDConfig`]):
            For the options that cost memory: optimizer, checkpointing, chunks of the loss, gathering of the student.
        window ([`Window`]): the shapes of a step.
        is_spread (`bool`): whether the teacher is spread over the processes.
    """
    ranks, stage = accelerator.num_processes, zero_stage(accelerator)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    weights = whole_bytes(student)
    # An engine of 16 bits trains copies of its weights in fp32.
    keeps_copies = stage > 0 and accelerator.mixed_precision != "no" and accelerator.distributed_type == "DEEPSPEED"
    states = trained * (_state_bytes(args) + (4 if keeps_copies else 0))
    gradients = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    held = {
        "student": weights // (ranks if stage == 3 else 1),
        "optimizer": states // (ranks if stage > 0 else 1),
        "teacher": whole_bytes(teacher) // (ranks if is_spread else 1),
    }
    copied = CopySettings.of(student, accelerator, args) if stage < 3 else CopySettings()
    if copied.is_needed:
        held["copy to sample with"] = copied_bytes(student, copied)
    sampling, per_place = _sampling(student, teacher, accelerator, window)
    if stage == 3 and args.ds3_gather_for_generation:
        sampling["gathered student"] = weights
    if is_spread:
        sampling["gathered layer of the teacher"] = 2 * _largest_layer(teacher)
    if accelerator.device.type == "cuda" and stage < 3 and not is_spread:
        sampling["graphs"] = 64 * 2**20  # a pool that all share; their buffers are the caches
    hidden = window.num_prompts * window.max_new_tokens * _hidden_bytes(teacher, accelerator)
    sampling["hidden states"] = hidden
    gradients //= ranks if stage > 1 else 1
    training = {"hidden states": hidden, **_training(student, teacher, accelerator, args, window, gradients)}
    if stage == 3:
        training["gathered layer"] = 2 * _largest_layer(student)
    return MemoryPlan(
        held, sampling, training, per_place, window.num_places, window.num_prompts, free_bytes(accelerator.device)
    )


def fitted_plan(
    student: nn.Module, teacher: nn.Module, accelerator: Accelerator, args, longest_prompt: int
) -> MemoryPlan:
    """The plan of a training with these arguments, whose prompts have up to `longest_prompt` tokens. Where all rows of a step do not fit
    at once, it is that of as many as do, at least one."""
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    places = min(args.rollout_batch_size or rows * steps, rows * steps)
    spread = shards_teacher(args.shard_teacher, teacher, accelerator)
    window = Window(places, rows * steps, longest_prompt, args.max_new_tokens, rows, steps)
    plan = plan_memory(student, teacher, accelerator, args, window, spread)
    missing = sum(plan.held.values()) + sum(plan.sampling.values()) - plan.free * (1 - RESERVE)
    if plan.free == 0 or missing <= 0 or places == 1:
        return plan
    places = max(1, places - math.ceil(missing / max(plan.per_place, 1)))
    return plan_memory(student, teacher, accelerator, args, replace(window, num_places=places), spread)


def describe_plan(plan: MemoryPlan, accelerator: Accelerator, args) -> str:
    """The plan as a table, and below it what would make it fit, if it does not."""
    text = plan.table()
    if plan.num_places < min(args.rollout_batch_size or plan.num_prompts, plan.num_prompts):
        text += (
            f"\n  At most {plan.num_places} of {plan.num_prompts} responses fit at once: freed places are refilled."
        )
    if not plan.fits:
        text += "\n  That does not fit. What saves most: " + "; ".join(advice(plan, accelerator, args)[:4]) + "."
    return text


def places_now(student: nn.Module, teacher: nn.Module, accelerator: Accelerator, window: Window) -> int:
    """How many rows of `window` can be written at once with what is free on the device at this moment; fewer than it asks for are
    said in the log."""
    slots, draft = window.longest_prompt + window.max_new_tokens + window.num_draft_tokens, window.num_draft_tokens
    room = free_bytes(accelerator.device, now=True) * (1 - RESERVE)
    room -= window.num_prompts * window.max_new_tokens * _hidden_bytes(teacher, accelerator)
    rough = sum(_rough_bytes(model, slots, draft) for model in (student, teacher))
    if 2 * rough * window.num_places <= room:  # there is no need to count
        return window.num_places
    parts, per_place = _sampling(student, teacher, accelerator, window)
    fixed = max(sum(parts.values()) - per_place * window.num_places, 0)
    places = max(1, min(window.num_places, int(max(room - fixed, 0) // max(per_place, 1))))
    if places < window.num_places:
        logger.warning(
            f"{window.num_places} responses at once would need {_gib(per_place * window.num_places)} of the {_gib(room)} that are free: "
            f"{places} are written at once, and the others take their places (rollout_batch_size={places}). The texts are the same."
        )
    return places


def _rough_bytes(model: nn.Module, slots: int, draft: int) -> int:
    """Bytes of a place, from the configuration; more than most caches take."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * (2 * config.num_hidden_layers * heads * size * slots + 2 * draft * config.vocab_size)


@contextmanager
def out_of_memory_advised(moment: str) -> Iterator[None]:
    """An error of a device without memory left says which options lower what `moment` (`"sampling"` or `"training"`) takes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\n{OPTIONS[moment]}") from error


def advice(plan: MemoryPlan, accelerator: Accelerator, args) -> list[str]:
    """What would make a plan smaller where it is largest, the most effective first."""
    found: list[tuple[int, str]] = []
    in_sampling = sum(plan.sampling.values()) > sum(plan.training.values())
    can_shard = accelerator.distributed_type in ("DEEPSPEED", "FSDP") and accelerator.num_processes > 1
    if in_sampling and plan.num_places > 1:
        half = plan.num_places // 2
        found.append((plan.per_place * half, f"rollout_batch_size={plan.num_places - half}"))
    if not in_sampling and not args.gradient_checkpointing:
        found.append((plan.training["activations"] * 3 // 4, "gradient_checkpointing=True"))
    if not in_sampling and args.per_device_train_batch_size > 1:
        size = args.per_device_train_batch_size
        half = f"per_device_train_batch_size={size // 2} with twice the gradient_accumulation_steps"
        found.append((plan.training["activations"] * (size - size // 2) // size, half))
    if not in_sampling:
        found.append((plan.training["loss"] // 2, "a smaller loss_chunk_size"))
    if "gathered layer of the teacher" not in plan.sampling:
        ranks = accelerator.num_processes
        spread = plan.held["teacher"] - plan.held["teacher"] // max(ranks, 2)
        found.append(
            (
                spread,
                "shard_teacher=True" if can_shard else "a quantised teacher, or several GPUs with shard_teacher=True",
            )
        )
    if "copy to sample with" in plan.held:
        found.append((plan.held["copy to sample with"], "sampling_copy=False and merge_adapter=False"))
    if plan.sampling.get("gathered student") and in_sampling:
        found.append((plan.sampling["gathered student"], "ds3_gather_for_generation=False"))
    found.append(
        (
            plan.sampling["hidden states"] // 2,
            "half the gradient_accumulation_steps (hidden states of a step's responses)",
        )
    )
    found.append((plan.held["optimizer"] * 9 // 10, "an adapter (peft_config), or optim='adamw_bnb_8bit'"))
    return [f"{text} (saves about {_gib(size)})" for size, text in sorted(found, reverse=True) if size >= GIB / 1024]


def shards_teacher(wish: bool | None, teacher: nn.Module, accelerator: Accelerator) -> bool:
    """Whether the teacher is spread over processes: as wished, and with `None` only where an engine can and the whole one would take
    more than half of a device. The same on all ranks, for it asks what a device has and not what is free."""
    if wish is not None:
        return wish
    if accelerator.num_processes == 1 or accelerator.distributed_type not in ("DEEPSPEED", "FSDP"):
        return False
    return whole_bytes(teacher) > free_bytes(accelerator.device) / 2


def free_bytes(device: torch.device, now: bool = False) -> int:
    """What `device` has for a training: all of it, or with `now` what is free; of a CPU's memory each process has its share."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused if now else total
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available if now else memory.total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0


def zero_stage(accelerator: Accelerator) -> int:
    """What is spread over processes: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too."""
    if accelerator.distributed_type == "DEEPSPEED":
        return accelerator.state.deepspeed_plugin.zero_stage
    return 3 if accelerator.distributed_type == "FSDP" else 0


# What is counted on fake tensors


class _Allocations(TorchDispatchMode):
    """Follows the storages that are made inside: bytes that live now, and the most that did."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def known_before(self, tensors) -> None:
        for tensor in tensors:
            self.known.add(tensor.untyped_storage()._cdata)

    def _follow(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@contextmanager
def _fake(model: nn.Module, device: torch.device, is_trained: bool) -> Iterator[tuple[FakeTensorMode, _Allocations]]:
    """Inside, `model` has fake weights on `device`, and what is allocated is followed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            shape = getattr(tensor, "ds_shape", tensor.shape)
            if isinstance(tensor, DTensor):
                shape = tensor.size()
            fake = torch.empty(shape, dtype=tensor.dtype, device=device)
            if tensor.requires_grad and is_trained:
                fake = nn.Parameter(fake)
            tensors[name] = fake
        allocations = _Allocations()
        allocations.known_before(tensors.values())
        with _reparametrize_module(model, tensors, tie_weights=True), allocations:
            yield mode, allocations


def _sampling(
    student: nn.Module, teacher: nn.Module, accelerator: Accelerator, window: Window
) -> tuple[dict[str, int], int]:
    """Bytes of a window's sampling by part, and those of one more place."""
    places, draft = window.num_places, window.num_draft_tokens
    slots = window.longest_prompt + window.max_new_tokens + draft - 1
    few = min(places, 2)  # quick, and nothing but caches, masks, logits and activations grows with them
    caches, logits, of_blocks, of_prompts = 0, 0, 0, 0
    for model, block, kept in ((student, 1, draft), (teacher, draft, draft)):
        cache, of_block, of_logits = _decoder(model, accelerator, few, slots, block)
        caches += cache * places // few
        logits += of_logits * kept * places // (block * few)
        of_blocks = max(of_blocks, of_block * places // few)
        rows = min(places, max(1, MOST_TOKENS // window.longest_prompt))
        filled = _decoder(model, accelerator, rows, window.longest_prompt, window.longest_prompt, fills=True)
        of_prompts = max(of_prompts, filled[1])
    # Prompts are read before a round, whose logits are given back at its end.
    in_round = {"logits of a draft": logits, "a forward": of_blocks}
    worse = {"prompts": of_prompts} if of_prompts > logits + of_blocks else in_round
    grows = of_prompts if places * window.longest_prompt <= MOST_TOKENS else 0  # else prompts take turns
    return {"caches": caches, **worse}, (caches + max(logits + of_blocks, grows)) // places


def _decoder(
    model: nn.Module, accelerator: Accelerator, rows: int, slots: int, block: int, fills: bool = False
) -> tuple[int, int, int]:
    """Bytes of the caches of so many rows and slots, of what a forward of `block` tokens of each needs beside them, and of its
    logits."""
    inner = accelerator.unwrap_model(model)
    with (
        torch.no_grad(),
        eval_mode(inner),
        without_router_logits(*([inner] if hasattr(inner, "config") else [])),
        _fake(inner, accelerator.device, is_trained=False) as (_, allocations),
        accelerator.autocast(),
    ):
        tokens = torch.zeros((rows, block), dtype=torch.long, device=accelerator.device)
        positions = torch.arange(block, device=accelerator.device).expand(rows, block)
        decoder = RaggedDecoder(inner, rows, slots)
        before = allocations.live
        _, logits = decoder(tokens, positions, num_slots_in_use=slots, without_logits=fills)
        cache, size = decoder.num_bytes, logits.numel() * logits.element_size()
        return cache, allocations.peak - before - cache - size, size


def _training(
    student: nn.Module, teacher: nn.Module, accelerator: Accelerator, args, window: Window, gradients: int
) -> dict[str, int]:
    """Bytes of a micro-batch at its worse moment. In the loss: what the forward left for the backward, and a chunk. In the backward:
    that and what it makes, the gradients, and those that the loss hands out."""
    inner = accelerator.unwrap_model(student)
    accumulates = window.num_micro_batches > 1
    saved, backward = _backbone(inner, accelerator, args, window, accumulates)
    chunk, handed = _loss(inner, teacher, accelerator, args, window)
    kept = gradients if accumulates else 0  # of the micro-batches before
    moments = (
        {"activations": saved, "loss": chunk + handed, "gradients": kept},
        {"activations": backward, "loss": handed, "gradients": kept},
    )
    return max(moments, key=lambda parts: sum(parts.values()))


def _backbone(
    student: nn.Module, accelerator: Accelerator, args, window: Window, accumulates: bool
) -> tuple[int, int]:
    """Bytes after the backbone's forward, and the most in its backward, new gradients among them. Weights are not, nor what is in the
    gradients already where it `accumulates`."""
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    body, columns = backbone(base), window.longest_prompt + window.max_new_tokens
    modes = {module: module.training for module in base.modules()}
    switches = args.gradient_checkpointing and not any(getattr(m, "gradient_checkpointing", False) for m in modes)
    if switches:
        base.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    try:
        base.train()
        with _fake(body, accelerator.device, is_trained=True) as (_, allocations), accelerator.autocast():
            if accumulates:
                for parameter in body.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            before = allocations.live
            ids = torch.zeros((window.num_rows, columns), dtype=torch.long, device=accelerator.device)
            hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            saved = allocations.live
            hidden.backward(torch.empty_like(hidden))
            return saved - before, max(allocations.peak, saved) - before
    finally:
        for module, mode in modes.items():
            module.training = mode
        if switches:
            base.gradient_checkpointing_disable()


def _loss(student: nn.Module, teacher: nn.Module, accelerator: Accelerator, args, window: Window) -> tuple[int, int]:
    """Bytes of a chunk beside the gradients that the loss hands out, and of these."""
    base = student.get_base_model() if hasattr(student, "get_base_model") else student
    device, head = accelerator.device, LMHead.of(base)
    vocab_size = min(model.config.get_text_config().vocab_size for model in (base, teacher))
    positions = window.num_rows * window.max_new_tokens
    first = next(iter(chunks(positions, vocab_size, device, args.loss_chunk_size)))
    num, trained = min(first.stop, positions), bool(head.trainable_parameters())
    size = base.config.get_text_config().hidden_size
    handed = positions * size * 4 + sum(p.numel() * 4 for p in head.trainable_parameters())
    with FakeTensorMode(), _Allocations() as allocations, accelerator.autocast():
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


def whole_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers, whole."""
    return sum(
        math.prod(getattr(t, "ds_shape", t.shape)) * t.element_size() for t in (*model.parameters(), *model.buffers())
    )


def _largest_layer(model: nn.Module) -> int:
    """Bytes of the largest part that an engine gathers at once: a layer, or the embeddings and the head."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [whole_bytes(module) for module in model.modules() if type(module).__name__ in names]
    rest = whole_bytes(model) - sum(layers)
    return max([*layers, rest])


def _hidden_bytes(teacher: nn.Module, accelerator: Accelerator) -> int:
    """Bytes of the hidden state that is kept of a response token."""
    return teacher.config.get_text_config().hidden_size * teacher.dtype.itemsize


def _state_bytes(args) -> int:
    """Bytes of an optimizer's states for each trained number."""
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(("sgd", "adafactor", "galore", "lomo")):
        return 0
    return 2 if "8bit" in name else 8


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
