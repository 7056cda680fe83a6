"""What student and teacher have to have before training: room for the prompts, heads that do what the loss takes them to do."""

from transformers import PreTrainedModel

from ..loss.lm_head import LMHead
from ..sampling.admission import positions_of
from ..skd_config import SKDConfig
from .distributed import is_sharded


def room_for_prompts(args: SKDConfig, student: PreTrainedModel, teacher: PreTrainedModel) -> int | None:
    """The longest prompt that both models have positions for, or a lower limit that `args` sets."""
    limits = [] if args.prompt_limit is None else [args.prompt_limit]
    for name, model in (("student", student), ("teacher", teacher)):
        config = model.config.get_text_config()
        positions = positions_of(config) if args.samples else getattr(config, "max_position_embeddings", None)
        if positions is None:
            continue
        if positions <= args.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={args.max_new_tokens} leaves no room for a prompt: the {name} has {positions} positions "
                "(max_position_embeddings, or with longrope original_max_position_embeddings). Lower max_new_tokens."
            )
        limits.append(positions - args.max_new_tokens)
    return min(limits, default=None)


def verify_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises `ValueError` if a head's logits are not the model's own (see [`LMHead.verify`])."""
    for name, model in (("student", student), ("teacher", teacher)):
        if not is_sharded(model) and not LMHead.of(model).verify(model):
            raise ValueError(
                f"The {name}, {type(model).__name__}, makes its logits from its hidden states in a way that this package does "
                "not know (something between the last hidden state and the logits, other than a scale and a soft cap), "
                "so the loss would be computed on wrong logits. Use another architecture, or report this one."
            )
