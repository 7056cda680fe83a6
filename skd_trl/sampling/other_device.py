"""A teacher on another device than the student: another GPU of the process, or the host beside a GPU.

Model, prompts, cache and positions of the teacher stay on its device. Per round its inputs, their places, the proposals and what was kept of them go there,
(N, G) whole numbers, and the judgement comes back: logits (N, G, V) and hidden states (N, G, H).

Shapes: N places in use, G draft, V vocabulary, H hidden.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from .draft import Judgement
from .participants import Participant, Setting
from .prompts import Prompts


class OnOtherDevice(Participant):
    """
    A teacher whose model is not on the student's device.

    Args:
        teacher ([`~skd_trl.sampling.participants.Participant`]): reads `prompts`, or its own on the same device.
        prompts ([`Prompts`]): on the teacher's device.
        device (`torch.device`): the student's.
    """

    def __init__(self, teacher: Participant, prompts: Prompts, device: torch.device):
        super().__init__(teacher.sampling)
        self.teacher, self.vocab_size, self.prompts, self.device = teacher, teacher.vocab_size, prompts, device

    def check(self, name: str, prompts: Prompts, max_new_tokens: int) -> None:
        self.prompts.check(name, len(prompts), self.prompts.largest_id + 1)
        self.teacher.check(name, self.prompts, max_new_tokens)

    @contextmanager
    def session(self, prompts: Prompts, setting: Setting):
        with self.teacher.session(self.prompts, setting):
            yield

    def admit(self, places: list[int], prompts: list[int]) -> list[Callable[[], None]]:
        return self.teacher.admit(places, prompts)

    def prefill(self, forwards: list[Callable[[], None]], num_forwards: int) -> None:
        self.teacher.prefill(forwards, num_forwards)

    def move_row(self, source: int, target: int) -> None:
        self.teacher.move_row(source, target)

    @property
    def can_be_captured(self) -> bool:
        return False  # a graph belongs to one device

    def begin_round(self, rows: list[tuple[int, int]], num_rows: int, num_draft: int) -> None:
        super().begin_round(rows, num_rows, num_draft)
        self.teacher.begin_round(rows, num_rows, num_draft)

    def round_key(self) -> tuple:
        return self.teacher.round_key()

    def begin_block(self, inputs: torch.Tensor, columns: torch.Tensor) -> None:
        device = self.prompts.ids.device
        self.teacher.begin_block(inputs.to(device), columns.to(device))

    def judge(self, proposals: torch.Tensor) -> Judgement:
        judgement = self.teacher.judge(proposals.to(self.prompts.ids.device))
        signal = {name: values.to(self.device) for name, values in judgement.signal.items()}
        return Judgement(judgement.logits.to(self.device), signal)

    def keep(self, block: torch.Tensor, count: torch.Tensor) -> None:
        self.teacher.keep(block.to(self.prompts.ids.device), count.to(self.prompts.ids.device))

    def idle(self, num_tokens: int = 1) -> None:
        self.teacher.idle(num_tokens)
