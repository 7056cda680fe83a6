"""The only file that imports from `trl.experimental` and from TRL's helpers: what may move between TRL releases.

Tested with the oldest and the newest release that setup.cfg admits. `GKDTrainer` lives in `trl.experimental.gkd`, which may
change or go in any release: TRL promotes or removes its experimental trainers. The trainers here pass over everything that
GKDTrainer does, so where it is gone, a class of its name and fields on SFTTrainer takes its place.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers.integrations import deepspeed as deepspeed_integration
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)


with warnings.catch_warnings():
    # TRLExperimentalWarning: that this package builds on an experimental module is for us to keep up with.
    warnings.filterwarnings("ignore", message=".*experimental.*")
    silenced = os.environ.get("TRL_EXPERIMENTAL_SILENCE")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError:

        @dataclass
        class GKDConfig(SFTConfig):
            """The fields of TRL's GKDConfig, with its defaults; [`SKDConfig`] says what they do here."""

            _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

            temperature: float = field(default=0.9, metadata={"help": "Temperature of the student's draws."})
            lmbda: float = field(default=0.5, metadata={"help": "Share of steps trained on sampled responses."})
            beta: float = field(
                default=0.5,
                metadata={"help": "Weight of the teacher in the mixture of divergence 'jsd', in [0, 1]."},
            )
            max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of a sampled response."})
            teacher_model_name_or_path: str | None = field(
                default=None, metadata={"help": "The teacher's name or path."}
            )
            teacher_model_init_kwargs: dict[str, Any] | str | None = field(
                default=None, metadata={"help": "How to load a teacher that is given by name or path."}
            )
            disable_dropout: bool = field(
                default=True, metadata={"help": "Whether the student trains without dropout."}
            )
            seq_kd: bool = field(
                default=False,
                metadata={"help": "Whether the teacher writes the responses that are not sampled otherwise."},
            )

            def __post_init__(self):
                super().__post_init__()
                for name in ("lmbda", "beta"):
                    if not 0.0 <= getattr(self, name) <= 1.0:
                        raise ValueError(f"{name} must be in the range [0.0, 1.0].")

        class GKDTrainer(SFTTrainer):
            """Only a name in the trainers' ancestry: nothing of TRL's GKDTrainer runs in them."""

    finally:
        if silenced is None:
            del os.environ["TRL_EXPERIMENTAL_SILENCE"]
        else:
            os.environ["TRL_EXPERIMENTAL_SILENCE"] = silenced

from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.utils import create_model_from_path, get_config_model_id


@contextmanager
def deepspeed_configuration(settings: dict[str, Any] | None) -> Iterator[None]:
    """While it lasts, models are loaded as under this DeepSpeed configuration, or as under none. (transformers keeps the one in force
    as a weak reference in its module, without a function that returns it.)"""
    before = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    # It is in force from here on, for as long as it is referred to.
    kept = None if settings is None else deepspeed_integration.HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del kept
        deepspeed_integration._hf_deepspeed_config_weak_ref = before


__all__ = [
    "GKDConfig",
    "GKDTrainer",
    "ModelConfig",
    "SFTConfig",
    "SFTTrainer",
    "ScriptArguments",
    "TrlParser",
    "add_hooks",
    "create_model_from_path",
    "deepspeed_configuration",
    "get_config_model_id",
    "get_peft_config",
    "get_quantization_config",
    "remove_hooks",
]
