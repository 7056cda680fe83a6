"""A pair of hybrid decoders: tokens per second by draft length, what going back costs, and what the cost model says.

Random models with the layers of Qwen3.5 (three of gated delta net to one of attention), wide enough that forwards dominate. A
proposal is accepted with a given probability a, whatever it is. A round of N rows and G tokens costs G steps, one verification (in
which the recurrent layers read token by token), and from G = 2 on going back. It brings a row that needs R more tokens
1 + a + ... + a^(min(G, R) - 1) of them. Steps, verifications and going back are measured on the models alone, for all rows and for
half of them: rows end at different times, and a line through both says what a smaller round costs.

    python benchmarks/hybrid.py --clock cpu
"""

from dataclasses import dataclass

import torch
from baselines import Bernoulli
from common import Report, median, parser, prepare, take_turns
from sampler import measured_policy, sample
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skd_trl.sampling.draft_length import DraftLength, ForwardCost, expected_tokens
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.recurrent_state import Reading


def main() -> None:
    own = parser(__doc__.splitlines()[0], models=False, repeats=3)
    own.add_argument("--num_tokens", type=int, default=32, help="tokens written for each prompt")
    own.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16])
    own.add_argument("--acceptance", type=float, nargs="+", default=[0.7, 0.9])
    own.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    own.add_argument("--prompt_length", type=int, default=48)
    own.add_argument("--hidden_sizes", type=int, nargs=2, default=[256, 512], help="of student and teacher")
    own.add_argument("--num_layers", type=int, nargs=2, default=[4, 8], help="of student and teacher")
    args = own.parse_args()
    clock = prepare(args)
    report = Report("hybrid", "Hybrid decoders", args)
    student, teacher = (hybrid(*sizes) for sizes in zip(args.hidden_sizes, args.num_layers, strict=True))
    for batch_size in args.batch_sizes:
        costs = parts(student, teacher, batch_size, args, clock)
        rows = []
        for acceptance in args.acceptance:
            rows += compare(student, teacher, batch_size, acceptance, costs, args, clock)
        report.table(
            f"{batch_size} rows, {args.num_tokens} tokens each",
            ["acceptance", "G", "tokens/s", "cost measured / predicted", "going back, % of a round", "over the best fixed"],
            rows,
            "Prefill is in the tokens per second, and left out where the cost is compared. Going back: of a round of all rows.",
        )  # fmt: skip


def compare(student, teacher, batch_size: int, acceptance: float, costs, args, clock) -> list[list]:
    """The rows of the table for one batch size and one acceptance."""
    rule = Bernoulli(acceptance)
    ids = torch.randint(3, 4000, (batch_size, args.prompt_length))
    mask = torch.ones_like(ids)
    policy = measured_policy(args, student, teacher, ids, mask, rule)
    watched = {length: Watched(DraftLength(length)) for length in args.lengths} | {"auto": Watched(policy)}

    def whole(length, max_new_tokens=args.num_tokens):
        rollout = sample(
            args, student, teacher, ids, mask, rule, num_draft_tokens=length, max_new_tokens=max_new_tokens
        )
        return rollout.num_tokens

    arms = {name: lambda own=own: whole(own) for name, own in watched.items()}
    arms["prompts"] = lambda: whole(1, 1)
    seconds = {name: median(values) for name, values in take_turns(arms, args.repeats, clock, "whole").items()}
    # What one token of each prompt costs beyond a round is the prompts' prefill.
    prefill = seconds["prompts"] * batch_size - costs[1].round(batch_size)
    best = min(seconds[length] for length in args.lengths)
    rows = []
    for name, own in watched.items():
        lengths = [length for length, _ in own.rounds]
        predicted, share = "", ""
        if set(lengths) <= set(costs):
            cost = sum(costs[length].round(len(rests)) for length, rests in own.rounds)
            tokens = sum(
                expected_tokens(acceptance, min(length, rest)) for length, rests in own.rounds for rest in rests
            )
            predicted = (seconds[name] - prefill / (batch_size * args.num_tokens)) * tokens / cost
        if name != "auto":
            share = 100 * costs[name].share_of_going_back(batch_size)
        shown = name if name != "auto" else f"auto ({sum(lengths) / len(lengths):.1f})"
        rows.append([f"{acceptance}", shown, 1 / seconds[name], predicted, share, seconds[name] / best])
    return rows


class Watched(DraftLength):
    """Writes down the rounds that another policy chooses: (G, what each row still needs)."""

    def __init__(self, policy: DraftLength):
        super().__init__(policy.longest)
        self.policy, self.rounds = policy, []

    def choose(self, remaining: list[int]) -> int:
        length = self.policy.choose(remaining)
        self.rounds.append((length, list(remaining)))
        return length

    def observe(self, round_) -> None:
        self.policy.observe(round_)


@dataclass(frozen=True)
class Costs:
    """Of rounds of G tokens, by number of rows: a student's step, the teacher's verification, and both models' going back."""

    length: int
    step: ForwardCost
    block: ForwardCost
    back: ForwardCost

    def round(self, num_rows: int) -> float:
        return self.length * self.step.seconds(num_rows) + self.block.seconds(num_rows) + self.back.seconds(num_rows)

    def share_of_going_back(self, num_rows: int) -> float:
        return self.back.seconds(num_rows) / self.round(num_rows)


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
def parts(student, teacher, batch_size: int, args, clock) -> dict[int, Costs]:
    """What rounds consist of, by draft length."""
    start = args.prompt_length + args.num_tokens // 2
    lengths = sorted({1, *args.lengths})
    costs = {length: Costs(length, ForwardCost(), ForwardCost(), ForwardCost()) for length in lengths}
    for num_rows in (batch_size // 2, batch_size):
        decoders = [RaggedDecoder(model, num_rows, start + max(lengths)) for model in (student, teacher)]
        for decoder in decoders:
            positions = torch.arange(start).expand(num_rows, start)
            decoder(torch.ones_like(positions), positions, num_slots_in_use=start, reading=Reading(is_beginning=True))
        kept = torch.ones(num_rows, dtype=torch.long)
        for length in lengths:
            for decoder in decoders:
                decoder.states.begin_round(length)
            positions = torch.arange(start, start + length).expand(num_rows, length)

            def read(decoder, count, positions=positions, length=length):
                tokens = torch.ones_like(positions[:, :count])
                decoder(tokens, positions[:, :count], num_slots_in_use=start + length, reading=Reading(step=0))
                return 1

            def back(decoders=decoders, kept=kept):
                for decoder in decoders:
                    decoder.states.keep(kept)
                return 1

            arms = {
                "step": lambda read=read, own=decoders[0]: read(own, 1),
                "block": lambda read=read, own=decoders[1], length=length: read(own, length),
                "back": back,
            }
            seconds = take_turns(arms, 2 * args.repeats, clock, f"parts, {num_rows} rows, G = {length}")
            for name, values in seconds.items():
                getattr(costs[length], name).add(num_rows, median(values))
    return costs


if __name__ == "__main__":
    main()
