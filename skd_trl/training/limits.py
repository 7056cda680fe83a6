"""How many tokens prompts, references and both together may have: by the settings, and by the positions that the models have.

Where responses are sampled, a prompt leaves room for `max_new_tokens`. Where none is, a prompt and its reference share `max_length`,
unless one of them has its own limit. `None` is no limit.
"""

from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel

from ..sampling.admission import positions_of
from ..skd_config import SKDConfig


def limits_of_rows(
    args: SKDConfig, student: PreTrainedModel, teachers: list[PreTrainedModel], server_length: int | None = None
) -> dict[str, int | None]:
    """What `RowRules` says of lengths.

    Args:
        args ([`SKDConfig`]): whose own limits are kept.
        student, teachers ([`~transformers.PreTrainedModel`]): in all of whose positions a row has to fit.
        server_length (`int`, *optional*): the tokens that a teacher's server takes.

    Raises:
        `ValueError`: if the response takes all positions of a model, or of the server.
    """
    prompts = [room_for_prompts(args, student, one) for one in teachers]
    texts = [room_for_texts(args, student, one) for one in teachers]
    if server_length is None:
        of_prompt, of_text, own = None, None, limits_of_teacher_prompts(args, teachers)
    else:  # there is no teacher in this process: the positions of `teachers` are not its own
        of_prompt, of_text = limits_of_server(args, server_length)
        own = limits_of_teacher_prompts(args, [])
    return {
        "max_prompt_length": smallest((*prompts, of_prompt)),
        "max_response_length": response_limit(args),
        "max_text_length": smallest((*texts, of_text)),
        "max_teacher_prompt_length": smallest((own["max_teacher_prompt_length"], of_prompt)),
        "max_teacher_text_length": smallest((own["max_teacher_text_length"], of_text)),
    }


def smallest(limits: Iterable[int | None]) -> int | None:
    """The smallest of several limits, of which `None` is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def room_for_prompts(args: SKDConfig, student: PreTrainedModel, teacher: PreTrainedModel) -> int | None:
    """The longest prompt that both models have positions for, or a lower limit that `args` sets; `None` is no limit.

    Raises:
        `ValueError`: if the response takes all positions of a model.
    """
    positions = _positions(args, student, teacher)
    if args.samples:
        return smallest((_prompt_limit(args), room_beside(args.max_new_tokens, positions)))
    return smallest((_prompt_limit(args), *(number - 1 for number in positions.values())))


def room_beside(max_new_tokens: int, positions: Mapping[str, int | None]) -> int | None:
    """The longest prompt that leaves every model room for a response, given the positions of each by name; `None` is no limit.

    Raises:
        `ValueError`: if the response takes all positions of a model.
    """
    known = {name: number for name, number in positions.items() if number is not None}
    for name, number in known.items():
        if number <= max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the {name} has {number} positions "
                "(max_position_embeddings, or with longrope original_max_position_embeddings). Lower max_new_tokens."
            )
    return smallest(number - max_new_tokens for number in known.values())


def room_for_texts(args: SKDConfig, student: PreTrainedModel, teacher: PreTrainedModel) -> int | None:
    """The most tokens that a prompt and its reference may have together; learned positions end there with an IndexError."""
    has_own_limits = args.samples or args.max_prompt_length is not None or args.max_response_length is not None
    own = None if has_own_limits else args.max_length
    return smallest((own, *_positions(args, student, teacher).values()))


def limits_of_teacher_prompts(args: SKDConfig, teachers: list[PreTrainedModel]) -> dict[str, int | None]:
    """What `RowRules` says of the lengths of prompts that the teacher alone reads."""
    positions = smallest(_positions(args, teacher, teacher).get("teacher") for teacher in teachers)
    room = None if positions is None else positions - (args.max_new_tokens if args.samples else 1)
    return {
        "max_teacher_prompt_length": smallest((args.max_teacher_prompt_length, room)),
        "max_teacher_text_length": positions,
    }


def limits_of_server(args: SKDConfig, max_length: int) -> tuple[int, int]:
    """The longest prompt, and the longest prompt and response together, of a teacher's server that takes `max_length` tokens. It
    generates one after each text that it scores.

    Raises:
        `ValueError`: if the response takes all of them.
    """
    text = max_length - 1
    prompt = text - (args.max_new_tokens if args.samples else 1)
    if prompt < 1:
        raise ValueError(
            f"max_new_tokens={args.max_new_tokens} leaves no room for a prompt: the teacher's server takes {max_length} tokens, one of "
            "which it generates itself. Lower max_new_tokens, or start the server with a larger --max-model-len."
        )
    return prompt, text


def _positions(args: SKDConfig, student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, int]:
    """The positions of each model that has a limit of them."""
    found = {}
    for name, model in (("student", student), ("teacher", teacher)):
        config = model.config.get_text_config()
        positions = positions_of(config) if args.samples else getattr(config, "max_position_embeddings", None)
        if positions is not None:
            found[name] = positions
    return found


def response_limit(args: SKDConfig) -> int | None:
    """Tokens of a reference response that are used; `None` is all, or what [`room_for_texts`] leaves."""
    is_open = args.max_prompt_length is None and not args.samples
    if args.max_response_length is not None or args.max_length is None or is_open:
        return args.max_response_length
    longest_prompt = _prompt_limit(args)
    assert longest_prompt is not None  # as max_length is set
    return max(args.max_length - longest_prompt, 1)


def _prompt_limit(args: SKDConfig) -> int | None:
    if args.max_prompt_length is not None or args.max_length is None:
        return args.max_prompt_length
    return args.max_length - (args.max_new_tokens if args.samples else 1)
