"""What interleaved sampling has written: the finished `Rollout`, and the rows while they are being written.

Shapes: B prompts, N rows being written, P prompt, T response (at most `max_new_tokens`), G draft, V vocabulary, H hidden.
"""

from collections import deque
from dataclasses import dataclass

import torch

from .acceptance import AcceptanceRule, Draft
from .prefill import cost_of_forward, prefill_groups


@dataclass(frozen=True)
class Rollout:
    """Sampled responses, laid out as a training batch: prompts left-padded, responses right-padded.

    Attributes:
        input_ids, attention_mask, labels (`torch.LongTensor` of shape `(B, P+T)`):
            T is the longest response; `labels` is -100 on prompts and padding.
        replaced (`torch.BoolTensor` of shape `(B, T)`):
            Where the teacher's token stands instead of the student's proposal. False on padding.
        proposals (`torch.LongTensor` of shape `(B, T)`, or `None`):
            The student's proposal at each position; `None` where nothing was drafted (rule `never`).
        teacher_rank (`torch.LongTensor` of shape `(B, T)`, or `None`):
            How many tokens the teacher held likelier than the proposal (0: its favourite); -1 on padding. `None` where
            nothing was drafted or nothing was judged.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H)`, or `None`):
            The teacher's last hidden states that predict each response token, from the verification itself: the loss
            needs no second forward. 0 on padding. `None` if the teacher did not run (rule `always`).
        num_rounds (`int`): rounds, summed over rows. `num_drafted` (`int`): tokens drafted, the dropped ones included.
        num_truncated (`int`): rows cut at `max_new_tokens` before an end-of-sequence token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    replaced: torch.Tensor
    proposals: torch.Tensor | None
    teacher_rank: torch.Tensor | None
    teacher_hidden_states: torch.Tensor | None
    num_rounds: int
    num_drafted: int
    num_truncated: int

    def rows(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows `start` to `stop` as a training batch, without columns that hold only padding: the keys of GKD's batches,
        `replaced`, and `teacher_rank` and `teacher_hidden_states` where there are any. Prompts in `prompts`, `prompt_attention_mask`."""
        num_prompt_columns = self.input_ids.shape[1] - self.replaced.shape[1]
        mask = self.attention_mask[start:stop]
        skipped = int((mask.sum(dim=0) > 0).int().argmax())
        longest = int(mask[:, num_prompt_columns:].sum(dim=1).max())
        columns = slice(skipped, num_prompt_columns + longest)
        batch = {name: getattr(self, name)[start:stop, columns] for name in ("input_ids", "attention_mask", "labels")}
        batch["prompts"] = self.input_ids[start:stop, skipped:num_prompt_columns]
        batch["prompt_attention_mask"] = self.attention_mask[start:stop, skipped:num_prompt_columns]
        batch["replaced"] = self.replaced[start:stop, :longest]
        if self.teacher_rank is not None:
            batch["teacher_rank"] = self.teacher_rank[start:stop, :longest]
        if self.teacher_hidden_states is not None:
            batch["teacher_hidden_states"] = self.teacher_hidden_states[start:stop, :longest]
        return batch

    @property
    def num_tokens(self) -> int:
        """Response tokens of all rows; each is either accepted or replaced."""
        return int((self.labels != -100).sum())

    @property
    def num_replaced(self) -> int:
        return int(self.replaced.sum())

    @property
    def num_accepted(self) -> int:
        return self.num_tokens - self.num_replaced


class Rows:
    """What has been written so far, by prompt, and which prompts hold which place of the cache."""

    def __init__(self, prompt_ids, prompt_mask, max_new_tokens: int, longest_draft: int, eos_token_ids):
        num_prompts, device = len(prompt_ids), prompt_ids.device
        self.prompt_ids, self.prompt_lengths = prompt_ids, prompt_mask.sum(dim=1)
        self.max_new_tokens = max_new_tokens
        self.host_prompt_lengths = self.prompt_lengths.tolist()
        # The last token of a full row is never fed to a model, so its slot, and what lies beyond, needs no room.
        self.num_slots = max(self.host_prompt_lengths) + max_new_tokens
        self.eos_token_ids = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=device)
        self.waiting = deque(range(num_prompts))
        self.live: list[int] = []  # prompt in each place of the cache
        self.ids = torch.empty(0, dtype=torch.long, device=device)  # the same on the device
        self.last = prompt_ids[:, -1].clone()
        self.num_shared = 0  # first tokens of all prompts whose keys and values every place of the cache has
        self.num_written = torch.zeros(num_prompts, dtype=torch.long, device=device)
        self.host_written = [0] * num_prompts
        self.ended = torch.zeros(num_prompts, dtype=torch.bool, device=device)
        # A block may run over the end; what is beyond a row's own end is overwritten or cut in `rollout`.
        shape = (num_prompts, max_new_tokens + longest_draft)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.proposals = torch.zeros(shape, dtype=torch.long, device=device)
        self.teacher_rank = torch.zeros(shape, dtype=torch.long, device=device)
        self.replaced = torch.zeros(shape, dtype=torch.bool, device=device)
        self.hidden: torch.Tensor | None = None
        self.num_rounds = self.num_drafted = 0
        self.num_judged = self.num_accepted = 0  # in the last round

    @property
    def longest(self) -> int:
        """Positions written in the longest live row; known on the host."""
        return max(self.host_prompt_lengths[i] + self.host_written[i] for i in self.live)

    def admit(self, num_places: int) -> list[tuple[int, torch.Tensor]]:
        """Moves waiting prompts into free places, in the groups in which to prefill them. Of each group the first of its
        places, and its tokens from `num_shared` on but the last, (N, Q), right-padded with anything: what is written beyond
        a row's end is overwritten before it is read."""
        new = [self.waiting.popleft() for _ in range(min(num_places - len(self.live), len(self.waiting)))]
        lengths = [self.host_prompt_lengths[i] - 1 - self.num_shared for i in new]
        admitted = []
        for group in prefill_groups(lengths, cost_of_forward(self.last.device)):
            first_row, num_columns = len(self.live), self.num_shared + max(lengths[j] for j in group)
            self._set_live(self.live + [new[j] for j in group])
            admitted.append((first_row, self._prompt_tokens(self.ids[first_row:], self.num_shared, num_columns)))
        return admitted

    @property
    def remaining(self) -> list[int]:
        """How many tokens each live row may still need."""
        return [self.max_new_tokens - self.host_written[i] for i in self.live]

    def shared_beginning(self) -> torch.Tensor:
        """The tokens (1, Q) that all prompts begin with, such as a template's system turn; the last token never counts."""
        shortest = min(self.host_prompt_lengths)
        every_row = torch.arange(len(self.prompt_ids), device=self.prompt_ids.device)
        beginnings = self._prompt_tokens(every_row, 0, shortest - 1)
        num_equal = int((beginnings == beginnings[:1]).all(dim=0).long().cumprod(dim=0).sum())
        return beginnings[:1, :num_equal]

    def _prompt_tokens(self, ids: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Tokens `start` to `stop` of these prompts (N, Q), counted from each prompt's first; beyond its end anything."""
        width = self.prompt_ids.shape[1]
        columns = torch.arange(start, stop, device=ids.device) + (width - self.prompt_lengths[ids])[:, None]
        return self.prompt_ids[ids].gather(1, columns.clamp(max=width - 1))

    def positions(self, start: int, count: int) -> torch.Tensor:
        """Positions (N, count) of the inputs `start`, `start + 1`, ... of a block; the first input is the last token."""
        last = self.prompt_lengths[self.ids] + self.num_written[self.ids] - 1
        steps = torch.arange(start, start + count, device=last.device)
        return (last[:, None] + steps).clamp(max=self.num_slots - 1)

    def at_block(self, noise: torch.Tensor, num_draft: int) -> torch.Tensor:
        """The noise (N, G, 3) of the positions that a block will fill."""
        steps = self.num_written[self.ids][:, None] + torch.arange(num_draft, device=noise.device)
        return noise[self.ids[:, None], steps.clamp(max=self.max_new_tokens - 1)]

    def commit(self, block, num_leading, draft: Draft, hidden, accept: AcceptanceRule) -> list[tuple[int, int]]:
        """Writes a block, ends rows, frees their places. Returns the moves (source, target) that close the gaps."""
        num_draft = block.shape[1]
        column = torch.arange(num_draft, device=block.device)
        count = (num_leading + 1).clamp(max=num_draft)  # accepted ones, and the replacement if there is one
        count = torch.minimum(count, self.max_new_tokens - self.num_written[self.ids])
        is_eos = torch.isin(block, self.eos_token_ids) & (column < count[:, None])
        ended = is_eos.any(dim=1)
        count = torch.where(ended, is_eos.int().argmax(dim=1) + 1, count)

        target = (self.ids[:, None], self.num_written[self.ids][:, None] + column)
        self.tokens[target] = block
        self.proposals[target] = draft.tokens
        self.replaced[target] = column == num_leading[:, None]
        if accept.drafts and accept.judges:
            self.teacher_rank[target] = draft.teacher_rank
        if hidden is not None:
            if self.hidden is None:
                self.hidden = hidden.new_zeros(*self.tokens.shape, hidden.shape[-1])
            self.hidden[target] = hidden
        self.last[self.ids] = block.gather(1, count[:, None] - 1).squeeze(1)
        self.num_written[self.ids] += count
        self.ended[self.ids] = ended
        self.num_rounds += len(self.live)
        self.num_drafted += len(self.live) * num_draft if accept.drafts else 0

        # The one place in a round where the host waits for the device.
        is_replaced = num_leading < count
        written, has_ended, counts, replaced = torch.stack(
            [self.num_written[self.ids], ended.long(), count, is_replaced.long()]
        ).tolist()
        for i, num_written, row_ended in zip(self.live, written, has_ended, strict=True):
            self.host_written[i] = self.max_new_tokens if row_ended else num_written
        self.num_judged, self.num_accepted = sum(counts), sum(counts) - sum(replaced)
        return self._free([self.host_written[i] >= self.max_new_tokens for i in self.live])

    def _free(self, finished: list[bool]) -> list[tuple[int, int]]:
        """The last live rows move into the places of finished ones, so that the live rows stay one block."""
        num_live = finished.count(False)
        gaps = [place for place in range(num_live) if finished[place]]
        movers = [place for place in range(num_live, len(finished)) if not finished[place]]
        live = list(self.live)
        for source, target in zip(movers, gaps, strict=True):
            live[target] = live[source]
        if True in finished:
            self._set_live(live[:num_live])
        return list(zip(movers, gaps, strict=True))

    def _set_live(self, live: list[int]) -> None:
        self.live = live
        self.ids = torch.tensor(live, dtype=torch.long, device=self.last.device)

    def rollout(self, prompt_ids, prompt_mask, pad_token_id: int, accept: AcceptanceRule) -> Rollout:
        num_columns = int(self.num_written.max())
        written = torch.arange(num_columns, device=prompt_ids.device) < self.num_written[:, None]

        def cut(values, fill):
            return values[:, :num_columns].masked_fill(~written, fill)

        return Rollout(
            input_ids=torch.cat(
                [prompt_ids.masked_fill(prompt_mask == 0, pad_token_id), cut(self.tokens, pad_token_id)], dim=1
            ),
            attention_mask=torch.cat([prompt_mask, written.to(prompt_mask.dtype)], dim=1),
            labels=torch.cat([torch.full_like(prompt_ids, -100), cut(self.tokens, -100)], dim=1),
            replaced=cut(self.replaced, False),
            proposals=cut(self.proposals, -100) if accept.drafts else None,
            teacher_rank=cut(self.teacher_rank, -1) if accept.drafts and accept.judges else None,
            teacher_hidden_states=(
                None if self.hidden is None else self.hidden[:, :num_columns].masked_fill(~written[..., None], 0.0)
            ),
            num_rounds=self.num_rounds,
            num_drafted=self.num_drafted,
            num_truncated=int((~self.ended).sum()),
        )
