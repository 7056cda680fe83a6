"""A teacher's scores that lie beside the rows: its k most probable tokens at each token of a given response.

`training/score.py` writes them; the scores of somebody else, such as an API's top 20, have the same columns:

- `teacher_top_ids`, `teacher_top_log_probs`: for each response token k ids and their log-probabilities (nats, no temperature);
- `teacher_label_log_probs`: those of the response's tokens; not needed where these are always among the k;
- `scored_prompt_ids`, `scored_response_ids`: what the teacher read, to be compared with what is trained on; optional;
- `teacher_tokenizer`: the digest of its vocabulary; optional.

Shapes: T response tokens, k known tokens.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .conversations import UnusableRow


SCORES = ("teacher_top_ids", "teacher_top_log_probs", "teacher_label_log_probs")
TOKENIZER_COLUMN = "teacher_tokenizer"
# Logarithms in 16 bits, or of an API that rounds them, may sum to a little over 1.
MOST_MASS = 1.01


def has_scores(columns: Sequence[str] | None) -> bool:
    return "teacher_top_ids" in (columns or ())


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that give the same tokens the same ids."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]


def scores_of(
    row: dict[str, Any], result: dict[str, Any], num_ids: int | None, eos_token_ids: Collection[int]
) -> dict[str, Any]:
    """
    The scores of a row at the tokens of its response, checked.

    Args:
        row (`dict`): with the columns above.
        result (`dict`): what `tokenization.py` made of it; its response may have been cut, but not changed.
        num_ids (`int`, *optional*): ids from here on are not known to the student.
        eos_token_ids (`Collection[int]`): the ends of sequence, which an API may have left unscored.

    Returns:
        `dict`: `SCORES` as lists (T, k), (T, k), (T,), and `response_ids`.

    Raises:
        `UnusableRow`: for scores of other texts, of another number of tokens, or that are no log-probabilities.
    """
    response_ids = result["response_ids"]
    for name in SCORES[:2]:
        if row.get(name) is None:
            raise UnusableRow("no_scores", f"its `{name}` is empty.")
    try:
        ids = np.asarray(row["teacher_top_ids"], dtype=np.int64)
        log_probs = np.asarray(row["teacher_top_log_probs"], dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UnusableRow("bad_scores", "its scores do not name as many tokens at each position.") from error
    if ids.ndim != 2 or ids.shape != log_probs.shape or ids.shape[-1] == 0:
        raise UnusableRow(
            "bad_scores",
            f"its ids have the shape {ids.shape} and their log-probabilities {log_probs.shape}; both are (tokens of the response, k).",
        )
    num_scored, is_cut = len(ids), any(note.startswith(("cut", "early")) for note in result["notes"])
    if num_scored == len(response_ids) - 1 and response_ids[-1] in eos_token_ids:
        response_ids = response_ids[:-1]
        result["notes"].append("unscored_end")
    _check_texts(row, result["teacher_prompt_ids"] or result["prompt_ids"], response_ids)
    if num_scored < len(response_ids) or (num_scored > len(response_ids) and not is_cut):
        raise UnusableRow(
            "unlike_scores",
            f"its response has {len(result['response_ids'])} tokens and its scores are of {num_scored} (the end of sequence counts).",
        )
    ids, log_probs = ids[: len(response_ids)], log_probs[: len(response_ids)]
    _check_values(ids, log_probs, num_ids)
    is_label = ids == np.asarray(response_ids, dtype=np.int64)[:, None]
    given = row.get("teacher_label_log_probs")
    if given is not None:
        labels = np.asarray(given, dtype=np.float32)[: len(response_ids)]
        if len(labels) < len(response_ids) or np.isnan(labels).any():
            raise UnusableRow(
                "bad_scores", f"its `teacher_label_log_probs` has {len(given)} entries, or NaN among them."
            )
    elif not is_label.any(-1).all():
        place = int(np.argmin(is_label.any(-1)))
        raise UnusableRow(
            "bad_scores",
            f"token {place} of its response is not among the {ids.shape[-1]} scored there, and it has no `teacher_label_log_probs`.",
        )
    else:
        labels = np.where(is_label, log_probs, 0).sum(-1, dtype=np.float32)
    # Lists, as those of rows without scores are: arrays and lists in one column are no column.
    scores = (values.tolist() for values in (ids, log_probs, labels))
    return {**dict(zip(SCORES, scores, strict=True)), "response_ids": response_ids}


def _check_texts(row: dict[str, Any], prompt_ids: list[int], response_ids: list[int]) -> None:
    for name, ids in {"prompt": prompt_ids, "response": response_ids}.items():
        if row.get(f"scored_{name}_ids") is None:
            continue
        scored = list(row[f"scored_{name}_ids"])[: len(ids) if name == "response" else None]
        if scored != list(ids):
            place = len(os.path.commonprefix([scored, list(ids)]))
            raise UnusableRow(
                "unlike_scores",
                f"the teacher read another {name}: token {place} differs ({len(scored)} tokens scored, {len(ids)} to be trained on).",
            )


def _check_values(ids: np.ndarray, log_probs: np.ndarray, num_ids: int | None) -> None:
    if np.isnan(log_probs).any() or (log_probs > np.log(MOST_MASS)).any():
        raise UnusableRow("bad_scores", "its scores hold NaN or values above 0, which are no log-probabilities.")
    if (mass := np.exp(log_probs.astype(np.float64)).sum(-1).max(initial=0)) > MOST_MASS:
        raise UnusableRow(
            "bad_scores",
            f"its scores sum to a probability of {mass:.3f} at a token; give log-probabilities at temperature 1.",
        )
    ordered = np.sort(ids, axis=-1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise UnusableRow("bad_scores", "its scores name a token twice at one position.")
    if ids.size and (ids.min() < 0 or (num_ids is not None and ids.max() >= num_ids)):
        raise UnusableRow(
            "unknown_id",
            f"its scores name the id {ids.max() if ids.min() >= 0 else ids.min()}; the last that can be used is "
            f"{'not known' if num_ids is None else num_ids - 1}.",
        )
