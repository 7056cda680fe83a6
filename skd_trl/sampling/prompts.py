"""The prompts that a participant reads. Student and teacher may have different ones for the same rows.

Shapes: B prompts, P prompt columns, N some of the prompts, Q tokens of each.
"""

import torch


class Prompts:
    """Left-padded prompts, with their lengths on the device and on the host.

    Args:
        ids, mask (`torch.LongTensor` of shape `(B, P)`): left-padded.

    Raises:
        `ValueError`: for other shapes, an empty prompt, or padding that is not on the left; the rows are named.
    """

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor):
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"prompt_ids {tuple(ids.shape)} and prompt_mask {tuple(mask.shape)} must both be (B, P).")
        self.ids, self.lengths = ids, mask.sum(dim=1)
        self.host_lengths: list[int] = self.lengths.tolist()
        empty = [row for row, length in enumerate(self.host_lengths) if length == 0]
        if empty:
            raise ValueError(f"Prompts {empty} are empty: there is nothing to continue. Give each at least one token.")
        wanted = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - self.lengths[:, None]
        wrong = (mask.bool() != wanted).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"Prompts {wrong} are not left-padded (the 1s of prompt_mask must be at the right). Pad on the left."
            )
        self.largest_id = int((ids * mask).max()) if ids.numel() else 0

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, name: str, num_rows: int, vocab_size: int) -> None:
        """Raises `ValueError`, calling their reader `name`, unless these are prompts of so many rows with ids below `vocab_size`."""
        if len(self) != num_rows:
            raise ValueError(
                f"The {name} has {len(self)} separate prompts for {num_rows} rows. Give one for each row."
            )
        if self.largest_id >= vocab_size:
            raise ValueError(
                f"A prompt of the {name} has token id {self.largest_id}, beyond the {vocab_size} ids that both models share."
            )

    @property
    def longest(self) -> int:
        return max(self.host_lengths, default=0)

    def tokens(self, which: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Tokens `start` to `stop` of the prompts `which` (N,), counted from each prompt's first: (N, Q). Beyond a prompt's
        end anything."""
        width = self.ids.shape[1]
        columns = torch.arange(start, stop, device=self.ids.device) + (width - self.lengths[which])[:, None]
        return self.ids[which].gather(1, columns.clamp(max=width - 1))

    def shared_beginning(self) -> torch.Tensor:
        """The tokens (1, Q) that all prompts begin with, such as a template's system turn. The last token of a prompt never
        counts: it is the first input of the first round."""
        every_row = torch.arange(len(self), device=self.ids.device)
        beginnings = self.tokens(every_row, 0, min(self.host_lengths) - 1)
        num_equal = int((beginnings == beginnings[:1]).all(dim=0).long().cumprod(dim=0).sum())
        return beginnings[:1, :num_equal]
