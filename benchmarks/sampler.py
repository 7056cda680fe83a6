"""Tokens per second of `interleaved_sample` against what a user would run instead, and against the cost model.

Every arm writes `num_tokens` tokens for each prompt (no end of sequence) and ends with the teacher's scores of them.
Cost model, in units of one student step of the batch: c = teacher step / student step, rho = cost of one more token in
the teacher's block / teacher step, a = acceptance, E = (1 - a^G) / (1 - a) tokens a round and row: a token costs
(G + c (1 + rho (G - 1))) / E steps of its row.

    python benchmarks/sampler.py
"""

import torch
from baselines import assisted_generation, generate_then_score, one_by_one, teacher_generate
from common import Report, load_model, load_prompts, median, parser, prepare, spread, take_turns

from skd_trl import SamplingParams, interleaved_sample
from skd_trl.acceptance import TopK
from skd_trl.draft_length import AutoDraftLength
from skd_trl.ragged_cache import RaggedDecoder


STUDENT_SAMPLING, TEACHER_SAMPLING = SamplingParams(0.5, 0.5), SamplingParams(0.2, 0.5)  # SKDConfig's defaults


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--num_tokens", type=int, default=64, help="tokens written for each prompt")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    own.add_argument("--num_draft_tokens", type=int, default=5, help="G where it is fixed (SKD's paper: 5)")
    own.add_argument("--one_by_one_lengths", type=int, nargs="+", default=[5, 2], help="its G; the first is the unit")
    own.add_argument("--accept_top_k", type=int, default=25)
    own.add_argument("--model_batch", type=int, default=8, help="batch size of the comparison with the cost model")
    own.add_argument("--model_prompts", type=int, default=32, help="its prompts: freed places are refilled")
    args = own.parse_args()
    clock = prepare(args)
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    ids, mask = load_prompts(args, max(*args.batch_sizes, args.model_prompts))
    report = Report("sampler", "Sampling: tokens per second", args)
    throughput(args, report, clock, student, teacher, ids, mask)
    cost_model(args, report, clock, student, teacher, ids, mask)


def throughput(args, report, clock, student, teacher, ids, mask) -> None:
    unpadded = [row[keep.bool()] for row, keep in zip(ids[:2], mask[:2], strict=True)]
    rule = TopK(args.accept_top_k)
    common = {"num_tokens": args.num_tokens}

    def interleaved(batch, num_draft_tokens):
        return lambda: sample(args, student, teacher, *batch, rule, num_draft_tokens=num_draft_tokens).num_tokens

    def alone(num_draft_tokens):
        return lambda: one_by_one(
            student, teacher, unpadded, accept=rule, num_draft_tokens=num_draft_tokens,
            student_sampling=STUDENT_SAMPLING, teacher_sampling=TEACHER_SAMPLING, **common,
        ).tokens  # fmt: skip

    arms = {f"one by one, scored apart, G = {length}, batch 1": alone(length) for length in args.one_by_one_lengths}
    unit = next(iter(arms))
    arms[f"assisted generation, G = {args.num_draft_tokens}, batch 1"] = lambda: assisted_generation(
        student, teacher, unpadded, num_draft_tokens=args.num_draft_tokens, sampling=TEACHER_SAMPLING, **common
    )
    for size in args.batch_sizes:
        batch = ids[:size], mask[:size]
        arms[f"interleaved_sample, G automatic, batch {size}"] = interleaved(
            batch, measured_policy(args, student, teacher, *batch, rule)
        )
        if size == args.model_batch:
            arms[f"interleaved_sample, G = {args.num_draft_tokens}, batch {size}"] = interleaved(
                batch, args.num_draft_tokens
            )
        arms[f"student generate, teacher scores, batch {size}"] = lambda batch=batch: generate_then_score(
            student, teacher, *batch, sampling=STUDENT_SAMPLING, **common
        )
        arms[f"teacher generate, batch {size}"] = lambda batch=batch: teacher_generate(
            teacher, *batch, sampling=TEACHER_SAMPLING, **common
        )
    seconds = take_turns(arms, args.repeats, clock, "throughput")
    rows = []
    for name, values in seconds.items():
        what, size = name.split(", batch ")
        rows.append([what, size, 1 / median(values), spread(values), median(seconds[unit]) / median(values)])
    rows.sort(key=lambda row: (not row[0].startswith("interleaved_sample"), row[0], int(row[1])))
    report.table(
        f"Throughput (K = {args.accept_top_k}, {args.num_tokens} tokens a prompt)",
        ["arm", "batch", "tokens/s", "spread", f"times one by one, G = {args.one_by_one_lengths[0]}"],
        rows,
        "Prompts of 100 to 140 tokens. `one by one` is a plain loop of batch 1 with a second teacher forward for the scores; "
        "`assisted generation` is transformers' (the teacher's text, no K).",
    )


def cost_model(args, report, clock, student, teacher, ids, mask) -> None:
    size, num_draft = args.model_batch, args.num_draft_tokens
    rule = TopK(args.accept_top_k)
    num_prompts = args.model_prompts
    ids, mask = ids[:num_prompts], mask[:num_prompts]
    decoders = {
        model: RaggedDecoder(model, size, ids.shape[1] + args.num_tokens + num_draft) for model in (student, teacher)
    }

    def forwards(model, block):
        def arm(times=4):
            start = int(ids.shape[1] + args.num_tokens / 2)
            positions = torch.arange(start, start + block).expand(size, block)
            with torch.no_grad():
                for _ in range(times):
                    decoders[model](torch.zeros_like(positions), positions, num_slots_in_use=start + block)
            return times

        return arm

    outcomes = []

    def whole(max_new_tokens):
        outcomes.append(sample(args, student, teacher, ids, mask, rule, max_rows=size, max_new_tokens=max_new_tokens))
        return 1

    seconds = take_turns(
        {
            "student step": forwards(student, 1),
            "teacher step": forwards(teacher, 1),
            "teacher block": forwards(teacher, num_draft),
            "prompts": lambda: whole(1),
            "all": lambda: whole(args.num_tokens),
        },
        args.repeats,
        clock,
        "cost model",
    )
    step = median(seconds["student step"])
    c = median(seconds["teacher step"]) / step
    rho = (median(seconds["teacher block"]) / median(seconds["teacher step"]) - 1) / max(num_draft - 1, 1)
    long = [outcome for outcome in outcomes if outcome.replaced.shape[1] == args.num_tokens]
    a = sum(o.num_accepted for o in long) / sum(o.num_tokens for o in long)
    per_round = (1 - a**num_draft) / (1 - a)
    predicted = (num_draft + c * (1 + rho * (num_draft - 1))) / per_round
    marginal = (median(seconds["all"]) - median(seconds["prompts"])) / (num_prompts * (args.num_tokens - 1))
    report.table(
        f"Cost model ({num_prompts} prompts, {size} written at once, G = {num_draft})",
        ["batch", "student step [ms]", "c", "rho", "a", "predicted cost", "measured cost", "measured / predicted"],
        [[size, 1000 * step, c, rho, a, predicted, marginal * size / step, marginal * size / step / predicted]],
        "Cost of a token in steps of its row, without the prompts' prefill: the time for all tokens less the time for one "
        "token each. The model knows neither the last rows' smaller batches nor a growing context.",
    )


def measured_policy(args, student, teacher, ids, mask, rule) -> AutoDraftLength:
    """An automatic draft length that has measured both models, as after a trainer's first steps."""
    policy = AutoDraftLength()
    while policy.is_measuring:
        sample(args, student, teacher, ids, mask, rule, num_draft_tokens=policy)
    return policy


def sample(args, student, teacher, ids, mask, rule, **kwargs):
    settings = {"num_draft_tokens": args.num_draft_tokens, "max_new_tokens": args.num_tokens, **kwargs}
    return interleaved_sample(
        student,
        teacher,
        ids,
        mask,
        accept=rule,
        eos_token_ids=[],
        pad_token_id=0,
        student_sampling=STUDENT_SAMPLING,
        teacher_sampling=TEACHER_SAMPLING,
        **settings,
    )


if __name__ == "__main__":
    main()
