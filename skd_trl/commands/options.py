"""Options of a command: TRL's parser (dataclasses and YAML), help by groups that fits a screen, and errors of one line.

`--help` lists the names of the options by group, `--help GROUP` explains those of one, `--help all` those of all. What is not
understood ends with exit code 2, a line that says what was found, and the name that may have been meant.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import yaml

from .._compat import TrlParser
from ..inherited_options import note_on


# What commands call the same thing.
SAME_MODELS = (
    ("model_name_or_path", "model", "student"),
    ("teacher_model_name_or_path", "teacher_model", "teacher"),
    ("dataset_name", "dataset"),
)


class FileParser(TrlParser):
    """TRL's parser. In a file `eval_strategy: no` means what it does on the command line, though YAML reads a boolean."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """As TRL's, which `parse_args_and_config` calls with the file's content."""
        words = {name: "no" for name, value in config.items() if value is False and name.endswith("_strategy")}
        return super().set_defaults_with_config(**config | words)


@dataclass(frozen=True)
class Command:
    """A command's name, what it does, its dataclasses, an example, hints for options that it does not have, and whether its file may
    hold options of other commands."""

    name: str
    description: str
    dataclasses: tuple[type, ...]
    example: str = ""
    hint: Callable[[str], str | None] = lambda name: None
    shares_files: bool = False

    @property
    def prog(self) -> str:
        return f"skd {self.name}"

    @property
    def usage(self) -> str:
        return f"{self.prog} [--config FILE.yaml] [--OPTION VALUE ...]   ({self.prog} --help lists the options)"

    def parser(self) -> TrlParser:
        return FileParser(self.dataclasses, prog=self.prog, usage=self.usage, allow_abbrev=False, add_help=False)

    def parse(self, arguments: list[str], **defaults: Any) -> tuple:
        """The dataclasses, filled from the command line, then the file named by `--config`, then `defaults`, then their own defaults.
        Help and errors end the process."""
        if help_wanted := [i for i, argument in enumerate(arguments) if argument in ("-h", "--help")]:
            topic = arguments[help_wanted[0] + 1 :][:1]
            print(self.help_text(topic[0] if topic and not topic[0].startswith("-") else None))
            raise SystemExit(0)
        # Before values are checked: a missing one may be due to an option that is not understood.
        known = {"config", *self._fields(), *(f"no_{name}" for name in self._fields())}
        given = [argument for argument in arguments if argument.startswith("--")]
        self._refuse([one for one in given if one.partition("=")[0].removeprefix("--").replace("-", "_") not in known])
        parser = self.parser()
        parser.set_defaults(**defaults)
        with self.one_line_errors():
            *parsed, of_file, of_line = parser.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        self._refuse(of_line if self.shares_files else of_file + of_line)
        return tuple(parsed)

    def _refuse(self, unknown: list[str]) -> None:
        names = [argument.partition("=")[0].removeprefix("--") for argument in unknown if argument.startswith("--")]
        if unknown and not names:
            self.fail(f"{' '.join(unknown)!r} belongs to no option. Options begin with --.")
        for name in names:
            of_others = [other for same in SAME_MODELS if name in same for other in same if other in self._fields()]
            close = of_others or difflib.get_close_matches(name, self._fields(), n=1)
            hint = self.hint(name) or (f"Did you mean --{close[0]}?" if close else f"`{self.prog} --help` lists them.")
            self.fail(f"--{name} is no option. {hint}")

    def fail(self, message: str) -> NoReturn:
        """Ends the process with exit code 2 and one line."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """What is wrong with options, models or data is one line, and not a traceback (which SKD_TRACEBACK=1 shows)."""
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, argparse.ArgumentError, yaml.YAMLError) as error:
            if os.environ.get("SKD_TRACEBACK"):
                raise
            message = str(error) or type(error).__name__
            # JSON's and YAML's own words do not say what they are about.
            if isinstance(error, json.JSONDecodeError):
                message = f"{error.doc!r} is no JSON: {error}. Names and texts have double quotes, such as '{{\"alpha\": 0.25}}'."
            elif isinstance(error, yaml.YAMLError):
                message = f"the file named by --config is no YAML: {' '.join(str(error).split())}"
            self.fail(message)

    # Help

    def _fields(self) -> dict[str, dataclasses.Field]:
        return {field.name: field for cls in self.dataclasses for field in dataclasses.fields(cls) if field.init}

    def groups(self) -> dict[str, list[dataclasses.Field]]:
        """The options by group: by their name, or else by the class that defines them."""
        groups: dict[str, list[dataclasses.Field]] = {}
        for cls in self.dataclasses:
            for field in dataclasses.fields(cls):
                if field.init:
                    groups.setdefault(_group_of(cls, field), []).append(field)
        return dict(sorted(groups.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else -1))

    def help_text(self, topic: str | None = None) -> str:
        """The help: of all groups by name, of one group, or (`"all"`) of all groups with explanations."""
        groups, width = self.groups(), min(shutil.get_terminal_size().columns, 100)
        if topic is not None and topic != "all" and topic not in groups:
            if topic.removeprefix("--") in self._fields():
                return _explained(self._fields()[topic.removeprefix("--")], width)
            self.fail(f"--help {topic}: there is no such group of options; choose one of {', '.join(groups)}, all.")
        lines = [f"usage: {self.usage}", "", *textwrap.wrap(self.description, width)]
        if self.example and topic is None:
            lines += ["", *self.example.splitlines()]
        lines += [""] if topic is None else []
        chosen = groups if topic in (None, "all") else {topic: groups[topic]}
        for name, fields in chosen.items():
            lines += [""] if topic is not None else []
            lines += [f"{name}: {TITLES.get(name, '')}".rstrip(": ")]
            lines += _names(name, fields, width) if topic is None else [_explained(field, width) for field in fields]
        if topic is None:
            more = f"`{self.prog} --help GROUP` explains a group, `--help OPTION` an option, `--help all` everything."
            lines += ["", more]
        return "\n".join(lines)


def for_this_machine() -> dict[str, Any]:
    """Defaults of a machine without an accelerator, where TRL's `bf16=True` is refused; the command line and the file override them."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}


# Groups of options, in the order of the help, and what they are about.
TITLES = {
    "command": "",
    "data": "rows, those held out included",
    "evaluation": "the student before and after, on held-out prompts",
    "model": "the student, and how both models are loaded",
    "skd": "who writes the responses, and the divergence (SKDConfig)",
    "speckd": "which tokens count (SpecKDConfig; --trainer speckd)",
    "watching": "what is shown and kept of the responses",
    "memory": "what it costs",
    "lora": "train an adapter (PEFT)",
    "quantization": "load in 4 or 8 bits",
    "sft": "of TRL's SFTConfig and GKDConfig",
    "trainer": "of transformers' TrainingArguments",
}
ORDER = list(TITLES)
# Groups of which the short help names the first few: their own documentation is elsewhere.
SHORTENED = {"trainer": 24, "sft": 8, "lora": 6, "quantization": 3}
USUAL = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "use_cpu", "seed", "logging_steps", "report_to",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "resume_from_checkpoint", "gradient_checkpointing",
    "torch_compile", "deepspeed", "push_to_hub", "max_length", "beta", "chat_template_path", "dataset_num_proc", "use_peft",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "load_in_8bit",
)  # fmt: skip
OF_COMMANDS = {
    "data": ("dataset", "dataset_name", "dataset_config", "dataset_split", "num_rows", "num_train_rows", "num_eval_rows",
             "prompt_template", "completion_template"),
    "evaluation": (
        "compare", "compare_at_evaluation", "metrics", "draft_rows",
    ),
    "model": ("model", "model_name_or_path", "student", "teacher", "before", "after", "trust_remote_code"),
}  # fmt: skip
OF_CLASS = {
    "SKDConfig": "skd",
    "TeacherOptions": "skd",
    "SpecKDConfig": "speckd",
    "TrainingArguments": "trainer",
    "ScriptArguments": "data",
}
# Where a field's name says more than its class.
OF_NAME = {
    "watching": ("log_", "num_completions"),
    "memory": ("loss_chunk", "rollout_batch", "compile_", "ds3_", "shard_teacher"),
    "lora": ("use_peft", "lora_", "use_rslora", "use_dora"),
    "quantization": ("load_in_", "bnb_", "use_bnb"),
}


def _group_of(cls: type, field: dataclasses.Field) -> str:
    for group, names in OF_COMMANDS.items():
        if field.name in names:
            return group
    owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
    if owner.__name__ in ("SKDConfig", "ModelConfig"):
        for group, beginnings in OF_NAME.items():
            if field.name.startswith(beginnings):
                return group
    if owner.__name__ == "ModelConfig" or field.name.startswith("teacher_model"):
        return "model"
    return OF_CLASS.get(
        owner.__name__, "sft" if owner.__module__.startswith(("trl.", "skd_trl._compat")) else "command"
    )


def _names(group: str, fields: Iterable[dataclasses.Field], width: int) -> list[str]:
    names = [field.name for field in fields]
    shown = [name for name in USUAL if name in names][: SHORTENED[group]] if group in SHORTENED else names
    text = " ".join(shown) + (f" ... and {len(names) - len(shown)} more" if len(shown) < len(names) else "")
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ", break_long_words=False)


def _explained(field: dataclasses.Field, width: int) -> str:
    text = " ".join([*str(field.metadata.get("help", "")).replace("%%", "%").split(), note_on(field.name)]).strip()
    if field.default not in (None, "", dataclasses.MISSING):
        text += f" [{field.default}]"
    lines = textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join([f"  --{field.name}", *lines])
