"""The response tokens of a batch, taken out of their rectangle: everything after the models works on these N positions.

Logits at t predict token t+1, so the hidden state of a response's last token and that of the prompt's last but one have no
business in the loss. Shapes: B rows, P prompt, T response, N response tokens in all, row by row.
"""

from dataclasses import dataclass

import torch

from .collator import IGNORE_INDEX


@dataclass(frozen=True)
class ResponseTokens:
    """Which places of a batch (B, P+T) hold response tokens, and what they are.

    Attributes:
        mask (`torch.BoolTensor` of shape `(B, T)`): True on response tokens.
        labels (`torch.LongTensor` of shape `(N,)`): the tokens.
    """

    mask: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> "ResponseTokens":
        labels = batch["labels"][:, batch["prompts"].shape[1] :]
        mask = labels != IGNORE_INDEX
        return cls(mask, labels[mask])

    def predicted_by(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states (N, H) that predict the tokens, out of those of a whole batch (B, P+T, H)."""
        return hidden[:, -self.mask.shape[1] - 1 : -1][self.mask]

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Values (N, ...) at the tokens, out of those of the responses (B, T, ...)."""
        return values[self.mask]

    @property
    def rows(self) -> torch.Tensor:
        """The row that each token belongs to, (N,)."""
        return self.mask.nonzero()[:, 0]

    @property
    def positions(self) -> torch.Tensor:
        """Each token's place in its response, (N,), from 0."""
        return self.mask.nonzero()[:, 1]
