"""How rows of a data set become ids: limits, and what is asked of a row. `tokenization.py` follows it, `dataset.py` names it in messages."""

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .teacher_prompts import DEFAULT_TEMPLATE


@dataclass(frozen=True)
class RowRules:
    """
    How rows become ids. Lengths are in tokens; `None` is no limit.

    Attributes:
        max_prompt_length (`int` or `None`): rows whose prompt has more are left out.
        is_limited_by_positions (`bool`): whether that limit is what the models' positions leave, where nobody can raise it.
        max_response_length (`int` or `None`): reference responses are cut after so many.
        needs_response (`bool`): whether a row without a reference response is an error.
        eos_token_ids (`tuple[int, ...]`): ids that end a response; see [`~skd_trl.data.vocabulary.end_of_sequence_ids`].
        chat_template_kwargs (`dict`): given to the chat template for every row; a row's own column of that name overrides it.
        max_text_length (`int` or `None`): reference responses are cut where prompt and reference together have so many.
        num_ids (`int` or `None`): the number of ids that both models have; rows that hold others, or ids beyond the tokenizer's, are
            errors.
        every_answer (`bool`): makes a conversation of n answers n rows, each answer after what came before it. A last question
            without an answer is a row more where no references are needed.
        reads_response (`bool`): whether anything is computed on reference responses. Where it is not, nothing is noted about them.
        teacher_prompt_template (`str`): how the teacher's prompt is made of a `privileged_context`; see `teacher_prompts.py`.
        max_teacher_prompt_length (`int` or `None`): rows with a longer prompt for the teacher are left out.
        max_teacher_text_length (`int` or `None`): reference responses are cut where that prompt and they have so many together.
        teacher_names (`tuple[str, ...]`): several teachers, one of which each row names in `teacher_id`.
        needs_scores (`bool`): whether a row without a teacher's scores is an error; see `recorded_scores.py`.
    """

    max_prompt_length: int | None
    max_response_length: int | None
    needs_response: bool
    eos_token_ids: tuple[int, ...]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_text_length: int | None = None
    num_ids: int | None = None
    every_answer: bool = False
    reads_response: bool = True
    teacher_prompt_template: str = DEFAULT_TEMPLATE
    max_teacher_prompt_length: int | None = None
    max_teacher_text_length: int | None = None
    teacher_names: tuple[str, ...] = ()
    needs_scores: bool = False
    is_limited_by_positions: bool = False
    # `datasets` hashes importable functions by name only: raise this when a row would come out differently, else
    # caches of the older rules are read.
    version: int = 10

    def narrowed(self, tokenizer: PreTrainedTokenizerBase) -> "RowRules":
        """The same with a prompt limit that leaves room for a token of the response, and without ids that are no tokens."""
        longest, num_ids = self.max_prompt_length, self.num_ids
        if self.max_text_length is not None:
            longest = min(longest or self.max_text_length, self.max_text_length - 1)
        if num_ids is not None:
            num_ids = min(num_ids, max(tokenizer.get_vocab().values()) + 1)
        return replace(self, max_prompt_length=longest, num_ids=num_ids)
