"""What a sampled token costs against what the cost model says it should.

Cost model, in units of one student step of the batch: c = teacher step / student step, rho = cost of one more token in
the teacher's block / teacher step, a = acceptance, E = (1 - a^G) / (1 - a) tokens a round and row: a token costs
(G + c (1 + rho (G - 1))) / E steps of its row. c and rho are measured on the models alone, a on the sampled texts.

    python benchmarks/cost_model.py
"""

import torch
from common import Report, load_model, load_prompts, median, parser, prepare, spread, take_turns
from sampler import sample

from skd_trl.sampling.acceptance import TopK
from skd_trl.sampling.ragged_cache import RaggedDecoder


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--num_tokens", type=int, default=64, help="tokens written for each prompt")
    own.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 5], help="draft lengths G")
    own.add_argument("--batch_size", type=int, default=8, help="rows written at once")
    own.add_argument("--num_prompts", type=int, default=32, help="freed places are refilled from these")
    own.add_argument("--accept_top_k", type=int, default=25)
    args = own.parse_args()
    clock = prepare(args)
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    ids, mask = load_prompts(args, args.num_prompts)
    report = Report("cost_model", "Cost of a token against the cost model", args)
    rollouts = {length: [] for length in args.lengths}

    def whole(length, max_new_tokens):
        rollout = sample(
            args, student, teacher, ids, mask, TopK(args.accept_top_k), max_rows=args.batch_size,
            max_new_tokens=max_new_tokens, num_draft_tokens=length,
        )  # fmt: skip
        if max_new_tokens > 1:
            rollouts[length].append(rollout)
        return 1

    forward = {
        role: forwards(model, args.batch_size, ids.shape[1] + args.num_tokens // 2)
        for role, model in (("student", student), ("teacher", teacher))
    }
    arms = {"student step": forward["student"](1), "prompts": lambda: whole(1, 1)}
    arms |= {f"teacher {length}": forward["teacher"](length) for length in {1, *args.lengths}}
    arms |= {f"all {length}": lambda length=length: whole(length, args.num_tokens) for length in args.lengths}
    seconds = take_turns(arms, args.repeats, clock, "cost model")

    step, teacher_step = median(seconds["student step"]), median(seconds["teacher 1"])
    rows = []
    for length in args.lengths:
        c, block = teacher_step / step, median(seconds[f"teacher {length}"]) / step
        rho = (block / c - 1) / max(length - 1, 1)
        a = sum(r.num_accepted for r in rollouts[length]) / sum(r.num_tokens for r in rollouts[length])
        expected, written = (
            (1 - a**length) / (1 - a),
            sum(r.num_tokens for r in rollouts[length]) / sum(r.num_rounds for r in rollouts[length]),
        )
        of_tokens = [
            all_ - prompts for all_, prompts in zip(seconds[f"all {length}"], seconds["prompts"], strict=True)
        ]
        measured = median(of_tokens) * args.batch_size / (args.num_prompts * (args.num_tokens - 1)) / step
        predicted = (length + block) / expected
        rows.append(
            [length, c, rho, a, expected, written, predicted, measured, measured / predicted, spread(of_tokens)]
        )
    report.table(
        f"{args.num_prompts} prompts, {args.batch_size} written at once, {args.num_tokens} tokens each",
        [
            "G", "c", "rho", "a", "E predicted", "E measured", "cost predicted", "cost measured", "measured / predicted", "spread",
        ],
        rows,
        f"In student steps of {1000 * step:.1f} ms. Cost of a token of one row, without the prompts' prefill: the time for all "
        "tokens less the time for one token each. The model knows neither that prompts differ in acceptance, nor the last "
        "rows' smaller batches, nor the draws.",
    )  # fmt: skip


def forwards(model, batch_size: int, start: int):
    """Of a block length, an arm that runs forwards of so many tokens a row after `start` slots."""

    def of(block: int):
        decoder = RaggedDecoder(model, batch_size, start + block)
        positions = torch.arange(start, start + block).expand(batch_size, block)

        def arm(times=4):
            with torch.no_grad():
                for _ in range(times):
                    decoder(torch.zeros_like(positions), positions, num_slots_in_use=start + block)
            return times

        return arm

    return of


if __name__ == "__main__":
    main()
