"""The responses while they are written, and which prompt has which place.

All that a round reads or writes is a buffer that outlives it, so a round can be captured. A place without a prompt belongs
to a spare row of the buffers, so nothing in a round asks who lives. The host reads a row's block after each round. What the
teacher leaves for the loss is stored after the round: these are the largest buffers, and go to the loss without a copy.

Shapes: B prompts, R places, N places in use, P prompt columns, T response (at most `max_new_tokens`), G draft, E ends of sequence.
"""

from collections import deque
from collections.abc import Callable, Iterable

import torch

from .draft import Draft
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
        shape = (num_prompts + 1, 1 + self.num_columns)
        # The token, the proposal, and twice the teacher's rank of it, plus 1 where it was accepted; before the response its prompt's
        # last token.
        self.text = rounds.buffer("text", (*shape, 3), torch.long, device)
        self.written, self.spare = self.text[:, 1:], len(self.text) - 1
        self.text[self.spare] = 0  # ids that both models have
        uniforms = uniforms.to(
            torch.promote_types(uniforms.dtype, torch.float32)
        )  # in 16 bits a number rounds to 1 now and then
        self.noise = rounds.buffer("noise", (len(self.text), self.num_columns, 3), uniforms.dtype, device)
        # A number below 1 in fp64 may be 1 in fp32.
        self.noise[:num_prompts, : self.max_new_tokens] = uniforms.clamp(max=1 - 2**-24)
        self.signal: dict[str, torch.Tensor] = {}
        # By place
        self.owner = rounds.buffer("owner", (num_places,), torch.long, device).fill_(self.spare)
        ends = sorted(set(eos_token_ids))
        self.host_ends, self.pad_token_id = set(ends), ends[0] if ends else 0
        self.ends = rounds.buffer("ends", (max(len(ends), 1),), torch.long, device).fill_(-1)  # no token is -1
        self.ends[: len(ends)] = torch.tensor(ends, dtype=torch.long, device=device)
        # Which token of a block is the last that may be kept, counted from 0: the first rejected one, that which makes the longest
        # response (none, -1, in a place without a prompt), and for each token and end of sequence this token if it is that end.
        num_limits = 2 + longest_draft * len(self.ends)
        self.limits = rounds.buffer("limits", (num_places, num_limits), torch.long, device).fill_(-1)
        self.last_column = self.limits[:, 1]
        # How many tokens are kept of the block, and what is written of each.
        self.outcome = rounds.buffer("outcome", (num_places, 1 + 3 * longest_draft), torch.long, device)
        self.columns = rounds.buffer("columns", (self.num_columns,), torch.long, device)
        torch.arange(len(self.columns), out=self.columns)
        # What the host knows
        self.waiting = deque(range(num_prompts))
        self.places: list[int | None] = [None] * num_places
        self.has_changed = True  # since the device was told who has which place
        self.host_written = [0] * num_prompts
        self.num_rounds = self.num_drafted = self.num_ended = 0
        self.num_judged = self.num_accepted = self.num_missed = 0  # in the last round

    # Outside a round: who has which place

    def admit(self, prompts: Prompts) -> tuple[list[int], list[int]]:
        """Gives free places to waiting `prompts`: the places and their prompts. Neighbours in length become neighbours in place, as they
        are prefilled together."""
        lengths, free = prompts.host_lengths, [place for place, prompt in enumerate(self.places) if prompt is None]
        new = sorted(
            (self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))), key=lengths.__getitem__
        )
        for place, prompt in zip(free, new, strict=False):
            self.places[place] = prompt
        if new:
            which = torch.tensor(new, dtype=torch.long, device=self.text.device)
            self.text[which, 0, 0] = prompts.ids[which, -1]
            self.has_changed = True
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
        last = [
            -1 if prompt is None else self.max_new_tokens - 1 - self.host_written[prompt] for prompt in self.places
        ]
        state = torch.tensor([owner, last], dtype=torch.long, device=self.owner.device)
        self.owner[: len(owner)], self.last_column[: len(owner)] = state[0], state[1]
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

    def hold(self) -> Callable[[], None]:
        """What puts back how much the rows still need, which a round counts down."""
        held = self.last_column.clone()

        def put_back() -> None:
            self.last_column.copy_(held)

        return put_back

    # Inside a round: tensors of fixed shape, no wait for the host

    def begin_block(self, num_draft: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a block that will be written: the last token before it (N, 1), which tokens of the response it will be (N, G), counted from 0,
        and their noise (N, G, 3)."""
        first, num_rows = self.max_new_tokens - 1, self.num_in_use
        owner = self.owner[:num_rows]
        # Until the end of the round also where the block will be written. The steps of one token each lie one after the other.
        self.positions = (self.columns[first : first + num_draft, None] - self.last_column[:num_rows]).T
        last = self.text[..., 0][owner, self.positions[:, 0]]  # a response begins one further on
        return last[:, None], self.positions, self.noise[owner[:, None], self.positions]

    def first_rejected(self, accepted: torch.Tensor) -> torch.Tensor:
        """The column (N, 1) of the first token of a block that was not `accepted` (N, G), or else the last one."""
        num_draft, column = accepted.shape[1], self.limits[: len(accepted), :1]
        if num_draft == 1:
            return column.copy_(self.columns[:1])
        columns = torch.where(accepted[:, :-1], self.columns[num_draft - 1], self.columns[: num_draft - 1])
        return torch.amin(columns, dim=1, keepdim=True, out=column)

    def write(
        self, block: torch.Tensor, accepted: torch.Tensor, draft: Draft, fitted: torch.Tensor | None
    ) -> torch.Tensor:
        """Writes a block (N, G) which was `accepted` (N, G) before the first rejected column, and ends rows. Returns how many tokens of
        it are kept (N,): the accepted ones and the replacement, up to an end of sequence or the longest response, and only of rows that
        `fitted` (N,). What is written beyond is overwritten, or never read."""
        num_rows, num_draft = block.shape
        limits = self.limits[:num_rows, : 2 + num_draft * len(self.ends)]
        ends = limits[:, 2:].unflatten(1, (num_draft, len(self.ends)))
        torch.where(block[..., None] != self.ends, self.columns[num_draft], self.columns[:num_draft, None], out=ends)
        fitted = self.columns[1].expand(num_rows) if fitted is None else fitted
        outcome = self.outcome[:num_rows, : 1 + 3 * num_draft]
        count = torch.addcmul(fitted, limits.amin(dim=1), fitted, out=outcome[:, 0])  # one more, or none
        self.last_column[:num_rows].sub_(count)
        facts = [block, draft.tokens, torch.add(accepted, draft.teacher_rank, alpha=2)]
        written = torch.stack(facts, dim=-1, out=outcome[:, 1:].unflatten(1, (num_draft, 3)))
        self.written[self.owner[:num_rows, None], self.positions] = written
        return count

    # After a round

    def keep_signal(self, signal: dict[str, torch.Tensor]) -> None:
        """Stores what the teacher left of each token of the block (N, G, ...), kept or not."""
        num_rows = self.num_in_use
        for name, values in signal.items():
            if name not in self.signal:
                self.signal[name] = values.new_empty(self.num_prompts + 1, self.num_columns, *values.shape[2:])
            first = self.max_new_tokens - 1 - self.last_column[:num_rows] - self.outcome[:num_rows, 0]
            column = first[:, None] + torch.arange(values.shape[1], device=values.device)
            self.signal[name][self.owner[:num_rows, None].clamp(max=self.num_prompts), column] = values

    def read(self, num_draft: int, is_drafted: bool) -> None:
        """Waits for the outcome of a round, and frees the places of finished rows."""
        outcome = self.outcome[: self.num_in_use].tolist()
        self.num_judged = self.num_accepted = self.num_missed = 0
        for place, (prompt, (count, *written)) in enumerate(zip(self.places, outcome, strict=True)):
            if prompt is None:
                continue
            if count == 0:  # the round is run again for this row
                self.num_missed += 1
                continue
            self.num_rounds += 1
            self.num_drafted += num_draft * is_drafted
            token, _, verdict = written[3 * count - 3 : 3 * count]
            has_ended = token in self.host_ends
            self.num_judged += count
            self.num_accepted += count - (verdict % 2 == 0)
            self.host_written[prompt] += count
            self.num_ended += has_ended
            if has_ended or self.host_written[prompt] == self.max_new_tokens:
                self.places[place], self.has_changed = None, True

    def rollout(self, prompts: Prompts) -> Rollout:
        """What was written, laid out as [prompt | response | padding]."""
        num_prompts, device = len(prompts), self.written.device
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
        longest = max(map(sum, zip(prompts.host_lengths, self.host_written, strict=True)), default=0)
        column = torch.arange(longest, device=device)
        source = (column + (width - prompts.lengths)[:, None]).clamp(max=width + num_columns - 1)
        is_token, is_prompt = column < total[:, None], column < prompts.lengths[:, None]
        tokens, proposals, verdicts = self.written.unbind(dim=-1)
        input_ids = torch.cat([prompts.ids, cut(tokens, self.pad_token_id)], dim=1).gather(1, source)
        return Rollout(
            input_ids=input_ids.masked_fill(~is_token, self.pad_token_id),
            attention_mask=is_token.long(),
            labels=input_ids.masked_fill(~is_token | is_prompt, -100),
            replaced=cut(verdicts % 2 == 0, False),
            proposals=cut(proposals, -100),
            teacher_rank=cut(verdicts >> 1, -1),
            teacher_signal=signal,
            num_rounds=self.num_rounds,
            num_drafted=self.num_drafted,
            num_truncated=num_prompts - self.num_ended,
        )
