"""A pair of hybrid decoders: tokens per second by draft length, what going back costs, and what the cost model says.

Random models with the layers of Qwen3.5 (three of gated delta net to one of attention), wide enough that forwards dominate. A
proposal is accepted with a given probability a, whatever it is. A round of N rows and G tokens costs G steps, one verification (in
which the recurrent layers read token by token), and from G = 2 on going back. It brings a row that needs R more tokens
1 + a + ... + a^(min(G, R) - 1) of them. Steps, verifications and going back are measured on the models alone, for all rows and for
half of them, in turn with the rest: rows end at different times, and a line through both says what a smaller round costs. Draws are
from the whole distribution: random models have no nucleus.

    python benchmarks/hybrid.py --clock cpu
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from baselines import Bernoulli
from common import Report, median, parser, prepare, take_turns
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skd_trl import Execution, interleaved_sample
from skd_trl.sampling.draft_length import AutoDraftLength, DraftLength, ForwardCost, expected_tokens
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.recurrent_state import Reading


# Forwards that one turn of a part is timed over.
TIMES = 4


def main() -> None:
    own = parser(__doc__.splitlines()[0], models=False, repeats=7)
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
        rows = []
        for acceptance in args.acceptance:
            rows += compare(student, teacher, batch_size, acceptance, args, clock)
        report.table(
            f"{batch_size} rows, {args.num_tokens} tokens each",
            ["acceptance", "G", "tokens/s", "cost measured / predicted", "going back, % of a round", "over the best fixed"],
            rows,
            "Prefill is in the tokens per second, and left out where the cost is compared. Going back: of a round of all rows.",
        )  # fmt: skip


def compare(student, teacher, batch_size: int, acceptance: float, args, clock) -> list[list]:
    """The rows of the table for one batch size and one acceptance."""
    ids = torch.randint(3, 4000, (batch_size, args.prompt_length))

    def whole(length, max_new_tokens=args.num_tokens):
        return interleaved_sample(
            student, teacher, ids, torch.ones_like(ids), accept=Bernoulli(acceptance), max_new_tokens=max_new_tokens,
            eos_token_ids=[], execution=Execution(length),
        ).num_tokens  # fmt: skip

    policy = AutoDraftLength()
    while policy.is_measuring:
        whole(policy)
    watched = {length: Watched(DraftLength(length)) for length in args.lengths} | {"auto": Watched(policy)}
    arms = {name: lambda own=own: whole(own) for name, own in watched.items()}
    arms["prompts"] = lambda: whole(1, 1)
    for num_rows in (batch_size // 2, batch_size):
        arms |= parts(student, teacher, num_rows, args)
    title = f"{batch_size} rows, acceptance {acceptance}"
    seconds = {name: median(values) for name, values in take_turns(arms, args.repeats, clock, title).items()}
    costs = {length: Costs.of(length, seconds) for length in args.lengths}
    # What one token of each prompt costs beyond a round is the prompts' prefill.
    prefill = seconds["prompts"] * batch_size - costs[1].round(batch_size)
    best = min(seconds[length] for length in args.lengths)
    rows = []
    for name, own in watched.items():
        lengths, share = [length for length, _ in own.rounds], ""
        cost = sum(seconds_of_round(costs, length, len(rests)) for length, rests in own.rounds)
        tokens = sum(expected_tokens(acceptance, min(length, rest)) for length, rests in own.rounds for rest in rests)
        predicted = (seconds[name] - prefill / (batch_size * args.num_tokens)) * tokens / cost
        if name != "auto":
            share = 100 * costs[name].back.seconds(batch_size) / costs[name].round(batch_size)
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

    @staticmethod
    def of(length: int, seconds: dict) -> "Costs":
        """From the medians of the arms that `parts` has made."""
        costs = Costs(length, ForwardCost(), ForwardCost(), ForwardCost())
        for name, value in seconds.items():
            if isinstance(name, tuple) and name[1] == length:
                getattr(costs, name[0]).add(name[2], value)
        return costs


def seconds_of_round(costs: dict[int, Costs], length: int, num_rows: int) -> float:
    """Of a length that was not measured: on the line through those that were."""
    if length in costs:
        return costs[length].round(num_rows)
    line = ForwardCost()
    for known, own in costs.items():
        line.add(known, own.round(num_rows))
    return line.seconds(length)


def hybrid(hidden_size: int, num_layers: int, vocab_size: int = 8192) -> PreTrainedModel:
    """A random decoder with Qwen3.5's kinds of layer."""
    heads = hidden_size // 64
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), head_dim=64, linear_num_key_heads=max(heads // 2, 1),
        linear_num_value_heads=heads, linear_key_head_dim=64, linear_value_head_dim=64,
        layer_types=[("linear_attention", "full_attention")[layer % 4 == 3] for layer in range(num_layers)],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def parts(student, teacher, num_rows: int, args) -> dict[tuple[str, int, int], Callable[[], int]]:
    """Arms for what rounds of so many rows consist of, by its name, the draft length and the number of rows."""
    start, arms = args.prompt_length + args.num_tokens // 2, {}
    for length in args.lengths:
        decoders = [RaggedDecoder(model, num_rows, start + length) for model in (student, teacher)]
        positions = torch.arange(start).expand(num_rows, start)
        for decoder in decoders:
            with torch.no_grad():
                decoder(torch.ones_like(positions), positions, without_logits=True, reading=Reading(is_beginning=True))
            decoder.states.begin_round(length)
        positions, kept = torch.arange(start, start + length).expand(num_rows, length), torch.ones(num_rows).long()

        def read(decoder, count, positions=positions):
            with torch.no_grad():
                for _ in range(TIMES):
                    decoder(torch.ones_like(positions[:, :count]), positions[:, :count], reading=Reading(step=0))
            return TIMES

        def back(decoders=decoders, kept=kept):
            for _ in range(TIMES):
                for decoder in decoders:
                    decoder.states.keep(kept)
            return TIMES

        arms["step", length, num_rows] = lambda read=read, own=decoders[0]: read(own, 1)
        arms["block", length, num_rows] = lambda read=read, own=decoders[1], length=length: read(own, length)
        arms["back", length, num_rows] = back
    return arms


if __name__ == "__main__":
    main()
