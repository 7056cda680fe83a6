"""Configuration of `SKDTrainer`: GKDConfig's fields keep their meaning, and what interleaved sampling adds stands here."""

from dataclasses import dataclass, field
from typing import Any

from ._compat import GKDConfig
from .inherited_options import check_inherited_options
from .loss.divergences import DIVERGENCES
from .sampling.acceptance import ACCEPTANCE_RULES, AcceptanceRule
from .sampling.draft_length import AUTO, DraftLength
from .sampling.sampling_params import SamplingParams


ROLLOUTS = ("interleaved", "student", "teacher", "dataset")
REPLACED_LOSSES = ("divergence", "nll")


@dataclass
class SKDConfig(GKDConfig):
    """
    Configuration class for [`SKDTrainer`].

    This class includes only the parameters that are specific to SKD training, and those of
    [`~trl.experimental.gkd.GKDConfig`] whose default differs. Defaults are those of the paper (Xu et al., ICLR 2025,
    arXiv 2410.11325) and of its authors' settings, where they give any and the responses depend on them.

    Args:
        rollout (`str`, *optional*, defaults to `"interleaved"`):
            Who writes the responses: `"interleaved"` (student and teacher together: SKD), `"student"` (on-policy
            distillation), `"teacher"` (sequence-level distillation), `"dataset"` (supervised distillation).
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of optimizer steps trained on sampled responses. The other steps train on the data set's own, or with
            `seq_kd` on the teacher's.
        accept (`str`, *optional*, defaults to `"top_k"`):
            Rule by which a proposal of the student stands, one of `ACCEPTANCE_RULES`.
        accept_top_k (`int`, *optional*, defaults to `25`):
            K of the `top_k` rule.
        accept_kwargs (`dict`, *optional*):
            Parameters of the other rules, such as `{"alpha": 0.25}` for `min_prob`.
        num_draft_tokens (`int` or `str`, *optional*):
            Tokens the student drafts before the teacher verifies them (the paper: 5). Changes the cost, not the
            distribution of the responses. `"auto"` measures both models in the first rounds, follows the acceptance, and
            takes the length with the lowest cost per token. Its measurements differ from run to run, and blocks of another
            shape round differently: only a number repeats a run exactly (a resumed run, once measured, repeats itself
            either way). By default `"auto"`, and 5 with `full_determinism=True`.
        temperature (`float`, *optional*, defaults to `0.5`), student_top_p (`float`, *optional*, defaults to `0.5`):
            Temperature (0: greedy) and nucleus of the student's draws.
        teacher_temperature (`float`, *optional*, defaults to `0.2`), teacher_top_p (`float`, *optional*, defaults to `0.5`):
            The same for the teacher's.
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            One of `DIVERGENCES`. The inherited `beta` belongs to `"jsd"`.
        divergence_kwargs (`dict`, *optional*):
            Parameters of the other divergences, such as `{"alpha": 0.1}` for `skew_forward_kl`.
        replaced_loss (`str`, *optional*, defaults to `"divergence"`):
            Loss at replaced tokens: the divergence as everywhere (SKD), or `"nll"`, the negative log-likelihood of the
            teacher's token (CA-OPD, IPD).
        loss_chunk_size (`int`, *optional*):
            Positions whose logits are in memory at once. By default chosen so that they take about 64 MiB (on CPU 16 to 30).
        rollout_batch_size (`int`, *optional*):
            Responses written at once on each device; freed places are refilled. By default all of an optimizer step.
        compile_student (`bool`, *optional*, defaults to `False`):
            Whether the student drafts in static shapes through `torch.compile`, on CUDA with CUDA graphs: for small
            students on GPUs. The first steps compile, and the student's cache stays in memory. Not for a student that
            ZeRO-3 or FSDP2 shards. (The inherited `torch_compile` is for the training step; sampling runs without it.)
        max_prompt_length (`int`, *optional*):
            Rows with a longer prompt are left out. By default `max_length - max_new_tokens`.
        max_response_length (`int`, *optional*):
            Reference responses are cut after this many tokens. By default `max_length - max_prompt_length`.
        chat_template_kwargs (`dict`, *optional*):
            Given to the chat template, such as `{"enable_thinking": False}`.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to keep sampled responses: a table in the terminal and
            `output_dir/completions/completions_{step}.parquet`, with what the teacher replaced.
        log_completions_steps (`int`, *optional*):
            Every how many steps. By default `logging_steps`.
        num_completions_to_print (`int`, *optional*, defaults to `3`):
            Rows of the table in the terminal.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under DeepSpeed ZeRO-3 and FSDP2, whether the student's parameters are gathered while it samples. Faster,
            but each device then holds the whole student for that time.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            Whether the teacher is spread over the devices under DeepSpeed ZeRO-1 and 2 as well, in a ZeRO-3 engine of
            its own. Under ZeRO-3 and FSDP2 it always is.
    """

    _VALID_DICT_FIELDS = GKDConfig._VALID_DICT_FIELDS + ["accept_kwargs", "divergence_kwargs", "chat_template_kwargs"]

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
    accept: str = field(
        default="top_k",
        metadata={"help": "Rule by which a proposal of the student stands.", "choices": list(ACCEPTANCE_RULES)},
    )
    accept_top_k: int = field(
        default=25,
        metadata={
            "help": "A proposal stands if it is among this many likeliest tokens of the teacher (K; paper: 25)."
        },
    )
    accept_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the other acceptance rules, such as {'alpha': 0.25}."}
    )
    # HfArgumentParser reads a value as text only if None is admitted too.
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
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence from the teacher at each token (paper: forward_kl).",
            "choices": list(DIVERGENCES),
        },
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the divergence, such as {'alpha': 0.1}; jsd takes beta."}
    )
    replaced_loss: str = field(
        default="divergence",
        metadata={
            "help": "Loss at replaced tokens: 'divergence' as everywhere (SKD), or 'nll', the negative log-likelihood of "
            "the teacher's token.",
            "choices": list(REPLACED_LOSSES),
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Positions whose logits are in memory at once. Default: as many as take about 64 MiB (CPU: 16 to 30)."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Responses written at once on each device; freed places are refilled. Default: all of an optimizer "
            "step."
        },
    )
    compile_student: bool = field(
        default=False,
        metadata={
            "help": "Draft in static shapes through torch.compile, on CUDA with CUDA graphs: for small students on GPUs. "
            "The first steps compile."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Rows with a longer prompt are left out. Default: max_length - max_new_tokens."},
    )
    max_response_length: int | None = field(
        default=None,
        metadata={
            "help": "Reference responses are cut after this many tokens. Default: max_length - max_prompt_length."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Given to the chat template, such as {'enable_thinking': false}."}
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Keep sampled responses: a table in the terminal and output_dir/completions/*.parquet."},
    )
    log_completions_steps: int | None = field(
        default=None, metadata={"help": "Every how many steps sampled responses are kept. Default: logging_steps."}
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
    shard_teacher: bool = field(
        default=False,
        metadata={
            "help": "Spread the teacher over the devices under DeepSpeed ZeRO-1 and 2 as well, in a ZeRO-3 engine of its "
            "own. Under ZeRO-3 and FSDP2 it always is."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice("rollout", self.rollout, ROLLOUTS)
        check_choice("accept", self.accept, ACCEPTANCE_RULES)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("replaced_loss", self.replaced_loss, REPLACED_LOSSES)
        if isinstance(self.num_draft_tokens, str) and self.num_draft_tokens.isdecimal():
            self.num_draft_tokens = int(self.num_draft_tokens)
        if self.num_draft_tokens == AUTO and self.full_determinism:
            raise ValueError(
                "num_draft_tokens='auto' follows measured times, which differ from run to run; with full_determinism=True "
                "give a number (the paper's is 5)."
            )
        check_inherited_options(self)
        self.draft_length()
        for name in ("max_new_tokens", "log_completions_steps", "num_completions_to_print"):
            check_positive(name, getattr(self, name))
        for name in ("loss_chunk_size", "rollout_batch_size", "max_prompt_length", "max_response_length"):
            check_positive(name, getattr(self, name))
        if self.max_length is not None and self.max_prompt_length is None and self.max_new_tokens >= self.max_length:
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
        # What these factories refuse is reported with the field it came from.
        for fields, make in (
            ("temperature, student_top_p", self.student_sampling),
            ("teacher_temperature, teacher_top_p", self.teacher_sampling),
            ("accept, accept_top_k, accept_kwargs", self.acceptance_rule),
            ("divergence, divergence_kwargs, beta", self.make_divergence),
        ):
            try:
                make()
            except (ValueError, TypeError) as error:
                raise ValueError(f"{fields}: {error}") from error

    def student_sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_p=self.student_top_p)

    def teacher_sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.teacher_temperature, top_p=self.teacher_top_p)

    def acceptance_rule(self, rollout: str = "interleaved") -> AcceptanceRule:
        """The rule that makes responses as `rollout` names them."""
        name = {"student": "always", "teacher": "never"}.get(rollout, self.accept)
        kwargs = {"k": self.accept_top_k} if name == "top_k" else {}
        return ACCEPTANCE_RULES[name](**kwargs, **((self.accept_kwargs or {}) if name == self.accept else {}))

    def draft_length(self) -> DraftLength:
        """A new policy, which has measured nothing yet."""
        if self.num_draft_tokens is None:
            return DraftLength.of(5 if self.full_determinism else AUTO)
        return DraftLength.of(self.num_draft_tokens)

    def make_divergence(self):
        kwargs = {"beta": self.beta} if self.divergence == "jsd" else {}
        return DIVERGENCES[self.divergence](**kwargs, **(self.divergence_kwargs or {}))

    @property
    def samples(self) -> bool:
        """Whether any step trains on sampled responses."""
        return (self.rollout != "dataset" and self.lmbda > 0) or self.seq_kd

    @property
    def prompt_limit(self) -> int | None:
        """Tokens a prompt may have; `None` is no limit but the models' positions."""
        if self.max_prompt_length is not None or self.max_length is None:
            return self.max_prompt_length
        return self.max_length - self.max_new_tokens

    @property
    def response_limit(self) -> int | None:
        """Tokens of a reference response that are used; `None` is all."""
        if self.max_response_length is not None or self.max_length is None:
            return self.max_response_length
        return max(self.max_length - self.prompt_limit, 1)


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def check_positive(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
