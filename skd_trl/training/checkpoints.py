"""What a run's draft length has learned, kept in its checkpoints: a resumed run then chooses as it would have.

Measured costs are valid for the device, engine and precision they were measured on. A run that continues with others measures
again.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from ..sampling.draft_length import DraftLength
from ..skd_config import SKDConfig
from .run_files import read_if_whole


def save_draft_length(policy: DraftLength, checkpoint: str, accelerator: Accelerator, args: SKDConfig) -> None:
    """Writes `draft_length_{rank}.json` into a checkpoint, if the policy of this process has learned anything."""
    if state := policy.state_dict():
        file = _file(checkpoint, accelerator)
        file.parent.mkdir(parents=True, exist_ok=True)  # this process may be here before the first
        file.write_text(json.dumps({"measured_on": _circumstances(accelerator, args), "state": state}))


def load_draft_length(policy: DraftLength, checkpoint: str, accelerator: Accelerator, args: SKDConfig) -> None:
    """Gives the policy what this process saved there, if forwards take the times that they took."""
    content = read_if_whole(_file(checkpoint, accelerator))
    if content is not None and content["measured_on"] == _circumstances(accelerator, args):
        policy.load_state_dict(content["state"])


def _file(checkpoint: str, accelerator: Accelerator) -> Path:
    return Path(checkpoint) / f"draft_length_{accelerator.process_index}.json"


def _circumstances(accelerator: Accelerator, args: SKDConfig) -> dict:
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": accelerator.num_processes,
        "engine": accelerator.distributed_type.value,
        "precision": accelerator.mixed_precision,
        "gathered": args.ds3_gather_for_generation,
        "compiled": args.compile_student,
    }
