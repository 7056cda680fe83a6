"""What `benchmarks/gpu.py` would find on an H100, predicted from counts: kernels started and bytes moved by a round of the sampler.

The project's own round runs on tensors without memory, in the sizes of a real pair. What a kernel costs was measured on an H100 on
2026-11-26 with an earlier commit (torch 2.11, cu130): the price of a launch, the bandwidth of a copy, and one forward of the student, from
which the shortest time of a kernel follows. All else is computed, and set beside what was measured where it was.

Shapes: N rows, S slots, G draft.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skd_trl import AcceptanceRule, SamplingParams
from skd_trl.sampling import admission, few_rows
from skd_trl.sampling.interleaved import run_round
from skd_trl.sampling.nucleus import CANDIDATES, Nucleus
from skd_trl.sampling.participants import LocalParticipant, Setting
from skd_trl.sampling.prompts import Prompts
from skd_trl.sampling.rounds import Rounds
from skd_trl.sampling.rows import Rows


# Measured on the H100: seconds of a launch, bytes a second of a copy, products of the prefill.
LAUNCH, BANDWIDTH, OPERATIONS_A_SECOND = 16e-6, 3.0e12, 458e12
# A forward of the student for one token of 32 rows of 640 slots kept the GPU busy for so long (query groups packed); its forward by
# Inductor's kernels in a graph took so long, and the teacher's of five tokens.
STUDENT_BUSY, STUDENT_INDUCTOR, TEACHER_INDUCTOR = 5.35e-3, 3.07e-3, 9.93e-3
# Seconds that commit 808d384 took for the window (G "auto", G = 5), transformers' generate of the teacher for the same texts,
# DistillationTrainer's step at its defaults, and our own training without the sampling: interleaved, and with the teacher's forward.
WINDOW_BEFORE, TEACHER_GENERATE, THEIR_STEP = (9.4, 11.2), 4.5, 5.3
TRAINING, TRAINING_ON_POLICY = 0.5, 0.6
# Moved by index: what is read and written is what is asked for, not the table.
BY_INDEX = ("embedding", "index", "index_select", "gather", "index_put_", "scatter", "index_copy_")


@dataclass(frozen=True)
class Work:
    """Kernels, with the bytes of each."""

    sizes: tuple[int, ...]

    def eager(self, shortest: float) -> float:
        return sum(max(LAUNCH, size / BANDWIDTH, shortest) for size in self.sizes)

    def in_a_graph(self, shortest: float) -> float:
        return sum(max(size / BANDWIDTH, shortest) for size in self.sizes)


class Counting(TorchDispatchMode):
    """The bytes that each operator reads and writes, by part of the round."""

    def __init__(self):
        super().__init__()
        self.part, self.sizes = "rest", {"student": [], "teacher": [], "rest": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("device", "empty", "_unsafe_view", "reshape", "detach", "lift_fresh"):
            return output
        read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        written = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        if name in BY_INDEX:
            read = sorted(read, key=lambda x: x.numel())[:-1]
            written = written if name in ("embedding", "index", "index_select", "gather") else read[-1:]
        self.sizes[self.part].append(sum(x.numel() * x.element_size() for x in (*read, *written)))
        return output

    def work(self, *parts: str) -> Work:
        return Work(tuple(size for part in parts for size in self.sizes[part]))


def counted_round(
    build, pair: tuple[str, str], vocab_size: int, num_rows: int, context: int, num_draft: int, accept: AcceptanceRule
):
    """One round of the pair on `num_rows` rows that have read `context` tokens, as [`Counting`]."""
    ids = torch.randint(5, vocab_size - 5, (num_rows, context), generator=torch.Generator().manual_seed(0))
    prompts, counting = Prompts(ids, torch.ones_like(ids)), Counting()
    as_on_a_gpu = patch.object(few_rows, "other_order_is_faster", lambda: False)
    with as_on_a_gpu, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rounds, nucleus = Rounds(), Nucleus(CANDIDATES)
        sampling = SamplingParams(temperature=0.5, top_p=0.5), SamplingParams(temperature=0.2, top_p=0.5)
        teacher, student = (build(name, vocab_size, torch.device("cpu"), torch.bfloat16) for name in pair)
        for model in (student, teacher):
            admission._PROVEN[model] = admission.Proof(0.0, 1.0)  # nothing can be tried on numbers that are not there
        participants = [LocalParticipant(model, how) for model, how in zip((student, teacher), sampling, strict=True)]
        settings = [Setting(name, num_rows, 128, num_draft, rounds, nucleus) for name in ("student", "teacher")]
        with participants[0].session(prompts, settings[0]), participants[1].session(prompts, settings[1]):
            rows = Rows(torch.rand((num_rows, 128, 3)), num_rows, num_draft, [], rounds)
            rows.admit(prompts)
            rows.pack()
            for name, participant in zip(("student", "teacher"), participants, strict=True):
                _mark(counting, participant, name)
            with counting:
                run_round(*participants, rows, accept, nucleus, (rows.live, num_rows, num_draft))
    return counting


def _mark(counting: Counting, participant: LocalParticipant, part: str) -> None:
    """What the decoder of `participant` does is counted as its part."""
    decoder = participant.decoder

    def forward(*args, **kwargs):
        counting.part = part
        try:
            return type(decoder).__call__(decoder, *args, **kwargs)
        finally:
            counting.part = "rest"

    participant.decoder = _Called(decoder, forward)


class _Called:
    """A decoder whose call is watched."""

    def __init__(self, decoder, call):
        self._decoder, self._call = decoder, call

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)


def shortest_kernel(student: Work, busy: float) -> float:
    """The time of a kernel that moves next to nothing, at which `student` keeps the GPU `busy` for so long."""
    low, high = 0.0, busy
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student.in_a_graph(middle) < busy else (low, middle)
    return low


def rounds_of_window(num_rows: int, num_tokens: int, num_draft: int, rate: float) -> float:
    """How many rounds until the last of `num_rows` rows has its tokens: the mean over 200 windows."""
    draw, total = random.Random(0), 0
    for _ in range(200):
        rounds = 0
        for _ in range(num_rows):
            written = own = 0
            while written < num_tokens:
                leading = next((i for i in range(num_draft) if draw.random() >= rate), num_draft)
                written, own = written + min(leading + 1, num_draft), own + 1
            rounds = max(rounds, own)
        total += rounds
    return total / 200


def predict(build, pair: tuple[str, str], vocab_size: int, accept, num_draft: int = 5) -> Iterable[str]:
    """The lines of a table: what is predicted for the pair, and what it is based on."""
    counting = counted_round(build, pair, vocab_size, 32, 576, num_draft, accept)
    whole, student = counting.work("student", "teacher", "rest"), counting.work("student")
    teacher, rest = counting.work("teacher"), counting.work("rest")
    shortest = shortest_kernel(student, num_draft * STUDENT_BUSY)
    eager, graph = whole.eager(shortest), whole.in_a_graph(shortest)
    inductor = num_draft * STUDENT_INDUCTOR + TEACHER_INDUCTOR + rest.in_a_graph(shortest)
    with FakeTensorMode():
        numbers = [
            sum(p.numel() for p in build(name, vocab_size, torch.device("cpu"), torch.bfloat16).parameters())
            for name in pair
        ]
    prefill = 2 * sum(numbers) * 32 * 512 / OPERATIONS_A_SECOND
    num_rounds = rounds_of_window(32, 128, num_draft, accept.rate)
    after = 20 * LAUNCH  # signals stored, the outcome read
    windows = SimpleNamespace(
        graph=num_rounds * (graph + after) + prefill, inductor=num_rounds * (inductor + after) + prefill
    )
    one_step = (len(student.sizes) + len(rest.sizes) / 2) / num_draft
    write = 128 * (student.in_a_graph(shortest) + rest.in_a_graph(shortest) / 2) / num_draft + prefill / 4
    in_steps = rounds_of_window(16, 128, num_draft, accept.rate)
    steps = {
        name: in_steps * (one + after) + prefill / 4 + TRAINING
        for name, one in (("graph", graph), ("inductor", inductor))
    }
    yield "| figure | predicted | target | measured before |"
    yield "|---|---|---|---|"
    yield f"| kernels of a round (student {len(student.sizes)}, teacher {len(teacher.sizes)}, the rest {len(rest.sizes)}) | {len(whole.sizes)} | | |"
    yield f"| bytes of a round, GB | {sum(whole.sizes) / 1e9:.0f} | | |"
    yield f"| shortest kernel, from the student's forward | {1e6 * shortest:.1f} µs | | |"
    yield f"| teacher's forward of {num_draft} tokens, GPU busy | {1e3 * teacher.in_a_graph(shortest):.1f} ms | | 14.6 ms |"
    yield f"| round, eager | {1e3 * eager:.0f} ms | | 250 to 282 ms |"
    yield f"| round in a graph | {1e3 * graph:.1f} ms | at most 50 ms | 46.7 ms (prototype) |"
    yield f"| round with Inductor in a graph (forwards as measured) | {1e3 * inductor:.1f} ms | at most 30 ms | 27.0 ms (prototype) |"
    yield f"| window of 32 x 128 tokens in a graph, {num_rounds:.0f} rounds | {windows.graph:.1f} s | {WINDOW_BEFORE[1] / 5:.1f} s at most (a fifth of before) and {TEACHER_GENERATE / 2:.2f} s (half of the teacher's generate) | {WINDOW_BEFORE[1]} s at G = 5, {WINDOW_BEFORE[0]} s at auto |"
    yield f"| the same with Inductor | {windows.inductor:.1f} s | the same | |"
    yield f"| interleaved step in a graph, {in_steps:.0f} rounds | {steps['graph']:.1f} s | {0.6 * THEIR_STEP:.1f} s at most | 11.1 s |"
    yield f"| the same with Inductor | {steps['inductor']:.1f} s | the same | |"
    yield f"| on-policy step in a graph, {one_step:.0f} kernels a token | {write + TRAINING_ON_POLICY:.1f} s | {0.4 * THEIR_STEP:.1f} s at most | 4.9 s |"
