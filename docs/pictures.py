"""Draws the pictures of README and docs from real responses: `python docs/pictures.py` writes `docs/images/*.svg`.

Needs the models of `make assets`. One response is sampled by student and teacher together, with a rule that keeps what it judged; the
pictures show it whole (`response.svg`), round by round (`rounds.svg`) and with SpecKD's weights (`gate.svg`). `accept_top_k.svg` shows how many of its
proposals each K rejects. Shapes: G drafted tokens, V vocabulary.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skd_trl import (
    GATES,
    AcceptanceRule,
    Draft,
    Execution,
    LocalParticipant,
    Rollout,
    SamplingParams,
    interleaved_sample,
)
from skd_trl.data.vocabulary import end_of_sequence_ids


PROMPTS = (
    "Summarize this software package in one short line.\n\nThis tool watches a directory and runs a command whenever a file in it "
    "changes. It is meant for programmers who want their tests to run each time they save, without leaving the editor.",
    "What does a compiler do?",
    "Give three reasons to write tests before code.",
    "Explain in two sentences why the sky is blue.",
    "Write a short message that thanks a colleague for a code review.",
    "What is the difference between a list and a tuple in Python?",
)
SHOWN = 1  # which prompt the pictures of one response show
NUM_DRAFT_TOKENS, MAX_NEW_TOKENS, NUM_ROUNDS = 5, 48, 10
WIDTH, CHAR, FONT = 860, 8.4, 14  # pixels
INK, GREY, PAPER, LINE, ORANGE, BLUE = "#1b1f24", "#6b7280", "#ffffff", "#d0d7de", "#b34700", "#0b5fa5"


@dataclass(frozen=True)
class RecordingTopK(AcceptanceRule):
    """SKD's rule, which also keeps each round's draft and how many of its tokens were accepted. For one row."""

    k: int = 25
    rounds: list[tuple[list[int], int]] = field(default_factory=list, compare=False)

    def __call__(self, draft: Draft) -> torch.Tensor:
        accepted = draft.teacher_rank < self.k
        self.rounds.append((draft.tokens[0].tolist(), int(accepted[0].long().cumprod(0).sum())))
        return accepted


@dataclass(frozen=True)
class Pair:
    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, assets: Path) -> "Pair":
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(assets / name, dtype=torch.float32).eval()
            for name in ("student-20", "teacher")
        )
        return cls(student, teacher, AutoTokenizer.from_pretrained(assets / "teacher"))

    def sample(self, prompt: str, rule: AcceptanceRule, seed: int) -> Rollout:
        """A response, at the package's default temperatures and nuclei."""
        tokens = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return interleaved_sample(
            LocalParticipant(self.student, SamplingParams(temperature=0.5, top_p=0.5)),
            LocalParticipant(self.teacher, SamplingParams(temperature=0.2, top_p=0.5)),
            tokens.input_ids,
            tokens.attention_mask,
            accept=rule,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_ids=end_of_sequence_ids(self.student, self.teacher, self.tokenizer),
            noise=torch.Generator().manual_seed(seed),
            execution=Execution(NUM_DRAFT_TOKENS),
        )

    def text(self, token: int) -> str:
        """A token as it is shown: line breaks visible."""
        return self.tokenizer.decode([token]).replace("\n", "↵")


# One response


def draw_response(pair: Pair, rollout: Rollout, prompt: str) -> str:
    """The response with each replaced token in a box and the student's proposal struck out below it."""
    canvas = Canvas(pair.tokenizer, top=70)
    for token, replaced, proposal in zip(*response_of(rollout), strict=True):
        if replaced:
            canvas.add(pair.text(token), box=ORANGE, ink=PAPER, below=pair.text(proposal))
        else:
            canvas.add(pair.text(token))
    tokens, replaced, _ = response_of(rollout)
    header = [
        line(24, 32, f"Prompt: {prompt}", GREY),
        line(24, 54, f"{len(tokens)} tokens, {sum(replaced)} of them replaced by the teacher (K = 25):", GREY),
    ]
    legend = [
        label(24, canvas.bottom + 26, "replaced", ORANGE, PAPER)[0],
        line(
            112,
            canvas.bottom + 26,
            "a token of the teacher; below it the student's proposal, which the teacher did",
            GREY,
        ),
        line(112, canvas.bottom + 44, "not rank among its 25 most probable tokens", GREY),
    ]
    return svg(
        canvas.bottom + 64, [*header, *canvas.parts, *legend], "A response that student and teacher wrote together"
    )


def draw_rounds(pair: Pair, rollout: Rollout, rounds: list[tuple[list[int], int]]) -> str:
    """The first rounds, a line each: what was accepted, replaced and dropped."""
    tokens, parts, position, top = response_of(rollout)[0], [], 0, 40
    parts.append(
        line(24, 26, "round   the student's draft of five tokens, judged in one forward of the teacher", GREY)
    )
    for number, (draft, num_accepted) in enumerate(rounds[:NUM_ROUNDS], start=1):
        left, base = 88.0, top + 28
        parts.append(line(32, base, f"{number:>2}", GREY))
        room = len(tokens) - position
        for token in draft[: min(num_accepted, room)]:
            part, width = label(left, base, pair.text(token), None, INK, frame=BLUE)
            parts.append(part)
            left += width + 6
        if num_accepted < min(len(draft), room):
            part, width = label(left, base, pair.text(draft[num_accepted]), None, GREY, frame=LINE, struck=True)
            parts.append(part)
            left += width + 2
            parts.append(line(left, base, "→", ORANGE))
            part, width = label(left + 14, base, pair.text(tokens[position + num_accepted]), ORANGE, PAPER)
            parts.append(part)
            left += width + 22
        for token in draft[num_accepted + 1 :]:
            part, width = label(left, base, pair.text(token), None, GREY, frame=LINE, dashed=True)
            parts.append(part)
            left += width + 6
        position += min(num_accepted + (num_accepted < len(draft)), room)
        top += 34
    base = top + 34
    left = 24.0
    for name, style, meaning in (
        ("accepted", {"frame": BLUE, "ink": INK}, "kept"),
        ("proposed", {"frame": LINE, "ink": GREY, "struck": True}, "not among the top 25"),
        ("replaced", {"box": ORANGE, "ink": PAPER}, "the teacher's token"),
        ("dropped", {"frame": LINE, "ink": GREY, "dashed": True}, "drafted again"),
    ):
        part, width = label(left, base, name, style.get("box"), style["ink"], **_frames(style))
        parts += [part, line(left + width + 8, base, meaning, GREY)]
        left += width + 24 + CHAR * len(meaning)
    return svg(base + 24, parts, "The rounds in which the response was written")


def _frames(style: dict) -> dict:
    return {name: style[name] for name in ("frame", "struck", "dashed") if name in style}


@torch.no_grad()
def draw_gate(pair: Pair, rollout: Rollout) -> str:
    """The response with the weight that SpecKD's greedy top-5 gate gives each token: a bar below it."""
    is_response = rollout.labels[0] != -100
    before = is_response.nonzero().flatten() - 1  # logits at t are about token t + 1
    logits = [
        model(rollout.input_ids, attention_mask=rollout.attention_mask).logits[0, before]
        for model in (pair.student, pair.teacher)
    ]
    weights = GATES["greedy_top_k"](k=5, floor=0.01)(student_logits=logits[0], teacher_logits=logits[1]).tolist()
    proposals = logits[0].argmax(-1).tolist()
    canvas = Canvas(pair.tokenizer, top=48)
    for token, weight, proposal in zip(response_of(rollout)[0], weights, proposals, strict=True):
        if weight == 1.0:
            canvas.add(pair.text(token), frame=BLUE)
        else:
            canvas.add(pair.text(token), frame=LINE, ink=GREY, dashed=True, below=pair.text(proposal))
    share = sum(weight == 1.0 for weight in weights) / len(weights)
    header = [line(24, 32, f"{share:.0%} of the tokens pass the gate (greedy top-k, k = 5):", GREY)]
    base = canvas.bottom + 26
    one, width = label(24, base, "weight 1", None, INK, frame=BLUE)
    floor, wider = label(24, base + 26, "weight 0.01", None, GREY, frame=LINE, dashed=True)
    legend = [
        one,
        line(24 + wider + 10, base, "the student's favourite is among the teacher's five most probable tokens", GREY),
        floor,
        line(24 + wider + 10, base + 26, "it is not; the favourite is below, struck out", GREY),
    ]
    return svg(base + 46, [*header, *canvas.parts, *legend], "The weights that SpecKD gives the tokens of a response")


def response_of(rollout: Rollout) -> tuple[list[int], list[bool], list[int]]:
    """Tokens, whether each was replaced, and the student's proposals, of the first row."""
    tokens = rollout.labels[0][rollout.labels[0] != -100].tolist()
    return tokens, rollout.replaced[0, : len(tokens)].tolist(), rollout.proposals[0, : len(tokens)].tolist()


# How K decides


def draw_accept_top_k(rollout: Rollout, ks: Sequence[int] = (1, 2, 5, 10, 25, 100)) -> str:
    """Share of the proposals in the response that each K rejects, from their ranks."""
    ranks = rollout.teacher_rank[rollout.teacher_rank >= 0]
    parts, top = (
        [line(24, 32, "Share of the student's proposals in this response that K (accept_top_k) rejects", INK)],
        50,
    )
    for k in ks:
        base, share = top + 18, (ranks >= k).float().mean().item()
        parts += [
            line(80 - CHAR * len(str(k)), base, str(k), INK),
            f'<rect x="104" y="{top + 4}" width="600" height="18" fill="{PAPER}" stroke="{LINE}"/>',
            f'<rect x="104" y="{top + 4}" width="{600 * share:.0f}" height="18" fill="{ORANGE}"/>',
            line(716, base, f"{share:.0%}", INK),
        ]
        top += 28
    parts.append(
        line(24, top + 26, "K = vocabulary rejects none: the student's own text, on-policy distillation", GREY)
    )
    return svg(top + 44, parts, "Share of rejected proposals by K")


def draw_step() -> str:
    """The stages of an optimizer step, as boxes from left to right."""
    stages = (
        ("collect", "all prompts", "of the step"),
        ("sample", "all responses", "as one batch"),
        ("count", "tokens, over all", "processes"),
        ("train", "each micro-batch", "chunk by chunk"),
        ("update", "the student", ""),
    )
    parts, left = [], 24.0
    for name, first, second in stages:
        filled = name == "sample"
        parts += [
            f'<rect x="{left}" y="24" width="146" height="86" rx="6" fill="{ORANGE if filled else PAPER}" stroke="{INK}"/>',
            line(left + 10, 48, name, PAPER if filled else INK),
            line(left + 10, 72, first, PAPER if filled else GREY, size=0.9),
            line(left + 10, 92, second, PAPER if filled else GREY, size=0.9),
        ]
        left += 146
        if name != "update":
            parts.append(line(left + 4, 72, "→", INK))
            left += 19
    return svg(134, parts, "The stages of an optimizer step")


# SVG


class Canvas:
    """Tokens in lines, as text flows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top: float):
        self.parts: list[str] = []
        self.left, self.base = 24.0, top + 20
        self.special = set(tokenizer.all_special_tokens)

    @property
    def bottom(self) -> float:
        return self.base + 18

    def add(self, text: str, *, below: str = "", box: str | None = None, ink: str = INK, **frame) -> None:
        breaks = text.count("↵")
        ink = GREY if text in self.special else ink
        width = max(CHAR * len(text), 0.8 * CHAR * len(below)) + (4 if box or frame else 0)
        if self.left + width > WIDTH - 24:
            self.new_line()
        part, _ = label(self.left, self.base, text, box, ink, **frame)
        self.parts.append(part)
        if below:
            self.parts.append(line(self.left, self.base + 16, below, GREY, size=0.8, struck=True))
        self.left += width + (2 if box or frame else 0)
        if breaks:
            self.new_line()

    def new_line(self) -> None:
        self.left, self.base = 24.0, self.base + 46


def line(x: float, y: float, text: str, colour: str, size: float = 1.0, struck: bool = False) -> str:
    """One line of text, as wide as its characters take wherever the font comes from."""
    strike = ' text-decoration="line-through"' if struck else ""
    width = f' textLength="{size * CHAR * len(text):.1f}" lengthAdjust="spacingAndGlyphs"' if text else ""
    shown = escape(text).replace(" ", "\u00a0")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size * FONT:.1f}"{width}{strike}>{shown}</text>'


def label(
    x: float,
    y: float,
    text: str,
    box: str | None,
    ink: str,
    *,
    frame: str | None = None,
    struck: bool = False,
    dashed: bool = False,
) -> tuple[str, float]:
    """Text, in a filled box or a frame where one is given, and its width."""
    width = CHAR * len(text) + (4 if box or frame else 0)
    rectangle = ""
    if box or frame:
        dashes = ' stroke-dasharray="3 3"' if dashed else ""
        rectangle = (
            f'<rect x="{x:.1f}" y="{y - 15:.1f}" width="{width:.1f}" height="20" rx="3" fill="{box or PAPER}" '
            f'stroke="{frame or box}"{dashes}/>'
        )
    return rectangle + line(x + (2 if rectangle else 0), y, text, ink, struck=struck), width


def svg(height: float, parts: list[str], title: str) -> str:
    font = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
    frame = f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" fill="{PAPER}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" '
        f'role="img" font-family="{font}"><title>{escape(title)}</title>\n' + "\n".join([frame, *parts]) + "\n</svg>\n"
    )


def main(arguments: argparse.Namespace) -> None:
    (arguments.output_dir / "step.svg").write_text(draw_step(), encoding="utf-8")
    if arguments.only == ["step"]:
        return
    pair = Pair.load(arguments.assets)
    rule = RecordingTopK(25)
    rollout = pair.sample(PROMPTS[arguments.prompt], rule, arguments.seed)
    pictures: dict[str, Callable[[], str]] = {
        "response": lambda: draw_response(pair, rollout, PROMPTS[arguments.prompt]),
        "rounds": lambda: draw_rounds(pair, rollout, rule.rounds),
        "gate": lambda: draw_gate(pair, rollout),
        "accept_top_k": lambda: draw_accept_top_k(rollout),
    }
    for name in arguments.only or pictures:
        (arguments.output_dir / f"{name}.svg").write_text(pictures[name](), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--assets", type=Path, default=here.parent / "examples" / "assets")
    parser.add_argument("--output_dir", type=Path, default=here / "images")
    parser.add_argument("--only", nargs="*", help="names of pictures; by default all")
    parser.add_argument(
        "--prompt", type=int, default=SHOWN, help="which of the prompts the pictures of one response show"
    )
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
