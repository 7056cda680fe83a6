"""Cost of sampling by draft length, at forced and at real acceptance: fixed lengths against `num_draft_tokens="auto"`.

Forced: a proposal is accepted with a given probability, whatever it is (no end of sequence). Each arm samples the same
prompts in turns; "auto" has measured both models before, as after a trainer's first steps.
"""

from baselines import Bernoulli
from common import Report, load_model, load_prompts, median, parser, prepare, take_turns
from sampler import measured_policy, sample

from skd_trl.sampling.acceptance import TopK
from skd_trl.sampling.draft_length import AutoDraftLength


def main() -> None:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--num_tokens", type=int, default=32, help="tokens written for each prompt")
    own.add_argument("--batch_size", type=int, default=8)
    own.add_argument("--acceptance", nargs="+", default=["0.7", "0.8", "0.9", "0.95", "real"])
    own.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 7, 10])
    own.add_argument("--accept_top_k", type=int, default=25, help="K where the acceptance is real")
    args = own.parse_args()
    clock = prepare(args)
    report = Report("draft_length", "Draft length", args)
    student, teacher = load_model(args, "student"), load_model(args, "teacher")
    ids, mask = load_prompts(args, args.batch_size, 70, 90)
    rows, header = [], ["acceptance", *(f"G = {length}" for length in args.lengths)]
    for acceptance in args.acceptance:
        rule = TopK(args.accept_top_k) if acceptance == "real" else Bernoulli(float(acceptance))
        policy = measured_policy(args, student, teacher, ids, mask, rule)
        drafts: list[tuple[int, int]] = []

        def arm(length, rule=rule, drafts=drafts):
            rollout = sample(args, student, teacher, ids, mask, rule, num_draft_tokens=length)
            if isinstance(length, AutoDraftLength):
                drafts.append((rollout.num_drafted, rollout.num_rounds))
            return rollout.num_tokens

        arms = {f"G = {length}": lambda length=length: arm(length) for length in args.lengths}
        arms["auto"] = lambda policy=policy: arm(policy)
        seconds = {name: median(values) for name, values in take_turns(arms, args.repeats, clock, acceptance).items()}
        best = min(seconds[name] for name in header[1:])
        mean = sum(drafted for drafted, _ in drafts[1:]) / sum(rounds for _, rounds in drafts[1:])
        rows.append([acceptance, *(1000 * seconds[name] for name in header[1:]), 1000 * seconds["auto"]])
        rows[-1] += [
            seconds["auto"] / best,
            mean,
            policy.acceptance,
            policy.c(args.batch_size),
            policy.rho(args.batch_size),
        ]
    report.table(
        f"Milliseconds per token, {args.batch_size} prompts, {args.num_tokens} tokens each",
        [*header, "auto", "auto / best fixed", "auto's mean G", "a it saw", "c", "rho"],
        rows,
        "Prompts of 70 to 90 tokens; their prefill is included. Real: the top_k rule with K = "
        f"{args.accept_top_k} and SKDConfig's sampling.",
    )


if __name__ == "__main__":
    main()
