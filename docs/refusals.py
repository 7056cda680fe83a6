"""Writes docs/refusals.md: everything that the package refuses or warns of, in the words that it uses, read from its source.

Run it (`make refusals`) after a message has changed; a test compares the page with the source. Nothing is imported: messages are
what is raised, logged, returned as a warning of a check, or stands in a table of them. What a message fills in is shown as ‹name›.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "refusals.md"
ERRORS = {"ValueError", "TypeError", "AttributeError", "FloatingPointError", "UnusableRow", "RuntimeError"}
# Heading, and the modules that belong there, by how their paths begin. The first that fits.
PARTS = {
    "Settings": ("skd_config", "speckd_config", "inherited_options", "ideas", "schedules", "scheduled_numbers"),
    "Rows of a data set": ("data/",),
    "Models, tokenizers and engines": ("training/",),
    "Sampling": ("sampling/",),
    "Loss": ("loss/",),
    "Trainers, evaluation and the command line": ("",),
}
# Tables of messages: (module, name) and what their keys are.
TABLES = {
    ("inherited_options", "NOT_FOLLOWED"): "option with another value than the neutral ones",
    ("inherited_options", "NOT_CALLED"): "method that a subclass replaces",
    (
        "inherited_options",
        "GENERATION_ADVICE",
    ): "`trainer.generation_config` or `trainer.generation_kwargs`, read or set",
    ("data/row_reports", "PROBLEMS"): "rows that are refused or left out",
    ("data/row_reports", "NOTES"): "rows that are used, with a counted note",
}


@dataclass(frozen=True)
class Message:
    line: int
    kind: str  # "error" or "warning"
    text: str


def page() -> str:
    """The text of docs/refusals.md."""
    package = ROOT / "skd_trl"
    modules = sorted(path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py"))
    lines = [
        "# What is refused, and what is warned of",
        "",
        "Every message that says what was found, why it cannot work and what to change. Search for a few words of yours. What a",
        "message fills in is shown as ‹name›. Errors end the run, before training where they can; warnings do not.",
        "",
        "This page is written by `make refusals` from the source. Do not edit it.",
    ]
    for heading in PARTS:
        own = [module for module in modules if _part_of(module) == heading]
        parts = [part for module in own if (part := _module(module, (package / f"{module}.py").read_text()))]
        if parts:
            lines += ["", f"## {heading}", *[line for part in parts for line in part]]
    return "\n".join(lines) + "\n"


def _part_of(module: str) -> str:
    return next(heading for heading, prefixes in PARTS.items() if module.startswith(prefixes))


def _module(module: str, source: str) -> list[str]:
    """The lines of a module's messages, none if it has none."""
    tree = ast.parse(source)
    lines = []
    for (of_module, name), about in TABLES.items():
        if of_module == module:
            lines += [
                "",
                f"`{name}`: {about}",
                "",
                *[f"- `{key}`: {text}" for key, text in _table(tree, name)],
            ]
    messages = sorted(set(_messages(tree)), key=lambda message: (message.line, message.text))
    if messages:
        lines += ["", *dict.fromkeys(f"- {message.kind}: {message.text}" for message in messages)]
    if not lines:
        return []
    summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return ["", f"### `{module}`", "", f"*{summary}*", *lines]


def _messages(tree: ast.Module) -> Iterator[Message]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _name(node.exc.func) in ERRORS:
            yield from _message(node, "error", node.exc.args[-1:])
        elif isinstance(node, ast.Call) and _name(node.func) in ("warning", "warn"):
            yield from _message(node, "warning", node.args[:1])
        elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and ast.unparse(node.elts[0]) == "Verdict.WARNING":
            yield from _message(node, "warning", node.elts[1:])
        elif isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "str | None":
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from _message(inner, "warning", [inner.value])


def _message(node: ast.AST, kind: str, values: list[ast.expr]) -> Iterator[Message]:
    """One for each way in which the message may read, if it has its own words."""
    for value in values:
        for choice in [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]:
            text = _text(choice)
            words = re.sub(r"‹[^›]*›", "", text)
            if len(re.findall(r"[A-Za-z]{2,}", words)) >= 3:
                yield Message(node.lineno, kind, text)  # type: ignore[attr-defined]


def _table(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """Keys and messages of a module's dict; of a tuple the last entry is the message. A single message has its name as key."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if getattr(target, "id", None) != name:
            continue
        value: ast.expr = node.value  # type: ignore[attr-defined]
        entries = zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else [(None, value)]
        for key, entry in entries:
            message = _text(entry.elts[-1] if isinstance(entry, ast.Tuple) else entry)
            filled = re.sub(r"{limits\.(\w+)}", r"‹\1›", message).replace("{{", "{").replace("}}", "}")
            yield (name if key is None else ast.literal_eval(key)), filled


def _text(value: ast.expr) -> str:
    """A message as Markdown, what it fills in as ‹name›."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return re.sub(r"\s+", " ", value.value).replace("<", "\\<").replace("*", "\\*").replace("](", "]\\(")
    if isinstance(value, ast.JoinedStr):
        return "".join(_text(part) for part in value.values)
    if isinstance(value, ast.FormattedValue):
        return _filled_in(value.value)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _text(value.left) + _text(value.right)
    if isinstance(value, ast.BoolOp):
        return _text(value.values[-1])
    return _filled_in(value)


def _filled_in(value: ast.expr) -> str:
    """What stands in a message for an expression: a name out of it, or the words that it chooses from."""
    if isinstance(value, ast.IfExp):
        choices = [text for choice in (value.body, value.orelse) if (text := _text(choice))]
        return f"[{' / '.join(choices)}]"
    if isinstance(value, ast.Constant):
        return "" if value.value is None else _text(value) if isinstance(value.value, str) else str(value.value)
    if isinstance(value, ast.JoinedStr):
        return _text(value)
    if isinstance(value, ast.Call):
        inside = value.args[0] if value.args else value.func
        return (
            _filled_in(inside)
            if isinstance(inside, ast.Name | ast.Attribute | ast.Call)
            else f"‹{_name(value.func).lstrip('_')}›"
        )
    return f"‹{_name(value).lstrip('_')}›"


def _name(value: ast.AST) -> str:
    if isinstance(value, ast.Attribute):
        return _name(value.value) if value.attr in ("__name__", "value") else value.attr
    if isinstance(value, ast.Subscript):
        return _name(value.value)
    if isinstance(value, ast.Call):
        return _name(value.args[0]) if _name(value.func) == "type" and value.args else _name(value.func)
    return getattr(value, "id", "number" if isinstance(value, ast.BinOp) else "...")


if __name__ == "__main__":
    PAGE.write_text(page())
