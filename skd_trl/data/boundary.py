"""Where the prompt ends and the answer begins, in a rendered text and in token ids.

Counting the prompt's tokens, as `trl.experimental.gkd` does, moves a piece of the answer into the prompt when tokens
merge across the boundary, or when the template prints another header before a written answer than before one to come
(`<think>`). Here the two are told apart in text, and a token that would straddle the boundary is split there: the ids
of the prompt are always those that the model is given at inference.
"""

import os
import re
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .templates import REASONING_KEYS


# Stands for the answer where a template is asked what it prints before one.
ANSWER_MARK = "SKDANSWERMARK"
# What reasoning models' templates print before an answer that comes without reasoning.
EMPTY_REASONING = re.compile(r"\s*(<think>)?\s*</think>")


def rendered_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of text that a chat template has printed, bos included."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def ids_after(
    prompt_ids: list[int],
    full_ids: list[int],
    response_text: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    notes: list[str],
) -> list[int]:
    """Ids of the response: what follows the prompt's ids, or where tokens merge across its end, the text's own."""
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return full_ids[len(prompt_ids) :]
    notes.append("merged")
    return continuation_ids(prompt_ids, response_text, tokenizer=tokenizer)


def continuation_ids(prompt_ids: list[int], text: str, *, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of `text` as it follows a prompt. SentencePiece tokenizers put a space before text without a prompt."""
    alone = rendered_ids(text, tokenizer)
    candidates = [alone]
    for anchor in ("\n", "="):
        anchor_ids, ids = rendered_ids(anchor, tokenizer), rendered_ids(anchor + text, tokenizer)
        if ids[: len(anchor_ids)] == anchor_ids:
            candidates.append(ids[len(anchor_ids) :])
    expected = _decode(prompt_ids, tokenizer) + text
    for ids in candidates:
        if _decode([*prompt_ids, *ids], tokenizer) == expected:
            return ids
    return alone


def answer_start(
    prompt: list[dict], answer: dict, *, prompt_text: str, full_text: str, render: Callable[..., str]
) -> int | None:
    """
    Where the answer starts in `full_text`, which does not start with `prompt_text`; `None` if it cannot be told.

    The two texts part inside the header that the template prints before an answer; but when the answer happens to
    begin like the rest of the generation prompt, they part too late. So the template is also asked what it prints
    before some other answer, and the earlier of the two places counts.
    """
    marked = {key: ANSWER_MARK for key in REASONING_KEYS if isinstance(answer.get(key), str)}
    marked_text = render([*prompt, {**answer, **marked, "content": ANSWER_MARK}])
    header_end = marked_text.find(ANSWER_MARK)
    has_header = header_end >= 0 and full_text.startswith(marked_text[:header_end])
    parting = len(os.path.commonprefix([prompt_text, full_text]))
    if full_text.startswith(render(prompt, add_generation_prompt=False)):
        return min(parting, header_end) if has_header else parting
    # The history itself reads differently once an answer follows (system prompt in the last turn).
    return header_end if has_header else None


def end_at_eos(
    response_ids: list[int], eos_token_ids: tuple[int, ...], *, tokenizer: PreTrainedTokenizerBase, notes: list[str]
) -> list[int]:
    """Up to and with the first end-of-sequence id, where sampling would stop too."""
    for end, token in enumerate(response_ids, start=1):
        if token in eos_token_ids:
            if _decode(response_ids[end:], tokenizer, skip_special_tokens=True).strip():
                notes.append("early_eos")
            return response_ids[:end]
    if response_ids:
        notes.append("no_eos")
    return response_ids


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))
