"""Plain English in README, docs, docstrings, help texts, errors and comments: phrases that a reader stumbles over, and what to write.

`python tests/test_prose.py` lists what it finds, with places. A phrase that is right somewhere gets an entry in `ALLOWED`.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
CODE = ("skd_trl", "examples", "benchmarks", "docs")
# Made by a script from model names and errors.
GENERATED = {"docs/decoders.md", "docs/options.md", "docs/refusals.md"}

# Pattern: what to write instead.
BANNED = {
    # Habits
    r"so that": "so, or: to ...",
    r"of (its|their|his|her|your|our|one's|the \w+'s) own": "its own ..., or: separate",
    r"(anew|afresh)": "again",
    r"(likelier|likeliest)": "more probable, ranks higher",
    r"every how many": "number of ... between",
    r"a text(?! (part|column|file|editor|field|box|config))": "text, or: a prompt, a response, a row",
    r"st(ands?|ood)(?! (for|in|out)\b)": "is accepted, is, applies",
    r"(is|are|was|were|says|say) what (?!to )": "name the thing: the prompt equals ..., this is ...",
    r"\| what it is \|": "a title that names the column",
    r"(unlearn|unlearns|learnt|spoilt)": "forget, learned, damaged",
    r"became of": "happened to",
    r"that is none": "not loaded, none",
    r"goes? before": "overrides, comes before",
    r"to the token": "token for token",
    r"meanwhile": "while ..., during ...",
    r"belongs? to where": "are valid where",
    r"(is|are) passed over": "is skipped",
    r"held against": "compared with",
    r"wish(es)?": "choice, chooses",
    r"holds? (more )?(probable|likely|likelier)": "ranks higher",
    r"whoever comes": "the next ...",
    # Sentences that were found in the first version
    r"two published methods answer": "say what they answer",
    r"counts fully": "has weight 1",
    r"stands up to": "is accepted by",
    r"this shows that the method works and how it looks": "say what it does not compare",
    r"are what you know": "work as in ...",
    r"so are alibi": "a sentence",
    r"a rule by the": "a rule that ...",
    r"what interleaved sampling adds": "the fields of interleaved sampling",
    r"rule by which a proposal": "rule that accepts or rejects",
    r"no longer what its template means": "a template that is cut has another meaning",
    r"would change while it is": "would change with every step",
    r"arguments of the trainer's own": "the trainer's arguments",
    r"heads that do what the loss": "heads that compute ...",
    r"in a way that this package does not know": "not as a linear map, scale and soft cap",
    r"what the gate said of": "whether the gate accepted",
    r"has ranks wait": "makes ranks wait",
    r"of two prompts of one length": "prompts of equal length",
    r"take a block for the last tokens": "assume that a block is at the end",
    r"a place without a row": "an unused place",
}
# (file, pattern): how often the phrase is right there, and why.
ALLOWED: dict[tuple[str, str], tuple[int, str]] = {}

PATTERNS = {pattern: re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE) for pattern in BANNED}


def files() -> list[Path]:
    python = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "examples" / "README.md",
        ROOT / "benchmarks" / "README.md",
    ]
    settings = [*(ROOT / "examples" / "configs").glob("*.yaml"), *(ROOT / "examples" / "accelerate").rglob("*.yaml")]
    settings += [ROOT / name for name in ("Makefile", "setup.cfg", "pyproject.toml", ".pre-commit-config.yaml")]
    found = [path for path in [*python, *sorted(pages), *sorted(settings)] if "assets" not in path.parts]
    return [path for path in found if path.relative_to(ROOT).as_posix() not in GENERATED]


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts that people read: of Python its comments and its strings, of other files everything."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from paragraphs(source)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    block, start = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = start if block else token.start[0]
            block += " " + token.string.lstrip("#").strip()
        elif block and token.type not in (tokenize.NL, tokenize.NEWLINE):
            yield start, block
            block = ""


def paragraphs(source: str) -> Iterator[tuple[int, str]]:
    """A paragraph's lines together: a phrase may be broken by a line."""
    block, start = "", 1
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        if line.strip():
            start = start if block else number
            block += " " + line.strip().lstrip("#")
        elif block:
            yield start, block
            block = ""


def findings(path: Path) -> list[tuple[int, str, str]]:
    """Line, phrase and pattern of what is found in a file and not allowed there."""
    name, found = path.relative_to(ROOT).as_posix(), []
    for line, text in prose_of(path):
        flat = re.sub(r"\s+", " ", text)
        for pattern, regex in PATTERNS.items():
            found += [(line, match.group(), pattern) for match in regex.finditer(flat)]
    for (file, pattern), (number, _) in ALLOWED.items():
        if file == name:
            allowed = [finding for finding in found if finding[2] == pattern]
            assert len(allowed) == number, (
                f"{file}: {pattern!r} is allowed {number} times and found {len(allowed)} times"
            )
            found = [finding for finding in found if finding[2] != pattern]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_phrase_that_a_reader_stumbles_over(path):
    found = findings(path)
    assert not found, "\n" + "\n".join(report(path, *finding) for finding in found)


def report(path: Path, line: int, phrase: str, pattern: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {phrase!r}. Write: {BANNED[pattern]}"


def test_the_check_sees_comments_strings_and_broken_lines(tmp_path):
    file = tmp_path / "code.py"
    file.write_text(
        '# It is cut so\n# that it fits.\nx = f"a {1} text that stands"\n\n\ndef f():\n    """Learns anew."""\n'
    )
    found = {
        phrase.group().lower()
        for _, text in prose_of(file)
        for regex in PATTERNS.values()
        for phrase in regex.finditer(text)
    }
    assert found == {"so that", "stands", "anew"}
    file = tmp_path / "page.md"
    file.write_text("It is cut so\nthat it fits. It stands for the rest.\n")
    found = [
        phrase.group() for _, text in prose_of(file) for regex in PATTERNS.values() for phrase in regex.finditer(text)
    ]
    assert found == ["so that"]


if __name__ == "__main__":
    lines = [report(path, *finding) for path in files() for finding in findings(path)]
    print("\n".join(lines))
    sys.exit(bool(lines))
