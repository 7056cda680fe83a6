"""Inherited options that this package cannot follow: refused by name, never silently without effect.

`SKDConfig` inherits SFT's fields. What they do to the trainer (optimizer, adapters, logging, offloading) they do here. Some are
about a next-token loss or about texts packed into one row, and a distillation loss on sampled responses has no place for them.
"""

from typing import Any


# Field: the values that ask for nothing, and what to do instead of any other.
NOT_FOLLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((False,), "Each row is a prompt of its own that a response is sampled for; leave it False."),
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
        "The load-balancing loss of mixture-of-experts students is not added to the divergence; leave it None.",
    ),
}


def asks_for_lengths(args: Any) -> bool:
    """Whether the Trainer will sample rows by their lengths, which it reads from a column."""
    strategy = getattr(args, "train_sampling_strategy", None)
    return strategy in ("group_by_length", "batch_rebalance") or bool(getattr(args, "group_by_length", False))


def check_inherited_options(args: Any) -> None:
    """Raises `ValueError`, naming the field, if an inherited option asks for what this trainer does not do."""
    for name, (neutral, advice) in NOT_FOLLOWED.items():
        value = getattr(args, name, neutral[0])
        if value not in neutral:
            raise ValueError(f"{name}={value!r} would have no effect here. {advice}")
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
