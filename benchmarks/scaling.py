"""How the cost of a sampled token grows with the length of the response and with the batch.

Acceptance is forced, so that every length and batch does the same work per token. The time inside attention, which has to
grow with the context, is taken from PyTorch's profiler and shown apart.
"""

import torch
from baselines import Bernoulli
from common import Report, load_model, load_prompts, median, parser, prepare, spread, take_turns
from rich.progress import track
from sampler import sample
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    own = parser(__doc__.splitlines()[0], repeats=3)
    own.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    own.add_argument("--length_batch", type=int, default=4, help="prompts where the length varies")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    own.add_argument("--num_tokens", type=int, default=24, help="tokens a prompt where the batch varies")
    own.add_argument("--acceptance", type=float, default=0.8)
    own.add_argument("--num_draft_tokens", type=int, default=4)
    args = own.parse_args()
    clock = prepare(args)
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    ids, mask = load_prompts(args, max(*args.batch_sizes, args.length_batch), 30, 60)
    rule = Bernoulli(args.acceptance)

    def arm(batch_size, **kwargs):
        return lambda: sample(args, student, teacher, ids[:batch_size], mask[:batch_size], rule, **kwargs).num_tokens

    report = Report("scaling", "Cost of a sampled token by length and batch", args)
    rows = []
    arm(args.length_batch, max_new_tokens=8)()
    for length in track(args.lengths, description="lengths"):
        torch.manual_seed(0)
        start = clock()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            num_tokens = arm(args.length_batch, max_new_tokens=length)()
        seconds = clock() - start
        total = sum(event.self_cpu_time_total for event in profiler.key_averages())
        inside = sum(
            event.cpu_time_total
            for event in profiler.key_averages()
            if event.key == "aten::scaled_dot_product_attention"
        )
        whole = 1000 * seconds / num_tokens
        rows.append([length, whole, 100 * inside / total, whole * (1 - inside / total)])
    for row in rows:
        row.append(row[3] / rows[0][3])
    report.table(
        f"Response length ({args.length_batch} prompts, one run each, under the profiler)",
        ["T", "ms per token", "attention [%]", "without attention [ms]", "relative to the first"],
        rows,
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


if __name__ == "__main__":
    main()
