"""Who the teacher is: what was given as one (a model, names and paths, addresses, a kind of the student, or recorded scores), loaded
before the trainer is set up, and placed when its engine is known.

`load_models` comes first: checks and data need models, names and a vocabulary. `place_teacher` comes after the Trainer has made its
accelerator, and returns what a trainer asks (`teachers.Teacher`). None of the objects that the caller gives changes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..serving.client import TeacherClient
from .distributed import forwards_are_collective, is_stand_in, prepare_teacher, put_on_device
from .engine_settings import check_parallel_models, check_processes
from .findings import require
from .forward_patches import take_off_patches
from .machine import Machine
from .memory_plan import shards_teacher
from .models import given_model, load_student, load_tokenizer, with_options
from .pair_check import check_teacher_differs
from .quantised import keep_gradients
from .self_teacher import SharedTensors, StudentAverage, WeightsAsLoaded, check_self_teacher, self_teacher
from .served import RemoteHiddenStates, RemoteTeacher, check_server, connect, fetched_head
from .teacher_weights import check_teacher_device, load_in_shards, load_teacher
from .teachers import OneTeacher, RecordedTeacher, Teacher, TeacherElsewhere, TeachersByRow


if TYPE_CHECKING:
    from ..skd_config import SKDConfig


logger = get_logger(__name__)


@dataclass(frozen=True)
class LoadedTeacher:
    """What was given as the teacher. `models` are those to check and to ask for sizes: the student itself where there is no second
    model; `names` are those of several. `base` are the student's weights where the teacher will be the student without its adapter."""

    models: list[PreTrainedModel]
    names: tuple[str, ...]
    is_served: bool
    is_recorded: bool
    base: WeightsAsLoaded | None = None


@dataclass(frozen=True)
class PlacedTeacher:
    """The teacher on its device: `teacher` is what the trainer asks, `prepared` what an engine made of its model or models (several by
    name), `inner` they themselves; a self-teacher's `average` moves it, and `shared` are the tensors that the student has too."""

    teacher: Teacher
    prepared: nn.Module | dict[str, nn.Module] | None = None
    inner: nn.Module | None = None
    average: StudentAverage | None = None
    shared: SharedTensors | None = None


def load_models(
    model: Any,
    teacher_model: Any,
    processing_class: PreTrainedTokenizerBase | None,
    args: "SKDConfig",
    has_scores: bool = False,
) -> tuple[PreTrainedModel, LoadedTeacher, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer of a trainer; `teacher_model` may be a dict of several. See [`load_pair`].

    Raises:
        `ValueError`: also where recorded scores would have to judge responses that are sampled.
    """
    named = named_teachers(teacher_model, args)
    first, *others = named.values() if named else [given_model("teacher_model", teacher_model)]
    check_processes(args)
    check_teacher_device(args)
    check_parallel_models(args, {"model": model, "teacher_model": first})
    is_elsewhere = {"subfolder", "revision"} & set(args.teacher_model_init_kwargs or ())
    if isinstance(model, str) and model in (first, *others) and not is_elsewhere:
        logger.warning(
            f"Student and teacher are both {model!r}: they are equal when training starts, and nothing is learned where they read the same prompts. "
            "Give a smaller student."
        )
    student, teacher, tokenizer = load_pair(model, first, processing_class, args, has_scores)
    is_served = args.teacher_model_server_url is not None
    is_recorded = teacher is student and args.teacher_model_kind is None and not is_served
    if is_recorded and args.rollouts != {"dataset"}:
        raise ValueError(
            "There is no teacher but the scores beside the rows, which are of given responses and judge no others: set "
            "rollout='dataset' (and lmbda and seq_kd at their defaults), or give a teacher_model."
        )
    models = [teacher, *(load_pair(student, other, tokenizer, args)[1] for other in others)]
    base = WeightsAsLoaded(student) if args.teacher_model_kind == "base" else None
    return student, LoadedTeacher(models, tuple(named), is_served, is_recorded, base), tokenizer


def connected(
    loaded: LoadedTeacher, args: "SKDConfig", tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> TeacherClient | None:
    """The checked connection to a served teacher; `None` for any other."""
    if not loaded.is_served:
        return None
    top_k = args.teacher_top_k if args.teacher_signal == "top_k" else 1
    client = connect(args.teacher_model_server_url, top_k, args.teacher_server_patience)
    check_server(client, tokenizer, vocab_size)
    return client


def place_teacher(
    loaded: LoadedTeacher,
    student: nn.Module,
    args: "SKDConfig",
    accelerator: Accelerator,
    *,
    client: TeacherClient | None = None,
    has_own_prompts: bool = False,
) -> PlacedTeacher:
    """
    Puts the teacher where it will run: whole on the device, or spread over processes.

    Args:
        loaded ([`LoadedTeacher`]): of `load_models`.
        student (`nn.Module`): with its adapter, not wrapped: a self-teacher is made around its tensors.
        args ([`SKDConfig`]): for `shard_teacher` and what concerns a self-teacher.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        client ([`TeacherClient`], *optional*): the connection to a served teacher.
        has_own_prompts (`bool`, *optional*): whether rows say what the teacher reads; of a self-teacher.

    Raises:
        `ValueError`: for a self-teacher whose student is spread, or that would never differ from it.
    """
    if client is not None and args.teacher_signal == "hidden_states":
        return PlacedTeacher(RemoteHiddenStates(client, fetched_head(client, accelerator.device)))
    if client is not None:
        return PlacedTeacher(RemoteTeacher(client))
    if loaded.is_recorded:
        if args.teacher_device is not None:
            raise ValueError(
                f"teacher_device={args.teacher_device!r} would have no effect: there is no teacher but the scores beside the rows."
            )
        return PlacedTeacher(RecordedTeacher())
    if args.teacher_model_kind is not None:
        return _placed_self_teacher(loaded.base, student, args, accelerator, has_own_prompts)
    models = [load_in_shards(one, args, accelerator) if is_stand_in(one) else one for one in loaded.models]
    device = None if args.teacher_device is None else torch.device(args.teacher_device)
    if device is not None:
        prepared = [put_on_device(one, device, accelerator) for one in models]
    else:
        prepared = [
            prepare_teacher(one, accelerator, shards_teacher(args.shard_teacher, one, Machine.of(accelerator)))
            for one in models
        ]
    is_collective = accelerator.num_processes > 1 and forwards_are_collective(*models)
    if loaded.names:
        teacher = TeachersByRow(models, prepared, is_collective, device)
    else:
        teacher = OneTeacher(models[0], prepared[0], device)
    if device is not None and device != accelerator.device:
        teacher = TeacherElsewhere(teacher)
    if not loaded.names:
        return PlacedTeacher(teacher, prepared[0], models[0])
    by_name = dict(zip(loaded.names, prepared, strict=True))
    return PlacedTeacher(teacher, by_name, nn.ModuleList(models))  # the list is for the messages of checks


def _placed_self_teacher(
    base: WeightsAsLoaded | None,
    student: nn.Module,
    args: "SKDConfig",
    accelerator: Accelerator,
    has_own_prompts: bool,
) -> PlacedTeacher:
    kind = args.teacher_model_kind
    assert kind is not None
    check_self_teacher(kind, accelerator, student)
    if base is not None:
        base.check()
    inner = self_teacher(student, kind)
    require([check_teacher_differs(kind, has_own_prompts)])
    average = None
    if kind == "ema":
        average = StudentAverage(inner, student, args.teacher_update_rate, args.teacher_sync_steps)
    shared = SharedTensors(inner, student)
    # Without a separate engine, which would move the student's tensors.
    prepared = accelerator.prepare_model(inner, evaluation_mode=True)
    return PlacedTeacher(OneTeacher(inner, prepared), prepared, inner, average, shared)


def load_pair(
    model: Any,
    teacher_model: Any,
    processing_class: PreTrainedTokenizerBase | None,
    args: "SKDConfig",
    has_scores: bool = False,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Student, teacher and tokenizer, loaded where names were given.

    Raises:
        `ValueError`: if one of them is missing, or both are one object, or both an object and ways to load it were given.

    Where there is no second model the teacher is the student, the same object: with `args.teacher_model_kind`, with a teacher
    behind a server, and without a teacher for data that have a teacher's scores beside them (`has_scores`).
    """
    if model is None:
        raise ValueError("model is None: give the student, a model or its name or path.")
    has_teacher = teacher_model is not None or args.teacher_model_name_or_path is not None
    is_served = args.teacher_model_server_url is not None
    if args.teacher_model_kind is not None or is_served or (has_scores and not has_teacher):
        if teacher_model is not None:
            name = "teacher_model_server_url" if is_served else "teacher_model_kind"
            raise ValueError(
                f"{name}={getattr(args, name)!r} says who the teacher is, and a teacher_model was given too. Drop one of them."
            )
        tokenizer = with_options(load_tokenizer(model, processing_class, args), args)
        student = load_student(model, args) if isinstance(model, str) else model
        take_off_patches(student)
        keep_gradients(student)
        return student, student, tokenizer
    teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if teacher_model is None:
        raise ValueError(
            "There is no teacher: teacher_model is None and args.teacher_model_name_or_path is not set. Give one of them. "
            "(For the student as its own teacher set args.teacher_model_kind; for none, score the data: python -m skd_trl score.)"
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
    tokenizer = with_options(load_tokenizer(model, processing_class, args), args)
    student = load_student(model, args) if isinstance(model, str) else model
    teacher = load_teacher(teacher_model, args) if isinstance(teacher_model, str) else teacher_model
    for loaded in (student, teacher):
        take_off_patches(loaded)
    keep_gradients(student)
    return student, teacher, tokenizer


def named_teachers(teacher_model: Any, args: "SKDConfig") -> dict[str, PreTrainedModel | nn.Module | str]:
    """Several teachers by their names, from a dict that was given or `args.teacher_models`; empty where there is one, or none.

    Raises:
        `ValueError`: for a dict without an entry, or several teachers beside one.
        `TypeError`: for an entry that is no model, name or path.
    """
    is_dict = isinstance(teacher_model, dict)
    given: Any = teacher_model if is_dict else args.teacher_models
    if given is None:
        return {}
    others = {
        "teacher_model": None if is_dict else teacher_model,
        "args.teacher_model_name_or_path": args.teacher_model_name_or_path,
    }
    others |= {
        "args.teacher_models": args.teacher_models if is_dict else None,
        "args.teacher_model_kind": args.teacher_model_kind,
    }
    if beside := [name for name, other in others.items() if other is not None]:
        raise ValueError(f"There are several teachers by name, and {beside[0]} beside them. Drop one of them.")
    if not given:
        raise ValueError("teacher_models is empty: give names and models, or one teacher_model.")
    return {str(name): given_model(f"teacher {name!r}", model) for name, model in given.items()}
