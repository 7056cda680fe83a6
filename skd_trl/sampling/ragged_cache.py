"""The decoder that runs a model on a key/value cache in which every row has its own length; `ragged_layers.py` has its layers.

Slot = logical position: a row writes the keys and values of the token at position `p` into slot `p` of a preallocated
buffer. Going back is therefore free (the row's length is lowered; what lies beyond it is masked, then overwritten), no
keys or values are ever realigned, and sliding windows stay windows of positions. What transformers needs for this is
a small `CacheLayerMixin` and an explicit 4D mask, `slot <= position`, one for each kind of layer.

Shapes: B rows of the cache, N rows of one forward, Q new tokens of each of these rows, L slots, H hidden, V vocabulary.
"""

from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from .alibi import alibi_over_slots
from .few_rows import products_of_few_rows
from .mixers import cache_argument, has_stateful_layers, is_stateful, new_cache
from .packed_attention import packed_query_groups
from .ragged_layers import RaggedLayer, Window, ragged_layers
from .recurrent_state import Reading, RecurrentStates


# Attention that can be expressed as a 4D mask over slots.
FULL, SLIDING, CHUNKED, INDEXED = "full_attention", "sliding_attention", "chunked_attention", "indexed_attention"
# Layers without attention.
WITHOUT_ATTENTION = {"linear_attention", "conv", "recurrent", "moe", "mlp"}
# Shapes of rounds that are compiled for one model; rounds of others run as they are.
MOST_SHAPES = 64


# Which slots are seen, by kind of layer if there are several.
Masks = torch.Tensor | dict[str, torch.Tensor | None] | None


class RaggedDecoder:
    """Runs a decoder-only model of transformers on rows of different lengths, with going back for free.

    Args:
        model ([`~transformers.PreTrainedModel`] or a `PeftModel` around one):
            Any causal language model whose layers use full or sliding-window attention.
        num_rows (`int`):
            B, how many rows the cache holds.
        num_slots (`int`):
            L, the longest sequence of positions a row can have.
        compile (`bool`, *optional*, defaults to `False`):
            Whether forwards with logits go through `torch.compile`. Give them few different shapes.

    Whether a model can be run so is for `admission.prove` to say.
    """

    def __init__(self, model: nn.Module, num_rows: int, num_slots: int, compile: bool = False):
        self.model = model
        self.num_rows, self.num_slots = num_rows, num_slots
        device = next(model.parameters()).device
        self.slots = torch.arange(num_slots, device=device)
        self.window = Window(torch.arange(num_rows, device=device))
        config = model.config.get_text_config()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.base = base = getattr(base, "_orig_mod", base)  # what torch.compile was given
        self.model_state: tuple = ()
        self.dtype = next(model.parameters()).dtype
        self.layers = ragged_layers(config, num_rows, num_slots, self.window)
        self.attention_layers = [layer for layer in self.layers if isinstance(layer, RaggedLayer)]
        self.cache = new_cache(base, self.layers)
        self.spans, self.chunk_size = _attention_spans(config), getattr(config, "attention_chunk_size", None)
        self.attn_implementation = sampling_attention(model)
        self.configs = configs_of(model)
        self.cache_argument = {cache_argument(base): self.cache}
        self.states = RecurrentStates(base, self.cache, num_rows) if is_stateful(base) else None
        self.compile = compile and self.states is None  # which states are read is decided in Python, step by step
        self.head_input = HeadInput(model, stays=self.compile)

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        *,
        rows: list[int] | None = None,
        num_slots_in_use: int | None = None,
        without_logits: bool = False,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        masks: Masks = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Feeds `tokens` (N, Q) at `positions` (N, Q) to the cache's `rows`, by default the first N, attending to earlier slots.

        `num_slots_in_use` is an upper bound, known without asking the device, of the highest position plus one: the
        attention reads no slot beyond it. `without_logits` saves the head's work in a prefill. `reading` is how recurrent states,
        if there are any, are used. `masks` are those of these positions, where they were made before.

        Returns the last hidden states, the input of the language-model head, (N, Q, H), and the logits (N, Q, V);
        with `without_logits` these are (N, 0, H) and (N, 0, V).
        """
        num_slots_in_use = min(num_slots_in_use or self.num_slots, self.num_slots)
        self.window.set(rows or range(len(tokens)), positions, num_slots_in_use)
        if masks is None:
            masks = self.masks(positions, num_slots_in_use, reading.padding)
        with (
            attention_implementation(self.configs, self.attn_implementation),
            packed_query_groups(),
            alibi_over_slots(self.base),
            nullcontext() if self.states is None else self.states.reading(self.window.rows, tokens.shape, reading),
        ):
            return self._run(tokens, positions, masks, without_logits)

    def _run(self, tokens, positions, masks, without_logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's forward, as it is or compiled."""
        # The buffers have to be there before anything is traced, and the hook is traced with the model.
        if self.compile and self.layers[0].is_initialized and not without_logits:
            with self.head_input, torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
                logits = _compiled()(self.model, self.cache_argument, tokens, masks, positions)
                return self.head_input.value, logits
        keep = {"logits_to_keep": tokens.new_empty(0)} if without_logits else {}
        with HeadInput(self.model) as head_input, products_of_few_rows(tokens.device):
            logits = _forward(self.model, {**self.cache_argument, **keep}, tokens, masks, positions)
        return head_input.value, logits

    @property
    def num_bytes(self) -> int:
        """What the cache holds."""
        held = (values for layer in self.attention_layers for values in vars(layer).values())
        of_attention = sum(values.nbytes for values in held if isinstance(values, torch.Tensor))
        return of_attention + (0 if self.states is None else self.states.num_bytes)

    def has_model_changed(self) -> bool:
        """Whether the model is another one than when this was last asked: weights somewhere else, other adapters in use or merged, other
        hooks. New values in place are no change."""
        before, model = self.model_state, self.model
        addresses = [tensor.data_ptr() for part in (model.parameters(), model.buffers()) for tensor in part]
        adapters, hooks = [], []
        for module in model.modules():
            hooks += [*module._forward_pre_hooks, *module._forward_hooks]
            if hasattr(module, "merged_adapters"):  # a tuner's layer
                adapters.append(
                    (module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters))
                )
        self.model_state = addresses, adapters, hooks
        return before != self.model_state

    def masks(self, positions: torch.Tensor, num_slots: int, padding: torch.Tensor | None = None) -> Masks:
        """Which of the first `num_slots` slots `positions` (N, Q) see, (N, 1, Q, L); by kind of layer if there are several. Layers with
        a recurrent state take `padding` (N, Q) instead."""
        slots, positions = self.slots[:num_slots], positions[:, None, :, None]
        seen = slots <= positions
        masks = {
            kind: seen if span is None else seen & (slots > positions - span) for kind, span in self.spans.items()
        }
        if CHUNKED in masks:
            masks[CHUNKED] = seen & (slots // self.chunk_size == positions // self.chunk_size)
        if self.attn_implementation == "eager":
            # It adds its mask to the scores: a boolean one would be added as 0 and 1, silently wrong.
            lowest = torch.finfo(self.model.dtype).min
            masks = {
                kind: torch.zeros_like(visible, dtype=self.model.dtype).masked_fill(~visible, lowest)
                for kind, visible in masks.items()
            }
        if self.states is not None:
            return {**masks, "linear_attention": padding, "conv": padding} if masks else padding
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def move_row(self, source: int, target: int) -> None:
        """Copies row `source` of the cache over row `target`: how a finished row's place is given to a live one."""
        for layer in self.attention_layers:
            layer.move_row(source, target)
        if self.states is not None:
            self.states.move_row(source, target)

    def spread_first_row(self, num_slots: int) -> None:
        """Copies the first `num_slots` slots of the first row to all rows: a beginning that all of them share."""
        for layer in self.attention_layers:
            layer.spread_first_row(num_slots)
        if self.states is not None:
            self.states.share_first_row()


def _forward(model: nn.Module, arguments: dict, tokens, masks, positions) -> torch.Tensor:
    return model(input_ids=tokens, attention_mask=masks, position_ids=positions, use_cache=True, **arguments).logits


@cache
def _compiled():
    return torch.compile(_forward, dynamic=False)


def of_rows(masks: Masks, rows: slice) -> Masks:
    """The masks of some of the rows that they were made for."""
    if isinstance(masks, dict):
        return {kind: None if mask is None else mask[rows] for kind, mask in masks.items()}
    return None if masks is None else masks[rows]


class HeadInput:
    """Catches what goes into the language-model head while it is entered, whatever the model calls its parts.

    With `stays`, the hook is on the head for as long as this object lives: code that was traced with it does not look for another.
    """

    def __init__(self, model: nn.Module, stays: bool = False):
        self.head, self.stays, self.is_on, self.value = model.get_output_embeddings(), stays, False, None
        self.handle = None
        if stays:
            self.handle = self.head.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple) -> None:
        if self.is_on:
            self.value = args[0]

    def __enter__(self) -> "HeadInput":
        self.is_on = True
        if not self.stays:
            self.handle = self.head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_) -> None:
        self.is_on = False
        if self.stays:
            self.value = None
        else:
            self.close()

    def close(self) -> None:
        """Takes the hook off the head."""
        if self.handle is not None:
            self.handle.remove()


def has_shards(model: nn.Module) -> bool:
    """Whether the weights are spread over ranks (ZeRO-3, FSDP2), and come and go in a forward."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())


def sampling_attention(model: nn.Module) -> str:
    """The attention implementation to sample with: the model's own where it takes a 4D mask, else SDPA, else eager."""
    current = model.config.get_text_config()._attn_implementation
    if current in ("sdpa", "eager"):
        return current
    # Flash and flex attention take no 4D mask. SDPA knows no soft-capping of scores.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    softcaps = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(base, "_supports_sdpa", False) and not softcaps else "eager"


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs that modules of `model` read, each once."""
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


@contextmanager
def attention_implementation(model: nn.Module | list[PreTrainedConfig], name: str):
    """Runs `model`, or the one with these configs, with another attention implementation for a while; they are put back as they were."""
    configs = configs_of(model) if isinstance(model, nn.Module) else model
    before = [config._attn_implementation for config in configs]
    if all(implementation == name for implementation in before):
        yield
        return
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@contextmanager
def eval_mode(model: nn.Module):
    """Eval mode for a while, with each module's own mode put back. In training mode dropout would act, and layers with
    gradient checkpointing would silently drop the cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attention_spans(config) -> dict[str, int | None]:
    """How many positions back each kind of layer sees: `None` is all of them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # one kind of layer: its window, if any, holds everywhere
        return {FULL: None} if window is None else {SLIDING: window}
    spans = {kind: window if "sliding" in kind else None for kind in kinds if kind not in WITHOUT_ATTENTION}
    if spans and has_stateful_layers(config):
        # Such models look masks up by other names.
        spans |= {FULL: None} if window is None else {FULL: None, SLIDING: window}
    return spans
