"""Held-out prompts, as the models read them and as people do, and how texts are written for them.

The rows may have every form that the trainers take, prompts alone included: a row without a reference has the reference `None`.
Work is shared out over all processes. Letters: B rows of a batch, P prompt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversations import as_text, turns_of, with_system_column
from ..data.dataset import prepare_dataset
from ..data.row_rules import RowRules
from ..data.tokenization import form_of
from ..data.vocabulary import end_of_sequence_ids, shared_vocab_size
from ..training.models import pad_token_id


@dataclass(frozen=True)
class HeldOut:
    """Prompts as token ids, with their texts and reference answers (`None` where a row has none)."""

    prompt_ids: list[list[int]]
    prompts: list[str]
    references: list[str | None]

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class Decoding:
    """How texts are written: at most so many tokens, so many rows at once, the ids that end a response, the id that pads, the seed
    of samples, where a forward of the models is collective how ranks agree on numbers (see [`Execution`]), and the number of ids that
    all models have (`None`: each model writes all of its ids)."""

    max_new_tokens: int
    batch_size: int
    eos_token_ids: list[int]
    pad_token_id: int
    seed: int = 0
    agree: Callable[..., tuple[int, ...]] | None = None
    vocab_size: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        max_new_tokens: int,
        batch_size: int,
    ) -> "Decoding":
        """A response ends where the tokenizer, the student or the teacher says that it does, and is of ids that both models have.

        Raises:
            `ValueError`: if nothing says where, and the tokenizer has no padding token.
        """
        ends = end_of_sequence_ids(student, teacher, tokenizer)
        if not ends and tokenizer.pad_token_id is None:
            raise ValueError(
                "Neither the tokenizer nor a model names an end-of-sequence token, and the tokenizer has no padding token. "
                "Set tokenizer.pad_token, or generation_config.eos_token_id of a model."
            )
        vocab_size = shared_vocab_size(student, teacher)
        return cls(max_new_tokens, batch_size, ends, pad_token_id(tokenizer, vocab_size), vocab_size=vocab_size)


def held_out(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: list[int],
    chat_template_kwargs: dict | None = None,
    max_prompt_length: int | None = None,
    num_ids: int | None = None,
    *,
    is_limited_by_positions: bool = False,
) -> HeldOut:
    """The prompts of `rows`, which have one of the forms that [`SKDTrainer`] takes. Those of more than `max_prompt_length` tokens are left
    out, and counted in a note. `num_ids` is the number of ids that all models have. `is_limited_by_positions` says that the limit is
    what their positions leave beside the response, not a setting, for the note.

    Raises:
        `ValueError`: for rows that cannot be used; the message names them.
    """
    rules = RowRules(
        max_prompt_length=max_prompt_length,
        max_response_length=None,
        needs_response=False,
        eos_token_ids=tuple(eos_token_ids),
        chat_template_kwargs=chat_template_kwargs or {},
        num_ids=num_ids,
        is_limited_by_positions=is_limited_by_positions,
        reads_response=False,  # nothing is trained on references; only their texts are compared
    )
    tokenized = prepare_dataset(rows, tokenizer, rules, name="held-out")
    prompt_ids = tokenized["prompt_ids"][:]
    texts = [prompt_text(row) for row in rows] if len(tokenized) == len(rows) else [None] * len(tokenized)
    decoded = tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
    references = tokenizer.batch_decode(tokenized["response_ids"][:], skip_special_tokens=True)
    return HeldOut(
        prompt_ids=prompt_ids,
        prompts=[own if own is not None else other.strip() for own, other in zip(texts, decoded, strict=True)],
        references=[
            text.strip() if ids else None for text, ids in zip(references, tokenized["response_ids"], strict=True)
        ],
    )


def prompt_text(row: dict) -> str | None:
    """The text of a row's prompt for people: that of its only turn, or all turns with their roles, as `conversations.py` reads them;
    `None` for rows that hold token ids, or turns without text (calls of tools).

    Raises:
        [`UnusableRow`]: for a conversation that the models cannot read either.
    """
    column = form_of(row)
    if column not in ("messages", "conversations", "prompt") or not row[column]:
        return None
    if isinstance(row[column], str):
        return row[column]
    turns = with_system_column(row, turns_of(row[column], column))
    if column != "prompt" and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if any(turn.get("content") is None for turn in turns):
        return None
    texts = [as_text(turn["content"]) for turn in turns]
    if len(turns) == 1:
        return texts[0]
    return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, texts, strict=True))


def batches(lengths: list[int], batch_size: int, description: str) -> Iterator[list[int]]:
    """
    Row numbers of this process's batches, longest rows first, with a progress bar on the main process.

    Every process gets the same number of rows (some twice), so models whose forward is collective stay in step.
    """
    state = PartialState()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    order += order[: -len(order) % state.num_processes]
    mine = order[state.process_index :: state.num_processes]
    starts = range(0, len(mine), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=not (description and state.is_main_process)):
        yield mine[start : start + batch_size]


def gather_rows(mine: dict[int, object]) -> list:
    """The results of all processes' rows, in the order of the rows."""
    results = dict(gather_object(list(mine.items())))
    return [results[row] for row in sorted(results)]


def left_pad(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `(B, P)`."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
