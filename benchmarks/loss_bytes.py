"""Bytes that the loss moves and holds for each response token, counted beside TRL's tiled kernel, on tensors without memory.

    python benchmarks/loss_bytes.py

Heads of Qwen3-0.6B and 8B in bf16, forward and backward. Ours is counted operator by operator, as it runs on a GPU. Of TRL's
`ChunkedDivergenceFunction` each Triton kernel reads its two tiles once and, in the backward, writes one.

Shapes: N positions, V vocabulary, H hidden.
"""

import argparse

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from trl.kernels import chunked_divergence

from skd_trl import DIVERGENCES
from skd_trl.loss.distillation_loss import distillation_loss
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates
from skd_trl.training.memory_count import Allocations


STATISTICS = ("student_entropy", "teacher_entropy")  # SKDTrainer's; TRL's kernel has the student's entropy
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
MIB = 2**20


class Moved(Allocations):
    """Bytes that operators read and write, views aside."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view and func.namespace == "aten" and "empty" not in func.overloadpacket.__name__:
            self.count(*tree_leaves((args, kwargs or {}, output)))
        return output

    def count(self, *tensors) -> None:
        self.moved += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


class Kernel:
    """A Triton kernel that only counts."""

    def __init__(self, moved: Moved, num_tiles: int):
        self.moved, self.num_tiles = moved, num_tiles

    def __getitem__(self, grid):
        def run(student_tile, student_stride, teacher_tile, *rest, **settings):
            self.moved.count(*(student_tile, teacher_tile, student_tile)[: self.num_tiles])

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--widths", type=int, nargs=2, default=[1024, 4096], help="of student and teacher")
    parser.add_argument("--chunks", type=int, nargs="+", default=[110, 512, 4096])
    options = parser.parse_args()
    print("| divergence | loss | MB moved a token | MiB held |\n|---|---|---|---|")
    for divergence in BETAS:
        found = {f"ours, chunks of {size}": count(options, divergence, size) for size in options.chunks}
        found["TRL's kernel"] = count(options, divergence, 0)
        for name, (moved, held) in found.items():
            print(f"| {divergence} | {name} | {moved / options.positions / 1e6:.1f} | {held / MIB:.0f} |")


def count(options, divergence: str, chunk_size: int) -> tuple[int, int]:
    """Bytes moved, and those held at most beside the inputs, of ours with chunks of `chunk_size`; with 0, of TRL's."""
    with FakeTensorMode():
        heads = [
            nn.Parameter(torch.empty((options.vocab_size, width), dtype=torch.bfloat16), requires_grad=i == 0)
            for i, width in enumerate(options.widths)
        ]
        states = [
            torch.empty((options.positions, width), dtype=torch.bfloat16, requires_grad=i == 0)
            for i, width in enumerate(options.widths)
        ]
        facts = ResponseFacts.of(torch.zeros(options.positions, dtype=torch.long))
        with Moved() as moved:
            before = moved.live
            if chunk_size:
                signals = [HiddenStates(*pair) for pair in zip(states, map(LMHead, heads), strict=True)]
                loss = distillation_loss(
                    *signals, facts, divergence=DIVERGENCES[divergence](), vocab_size=options.vocab_size,
                    chunk_size=chunk_size, statistics=STATISTICS,
                ).loss  # fmt: skip
                loss.backward()
            else:
                _trl(moved, states, heads, BETAS[divergence])
            return moved.moved, moved.peak - before


def _trl(moved: Moved, states, heads, beta: float) -> None:
    names = ("_use_triton", "_stats_kernel", "_jsd_kernel", "_backward_kernel", "_project", "_addmm_fp32")
    own = {name: getattr(chunked_divergence, name) for name in names}
    chunked_divergence._use_triton = lambda device: True
    chunked_divergence._stats_kernel = chunked_divergence._jsd_kernel = Kernel(moved, 2)
    chunked_divergence._backward_kernel = Kernel(moved, 3)
    # A GPU's products take bf16 and write fp32 without a cast.
    chunked_divergence._project = lambda tile, hidden, weight, bias, start, end, dtype: moved.count(
        tile, hidden, weight[start:end]
    )
    chunked_divergence._addmm_fp32 = lambda out, left, right: moved.count(out, out, left, right)
    if not hasattr(chunked_divergence, "triton"):
        chunked_divergence.triton = type("triton", (), {"cdiv": staticmethod(lambda a, b: -(-a // b))})
    try:
        loss, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
            states[0], heads[0], None, states[1], heads[1], None, beta
        )
        loss.sum().backward()
    finally:
        for name, value in own.items():
            setattr(chunked_divergence, name, value)


if __name__ == "__main__":
    main()
