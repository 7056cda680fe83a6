"""Put on PYTHONPATH to run `accelerate launch` with several processes on a machine without GPUs; Python imports it first.

Acts in the processes that train only. Test equipment: none of it is wanted on GPUs.
"""

import os


def fsdp_on_cpu() -> None:
    """accelerate turns FSDP on for accelerators only; on CPU it would silently train with DDP."""
    import torch.distributed as dist
    from accelerate.state import DistributedType, PartialState

    def prepare_backend(self, *args, **kwargs):
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = prepare_backend


def without_compiler() -> None:
    """DeepSpeed would compile an operation at its first start that only inference uses."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if "LOCAL_RANK" in os.environ:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_compiler()
