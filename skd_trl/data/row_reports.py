"""What is said of rows that cannot be used, or that are used otherwise than they are given: counted, named, with what to change.

A problem is an error or leaves the row out; a note is about a row that is used. `tokenization.py` finds them, one row at a time; here is
their wording, and what is said of a whole map-style data set.
"""

import logging
import os

from datasets import Dataset

from .row_rules import RowRules


logger = logging.getLogger(__name__)

# Why a row is unusable, and what to change. `form` is wrong with the data set as a whole.
PROBLEMS = {
    "form": "cannot be used",
    "no_prompt": "have no prompt, and there is nothing to answer. Fill in or remove these rows",
    "no_teacher_prompt": (
        "have a column that says what the teacher reads, and nothing in it. Fill in or remove these rows, or remove the column: the "
        "teacher then reads the student's prompt"
    ),
    "no_response": (
        "have no reference response, and this run trains on reference responses (rollout='dataset', or lmbda below 1). Fill in or "
        "remove these rows, or train on sampled responses only"
    ),
    "unknown_teacher": "name none of the teachers in `teacher_id`, so nobody judges them. Fill in or remove these rows",
    "no_scores": (
        "have no scores of a teacher, and this run has no other teacher. Fill in or remove these rows, or give a teacher_model"
    ),
    "bad_scores": "have scores of a teacher that cannot be right. Score them again, or remove these rows",
    "unlike_scores": (
        "have scores of other texts than they would be trained on, so each score would be compared with another token. Score them "
        "again with this tokenizer and chat template, or train with the settings that they were scored with"
    ),
    "unreadable": "cannot be turned into tokens. Change or remove these rows",
    "unknown_id": (
        "hold ids that are no tokens of the tokenizer and both models: ids of another tokenizer, or of tokens that were added to it "
        "and not to the models. Tokenize them with the student's tokenizer, or keep these tokens out of the texts (giving them "
        "embeddings in both models helps only if both were trained on them)"
    ),
    "lost_answer": (
        "have an answer of which the chat template prints nothing (calls for a template without calls, or reasoning that it "
        "strips), so the reference response would be a bare end of turn. Use a chat template that prints it, or remove these rows"
    ),
    "long_prompt": "have a prompt over max_prompt_length={limits.max_prompt_length} and are left out (a cut prompt is "
    "no prompt of its template). Raise max_prompt_length to keep them, or max_length, from which it is taken by default; "
    "the models' positions are a limit too",
    "no_room": "have a prompt over the {limits.max_prompt_length} tokens that the models' positions leave beside the response and are "
    "left out (a cut prompt is no prompt of its template). Lower max_new_tokens to keep them, or use models with more positions",
    "long_teacher_prompt": "have a prompt for the teacher over its limit and are left out. Raise max_teacher_prompt_length, which "
    "is by default what the teacher's positions leave beside the response, or shorten these rows",
}
# A row with one of these is left out; each other problem is an error.
LEFT_OUT = ("long_prompt", "no_room", "long_teacher_prompt")
# What was changed in a usable row, and what to do about it.
NOTES = {
    "not_prefix": (
        "the chat template's generation prompt is not how the rendered conversation continues (a template that opens "
        "a reasoning block, for example), so the reference response follows a prompt that it was not written for. "
        'Pass chat_template_kwargs={{"enable_thinking": False}} if the template knows it, put the reasoning into the '
        "references, or use a template that prints both alike"
    ),
    "empty_reasoning": (
        "the chat template puts an empty reasoning block before the reference response, which teaches the student not "
        'to reason where its prompt asks it to. Pass chat_template_kwargs={{"enable_thinking": False}} if that is '
        "what you want (the block then belongs to the prompt), or put the reasoning into the references"
    ),
    "lost_answer": (
        "the chat template prints nothing of the row's answer, so the row has no reference response. Use a chat template that "
        "prints it, if anything is to be trained or evaluated on references"
    ),
    "lost_reasoning": (
        "the chat template leaves the reasoning of the row's answer out of the reference response, which teaches the student "
        "to answer without. Use a chat template that prints it (some are made for training), or remove it from the rows"
    ),
    "lost_calls": (
        "the chat template leaves calls of the row's answer out of the reference response, or parts of them. Use a chat template "
        "that prints them, or remove them from the rows"
    ),
    "lost_text": (
        "the chat template does not print the text of the row's answer as it is given. Look at one of the rows in the "
        "template, and use another one if the text is missing"
    ),
    "lost_turn": (
        "the chat template does not print a turn of the prompt as it is given, so a question, a tool's answer or a system prompt "
        "may be missing. Look at one of the rows in the template, and use another one if it is"
    ),
    "lost_tools": "the chat template does not print the row's tools. Use a chat template that does, or remove the column",
    "several_turns": (
        "the completion has several turns; the first is the reference response and the others are not used. Set "
        "every_answer=True to make each answer a row"
    ),
    "unscored_end": (
        "the end of sequence has no score, so it is left out of the response: nothing teaches the student to stop"
    ),
    "unanswered": (
        "the conversation ends with a question that has no answer; its answers are rows, the question is left out, as this run needs "
        "references. Nothing is to be done, unless an answer was lost"
    ),
    "to_sample": (
        "there is no reference response, so they are evaluated on a response that the student samples (temperature and "
        "student_top_p of the run): the loss there is the divergence on the student's own text, another figure than on references. "
        "Give the two kinds of rows as two evaluation sets to tell them apart"
    ),
    "merged": (
        "tokens merge across the end of the prompt, so the response is tokenized on its own, as the model would write "
        "it. To avoid it, end the prompt on a token boundary, for example by moving its trailing spaces to the "
        "completion"
    ),
    "no_eos": (
        "the reference response holds no end-of-sequence token, so nothing in it teaches the student to stop. Add the "
        "token that closes a turn to `generation_config.eos_token_id` or make it `tokenizer.eos_token`"
    ),
    "early_eos": (
        "the reference response goes on after its first end-of-sequence token; what follows is left out. Remove the "
        "token from the text, or check the models' `generation_config.eos_token_id`"
    ),
    "cut_text": (
        "prompt and reference response have more than {limits.max_text_length} tokens together (max_length, or the positions of a "
        "model), and the reference is cut there, without an end-of-sequence token. Raise max_length, use models with more "
        "positions, or shorten these rows"
    ),
    "cut_response": (
        "the reference response is over max_response_length={limits.max_response_length} and is cut there, without an "
        "end-of-sequence token. Raise max_response_length to keep it whole"
    ),
}


def report(tokenized: Dataset, num_rows: int, rules: RowRules, name: str) -> list[int]:
    """Indices of the usable results. Every rank finds the same and raises the same; only the first one warns."""
    warn = logger.warning if int(os.environ.get("RANK", "0")) == 0 else logger.debug
    rows = tokenized["row"][:]
    by_problem: dict[str, list[int]] = {}
    for index, problem in enumerate(tokenized["problem"][:]):
        by_problem.setdefault(problem, []).append(index)
    usable = by_problem.pop("", [])
    for problem, text in PROBLEMS.items():
        if found := by_problem.get(problem):
            named = list(dict.fromkeys(rows[index] for index in found))
            text = text.format(limits=rules)
            detail = f"row {named[0]}: {tokenized[found[0]]['detail']}"
            message = f"{len(named)} of {num_rows} rows of the {name} data set {text}. {_name(named)} ({detail})"
            if problem not in LEFT_OUT or not usable:
                raise ValueError(message if usable else f"{message} No usable row is left.")
            warn(message)
    if rules.every_answer:
        warn(f"every_answer: the {num_rows} rows of the {name} data set hold {len(rows)} answers, each a row.")

    by_note: dict[str, list[int]] = {}
    for row, notes in zip(rows, tokenized["notes"][:], strict=True):
        for note in notes:
            by_note.setdefault(note, []).append(row)
    for note, found in by_note.items():
        named = list(dict.fromkeys(found))
        text = NOTES[note].format(limits=rules)
        warn(f"In {len(named)} of {num_rows} rows of the {name} data set {text}. {_name(named)}")
    return usable


def _name(rows: list[int], num_named: int = 5) -> str:
    named = ", ".join(map(str, rows[:num_named]))
    rest = f" and {len(rows) - num_named} more" if len(rows) > num_named else ""
    return f"Row{'s' if len(rows) > 1 else ''} {named}{rest}."
