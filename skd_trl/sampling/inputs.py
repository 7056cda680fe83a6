"""What interleaved sampling refuses before it starts: prompts, numbers and vocabularies that cannot work.

Shapes: B prompts, P prompt.
"""

import torch


def check_inputs(student, teacher, prompt_ids, prompt_mask, max_new_tokens, vocab_size, max_rows) -> int:
    """The number of ids that both models share; arguments as `interleaved_sample`'s.

    Raises:
        `ValueError`: for models, prompts or numbers that cannot work; the message names the row or the argument.
    """
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("max_rows", 1 if max_rows is None else max_rows),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    _check_prompts(prompt_ids, prompt_mask)
    longest, largest = int(prompt_mask.sum(dim=1).max()), int((prompt_ids * prompt_mask).max())
    widths = {}
    for name, model in (("student", student), ("teacher", teacher)):
        config = model.config.get_text_config()
        widths[name] = config.vocab_size
        room = positions_of(config)
        if room is not None and longest + max_new_tokens > room:
            raise ValueError(
                f"The longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} it needs "
                f"{longest + max_new_tokens} positions, but the {name} has {room} to sample in. Shorten prompts or max_new_tokens."
            )
    if vocab_size is None and widths["student"] != widths["teacher"]:
        raise ValueError(
            f"The student's vocabulary has {widths['student']} entries and the teacher's {widths['teacher']}. If both use "
            "the same tokenizer and their heads are only padded differently, pass vocab_size, the number of ids they share."
        )
    shared = min(widths.values()) if vocab_size is None else vocab_size
    if not 0 < shared <= min(widths.values()):
        raise ValueError(f"vocab_size={shared} must be between 1 and {min(widths.values())}, what both models have.")
    if largest >= shared:
        raise ValueError(f"A prompt holds token id {largest}, beyond the {shared} ids that both models share.")
    return shared


def positions_of(config) -> int | None:
    """Positions that sampled texts may use (`None`: no limit known): the model's, and with longrope (Phi-3's long contexts) those
    of its short factors. Beyond them a forward turns every row of the batch by other angles than its cached keys."""
    room = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(room, rope.get("original_max_position_embeddings", room))
    return room


def _check_prompts(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape or len(prompt_ids) == 0:
        raise ValueError(
            f"prompt_ids {tuple(prompt_ids.shape)} and prompt_mask {tuple(prompt_mask.shape)} must both be (B, P), B > 0."
        )
    lengths, width = prompt_mask.sum(dim=1), prompt_ids.shape[1]
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Prompts {empty} are empty: there is nothing to continue. Give each at least one token.")
    wanted = torch.arange(width, device=prompt_ids.device) >= width - lengths[:, None]
    wrong = (prompt_mask.bool() != wanted).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"Prompts {wrong} are not left-padded (the 1s of prompt_mask must stand at the right). Pad on the left."
        )
