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
        ids, mask = ids.long(), (mask != 0).long()
        self.ids, self.lengths = ids, mask.sum(dim=1)
        columns = torch.arange(ids.shape[1], device=ids.device)
        is_wrong = (mask.bool() != (columns >= ids.shape[1] - self.lengths[:, None])).any(dim=1)
        of_all = []
        if ids.numel():
            tokens = self.tokens(torch.arange(len(ids), device=ids.device), 0, ids.shape[1])
            is_shared = (tokens == tokens[:1]).all(dim=0) & (columns < self.lengths.amin() - 1)
            of_all = [(ids * mask).max(), (ids * mask).min(), is_shared.long().cumprod(dim=0).sum()]
        facts = torch.cat([self.lengths, is_wrong.long(), *(fact[None] for fact in of_all)])
        host_facts: list[int] = facts.tolist()  # the one wait for the device
        self.host_lengths, wrong_rows = host_facts[: len(ids)], host_facts[len(ids) : 2 * len(ids)]
        self.largest_id, self.smallest_id, self.num_shared = host_facts[2 * len(ids) :] or (0, 0, 0)
        empty = [row for row, length in enumerate(self.host_lengths) if length == 0]
        if empty:
            raise ValueError(f"Prompts {empty} are empty: there is nothing to continue. Give each at least one token.")
        wrong = [row for row, is_wrong in enumerate(wrong_rows) if is_wrong]
        if wrong:
            raise ValueError(
                f"Prompts {wrong} are not left-padded (the 1s of prompt_mask must be at the right). Pad on the left."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, name: str, num_rows: int, vocab_size: int) -> None:
        """Raises `ValueError`, calling their reader `name`, unless these are prompts of so many rows with ids below `vocab_size`."""
        if len(self) != num_rows:
            raise ValueError(
                f"The {name} has {len(self)} separate prompts for {num_rows} rows. Give one for each row."
            )
        if self.largest_id >= vocab_size or self.smallest_id < 0:
            found = self.smallest_id if self.smallest_id < 0 else self.largest_id
            raise ValueError(
                f"A prompt of the {name} has token id {found}, beyond the {vocab_size} ids that both models share."
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
        return self.tokens(torch.zeros(1, dtype=torch.long, device=self.ids.device), 0, self.num_shared)
