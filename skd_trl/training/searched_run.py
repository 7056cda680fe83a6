"""The part of the trainer for hyperparameter searches: each trial has a new student and other numbers."""

from transformers import Trainer

from .distributed import name_layers_to_shard
from .ends_of_sequence import stop_at
from .findings import is_incomplete, require
from .forward_patches import take_off_patches
from .limits import room_for_prompts
from .models import base_model, disable_dropout
from .pair_check import check_pair, check_placed
from .quantised import keep_gradients
from .sampling_copy import check_merging


class SearchedRun(Trainer):
    """Sets up the student and the numbers of a trial.
    A part of [`~skd_trl.SKDTrainer`], whose attributes it uses."""

    def call_model_init(self, trial=None):
        """A new student of a hyperparameter search, set up as the one that the trainer was constructed with."""
        model = super().call_model_init(trial)
        if self._has_adapter and base_model(model) is model:
            raise ValueError(
                "model_init returned a model without an adapter, and this trainer was given one (peft_config). Return "
                "get_peft_model(model, peft_config), so the same parameters train in every trial."
            )
        take_off_patches(model)
        keep_gradients(model)
        name_layers_to_shard(model)
        if self.args.teacher_model_kind is not None:
            raise ValueError(
                f"teacher_model_kind={self.args.teacher_model_kind!r} is a teacher around the tensors of the first student, and a search "
                "makes others. Search with the model as teacher_model, or construct a trainer for each trial."
            )
        # Rows were prepared for the student that the trainer was constructed with: another one needs no fewer ids and positions.
        student, longest = base_model(model), self._rules.max_prompt_length
        num_ids, room = student.config.get_text_config().vocab_size, room_for_prompts(self.args, student, student)
        is_short_of_ids = num_ids < self.vocab_size
        if is_short_of_ids or (room is not None and (longest is None or longest > room)):
            found = f"{num_ids} ids" if is_short_of_ids else f"room for prompts of {room} tokens"
            needed = f"{self.vocab_size} ids" if is_short_of_ids else f"prompts of up to {longest}"
            raise ValueError(
                f"model_init returned a student with {found}, and the trainer was constructed with one whose rows need {needed}. Construct "
                "it with the smallest of the students, or make a trainer for each."
            )
        if self.args.merge_adapter:
            check_merging(model, self.accelerator)
        for teacher in self._teacher.inner or [student]:
            findings = check_pair(student, teacher, self.processing_class, self.args)
            require(findings)
            if is_incomplete(findings):
                require(check_placed(student, teacher, self.processing_class, self.args, self.accelerator))
        if self.args.disable_dropout:
            disable_dropout(model)
        stop_at(student, self.eos_token_ids)
        return model

    def _hp_search_setup(self, trial) -> None:
        super()._hp_search_setup(trial)
        if self.hp_search_backend is not None and trial is not None:
            self.args.check_numbers()  # they were set one by one, unseen
            self._set_attributes()
            self._draft_length = self.args.draft_length()
