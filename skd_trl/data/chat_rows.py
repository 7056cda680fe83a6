"""A conversation -> its examples, each an answer after what came before it, and the ids of one: the chat template's own rendering.

The prompt is what the template renders with its generation prompt, the response is what the rendered conversation has after it, up to its
end-of-sequence token (`boundary.py`). A `prompt` that ends with the assistant's text is the beginning of the answer: it is left open, and the
response continues it, whether it is sampled or given. What the row's answer holds is looked for in what was rendered (`templates.py`): a template leaves
out what it does not know, and that is noted, or refused where nothing of the answer is left.
"""

from contextlib import suppress

from .boundary import EMPTY_REASONING, answer_start, continuation_ids, end_at_eos, ids_after, rendered_ids
from .conversations import NOT_TRAINED, UnusableRow, as_text, is_answer
from .row_rules import RowRules
from .templates import held_by, missing_from


KINDS = {"reasoning": "reasoning", "text": "text", "calls": "calls of tools"}
# Prompt, answer (None: to be sampled), the note about turns after it that are not used ("" if there are none), and whether the answer
# continues the prompt's last turn.
Example = tuple[list[dict], dict | None, str, bool]


def examples_of_messages(turns: list[dict], rules: RowRules) -> list[Example]:
    """The last turn is the answer if it is the assistant's."""
    is_answered = bool(turns) and turns[-1]["role"] == "assistant"
    if rules.every_answer:
        answers = [i for i, turn in enumerate(turns) if is_answer(turn) and any(map(held_by, turns[:i]))]
        if examples := _examples_of_answers(turns, answers, rules):
            return examples
    return [(turns[:-1], reference(turns[-1], rules), "", False)] if is_answered else [(turns, None, "", False)]


def examples_of_completion(prompt: list[dict], completion: list[dict], rules: RowRules) -> list[Example]:
    """As above. The prompt stays the one that is given: the answer is the first turn of a completion that has several."""
    begins_answer = bool(prompt) and prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    if not completion:
        return [(prompt, None, "", begins_answer)]
    if completion[0]["role"] != "assistant":
        raise UnusableRow(
            "unreadable",
            f"its completion begins with a turn of the role {completion[0]['role']!r}, and an answer is the assistant's. Move the "
            "turns before it to the prompt.",
        )
    if rules.every_answer and any(map(is_answer, completion)):
        history, beginning = split_prompt(prompt, begins_answer)
        turns = [*history, continued(beginning, completion[0]), *completion[1:]]
        answers = [len(history) + i for i, turn in enumerate(completion) if is_answer(turn)]
        examples = _examples_of_answers(turns, answers, rules)
        if is_answer(completion[0]):
            examples[0] = (prompt, completion[0], examples[0][2], begins_answer)
        return examples
    note = "several_turns" if len(completion) > 1 else ""
    return [(prompt, reference(completion[0], rules), note, begins_answer)]


def split_prompt(prompt: list[dict], begins_answer: bool) -> tuple[list[dict], dict | None]:
    """The turns that are over, and the beginning of the answer, if there is one."""
    return (prompt[:-1], prompt[-1]) if begins_answer else (prompt, None)


def continued(beginning: dict | None, turn: dict) -> dict:
    """The whole turn of which `turn` is the continuation."""
    if beginning is None:
        return turn
    return {**beginning, **turn, "content": as_text(beginning.get("content")) + as_text(turn.get("content"))}


def reference(turn: dict, rules: RowRules) -> dict | None:
    """`turn` as the reference response, or `None` if it is marked as not to be trained on: then the row is a prompt alone."""
    if is_answer(turn):
        return turn
    if rules.needs_response:
        marks = ", ".join(f"{name}={turn[name]!r}" for name in NOT_TRAINED if name in turn)
        raise UnusableRow("no_response", f"its answer is marked as not to be trained on ({marks}).")
    return None


def _examples_of_answers(turns: list[dict], answers: list[int], rules: RowRules) -> list[Example]:
    """One for each of the turns that are numbered in `answers`, and one for a last question, where a response may be sampled."""
    examples: list[Example] = [(turns[:i], turns[i], "", False) for i in answers]
    if not answers or turns[-1]["role"] == "assistant":
        return examples
    if rules.needs_response:
        return [*examples[:-1], (*examples[-1][:2], "unanswered", False)]
    return [*examples, (turns, None, "", False)]


def encode_chat(
    prompt, answer, note_on_rest, begins_answer, notes, *, render, tool_names, tokenizer, rules
) -> tuple[list[int], list[int]]:
    if not any(map(held_by, prompt)):
        raise UnusableRow("no_prompt", "its conversation has no turn before the answer.")
    history, beginning = split_prompt(prompt, begins_answer)
    prompt_text = render(prompt, **{"continue_final_message" if begins_answer else "add_generation_prompt": True})
    prompt_ids = rendered_ids(prompt_text, tokenizer)
    if any(missing_from(prompt_text, held_by(turn)) - {"reasoning"} for turn in prompt):
        notes.append("lost_turn")
    if missing_from(prompt_text, {"tools": tool_names}):
        notes.append("lost_tools")
    if answer is None or not held_by(answer):
        return prompt_ids, []

    def render_with(turn: dict) -> str:
        return render([*history, continued(beginning, turn)])

    full_text = render_with(answer)
    is_prefix = full_text.startswith(prompt_text)
    if begins_answer and not is_prefix:
        raise UnusableRow(
            "unreadable",
            "its prompt ends with the beginning of an answer, which the chat template renders differently once the completion "
            "continues it. Move the beginning to the completion, or use another chat template.",
        )
    start = len(prompt_text)
    if not is_prefix:
        start = answer_start(prompt, answer, prompt_text=prompt_text, full_text=full_text, render=render)
    if start is None:
        raise UnusableRow(
            "unreadable",
            "the chat template renders its prompt differently once an answer follows, and the answer cannot be "
            "found in it. Use another chat template.",
        )
    response_text = full_text[start:]
    if not _note_what_is_lost(answer, full_text, response_text, notes, render_with=render_with, rules=rules):
        return prompt_ids, []
    if not is_prefix:
        response_ids = continuation_ids(prompt_ids, response_text, tokenizer=tokenizer)
    else:
        full_ids = rendered_ids(full_text, tokenizer)
        response_ids = ids_after(prompt_ids, full_ids, response_text, tokenizer=tokenizer, notes=notes)
    if "lost_reasoning" not in notes:
        notes += ["not_prefix"] * (not is_prefix)
        notes += ["empty_reasoning"] * bool(EMPTY_REASONING.match(response_text))
    notes += [note_on_rest] if note_on_rest else []
    return prompt_ids, end_at_eos(response_ids, rules.eos_token_ids, tokenizer=tokenizer, notes=notes)


def _note_what_is_lost(answer, full_text, response_text, notes, *, render_with, rules) -> bool:
    """Whether anything of the answer is left in what was rendered; what is not, is noted."""
    held = held_by(answer)
    missing = missing_from(response_text, held)
    empty_answers = []
    for content in ("", None) if missing == held.keys() else ():
        with suppress(UnusableRow):  # a template may fail on one of them
            empty_answers.append(render_with({"role": "assistant", "content": content}))
    if full_text in empty_answers:
        if rules.needs_response:
            raise UnusableRow(
                "lost_answer",
                f"its answer holds {' and '.join(KINDS[kind] for kind in held)}, and the chat template prints an empty answer.",
            )
        notes.append("lost_answer")
        return False
    notes += [f"lost_{kind}" for kind in held if kind in missing]
    return True
