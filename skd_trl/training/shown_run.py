"""The part of the trainer that people look at: completions, the plan of the memory, the model card."""

import logging
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer

from .._compat import get_config_model_id
from ..data.batches import merge_prompts
from ..sampling.rollout import Rollout
from .completions import (
    completion_records,
    print_completions,
    save_completions,
    send_completions,
    with_prompt_texts,
)
from .machine import Machine
from .memory_advice import describe_plan
from .memory_plan import fitted_plan
from .model_card import add_distillation, describe_distillation


logger = get_logger(__name__)


class ShownRun(Trainer):
    """Shows what is sampled, what is held, and what the model is.
    A part of [`~skd_trl.SKDTrainer`], whose attributes it uses."""

    def add_callback(self, callback):
        # LogCompletionsCallback, WeaveCallback: they write to the prompts of the evaluation set, which are tokens by now.
        if getattr(callback, "eval_dataset", None) is not None and "eval_dataset" in vars(callback):
            callback.eval_dataset = with_prompt_texts(callback.eval_dataset, self.processing_class)
        super().add_callback(callback)

    def _log_plan(self) -> None:
        """Logs what the training will hold on a GPU, as a warning if it does not fit, and has caches kept if there is room for them."""
        if self.accelerator.device.type == "cpu" or not self._teacher.inner:
            return
        rows = (
            self.train_dataset["prompt_ids"]
            if isinstance(self.train_dataset, Dataset)
            else [range(self._rules.max_prompt_length or 1024)]
        )
        try:
            machine = Machine.of(self.accelerator)
            plan = fitted_plan(self.model, self._teacher.inner[0], machine, self.args, max(map(len, rows)))
        except Exception:  # whatever a model may do with tensors that hold nothing
            logger.warning("The memory of this training could not be planned; it starts all the same.", exc_info=True)
            return
        self._rounds.most_kept = plan.most_kept if plan.free else None
        logger.log(logging.INFO if plan.fits else logging.WARNING, describe_plan(plan, machine, self.args))

    def _keep_completions(self, sampled: Rollout, rollout: str) -> None:
        step = self.state.global_step + 1  # the step that these responses train
        every = self.args.log_completions_steps or max(int(self.state.logging_steps or self.args.logging_steps), 1)
        if not self.args.log_completions or (step % every != 0 and step != 1):
            return
        records = completion_records(sampled, self.processing_class, step)
        if self.args.log_fixed_prompts:
            # The same few prompts with the same noise every time, on the first process: what differs is the student.
            dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
            dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
            num_rows = self.args.log_fixed_prompts if self.accelerator.is_main_process else 0
            rows = list(dataset.take(max(num_rows, 1)))
            num_rows, prompts = min(num_rows, len(rows)), merge_prompts([self.data_collator(rows)])
            window = {name: values[:num_rows].to(self.args.device) for name, values in prompts.items()}
            fixed = self._write(window, rollout, self._noise(num_rows, "fixed prompts"))
            records = completion_records(fixed, self.processing_class, step, is_fixed=True) + records
        records = sorted(gather_object(records), key=lambda record: not record["is_fixed"])
        if self.accelerator.is_main_process:
            writers = (getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks)
            try:
                save_completions(records, self.args.output_dir, step)
                print_completions(records, self.args.num_completions_to_print, step)
                send_completions(records, step, self.args.report_to, next(filter(None, writers), None))
            except Exception as error:
                # A full disk, a closed console, a tracker out of reach: no reason to lose a run.
                logger.warning(f"Step {step}: its completions could not be kept or shown ({error}). Training goes on.")

    def create_model_card(self, model_name: str | None = None, *args, **kwargs):
        """As [`~transformers.Trainer.create_model_card`], with what this distillation was."""
        super().create_model_card(model_name or Path(self.args.output_dir).resolve().name, *args, **kwargs)
        if not self.is_world_process_zero():
            return
        if self._is_recorded:
            teacher = "recorded scores"
        elif self._is_served:
            top_k = f"its {self.args.teacher_top_k} most probable tokens"
            signal = top_k if self.args.teacher_signal == "top_k" else "its last hidden states"
            teacher = f"{self._teacher.scorer.model} behind a server, {signal}"
        elif self.args.teacher_model_kind is not None:
            teacher = f"the student itself ({self.args.teacher_model_kind})"
        else:
            sources = [get_config_model_id(model.config) or "unnamed" for model in self._teacher.inner]
            names = [f"{name}: " for name in self._teacher_names] or [""]
            teacher = ", ".join(name + source for name, source in zip(names, sources, strict=True))
        student = get_config_model_id(self._inner_student().config) or "unnamed"
        add_distillation(
            Path(self.args.output_dir) / "README.md", describe_distillation(self, student, teacher), student
        )
