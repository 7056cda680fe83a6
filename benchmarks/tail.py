"""The tail of a window, counted in rounds without a model: what buckets, order, early admission and an overlapped read would bring.

Responses have lengths of a lognormal distribution (mean 200 tokens, sigma 0.8, at most 512); proposals are accepted with probability
0.8 and drafts have 5 tokens. Means over 10 windows.

    python benchmarks/tail.py
"""

import math
import random
from statistics import mean, pstdev

from skd_trl.sampling.rounds import Rounds


NUM_WINDOWS, ACCEPTANCE, DRAFT = 10, 0.8, 5


def rounds_needed(num_rows: int, seed: int) -> list[int]:
    """How many rounds each response of a window takes."""
    generator, needed = random.Random(seed), []
    for _ in range(num_rows):
        left, rounds = min(512, max(4, round(generator.lognormvariate(math.log(200) - 0.32, 0.8)))), 0
        while left > 0:
            count = 1
            while count < DRAFT and generator.random() < ACCEPTANCE:
                count += 1
            left, rounds = left - count, rounds + 1
        needed.append(rounds)
    return needed


def play(needed: list[int], num_places: int) -> tuple[int, int]:
    """Rounds until all responses are written, admitted in this order, and the sum of their rows, in buckets."""
    shapes, live, num_rounds, num_rows = Rounds(compile=False), [], 0, 0
    shapes.is_capturing = True
    waiting, places = list(needed), num_places
    while waiting or live:
        while waiting and len(live) < num_places:
            live.append(waiting.pop(0))
        places = shapes.num_rows(len(live), places)
        num_rounds, num_rows = num_rounds + 1, num_rows + places
        live = [left - 1 for left in live if left > 1]
    return num_rounds, num_rows


def longest_first(needed: list[int], correlation: float, seed: int) -> list[int]:
    """Ordered by a guess of the length that has this correlation with its logarithm."""
    generator, logs = random.Random(seed), [math.log(rounds) for rounds in needed]
    middle, width = mean(logs), pstdev(logs)
    guesses = [
        correlation * (x - middle) / width + math.sqrt(1 - correlation**2) * generator.gauss(0, 1) for x in logs
    ]
    return [rounds for _, rounds in sorted(zip(guesses, needed, strict=True), reverse=True)]


def main() -> None:
    print(
        "| prompts | places | order | rounds | rows in all rounds | the same without giving up places |\n"
        + "|---" * 6
        + "|"
    )
    for num_rows, num_places in ((64, 64), (256, 64), (256, 32)):
        for name, correlation in (
            ("as they come", None),
            ("longest first, guessed", 0.5),
            ("longest first, known", 1.0),
        ):
            played = []
            for seed in range(NUM_WINDOWS):
                needed = rounds_needed(num_rows, seed)
                played.append(
                    play(needed if correlation is None else longest_first(needed, correlation, seed), num_places)
                )
            rounds, rows = (mean(values) for values in zip(*played, strict=True))
            print(f"| {num_rows} | {num_places} | {name} | {rounds:.0f} | {rows:.0f} | {rounds * num_places:.0f} |")
    for num_rows, num_places in ((64, 64), (256, 64)):
        windows = [[rounds_needed(num_rows, 100 * seed + i) for i in range(4)] for seed in range(NUM_WINDOWS)]
        apart = mean(sum(play(needed, num_places)[0] for needed in four) for four in windows)
        together = mean(play(sum(four, []), num_places)[0] for four in windows)
        late = mean(
            play([rounds + 1 for rounds in four[0]], num_places)[0] / play(four[0], num_places)[0] for four in windows
        )
        print(
            f"\n{num_rows} prompts, {num_places} places: four windows take {apart:.0f} rounds, {together:.0f} if the next one's prompts "
            f"were admitted early; reading an outcome one round late takes {100 * (late - 1):.1f}% more rounds."
        )


if __name__ == "__main__":
    main()
