"""How far a student's next-token distributions are from its teacher's, over given responses.

The responses may be the teacher's own (where the teacher would go) or the student's samples (where the student goes, which
on-policy training aims at); neither needs a reference. Letters: B rows, T response, V vocabulary, N positions.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..data.vocabulary import shared_vocab_size
from ..loss.divergences import forward_kl
from ..sampling.ragged_cache import eval_mode
from .held_out import Decoding, batches, gather_rows, left_pad


# Positions whose probabilities are computed at once: they are fp32, however small the models' numbers are.
CHUNK_SIZE = 128


@torch.no_grad()
def token_divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: list[list[int]],
    responses: list[list[int]],
    *,
    decoding: Decoding,
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    description: str = "",
    max_logits: int = 2**26,
) -> np.ndarray:
    """
    A divergence over the response tokens of each row, in nats: `(rows, 2)`, its sum and the number of tokens.

    Only the logits of response positions are computed, of as many rows at once as keep them below `max_logits` numbers.
    Vocabularies padded to different sizes are cut to the shared range.

    Args:
        student, teacher ([`~transformers.PreTrainedModel`]): in this process.
        prompt_ids, responses (`list` of `list[int]`): a prompt and a response for each row.
        decoding ([`Decoding`]): rows at once, padding, and the longest response that there may be.
        divergence (`Callable`, *optional*): of the student's and the teacher's logits (N, V): (N,). By default
            KL(teacher || student).
    """
    divergence, sums = divergence or forward_kl(), {}
    vocab_size = shared_vocab_size(student, teacher)
    # From the limit on response length, not from the responses: all processes have to cut the same number of batches.
    rows_at_once = min(decoding.batch_size, max(1, max_logits // (decoding.max_new_tokens * vocab_size)))
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, responses, strict=True)]
    with eval_mode(student), eval_mode(teacher):
        for batch in batches(lengths, rows_at_once, description):
            prompts, prompt_mask = left_pad([prompt_ids[row] for row in batch], decoding.pad_token_id, student.device)
            tails = [torch.tensor(responses[row], device=student.device) for row in batch]
            mask = pad_sequence([torch.ones_like(tail) for tail in tails], batch_first=True)  # (B, T)
            attention_mask = torch.cat([prompt_mask, mask], dim=1)
            inputs = {
                "input_ids": torch.cat([prompts, pad_sequence(tails, True, decoding.pad_token_id)], dim=1),
                "attention_mask": attention_mask,
                "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
                "logits_to_keep": mask.shape[1] + 1,
                "use_cache": False,
            }
            # Logits at t predict token t + 1, so the last of the T + 1 rows has nothing to predict.
            student_logits = student(**inputs).logits[:, :-1, :vocab_size][mask.bool()]  # (N, V)
            teacher_inputs = {
                name: value.to(teacher.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
            teacher_logits = teacher(**teacher_inputs).logits[:, :-1, :vocab_size].to(student.device)[mask.bool()]
            values = torch.cat(
                [
                    divergence(s.float(), t.float())
                    for s, t in zip(student_logits.split(CHUNK_SIZE), teacher_logits.split(CHUNK_SIZE), strict=True)
                ]
            )
            for row, of_row in zip(batch, values.double().split(mask.sum(1).tolist()), strict=True):
                sums[row] = (of_row.sum().item(), len(of_row))
    return np.array(gather_rows(sums), dtype=np.float64)
