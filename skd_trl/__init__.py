"""Speculative knowledge distillation for TRL: SKD and SpecKD as subclasses of `GKDTrainer`."""

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
