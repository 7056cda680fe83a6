"""How many tokens the student drafts before the teacher looks: fixed, or chosen round by round from measured costs.

A round of N rows and draft length G costs G student forwards of N tokens and one teacher forward of N G tokens. A row that
needs at most R more tokens gets 1 + a + ... + a^(min(G, R) - 1) of them, with a the share of proposals accepted. The best G
has the lowest cost per token. The choice changes the cost only, never the text, so that it may follow a stopwatch: ranks
that disagree take the longest wish, and a resumed run writes what it wrote.

A forward's time is taken to be a line in its number of tokens, fitted to what was measured: a fixed part (reading the
weights) and a marginal one. From these follow c, the teacher's step in units of the student's, and rho, the marginal cost of
one more token of a block in units of a teacher's step.
"""

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

import torch


AUTO = "auto"


class DraftLength:
    """A policy: `choose` before a round, `observe` after it. This one always takes `num_draft_tokens`."""

    def __init__(self, num_draft_tokens: int):
        self.longest = num_draft_tokens  # what buffers have to hold

    def choose(self, remaining: list[int]) -> int:
        """G for the next round, of rows that need at most `remaining` tokens each (not empty)."""
        return min(self.longest, max(remaining))

    def observe(self, round_: "Round") -> None:
        """Learns from a round."""

    @staticmethod
    def of(num_draft_tokens: "int | str | DraftLength") -> "DraftLength":
        """The policy that a number, `"auto"` or a policy stands for.

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
    judged before each row's first rejection (that one included), and how many of them were accepted."""

    num_rows: int
    num_draft_tokens: int
    student_seconds: float
    teacher_seconds: float
    num_judged: int
    num_accepted: int


class AutoDraftLength(DraftLength):
    """Measures both models and the acceptance while sampling, and takes the draft length with the lowest cost per token.

    Give the same object to every call on the same pair, and the measurement is made once.

    Args:
        longest (`int`, *optional*, defaults to `16`):
            No draft is longer.
        memory (`float`, *optional*, defaults to `0.97`):
            What one round forgets of the acceptance before it.
    """

    FIRST = (4, 2)  # enough to tell the teacher's fixed cost from its marginal one
    EXPLORE_EVERY = 16  # rounds; a length beside the best one costs next to nothing and keeps the fit up to date

    def __init__(self, longest: int = 16, memory: float = 0.97):
        super().__init__(longest)
        self.memory = memory
        self.student, self.teacher = ForwardCost(), ForwardCost()
        self.num_rounds = 0
        # As if 8 proposals had been seen: the first rounds should not jump to an end of the range.
        self.num_judged, self.num_accepted = 8.0, 6.0

    @property
    def acceptance(self) -> float:
        return min(self.num_accepted / self.num_judged, 0.999)

    def choose(self, remaining: list[int]) -> int:
        limit = min(self.longest, max(remaining))
        if self.num_rounds < 1 + len(self.FIRST):  # the very first round warms up and is not measured
            return min(self.FIRST[self.num_rounds % len(self.FIRST)], limit)
        best = min(range(1, limit + 1), key=lambda length: self.cost(length, remaining))
        if self.num_rounds % self.EXPLORE_EVERY == 0:
            best += 1 if self.num_rounds % (2 * self.EXPLORE_EVERY) == 0 else -1
        return min(max(best, 1), limit)

    def cost(self, length: int, remaining: list[int]) -> float:
        """Seconds per token that a round of this draft length is expected to take."""
        num_rows = len(remaining)
        seconds = length * self.student.seconds(num_rows) + self.teacher.seconds(num_rows * length)
        return seconds / sum(expected_tokens(self.acceptance, min(length, rest)) for rest in remaining)

    def observe(self, round_: Round) -> None:
        self.num_rounds += 1
        self.num_judged = self.memory * self.num_judged + round_.num_judged
        self.num_accepted = self.memory * self.num_accepted + round_.num_accepted
        if self.num_rounds > 1:
            self.student.add(round_.num_rows, round_.student_seconds / round_.num_draft_tokens)
            self.teacher.add(round_.num_rows * round_.num_draft_tokens, round_.teacher_seconds)

    def c(self, num_rows: int) -> float:
        """The teacher's step in units of the student's, for this many rows."""
        return self.teacher.seconds(num_rows) / self.student.seconds(num_rows)

    def rho(self, num_rows: int) -> float:
        """The marginal cost of one more token of a block, in units of a teacher's step, for this many rows."""
        return self.teacher.seconds(2 * num_rows) / self.teacher.seconds(num_rows) - 1


class ForwardCost:
    """Seconds of a model's forward as a line in its number of tokens: fixed + marginal x tokens, neither below 0."""

    def __init__(self, num_kept: int = 8):
        self.num_kept = num_kept
        self.measured: dict[int, deque[float]] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        self.measured.setdefault(num_tokens, deque(maxlen=self.num_kept)).append(seconds)

    def seconds(self, num_tokens: int) -> float:
        fixed, marginal = self.line()
        return fixed + marginal * num_tokens

    def line(self) -> tuple[float, float]:
        # Medians: what else the machine does shows as outliers, all of them upwards.
        points = [(size, median(values), len(values)) for size, values in self.measured.items()]
        if not points:
            return 1.0, 0.0
        weight = sum(w for _, _, w in points)
        mean_x = sum(w * x for x, _, w in points) / weight
        mean_y = sum(w * y for _, y, w in points) / weight
        variance = sum(w * (x - mean_x) ** 2 for x, _, w in points)
        covariance = sum(w * (x - mean_x) * (y - mean_y) for x, y, w in points)
        marginal = covariance / variance if variance > 0 else 0.0
        # At least no fixed cost, at most nothing but it.
        marginal = min(max(marginal, 0.0), mean_y / mean_x)
        return mean_y - marginal * mean_x, marginal


class Stopwatch:
    """Seconds between marks, without waiting for the device until they are read."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
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
