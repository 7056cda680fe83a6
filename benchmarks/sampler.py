"""Tokens per second of `interleaved_sample` against what a user would run instead.

Every arm writes `num_tokens` tokens for each prompt (no end of sequence) and ends with the teacher's scores of them.

    python benchmarks/sampler.py
"""

from baselines import assisted_generation, generate_then_score, one_by_one, teacher_generate
from common import Report, load_model, load_prompts, median, parser, prepare, spread, take_turns

from skd_trl import Execution, LocalParticipant, SamplingParams, interleaved_sample
from skd_trl.sampling.acceptance import TopK
from skd_trl.sampling.draft_length import AutoDraftLength


STUDENT_SAMPLING, TEACHER_SAMPLING = SamplingParams(0.5, 0.5), SamplingParams(0.2, 0.5)  # SKDConfig's defaults


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--num_tokens", type=int, default=64, help="tokens written for each prompt")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    own.add_argument("--num_draft_tokens", type=int, default=5, help="G where it is fixed (SKD's paper: 5)")
    own.add_argument("--one_by_one_lengths", type=int, nargs="+", default=[5, 2], help="its G; the first is the unit")
    own.add_argument("--accept_top_k", type=int, default=25)
    own.add_argument(
        "--fixed_batch", type=int, default=8, help="of the batch sizes, the one at which G is fixed as well"
    )
    args = own.parse_args()
    clock = prepare(args)
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    ids, mask = load_prompts(args, max(args.batch_sizes))
    report = Report("sampler", "Sampling: tokens per second", args)
    throughput(args, report, clock, student, teacher, ids, mask)


def throughput(args, report, clock, student, teacher, ids, mask) -> None:
    unpadded = [row[keep.bool()] for row, keep in zip(ids[:2], mask[:2], strict=True)]
    rule = TopK(args.accept_top_k)
    common = {"num_tokens": args.num_tokens}

    def interleaved(batch, num_draft_tokens):
        return lambda: (
            sample(args, student, teacher, batch[0], batch[1], rule, num_draft_tokens=num_draft_tokens).num_tokens
        )

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
            batch, measured_policy(args, student, teacher, batch[0], batch[1], rule)
        )
        if size == args.fixed_batch:
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


def measured_policy(args, student, teacher, ids, mask, rule) -> AutoDraftLength:
    """An automatic draft length that has measured both models, as after a trainer's first steps."""
    policy = AutoDraftLength()
    while policy.is_measuring:
        sample(args, student, teacher, ids, mask, rule, num_draft_tokens=policy)
    return policy


def sample(args, student, teacher, ids, mask, rule, **kwargs):
    return interleaved_sample(
        LocalParticipant(student, STUDENT_SAMPLING),
        LocalParticipant(teacher, TEACHER_SAMPLING),
        ids,
        mask,
        accept=rule,
        max_new_tokens=kwargs.pop("max_new_tokens", args.num_tokens),
        eos_token_ids=[],
        execution=Execution(**kwargs),
    )


if __name__ == "__main__":
    main()
