"""The student as a draft model: how much faster speculative decoding makes the teacher (SKD, arXiv 2410.11325, section 5).

The student drafts the teacher's own text by the rule `speculative`, whose result is the teacher's text exactly. Speculative
decoding (Leviathan et al., ICML 2023) keeps of each forward of the teacher the accepted run of G drafted tokens and one token more:
the replacement of the first rejected one, or after G accepted ones a draw from the teacher. The sampler of this package gives no
token more after G accepted ones, because training would then see teacher's tokens that nothing called for. Forwards are therefore
counted by the definition, over the same decisions: both ways the tokens are the teacher's, and a decision depends on the text
before it only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.vocabulary import shared_vocab_size
from ..sampling.acceptance import ACCEPTANCE_RULES
from ..sampling.interleaved import Execution, interleaved_sample
from ..sampling.other_device import OnOtherDevice
from ..sampling.participants import LocalParticipant
from ..sampling.prompts import Prompts
from ..sampling.rounds import Rounds
from ..sampling.sampling_params import SamplingParams
from .held_out import Decoding, batches, gather_rows, left_pad


@dataclass(frozen=True)
class Drafting:
    """How the student drafts: G tokens, at which temperatures (of both models; 0 is greedy), for how many of the prompts (the
    first ones; 0 is all)."""

    num_draft_tokens: int = 5
    temperatures: tuple[float, ...] = (0.0, 1.0)
    num_rows: int = 0


@torch.no_grad()
def draft_acceptance(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: list[list[int]],
    *,
    decoding: Decoding,
    num_draft_tokens: int = 5,
    temperature: float = 1.0,
    description: str = "",
) -> dict[str, np.ndarray]:
    """
    What happened to the student's drafts of the teacher's text, as columns `(rows, 2)` of a sum and its weight.

    The noise of a row is keyed by its number, so neither the batch size nor the number of processes changes a decision.

    Returns:
        `dict`: `accepted`, the accepted tokens in percent (100 x their number, and all tokens); and `tokens_per_forward`, the
            tokens of the text and the teacher's forwards that they take in speculative decoding.

    Raises:
        `ValueError`: for models that the sampler cannot run.
    """
    vocab_size = shared_vocab_size(student, teacher)
    student_part, teacher_part = (
        LocalParticipant(model, SamplingParams(temperature), vocab_size=vocab_size) for model in (student, teacher)
    )
    outcomes, rounds = {}, Rounds()  # what is captured for a batch serves the next
    for batch in batches([len(ids) for ids in prompt_ids], decoding.batch_size, description):
        ids, mask = left_pad([prompt_ids[row] for row in batch], decoding.pad_token_id, student.device)
        noise = [
            torch.rand((decoding.max_new_tokens, 3), generator=torch.Generator().manual_seed(decoding.seed + row))
            for row in batch
        ]
        judge = teacher_part
        if teacher.device != student.device:
            there = Prompts(ids.to(teacher.device), mask.to(teacher.device))
            judge = OnOtherDevice(teacher_part, there, student.device)
        rollout = interleaved_sample(
            student_part,
            judge,
            ids,
            mask,
            accept=ACCEPTANCE_RULES["speculative"](),
            max_new_tokens=decoding.max_new_tokens,
            eos_token_ids=decoding.eos_token_ids,
            noise=torch.stack(noise),
            execution=Execution(num_draft_tokens, agree=decoding.agree, rounds=rounds),
        )
        lengths = (rollout.labels != -100).sum(dim=1).tolist()
        for row, length, replaced in zip(batch, lengths, rollout.replaced.tolist(), strict=True):
            accepted = [not is_replaced for is_replaced in replaced[:length]]
            outcomes[row] = (100.0 * sum(accepted), length, num_forwards(accepted, num_draft_tokens))
    table = np.array(gather_rows(outcomes), dtype=np.float64)
    return {"accepted": table[:, [0, 1]], "tokens_per_forward": table[:, [1, 2]]}


def num_forwards(accepted: Sequence[bool], num_draft_tokens: int) -> int:
    """The teacher's forwards for a response, given of each token whether the student's proposal was accepted there: each takes the next
    accepted run, `num_draft_tokens` at most, and one token more."""
    position = forwards = 0
    while position < len(accepted):
        block = list(accepted[position : position + num_draft_tokens])
        position += (block.index(False) if False in block else len(block)) + 1
        forwards += 1
    return forwards
