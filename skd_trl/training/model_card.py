"""What the model card says of a distillation: teacher, who wrote the responses by which rule, gate, draft length, versions, command."""

import shlex
import sys
from pathlib import Path

from .run_files import run_settings


NEXT_SECTION = "### Framework versions"
ROWS = {
    "teacher": "teacher",
    "rollout": "responses written by",
    "accept": "acceptance rule",
    "accept_top_k": "K of the rule",
    "accept_kwargs": "parameters of the rule",
    "num_draft_tokens": "draft length",
    "temperature": "student's temperature",
    "student_top_p": "student's top-p",
    "teacher_temperature": "teacher's temperature",
    "teacher_top_p": "teacher's top-p",
    "divergence": "divergence",
    "gate": "gate",
    "gate_top_k": "K of the gate",
    "gate_floor": "weight of rejected tokens",
    "rows_per_step": "responses of an optimizer step",
}


# Of these, what a run uses depends on its ideas.
NUMBERS = {
    "accept_top_k", "temperature", "student_top_p", "teacher_temperature", "teacher_top_p", "gate_top_k", "gate_floor",
}  # fmt: skip


def describe_distillation(trainer, teacher: str) -> str:
    """The section of the card, as Markdown; `teacher` says who it was."""
    settings = {"teacher": teacher, **run_settings(trainer)}
    if settings["rollout"] != "interleaved":
        settings = {name: value for name, value in settings.items() if not name.startswith("accept")}
    used = trainer.args.used_numbers()
    settings = {name: value for name, value in settings.items() if name not in NUMBERS or name in used}
    lines = ["### Distillation", "", "| | |", "|---|---|"]
    lines += [f"| {label} | `{settings[name]}` |" for name, label in ROWS.items() if name in settings]
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    program = Path(sys.argv[0]).name
    command = shlex.join([*(["python", "-m", "skd_trl"] if program == "__main__.py" else [program]), *sys.argv[1:]])
    return "\n".join([*lines, "", f"Packages: {versions}. Command:", "", "```bash", command, "```", "", ""])


def add_distillation(path: Path, section: str) -> None:
    """Puts the section into the card that TRL wrote, before the versions that it lists, or at its end."""
    card = path.read_text(encoding="utf-8")
    before, found, after = card.partition(NEXT_SECTION)
    path.write_text(f"{before}{section}{found}{after}" if found else f"{card}\n{section}", encoding="utf-8")
