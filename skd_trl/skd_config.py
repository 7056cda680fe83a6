"""Configuration of `SKDTrainer`: GKDConfig's fields keep their meaning, and the fields of interleaved sampling are added."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ._compat import GKDConfig
from .explained_options import explained
from .field_checks import check_choice, check_positive, check_types
from .ideas import IdeaField, Number, check_used, default_of, describe, is_default, make_idea, numbers_of
from .inherited_options import check_inherited_options
from .loss.distillation_loss import REPLACED_LOSSES
from .loss.divergences import DIVERGENCES, Divergence
from .sampling.acceptance import ACCEPTANCE_RULES, AcceptanceRule
from .sampling.draft_length import AUTO, DraftLength
from .sampling.sampling_params import SamplingParams
from .scheduled_numbers import ScheduledNumbers
from .schedules import Schedule
from .teacher_options import TeacherOptions


ROLLOUTS = ("interleaved", "student", "teacher", "dataset")
LMBDA_UNITS = ("step", "prompt")


def is_divergence(value: Any) -> bool:
    """Whether `value` is a divergence, or any function of two required arguments, the student's logits and the teacher's."""
    if isinstance(value, Divergence) or not callable(value) or inspect.isclass(value):
        return isinstance(value, Divergence)
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # some of what is written in C
        return False
    return (
        sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 2
    )


ACCEPT = IdeaField(
    "accept",
    ACCEPTANCE_RULES,
    "an AcceptanceRule",
    lambda value: isinstance(value, AcceptanceRule),
    {"k": "accept_top_k"},
)
DIVERGENCE = IdeaField(
    "divergence",
    DIVERGENCES,
    "a Divergence or a function of student and teacher logits",
    is_divergence,
    {"beta": "beta"},
)


@explained
@dataclass
class SKDConfig(ScheduledNumbers, TeacherOptions, GKDConfig):
    """
    Configuration class for [`SKDTrainer`].

    This class includes only the parameters that are specific to SKD training (those about the teacher are in
    [`~skd_trl.teacher_options.TeacherOptions`]), and those of
    [`~trl.experimental.gkd.GKDConfig`] whose default differs. Defaults are those of the paper (Xu et al., ICLR 2025,
    arXiv 2410.11325) and of its authors' settings, where they give any and the responses depend on them.
    """

    _VALID_DICT_FIELDS = GKDConfig._VALID_DICT_FIELDS + [
        "accept_kwargs",
        "divergence_kwargs",
        "chat_template_kwargs",
        "schedules",
        "teacher_models",
    ]
    _IDEA_FIELDS = ("accept", "divergence")

    rollout: str = field(
        default="interleaved",
        metadata={
            "help": "Who writes the responses: 'interleaved' (student and teacher together: SKD), 'student' (on-policy "
            "distillation), 'teacher' (sequence-level distillation) or 'dataset' (supervised distillation).",
            "choices": list(ROLLOUTS),
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of optimizer steps trained on sampled responses. The other steps train on the data set's "
            "own responses, or with seq_kd on the teacher's."
        },
    )
    lmbda_unit: str = field(
        default="step",
        metadata={
            "help": "What lmbda is a share of: 'step', whole optimizer steps (GKD), or 'prompt', the prompts of each step "
            "(ImitKD).",
            "choices": list(LMBDA_UNITS),
        },
    )
    # HfArgumentParser reads a value as text only if None is admitted too.
    accept: AcceptanceRule | str | None = field(
        default="top_k",
        metadata={
            "help": f"Rule that accepts or rejects the proposals of the student: {', '.join(ACCEPTANCE_RULES)}, a name that you "
            "registered, module:attribute, or an AcceptanceRule."
        },
    )
    accept_top_k: int = field(
        default=25,
        metadata={
            "help": "A proposal is accepted if it is among this many of the teacher's most probable tokens (K; paper: 25)."
        },
    )
    accept_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the other acceptance rules, such as '{\"alpha\": 0.25}'."}
    )
    num_draft_tokens: int | str | None = field(
        default=None,
        metadata={
            "help": "Tokens the student drafts before the teacher verifies them (paper: 5). Changes the cost, not the "
            "distribution of the responses. 'auto' measures both models and the acceptance, and takes the cheapest length. "
            "Default: 'auto', and 5 with full_determinism, as only a number repeats a run exactly."
        },
    )
    temperature: float = field(
        default=0.5, metadata={"help": "Temperature of the student's draws; 0 is greedy (authors' setting: 0.5)."}
    )
    student_top_p: float = field(
        default=0.5, metadata={"help": "Nucleus of the student's draws (authors' setting: 0.5)."}
    )
    teacher_temperature: float = field(
        default=0.2, metadata={"help": "Temperature of the teacher's draws; 0 is greedy (authors' setting: 0.2)."}
    )
    teacher_top_p: float = field(
        default=0.5, metadata={"help": "Nucleus of the teacher's draws (authors' setting: 0.5)."}
    )
    divergence: Callable[..., Tensor] | str | None = field(
        default="forward_kl",
        metadata={
            "help": f"Divergence from the teacher at each token (paper: forward_kl): {', '.join(DIVERGENCES)}, a name that you "
            "registered, module:attribute, or a function of student and teacher logits (N, V) that returns (N,)."
        },
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the divergence, such as '{\"alpha\": 0.1}'; jsd takes beta."}
    )
    replaced_loss: str = field(
        default="divergence",
        metadata={
            "help": "Loss at replaced tokens: 'divergence' as everywhere (SKD), or 'nll', the negative log-likelihood of "
            "the teacher's token.",
            "choices": list(REPLACED_LOSSES),
        },
    )
    schedules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Numbers that move over the training, by name, such as \'{"accept_top_k": {"end": 5, "shape": "cosine", "hold": '
            '0.2}, "accept_kwargs.alpha": {"start": 0.5, "end": 0.25}}\'; shape is linear, cosine or step, hold the share of steps before '
            'the number moves; start is by default the field\'s value. With lmbda: \'{"start": 0.0, "end": 1.0, "shape": "step", '
            "\"hold\": 0.3}' is the SKD paper's mixed training, supervised first."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Positions whose logits are in memory at once. Default: on a GPU as many as work in a sixteenth of its memory, up to 4096; "
            "on CPU as many as take 16 to 30 MiB."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Responses written at once on each device; freed places are refilled. Default: all of an optimizer "
            "step."
        },
    )
    capture_sampling: bool | None = field(
        default=None,
        metadata={
            "help": "Capture rounds of sampling as CUDA graphs. Default: on CUDA where it is possible; the log says what was "
            "captured, or why not."
        },
    )
    compile_student: bool = field(
        default=False,
        metadata={
            "help": "Run both models' forwards in a round of sampling through torch.compile, inside the CUDA graphs where these "
            "are captured: for long runs, the first steps take minutes. On a CPU it is slower than without. Not for a student that "
            "ZeRO-3 or FSDP2 shards. (The inherited torch_compile is for the training step.)"
        },
    )
    sampling_copy: bool | None = field(
        default=None,
        metadata={
            "help": "Sample with a copy of an fp32 student's weights in the type that bf16 or fp16 training computes in. Default: where "
            "it can be, since casting them for every token costs more than the two bytes for each weight. Rounding differs a little from "
            "autocast's."
        },
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={
            "help": "Sample with the student's LoRA or DoRA adapter merged into a copy of the weights that it targets, brought up to date "
            "before each sampling; training keeps the adapter. Default: on CUDA, unless ZeRO-3 or FSDP2 shards the student."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Rows with a longer prompt are left out. Default: max_length - max_new_tokens, or where nothing is sampled "
            "max_length - 1."
        },
    )
    max_response_length: int | None = field(
        default=None,
        metadata={
            "help": "Reference responses are cut after this many tokens. Default: max_length - max_prompt_length, or where "
            "nothing is sampled what the prompt leaves of max_length. Both models' positions are a limit in any case."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Given to the chat template, such as '{\"enable_thinking\": false}'."}
    )
    every_answer: bool = field(
        default=False,
        metadata={
            "help": "Make a conversation of n answers n rows, each answer after what came before it. Default: one row, of the "
            "last answer, or of the first one of a completion of several turns."
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Keep sampled responses: a table in the terminal and output_dir/completions/completions_00001.parquet and so on, with "
            "what the teacher replaced."
        },
    )
    log_completions_steps: int | None = field(
        default=None, metadata={"help": "Number of steps between kept responses. Default: logging_steps."}
    )
    log_fixed_prompts: int = field(
        default=0,
        metadata={
            "help": "How many prompts, the first of the evaluation set or else of the training set, are sampled again with the same "
            "noise each time that completions are kept: what differs between two times is the student."
        },
    )
    num_completions_to_print: int = field(
        default=3, metadata={"help": "How many sampled responses the table in the terminal shows."}
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Under DeepSpeed ZeRO-3 and FSDP2, gather the student's parameters while it samples. Faster, but each "
            "device then holds the whole student for that time."
        },
    )
    shard_teacher: bool | None = field(
        default=None,
        metadata={
            "help": "Spread the teacher over the devices under DeepSpeed (in a ZeRO-3 engine) and FSDP2 (by layers). A whole one needs no "
            "communication while it judges. Default: whole, unless it takes more than half of a device."
        },
    )

    def __post_init__(self):
        check_types(self)
        super().__post_init__()
        check_choice("rollout", self.rollout, ROLLOUTS)
        check_choice("lmbda_unit", self.lmbda_unit, LMBDA_UNITS)
        check_choice("replaced_loss", self.replaced_loss, REPLACED_LOSSES)
        if isinstance(self.num_draft_tokens, str) and self.num_draft_tokens.isdecimal():
            self.num_draft_tokens = int(self.num_draft_tokens)
        if self.num_draft_tokens == AUTO and self.full_determinism:
            raise ValueError(
                "num_draft_tokens='auto' follows measured times, which differ from run to run; with full_determinism=True "
                "give a number (the paper's is 5)."
            )
        if not isinstance(self.log_fixed_prompts, int) or self.log_fixed_prompts < 0:
            raise ValueError(f"log_fixed_prompts={self.log_fixed_prompts!r} must be a whole number, 0 (none) or more.")
        self._check_ideas()
        self.check_teacher()
        check_inherited_options(self)
        self.draft_length()
        for name in ("max_new_tokens", "log_completions_steps", "num_completions_to_print"):
            check_positive(name, getattr(self, name))
        for name in ("loss_chunk_size", "rollout_batch_size", "max_prompt_length", "max_response_length"):
            check_positive(name, getattr(self, name))
        has_own_limit = self.max_length is None or self.max_prompt_length is not None
        if self.samples and not has_own_limit and self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in max_length={self.max_length}. "
                "Raise max_length, lower max_new_tokens, or set max_prompt_length."
            )
        if (
            None not in (self.max_length, self.max_prompt_length)
            and self.max_response_length is None
            and self.max_prompt_length >= self.max_length
        ):
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response in max_length={self.max_length}. "
                "Raise max_length, lower max_prompt_length, or set max_response_length."
            )

    def _check_ideas(self) -> None:
        """Makes all ideas once, with every number at the start of its schedule and at the end."""
        schedules = self.resolved_schedules()
        for end in ("start", "end"):
            config = self._with({path: getattr(schedule, end) for path, schedule in schedules.items()})
            try:
                config.check_numbers()
            except ValueError as error:
                raise ValueError(f"{f'schedules, at their {end}: ' if schedules else ''}{error}") from error
        check_used(self, self._ideas)
        if ACCEPT not in self._ideas:
            for name in ("accept", "accept_top_k", "accept_kwargs"):
                if not is_default(self, name):
                    raise ValueError(
                        f"{name}={describe(getattr(self, name))!r} would have no effect: no proposal is judged with "
                        f"rollout={self.rollout!r} and lmbda={self.lmbda}. Set rollout='interleaved', or leave it at "
                        f"{default_of(self, name)!r}."
                    )
        if (
            self.replaced_loss == "nll"
            and "teacher" not in self.rollouts
            and not (ACCEPT in self._ideas and make_idea(ACCEPT, self).judges)
        ):
            raise ValueError(
                f"replaced_loss='nll' would have no effect: the teacher replaces no token with rollout={self.rollout!r}, "
                f"accept={describe(self.accept)!r} and lmbda={self.lmbda}. Set rollout='interleaved' and a rule that judges, or "
                "leave it at 'divergence'."
            )
        if self.lmbda_unit == "prompt" and (self.rollout == "dataset" or self.seq_kd):
            raise ValueError(
                "lmbda_unit='prompt' gives some prompts of a step a sampled response and the others the data set's; with "
                f"rollout={self.rollout!r} and seq_kd={self.seq_kd} there are not both. Leave it at 'step'."
            )

    def without_effect(self) -> list[str]:
        """What to say of settings that were changed and do nothing in this run: those of kept responses, and of sampling."""
        of_responses = ("log_completions_steps", "log_fixed_prompts", "num_completions_to_print")
        of_sampling = ("compile_student", "capture_sampling", "sampling_copy", "merge_adapter", "log_completions")
        reasons = {name: "responses are kept and shown with log_completions=True" for name in of_responses}
        unused = [] if self.log_completions else list(of_responses)
        if not self.samples:
            unused += of_sampling
            why = f"no step trains on sampled responses with rollout={self.rollout!r} and lmbda={self.lmbda}"
            reasons |= dict.fromkeys(of_sampling, why)
        changed = [name for name in unused if not is_default(self, name) and getattr(self, name) is not False]
        return [f"{name}={getattr(self, name)!r} has no effect on this training: {reasons[name]}." for name in changed]

    def check_numbers(self) -> None:
        """Makes all that numbers go into; see [`ScheduledNumbers`]."""
        if not 0.0 <= self.lmbda <= 1.0:
            raise ValueError(f"lmbda={self.lmbda} must be a share, from 0 to 1.")
        for idea_field in self._ideas:
            make_idea(idea_field, self)
        for fields, make in (
            ("temperature, student_top_p", self.student_sampling),
            ("teacher_temperature, teacher_top_p", self.teacher_sampling),
        ):
            try:
                make()
            except (ValueError, TypeError) as error:
                raise ValueError(f"{fields}: {error}") from error

    @property
    def _ideas(self) -> list[IdeaField]:
        """The fields whose ideas this run uses."""
        return [ACCEPT, DIVERGENCE] if "interleaved" in self.rollouts else [DIVERGENCE]

    def student_sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_p=self.student_top_p)

    def teacher_sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.teacher_temperature, top_p=self.teacher_top_p)

    def acceptance_rule(self, rollout: str = "interleaved") -> AcceptanceRule:
        """The rule that makes responses as `rollout` names them."""
        fixed = {"student": "always", "teacher": "never"}
        return ACCEPTANCE_RULES[fixed[rollout]]() if rollout in fixed else make_idea(ACCEPT, self)

    def draft_length(self) -> DraftLength:
        """A new policy, which has measured nothing yet."""
        if self.num_draft_tokens is None:
            return DraftLength.of(5 if self.full_determinism else AUTO)
        return DraftLength.of(self.num_draft_tokens)

    def make_divergence(self) -> Callable[..., Tensor]:
        return make_idea(DIVERGENCE, self)

    def used_numbers(self) -> dict[str, Number]:
        """The numbers that a schedule may move: those that this run uses."""
        numbers = {"lmbda": Number(self.lmbda, False)} if self.rollout != "dataset" else {}
        names = ("temperature", "student_top_p") if self.rollout in ("interleaved", "student") else ()
        if self.rollout in ("interleaved", "teacher") or self.seq_kd:
            names += ("teacher_temperature", "teacher_top_p")
        numbers |= {name: Number(getattr(self, name), False) for name in names}
        for idea_field in self._ideas:
            numbers |= numbers_of(idea_field, self)
        return numbers

    # What others make of it

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.TrainingArguments.to_dict`], with ideas given as objects shown by their name or repr."""
        settings = super().to_dict()
        for name in self._IDEA_FIELDS:
            settings[name] = describe(settings[name])
        if settings["schedules"]:
            settings["schedules"] = {
                path: asdict(setting) if isinstance(setting, Schedule) else setting
                for path, setting in settings["schedules"].items()
            }
        return settings

    def described(self):
        """A copy in which ideas given as objects are replaced by their names in `to_dict`: it can be pickled, and read without their code."""
        config = copy.copy(self)
        for name in self._IDEA_FIELDS:
            setattr(config, name, describe(getattr(self, name)))
        return config

    @property
    def rollouts(self) -> set[str]:
        """All that write responses in this run, as `rollout` names them."""
        others = "teacher" if self.seq_kd else "dataset"
        if self.rollout == "dataset":
            return {others}
        lowest, highest = self.range_of("lmbda")
        return ({self.rollout} if highest > 0 else set()) | ({others} if lowest < 1 else set())

    @property
    def samples(self) -> bool:
        """Whether any step trains on sampled responses."""
        return self.rollouts != {"dataset"}
