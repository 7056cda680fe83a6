"""What the model card says of a distillation: teacher, who wrote the responses by which rule, gate, draft length, versions, command."""

import shlex
import sys
from pathlib import Path

from .run_files import run_settings


NEXT_SECTION = "### Framework versions"
ROWS = {
    "student": "student",
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
    "lmbda": "share of sampled responses",
    "max_new_tokens": "their longest",
    "rows_per_step": "responses of an optimizer step",
    "steps": "optimizer steps",
    "learning_rate": "learning rate",
}


# Of these, what a run uses depends on its ideas.
NUMBERS = {
    "lmbda", "accept_top_k", "temperature", "student_top_p", "teacher_temperature", "teacher_top_p", "gate_top_k", "gate_floor",
}  # fmt: skip


def describe_distillation(trainer, student: str, teacher: str) -> str:
    """The section of the card, as Markdown; `student` and `teacher` say who they were."""
    settings = {"student": student, "teacher": teacher, **run_settings(trainer), "steps": trainer.state.global_step}
    if settings["rollout"] != "interleaved":
        settings = {name: value for name, value in settings.items() if not name.startswith("accept")}
    if settings["rollout"] == "dataset":
        settings = {
            name: value for name, value in settings.items() if name not in ("max_new_tokens", "num_draft_tokens")
        }
    used = trainer.args.used_numbers()
    settings = {name: value for name, value in settings.items() if name not in NUMBERS or name in used}
    lines = ["### Distillation", "", "| | |", "|---|---|"]
    lines += [f"| {label} | `{settings[name]}` |" for name, label in ROWS.items() if name in settings]
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    program = Path(sys.argv[0]).name
    command = shlex.join([*(["python", "-m", "skd_trl"] if program == "__main__.py" else [program]), *sys.argv[1:]])
    return "\n".join([*lines, "", f"Packages: {versions}. Command:", "", "```bash", command, "```", "", ""])


def add_distillation(path: Path, section: str, student: str) -> None:
    """Puts the section into the card that TRL wrote, before the versions that it lists, or at its end. A student that is on no hub is called
    by its name there, and the example loads it from where it is saved."""
    card = path.read_text(encoding="utf-8")
    card = card.replace("[None](https://huggingface.co/None)", f"`{student}`")
    card = card.replace('model="None"', f'model="{path.parent}"').replace("licence: license\n", "")
    before, found, after = card.partition(NEXT_SECTION)
    path.write_text(f"{before}{section}{found}{after}" if found else f"{card}\n{section}", encoding="utf-8")
