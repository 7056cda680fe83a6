"""A teacher behind a server that sends its last hidden states: the judgement is made here, with a copy of its head.

Nothing is left out, so every rule, draw, gate and divergence is that of a teacher in this process. A position costs H numbers on the
wire and a product with the head here.

Shapes: N places in use, G draft, H hidden, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from .draft import Judgement
from .prompts import Prompts
from .sampling_params import SamplingParams
from .served_teacher import Scorer, ServedTeacher


class HiddenStatesScorer(Scorer):
    """A [`~skd_trl.sampling.served_teacher.Scorer`] whose server also sends hidden states."""

    @abstractmethod
    def hidden_states(self, texts: Sequence[Sequence[int]], num_scored: int, keys: Sequence[int]) -> torch.Tensor:
        """The hidden states, before the teacher's head, that predict the last `num_scored` tokens of each text, on the CPU and in the
        teacher's type: (N, `num_scored`, H). With 0, that which predicts the token that would follow: (N, 1, H)."""


class ServedHiddenStates(ServedTeacher):
    """
    Args:
        scorer ([`HiddenStatesScorer`]): the connection.
        make_logits (`Callable`): hidden states (N, G, H) to the teacher's logits (N, G, V), on the device of the prompts.
        sampling, prompts, vocab_size: as of [`~skd_trl.sampling.served_teacher.ServedTeacher`].
    """

    def __init__(
        self,
        scorer: HiddenStatesScorer,
        make_logits: Callable[[torch.Tensor], torch.Tensor],
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        *,
        prompts: Prompts | None = None,
        vocab_size: int | None = None,
    ):
        super().__init__(scorer, sampling, prompts=prompts, vocab_size=vocab_size)
        self.scorer: HiddenStatesScorer = scorer
        self.make_logits = make_logits

    def ask(
        self, texts: list[list[int]], num_scored: int, keys: list[int], index: tuple[torch.Tensor, torch.Tensor]
    ) -> Judgement:
        states = self.scorer.hidden_states(texts, num_scored, keys)[index].to(self.device)
        return Judgement(self.make_logits(states)[..., : self.num_ids], {"teacher_hidden_states": states})
