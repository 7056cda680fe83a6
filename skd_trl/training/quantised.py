"""A student whose frozen weights are 4-bit, by bitsandbytes, on a CPU: they stay in the form that has a gradient.

On CPUs with AVX512-BF16 bitsandbytes packs these weights in the first forward in eval mode, for a faster product, and that
product has no gradient: adapters below the last layers would then train nothing. Evaluation and sampling are such forwards.
"""

from torch import nn


def keep_gradients(student: nn.Module) -> None:
    """Switches the packing off in the layers of `student`.

    Raises:
        `ValueError`: if its weights are packed already.
    """
    for name, module in student.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"The student's 4-bit weights ({name}) were packed for inference by a forward in eval mode on the CPU, such as a "
                "`generate`, and what is packed has no gradient. Load the student again and give it to the trainer before it "
                "runs, or train it on a GPU."
            )
