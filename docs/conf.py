"""Sphinx: Markdown pages through MyST, docstrings through autodoc, `options.md` from the help texts of the configurations.

`make docs` builds without warnings into `build/docs`. Docstrings are written as those of transformers: Markdown in Google's sections.
"""

import dataclasses
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import skd_trl  # noqa: E402


project = "skd_trl"
author = "the authors of skd_trl"
release = version = skd_trl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"skd_trl {release}"
html_show_sourcelink = False
templates_path: list[str] = []
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have them, with shapes
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
default_role = "code"
suppress_warnings = ["myst.header"]

# Fields of the two configurations, by what a reader looks for. A field that is in no group is listed under "Other".
GROUPS = {
    "Who writes the responses": ("rollout", "lmbda", "lmbda_unit", "max_new_tokens"),
    "The teacher": (
        "teacher_models",
        "teacher_device",
        "teacher_model_server_url",
        "teacher_signal",
        "teacher_top_k",
        "teacher_server_patience",
        "teacher_model_kind",
        "teacher_update_rate",
        "teacher_sync_steps",
        "teacher_prompt_template",
        "max_teacher_prompt_length",
    ),
    "Which proposals are accepted": ("accept", "accept_top_k", "accept_kwargs", "num_draft_tokens"),
    "How tokens are drawn": ("temperature", "student_top_p", "teacher_temperature", "teacher_top_p"),
    "Loss": ("divergence", "divergence_kwargs", "beta", "replaced_loss", "schedules", "loss_chunk_size"),
    "Gate (SpecKDConfig)": (
        "gate",
        "gate_top_k",
        "gate_top_k_end",
        "gate_floor",
        "gate_kwargs",
        "gate_control",
        "gate_normalizer",
        "gate_keep_eos",
        "gate_warmup_steps",
        "gate_compare",
    ),
    "Lengths and rows": ("max_prompt_length", "max_response_length", "chat_template_kwargs", "every_answer"),
    "Cost": (
        "rollout_batch_size",
        "sampling_copy",
        "merge_adapter",
        "capture_sampling",
        "compile_student",
        "ds3_gather_for_generation",
        "shard_teacher",
    ),
    "What is shown": (
        "log_completions",
        "log_completions_steps",
        "num_completions_to_print",
        "log_fixed_prompts",
    ),
}


def write_options(app) -> None:
    """`options.md`: name, default and help of every field that this package adds or changes, from the dataclasses."""
    fields = {field.name: field for field in dataclasses.fields(skd_trl.SpecKDConfig)}
    of_skd = {field.name: field for field in dataclasses.fields(skd_trl.SKDConfig)}
    own_classes = [one for one in skd_trl.SpecKDConfig.__mro__ if one.__module__.startswith("skd_trl.")]
    own_classes = [one for one in own_classes if one.__module__ != "skd_trl._compat"]
    ours = {name for one in own_classes for name in one.__dict__.get("__annotations__", {}) if name in fields}
    grouped = {name for names in GROUPS.values() for name in names}
    lines = [
        "# Options",
        "",
        "Fields of `SKDConfig` and `SpecKDConfig`, with the help that `--help` prints. Everything else is a field of TRL's "
        "`GKDConfig` and `SFTConfig` and keeps its meaning; what cannot be followed is refused by name.",
        "",
    ]
    for title, names in {**GROUPS, "Other": sorted(ours - grouped)}.items():
        known = [name for name in names if name in fields]
        if not known:
            continue
        lines += [f"## {title}", "", "| option | default | |", "|---|---|---|"]
        for name in known:
            default = of_skd.get(name, fields[name]).default
            help_text = re.sub(r"\s+", " ", str(fields[name].metadata.get("help", ""))).replace("|", "\\|")
            lines.append(f"| `{name}` | `{default!r}` | {re.sub('<', '&lt;', help_text)} |")
        lines.append("")
    lines += ["`SpecKDConfig` differs in one default: `rollout` is `'student'`.", ""]
    text = "\n".join(lines)
    page = Path(app.srcdir) / "options.md"
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings in transformers' Markdown -> reStructuredText, in place."""
    text = "\n".join(lines)
    text = re.sub(r"\[`~?([\w.]+)`\]\(([^)\s]+)\)", r"`\1 <\2>`__", text)
    text = re.sub(r"\[`~?([\w.]+\.)?(\w+)`\]", r"``\2``", text)
    text = re.sub(r"\[([^\]\[`]+)\]\((https?://[^)\s]+)\)", r"`\1 <\2>`__", text)
    text = re.sub(r"(?<![`\w>])`([^`\n]+)`(?![`_])", r"``\1``", text)
    parts = re.split(r"(``[^`]+``)", text)
    text = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)
    lines[:] = []
    for line in text.split("\n"):  # a list needs a blank line after it
        if line.strip() and lines and lines[-1].strip() and indent(line) < indent(lines[-1]):
            lines.append("")
        lines.append(line)


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app) -> None:
    app.connect("builder-inited", write_options)
    # Before napoleon, whose own handler has the default priority of 500.
    app.connect("autodoc-process-docstring", as_rst, priority=400)
