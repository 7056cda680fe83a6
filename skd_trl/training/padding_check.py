"""Does a model compute the same for a row of tokens whatever comes after it, more text or padding? Found by running it.

It has to: a batch holds rows of different lengths, each padded at the right, and what a row teaches must not depend on the row
beside it. A model that sees later tokens would see what it is to predict.

Shapes: T tokens of a row, H hidden.
"""

import torch
from transformers import PreTrainedModel

from ..sampling.ragged_cache import attention_implementation, eval_mode, sampling_attention
from .last_hidden_states import last_hidden_states


def check_padding(name: str, model: PreTrainedModel, ids: list[int], padding: int) -> float:
    """How far (relative) hidden states of a row of `ids` move when more of them, or `padding`, follow: rounding, else it is refused.

    Raises:
        `ValueError`: for hidden states that are not finite, and for a difference beyond rounding; it calls the model `name`.
    """
    longer, row = ids[:11], ids[:4]
    alone = _hidden_states(model, [row], [4])[0]
    if not alone.isfinite().all():
        raise ValueError(
            f"The {name}, {type(model).__name__}, makes NaN or infinite hidden states of a few plain tokens. Load its "
            "weights again, or in a type of more range (dtype: bfloat16 or float32)."
        )
    padded = [*row, *[padding] * (len(longer) - 4)]
    with_text, with_padding = _hidden_states(model, [longer, padded], [len(longer), 4])[:, :4]
    # Rounding: batches of other shapes are summed in another order.
    limit = max(1e-3, *(16 * torch.finfo(dtype).eps for dtype in (alone.dtype, model.dtype)))
    if (error := _difference(with_text, alone)) > limit:
        raise ValueError(
            f"The {name}, {type(model).__name__}, is not causal: later tokens change its hidden states by {error:.1%} "
            f"(rounding: below {limit:.1%}), so it would see the token that it is to predict. Use a causal language "
            "model; some encoders become one with is_decoder=True in their config."
        )
    if (padded_error := _difference(with_padding, alone)) > limit:
        raise ValueError(
            f"The {name}, {type(model).__name__}, computes other hidden states for a row that padding follows, by "
            f"{padded_error:.1%} (rounding: below {limit:.1%}), so what a row teaches would depend on the longest row "
            "beside it. Use another architecture, or report this one."
        )
    return max(error, padded_error)


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, rows: list[list[int]], lengths: list[int]) -> torch.Tensor:
    input_ids = torch.tensor(rows, device=model.device)
    columns = torch.arange(input_ids.shape[1], device=model.device)
    attention_mask = (columns < torch.tensor(lengths, device=model.device)[:, None]).long()
    # The weights may still be on a CPU, which knows no flash attention.
    with eval_mode(model), attention_implementation(model, sampling_attention(model)):
        return last_hidden_states(model, model, input_ids=input_ids, attention_mask=attention_mask)


def _difference(hidden: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference (T, H), the median of the tokens: rounding sends one of them to other experts at times."""
    hidden, expected = hidden.float(), expected.float()
    return ((hidden - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
