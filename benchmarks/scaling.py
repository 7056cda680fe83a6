"""How the cost of a sampled token grows with the length of the response, the batch and the vocabulary.

Acceptance is forced, so every length, batch and vocabulary does the same work per token. The time inside attention, which
has to grow with the context, is taken around each call of it and shown apart.

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

from skd_trl.loss.distillation_loss import distillation_loss
from skd_trl.loss.divergences import forward_kl
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.response_facts import ResponseFacts
from skd_trl.loss.teacher_signal import HiddenStates


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    own.add_argument("--length_batch", type=int, default=4, help="prompts where the length varies")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    own.add_argument("--vocab_sizes", type=int, nargs="+", default=[49152, 98304, 151936])
    own.add_argument("--vocab_batch", type=int, default=8, help="prompts where the vocabulary varies")
    own.add_argument("--num_tokens", type=int, default=24, help="tokens a prompt where batch or vocabulary vary")
    own.add_argument(
        "--num_positions", type=int, default=256, help="positions of the loss where the vocabulary varies"
    )
    own.add_argument("--acceptance", type=float, default=0.8)
    own.add_argument("--num_draft_tokens", type=int, default=4)
    args = own.parse_args()
    clock = prepare(args)
    prompts = load_prompts(args, max(*args.batch_sizes, args.length_batch, args.vocab_batch), 70, 90)
    report = Report("scaling", "Cost of a sampled token by length, batch and vocabulary", args)
    pair = load_model(args, "student"), load_model(args, "teacher")
    by_length(args, report, clock, pair, prompts)
    by_batch(args, report, clock, pair, prompts)
    by_vocabulary(args, report, clock, prompts)


def by_length(args, report: Report, clock, pair, prompts) -> None:
    def arm(num_tokens):
        return sampling(args, pair, prompts, args.length_batch, max_new_tokens=num_tokens)

    arm(8)()
    whole: dict[int, list[float]] = {length: [] for length in args.lengths}
    inside: dict[int, list[float]] = {length: [] for length in args.lengths}
    for turn in track(range(args.repeats), description="lengths"):
        for length in args.lengths:
            one, many = (timed(arm(num_tokens), clock, seed=turn) for num_tokens in (1, length))
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


def by_batch(args, report: Report, clock, pair, prompts) -> None:
    arms = {str(size): sampling(args, pair, prompts, size) for size in args.batch_sizes}
    seconds = take_turns(arms, args.repeats, clock, "batch")
    report.table(
        f"Batch ({args.num_tokens} tokens a prompt)",
        ["batch", "ms per token", "spread", "relative to the first"],
        [
            [name, 1000 * median(values), spread(values), median(values) / median(seconds[str(args.batch_sizes[0])])]
            for name, values in seconds.items()
        ],
    )


def by_vocabulary(args, report: Report, clock, prompts) -> None:
    arms: dict[str, Callable[[], int]] = {}
    for size in args.vocab_sizes:
        pair = tuple(load_model(args, role) for role in ("student", "teacher"))
        for model in pair:
            model.resize_token_embeddings(size, mean_resizing=False)
        arms[f"sampling {size}"] = sampling(args, pair, prompts, args.vocab_batch)
        arms[f"loss {size}"] = loss(pair, args.num_positions, size)
    seconds = {name: median(values) for name, values in take_turns(arms, args.repeats, clock, "vocabulary").items()}
    first = args.vocab_sizes[0]
    report.table(
        f"Vocabulary ({args.vocab_batch} prompts of {args.num_tokens} tokens; loss at {args.num_positions} positions)",
        ["V", "sampling [ms per token]", "relative to the first", "loss [ms per token]", "relative to the first"],
        [
            [
                size,
                *(
                    value
                    for name in ("sampling", "loss")
                    for value in (
                        1000 * seconds[f"{name} {size}"],
                        seconds[f"{name} {size}"] / seconds[f"{name} {first}"],
                    )
                ),
            ]
            for size in args.vocab_sizes
        ],
        "The same models with more rows in embedding and head. Loss: forward KL with the gradients of hidden states and head.",
    )


def sampling(args, pair, prompts, batch_size: int, **kwargs) -> Callable[[], int]:
    settings = {"num_draft_tokens": args.num_draft_tokens, **kwargs}
    ids, mask = (columns[:batch_size] for columns in prompts)
    return lambda: sample(args, *pair, ids, mask, Bernoulli(args.acceptance), **settings).num_tokens


def loss(pair, num_positions: int, vocab_size: int) -> Callable[[], int]:
    student, teacher = (LMHead.of(model) for model in pair)
    generator = torch.Generator().manual_seed(0)
    student_hidden, teacher_hidden = (
        torch.randn(num_positions, head.weight.shape[1], generator=generator) for head in (student, teacher)
    )

    facts = ResponseFacts.of(torch.randint(vocab_size, (num_positions,), generator=generator))

    def arm() -> int:
        hidden = student_hidden.clone().requires_grad_()
        outcome = distillation_loss(
            HiddenStates(hidden, student),
            HiddenStates(teacher_hidden, teacher),
            facts,
            divergence=forward_kl(),
            vocab_size=vocab_size,
        )
        torch.autograd.grad(outcome.loss, [hidden, student.weight])
        return num_positions

    return arm


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
