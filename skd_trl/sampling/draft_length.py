"""How many tokens the student drafts before the teacher looks: fixed, or chosen round by round from measured costs.

A round of N rows and draft length G costs G student forwards of N tokens and one teacher forward of N G tokens, and from G = 2 on
going back: nothing in a key/value cache, a copy of each row's state in a recurrent model. A row that
needs at most R more tokens gets 1 + a + ... + a^(min(G, R) - 1) of them, with a the share of proposals accepted. The best G
has the lowest cost per token. The choice changes the cost, not the distribution of the texts, so it may follow a
stopwatch; ranks that disagree take the longest choice. Blocks of another shape do round differently, so a policy has a
state, to be saved with a run that is to repeat itself.

A forward's time is taken to be a line in its number of tokens, fitted to what the first rounds measured: a fixed part
(reading the weights) and a marginal one. From these follow c, the teacher's step in units of the student's, and rho, the
marginal cost of one more token of a block in units of a teacher's step.
"""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch


AUTO = "auto"


class DraftLength:
    """A policy: `choose` before a round, `observe` after it. This one always takes `num_draft_tokens`."""

    def __init__(self, num_draft_tokens: int):
        self.longest = num_draft_tokens  # what buffers have to hold
        self.unjudged = num_draft_tokens  # where every proposal is accepted
        self.few = (num_draft_tokens,)  # to which lengths are rounded up where few different ones are worth more

    def choose(self, remaining: list[int]) -> int:
        """G for the next round, of rows that need at most `remaining` tokens each (not empty)."""
        return min(self.longest, max(remaining))

    def observe(self, round_: "Round") -> None:
        """Learns from a round."""

    def state_dict(self) -> dict:
        """What it has learned, for `json`."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Takes up where the policy that `state_dict` belongs to was."""

    @staticmethod
    def of(num_draft_tokens: "int | str | DraftLength") -> "DraftLength":
        """The policy of a number, of `"auto"`, or the given policy itself.

        Raises:
            `ValueError`: for anything else.
        """
        if isinstance(num_draft_tokens, DraftLength):
            return num_draft_tokens
        if num_draft_tokens == AUTO:
            return AutoDraftLength()
        if type(num_draft_tokens) is not int or num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens={num_draft_tokens!r} must be at least 1, or {AUTO!r}.")
        return DraftLength(num_draft_tokens)


@dataclass(frozen=True)
class Round:
    """What a round of N rows cost and brought: seconds of all student forwards and of the teacher's, proposals that were
    judged before each row's first rejection (that one included), and how many of them were accepted. `is_warm_up`: other rounds of
    its shape will cost less. `keep_seconds`: of writing the block down and going back."""

    num_rows: int
    num_draft_tokens: int
    student_seconds: float
    teacher_seconds: float
    num_judged: int
    num_accepted: int
    is_warm_up: bool = False
    keep_seconds: float = 0.0


class AutoDraftLength(DraftLength):
    """Measures both models in its first rounds, follows the acceptance, and takes the draft length with the lowest cost per
    token.

    Give the same object to every call on the same pair, and the measurement is made once. After it nothing depends on a
    stopwatch any more: two policies in the same state that see the same tokens choose the same lengths.

    Args:
        longest (`int`, *optional*, defaults to `16`):
            No draft is longer.
        memory (`float`, *optional*, defaults to `0.97`):
            What one round forgets of the acceptance before it.
        num_measured_rounds (`int`, *optional*, defaults to `64`):
            Rounds after which both models' costs are settled.
    """

    TRIED = (4, 2)  # enough to tell the teacher's fixed cost from its marginal one
    TRY_EVERY = 8  # rounds, as long as it measures

    def __init__(self, longest: int = 16, memory: float = 0.97, num_measured_rounds: int = 64):
        super().__init__(longest)
        # Nothing is rejected, so nothing to learn: a block saves the host a look at the rows' ends, and may run past them.
        self.unjudged = min(4, longest)
        self.few = tuple(sorted({min(length, longest) for length in (1, 2, 3, 4, 6, 8, 12, longest)}))
        self.memory, self.num_measured_rounds = memory, num_measured_rounds
        self.student, self.teacher, self.going_back = ForwardCost(), ForwardCost(), ForwardCost()
        self.num_rounds = 0
        # As if 8 proposals had been seen: the first rounds should not jump to an end of the range.
        self.num_judged, self.num_accepted = 8.0, 6.0

    @property
    def acceptance(self) -> float:
        return min(self.num_accepted / self.num_judged, 0.999)

    @property
    def is_measuring(self) -> bool:
        return self.num_rounds < self.num_measured_rounds

    def choose(self, remaining: list[int]) -> int:
        limit = min(self.longest, max(remaining))
        if self.num_rounds <= len(self.TRIED):  # the very first round warms up and is not measured
            return min(self.TRIED[self.num_rounds % len(self.TRIED)], limit)
        if self.is_measuring and self.num_rounds % self.TRY_EVERY == 0:
            return min(self.TRIED[self.num_rounds // self.TRY_EVERY % len(self.TRIED)], limit)
        # Rows differ only where one of them needs fewer tokens than the longest draft: a window of 256 rows has few kinds of them.
        num_of_rest = Counter(min(rest, limit) for rest in remaining)
        return min(range(1, limit + 1), key=lambda length: self._cost(length, len(remaining), num_of_rest))

    def cost(self, length: int, remaining: list[int]) -> float:
        """Seconds per token that a round of this draft length is expected to take."""
        return self._cost(length, len(remaining), Counter(min(rest, length) for rest in remaining))

    def _cost(self, length: int, num_rows: int, num_of_rest: Counter[int]) -> float:
        seconds = length * self.student.seconds(num_rows) + self.teacher.seconds(num_rows * length)
        if length > 1 and self.going_back.measured:
            seconds += self.going_back.seconds(num_rows)
        acceptance = self.acceptance
        tokens = sum(n * expected_tokens(acceptance, min(length, rest)) for rest, n in num_of_rest.items())
        return seconds / tokens

    def observe(self, round_: Round) -> None:
        if 0 < self.num_rounds and self.is_measuring and not round_.is_warm_up:
            self.student.add(round_.num_rows, round_.student_seconds / round_.num_draft_tokens)
            self.teacher.add(round_.num_rows * round_.num_draft_tokens, round_.teacher_seconds)
            if round_.num_draft_tokens > 1:
                self.going_back.add(round_.num_rows, round_.keep_seconds)
        self.num_rounds += 1
        self.num_judged = self.memory * self.num_judged + round_.num_judged
        self.num_accepted = self.memory * self.num_accepted + round_.num_accepted

    def state_dict(self) -> dict:
        if self.num_rounds == 0:
            return {}
        counts = {"num_rounds": self.num_rounds, "num_judged": self.num_judged, "num_accepted": self.num_accepted}
        costs = {name: getattr(self, name).state_dict() for name in ("student", "teacher", "going_back")}
        return {**counts, **costs}

    def load_state_dict(self, state: dict) -> None:
        self.num_rounds = state["num_rounds"]
        self.num_judged, self.num_accepted = state["num_judged"], state["num_accepted"]
        for name in ("student", "teacher", "going_back"):  # of which older checkpoints lack the last
            getattr(self, name).load_state_dict(state.get(name, []))

    def c(self, num_rows: int) -> float:
        """The teacher's step in units of the student's, for this many rows."""
        return self.teacher.seconds(num_rows) / self.student.seconds(num_rows)

    def rho(self, num_rows: int) -> float:
        """The marginal cost of one more token of a block, in units of a teacher's step, for this many rows."""
        return self.teacher.seconds(2 * num_rows) / self.teacher.seconds(num_rows) - 1


class ForwardCost:
    """Seconds of a model's forward as a line in its number of tokens: fixed + marginal x tokens, neither below 0.

    The line of medians (Theil and Sen's): what else the machine does shows as outliers, all of them upwards.
    """

    def __init__(self):
        self.measured: list[tuple[int, float]] = []
        self._line: tuple[float, float] | None = None

    def add(self, num_tokens: int, seconds: float) -> None:
        self.measured.append((num_tokens, seconds))
        self._line = None

    def seconds(self, num_tokens: int) -> float:
        fixed, marginal = self.line()
        return fixed + marginal * num_tokens

    def line(self) -> tuple[float, float]:
        if not self.measured:
            return 1.0, 0.0
        if self._line is None:
            slopes = [(y - z) / (x - w) for (x, y), (w, z) in combinations(self.measured, 2) if x != w]
            # At least no marginal cost, at most nothing but it.
            marginal = min(max(median(slopes or [0.0]), 0.0), median(y / x for x, y in self.measured))
            self._line = max(median(y - marginal * x for x, y in self.measured), 0.0), marginal
        return self._line

    def state_dict(self) -> list[tuple[int, float]]:
        return self.measured

    def load_state_dict(self, state: list) -> None:
        self.measured, self._line = [(size, seconds) for size, seconds in state], None


class Stopwatch:
    """Seconds between marks; on CUDA without waiting for the device until they are read. `in_graph`: the marks are part of a CUDA
    graph, and each replay sets them again."""

    def __init__(self, device: torch.device, in_graph: bool = False):
        self.device, self.on_cuda, self.in_graph = device, device.type == "cuda", in_graph
        self.marks: list = []

    def mark(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True, external=self.in_graph)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append(event)
        else:
            if self.device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize()
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One number for each pair of neighbours; to be read when the device has been waited for anyway."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_cuda:
            return [after - before for before, after in pairs]
        self.marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a round of draft length `length` brings a row: 1 + a + ... + a^(length - 1)."""
    return (1 - acceptance**length) / (1 - acceptance)
