"""Speculative knowledge distillation for TRL: SKD and SpecKD as subclasses of `GKDTrainer`."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .loss.divergences import DIVERGENCES, Divergence
    from .loss.gates import GATES, Gate
    from .loss.response_facts import ResponseFacts
    from .sampling.acceptance import ACCEPTANCE_RULES, AcceptanceRule
    from .sampling.draft import Draft, Judgement
    from .sampling.draft_length import AutoDraftLength
    from .sampling.interleaved import Execution, interleaved_sample
    from .sampling.participants import LocalParticipant, Participant
    from .sampling.prompts import Prompts
    from .sampling.rollout import Rollout
    from .sampling.rounds import Rounds
    from .sampling.sampling_params import SamplingParams
    from .schedules import Schedule
    from .skd_config import SKDConfig
    from .skd_trainer import SKDTrainer
    from .speckd_config import SpecKDConfig
    from .speckd_trainer import SpecKDTrainer


__version__ = "0.1.0"

__all__ = [
    "ACCEPTANCE_RULES",
    "AcceptanceRule",
    "AutoDraftLength",
    "DIVERGENCES",
    "Divergence",
    "Draft",
    "Execution",
    "GATES",
    "Gate",
    "Judgement",
    "LocalParticipant",
    "Participant",
    "Prompts",
    "ResponseFacts",
    "Rollout",
    "Rounds",
    "SKDConfig",
    "SKDTrainer",
    "SamplingParams",
    "Schedule",
    "SpecKDConfig",
    "SpecKDTrainer",
    "interleaved_sample",
]

# Where they are: `skd --help` should not wait for torch and TRL.
_MODULES = {
    "ACCEPTANCE_RULES": "sampling.acceptance",
    "AcceptanceRule": "sampling.acceptance",
    "AutoDraftLength": "sampling.draft_length",
    "DIVERGENCES": "loss.divergences",
    "Divergence": "loss.divergences",
    "Draft": "sampling.draft",
    "Execution": "sampling.interleaved",
    "GATES": "loss.gates",
    "Gate": "loss.gates",
    "Judgement": "sampling.draft",
    "LocalParticipant": "sampling.participants",
    "Participant": "sampling.participants",
    "Prompts": "sampling.prompts",
    "ResponseFacts": "loss.response_facts",
    "Rollout": "sampling.rollout",
    "Rounds": "sampling.rounds",
    "SKDConfig": "skd_config",
    "SKDTrainer": "skd_trainer",
    "SamplingParams": "sampling.sampling_params",
    "Schedule": "schedules",
    "SpecKDConfig": "speckd_config",
    "SpecKDTrainer": "speckd_trainer",
    "interleaved_sample": "sampling.interleaved",
}


if not TYPE_CHECKING:  # where every name would be one

    def __getattr__(name: str):
        if name in _MODULES:
            value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
            return value
        if name.startswith("__") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for module in _MODULES.values():  # a package in it, with what it has once all is loaded
            import_module(f".{module}", __name__)
        return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
