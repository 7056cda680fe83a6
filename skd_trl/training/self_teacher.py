"""The student as its own teacher: as it was (`base`), an average of what it has been (`ema`), or as it is (`live`).

Names and meaning are those of TRL's SDFT. A self-teacher is a second module around the student's own tensors: what is not trained
is shared and takes no memory, so nothing is switched between the two models' turns. `base` of a student with an adapter is the model
without it; `live` shares everything and moves with the optimizer; `ema` has its own copy of what is trained. Within an optimizer step
none of them moves: responses are sampled and learned from before the optimizer does.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..sampling.packed_weights import some_numbers
from .distributed import is_sharded, shards_the_student
from .models import copy_around


AVERAGE_FILE = "teacher_ema.safetensors"
# LoRA initialisations that subtract from the frozen weight what the adapter begins with.
TAKES_A_PART = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_THE_BASE = (
    "teacher_model_kind='base' is the student without its adapter, but {found}, so without the adapter it is another model than it was. Use "
    "an initialisation that leaves the weights as they are (init_lora_weights=True), or give the base model as teacher_model."
)


def self_teacher(student: nn.Module, kind: str) -> PreTrainedModel:
    """
    The student's own teacher, which shares with it every tensor that need not differ.

    Args:
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            With its adapter, if it is to have one; not wrapped, not sharded.
        kind (`str`):
            `"base"`, `"ema"` or `"live"`.

    Raises:
        `ValueError`: for a `base` whose adapter also trains weights of the model itself, or was begun by taking a part out of them.
    """
    parameters = list(student.parameters())
    has_adapter = hasattr(student, "peft_config") and hasattr(student, "get_base_model")
    if kind == "live":
        return _copy_sharing(student, parameters)
    if kind == "ema":
        return _copy_sharing(student, [p for p in parameters if not p.requires_grad]).requires_grad_(False)
    if not has_adapter:
        return _copy_sharing(student, []).requires_grad_(False)
    for config in student.peft_config.values():
        begun = getattr(config, "init_lora_weights", None)
        if isinstance(begun, str) and begun.lower().startswith(TAKES_A_PART):
            raise ValueError(
                _NOT_THE_BASE.format(found=f"init_lora_weights={begun!r} takes a part out of its weights")
            )
    teacher: Any = _copy_sharing(student, parameters)
    # `unload` would leave the trained copy of a module in modules_to_save in its place.
    for name, module in list(teacher.named_modules()):
        if hasattr(module, "original_module"):
            parent, _, child = name.rpartition(".")
            setattr(teacher.get_submodule(parent), child, module.original_module)
    teacher = teacher.unload()
    if trained := [name for name, p in teacher.named_parameters() if p.requires_grad]:
        raise ValueError(
            f"teacher_model_kind='base' is the student without its adapter, but weights of the model itself are trained too "
            f"({', '.join(trained[:2])}{' and more' if len(trained) > 2 else ''}), so it would move. Use an adapter that trains "
            "none of them (bias='none'), or give the base model as teacher_model."
        )
    return teacher


class WeightsAsLoaded:
    """What a model's weights were before it got an adapter, as far as a few numbers of each tell."""

    def __init__(self, model: nn.Module):
        self.numbers = {weight: some_numbers(weight).cpu() for weight in model.parameters()}

    def check(self) -> None:
        """
        Raises:
            `ValueError`: if the adapter has changed them, so the model without it is another one.
        """
        if not all(torch.equal(some_numbers(weight).cpu(), numbers) for weight, numbers in self.numbers.items()):
            raise ValueError(_NOT_THE_BASE.format(found="its adapter began by changing its weights"))


def _copy_sharing(model: nn.Module, shared: Iterable[nn.Parameter]) -> PreTrainedModel:
    """A copy of the module around the same `shared` parameters."""
    return copy_around(model, {id(parameter): parameter for parameter in shared})  # type: ignore[return-value]


def check_self_teacher(kind: str, accelerator: Accelerator, student: nn.Module) -> None:
    """
    Raises:
        `ValueError`: where the student's tensors are spread over processes, and nobody else can use them.
    """
    if shards_the_student(accelerator) or is_sharded(student):
        instead = (
            " or give its name or path as teacher_model, which is then a model by itself" if kind == "base" else ""
        )
        raise ValueError(
            f"teacher_model_kind={kind!r} uses the student's own tensors, which ZeRO-3 and FSDP2 spread over the processes and "
            f"gather for the student's forward alone. Launch with DDP, ZeRO-1 or ZeRO-2{instead}."
        )


class StudentAverage(TrainerCallback):
    """Moves an `ema` teacher towards the student after the optimizer's steps, and keeps it in checkpoints.

    Args:
        teacher, student (`nn.Module`): the pair, unwrapped; what they do not share is averaged.
        update_rate (`float`): the share of its distance to the student that the teacher moves.
        sync_steps (`int`): it moves after every so many optimizer steps.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, update_rate: float, sync_steps: int):
        theirs = dict(student.named_parameters())
        pairs = {name: (own, theirs[name]) for name, own in teacher.named_parameters() if own is not theirs[name]}
        self.pairs, self.update_rate, self.sync_steps = pairs, update_rate, sync_steps
        self.shared = {name: own for name, own in teacher.named_parameters() if own is theirs[name]}
        # In 16 bits a small share of a small distance is rounded away, and the average would never move.
        self.precise = {name: own.detach().float() for name, (own, _) in pairs.items() if own.dtype.itemsize < 4}

    def check_shared(self) -> None:
        """
        Raises:
            `RuntimeError`: if weights that the teacher has of the student, as they were frozen, are trained.
        """
        if trained := [name for name, parameter in self.shared.items() if parameter.requires_grad]:
            raise RuntimeError(
                f"The student's {trained[0]} ({len(trained)} in all) was frozen when its teacher was made, so the teacher has it too and it is "
                "not averaged; now it is trained. Unfreeze it before the trainer is made."
            )

    @torch.no_grad()
    def on_train_begin(self, args, state, control, **kwargs):
        self.check_shared()
        # An engine may have put the student's weights elsewhere, or in another type. A resumed average is here already, in fp32.
        for name, (own, theirs) in self.pairs.items():
            if theirs.dtype.itemsize < 4:
                self.precise[name] = self.precise.get(name, own).detach().to(theirs.device, torch.float32)
            own.data = own.data.to(theirs.device, theirs.dtype)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        self.check_shared()
        if state.global_step % self.sync_steps != 0:
            return
        for name, (own, theirs) in self.pairs.items():
            average = self.precise[name] if name in self.precise else own
            average.lerp_(theirs.to(average.device, average.dtype), self.update_rate)
            if average is not own:
                own.copy_(average)

    def save(self, checkpoint: str) -> None:
        """Writes the average into a checkpoint; by one process."""
        tensors = {
            name: self.precise.get(name, own).detach().cpu().contiguous() for name, (own, _) in self.pairs.items()
        }
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(checkpoint) / AVERAGE_FILE)

    @torch.no_grad()
    def load(self, checkpoint: str) -> None:
        """
        Raises:
            `ValueError`: if a checkpoint holds no average, or that of another model.
        """
        file = Path(checkpoint) / AVERAGE_FILE
        tensors = load_file(file) if file.exists() else {}
        if tensors.keys() != self.pairs.keys():
            raise ValueError(
                f"{checkpoint} holds {'an average of other weights' if tensors else f'no {AVERAGE_FILE}'}, so the teacher that the "
                "run had is not known. Resume from a checkpoint of a run with teacher_model_kind='ema' and save_only_model=False."
            )
        for name, (own, _) in self.pairs.items():
            own.copy_(tensors[name])
            if name in self.precise:
                self.precise[name].copy_(tensors[name])


class SharedTensors:
    """The student's tensors that its teacher has too."""

    def __init__(self, teacher: nn.Module, student: nn.Module):
        of_teacher = {id(parameter) for parameter in teacher.parameters()}
        self.tensors = {name: p for name, p in student.named_parameters() if id(p) in of_teacher}

    def check(self, student: nn.Module) -> None:
        """
        Raises:
            `RuntimeError`: if the student got other tensors since (something replaced them instead of writing into them);
                the teacher no longer moves with it.
        """
        now = dict(student.named_parameters())
        if lost := [name for name, parameter in self.tensors.items() if now.get(name) is not parameter]:
            raise RuntimeError(
                f"The student's {lost[0]} ({len(lost)} in all) is another tensor than when its teacher was made, so the teacher no "
                "longer moves with it. Load weights into the student before the trainer is made, or in place (load_state_dict)."
            )
