"""`skd watch`: student and teacher write one response together, shown round by round, with the sampler alone.

In each round the student drafts a few tokens, the teacher judges them all in one forward, the leading run of accepted tokens is kept,
and the first rejected one is replaced by a token of the teacher's.
"""

import json
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.vocabulary import check_vocabularies, end_of_sequence_ids, shared_vocab_size
from ..ideas import check_used, make_idea
from ..sampling.acceptance import ACCEPTANCE_RULES, AcceptanceRule
from ..sampling.draft import Draft
from ..sampling.draft_length import AUTO
from ..sampling.interleaved import Execution, interleaved_sample
from ..sampling.participants import LocalParticipant
from ..sampling.rounds import Rounds
from ..sampling.sampling_params import SamplingParams
from ..skd_config import ACCEPT
from ..training.completions import token_texts, whole_pieces
from .loading import naming
from .options import Command


PROMPT = (
    "Summarize this software package in one short line.\n\nThis tool watches a directory and runs a command whenever a "
    "file in it changes. It is meant for programmers who want their tests to run each time they save, without leaving "
    "the editor."
)


@dataclass
class WatchArguments:
    """What `skd watch` takes."""

    student: str = field(default="", metadata={"help": "The student's name or path."})
    teacher: str = field(default="", metadata={"help": "The teacher's name or path."})
    prompt: str = field(default=PROMPT, metadata={"help": "What the user says."})
    accept: str = field(
        default="top_k",
        metadata={
            "help": f"Rule by which a token is accepted: {', '.join(ACCEPTANCE_RULES)}, or your own as module:attribute."
        },
    )
    accept_top_k: int = field(default=25, metadata={"help": "K of the rule top_k."})
    accept_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Parameters of the other rules, such as '{\"alpha\": 0.25}' for min_prob."}
    )
    num_draft_tokens: str = field(
        default="5", metadata={"help": "Tokens that the student drafts in a round, or auto."}
    )
    max_new_tokens: int = field(default=48, metadata={"help": "Most tokens of the response."})
    temperature: float = field(default=1.0, metadata={"help": "The student's; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "The student's."})
    teacher_temperature: float = field(default=0.2, metadata={"help": "The teacher's; 0 is greedy."})
    teacher_top_p: float = field(default=0.5, metadata={"help": "The teacher's."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with a model."})

    def __post_init__(self):
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if str(self.num_draft_tokens) != AUTO and not (
            str(self.num_draft_tokens).isdecimal() and int(self.num_draft_tokens)
        ):
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens!r} must be at least 1, or {AUTO!r}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if isinstance(self.accept_kwargs, str):
            self.accept_kwargs = json.loads(self.accept_kwargs)
        self.rule()
        check_used(self, [ACCEPT])

    def rule(self) -> AcceptanceRule:
        """The acceptance rule."""
        return make_idea(ACCEPT, self)


WATCH = Command(
    "watch",
    "Shows one response being written by student and teacher together, round by round: what the student drafted, and what the teacher "
    "accepted, replaced and dropped.",
    (WatchArguments,),
    "  skd watch --student STUDENT --teacher TEACHER --prompt 'What does a compiler do?'",
)


class Watched(AcceptanceRule):
    """A rule that also keeps what it judged: of each round the draft, and how many of its tokens were accepted."""

    def __init__(self, rule: AcceptanceRule):
        self.rule, self.rounds, self.num_written = rule, [], 0
        self.needs_student, self.drafts, self.judges = rule.needs_student, rule.drafts, rule.judges  # type: ignore[misc]

    def __call__(self, draft: Draft) -> torch.Tensor:
        accepted = self.rule(draft)
        self.rounds.append((draft.tokens[0].tolist(), int(accepted[0].long().cumprod(0).sum())))
        return accepted

    def observe(self, written: list[int], live: list[int]) -> None:
        """Called after each round; one that wrote nothing is played again (its candidates did not hold the nucleus)."""
        if written[0] == self.num_written:
            self.rounds.pop()
        self.num_written = written[0]

    def replacement_probs(self, draft: Draft) -> torch.Tensor:
        return self.rule.replacement_probs(draft)

    def replacement(self, draft: Draft, uniforms: torch.Tensor) -> torch.Tensor:
        return self.rule.replacement(draft, uniforms)


@dataclass(frozen=True)
class Marks:
    """How tokens are told apart: styles on a terminal, brackets in a file or a pipe, which have no colours."""

    accepted: str
    proposed: str
    replaced: str
    dropped: str
    brackets: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, console: Console) -> "Marks":
        if console.is_terminal and console.color_system is not None:
            return cls("green", "strike dim", "bold reverse", "dim")
        pairs = ("[", "]") if console.options.ascii_only else ("⟦", "⟧")
        return cls("", "", "", "", {"proposed": ("~", "~"), "replaced": pairs, "dropped": ("(", ")")})

    def text(self, text: str, what: str) -> Text:
        """`text` marked as `what`: accepted, proposed, replaced or dropped."""
        opening, closing = self.brackets.get(what, ("", ""))
        return Text(f"{opening}{text}{closing}", style=getattr(self, what))


def run(arguments: list[str]) -> int:
    """The command itself."""
    (options,) = WATCH.parse(arguments)
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with WATCH.one_line_errors():
        accept = Watched(options.rule())
        drafts = AUTO if options.num_draft_tokens == AUTO else int(options.num_draft_tokens)
        student, tokenizer = load("student", options.student, options.trust_remote_code)
        teacher, tokenizer_of_teacher = load("teacher", options.teacher, options.trust_remote_code)
        if doubt := check_vocabularies(student, teacher, tokenizer, tokenizer_of_teacher):
            console.print(Text(doubt, style="yellow"))
        student, teacher = student.to(device), teacher.to(device)
        prompt = prompt_ids(options.prompt, tokenizer).to(device)
        vocab_size = shared_vocab_size(student, teacher)
        start = time.perf_counter()
        rollout = interleaved_sample(
            LocalParticipant(student, SamplingParams(options.temperature, options.top_p), vocab_size=vocab_size),
            LocalParticipant(
                teacher, SamplingParams(options.teacher_temperature, options.teacher_top_p), vocab_size=vocab_size
            ),
            prompt,
            torch.ones_like(prompt),
            accept=accept,
            max_new_tokens=options.max_new_tokens,
            eos_token_ids=end_of_sequence_ids(student, teacher, tokenizer),
            noise=torch.Generator(device).manual_seed(options.seed),
            # Captured rounds run no Python, and would show nothing.
            execution=Execution(drafts, rounds=Rounds(capture=False), observe=accept.observe),
        )
        seconds = time.perf_counter() - start
    response = rollout.labels[0][rollout.labels[0] != -100].tolist()
    replaced = rollout.replaced[0].tolist()[: len(response)]
    marks = Marks.of(console)

    console.print(Text("The prompt", style="italic"))
    console.print(Text(options.prompt), "")
    console.print(rounds_table(accept.rounds, response, tokenizer, marks))
    console.print(Text("The response", style="italic"))
    console.print(marked(response, replaced, tokenizer, marks), "")
    console.print(
        f"{len(response)} tokens in {rollout.num_rounds} rounds ({len(response) / rollout.num_rounds:.1f} a round), "
        f"{rollout.num_drafted} drafted, {rollout.num_accepted} accepted, {rollout.num_replaced} replaced "
        f"({rollout.num_replaced / len(response):.0%} of the response); {seconds:.1f} s",
        highlight=False,
    )
    return 0


def load(role: str, name: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer."""
    with naming(role, name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=trust_remote_code)
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The prompt (1, P) as the models read it: through the chat template, where the tokenizer has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def rounds_table(
    rounds: list[tuple[list[int], int]], response: list[int], tokenizer: PreTrainedTokenizerBase, marks: Marks
) -> Table:
    """One line a round: what was accepted, what was replaced by what, and what was dropped behind it."""
    table = Table(title="The rounds", caption_justify="left", title_justify="left")
    legend = (marks.text("accepted", "accepted"), "  ", marks.text("proposed", "proposed"), ">")
    legend += (marks.text("replaced by the teacher", "replaced"), "  ", marks.text("dropped", "dropped"))
    table.caption = Text.assemble(*legend)
    table.add_column("", justify="right")
    table.add_column("the student's draft, and what happened to it")
    table.add_column("accepted", justify="right")
    position = 0
    for number, (draft, num_accepted) in enumerate(rounds, start=1):
        line = Text()
        left = len(response) - position
        for token in draft[: min(num_accepted, left)]:
            line.append_text(marks.text(shown(token, tokenizer), "accepted")).append(" ")
        if num_accepted < min(len(draft), left):
            proposal = draft[num_accepted]
            if proposal >= 0:
                line.append_text(marks.text(shown(proposal, tokenizer), "proposed")).append(">")
            line.append_text(marks.text(shown(response[position + num_accepted], tokenizer), "replaced")).append(" ")
        for token in draft[min(num_accepted + 1, left) :]:  # behind a replaced token, or behind the end
            line.append_text(marks.text(shown(token, tokenizer), "dropped")).append(" ")
        table.add_row(str(number), line, f"{min(num_accepted, left)} of {len(draft)}")
        position += min(num_accepted + (num_accepted < len(draft)), left)
    return table


def marked(response: list[int], replaced: list[bool], tokenizer: PreTrainedTokenizerBase, marks: Marks) -> Text:
    """The response with the teacher's tokens marked; characters of several tokens stay whole."""
    texts, _ = token_texts(tokenizer, response, response)
    text = Text()
    for piece, by_teacher, *_ in whole_pieces(texts, replaced):
        text.append_text(marks.text(piece, "replaced" if by_teacher else "accepted"))
    return text


def shown(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token between the spaces that it brings along, with line breaks made visible; a part of a character as its bytes."""
    text = tokenizer.decode([token])
    if "\ufffd" in text:
        return f"<{tokenizer.convert_ids_to_tokens(token)}>"
    return text.replace("\n", "↵").replace(" ", "␣")
