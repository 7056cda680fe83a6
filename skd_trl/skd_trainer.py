"""`SKDTrainer`: GKDTrainer with interleaved sampling and a loss that counts what it is trained on.

Glue: who writes the responses is `sampling/interleaved.py`, what they cost is `loss/`, rows are `data/`, ranks and models are
`training/`. Shapes: B rows of a micro-batch, P prompt, T response, N response tokens of a micro-batch, H hidden.
"""

import itertools
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction

from ._compat import GKDTrainer
from .data.batches import (
    IGNORE_INDEX,
    DataCollatorForDistillation,
    Key,
    ResponseTokens,
    check_collator,
    model_inputs,
    without_response,
)
from .data.dataset import columns_of, fullest_row, has_own_prompts, num_scored_tokens, prepare_dataset
from .data.recorded_scores import has_scores
from .data.row_rules import RowRules
from .data.vocabulary import end_of_sequence_ids, shared_vocab_size
from .inherited_options import (
    FOLLOWED_ATTRIBUTES,
    GENERATION_ADVICE,
    Absent,
    asks_for_lengths,
    check_overrides,
    follow_attributes,
)
from .loss.distillation_loss import DistillationLoss, distillation_loss
from .loss.gates import Gate, GateWeights
from .loss.lm_head import LMHead
from .loss.response_facts import ResponseFacts
from .loss.teacher_signal import HiddenStates, TeacherSignal, check_signal
from .loss.token_distributions import FULL_VOCABULARY_STATISTICS
from .sampling.rounds import Rounds
from .serving.client import TeacherClient
from .skd_config import SKDConfig
from .training.distributed import (
    bound_waits,
    name_layers_to_shard,
    whole_head,
)
from .training.ends_of_sequence import stop_at
from .training.engine_lifetime import check_first_training
from .training.engine_settings import check_capturing, describe_offloading
from .training.evaluated_run import EvaluatedRun
from .training.findings import is_incomplete, require
from .training.finite_check import FiniteCheck, GradientCheck
from .training.forward_patches import adapters_on_heads_pass, forward_kept
from .training.launch_check import check_launch
from .training.limits import limits_of_rows
from .training.loss_forward import CompiledBackbone, LossFunction, loss_in_forward
from .training.memory_advice import out_of_memory_advised
from .training.metrics import (
    RatioMetrics,
    add_loss_by_teacher,
    names_by_teacher,
)
from .training.models import (
    base_model,
    copied_arguments,
    disable_dropout,
    given_model,
    pad_token_id,
)
from .training.pair_check import check_pair, check_placed
from .training.router_logits import router_settings_kept, without_router_logits
from .training.run_files import LogFile
from .training.sampled_evaluation import check_sampled_evaluation
from .training.sampled_steps import SampledSteps
from .training.sampling_copy import SamplingCopy, check_casting, check_merging
from .training.saved_run import SavedRun
from .training.saved_weights import describe_shards
from .training.searched_run import SearchedRun
from .training.served import check_rule
from .training.shown_run import ShownRun
from .training.teacher_loading import connected, load_models, place_teacher
from .training.teachers import whole_signal


if TYPE_CHECKING:
    from peft import PeftConfig

logger = get_logger(__name__)

# Of a batch, what keeps its own precision in every engine.
EXACT = (
    Key.GATE_UNIFORMS,
    Key.COMPARED_UNIFORMS,
    Key.GATE_WEIGHT,
    Key.TEACHER_TOP_LOG_PROBS,
    Key.TEACHER_LABEL_LOG_PROBS,
)
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
    "teacher_mass_outside",
    "sampling_seconds",
    "training_seconds",
    "tokens_per_second",
    "skipped_rows",
)


class SKDTrainer(SampledSteps, EvaluatedRun, SavedRun, ShownRun, SearchedRun, GKDTrainer):
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
            `args.teacher_model_name_or_path`. A `dict` of names is several teachers, of which a row's `teacher_id` names its own.
            None is needed with `args.teacher_model_kind` (the student is its own teacher), and for rows that have a teacher's
            scores beside them (`python -m skd_trl score`).
        args ([`SKDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Makes batches of prepared rows; defaults to [`DataCollatorForDistillation`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, with `prompt` and `completion`, or with `prompt` alone (enough where every response is
            sampled); each plain text or a conversation. With a `teacher_prompt`, or with a `privileged_context` for
            `args.teacher_prompt_template`, the teacher reads that and the student its own prompt.
        eval_dataset (the same, or a `dict` of them, *optional*):
            Evaluated on reference responses; rows without one on a response that the student samples (its own text, drawn as the run
            draws it), where `eval_loss` is the divergence on the student's text.
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
    generation_config = Absent(GENERATION_ADVICE)
    generation_kwargs = Absent(GENERATION_ADVICE)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | dict[str, PreTrainedModel | nn.Module | str] | None = None,
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
        check_overrides(self, SKDTrainer)
        model = given_model("model", model)
        args = copied_arguments(args, self._config_class, f"-{self._name}", model)
        scored = has_scores(columns_of(train_dataset))
        student, loaded, tokenizer = load_models(model, teacher_model, processing_class, args, scored)
        name_layers_to_shard(student)
        teachers, self._teacher_names = loaded.models, loaded.names
        self._is_served, self._is_recorded = loaded.is_served, loaded.is_recorded
        unplaced = []
        for one in teachers:
            findings = check_pair(student, one, tokenizer, args, peft_config)
            require(findings)
            unplaced += [one] if is_incomplete(findings) else []
        self.vocab_size = min(shared_vocab_size(student, one) for one in teachers)
        client = connected(loaded, args, tokenizer, self.vocab_size)
        if client is not None:
            self.vocab_size = min(self.vocab_size, client.vocab_size or self.vocab_size)
        self.eos_token_ids = sorted({i for one in teachers for i in end_of_sequence_ids(student, one, tokenizer)})
        self._rules = RowRules(
            **limits_of_rows(args, student, teachers, None if client is None else client.max_length),
            needs_response="dataset" in args.rollouts,
            eos_token_ids=tuple(self.eos_token_ids),
            chat_template_kwargs=args.chat_template_kwargs or {},
            num_ids=self.vocab_size,
            every_answer=args.every_answer,
            reads_response="dataset" in args.rollouts,
            teacher_prompt_template=args.teacher_prompt_template,
            teacher_names=self._teacher_names,
            needs_scores=self._is_recorded,
        )
        self._check_sampled_evaluation = partial(
            check_sampled_evaluation,
            max_new_tokens=args.max_new_tokens,
            teacher_room=self._rules.max_teacher_text_length,
        )
        self._main_process_first = partial(args.main_process_first, desc="tokenizing")
        self._prepare = partial(
            prepare_dataset,
            tokenizer=tokenizer,
            num_proc=args.dataset_num_proc,
            formatting_func=formatting_func,
            length_column=args.length_column_name if asks_for_lengths(args) else None,
        )
        with self._main_process_first():  # the others find what it has kept, of a data set on disk
            train_dataset = self._prepare(train_dataset, rules=self._rules, name="train")
        if args.shuffle_dataset:
            train_dataset = train_dataset.shuffle(seed=args.seed)
        self._prepared_sets = WeakSet([train_dataset])
        eval_dataset = self._prepare_eval(eval_dataset, base_model(student))

        if data_collator is not None:
            check_collator(data_collator, fullest_row(train_dataset), args.samples)

        # Adapters are initialised at random, and the oldest supported TRL seeds too late for that.
        set_seed(args.seed)
        # GKDTrainer's own __init__ is skipped: it changes `args`, refuses padded vocabularies and missing arguments,
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
        if args.log_completions:
            self.add_callback(LogFile())
        if args.disable_dropout:
            disable_dropout(self.model)
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the response tokens of a step
        self._set_attributes()
        self._enter_step(0, 1)
        self._has_adapter = base_model(self.model) is not self.model
        self._finite_check = FiniteCheck()
        self.add_callback(GradientCheck(self))
        self._draft_length = args.draft_length()  # "auto" keeps what it has measured
        if args.merge_adapter:
            check_merging(self.model, self.accelerator)
        if args.sampling_copy:
            check_casting(self.model, self.accelerator)
        check_capturing(args, self.accelerator)
        for note in args.without_effect():
            logger.warning(note)
        self._sampling_copy = SamplingCopy()
        self._rounds = Rounds(args.capture_sampling, args.compile_student)  # graphs and caches live across steps
        self._compiled_backbone = CompiledBackbone(self.accelerator)
        for one in teachers:
            require(check_launch(self._inner_student(), one, args, self.accelerator))
        if self._is_recorded or (client is not None and args.teacher_signal == "top_k"):
            self._check_coarse_teacher(client)
        placed = place_teacher(
            loaded,
            self.model,
            args,
            self.accelerator,
            client=client,
            has_own_prompts=args.teacher_model_kind is not None and has_own_prompts(self.train_dataset),
        )
        self._teacher, self.teacher_model, self._inner_teacher = placed.teacher, placed.prepared, placed.inner
        self._average, self._shared = placed.average, placed.shared
        for one in unplaced:
            require(check_placed(self._inner_student(), one, tokenizer, args, self.accelerator))
        if self._average is not None:
            self.add_callback(self._average)
        bound_waits(args.ddp_timeout)
        by_teacher = names_by_teacher(self._teacher_names)
        own_names = (*self._metric_names, *itertools.chain(*by_teacher.values()))
        names = {"train": own_names, "eval": (*own_names, "loss", "sampled_share")}
        totals = ("skipped_rows", *by_teacher["num_tokens"])
        self._ratios = {mode: RatioMetrics(names[mode], totals=totals) for mode in names}

    def _check_coarse_teacher(self, client: TeacherClient | None) -> None:
        """Refuses what k tokens of a server's, or of recorded scores, cannot give."""
        self._statistics = tuple(name for name in self._statistics if name not in FULL_VOCABULARY_STATISTICS)
        if client is None:
            sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for name, dataset in {"train": self.train_dataset, **sets}.items():
                self._check_scored(dataset, name)
        else:
            self._check_scores(client.top_k)
        for rollout in self.args.rollouts - {"dataset", "student"} if client is not None else ():
            check_rule(self.args.acceptance_rule(rollout), client.top_k, self.vocab_size)

    def _check_scored(self, dataset: Dataset | IterableDataset | None, name: str) -> None:
        """The same for a prepared data set; nothing where there is a teacher to ask."""
        if self._is_recorded and dataset is not None:
            self._check_scores(num_scored_tokens(dataset, name))

    def _check_scores(self, top_k: int) -> None:
        """Refuses what k recorded tokens cannot give."""
        check_signal(top_k, self.vocab_size, divergence=self.divergence, statistics=self._statistics)

    def train(self, *args, **kwargs):
        """As [`~transformers.Trainer.train`]; the student's generation_config then knows every end that training stops at."""
        check_overrides(self, SKDTrainer)
        check_first_training(self)
        for note in (describe_shards(self.accelerator), describe_offloading(self.args, self.accelerator)):
            if note is not None:
                logger.warning(note)
        if self.model_init is None:
            stop_at(self._inner_student(), self.eos_token_ids)
        self._log_plan()
        return super().train(*args, **kwargs)

    def _set_attributes(self) -> None:
        """The numbers that GKDTrainer keeps on the trainer too, where callbacks change them."""
        self._given_attributes = {name: getattr(self.args, name) for name in FOLLOWED_ATTRIBUTES}
        for name, value in self._given_attributes.items():
            setattr(self, name, value)
        self.seq_kd = self.args.seq_kd

    def _inner_training_loop(self, *args, **kwargs):
        # `auto_find_batch_size` begins it again, and nothing of a beginning that ran out of memory counts.
        self._ratios["train"].reset()
        self._finite_check = FiniteCheck()
        return super()._inner_training_loop(*args, **kwargs)

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
        if rollout in ("dataset", "mixed") and not self._rules.needs_response:
            # A callback that lowers `lmbda` asks for references of rows that were not looked at for them.
            if any((batch[Key.LABELS] == IGNORE_INDEX).all(dim=1).any() for batch in batches):
                raise ValueError(
                    f"Step {self.state.global_step + 1} trains on references, as trainer.lmbda was set to {self.lmbda}, and some of "
                    "its rows have none. Give every row a reference, or leave lmbda at 1."
                )
        if batches and rollout != "dataset":
            batches = self._sample(batches, rollout)
        self._ask_server(batches)
        num_tokens = self._get_num_items_in_batch(batches, device)
        if batches:
            # Where a pass over a stream ends within a window, the Trainer would not step, but add its gradient to the next window's.
            batches += [without_response(batches[-1])] * (num_batches - len(batches))
        return batches, num_tokens

    def _enter_step(self, step: int, num_steps: int) -> None:
        """Sets what the configuration's schedules, and callbacks, say of an optimizer step (0 is the first)."""
        self._attributes = {name: getattr(self, name) for name in FOLLOWED_ATTRIBUTES}
        args = self.args.at(step, num_steps)
        self._args_of_step = follow_attributes(self.args, args, self._attributes, self._given_attributes)
        self.divergence = self._args_of_step.make_divergence()

    def _prepare_inputs(self, inputs):
        # DeepSpeed's precision is for what goes into the models: a uniform below 1 would round to 1.
        exact = {name: inputs[name] for name in EXACT if name in inputs}
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in EXACT})
        return {**prepared, **{name: value.to(self.args.device) for name, value in exact.items()}}

    def training_step(self, model, inputs, num_items_in_batch=None):
        if any(
            getattr(self, name) != value for name, value in self._attributes.items()
        ):  # by a callback, in on_step_begin
            self._enter_step(self.state.global_step, self.state.max_steps)
        start = time.perf_counter()
        num_tokens = int((inputs[Key.LABELS] != IGNORE_INDEX).sum())
        # GKDTrainer's own would sample once more.
        with out_of_memory_advised("training"):
            loss = super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        seconds = time.perf_counter() - start
        metrics = self._ratios["train"]
        metrics.add("training_seconds", seconds, 1 / self.current_gradient_accumulation_steps)
        metrics.add("tokens_per_second", num_tokens, seconds / self.accelerator.num_processes)
        return loss

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum over response tokens of weight x divergence, divided by `num_items_in_batch`: the response tokens of the
        optimizer step on all processes (in evaluation: of the batch)."""
        mode = "train" if self.model.training else "eval"
        tokens = ResponseTokens.of(inputs)
        teacher = self._teacher_signal(inputs, tokens)
        outcome: list[DistillationLoss] = []
        divisor = torch.as_tensor(len(tokens.labels) if num_items_in_batch is None else num_items_in_batch)
        factor = 1 / torch.where(divisor > 0, divisor, 1).to(tokens.labels.device, torch.float32)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP and its kin average gradients over processes; the divisor counts the tokens of all of them.
            factor = factor * (self.accelerator.num_processes // self.get_tp_size())
        self._loss_factor = factor

        def loss_fn(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            outcome.append(self._distillation_loss(tokens.predicted_by(hidden), teacher, inputs, tokens))
            return {"loss": outcome[0].loss * factor}

        # FSDP2 in bf16 rounds what a forward returns: the gradient goes that way, as a 1, and the value does not.
        returned = self._forward_with(model, inputs, loss_fn)["loss"]
        loss = outcome[0].loss.detach() * factor + (returned - returned.detach())
        if mode == "train":
            self._finite_check.add(outcome[0])
            if self.accelerator.sync_gradients:  # the last micro-batch of the step
                step = self.state.global_step + 1
                self._finite_check.require(step, self._inner_student(), self._inner_teacher, self.accelerator)
        self._add_loss_metrics(mode, outcome[0], inputs, tokens)
        if not return_outputs:
            return loss
        with torch.no_grad(), without_router_logits(self._inner_student()):  # only for compute_metrics: full logits
            return loss, model(**model_inputs(inputs), use_cache=False)

    def _forward_with(self, model, inputs, loss_fn: LossFunction) -> dict[str, torch.Tensor]:
        """`loss_fn` of the student's last hidden states, inside the forward of `model`: the student, wrapped or not."""
        student = self._inner_student()
        with self.accelerator.autocast(), loss_in_forward(student, self._compiled_backbone.of(student)):
            return model(**model_inputs(inputs), loss_fn=loss_fn)

    def _distillation_loss(
        self, student_hidden: torch.Tensor, teacher: TeacherSignal, inputs, tokens: ResponseTokens
    ) -> DistillationLoss:
        """The loss at the N response tokens of a micro-batch, from the student's hidden states (N, H) and the teacher's signal."""
        with self._teacher_products(), self._student_head() as student_head, whole_signal(teacher) as whole_teacher:
            return distillation_loss(
                HiddenStates(student_hidden, student_head),
                whole_teacher,
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

    @contextmanager
    def _student_head(self):
        with whole_head(LMHead.of(self._inner_student()), trained=torch.is_grad_enabled()) as head:
            yield head

    def _inner_student(self) -> PreTrainedModel:
        return base_model(self.accelerator.unwrap_model(self.model))

    # What people see

    def _add_loss_metrics(self, mode: str, outcome: DistillationLoss, inputs: dict, tokens: ResponseTokens) -> None:
        metrics = self._ratios[mode]
        if self._teacher_names:
            which = inputs[Key.TEACHER_INDEX][tokens.rows]
            add_loss_by_teacher(metrics, outcome, which, self._teacher_names)
        if Key.TEACHER_TOP_LOG_PROBS in inputs:
            is_beyond = tokens.pick(inputs[Key.TEACHER_TOP_IDS]) >= self.vocab_size
            known = tokens.pick(inputs[Key.TEACHER_TOP_LOG_PROBS]).exp().masked_fill(is_beyond, 0).sum(-1)
            metrics.add_mean("teacher_mass_outside", (1 - known).clamp(min=0))
        for name in set(self._statistics) & set(SKDTrainer._statistics):
            metrics.add_mean(name, outcome.statistics[name])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # An evaluation right before leaves the model in evaluation mode.
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._ratios["train"].compute(self.accelerator))
        super().log(logs, start_time)
