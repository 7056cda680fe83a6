"""Does the student's loss reach any parameter that trains? Found by running it, whatever switched its parameters off.

Under gradient checkpointing, TRL's default, a loss that reaches nothing still has a gradient function: such a run would log a
loss to its end and move no weight. So the graph of one small forward is followed to its leaves.
"""

import torch
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
    found = f"The loss reaches {check_trained_parameters(student)} parameters of the student."
    configs = getattr(student, "peft_config", {}).values()
    if any(getattr(config, "orth_reg_weight", None) for config in configs):
        return Verdict.WARNING, (
            f"{found} AdaLoRA's orth_reg_weight has no effect: peft adds its term to the loss that it computes from labels, and a "
            "distillation has another loss. Set it to 0, or train a LoRA adapter."
        )
    return Verdict.GOOD, found


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
