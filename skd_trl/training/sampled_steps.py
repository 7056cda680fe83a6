"""The part of the trainer that has responses written: those of a whole optimizer step before its first backward.

Shapes: B rows, P prompt, T response.
"""

import time
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from transformers import Trainer

from ..data.batches import Key, ResponseTokens, merge_prompts
from ..data.mixed_batches import mix_sampled_rows
from ..loss.teacher_signal import TeacherSignal
from ..sampling.interleaved import Execution, interleaved_sample
from ..sampling.participants import LocalParticipant
from ..sampling.rollout import Rollout
from ..serving.client import TeacherServerError
from ..serving.routes import ServerRefusal
from .console import SamplingBar
from .distributed import (
    agree_on_maximum,
    forwards_are_collective,
    forwards_forgotten,
    keyed_generator,
    student_for_sampling,
)
from .machine import Machine
from .memory_advice import out_of_memory_advised
from .memory_count import Window, likely_draft
from .memory_places import places_now
from .metrics import (
    add_rollout,
    add_rollout_by_teacher,
)
from .router_logits import without_router_logits
from .sampled_batches import sampled_batches
from .sampling_copy import CopySettings
from .served import failing_at_the_end


class SampledSteps(Trainer):
    """Decides who writes the responses of an optimizer step, and has them written.
    A part of [`~skd_trl.SKDTrainer`], whose attributes it uses."""

    @contextmanager
    def _server_awaited(self):
        """The time in which a teacher's server is asked. If one process gives it up, all of them write a checkpoint, in a training, and
        end. Nothing else inside waits for other processes: what one of them skips the others would wait for."""
        if not self._is_served:
            yield
            return
        failure = None
        try:
            yield
        except (TeacherServerError, ServerRefusal) as error:
            failure = error
        if agree_on_maximum(self.accelerator)(int(failure is not None))[0]:
            if self.is_in_train and self.state.global_step > 0:
                self._save_checkpoint(self.model, trial=None)
            raise failure or TeacherServerError("Another process has given up the teacher's server.")

    def _ask_server(self, batches: list[dict]) -> None:
        """A served teacher's signal of these batches, left in them: no forward of the student's waits for it."""
        with self._server_awaited():
            for batch in batches if self._is_served else []:
                tokens = ResponseTokens.of(batch)
                self._teacher.keep(batch, tokens, self._teacher.signal(batch, tokens))

    def _teacher_signal(self, batch: dict[str, torch.Tensor], tokens: ResponseTokens) -> TeacherSignal:
        """What is known of the teacher at the response tokens of a micro-batch."""
        with self._teacher_products():
            return self._teacher.signal(batch, tokens)

    @contextmanager
    def _teacher_products(self):
        """The time in which a CPU multiplies with packed copies of the teachers' weights, outside rounds too."""
        with ExitStack() as stack:
            for model in self._teacher.inner:
                stack.enter_context(self._rounds.packed.products(model))
            yield

    def _rollout_of_step(self, step: int) -> str:
        """Who writes the responses of a step, or `"mixed"`: a keyed draw, so ranks agree and a resumed run repeats itself."""
        lmbda = self._args_of_step.lmbda
        if self.args.rollout != "dataset" and lmbda > 0:
            if self.args.lmbda_unit == "prompt" and lmbda < 1:
                return "mixed"
            if torch.rand((), generator=keyed_generator("lmbda", self.args.seed, step)).item() < lmbda:
                return self.args.rollout
        return "teacher" if self.seq_kd else "dataset"

    def _sample(self, batches: list[dict], rollout: str) -> list[dict]:
        """The micro-batches with sampled responses: at all of their rows, or for `"mixed"` at a share `lmbda` of them. Which ones is a
        draw keyed by step, rank and row. A rank without any takes part in the others' sampling: models may be sharded, and completions
        are gathered."""
        start = time.perf_counter()
        window, is_sampled = merge_prompts(batches), None
        key = (self.state.global_step, self.accelerator.process_index)
        if rollout == "mixed":
            rollout = self.args.rollout
            chosen = torch.rand(len(window[Key.PROMPTS]), generator=keyed_generator("lmbda", self.args.seed, *key))
            is_sampled = chosen < self._args_of_step.lmbda
            window = {name: values[is_sampled.to(values.device)] for name, values in window.items()}
        sampled = self._write(window, rollout, self._noise(len(window[Key.PROMPTS]), "sampling", *key))
        if self._teacher_names:
            add_rollout_by_teacher(self._ratios["train"], sampled, window[Key.TEACHER_INDEX], self._teacher_names)
        add_rollout(self._ratios["train"], sampled, time.perf_counter() - start, self.accelerator.num_processes)
        self._keep_completions(sampled, rollout)
        if is_sampled is not None:
            return mix_sampled_rows(batches, sampled_batches(sampled, [window]), is_sampled, self.data_collator)
        return sampled_batches(sampled, batches)

    def _noise(self, num_rows: int, *key) -> torch.Tensor:
        """Uniform numbers (B, T, 3) that depend on the seed and the key alone."""
        generator = keyed_generator(key[0], self.args.seed, *key[1:])
        return torch.rand((num_rows, self.args.max_new_tokens, 3), generator=generator)

    def _write(self, window: dict[str, torch.Tensor], rollout: str, noise: torch.Tensor) -> Rollout:
        """Sampled responses to the left-padded prompts (B, P) of both models, of which a rank may have none, on noise (B, T, 3);
        collective where the models are, and where the teacher is served."""
        prompts, mask = window[Key.PROMPTS], window[Key.PROMPT_ATTENTION_MASK]
        is_shown = self.accelerator.is_main_process and not self.args.disable_tqdm
        if self._shared is not None:
            self._shared.check(self.accelerator.unwrap_model(self.model))
        with (
            self._server_awaited(),
            SamplingBar(
                self.args.max_new_tokens, f"step {self.state.global_step + 1}: sampling ", disable=not is_shown
            ) as observe,
            student_for_sampling(self.model_wrapped, self.accelerator, self.args.ds3_gather_for_generation) as student,
            self.compute_loss_context_manager(),
            without_router_logits(self._inner_student(), *self._teacher.inner),
            # `torch_compile` is for the training step: every round has another shape, and would be compiled again.
            nullcontext() if self.args.compile_student else torch.compiler.set_stance("force_eager"),
            out_of_memory_advised("sampling"),
            forwards_forgotten(student, *self._teacher.inner),
        ):
            collective = self.accelerator.num_processes > 1 and forwards_are_collective(student, *self._teacher.inner)
            agree = agree_on_maximum(self.accelerator) if collective else None
            is_gpu = self.accelerator.device.type == "cuda"
            settings = CopySettings.of(student, self.args, self.accelerator.mixed_precision, is_gpu)
            if settings.is_needed:
                student = self._sampling_copy.of(student, settings)
            num_places = self.args.rollout_batch_size
            at_once = min(num_places or len(prompts), len(prompts))
            if self._teacher.inner and at_once > 1:  # fewer, if only those fit
                shape = len(prompts), prompts.shape[1], self.args.max_new_tokens, len(prompts)
                counted = Window(at_once, *shape, num_draft_tokens=likely_draft(self.args))
                machine, kept = Machine.of(self.accelerator), self._rounds.num_kept_bytes
                num_places = places_now(student, self._teacher.inner[0], machine, counted, kept)
            teacher = self._teacher.participant(
                window, self._args_of_step.teacher_sampling(), self.vocab_size, self.accelerator
            )
            with failing_at_the_end(teacher, self._teacher) if collective else nullcontext():
                return interleaved_sample(
                    LocalParticipant(student, self._args_of_step.student_sampling(), vocab_size=self.vocab_size),
                    teacher,
                    prompts,
                    mask,
                    accept=self._args_of_step.acceptance_rule(rollout),
                    max_new_tokens=self.args.max_new_tokens,
                    eos_token_ids=self.eos_token_ids,
                    noise=noise,
                    execution=Execution(self._draft_length, num_places, agree, self._rounds, observe=observe),
                )
