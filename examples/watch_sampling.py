"""
Watch student and teacher write one response together, round by round, with the sampler alone: no trainer.

python examples/watch_sampling.py
python examples/watch_sampling.py --accept_top_k 5 --num_draft_tokens 3 --prompt "What does a compiler do?"
python examples/watch_sampling.py --student Qwen/Qwen2-0.5B-Instruct --teacher Qwen/Qwen2-7B-Instruct

In each round the student drafts a few tokens, the teacher judges them all in one forward, the leading run that it accepts
stands, and the first one that it does not accept is replaced by a token of its own.
"""

import argparse
import os
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from skd_trl import Execution, LocalParticipant, SamplingParams, interleaved_sample
from skd_trl.evaluation.scores import decoding_for
from skd_trl.sampling.acceptance import Draft, TopK


PROMPT = (
    "Summarize this software package in one short line.\n\nThis tool watches a directory and runs a command whenever a "
    "file in it changes. It is meant for programmers who want their tests to run each time they save, without leaving "
    "the editor."
)
ACCEPTED, REPLACED, DROPPED, PROPOSED = "green", "bold reverse", "dim", "strike dim"


@dataclass(frozen=True)
class WatchedTopK(TopK):
    """The rule of SKD, which also keeps what it judged: of each round the draft, and how many of its tokens stand."""

    rounds: list[tuple[list[int], int]] = field(default_factory=list)

    def __call__(self, draft: Draft) -> torch.Tensor:
        accepted = super().__call__(draft)
        self.rounds.append((draft.tokens[0].tolist(), int(accepted[0].long().cumprod(0).sum())))
        return accepted


def main(arguments: argparse.Namespace) -> None:
    for name in (arguments.student, arguments.teacher):
        if name.startswith(("examples/", ".", "/")) and not os.path.isdir(name):
            raise SystemExit(f"error: {name} does not exist; run `python examples/offline_assets.py` first.")
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device)
        for name in (arguments.student, arguments.teacher)
    )
    messages = [{"role": "user", "content": arguments.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    decoding = decoding_for(tokenizer, student, teacher, arguments.max_new_tokens, batch_size=1)
    accept = WatchedTopK(k=arguments.accept_top_k)
    start = time.perf_counter()
    rollout = interleaved_sample(
        LocalParticipant(student, SamplingParams(arguments.temperature, arguments.top_p)),
        LocalParticipant(teacher, SamplingParams(arguments.teacher_temperature, arguments.teacher_top_p)),
        prompt.input_ids.to(device),
        prompt.attention_mask.to(device),
        accept=accept,
        max_new_tokens=arguments.max_new_tokens,
        eos_token_ids=decoding.eos_token_ids,
        noise=torch.Generator(device).manual_seed(arguments.seed),
        execution=Execution(arguments.num_draft_tokens),
    )
    seconds = time.perf_counter() - start
    response = rollout.labels[0][rollout.labels[0] != -100].tolist()
    replaced = rollout.replaced[0].tolist()[: len(response)]

    console.print(Text("The prompt", style="italic"))
    console.print(Text(arguments.prompt), "")
    console.print(rounds_table(accept.rounds, response, tokenizer))
    console.print(Text("The response", style="italic"))
    console.print(marked(response, replaced, tokenizer), "")
    console.print(
        f"{len(response)} tokens in {rollout.num_rounds} rounds ({len(response) / rollout.num_rounds:.1f} a round), "
        f"{rollout.num_drafted} drafted, {rollout.num_accepted} accepted, {rollout.num_replaced} replaced "
        f"({rollout.num_replaced / len(response):.0%} of the response); {seconds:.1f} s",
        highlight=False,
    )


def rounds_table(
    rounds: list[tuple[list[int], int]], response: list[int], tokenizer: PreTrainedTokenizerBase
) -> Table:
    """One line a round: what stands, what was replaced by what, and what was dropped behind it."""
    table = Table(title="The rounds", caption_justify="left", title_justify="left")
    table.caption = Text.assemble(
        ("accepted", ACCEPTED), "  ", ("proposed", PROPOSED), ">", ("replaced by the teacher", REPLACED), "  ",
        ("dropped", DROPPED),
    )  # fmt: skip
    table.add_column("", justify="right")
    table.add_column("the student's draft, and what became of it")
    table.add_column("accepted", justify="right")
    position = 0
    for number, (draft, num_accepted) in enumerate(rounds, start=1):
        line = Text()
        left = len(response) - position
        for token in draft[: min(num_accepted, left)]:
            line.append_text(shown(token, tokenizer, ACCEPTED)).append(" ")
        if num_accepted < min(len(draft), left):
            line.append_text(shown(draft[num_accepted], tokenizer, PROPOSED)).append(">")
            line.append_text(shown(response[position + num_accepted], tokenizer, REPLACED)).append(" ")
        for token in draft[num_accepted + 1 :]:
            line.append_text(shown(token, tokenizer, DROPPED)).append(" ")
        table.add_row(str(number), line, f"{num_accepted} of {len(draft)}")
        position += min(num_accepted + (num_accepted < len(draft)), left)
    return table


def marked(response: list[int], replaced: list[bool], tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text()
    for token, is_replaced in zip(response, replaced, strict=True):
        text.append(tokenizer.decode([token]), style=REPLACED if is_replaced else ACCEPTED)
    return text


def shown(token: int, tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    """A token between the spaces that it brings along, with line breaks made visible."""
    return Text(tokenizer.decode([token]).replace("\n", "↵").replace(" ", "␣"), style=style)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="examples/assets/student-20")
    parser.add_argument("--teacher", default="examples/assets/teacher")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--accept_top_k", type=int, default=25)
    parser.add_argument(
        "--num_draft_tokens",
        type=lambda text: text if text == "auto" else int(text),
        default=5,
        help="a number or auto",
    )
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0, help="the student's")
    parser.add_argument("--top_p", type=float, default=1.0, help="the student's")
    parser.add_argument("--teacher_temperature", type=float, default=0.2)
    parser.add_argument("--teacher_top_p", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
