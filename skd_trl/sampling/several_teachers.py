"""Several teachers in one sampling: each row has its own, and each teacher judges its rows in one forward a round.

Every teacher is a participant with its own cache, in which its rows lie side by side; this module knows which place of the
sampling is which place of which teacher. The student's rows stay one batch.

Shapes: B prompts, R places, N places in use, M of them a teacher's, G draft, V vocabulary, H hidden (each teacher its own).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from .draft import Judgement
from .mixers import is_stateful
from .participants import LocalParticipant, Participant, Setting
from .prompts import Prompts


@dataclass(frozen=True)
class Place:
    """Where the row of a place is: which teacher's, in which place there, and its prompt among all and among that teacher's."""

    teacher: int
    place: int
    prompt: int
    own_prompt: int


class SeveralTeachers(Participant):
    """
    Args:
        teachers (`list` of [`~skd_trl.sampling.participants.LocalParticipant`]):
            Each with its own `prompts`: those of its rows, in their order.
        which (`list[int]`):
            For each of the B prompts, which of the teachers judges it.
        agree (`Callable`, *optional*):
            As in [`~skd_trl.sampling.interleaved.Execution`], where forwards are collective: every rank then runs each teacher's
            forwards, idle ones where it has no row for it.

    Raises:
        `ValueError`: if the teachers share no vocabulary size or way to draw.
    """

    def __init__(
        self,
        teachers: Sequence[LocalParticipant],
        which: Sequence[int],
        agree: Callable[..., tuple[int, ...]] | None = None,
    ):
        super().__init__(teachers[0].sampling)
        self.teachers, self.which, self.agree = list(teachers), list(which), agree
        if len({(teacher.vocab_size, teacher.sampling) for teacher in teachers}) > 1:
            raise ValueError(
                "The teachers differ in vocab_size or sampling: give all of them the ids that all models share."
            )
        self.vocab_size = teachers[0].vocab_size
        configs = [teacher.model.config for teacher in teachers]
        self.hidden_size = max(config.get_text_config().hidden_size for config in configs)  # type: ignore[operator, union-attr]
        self.has_one_type = len({teacher.model.dtype for teacher in teachers}) == 1
        self.own_prompt = [self.which[:i].count(teacher) for i, teacher in enumerate(self.which)]

    def check(self, name: str, prompts: Prompts, max_new_tokens: int) -> None:
        counts = [self.which.count(i) for i in range(len(self.teachers))]
        if len(self.which) != len(prompts) or counts != [len(teacher.own_prompts) for teacher in self.teachers]:
            raise ValueError(
                f"The {name}s have {[len(teacher.own_prompts) for teacher in self.teachers]} prompts for {len(prompts)} rows, of which "
                f"{counts} are theirs. Give each teacher the prompts of its rows."
            )
        for i, teacher in enumerate(self.teachers):
            teacher.check(f"{name} {i}", teacher.own_prompts, max_new_tokens)
            if self.agree is not None and is_stateful(teacher.model):
                raise ValueError(
                    f"The {name} {i} has recurrent layers and is spread over processes. Where one of them has no row for it, its forwards "
                    "would gather weights in another order. Keep it whole (shard_teacher=False), or train with one teacher."
                )

    @contextmanager
    def session(self, prompts: Prompts, setting: Setting):
        self.device = prompts.ids.device
        self.places: dict[int, Place] = {}
        num_own = [min(setting.num_places, len(teacher.own_prompts)) for teacher in self.teachers]
        self.free = [set(range(number)) for number in num_own]
        with ExitStack() as stack:
            for i, (teacher, number) in enumerate(zip(self.teachers, num_own, strict=True)):
                if number > 0:
                    own = replace(setting, name=f"{setting.name} {i}", num_places=number)
                    stack.enter_context(teacher.session(teacher.own_prompts, own))
            yield

    def admit(self, places: list[int], prompts: list[int]) -> list[Callable[[], None]]:
        for place in places:
            self._give_up(place)
        new: list[list[Place]] = [[] for _ in self.teachers]
        for place, prompt in zip(places, prompts, strict=True):
            teacher = self.which[prompt]
            own_place = min(self.free[teacher])
            self.free[teacher].remove(own_place)
            self.places[place] = Place(teacher, own_place, prompt, self.own_prompt[prompt])
            new[teacher].append(self.places[place])
        own = [
            teacher.admit([p.place for p in rows], [p.own_prompt for p in rows]) if rows else []
            for teacher, rows in zip(self.teachers, new, strict=True)
        ]
        counts = [len(forwards) for forwards in own]
        agreed = self.agree(*counts) if self.agree is not None else counts
        together: list[Callable[[], None]] = []
        for teacher, forwards, number in zip(self.teachers, own, agreed, strict=True):
            together += [teacher.idle] * (number - len(forwards)) + forwards
        return together

    def prefill(self, forwards: list[Callable[[], None]], num_forwards: int) -> None:
        for forward in forwards:  # of as many, and of the same teachers, on every rank
            forward()

    def move_row(self, source: int, target: int) -> None:
        self._give_up(target)
        self.places[target] = self.places.pop(source)

    def begin_round(self, rows: list[tuple[int, int]], num_rows: int, num_draft: int) -> None:
        super().begin_round(rows, num_rows, num_draft)
        written = dict(rows)
        for place, own in list(self.places.items()):
            if place >= num_rows or own.prompt not in written:
                self._give_up(place)
        self.rounds: list[tuple[LocalParticipant, torch.Tensor]] = []
        for i, teacher in enumerate(self.teachers):
            # The rows that it keeps lie side by side in its cache from now on.
            place_of = {p.place: place for place, p in self.places.items() if p.teacher == i}
            gaps = [gap for gap in range(len(place_of)) if gap not in place_of]
            for source, gap in zip([own for own in place_of if own >= len(place_of)], gaps, strict=True):
                teacher.move_row(source, gap)
                place_of[gap] = place = place_of.pop(source)
                self.places[place] = replace(self.places[place], place=gap)
                self.free[i] = (self.free[i] - {gap}) | {source}
            places = [place_of[own] for own in sorted(place_of)]
            own = [self.places[place] for place in places]
            if own:
                teacher.begin_round([(row.own_prompt, written[row.prompt]) for row in own], len(own), num_draft)
            self.rounds.append((teacher, torch.tensor(places, dtype=torch.long, device=self.device)))

    def begin_block(self, inputs: torch.Tensor, columns: torch.Tensor) -> None:
        for teacher, places in self.rounds:
            if len(places) > 0:
                teacher.begin_block(inputs[places], columns[places])

    def judge(self, proposals: torch.Tensor) -> Judgement:
        judgements = []
        for teacher, places in self.rounds:
            if len(places) > 0:
                judgements.append((places, teacher.judge(proposals[places])))
            elif self.agree is not None:  # other ranks have rows for it
                teacher.idle(proposals.shape[1])
        # As wide, and of one type, whoever is left: what is kept with the responses has one shape.
        logits = self._together([(places, j.logits) for places, j in judgements], (*proposals.shape, self.vocab_size))
        shape = (*proposals.shape, self.hidden_size)
        names = judgements[0][1].signal
        return Judgement(
            logits,
            {name: self._together([(places, j.signal[name]) for places, j in judgements], shape) for name in names},
        )

    def keep(self, block: torch.Tensor, count: torch.Tensor) -> None:
        for teacher, places in self.rounds:
            if len(places) > 0:
                teacher.keep(block[places], count[places])

    def idle(self, num_tokens: int = 1) -> None:
        for teacher in self.teachers:
            teacher.idle(num_tokens)

    def _give_up(self, place: int) -> None:
        if place in self.places:
            own = self.places.pop(place)
            self.free[own.teacher].add(own.place)

    def _together(self, parts: list[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, ...]) -> torch.Tensor:
        """Values (N, G, W) from those (M, G, w) of some rows each; what a part lacks in width is 0."""
        dtype = parts[0][1].dtype if self.has_one_type else torch.float32
        together = torch.zeros(shape, dtype=dtype, device=parts[0][1].device)
        for places, values in parts:
            together[places, :, : values.shape[-1]] = values.to(dtype)
        return together
