"""The responses while they are written, and which prompt has which place.

All that a round reads or writes is a buffer that outlives it, so a round can be captured. A place without a prompt belongs
to a spare row of the buffers, so nothing in a round asks who lives. The host reads five numbers a row after each round. What the
teacher leaves for the loss is stored after the round: these are the largest buffers, and go to the loss without a copy.

Shapes: B prompts, R places, N places in use, P prompt columns, T response (at most `max_new_tokens`), G draft.
"""

from collections import deque
from collections.abc import Iterable

import torch

from .acceptance import Draft
from .prompts import Prompts
from .rollout import Rollout
from .rounds import Rounds


class Rows:
    """Responses by prompt, and the places in which they are written.

    Args:
        uniforms (`torch.Tensor` of shape `(B, T, 3)`): the noise of every position.
        num_places (`int`): R.
        longest_draft (`int`): the largest G. A block may run over the end of its response.
        eos_token_ids: any of these ends a row.
        rounds ([`~skd_trl.sampling.rounds.Rounds`]): has the buffers, and says how many places are given up when nobody waits for
            them; the last rows move into those that are left.
    """

    def __init__(
        self,
        uniforms: torch.Tensor,
        num_places: int,
        longest_draft: int,
        eos_token_ids: Iterable[int],
        rounds: Rounds,
    ):
        (num_prompts, self.max_new_tokens, _), device = uniforms.shape, uniforms.device
        self.num_prompts, self.num_columns, self.rounds = num_prompts, self.max_new_tokens + longest_draft, rounds
        # By prompt, and one spare row
        shape = (num_prompts + 1, self.num_columns)
        self.tokens, self.proposals, self.teacher_rank = (
            rounds.buffer(name, shape, torch.long, device) for name in ("tokens", "proposals", "teacher_rank")
        )
        self.replaced = rounds.buffer("replaced", shape, torch.bool, device)
        self.spare = len(self.tokens) - 1
        self.noise = rounds.buffer("noise", (len(self.tokens), *uniforms.shape[1:]), uniforms.dtype, device)
        # A number below 1 in fp64 may be 1 in fp32.
        self.noise[:num_prompts, : self.max_new_tokens] = uniforms.clamp(max=1 - 2**-24)
        self.signal: dict[str, torch.Tensor] = {}
        # By place
        self.owner = rounds.buffer("owner", (num_places,), torch.long, device).fill_(self.spare)
        self.num_written = rounds.buffer("num_written", (num_places,), torch.long, device).zero_()
        self.outcome = rounds.buffer("outcome", (5, num_places), torch.long, device)
        ends = sorted(set(eos_token_ids))
        self.pad_token_id = ends[0] if ends else 0
        self.ends = rounds.buffer("ends", (max(len(ends), 1),), torch.long, device).fill_(-1)  # no token is -1
        self.ends[: len(ends)] = torch.tensor(ends, dtype=torch.long, device=device)
        # What the host knows
        self.waiting = deque(range(num_prompts))
        self.places: list[int | None] = [None] * num_places
        self.has_changed = True  # since the device was told who has which place
        self.host_written = [0] * num_prompts
        self.num_rounds = self.num_drafted = self.num_ended = 0
        self.num_judged = self.num_accepted = self.num_missed = 0  # in the last round

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
        num_kept = self.rounds.num_rows(len(self.live), len(self.places))
        gaps = [place for place, prompt in enumerate(self.places[:num_kept]) if prompt is None]
        movers = [place for place in range(num_kept, len(self.places)) if self.places[place] is not None]
        moves = list(zip(movers, gaps, strict=False))
        for source, target in moves:
            self.places[target] = self.places[source]
        del self.places[num_kept:]
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

    def write(
        self, block: torch.Tensor, num_leading: torch.Tensor, draft: Draft, missed: torch.Tensor | None
    ) -> torch.Tensor:
        """Writes a block (N, G) whose first `num_leading` (N,) tokens were accepted, and ends rows. Returns how many tokens of it
        are kept (N,): the accepted ones and the replacement, up to an end of sequence or the longest response, and none of the rows
        that `missed` (N,)."""
        num_rows, num_draft = block.shape
        column = torch.arange(num_draft, device=block.device)
        owner, num_written = self.owner[:num_rows], self.num_written[:num_rows]
        count = torch.minimum((num_leading + 1).clamp(max=num_draft), self.max_new_tokens - num_written)
        is_end = (block[..., None] == self.ends).any(-1) & (column < count[:, None])
        is_counted = owner != self.spare
        if missed is not None:
            missed = missed & is_counted
            is_counted = is_counted & ~missed
        ended = is_end.any(dim=1)
        count = torch.where(ended, is_end.int().argmax(dim=1) + 1, count) * is_counted

        target = (owner[:, None], num_written[:, None] + column)
        self.tokens[target] = block
        self.proposals[target] = draft.tokens
        self.teacher_rank[target] = draft.teacher_rank
        self.replaced[target] = column == num_leading[:, None]
        num_written += count
        facts = [num_written, ended & is_counted, count, num_leading < count]
        facts.append(torch.zeros_like(ended) if missed is None else missed)
        torch.stack([fact.long() for fact in facts], out=self.outcome[:, :num_rows])
        return count

    # After a round

    def keep_signal(self, signal: dict[str, torch.Tensor]) -> None:
        """Stores what the teacher left of each token of the block (N, G, ...), kept or not."""
        num_rows = self.num_in_use
        for name, values in signal.items():
            if name not in self.signal:
                self.signal[name] = values.new_empty(self.num_prompts + 1, self.num_columns, *values.shape[2:])
            first = self.num_written[:num_rows] - self.outcome[2, :num_rows]
            column = first[:, None] + torch.arange(values.shape[1], device=values.device)
            self.signal[name][self.owner[:num_rows, None].clamp(max=self.num_prompts), column] = values

    def read(self, num_drafted: int) -> None:
        """Waits for the outcome of a round, and frees the places of finished rows."""
        written, ended, counts, replaced, missed = self.outcome[:, : self.num_in_use].tolist()
        self.num_judged, self.num_accepted = sum(counts), sum(counts) - sum(replaced)
        self.num_missed = sum(missed)
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
            return values[:num_prompts, :num_columns].masked_fill(~written, fill)

        signal = {name: values[:num_prompts, :num_columns] for name, values in self.signal.items()}
        for values in signal.values():  # in place: they are larger than all else together
            values.masked_fill_(~written.reshape(*written.shape, *(1,) * (values.ndim - 2)), 0)

        # Prompts end, and responses start, at one column: a shift to the left by its padding lays a row out.
        width, total = prompts.ids.shape[1], prompts.lengths + lengths
        column = torch.arange(int(total.max()) if num_prompts else 0, device=device)
        source = (column + (width - prompts.lengths)[:, None]).clamp(max=width + num_columns - 1)
        is_token, is_prompt = column < total[:, None], column < prompts.lengths[:, None]
        input_ids = torch.cat([prompts.ids, cut(self.tokens, self.pad_token_id)], dim=1).gather(1, source)
        return Rollout(
            input_ids=input_ids.masked_fill(~is_token, self.pad_token_id),
            attention_mask=is_token.long(),
            labels=input_ids.masked_fill(~is_token | is_prompt, -100),
            replaced=cut(self.replaced, False),
            proposals=cut(self.proposals, -100),
            teacher_rank=cut(self.teacher_rank, -1),
            teacher_signal=signal,
            num_rounds=self.num_rounds,
            num_drafted=self.num_drafted,
            num_truncated=num_prompts - self.num_ended,
        )
