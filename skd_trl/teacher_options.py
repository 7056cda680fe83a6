"""Fields of the configurations that say who the teacher is and what it reads; their checks, which need no model.

Names that TRL's SDFT has are those of SDFT, with their meaning and defaults.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .data.teacher_prompts import DEFAULT_TEMPLATE, check_template
from .explained_options import explained


SELF_TEACHERS = ("base", "ema", "live")
TEACHER_SIGNALS = ("top_k", "hidden_states")


@explained
@dataclass
class TeacherOptions:
    """What [`SKDConfig`] says of the teacher."""

    teacher_models: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Several teachers, in the place of one: names and paths, such as \'{"code": "path", "prose": "path"}\'. A row\'s '
            "`teacher_id` says which is its own."
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={
            "help": "Where the teacher runs, if not beside the student: another GPU of this process ('cuda:1') or 'cpu'. Not under "
            "DeepSpeed and FSDP."
        },
    )
    teacher_model_server_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "The teacher is behind a server, in the place of a teacher_model: the address of `skd serve` or `vllm serve`, or "
            "those of its replicas. The API key is in the environment variable SKD_TEACHER_API_KEY."
        },
    )
    teacher_signal: str = field(
        default="top_k",
        metadata={
            "help": "What a served teacher sends of each position: 'top_k' (its teacher_top_k most probable tokens) or 'hidden_states' "
            "(the exact signal, of `skd serve`; the trainer keeps a copy of the teacher's head).",
            "choices": list(TEACHER_SIGNALS),
        },
    )
    teacher_top_k: int = field(
        default=64,
        metadata={
            "help": "How many of its most probable tokens a served teacher sends of each position, if these are its signal."
        },
    )
    teacher_server_patience: float = field(
        default=600.0,
        metadata={
            "help": "Seconds for which a teacher's server that does not answer is asked again. After them a checkpoint is written and "
            "the run ends."
        },
    )
    teacher_model_kind: str | None = field(
        default=None,
        metadata={
            "help": "Makes the student its own teacher: 'base' (as training started; with an adapter the model without it), 'ema' (an "
            "average of what it has been) or 'live' (as it is).",
            "choices": list(SELF_TEACHERS),
        },
    )
    teacher_update_rate: float = field(
        default=0.05,
        metadata={"help": "The share of its distance to the student that an ema teacher moves, above 0 and up to 1."},
    )
    teacher_sync_steps: int = field(
        default=1, metadata={"help": "After how many optimizer steps an ema teacher moves."}
    )
    teacher_prompt_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": "How the teacher's prompt is made of rows with a `privileged_context` column: {prompt} is the text of the last "
            "user turn, {privileged_context} what only the teacher reads."
        },
    )
    max_teacher_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Rows with a longer prompt for the teacher are left out. Default: what its positions leave beside the "
            "response."
        },
    )

    def check_teacher(self) -> None:
        """
        Raises:
            `ValueError`: for values that cannot work.
        """
        check_template(self.teacher_prompt_template)
        if self.max_teacher_prompt_length is not None and self.max_teacher_prompt_length < 1:
            raise ValueError(f"max_teacher_prompt_length={self.max_teacher_prompt_length} must be at least 1.")
        if self.teacher_models is not None and not isinstance(self.teacher_models, dict):
            raise ValueError(f"teacher_models={self.teacher_models!r} is not a dict of names and paths.")
        if isinstance(self.teacher_model_server_url, str):
            self.teacher_model_server_url = [self.teacher_model_server_url]
        for name, is_wrong in (
            ("teacher_top_k", self.teacher_top_k < 1),
            ("teacher_server_patience", self.teacher_server_patience < 0),
        ):
            if is_wrong:
                raise ValueError(f"{name}={getattr(self, name)} is too small.")
        if self.teacher_signal not in TEACHER_SIGNALS:
            raise ValueError(
                f"teacher_signal={self.teacher_signal!r} is unknown; choose one of {', '.join(TEACHER_SIGNALS)}."
            )
        default_top_k = type(self).__dataclass_fields__["teacher_top_k"].default
        if self.teacher_signal == "hidden_states" and self.teacher_top_k != default_top_k:
            raise ValueError(
                f"teacher_top_k={self.teacher_top_k} would have no effect: with teacher_signal='hidden_states' all tokens are known."
            )
        for name in ("teacher_signal", "teacher_top_k", "teacher_server_patience"):
            if (
                not self.teacher_model_server_url
                and getattr(self, name) != type(self).__dataclass_fields__[name].default
            ):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} would have no effect: it belongs to teacher_model_server_url."
                )
        others = (
            "teacher_model_name_or_path",
            "teacher_model_init_kwargs",
            "teacher_models",
            "teacher_model_kind",
            "shard_teacher",
            "teacher_device",
        )
        for name in others:
            if self.teacher_model_server_url and getattr(self, name):
                raise ValueError(
                    f"teacher_model_server_url={self.teacher_model_server_url} is a teacher behind a server, and "
                    f"{name}={getattr(self, name)!r} is about one in this process. Drop one of them."
                )
        kind = self.teacher_model_kind
        if kind is not None and kind not in SELF_TEACHERS:
            raise ValueError(f"teacher_model_kind={kind!r} is unknown; choose one of {', '.join(SELF_TEACHERS)}.")
        for name in ("teacher_model_name_or_path", "teacher_model_init_kwargs", "shard_teacher", "teacher_device"):
            if kind is not None and getattr(self, name):
                raise ValueError(
                    f"teacher_model_kind={kind!r} makes the student its own teacher, and {name}={getattr(self, name)!r} is about "
                    "another one. Drop one of them."
                )
        if self.teacher_device is not None:
            try:
                torch.device(self.teacher_device)
            except RuntimeError as error:
                raise ValueError(f"teacher_device={self.teacher_device!r} is no device: {error}") from None
            if getattr(self, "shard_teacher", None):
                raise ValueError(
                    f"teacher_device={self.teacher_device!r} is one device, and shard_teacher=True spreads the teacher over all. "
                    "Drop one of them."
                )
        if not 0 < self.teacher_update_rate <= 1:
            raise ValueError(f"teacher_update_rate={self.teacher_update_rate} must be above 0 and at most 1.")
        if not isinstance(self.teacher_sync_steps, int) or self.teacher_sync_steps < 1:
            raise ValueError(f"teacher_sync_steps={self.teacher_sync_steps!r} must be a whole number of at least 1.")
        for name in ("teacher_update_rate", "teacher_sync_steps"):
            if kind != "ema" and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)} would have no effect: it belongs to teacher_model_kind='ema', which is {kind!r}."
                )
