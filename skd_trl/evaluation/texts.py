"""Texts that a model writes alone: greedy, or drawn from its own distribution at temperature 1."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..sampling.ragged_cache import eval_mode
from .held_out import Decoding, batches, gather_rows, left_pad


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    *,
    decoding: Decoding,
    do_sample: bool = False,
    description: str = "",
) -> list[list[int]]:
    """
    One response for each prompt, with its end-of-sequence token where it has one; shared out over all processes.

    Sampling is from the model's own distribution, at temperature 1. Nothing that the model's generation config asks for
    (Qwen2's has a repetition penalty) counts: the text of the bare model is what is compared. Ids from `decoding.vocab_size` on are
    not written, as if the model had none: the other model could not read them.
    """
    responses = {}
    processors = LogitsProcessorList([] if decoding.vocab_size is None else [FirstIds(decoding.vocab_size)])
    lengths = [len(ids) for ids in prompt_ids]
    with eval_mode(model), blank_generation_config(model), torch.random.fork_rng():
        for batch in batches(lengths, decoding.batch_size, description):
            torch.manual_seed(decoding.seed + batch[0])
            input_ids, attention_mask = left_pad(
                [prompt_ids[row] for row in batch], decoding.pad_token_id, model.device
            )
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=decoding.max_new_tokens,
                do_sample=do_sample,
                temperature=1.0,
                top_p=1.0,
                top_k=0 if do_sample else 50,  # 50 is the default: anything else is warned about in greedy search
                eos_token_id=decoding.eos_token_ids,
                pad_token_id=decoding.pad_token_id,
                logits_processor=processors,
                use_cache=True,
                synced_gpus=PartialState().num_processes > 1,  # sharded models: every forward is everybody's
            )
            for row, ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                ends = [position for position, token in enumerate(ids) if token in decoding.eos_token_ids]
                responses[row] = ids[: ends[0] + 1] if ends else ids
    return gather_rows(responses)


class FirstIds(LogitsProcessor):
    """Leaves all probability to the first `num_ids` ids."""

    def __init__(self, num_ids: int):
        self.num_ids = num_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # (B, P), (B, V)
        is_beyond = torch.arange(scores.shape[1], device=scores.device) >= self.num_ids
        return scores.masked_fill(is_beyond, -torch.inf)  # type: ignore[return-value]


@contextmanager
def blank_generation_config(model: nn.Module) -> Iterator[None]:
    """Generation configs without settings for a while, of the model and of each that it wraps; PEFT hands one on to the other. One
    that is passed to `generate` would not do: transformers fills it up with the model's values."""
    own = [
        (module, vars(module)["generation_config"])
        for module in model.modules()
        if "generation_config" in vars(module)
    ]
    try:
        for module, _ in own:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, config in own:
            module.generation_config = config


def decode(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[str]:
    """The texts of responses, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]
