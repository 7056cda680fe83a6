"""`python -m skd_trl score`: writes a teacher's top k at every token of given responses beside the rows; training then needs no teacher.

Rows are scored in blocks, each a parquet file that appears whole: a run that was killed goes on with the blocks that are missing, with
any number of processes, which share the blocks and nothing else. What is written is described in `data/recorded_scores.py`.

Shapes: N response tokens of a batch, k known tokens.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat import get_config_model_id
from ..data.batches import DataCollatorForDistillation, ResponseTokens
from ..data.dataset import SCORE_COLUMNS
from ..data.recorded_scores import SCORES, TOKENIZER_COLUMN, vocabulary_digest
from ..data.row_reports import LEFT_OUT
from ..data.row_rules import RowRules
from ..data.teacher_prompts import DEFAULT_TEMPLATE
from ..data.tokenization import tokenize_row
from ..data.vocabulary import model_end_of_sequence_ids
from ..loss.lm_head import LMHead
from ..loss.teacher_signal import top_log_probs
from .models import pad_token_id
from .teachers import hidden_states


logger = logging.getLogger(__name__)

MANIFEST = "scores.json"
WRITTEN = {
    "scored_prompt_ids": Sequence(Value("int32")),
    "scored_response_ids": Sequence(Value("int32")),
    **SCORE_COLUMNS,
    TOKENIZER_COLUMN: Value("string"),
}


@dataclass(frozen=True)
class ScoreOptions:
    """
    How rows are scored; a directory keeps to the options that it was begun with.

    Args:
        top_k (`int`): k.
        rows_per_file (`int`): rows of a block.
        batch_size (`int`): rows in one forward.
        max_response_length (`int`, *optional*): responses are cut after so many tokens.
        teacher_prompt_template (`str`): of rows with a `privileged_context`.
        chat_template_kwargs (`dict`, *optional*): given to the chat template.
    """

    top_k: int = 64
    rows_per_file: int = 1024
    batch_size: int = 8
    max_response_length: int | None = None
    teacher_prompt_template: str = DEFAULT_TEMPLATE
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self):
        for name in ("top_k", "rows_per_file", "batch_size", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


def score(
    dataset: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    options: ScoreOptions = ScoreOptions(),  # noqa: B008 (frozen)
    *,
    process: tuple[int, int] = (0, 1),
) -> int:
    """
    Scores the responses of a data set.

    Args:
        dataset (`Dataset`):
            Rows of any form that the trainers take, with a reference response each.
        model ([`~transformers.PreTrainedModel`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's.
        output_dir (`str` or `Path`):
            Gets `scores-*.parquet`, to be read with `load_dataset("parquet", data_files=...)`, and `scores.json`.
        options ([`ScoreOptions`], *optional*):
            What is scored, and how.
        process (`tuple[int, int]`):
            The number of this process, and how many there are.

    Returns:
        `int`: how many rows this process has scored; those of blocks that were there already do not count.

    Raises:
        `ValueError`: for rows that cannot be scored (the first is named), a k that the model does not have, and a directory that
            was begun with another model, data set or options.
    """
    directory = Path(output_dir)
    vocab_size = min(model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1)
    if not 1 <= options.top_k <= vocab_size:
        raise ValueError(f"top_k={options.top_k} is outside 1..{vocab_size}, the tokens there are; choose one within.")
    _begin(directory, dataset, model, tokenizer, options)
    features, rules = Features({**dataset.features, **WRITTEN}), _rules(model, tokenizer, vocab_size, options)
    num_scored, num_left_out = 0, 0
    for block in range(process[0], -(-len(dataset) // options.rows_per_file), process[1]):
        file = directory / f"scores-{block:06d}.parquet"
        if file.exists():
            continue
        start = block * options.rows_per_file
        numbers = range(start, min(start + options.rows_per_file, len(dataset)))
        pairs, scored = [], []
        for number, row in zip(numbers, dataset.select(numbers), strict=True):
            (result,) = tokenize_row(row, tokenizer=tokenizer, rules=rules)
            if not result["problem"]:
                pairs.append((row, result))
            elif result["problem"] not in LEFT_OUT:  # those are rows whose prompts are too long
                raise ValueError(f"Row {number} cannot be scored: {result['detail']} Change or remove it.")
        for first in range(0, len(pairs), options.batch_size):
            scored += _scored(pairs[first : first + options.batch_size], model, tokenizer, vocab_size, options.top_k)
        table = Dataset.from_dict({name: [row[name] for row in scored] for name in features}, features=features)
        part = directory / f"{file.name}.{process[0]}.partial"
        table.to_parquet(part)
        os.replace(part, file)
        num_scored, num_left_out = num_scored + len(scored), num_left_out + len(numbers) - len(scored)
        logger.info(f"{file}: {len(scored)} rows")
    if num_left_out > 0:
        logger.warning(f"{num_left_out} rows are left out: the teacher has no positions for their prompts.")
    return num_scored


def _begin(directory: Path, dataset: Dataset, model, tokenizer, options: ScoreOptions) -> None:
    """Writes what a directory is begun with, or compares it with what it was begun with."""
    ends = json.dumps([dataset[0], dataset[len(dataset) - 1]], default=str, sort_keys=True)
    manifest = {
        "model": get_config_model_id(model.config) or type(model).__name__,
        "dtype": str(model.dtype),
        "tokenizer": vocabulary_digest(tokenizer),
        "num_rows": len(dataset),
        "first_and_last_row": hashlib.sha256(ends.encode()).hexdigest()[:16],
        "options": asdict(options),
    }
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / MANIFEST
    if not file.exists():
        part = file.with_suffix(f".{os.getpid()}.partial")
        part.write_text(json.dumps(manifest, indent=1))
        os.replace(part, file)
    begun = json.loads(file.read_text())
    different = [name for name in manifest if begun.get(name) != manifest[name]]
    if different:
        raise ValueError(
            f"{directory} was begun with another {', '.join(different)}: {[begun.get(n) for n in different]}, now "
            f"{[manifest[n] for n in different]}. Score into another directory, or go on as it was begun."
        )


def scored_files(directory: Path) -> list[Path]:
    """The files of rows in a directory that was scored into, in their order; none if it was not."""
    return sorted(directory.glob("scores-*.parquet")) if (directory / MANIFEST).exists() else []


def num_missing_files(directory: Path) -> int:
    """How many files of a directory that was scored into are not there (yet): `score` was killed, or is not over."""
    manifest = json.loads((directory / MANIFEST).read_text())
    return -(-manifest["num_rows"] // manifest["options"]["rows_per_file"]) - len(scored_files(directory))


def _rules(model, tokenizer, vocab_size: int, options: ScoreOptions) -> RowRules:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ends = model_end_of_sequence_ids(model) | ({tokenizer.eos_token_id} - {None})
    return RowRules(
        max_prompt_length=None if positions is None else positions - 1,
        max_response_length=options.max_response_length,
        needs_response=True,
        eos_token_ids=tuple(sorted(ends)),
        chat_template_kwargs=options.chat_template_kwargs or {},
        max_text_length=positions,
        num_ids=vocab_size,
        teacher_prompt_template=options.teacher_prompt_template,
        max_teacher_prompt_length=None if positions is None else positions - 1,
        max_teacher_text_length=positions,
    )


@torch.no_grad()
def _scored(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], model, tokenizer, vocab_size: int, top_k: int
) -> Iterator[dict[str, Any]]:
    """The rows of one forward, with their scores and what the teacher read; each comes with its ids, as `tokenize_row` makes them."""
    collate = DataCollatorForDistillation(pad_token_id(tokenizer, vocab_size))
    batch = {name: values.to(model.device) for name, values in collate([result for _, result in pairs]).items()}
    tokens = ResponseTokens.of(batch)
    hidden = hidden_states(model, model, batch, tokens)
    top = top_log_probs(hidden, LMHead.of(model), tokens.labels, top_k, vocab_size)
    columns = [tokens.as_rows(values.float() if values.is_floating_point() else values).cpu()
               for values in (top.ids, top.log_probs, top.label_log_probs)]  # fmt: skip
    digest = vocabulary_digest(tokenizer)
    for i, (row, result) in enumerate(pairs):
        num_tokens = len(result["response_ids"])
        scores = {name: values[i, :num_tokens].numpy() for name, values in zip(SCORES, columns, strict=True)}
        read = {
            "scored_prompt_ids": result["teacher_prompt_ids"] or result["prompt_ids"],
            "scored_response_ids": result["response_ids"],
        }
        yield {**row, **read, **scores, TOKENIZER_COLUMN: digest}
