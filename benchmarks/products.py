"""Products of one weight on a CPU: as PyTorch asks for them, in the other order, and with a packed copy. What `few_rows.gains` and
`PackedWeights` go by.

Each product goes through many weights of one shape, so it reads its weight from memory, as a model's forward does.

    python benchmarks/products.py
    python benchmarks/products.py --threads 2
"""

from collections.abc import Callable

import torch
from common import Report, parser, prepare
from torch.nn import functional

from skd_trl.sampling.packed_weights import LIKELY_ROWS


SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (5632, 2048), (49152, 576)]
ROWS = [1, 2, 3, 4, 8, 16, 32, 256]
# Numbers of all weights of a shape together: more than a processor's cache holds.
MANY = 40_000_000


def main() -> None:
    args = parser(__doc__.splitlines()[0], models=False, repeats=3).parse_args()
    clock = prepare(args)
    report = Report("products" if args.threads == 1 else f"products_{args.threads}_threads", "Products on a CPU", args)
    for dtype in (torch.float32, torch.bfloat16):
        report.table(
            f"Microseconds of a product in {str(dtype).removeprefix('torch.')}, the shortest of {args.repeats} turns",
            ["weight", "rows", "as PyTorch asks", "other order", "packed"],
            [
                [f"{o} x {i}", rows, *times]
                for o, i in SHAPES
                for rows, times in of_shape(o, i, dtype, args.repeats, clock)
            ],
        )


@torch.no_grad()
def of_shape(num_outputs: int, num_inputs: int, dtype: torch.dtype, repeats: int, clock: Callable[[], float]):
    """For each number of rows, the times of the three ways."""
    num_weights = max(4, min(80, MANY // (num_outputs * num_inputs)))
    weights = [torch.randn(num_outputs, num_inputs).to(dtype) for _ in range(num_weights)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, LIKELY_ROWS) for weight in weights]
    for num_rows in ROWS:
        x = torch.randn(num_rows, num_inputs).to(dtype)
        columns = x.repeat(2, 1).t() if num_rows == 1 else x.t()
        ways = (
            lambda weight, x=x: functional.linear(x, weight),
            lambda weight, columns=columns, n=num_rows: torch.mm(weight, columns)[:, :n].t().contiguous(),
            lambda weight, x=x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
        )
        yield (
            num_rows,
            [microseconds(way, of, repeats, clock) for way, of in zip(ways, (weights, weights, packed), strict=True)],
        )


def microseconds(product: Callable, weights: list[torch.Tensor], repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        for weight in weights:
            product(weight)
        times.append((clock() - start) / len(weights) * 1e6)
    return min(times)


if __name__ == "__main__":
    main()
