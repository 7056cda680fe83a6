"""An engine is made for one training. Evaluating before it, and training once more after it, need another one, or none.

The Trainer makes an engine at the first evaluation or training, and then fails at the next with errors of DeepSpeed's or
accelerate's. What can be made to work here works; what would lose the optimizer's state is refused.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._compat import remove_hooks
from .distributed import is_sharded


@contextmanager
def engine_for_evaluation(trainer: Any) -> Iterator[None]:
    """Inside, the student of `trainer` (a [`~transformers.Trainer`]) can be evaluated, and afterwards trained as if it had not been.

    During and after a training there is an engine. Before it FSDP2's is made already; ZeRO-1 and 2 leave the student whole, which
    needs none; ZeRO-3 gets one that is taken down again, its parameters stay sharded.
    """
    if trainer.model_wrapped is not trainer.model or trainer.is_in_train:
        yield
    elif trainer.is_fsdp_enabled:
        if not is_sharded(trainer.model):
            trainer.create_optimizer()  # FSDP2 replaces the parameters, and the optimizer has to know
            model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
            trainer.model = trainer.model_wrapped = model
        yield
    elif not trainer.is_deepspeed_enabled:
        yield
    elif trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
        before = copy.deepcopy(config)
        try:
            yield
        finally:
            if trainer.model_wrapped is not trainer.model:
                remove_hooks(trainer.model_wrapped)
            trainer.model_wrapped, trainer.deepspeed = trainer.model, None
            trainer.accelerator.free_memory()
            config.clear()  # an evaluation takes the optimizer out, and fills numbers in
            config.update(before)
    else:
        trainer.is_deepspeed_enabled = False
        try:
            yield
        finally:
            trainer.is_deepspeed_enabled = True
            trainer.accelerator.free_memory()


def check_first_training(trainer: Any) -> None:
    """Refuses a second training in DeepSpeed's engine, whose optimizer is taken down when another training begins.

    Raises:
        `ValueError`: with how to go on.
    """
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        raise ValueError(
            "train() is called a second time, and DeepSpeed's engine of the first cannot go on: its optimizer's state would be lost. "
            "Make a new trainer with the same output_dir and more steps and call train(resume_from_checkpoint=True), or a new one on "
            "the saved student."
        )
