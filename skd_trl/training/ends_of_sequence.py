"""What training stopped at is what the student stops at afterwards: in memory, in its checkpoints and where it is saved."""

import copy
from collections.abc import Iterable

from transformers import PreTrainedModel


def stop_at(student: PreTrainedModel, eos_token_ids: Iterable[int]) -> None:
    """Puts `eos_token_ids` that the student's head has behind the ends that its generation_config knows. The object it came with
    stays as it was."""
    config = getattr(student, "generation_config", None)
    if config is None:
        return
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    own = [i for i in own if i is not None and i >= 0]
    added = [i for i in eos_token_ids if i not in own and i < student.config.get_text_config().vocab_size]
    if added:
        ends = own + added
        student.generation_config = copy.deepcopy(config)
        student.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
