"""Inherited options, methods and attributes that this package cannot follow: refused by name, never silently without effect.

`SKDConfig` inherits SFT's fields. What they do to the trainer (optimizer, adapters, logging, offloading) they do here. Some are
about a next-token loss or about texts packed into one row, and a distillation loss on sampled responses has no place for them.
The same goes for methods of GKDTrainer and SFTTrainer that a subclass may replace, and for what GKDTrainer keeps for `generate`.
"""

from typing import Any


# Field: the values that ask for nothing, and what to do instead of any other.
NOT_FOLLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((False,), "Each row is one prompt, for which a response is sampled; leave it False."),
    "eval_packing": ((None, False), "Each row is evaluated by itself; leave it None."),
    "padding_free": ((False,), "Rows are padded; leave it False, and use per_device_train_batch_size to save memory."),
    "assistant_only_loss": (
        (False,),
        "The loss is on the response only, the last answer, in any case; leave it False, and set every_answer=True for a row for each answer.",
    ),
    "completion_only_loss": ((None, True), "The loss is on the response only; prompts have none. Leave it None."),
    "label_smoothing_factor": (
        (0.0,),
        "The loss is a divergence from the teacher, with no label to smooth; leave it 0.",
    ),
    "loss_type": (
        ("nll", "chunked_nll"),
        "It chooses among next-token losses; choose with `divergence`, and the teacher's tokens with `replaced_loss`.",
    ),
    "router_aux_loss_coef": (
        (None, 0.0, 0.001),  # 0.001: the default of TRL 1.9
        "The load-balancing loss of mixture-of-experts students is not added to the divergence; set it to 0.0.",
    ),
    "truncation_mode": (
        ("keep_start",),
        "A prompt over its limit is left out, as a cut template is no longer one, and a reference keeps its start; leave it "
        "'keep_start', and set max_prompt_length and max_response_length.",
    ),
    "packing_strategy": (("bfd",), "Nothing is packed; leave it 'bfd'."),
    "dataset_text_field": (
        ("text",),
        "Plain text does not say where its prompt ends; leave it 'text', and give `messages`, `prompt` and `completion`, or "
        "`prompt` alone (columns are renamed with Dataset.rename_column).",
    ),
}
# What the help of an inherited option, which is TRL's or transformers', does not say of it here.
DIFFERENT_HERE = {
    "teacher_model_name_or_path": "without any teacher the run is refused",
    "max_length": "prompts that are too long are left out, never cut",
    "metric_for_best_model": "SpecKDTrainer's default is ungated_loss",
}
# Methods that a subclass, or a script, may put its own in the place of, and what to use instead.
NOT_CALLED = {
    "generalized_jsd_loss": "Give your function as `divergence`: it takes the student's and the teacher's logits, (N, V) each, and "
    "returns one number per token, (N,). Masks and the division by the tokens of the step are the trainer's.",
    "generate_on_policy_outputs": "Choose who writes the responses with `rollout`, what the teacher replaces with `accept` (a name or an "
    "AcceptanceRule of yours) and how draws are shaped with temperature, student_top_p, teacher_temperature and teacher_top_p; or "
    "write the responses beforehand, and give them as `completion` with rollout='dataset'.",
    "_prepare_dataset": "Turn the rows into `messages`, or `prompt` and `completion`, with `formatting_func` or Dataset.map.",
}
GENERATION_ADVICE = (
    "responses are not written by `generate`. Set max_new_tokens, temperature and student_top_p (teacher_temperature and "
    "teacher_top_p for the teacher's draws) in the arguments, or change trainer.temperature while it trains. A callback that generates "
    "takes a GenerationConfig for itself."
)
# Numbers that GKDTrainer keeps as attributes of the trainer, where callbacks change them.
FOLLOWED_ATTRIBUTES = ("lmbda", "beta", "temperature")


def note_on(name: str) -> str:
    """What the help of an inherited option does not say: that it is not followed, or what is different."""
    if name in NOT_FOLLOWED:
        return f"Another value than {NOT_FOLLOWED[name][0][0]!r} is refused here: {NOT_FOLLOWED[name][1]}"
    return f"Here {DIFFERENT_HERE[name]}." if name in DIFFERENT_HERE else ""


class Absent:
    """An attribute that GKDTrainer has and that nothing here would read: reading or setting it says what to do instead."""

    def __init__(self, advice: str):
        self.advice = advice

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        raise AttributeError(f"{owner.__name__} has no {self.name}: {self.advice}")

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(f"{type(instance).__name__} has no {self.name}: {self.advice}")


def asks_for_lengths(args: Any) -> bool:
    """Whether the Trainer will sample rows by their lengths, which it reads from a column."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy in ("group_by_length", "batch_rebalance") or bool(getattr(args, "group_by_length", False))


def check_inherited_options(args: Any) -> None:
    """Raises `ValueError`, naming the field, if an inherited option asks for what this trainer does not do."""
    for name, (neutral, advice) in NOT_FOLLOWED.items():
        if (value := getattr(args, name, neutral[0])) not in neutral:
            raise ValueError(f"{name}={value!r} would have no effect here. {advice}")
    if others := set(args.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
        raise ValueError(
            f"dataset_kwargs holds {', '.join(map(repr, sorted(others)))}, which would have no effect here: rows become tokens as the "
            "chat template and the tokenizer say. Leave it out; chat_template_kwargs are given to the template."
        )
    if args.seq_kd and args.rollout != "dataset" and args.range_of("lmbda")[0] == 1:
        raise ValueError(
            "seq_kd=True would have no effect: it makes the teacher write the responses of the other steps, and with lmbda=1 "
            "there are none. Set rollout='teacher' for the teacher's texts alone, or lmbda below 1."
        )
    if args.pad_to_multiple_of is not None and args.samples:
        raise ValueError(
            f"pad_to_multiple_of={args.pad_to_multiple_of} would have no effect on sampled responses, which are padded to the "
            "longest of their batch; leave it None, or set rollout='dataset'."
        )


def check_overrides(trainer: Any, own_class: type) -> None:
    """Raises `ValueError` if a subclass of `own_class`, or a script, has put its own in the place of a method that is never called."""
    for name, advice in NOT_CALLED.items():
        replaced_by = next((c for c in type(trainer).__mro__ if c not in own_class.__mro__ and name in vars(c)), None)
        if replaced_by is not None or name in vars(trainer):
            where = "the trainer object" if replaced_by is None else replaced_by.__name__
            raise ValueError(f"{where} replaces {name}, which nothing here calls. {advice}")


def follow_attributes(args: Any, step_args: Any, attributes: dict[str, float], given: dict[str, float]) -> Any:
    """
    The arguments of a step with what callbacks have set on the trainer.

    Args:
        args: the run's arguments, which say what is scheduled.
        step_args: the arguments of the step, scheduled numbers at their values.
        attributes (`dict`): the trainer's `FOLLOWED_ATTRIBUTES` as they are now.
        given (`dict`): as the trainer has set them, at the start.

    Raises:
        `ValueError`: for a number that moves by a schedule too, or that this run does not use.
    """
    changed = {name: value for name, value in attributes.items() if value != given[name]}
    for name in changed:
        if name in (args.schedules or {}):
            raise ValueError(
                f"trainer.{name} was set to {changed[name]} while schedules move {name} too. Leave one of them out."
            )
    return step_args.with_numbers(changed)
