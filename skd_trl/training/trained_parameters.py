"""Does the student's loss reach any parameter that trains? Found by running it, whatever switched its parameters off.

Under gradient checkpointing, TRL's default, a loss that reaches nothing still has a gradient function: such a run would log a
loss to its end and move no weight. So the graph of one small forward is followed to its leaves.
"""

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..sampling.ragged_cache import attention_implementation, eval_mode, sampling_attention
from .distributed import is_sharded
from .findings import Verdict
from .router_logits import without_router_logits


def check_trained_parameters(student: PreTrainedModel) -> int:
    """The number of the student's parameter tensors that a loss trains; of a sharded student those that want a gradient.

    Raises:
        `ValueError`: if there are none, with how to get some.
    """
    trained = {parameter for parameter in student.parameters() if parameter.requires_grad}
    if trained and not is_sharded(student):
        input_ids = torch.tensor([[1, 2]], device=student.device)
        plain_attention = attention_implementation(student, sampling_attention(student))
        with torch.enable_grad(), eval_mode(student), plain_attention, without_router_logits(student):
            logits = student(input_ids=input_ids, use_cache=False).logits
        waiting, nodes = [logits.grad_fn], {None}
        while waiting:
            node = waiting.pop()
            if node not in nodes:
                nodes.add(node)
                waiting += [child for child, _ in node.next_functions]
        trained &= {getattr(node, "variable", None) for node in nodes}  # the leaves of the graph
    if not trained:
        raise ValueError(
            f"There is nothing to train: the student's loss reaches no parameter that requires a gradient. {_way_out(student)}"
        )
    return len(trained)


def reached_parameters(student: PreTrainedModel) -> tuple[Verdict, str]:
    """The finding that there is something to train. Raises as `check_trained_parameters`."""
    return Verdict.GOOD, f"The loss reaches {check_trained_parameters(student)} parameters of the student."


def lost_updates(student: PreTrainedModel, accelerator: Accelerator) -> tuple[Verdict, str]:
    """The finding on trained weights in 16 bits that an optimizer moves as they are. bf16 has three digits:
    a step below a 500th of a weight, as learning rates for fine-tuning make it, is rounded away."""
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    good = Verdict.GOOD, "The optimizer moves weights in fp32."
    if kind == "DEEPSPEED" or (kind == "FSDP" and precision != "no"):  # they keep weights in fp32 for the optimizer
        return good
    trained = [p for p in student.parameters() if p.requires_grad]
    small = [p for p in trained if p.dtype in (torch.bfloat16, torch.float16)]
    if not small:
        return good
    share = sum(p.numel() for p in small) / sum(p.numel() for p in trained)
    return Verdict.WARNING, (
        f"{share:.0%} of the weights that are trained are {str(small[0].dtype).removeprefix('torch.')}: most steps at usual learning "
        "rates are smaller than their rounding, and are lost. Load the student in float32 (dtype=torch.float32, or leave dtype out of "
        "model_init_kwargs) and leave bf16=True, which computes in bf16 all the same; or train an adapter, or with DeepSpeed, "
        "which keep weights in float32 for the optimizer."
    )


def _way_out(student: PreTrainedModel) -> str:
    """Why it is so, as far as can be seen, and what to do."""
    layers = [module for module in student.modules() if hasattr(module, "merged_adapters")]
    if not layers:
        return (
            "All of its parameters have requires_grad=False: call model.requires_grad_(True), unfreeze what is to be trained, "
            "or give the trainer a peft_config."
        )
    if any(layer.merged for layer in layers):
        return (
            "Its adapter is merged into the frozen weights: call model.unmerge_adapter() to go on training the adapter, or "
            "model = model.merge_and_unload() and unfreeze that to train the whole model."
        )
    if any(layer.disable_adapters for layer in layers):
        return "Its adapter is switched off: call model.enable_adapter_layers() (and leave disable_adapter())."
    return (
        "It has an adapter that was loaded for inference: load it with PeftModel.from_pretrained(model, path, "
        "is_trainable=True), leave inference_mode of its configuration False, and make the adapter to train the active one "
        "with model.set_adapter(name)."
    )
