"""What travels between a trainer and the teacher's server: safetensors, so plain numbers in a known layout and no code.

A request holds N texts, the answer what the teacher says of the last S tokens of each (or, with S = 0, of the token that would
follow: one position). Per position that are k ids and k log-probabilities of four bytes each, and eight bytes of the token; or
the H numbers of its last hidden state, as the model has them. The head that makes logits of these travels once.

Shapes: N texts, L all their tokens, S scored positions, k known tokens, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..sampling.top_judgement import Scores


VERSION = 1
MEDIA_TYPE = "application/vnd.safetensors"
INFO_ROUTE, SCORE_ROUTE = "/skd/v1/info", "/skd/v1/score"
HIDDEN_STATES_ROUTE, HEAD_ROUTE = "/skd/v1/hidden_states", "/skd/v1/head"


@dataclass(frozen=True)
class Request:
    """`texts`: ids of each text. `num_scored` (S): how many of their last tokens are asked for. `top_k`: k, of a question for
    scores."""

    texts: Sequence[Sequence[int]]
    num_scored: int
    top_k: int = 1


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: scale * (hidden W^T + bias), then soft-capped where `softcap` is not 0.

    Attributes:
        weight (`torch.Tensor` `(V, H)`), bias (`torch.Tensor` `(V,)`, *optional*): in the teacher's type.
        scale, softcap (`float`): one of them is without effect (1, or 0).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float


def pack_request(request: Request) -> bytes:
    tokens = [token for text in request.texts for token in text]
    return save(
        {
            "tokens": torch.tensor(tokens, dtype=torch.int32),  # (L,)
            "lengths": torch.tensor([len(text) for text in request.texts], dtype=torch.int32),  # (N,)
            "numbers": torch.tensor([VERSION, request.num_scored, request.top_k], dtype=torch.int32),
        }
    )


def unpack_request(body: bytes) -> Request:
    """Raises `ValueError` for anything else than a request of this version."""
    try:
        values = load(body)
        version, num_scored, top_k = values["numbers"].tolist()
        lengths = values["lengths"].tolist()
        texts = [part.tolist() for part in values["tokens"].split(lengths)]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"The body is no request that this server knows ({error}).") from error
    if version != VERSION:
        raise ValueError(
            f"The request has version {version} and this server speaks {VERSION}: install one skd_trl on both."
        )
    if not texts or top_k < 1 or not 0 <= num_scored < min(lengths):
        raise ValueError(
            f"num_scored={num_scored} and top_k={top_k} for texts of {lengths} tokens: each needs a token before those that are "
            "scored, and top_k is at least 1."
        )
    return Request(texts, num_scored, top_k)


def pack_scores(scores: Scores) -> bytes:
    return save(
        {
            "ids": scores.ids.to(torch.int32).contiguous(),
            "log_probs": scores.log_probs.float().contiguous(),
            "token_log_probs": scores.token_log_probs.float().contiguous(),
            "token_ranks": scores.token_ranks.to(torch.int32).contiguous(),
        }
    )


def unpack_scores(body: bytes) -> Scores:
    """Raises `ValueError` for anything else than an answer."""
    try:
        values = load(body)
        return Scores(
            values["ids"].long(), values["log_probs"], values["token_log_probs"], values["token_ranks"].long()
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"The server's answer cannot be read ({error}).") from error


def pack_hidden_states(states: torch.Tensor) -> bytes:
    """Of the states (N, S, H)."""
    return save({"states": states.contiguous()})


def unpack_hidden_states(body: bytes) -> torch.Tensor:
    """Raises `ValueError` for anything else than an answer."""
    try:
        return load(body)["states"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"The server's answer cannot be read ({error}).") from error


def pack_head(head: Head) -> bytes:
    tensors = {
        "weight": head.weight.contiguous(),
        "shaping": torch.tensor([head.scale, head.softcap], dtype=torch.float64),
    }
    return save(tensors if head.bias is None else {**tensors, "bias": head.bias.contiguous()})


def unpack_head(body: bytes) -> Head:
    """Raises `ValueError` for anything else than a head."""
    try:
        values = load(body)
        scale, softcap = values["shaping"].tolist()
        return Head(values["weight"], values.get("bias"), scale, softcap)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"The server's head cannot be read ({error}).") from error
