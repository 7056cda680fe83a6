"""What student and teacher have to agree on before their distributions can be compared: token ids and their ends.

Heads may be padded to different sizes (Qwen2: 151936 and 152064) over one tokenizer; then the range that both have is
compared. Two tokenizers are one when the same text gives the same ids: the same vocabulary, and the same ids for a
few texts that different merges or pre-tokenizers split differently.
"""

import logging
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

PROBES = (
    "The quick brown fox can't jump over 1234567.89 lazy dogs!",
    "  def f(x):\n\treturn x ** 2  # two\n\n\n",
    "Größe, naïve, 東京, Москва, 🙂, ﬁ, e\u0301",
    "https://example.org/a_b-c?d=E%20F&g=10000",
)


def end_of_sequence_ids(
    student_model: PreTrainedModel, teacher_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Sorted ids that end a response: those of both models' generation configs and configs and the tokenizer's."""
    ids = model_end_of_sequence_ids(student_model) | model_end_of_sequence_ids(teacher_model)
    return sorted(ids | _as_set(tokenizer.eos_token_id))


def describe_end_of_sequence_difference(
    student_model: PreTrainedModel, teacher_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """
    How the two models' end-of-sequence ids differ, for a warning; `None` if they agree or a model names none.

    It matters to the loss: where one model ends and the other does not, a single token per sequence can decide a run.
    """
    student, teacher = model_end_of_sequence_ids(student_model), model_end_of_sequence_ids(teacher_model)
    if not student or not teacher or student == teacher:
        return None

    def named(ids: set[int]) -> str:
        return ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in sorted(ids)) or "none"

    return (
        "The student and the teacher end a response with different ids: only the student with "
        f"{named(student - teacher)}; only the teacher with {named(teacher - student)}. Sampling stops at any of "
        "them, but one model may give the other's end almost no probability. Use a pair tuned with one chat template, "
        "or set `generation_config.eos_token_id` of both models."
    )


def model_end_of_sequence_ids(model: PreTrainedModel) -> set[int]:
    """Ids in a model's generation config and config (an int, a list or None each)."""
    generation_config = getattr(model, "generation_config", None)
    ids = _as_set(getattr(generation_config, "eos_token_id", None))
    return ids | _as_set(getattr(model.config.get_text_config(), "eos_token_id", None))


def _as_set(ids: Any) -> set[int]:
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return {int(i) for i in ids if i is not None and i >= 0}  # some converted configs say -1 for none


def shared_vocab_size(student_model: PreTrainedModel, teacher_model: PreTrainedModel) -> int:
    """The smaller of the two vocabularies: ids below it are compared. From the configs, as heads may be sharded."""
    return min(model.config.get_text_config().vocab_size for model in (student_model, teacher_model))


def check_vocabularies(
    student_model: PreTrainedModel,
    teacher_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    **loading: Any,
) -> str | None:
    """
    Refuses a pair whose ids, below [`shared_vocab_size`], do not mean the same to both.

    Args:
        student_model, teacher_model ([`~transformers.PreTrainedModel`]):
            The pair. Sizes are read from the configs, so sharded heads can be checked too.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the teacher. By default the one at the path or id that the teacher was loaded from, if any.
        loading:
            How to load it: `revision`, `trust_remote_code`.

    Returns:
        `str`: what remains doubtful, for a warning; `None` if nothing does.

    Raises:
        `ValueError`: if the tokenizers differ, or if the student's tokenizer has ids that the teacher lacks.

    Tokens that only one tokenizer has and that the other leaves unused (`<think>` in Qwen3, not in Qwen2.5) do not
    change how text is split; they are warned about.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (student_model, teacher_model)]
    found = f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]}."
    path = getattr(teacher_model.config, "_name_or_path", None)
    if teacher_tokenizer is None and path:
        teacher_tokenizer = tokenizer_at(path, **loading)
    if teacher_tokenizer is not None and (difference := describe_tokenizer_difference(tokenizer, teacher_tokenizer)):
        raise ValueError(
            f"The student and the teacher have different tokenizers: {difference}. Their next-token distributions are "
            f"over different tokens and cannot be compared. {_advice()}"
        )
    # Ids beyond the student's own head (Gemma 3's image token) are in no text that it can read.
    missing = sorted((i, token) for token, i in tokenizer.get_vocab().items() if min(sizes) <= i < sizes[0])
    if missing:
        raise ValueError(
            f"{found} The student's tokenizer has {len(missing)} tokens that the teacher lacks (first: id "
            f"{missing[0][0]}, {missing[0][1]!r}), so the teacher cannot judge texts that hold them. {_advice()}"
        )
    if teacher_tokenizer is None:
        return (
            f"{found} No tokenizer was found for the teacher, so it was not verified that an id means the same token "
            "to both models. If their tokenizers differ, the result is meaningless."
        )
    if extra := sorted(set(tokenizer.get_vocab()) ^ set(teacher_tokenizer.get_vocab())):
        return (
            f"The tokenizers of student and teacher agree except for {len(extra)} tokens that only one of them has "
            f"({', '.join(map(repr, extra[:5]))}{', ...' if len(extra) > 5 else ''}). To the other model they are "
            "untrained ids: keep them out of the data."
        )
    return None


def tokenizer_at(path: str, **loading: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer at a path or id, `None` if there is none."""
    try:
        loaded = AutoTokenizer.from_pretrained(path, **loading)
    except Exception as error:  # whatever a folder without a tokenizer, a missing hub or a missing package raises
        logger.info(f"No tokenizer could be loaded from {path!r}: {error}")
        return None
    # Some classes (Qwen2, Gemma, GPT-2) come up empty in a folder that holds a model and no tokenizer.
    return None if loaded.get_vocab().keys() <= {*loaded.all_special_tokens, *loaded.get_added_vocab()} else loaded


def _advice() -> str:
    return (
        "Use a teacher of the student's family with the same tokenizer, or `trl.experimental.gold.GOLDTrainer`, which "
        "is made for pairs with different tokenizers."
    )


def describe_tokenizer_difference(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """First thing that makes two tokenizers give different ids to one text; `None` if nothing was found."""
    vocabulary, other_vocabulary = tokenizer.get_vocab(), other.get_vocab()
    tokens, other_tokens = ({i: token for token, i in v.items()} for v in (vocabulary, other_vocabulary))
    for i in sorted(tokens.keys() & other_tokens.keys()):
        if tokens[i] != other_tokens[i]:
            return f"id {i} is {tokens[i]!r} for the student and {other_tokens[i]!r} for the teacher"
    for token in sorted(vocabulary.keys() & other_vocabulary.keys(), key=vocabulary.__getitem__):
        if vocabulary[token] != other_vocabulary[token]:
            return f"{token!r} is id {vocabulary[token]} for the student and {other_vocabulary[token]} for the teacher"
    for text in PROBES:
        ids, other_ids = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, other))
        if ids != other_ids:
            at = next((n for n, pair in enumerate(zip(ids, other_ids, strict=False)) if pair[0] != pair[1]), 0)
            return (
                f"with one vocabulary they split {text!r} differently (from token {at}: "
                f"{tokenizer.convert_ids_to_tokens(ids[at : at + 4])} and "
                f"{other.convert_ids_to_tokens(other_ids[at : at + 4])})"
            )
    return None
