"""How the cost of a sampled token grows with the length of the response and with the batch.

Acceptance is forced, so that every length and batch does the same work per token. The time inside attention, which has to
grow with the context, is taken around each call of it and shown apart.

    python benchmarks/scaling.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from baselines import Bernoulli
from common import Report, load_model, load_prompts, median, parser, prepare, spread, take_turns
from rich.progress import track
from sampler import sample
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    own.add_argument("--length_batch", type=int, default=4, help="prompts where the length varies")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    own.add_argument("--num_tokens", type=int, default=24, help="tokens a prompt where the batch varies")
    own.add_argument("--acceptance", type=float, default=0.8)
    own.add_argument("--num_draft_tokens", type=int, default=4)
    args = own.parse_args()
    clock = prepare(args)
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    ids, mask = load_prompts(args, max(*args.batch_sizes, args.length_batch), 70, 90)
    rule = Bernoulli(args.acceptance)

    def arm(batch_size, **kwargs):
        settings = {"num_draft_tokens": args.num_draft_tokens, **kwargs}
        batch = ids[:batch_size], mask[:batch_size]
        return lambda: sample(args, student, teacher, batch[0], batch[1], rule, **settings).num_tokens

    report = Report("scaling", "Cost of a sampled token by length and batch", args)
    arm(args.length_batch, max_new_tokens=8)()
    whole: dict[int, list[float]] = {length: [] for length in args.lengths}
    inside: dict[int, list[float]] = {length: [] for length in args.lengths}
    for turn in track(range(args.repeats), description="lengths"):
        for length in args.lengths:
            one, many = (
                timed(arm(args.length_batch, max_new_tokens=num_tokens), clock, seed=turn)
                for num_tokens in (1, length)
            )
            num_tokens = many.num_tokens - one.num_tokens
            whole[length].append((many.seconds - one.seconds) / num_tokens)
            inside[length].append((many.attention - one.attention) / num_tokens)
    outside = {length: median([w - i for w, i in zip(whole[length], inside[length], strict=True)]) for length in whole}
    report.table(
        f"Response length ({args.length_batch} prompts)",
        ["T", "ms per token", "spread", "attention [ms]", "without attention [ms]", "relative to the first"],
        [
            [
                length,
                1000 * median(whole[length]),
                spread(whole[length]),
                1000 * median(inside[length]),
                1000 * outside[length],
                outside[length] / outside[args.lengths[0]],
            ]
            for length in args.lengths
        ],
        "Without the prompts: the time for all tokens less the time for one each.",
    )
    arms = {str(size): arm(size) for size in args.batch_sizes}
    seconds = take_turns(arms, args.repeats, clock, "batch")
    report.table(
        f"Batch ({args.num_tokens} tokens a prompt)",
        ["batch", "ms per token", "spread", "relative to the first"],
        [
            [name, 1000 * median(values), spread(values), median(values) / median(seconds[str(args.batch_sizes[0])])]
            for name, values in seconds.items()
        ],
    )


class Timed(NamedTuple):
    num_tokens: int
    seconds: float
    attention: float  # seconds of these


def timed(arm: Callable[[], int], clock: Callable[[], float], seed: int) -> Timed:
    torch.manual_seed(seed)
    with attention_seconds(clock) as attention:
        start = clock()
        num_tokens = arm()
        return Timed(num_tokens, clock() - start, sum(attention))


@contextmanager
def attention_seconds(clock: Callable[[], float]) -> Iterator[list[float]]:
    """Seconds of each call of the attention function, the models' copies of keys and values for it included."""
    seconds: list[float] = []
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def measured(*args, **kwargs):
        start = clock()
        outcome = attention(*args, **kwargs)
        seconds.append(clock() - start)
        return outcome

    ALL_ATTENTION_FUNCTIONS["sdpa"] = measured
    try:
        yield seconds
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


if __name__ == "__main__":
    main()
