"""`skd env`: what an issue should say of the machine and the packages on it."""

import platform

import torch

from ..training.run_files import installed_versions
from .options import Command


PACKAGES = (
    "skd_trl", "trl", "transformers", "torch", "datasets", "accelerate", "peft", "tokenizers", "deepspeed", "bitsandbytes",
    "vllm", "flash_attn", "liger_kernel", "rouge-score", "matplotlib", "wandb", "trackio", "tensorboard",
)  # fmt: skip
ENV = Command(
    "env", "Lists the versions of Python, of the packages that matter here, and the accelerators. For issues.", ()
)


def run(arguments: list[str]) -> int:
    """The command itself."""
    ENV.parse(arguments)
    lines = {"platform": platform.platform(), "python": platform.python_version(), **installed_versions(PACKAGES)}
    lines["accelerators"] = ", ".join(accelerators()) or "none"
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0


def accelerators() -> list[str]:
    """The GPUs that torch sees, with their memory."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in found]
    return ["Apple MPS"] if torch.backends.mps.is_available() else []
