"""Student, teacher and tokenizer from whatever the caller gives: objects, names or paths. None of the objects changes."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ._compat import create_model_from_path, get_config_model_id


if TYPE_CHECKING:
    from .skd_config import SKDConfig


def load_pair(
    model: PreTrainedModel | nn.Module | str | None,
    teacher_model: PreTrainedModel | nn.Module | str | None,
    processing_class: PreTrainedTokenizerBase | None,
    args: "SKDConfig",
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer, loaded where names were given.

    Raises:
        `ValueError`: if one of them is missing, or the teacher is the student, or both objects and ways to load them
            were given.
    """
    if model is None:
        raise ValueError("model is None: give the student, a model or its name or path.")
    teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if teacher_model is None:
        raise ValueError(
            "There is no teacher: teacher_model is None and args.teacher_model_name_or_path is not set. Give one of them. "
            "(A student cannot be its own teacher: it would change while it is learnt from.)"
        )
    if teacher_model is model and not isinstance(model, str):
        raise ValueError(
            "teacher_model is the same object as model, so the teacher would change with every step. Load it twice."
        )
    if args.teacher_model_init_kwargs and not isinstance(teacher_model, str):
        raise ValueError(
            "args.teacher_model_init_kwargs says how to load the teacher, but teacher_model is already a "
            f"{type(teacher_model).__name__}. Drop one of them."
        )
    tokenizer = load_tokenizer(model, processing_class, args)
    student = _load_student(model, args) if isinstance(model, str) else model
    teacher = _load_teacher(teacher_model, args) if isinstance(teacher_model, str) else teacher_model
    return student, teacher, tokenizer


def load_tokenizer(model, processing_class, args: "SKDConfig") -> PreTrainedTokenizerBase:
    if processing_class is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if not name:
            raise ValueError(
                "processing_class is None and the model does not say where it was loaded from. Pass the tokenizer."
            )
        processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}; only texts are supported, so pass a tokenizer (of a "
            "processor: processor.tokenizer)."
        )
    return processing_class


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills padding. Masks say what is padding, so an end-of-sequence id, or any other, serves as well."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0


def disable_dropout(model: nn.Module) -> None:
    """Dropout off, except an adapter's own, which the user asked for in its configuration."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def _load_student(name: str, args: "SKDConfig") -> PreTrainedModel:
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each process holds its own
    # The Trainer is given an object, and would warn that these no longer have an effect.
    args.model_init_kwargs = None
    return create_model_from_path(name, **kwargs)


def _load_teacher(name: str, args: "SKDConfig") -> PreTrainedModel:
    kwargs = dict(args.teacher_model_init_kwargs or {})
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)
