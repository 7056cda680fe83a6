"""The part of the trainer that evaluates: sets are prepared as the training set is, and metrics are sums over a set, divided once."""

from dataclasses import replace

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer

from ..data.batches import (
    Key,
    ResponseTokens,
    merge_prompts,
)
from ..data.mixed_batches import mix_sampled_rows
from ..data.streams import DealtStream
from .engine_lifetime import engine_for_evaluation
from .metrics import (
    num_own_rows,
    with_prefix,
    without_filled_rows,
)
from .sampled_batches import sampled_batches
from .sampled_evaluation import any_on_any_process, row_noise, rows_to_sample


class EvaluatedRun(Trainer):
    """Evaluates on references, and on a response of the student where a row has none.
    A part of [`~skd_trl.SKDTrainer`], whose attributes it uses."""

    def _prepare_eval(self, dataset, student: PreTrainedModel):
        """Prepared evaluation sets: one, a dict of them, or none."""
        if isinstance(dataset, dict):
            return {name: self._prepare_eval_set(split, name, student) for name, split in dataset.items()}
        return None if dataset is None else self._prepare_eval_set(dataset, "eval", student)

    def _prepare_eval_set(self, dataset, name: str, student: PreTrainedModel) -> Dataset | IterableDataset:
        """The prepared set; what is prepared already (the trainer's own sets, those of a dict) stays as it is."""
        prepared = dataset
        if not any(dataset is known for known in self._prepared_sets):
            rules = replace(self._rules, needs_response=self._is_recorded, reads_response=True)
            with self._main_process_first():
                prepared = self._prepare(dataset, rules=rules, name=name)
            self._prepared_sets.add(prepared)
        self._check_sampled_evaluation(prepared, name, student)
        return prepared

    def _prepare_given(self, dataset):
        """One or several sets that an evaluation is given, prepared and checked."""
        prepared = self._prepare_eval(dataset, self._inner_student())
        for name, one in prepared.items() if isinstance(prepared, dict) else (("eval", prepared),):
            self._check_scored(one, name)
        return prepared

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_given(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As [`~transformers.Trainer.predict`], on the responses and with the metrics of an evaluation."""
        return super().predict(self._prepare_given(test_dataset), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As [`~transformers.Trainer.evaluation_loop`], with this trainer's metrics under the prefix. They, and the loss, are sums
        over the tokens of the set, divided once: no batch size changes them, unless a gate compares the tokens of a batch."""
        self._ratios["eval"].reset()
        self._num_evaluated = 0  # rows so far, on all processes
        with engine_for_evaluation(self):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._ratios["eval"].compute(self.accelerator)
        if metrics.get("sampled_share") == 0:
            del metrics["sampled_share"]
        output.metrics.update(with_prefix(metrics, f"{metric_key_prefix}_"))
        return output

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        num_processes = self.accelerator.num_processes
        if isinstance(dataset, IterableDataset) and num_processes > 1:
            dataset = DealtStream(dataset, 1 if is_training else batch_size * num_processes)
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def _get_eval_sampler(self, eval_dataset):
        """In the order of the set, where training groups rows by length too: a row's noise depends on its place."""
        return SequentialSampler(eval_dataset) if hasattr(eval_dataset, "__len__") else None

    def _count_last_rows(self, inputs: dict[str, torch.Tensor], num_own: int) -> None:
        """Tells accelerate how many rows of a stream's last batch are no filling, which it cuts from what it gathers; collective."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes > 1 and Key.SKIPPED_ROWS in inputs and state.end_of_dataloader:
            count = torch.tensor(num_own, device=self.accelerator.device)
            state.active_dataloader.remainder = int(self.accelerator.reduce(count, "sum"))

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As [`~transformers.Trainer.prediction_step`]; before, rows without a reference get a response of the student's, and the batch
        the places of its rows."""
        size, rank, metrics = len(inputs[Key.LABELS]), self.accelerator.process_index, self._ratios["eval"]
        place = self._num_evaluated + rank * size + torch.arange(size)
        self._num_evaluated += self.accelerator.num_processes * size
        is_missing, num_own = rows_to_sample(inputs, self.accelerator), num_own_rows(inputs, self.accelerator)
        metrics.add("sampled_share", is_missing.sum(), num_own)
        self._count_last_rows(inputs, num_own)
        if any_on_any_process(is_missing, self.accelerator):
            noise = row_noise(place[is_missing].tolist(), self.args.max_new_tokens, self.args.seed)
            some = {name: values[is_missing.to(values.device)] for name, values in merge_prompts([inputs]).items()}
            rollout = self._write(some, "student", noise)
            metrics.add("response_length", rollout.num_tokens, int(is_missing.sum()))
            metrics.add("truncated_share", rollout.num_truncated, int(is_missing.sum()))
            (inputs,) = mix_sampled_rows([inputs], sampled_batches(rollout, [some]), is_missing, self.data_collator)
        inputs = without_filled_rows({**inputs, Key.PLACE: place}, num_own)
        self._ask_server([inputs])
        self._loss_factor = None  # that of `compute_loss`, unless a subclass never calls it
        output = super().prediction_step(model, inputs, *args, **kwargs)
        if output[0] is not None:
            num_tokens = len(ResponseTokens.of(inputs).labels)
            divisor = num_tokens if self._loss_factor is None else 1 / self._loss_factor
            metrics.add("loss", output[0] * divisor, num_tokens)
        return output
