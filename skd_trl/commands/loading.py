"""Models of a command, by name or path: what cannot be loaded is named, with its role."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from .._compat import ModelConfig, get_quantization_config  # pyright: ignore[reportPrivateImportUsage]
from ..skd_config import SKDConfig


def check_folder(role: str, name: str | None) -> None:
    """Raises `ValueError` for a path without a folder, before anything is asked of a hub."""
    looks_local = name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1)
    if looks_local and not Path(str(name)).expanduser().is_dir():
        raise ValueError(f"the {role} {name!r} does not exist: there is no such folder.")


@contextmanager
def naming(role: str, name: str | None) -> Iterator[None]:
    """What is loaded inside is the `role` (student, teacher) called `name`.

    Raises:
        `ValueError`: for a path without a folder, and for whatever the loading raises.
    """
    check_folder(role, name)
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the {role} {name!r} cannot be loaded, neither here nor from the hub. {reason}") from error


def text_config(role: str, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """A model's configuration, without its weights; of an adapter, that of the model which it is loaded onto."""
    with naming(role, name):
        adapter = find_adapter_config_file(name) if is_peft_available() else None
        if adapter is not None and not (Path(name) / CONFIG_NAME).exists():
            name = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).get_text_config()


def set_model_init_kwargs(training_args: SKDConfig, model_args: ModelConfig) -> None:
    """What ModelConfig says about loading holds for the student, and for a teacher that is loaded, unless its own settings differ.

    TRL's default, fp32, is for weights that are trained. A teacher keeps the type of its file, but on a CPU, where 16 bits are slow.
    """
    common = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    student = {**common, "revision": model_args.model_revision}
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        student["quantization_config"] = quantization_config
    own: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {**student, **own}
    if training_args.teacher_model_name_or_path is None and training_args.teacher_models is None:
        return
    if model_args.dtype == ModelConfig.__dataclass_fields__["dtype"].default and torch.accelerator.is_available():
        common["dtype"] = "auto"
    own = training_args.teacher_model_init_kwargs or {}
    training_args.teacher_model_init_kwargs = {**common, **own}
