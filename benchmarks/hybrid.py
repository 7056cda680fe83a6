"""A pair of hybrid decoders: tokens per second by draft length, what going back costs, and what the cost model says.

Random models with the layers of Qwen3.5 (three of gated delta net to one of attention), wide enough that forwards dominate. A
proposal is accepted with a given probability, whatever it is. A round of N rows and G tokens costs G steps, one verification (in which
the recurrent layers read token by token), and from G = 2 on going back; it brings (1 - a^G) / (1 - a) tokens a row. These three are
measured on the models alone.

    python benchmarks/hybrid.py
"""

import torch
from baselines import Bernoulli
from common import Report, median, parser, prepare, take_turns
from sampler import measured_policy, sample
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skd_trl.sampling.draft_length import AutoDraftLength, expected_tokens
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.recurrent_state import Reading


def main() -> None:
    own = parser(__doc__.splitlines()[0], models=False)
    own.add_argument("--num_tokens", type=int, default=32, help="tokens written for each prompt")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16])
    own.add_argument("--acceptance", type=float, nargs="+", default=[0.7, 0.9])
    own.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    own.add_argument("--prompt_length", type=int, default=48)
    own.add_argument("--hidden_sizes", type=int, nargs=2, default=[128, 512], help="of student and teacher")
    own.add_argument("--num_layers", type=int, nargs=2, default=[4, 8], help="of student and teacher")
    args = own.parse_args()
    clock = prepare(args)
    report = Report("hybrid", "Hybrid decoders", args)
    student, teacher = (hybrid(*sizes) for sizes in zip(args.hidden_sizes, args.num_layers, strict=True))
    for batch_size in args.batch_sizes:
        ids = torch.randint(3, 4000, (batch_size, args.prompt_length))
        mask = torch.ones_like(ids)
        of_parts = parts(student, teacher, batch_size, args, clock)
        rows = []
        for acceptance in args.acceptance:
            rule = Bernoulli(acceptance)
            policy = measured_policy(args, student, teacher, ids, mask, rule)
            drafts: list[tuple[int, int]] = []

            def whole(length, max_new_tokens=args.num_tokens, rule=rule, ids=ids, mask=mask, drafts=drafts):
                rollout = sample(
                    args, student, teacher, ids, mask, rule, num_draft_tokens=length, max_new_tokens=max_new_tokens
                )
                if isinstance(length, AutoDraftLength):
                    drafts.append((rollout.num_drafted, rollout.num_rounds))
                return rollout.num_tokens

            arms = {length: lambda length=length: whole(length) for length in args.lengths}
            arms |= {"auto": lambda policy=policy: whole(policy), "prompts": lambda: whole(1, 1)}
            seconds = {name: median(values) for name, values in take_turns(arms, args.repeats, clock, "whole").items()}
            best = min(seconds[length] for length in args.lengths)
            prompts = seconds["prompts"] * batch_size
            for name in (*args.lengths, "auto"):
                predicted, share = "", ""
                if name != "auto":
                    step, block, back = (of_parts[part, name] for part in ("step", "block", "back"))
                    tokens = batch_size * expected_tokens(acceptance, name)
                    cost = (name * step + block + back) / tokens
                    predicted = (seconds[name] - prompts / (batch_size * args.num_tokens)) / cost
                    share = 100 * back / (name * step + block + back)
                length = (
                    name if name != "auto" else f"auto ({sum(d for d, _ in drafts) / sum(r for _, r in drafts):.1f})"
                )
                rows.append([f"{acceptance}", length, 1 / seconds[name], predicted, share, seconds[name] / best])
        report.table(
            f"{batch_size} rows, {args.num_tokens} tokens each",
            ["acceptance", "G", "tokens/s", "cost measured / predicted", "going back, % of a round", "over the best fixed"],
            rows,
            "Prefill is in the tokens per second, and left out where the cost is compared. Rows end together here.",
        )  # fmt: skip


def hybrid(hidden_size: int, num_layers: int) -> PreTrainedModel:
    """A random decoder with Qwen3.5's kinds of layer."""
    heads = hidden_size // 64
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=8192, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), head_dim=64, linear_num_key_heads=max(heads // 2, 1),
        linear_num_value_heads=heads, linear_key_head_dim=64, linear_value_head_dim=64,
        layer_types=[("linear_attention", "full_attention")[layer % 4 == 3] for layer in range(num_layers)],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
def parts(student, teacher, batch_size: int, args, clock) -> dict[tuple[str, int], float]:
    """Seconds of a student's step, of a teacher's block and of both models' going back, by draft length."""
    start = args.prompt_length + args.num_tokens // 2
    decoders = [RaggedDecoder(model, batch_size, start + max(args.lengths)) for model in (student, teacher)]
    for decoder in decoders:
        positions = torch.arange(start).expand(batch_size, start)
        decoder(torch.ones_like(positions), positions, num_slots_in_use=start, reading=Reading(is_beginning=True))
    kept, seconds = torch.ones(batch_size, dtype=torch.long), {}
    for length in args.lengths:
        for decoder in decoders:
            decoder.states.begin_round(length)
        positions = torch.arange(start, start + length).expand(batch_size, length)

        def read(decoder, count, positions=positions, length=length):
            tokens = torch.ones_like(positions[:, :count])
            decoder(tokens, positions[:, :count], num_slots_in_use=start + length, reading=Reading(step=0))
            return 1

        def block(read=read, length=length):
            return read(decoders[1], length)

        def back():
            for decoder in decoders:
                decoder.states.keep(kept)
            return 1

        arms = {"step": lambda read=read: read(decoders[0], 1), "block": block, "back": back}
        for name, values in take_turns(arms, 2 * args.repeats, clock, f"parts, G = {length}").items():
            seconds[name, length] = median(values)
    return seconds


if __name__ == "__main__":
    main()
