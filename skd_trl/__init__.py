"""Speculative knowledge distillation for TRL: SKD and SpecKD as subclasses of `GKDTrainer`."""

from .loss.divergences import DIVERGENCES
from .loss.gates import GATES
from .sampling.acceptance import ACCEPTANCE_RULES
from .sampling.interleaved import Execution, interleaved_sample
from .sampling.participants import LocalParticipant, Participant
from .sampling.rollout import Rollout
from .sampling.sampling_params import SamplingParams
from .skd_config import SKDConfig
from .skd_trainer import SKDTrainer
from .speckd_config import SpecKDConfig
from .speckd_trainer import SpecKDTrainer


__version__ = "0.1.0"

__all__ = [
    "ACCEPTANCE_RULES",
    "DIVERGENCES",
    "Execution",
    "GATES",
    "LocalParticipant",
    "Participant",
    "Rollout",
    "SKDConfig",
    "SKDTrainer",
    "SamplingParams",
    "SpecKDConfig",
    "SpecKDTrainer",
    "interleaved_sample",
]
