"""`SKDTrainer`: GKDTrainer with interleaved sampling and a loss that counts what it is trained on.

Glue: who writes the responses is `sampling/interleaved.py`, what they cost is `loss/`, rows are `data/`, ranks and models are
`training/`. Shapes: B rows of a micro-batch, P prompt, T response, N response tokens of a micro-batch, H hidden.
"""

import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction

from ._compat import GKDTrainer
from .data.batches import IGNORE_INDEX, DataCollatorForDistillation, Key, ResponseTokens, merge_prompts, model_inputs
from .data.dataset import prepare_dataset
from .data.mixed_batches import mix_sampled_rows
from .data.vocabulary import end_of_sequence_ids, shared_vocab_size
from .inherited_options import asks_for_lengths
from .loss.distillation_loss import DistillationLoss, distillation_loss
from .loss.gates import Gate, GateWeights
from .loss.lm_head import LMHead
from .loss.response_facts import ResponseFacts
from .loss.teacher_signal import HiddenStates
from .sampling.interleaved import Execution, interleaved_sample
from .sampling.participants import LocalParticipant
from .sampling.ragged_cache import eval_mode
from .sampling.rollout import Rollout
from .sampling.rounds import Rounds
from .skd_config import SKDConfig
from .training.checkpoints import load_draft_length, save_draft_length
from .training.completions import completion_records, print_completions, save_completions, with_prompt_texts
from .training.distributed import (
    agree_on_maximum,
    bound_waits,
    is_sharded,
    keyed_generator,
    prepare_teacher,
    student_for_sampling,
    whole_head,
)
from .training.ends_of_sequence import stop_at
from .training.finite_check import FiniteCheck
from .training.forward_patches import adapters_on_heads_pass, forward_kept
from .training.last_hidden_states import last_hidden_states
from .training.loss_forward import LossFunction, loss_in_forward
from .training.metrics import RatioMetrics, add_rollout, with_prefix, without_filled_rows
from .training.models import base_model, disable_dropout, given_model, load_pair, own_arguments, pad_token_id
from .training.pair_check import check_launch, check_pair, require, room_for_prompts, room_for_texts
from .training.router_logits import router_settings_kept, without_router_logits
from .training.sampled_batches import sampled_batches
from .training.sampling_copy import PRECISIONS, SamplingCopy, can_be_copied, is_worth_copying


if TYPE_CHECKING:
    from peft import PeftConfig

logger = get_logger(__name__)

METRICS = (
    "acceptance_rate",
    "replaced_share",
    "teacher_rank",
    "tokens_per_round",
    "draft_length",
    "response_length",
    "truncated_share",
    "student_entropy",
    "teacher_entropy",
    "sampling_seconds",
    "training_seconds",
    "tokens_per_second",
    "skipped_rows",
)


class SKDTrainer(GKDTrainer):
    """
    Trainer for Speculative Knowledge Distillation (SKD) of language models.

    For details, see the paper: [Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved
    Sampling](https://huggingface.co/papers/2410.11325) (ICLR 2025).

    The changes with respect to [`~trl.experimental.gkd.GKDTrainer`] are: the responses of a whole optimizer step are
    sampled before its first backward, by student and teacher together; the loss reuses the teacher's hidden states from
    that sampling, never builds full logits, and divides by the number of response tokens it is computed on, over all
    micro-batches and processes. Inherited options do what they do there; those that have no place here are refused by name
    (`inherited_options.py`).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher, or its name or path, loaded with `args.teacher_model_init_kwargs`. Defaults to
            `args.teacher_model_name_or_path`.
        args ([`SKDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Makes batches of prepared rows; defaults to [`DataCollatorForDistillation`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, with `prompt` and `completion`, or with `prompt` alone (enough where every response is
            sampled); each a text or a conversation.
        eval_dataset (the same, or a `dict` of them, *optional*):
            Evaluated on reference responses.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The student's tokenizer, which the teacher has to share. If `None`, loaded from the student's name.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics:
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the whole student.
        formatting_func (`Callable`, *optional*):
            Turns a row of the data set into one of the forms above.

    Raises:
        `ValueError`: for models, rows or settings that cannot work together, before training starts.
    """

    _tag_names = ["trl", "skd"]
    _name = "SKD"
    _paper = {
        "title": "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
        "id": "2410.11325",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{xu2025speculative,
                title     = {{Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling}},
                author    = {Wenda Xu and Rujun Han and Zifeng Wang and Long Le and Dhruv Madeka and Lei Li and William Yang Wang and Rishabh Agarwal and Chen-Yu Lee and Tomas Pfister},
                booktitle = {The Thirteenth International Conference on Learning Representations, {ICLR} 2025},
                year      = 2025,
            }"""),  # noqa: E501
    }
    _config_class = SKDConfig
    # What the Trainer holds, as this class knows it.
    args: SKDConfig  # type: ignore[assignment]
    model: nn.Module  # type: ignore[assignment]
    processing_class: PreTrainedTokenizerBase  # type: ignore[assignment]
    _metric_names: tuple[str, ...] = METRICS
    _statistics: tuple[str, ...] = ("student_entropy", "teacher_entropy")  # computed along with the loss
    # `compute_loss` divides by the tokens of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: SKDConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable | None = None,
    ):
        model, teacher_model = given_model("model", model), given_model("teacher_model", teacher_model)
        args = own_arguments(args, self._config_class, f"-{self._name}", model)
        student, teacher, tokenizer = load_pair(model, teacher_model, processing_class, args)
        require(check_pair(student, teacher, tokenizer, args, peft_config))
        self.vocab_size = shared_vocab_size(student, teacher)
        self.eos_token_ids = end_of_sequence_ids(student, teacher, tokenizer)
        self._prepare = partial(
            prepare_dataset,
            tokenizer=tokenizer,
            max_prompt_length=room_for_prompts(args, student, teacher),
            max_response_length=args.response_limit,
            max_text_length=room_for_texts(args, student, teacher),
            eos_token_ids=self.eos_token_ids,
            num_proc=args.dataset_num_proc,
            chat_template_kwargs=args.chat_template_kwargs,
            formatting_func=formatting_func,
            every_answer=args.every_answer,
            vocab_size=self.vocab_size,
            length_column=args.length_column_name if asks_for_lengths(args) else None,
        )
        train_dataset = self._prepare(train_dataset, needs_response="dataset" in args.rollouts, name="train")
        if args.shuffle_dataset:
            train_dataset = train_dataset.shuffle(seed=args.seed)
        eval_dataset = self._prepare_eval(eval_dataset)

        # Adapters are initialised at random, and the oldest supported TRL seeds too late for that.
        set_seed(args.seed)
        # GKDTrainer's own __init__ is passed over: it changes `args`, refuses padded vocabularies and missing arguments,
        # replaces LoRA's dropout by none, and leaves the teacher whole on every rank under FSDP. What it sets up is below.
        base = base_model(student)
        with forward_kept(base), adapters_on_heads_pass(base), router_settings_kept(base):
            super(GKDTrainer, self).__init__(
                student,
                args=args,
                data_collator=data_collator
                or DataCollatorForDistillation(pad_token_id(tokenizer, self.vocab_size), args.pad_to_multiple_of),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                peft_config=peft_config,
            )
        if args.disable_dropout:
            disable_dropout(self.model)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the response tokens of a step
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        self._enter_step(0, 1)
        self._finite_check = FiniteCheck()
        self._draft_length = args.draft_length()  # "auto" keeps what it has measured
        self._sampling_copy = SamplingCopy()
        self._rounds = Rounds(args.capture_sampling, args.compile_student)  # graphs and caches live across steps
        require(check_launch(self._inner_student(), teacher, args, self.accelerator))
        self._inner_teacher = teacher
        self.teacher_model = prepare_teacher(teacher, self.accelerator, args.shard_teacher)
        bound_waits(args.ddp_timeout)
        names = {"train": self._metric_names, "eval": (*self._metric_names, "loss")}
        self._ratios = {mode: RatioMetrics(names[mode], totals=("skipped_rows",)) for mode in names}

    def _prepare_eval(self, dataset):
        if isinstance(dataset, dict):
            return {name: self._prepare(split, needs_response=True, name=name) for name, split in dataset.items()}
        return None if dataset is None else self._prepare(dataset, needs_response=True, name="eval")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_eval(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """As [`~transformers.Trainer.predict`], on reference responses, with the metrics of an evaluation."""
        return super().predict(self._prepare_eval(test_dataset), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As [`~transformers.Trainer.evaluation_loop`], with this trainer's metrics under the prefix. They, and the loss, are sums
        over the tokens of the set, divided once: no batch size changes them."""
        self._ratios["eval"].reset()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(with_prefix(self._ratios["eval"].compute(self.accelerator), f"{metric_key_prefix}_"))
        return output

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, without_filled_rows(inputs, self.accelerator), *args, **kwargs)

    def train(self, *args, **kwargs):
        """As [`~transformers.Trainer.train`]; the student's generation_config then knows every end that training stops at."""
        stop_at(self._inner_student(), self.eos_token_ids)
        return super().train(*args, **kwargs)

    def add_callback(self, callback):
        # LogCompletionsCallback, WeaveCallback: they write to the prompts of the evaluation set, which are tokens by now.
        if getattr(callback, "eval_dataset", None) is not None and "eval_dataset" in vars(callback):
            callback.eval_dataset = with_prompt_texts(callback.eval_dataset, self.processing_class)
        super().add_callback(callback)

    # One optimizer step: sample all of it, then train on it.

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, with sampled responses where the step calls for them, and the number
        of response tokens they hold on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._enter_step(self.state.global_step, self.state.max_steps)
        for batch in batches:
            if Key.SKIPPED_ROWS in batch:  # of a stream
                self._ratios["train"].add("skipped_rows", batch.pop(Key.SKIPPED_ROWS).sum())
        rollout = self._rollout_of_step(self.state.global_step)
        if batches and rollout != "dataset":
            batches = self._sample(batches, rollout) if rollout != "mixed" else self._sample_some(batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _enter_step(self, step: int, num_steps: int) -> None:
        """Sets what the configuration's schedules say of an optimizer step (0 is the first)."""
        self._args_of_step = self.args.at(step, num_steps)
        self.divergence = self._args_of_step.make_divergence()

    def _rollout_of_step(self, step: int) -> str:
        """Who writes the responses of a step, or `"mixed"`: a keyed draw, so ranks agree and a resumed run repeats itself."""
        lmbda = self._lmbda_at(step)
        if self.args.rollout != "dataset" and lmbda > 0:
            if self.args.lmbda_unit == "prompt" and lmbda < 1:
                return "mixed"
            if torch.rand((), generator=keyed_generator("lmbda", self.args.seed, step)).item() < lmbda:
                return self.args.rollout
        return "teacher" if self.seq_kd else "dataset"

    def _lmbda_at(self, step: int) -> float:
        """The share of sampled responses: as scheduled, or what a callback may have set."""
        is_scheduled = "lmbda" in (self.args.schedules or {})
        return self.args.at(step, self.state.max_steps).lmbda if is_scheduled else self.lmbda

    def _sample_some(self, batches: list[dict]) -> list[dict]:
        """The micro-batches with sampled responses at a share `lmbda` of their rows. Which ones is a draw keyed by step, rank and
        row. A rank without any takes part in the others' sampling: models may be sharded, and completions are gathered."""
        key = ("lmbda", self.args.seed, self.state.global_step, self.accelerator.process_index)
        prompts, mask = merge_prompts([(batch[Key.PROMPTS], batch[Key.PROMPT_ATTENTION_MASK]) for batch in batches])
        is_sampled = torch.rand(len(prompts), generator=keyed_generator(*key)) < self._lmbda_at(self.state.global_step)
        chosen = is_sampled.to(prompts.device)
        some = {Key.PROMPTS: prompts[chosen], Key.PROMPT_ATTENTION_MASK: mask[chosen]}
        sampled = self._sample([some], self.args.rollout)
        return mix_sampled_rows(batches, sampled, is_sampled, self.data_collator)

    def _sample(self, batches: list[dict], rollout: str) -> list[dict]:
        start = time.perf_counter()
        prompts, mask = merge_prompts([(batch[Key.PROMPTS], batch[Key.PROMPT_ATTENTION_MASK]) for batch in batches])
        sampled = self._write(prompts, mask, rollout)
        add_rollout(self._ratios["train"], sampled, time.perf_counter() - start, self.accelerator.num_processes)
        self._keep_completions(sampled)
        return sampled_batches(sampled, batches)

    def _write(self, prompts: torch.Tensor, mask: torch.Tensor, rollout: str) -> Rollout:
        """Sampled responses to left-padded prompts (B, P), of which a rank may have none; collective where the models are."""
        step, rank = self.state.global_step, self.accelerator.process_index
        noise = torch.rand(
            (len(prompts), self.args.max_new_tokens, 3),
            generator=keyed_generator("sampling", self.args.seed, step, rank),
        )
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with (
            student_for_sampling(self.model_wrapped, self.accelerator, self.args.ds3_gather_for_generation) as student,
            self.compute_loss_context_manager(),
            without_router_logits(self._inner_student(), self._inner_teacher),
            # `torch_compile` is for the training step: every round has another shape, and would be compiled anew.
            nullcontext() if self.args.compile_student else torch.compiler.set_stance("force_eager"),
        ):
            collective = self.accelerator.num_processes > 1 and (is_sharded(student) or is_sharded(teacher))
            if self._samples_with_a_copy(student):
                student = self._sampling_copy.of(student, PRECISIONS[self.accelerator.mixed_precision])
            return interleaved_sample(
                LocalParticipant(
                    student,
                    self._args_of_step.student_sampling(),
                    vocab_size=self.vocab_size,
                ),
                LocalParticipant(teacher, self._args_of_step.teacher_sampling(), vocab_size=self.vocab_size),
                prompts,
                mask,
                accept=self._args_of_step.acceptance_rule(rollout),
                max_new_tokens=self.args.max_new_tokens,
                eos_token_ids=self.eos_token_ids,
                noise=noise,
                execution=Execution(
                    self._draft_length,
                    self.args.rollout_batch_size,
                    agree_on_maximum(self.accelerator) if collective else None,
                    self._rounds,
                ),
            )

    def _samples_with_a_copy(self, student: nn.Module) -> bool:
        if self.args.sampling_copy is None:
            return is_worth_copying(student, self.accelerator)
        return self.args.sampling_copy and can_be_copied(student, self.accelerator)

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        num_tokens = int((inputs[Key.LABELS] != IGNORE_INDEX).sum())
        # GKDTrainer's own would sample once more.
        loss = super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        seconds = time.perf_counter() - start
        metrics = self._ratios["train"]
        metrics.add("training_seconds", seconds, 1 / self.current_gradient_accumulation_steps)
        metrics.add("tokens_per_second", num_tokens, seconds / self.accelerator.num_processes)
        return loss

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_draft_length(self._draft_length, checkpoint, self.accelerator, self.args)

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum over response tokens of weight x divergence, divided by `num_items_in_batch`: the response tokens of the
        optimizer step on all processes (in evaluation: of the batch)."""
        mode = "train" if self.model.training else "eval"
        tokens = ResponseTokens.of(inputs)
        teacher_hidden = self._teacher_hidden(inputs, tokens)
        outcome: list[DistillationLoss] = []

        def loss_fn(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            outcome.append(self._distillation_loss(tokens.predicted_by(hidden), teacher_hidden, inputs, tokens))
            return {"loss": outcome[0].loss}

        total = self._forward_with(model, inputs, loss_fn)["loss"]
        if mode == "train":
            self._finite_check.add(outcome[0])
            if self.accelerator.sync_gradients:  # the last micro-batch of the step
                step = self.state.global_step + 1
                self._finite_check.require(step, self._inner_student(), self._inner_teacher, self.accelerator)
        divisor = len(tokens.labels) if num_items_in_batch is None else num_items_in_batch
        divisor = torch.as_tensor(divisor, device=total.device)
        loss = total / torch.where(divisor > 0, divisor, 1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP and its kin average gradients over processes; the divisor counts the tokens of all of them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._add_loss_metrics(mode, outcome[0], inputs, tokens)
        if not return_outputs:
            return loss
        with torch.no_grad(), without_router_logits(self._inner_student()):  # only for compute_metrics: full logits
            return loss, model(**model_inputs(inputs), use_cache=False)

    def _forward_with(self, model, inputs, loss_fn: LossFunction) -> dict[str, torch.Tensor]:
        """`loss_fn` of the student's last hidden states, inside the forward of `model`: the student, wrapped or not."""
        with self.accelerator.autocast(), loss_in_forward(self._inner_student()):
            return model(**model_inputs(inputs), loss_fn=loss_fn)

    def _distillation_loss(self, student_hidden, teacher_hidden, inputs, tokens: ResponseTokens) -> DistillationLoss:
        """The loss at the N response tokens of a micro-batch, from both models' hidden states (N, H)."""
        with self._heads() as (student_head, teacher_head):
            return distillation_loss(
                HiddenStates(student_hidden, student_head),
                HiddenStates(teacher_hidden, teacher_head),
                self._facts(inputs, tokens),
                divergence=self.divergence,
                gate=self._gate_for(inputs),
                replaced_loss=self.args.replaced_loss,
                vocab_size=self.vocab_size,
                chunk_size=self.args.loss_chunk_size,
                statistics=self._statistics,
            )

    def _facts(self, inputs, tokens: ResponseTokens) -> ResponseFacts:
        """What is known of the N response tokens of a micro-batch besides the models' distributions."""
        sampled = {name: tokens.pick(inputs[name]) for name in (Key.REPLACED, Key.TEACHER_RANK) if name in inputs}
        return ResponseFacts.of(
            tokens.labels, position=tokens.positions, is_end=self._is_eos(tokens.labels), **sampled
        )

    def _is_eos(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.isin(labels, torch.tensor(self.eos_token_ids, device=labels.device))

    def _gate_for(self, inputs) -> Gate | GateWeights | None:
        """How much each token of a micro-batch counts: here all alike."""
        return None

    def _teacher_hidden(self, inputs, tokens: ResponseTokens) -> torch.Tensor:
        """The teacher's hidden states (N, H) that predict the response tokens: from the sampling, if it judged them."""
        if Key.TEACHER_HIDDEN_STATES in inputs:
            return tokens.pick(inputs[Key.TEACHER_HIDDEN_STATES])
        with eval_mode(self.teacher_model):
            hidden = last_hidden_states(self.teacher_model, self._inner_teacher, **model_inputs(inputs))
        return tokens.predicted_by(hidden)

    @contextmanager
    def _heads(self):
        with (
            whole_head(LMHead.of(self._inner_student()), trained=torch.is_grad_enabled()) as student_head,
            whole_head(LMHead.of(self._inner_teacher)) as teacher_head,
        ):
            yield student_head, teacher_head

    def _inner_student(self) -> PreTrainedModel:
        return base_model(self.accelerator.unwrap_model(self.model))

    # What people see

    def _add_loss_metrics(self, mode: str, outcome: DistillationLoss, inputs: dict, tokens: ResponseTokens) -> None:
        metrics = self._ratios[mode]
        if mode == "eval":
            metrics.add("loss", outcome.loss.detach(), len(tokens.labels))
        for name in SKDTrainer._statistics:
            metrics.add_mean(name, outcome.statistics[name])

    def _keep_completions(self, rollout: Rollout) -> None:
        step = self.state.global_step + 1  # the step that these responses train
        every = self.args.log_completions_steps or max(int(self.state.logging_steps or self.args.logging_steps), 1)
        if not self.args.log_completions or (step % every != 0 and step != 1):
            return
        records = gather_object(completion_records(rollout, self.processing_class, step))
        if self.accelerator.is_main_process:
            try:
                save_completions(records, self.args.output_dir, step)
                print_completions(records, self.args.num_completions_to_print, step)
            except (OSError, ValueError) as error:  # a full disk, a closed console, a text that has no encoding
                logger.warning(f"Step {step}: its completions could not be kept or shown ({error}). Training goes on.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._ratios["train"].compute(self.accelerator))
        super().log(logs, start_time)
