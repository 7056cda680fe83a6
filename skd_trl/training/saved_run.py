"""The part of the trainer that saves and resumes: whole weights, read back; what a schedule or an average needs to go on."""

from contextlib import nullcontext
from pathlib import Path

from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from .checkpoints import load_draft_length, save_draft_length
from .engine_settings import check_batches
from .finite_check import require_finite_weights
from .length_sampler import KeyedLengthSampler
from .run_files import read_if_whole
from .saved_weights import check_saved, load_renamed, whole_parameters, whole_weights, writes_shards
from .whole_checkpoints import check_resumable, last_whole_checkpoint


logger = get_logger(__name__)


class SavedRun(Trainer):
    """Saves what a user and a resumed run need.
    A part of [`~skd_trl.SKDTrainer`], whose attributes it uses."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As [`~transformers.Trainer.train`]; `True` resumes from the newest checkpoint that is whole.

        Raises:
            `ValueError`: if there is none, one that an engine cannot resume from, or one of the last step.
        """
        check_batches(self.train_dataset, self.args, self.accelerator)
        if resume_from_checkpoint is True:
            newest = last_whole_checkpoint(self.args.output_dir)
            if newest is None:
                raise ValueError(f"{self.args.output_dir} has no whole checkpoint to resume from; start without one.")
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.accelerator, self.args.max_steps)
        if resume_from_checkpoint and isinstance(self.train_dataset, IterableDataset):
            state = read_if_whole(Path(resume_from_checkpoint) / "trainer_state.json") or {}
            if state.get("epoch", 0) > 1 and not self.args.ignore_data_skip:
                logger.warning(
                    f"{resume_from_checkpoint} is from a later pass over the stream. The Trainer skips rows of one pass alone, so this run goes on "
                    "with other rows than the interrupted one would have had."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        """As [`~transformers.Trainer._get_train_sampler`]; rows grouped by length have an order that a resumed run has too."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return KeyedLengthSampler(sampler, seed) if type(sampler) is LengthGroupedSampler else sampler

    def get_train_dataloader(self):
        """As [`~transformers.Trainer.get_train_dataloader`]; on several processes accelerate's loaders that skip batches find the sampler."""
        loader = super().get_train_dataloader()
        of_all = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
        if isinstance(sampler := getattr(of_all, "sampler", None), KeyedLengthSampler):
            loader.set_sampler(sampler)
        return loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`], with whole weights whatever the engine's configuration says of its checkpoints.
        Weights that are not finite are not written over good ones, and what was written is read back and counted."""
        output_dir = output_dir or self.args.output_dir
        require_finite_weights(self._inner_student(), self.state.global_step, output_dir, self.accelerator)
        if self.is_deepspeed_enabled and self.deepspeed is None:  # before training there is no engine to ask
            with whole_parameters(self.model):
                return self._save(output_dir)
        is_checkpoint_of_shards = _internal_call and writes_shards(self.accelerator)
        with nullcontext() if is_checkpoint_of_shards else whole_weights(self.accelerator, self.model_wrapped):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and not is_checkpoint_of_shards:
            check_saved(self.model, output_dir)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        # The Trainer pickles its arguments beside the weights, and not every idea given as an object can be pickled.
        args, self.args = self.args, self.args.described()
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
        student = self._inner_student()
        if student is not self.accelerator.unwrap_model(self.model) and student.generation_config is not None:
            # An adapter is saved without its base model's.
            student.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_draft_length(self._draft_length, output_dir, self.accelerator, self.args)
        if self._average is not None and self.accelerator.is_main_process:
            self._average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        self._load_renamed(best)
        if self._average is None:
            return
        if self.args.save_only_model:
            logger.warning(
                f"{best} holds weights alone (save_only_model=True): the average that teaches stays that of the last step."
            )
        else:
            self._average.load(best)

    def _load_renamed(self, checkpoint: str) -> None:
        student = self._inner_student()
        is_whole = not (
            self.is_deepspeed_enabled or self.is_fsdp_enabled
        )  # engines save and load under the modules' names
        if is_whole and student is self.accelerator.unwrap_model(self.model):  # of an adapter there are no other names
            load_renamed(student, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_draft_length(self._draft_length, checkpoint, self.accelerator, self.args)
        if checkpoint is not None and self._average is not None:
            self._average.load(checkpoint)
