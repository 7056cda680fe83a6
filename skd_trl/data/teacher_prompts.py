"""What the teacher reads where it is not the student's prompt: a `teacher_prompt` column, or a `privileged_context` in a template.

Names and meaning of the second are those of TRL's SDFT: the template joins the text of the last user turn with the context, and
the other turns stay. Both models then write one response, each after its own prompt. What comes out here is a row with a prompt
alone, which `tokenization.py` reads as any other.
"""

import string
from typing import Any

from .conversations import UnusableRow, as_text, turns_of


DEFAULT_TEMPLATE = "{prompt}\n\n{privileged_context}"
COLUMNS = ("teacher_prompt", "privileged_context")
# Columns that the chat template is handed with either prompt.
SHARED_COLUMNS = ("tools", "chat_template_kwargs")


def teacher_row(row: dict[str, Any], prompt: str | list[dict] | None, template: str) -> dict[str, Any] | None:
    """
    The row that the teacher reads, or `None` if it reads what the student reads.

    Args:
        row (`dict`):
            With `teacher_prompt` (plain text or a conversation, like the row's own prompt), or with `privileged_context` (text;
            of a conversation its texts are taken, of anything else its `str`).
        prompt (`str` or `list` of turns, *optional*):
            The student's prompt, with the roles that templates know; `None` if the row holds ids.
        template (`str`):
            With the fields `{prompt}` and `{privileged_context}`.

    Raises:
        `UnusableRow`: for a column without content, both columns, text beside a conversation, or a context that has no turn to
            go into.
    """
    columns = [column for column in COLUMNS if column in row]
    if not columns:
        return None
    given = [column for column in columns if row[column] is not None]
    if len(given) > 1:
        raise UnusableRow(
            "form",
            "it has both `teacher_prompt` and `privileged_context`. Each says what the teacher reads: remove one.",
        )
    column = (given or columns)[0]  # the other one is null in rows of data sets that were concatenated
    value = row[column]
    if value is None or value == "" or value == []:
        raise UnusableRow("no_teacher_prompt", f"its `{column}` is empty.")
    if column == "privileged_context":
        value = with_context(prompt, value, template)
    elif isinstance(prompt, list) != isinstance(value, list) and prompt is not None:
        kinds = ["a conversation" if isinstance(one, list) else "plain text" for one in (prompt, value)]
        raise UnusableRow(
            "unreadable", f"its prompt is {kinds[0]} and its `teacher_prompt` is {kinds[1]}: use one form."
        )
    return {"prompt": value, **{name: row[name] for name in SHARED_COLUMNS if name in row}}


def with_context(prompt: str | list[dict] | None, context: Any, template: str) -> str | list[dict]:
    """The prompt with a context that only the teacher has, joined by `template`."""
    if prompt is None:
        raise UnusableRow(
            "form",
            "it has `privileged_context` beside token ids, which no template can join. Give `teacher_prompt`, or the texts "
            "instead of the ids.",
        )
    if isinstance(context, list) and context and isinstance(context[0], dict):
        texts = [as_text(turn.get("content")) for turn in turns_of(context, "privileged_context")]
        context = "\n".join(filter(None, texts))
    if isinstance(prompt, str):
        return template.format(prompt=prompt, privileged_context=context)
    users = [i for i, turn in enumerate(prompt) if turn["role"] == "user"]
    if not users:
        raise UnusableRow(
            "unreadable", "it has `privileged_context`, and its prompt has no user's turn for it to go into."
        )
    turn = prompt[users[-1]]
    text = template.format(prompt=as_text(turn.get("content")), privileged_context=context)
    return [*prompt[: users[-1]], {**turn, "content": text}, *prompt[users[-1] + 1 :]]


def check_template(template: str) -> None:
    """
    Raises:
        `ValueError`: for a template with other fields than `{prompt}` and `{privileged_context}`, or without the second.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"teacher_prompt_template={template!r} is no format: {error}.") from error
    if not {"privileged_context"} <= fields <= {"prompt", "privileged_context"}:
        raise ValueError(
            f"teacher_prompt_template={template!r} has the fields {sorted(fields)}; it needs {{privileged_context}}, and may have "
            "{prompt}. Write other braces twice: {{ }}."
        )
