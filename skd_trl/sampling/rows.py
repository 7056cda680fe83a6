"""The responses while they are written, and which prompt has which place.

All that a round reads or writes is a buffer that is allocated once, so a round can be captured. A place without a prompt belongs
to a spare row of the buffers, so nothing in a round asks who lives. The host reads four numbers a row after each round.

Shapes: B prompts, R places, N places in use, P prompt columns, T response (at most `max_new_tokens`), G draft.
"""

from collections import deque
from collections.abc import Iterable

import torch

from .acceptance import Draft
from .prompts import Prompts
from .rollout import Rollout


class Rows:
    """Responses by prompt, and the places in which they are written.

    Args:
        uniforms (`torch.Tensor` of shape `(B, T, 3)`): the noise of every position.
        num_places (`int`): R.
        longest_draft (`int`): the largest G. A block may run over the end of its response.
        eos_token_ids: any of these ends a row.
        keeps_shape (`bool`): whether all R places are always in use. Otherwise places that nobody waits for are given up, and
            the last rows move into them.
    """

    def __init__(
        self,
        uniforms: torch.Tensor,
        num_places: int,
        longest_draft: int,
        eos_token_ids: Iterable[int],
        keeps_shape: bool,
    ):
        (num_prompts, self.max_new_tokens, _), device = uniforms.shape, uniforms.device
        self.spare, self.keeps_shape = num_prompts, keeps_shape
        self.noise = torch.cat([uniforms, uniforms.new_zeros(1, *uniforms.shape[1:])])
        self.eos_token_ids = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=device)
        # By place
        self.owner = torch.full((num_places,), self.spare, dtype=torch.long, device=device)
        self.num_written = torch.zeros_like(self.owner)
        # By prompt, and one spare row
        shape = (num_prompts + 1, self.max_new_tokens + longest_draft)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.proposals, self.teacher_rank = torch.full_like(self.tokens, -100), torch.full_like(self.tokens, -1)
        self.replaced = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.signal: dict[str, torch.Tensor] = {}
        # What the host knows
        self.waiting = deque(range(num_prompts))
        self.places: list[int | None] = [None] * num_places
        self.has_changed = True  # since the device was told who has which place
        self.host_written = [0] * num_prompts
        self.num_rounds = self.num_drafted = self.num_ended = 0
        self.num_judged = self.num_accepted = 0  # in the last round

    # Outside a round: who has which place

    def admit(self, lengths: list[int]) -> tuple[list[int], list[int]]:
        """Gives free places to waiting prompts: the places and their prompts. Neighbours in length (`lengths` (B,) of the prompts)
        become neighbours in place, as they are prefilled together."""
        free = [place for place, prompt in enumerate(self.places) if prompt is None]
        new = sorted(
            (self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))), key=lengths.__getitem__
        )
        for place, prompt in zip(free, new, strict=False):
            self.places[place] = prompt
        self.has_changed = self.has_changed or bool(new)
        return free[: len(new)], new

    def pack(self) -> list[tuple[int, int]]:
        """Gives up places without a prompt: the moves (source, target) that leave the rows in the first places."""
        if not self.has_changed:
            return []
        moves = []
        if not self.keeps_shape:
            num_live = len(self.live)
            gaps = [place for place in range(num_live) if self.places[place] is None]
            movers = [place for place in range(num_live, len(self.places)) if self.places[place] is not None]
            moves = list(zip(movers, gaps, strict=True))
            for source, target in moves:
                self.places[target] = self.places[source]
            del self.places[num_live:]
        # The device is told what the host has decided.
        owner = [self.spare if prompt is None else prompt for prompt in self.places]
        written = [0 if prompt is None else self.host_written[prompt] for prompt in self.places]
        state = torch.tensor([owner, written], dtype=torch.long, device=self.owner.device)
        self.owner[: len(owner)], self.num_written[: len(owner)] = state[0], state[1]
        self.has_changed = False
        return moves

    @property
    def live(self) -> list[tuple[int, int]]:
        """Prompt and number of tokens written of each row that is not finished."""
        return [(prompt, self.host_written[prompt]) for prompt in self.places if prompt is not None]

    @property
    def remaining(self) -> list[int]:
        """How many tokens each of them may still need."""
        return [self.max_new_tokens - num_written for _, num_written in self.live]

    @property
    def num_in_use(self) -> int:
        return len(self.places)

    # Inside a round: tensors of fixed shape, no wait for the host

    def noise_of_block(self, num_draft: int) -> torch.Tensor:
        """The noise (N, G, 3) of the positions that a block will fill."""
        steps = self.num_written[: self.num_in_use, None] + torch.arange(num_draft, device=self.owner.device)
        return self.noise[self.owner[: self.num_in_use, None], steps.clamp(max=self.max_new_tokens - 1)]

    def write(self, block: torch.Tensor, num_leading: torch.Tensor, draft: Draft) -> torch.Tensor:
        """Writes a block (N, G) whose first `num_leading` (N,) tokens were accepted, and ends rows. Returns how many tokens of it
        are kept (N,): the accepted ones and the replacement, up to an end of sequence or the longest response."""
        num_draft, column = block.shape[1], torch.arange(block.shape[1], device=block.device)
        owner, num_written = self.owner[: len(block)], self.num_written[: len(block)]
        count = torch.minimum((num_leading + 1).clamp(max=num_draft), self.max_new_tokens - num_written)
        is_end = (block[..., None] == self.eos_token_ids).any(-1) & (column < count[:, None])
        ended = is_end.any(dim=1)
        count = torch.where(ended, is_end.int().argmax(dim=1) + 1, count) * (owner != self.spare)

        target = (owner[:, None], num_written[:, None] + column)
        self.tokens[target] = block
        self.proposals[target] = draft.tokens
        self.teacher_rank[target] = draft.teacher_rank
        self.replaced[target] = column == num_leading[:, None]
        for name, values in draft.judgement.signal.items():
            if name not in self.signal:
                self.signal[name] = values.new_zeros(*self.tokens.shape, *values.shape[2:])
            self.signal[name][target] = values
        num_written += count
        self.outcome = torch.stack([num_written, ended.long(), count, (num_leading < count).long()])
        return count

    # After a round

    def read(self, num_drafted: int) -> None:
        """Waits for the outcome of a round, and frees the places of finished rows."""
        written, ended, counts, replaced = self.outcome.tolist()
        self.num_judged, self.num_accepted = sum(counts), sum(counts) - sum(replaced)
        self.num_rounds += len(self.live)
        self.num_drafted += len(self.live) * num_drafted
        for place, prompt in enumerate(self.places):
            if prompt is not None:
                self.host_written[prompt] = written[place]
                self.num_ended += ended[place]
                if ended[place] or written[place] >= self.max_new_tokens:
                    self.places[place], self.has_changed = None, True

    def rollout(self, prompts: Prompts) -> Rollout:
        """What was written, laid out as [prompt | response | padding]."""
        num_prompts, device = len(prompts), self.tokens.device
        num_columns = max(self.host_written, default=0)
        lengths = torch.tensor(self.host_written, dtype=torch.long, device=device)
        written = torch.arange(num_columns, device=device) < lengths[:, None]

        def cut(values: torch.Tensor, fill) -> torch.Tensor:
            mask = written.reshape(*written.shape, *(1,) * (values.ndim - 2))
            return values[:num_prompts, :num_columns].masked_fill(~mask, fill)

        # Prompts end, and responses start, at one column: a shift to the left by its padding lays a row out.
        width, total = prompts.ids.shape[1], prompts.lengths + lengths
        column = torch.arange(int(total.max()) if num_prompts else 0, device=device)
        source = (column + (width - prompts.lengths)[:, None]).clamp(max=width + num_columns - 1)
        is_token, is_prompt = column < total[:, None], column < prompts.lengths[:, None]
        pad_token_id = int(self.eos_token_ids[0]) if len(self.eos_token_ids) else 0
        input_ids = torch.cat([prompts.ids, cut(self.tokens, pad_token_id)], dim=1).gather(1, source)
        return Rollout(
            input_ids=input_ids.masked_fill(~is_token, pad_token_id),
            attention_mask=is_token.long(),
            labels=input_ids.masked_fill(~is_token | is_prompt, -100),
            replaced=cut(self.replaced, False),
            proposals=cut(self.proposals, -100),
            teacher_rank=cut(self.teacher_rank, -1),
            teacher_signal={name: cut(values, 0) for name, values in self.signal.items()},
            num_rounds=self.num_rounds,
            num_drafted=self.num_drafted,
            num_truncated=num_prompts - self.num_ended,
        )
