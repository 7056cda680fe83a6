"""`skd evaluate` and `skd compare`: one student, or two students of one teacher, on held-out prompts.

Rows may have any form that the trainers take; prompts alone are scored by all that needs no reference.
"""

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..data.vocabulary import check_vocabularies, tokenizer_at
from ..evaluation.bootstrap import ratio
from ..evaluation.comparison import compare, comparison_table, scores_table
from ..evaluation.draft_model import Drafting
from ..evaluation.held_out import Decoding, HeldOut, held_out
from ..evaluation.scores import Evaluation, Scores
from ..evaluation.scores import evaluate as score
from ..evaluation.text_metrics import scored, text_metrics
from ..evaluation.texts import decode, generate
from ..loss.divergences import DIVERGENCES
from ..sampling.admission import positions_of
from ..training.limits import room_beside
from ..training.run_files import as_json
from .loading import naming, text_config
from .options import Command
from .rows import RowTemplates, load_rows


logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments(RowTemplates):
    """What `skd evaluate` and `skd compare` share."""

    teacher: str = field(default="", metadata={"help": "The teacher's name or path."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the models' weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with a model."})
    dataset_name: str = field(
        default="",
        metadata={"help": "A data set of the hub, a .jsonl, .json, .parquet or .csv file, or a folder."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub's data set."})
    dataset_split: str = field(default="", metadata={"help": "Its split. Default: test; train of a file."})
    num_rows: int = field(default=64, metadata={"help": "A random sample of rows; 0 is all."})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Given to the chat template, such as '{\"enable_thinking\": false}'."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of a response."})
    batch_size: int = field(default=8, metadata={"help": "Rows at once."})
    seed: int = field(default=0, metadata={"help": "Of the sample of rows and of drawn texts."})
    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": "Metrics of the greedy texts: rouge, exact_match, or your own as module:function. Default: rouge, where "
            "rouge-score is installed."
        },
    )
    divergence: str = field(
        default="forward_kl", metadata={"help": "From the teacher, per token.", "choices": list(DIVERGENCES)}
    )
    num_draft_tokens: int = field(
        default=5,
        metadata={
            "help": "Tokens that the student drafts for each forward of the teacher; 0 leaves this measure out."
        },
    )
    draft_rows: int = field(default=0, metadata={"help": "On how many of the rows drafts are measured; 0 is all."})
    output_file: str | None = field(default=None, metadata={"help": "A JSON file for the figures and the texts."})

    def __post_init__(self):
        for name in ("teacher", "dataset_name"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        for name, least in (
            ("num_rows", 0),
            ("num_draft_tokens", 0),
            ("draft_rows", 0),
            ("max_new_tokens", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} has to be {least} or more.")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        text_metrics(self.metrics)  # an unknown one is told before models are loaded


@dataclass
class EvaluateArguments(EvaluationArguments):
    """What `skd evaluate` takes."""

    student: str = field(default="", metadata={"help": "The student's name or path."})

    def __post_init__(self):
        if not self.student:
            raise ValueError("--student is missing.")
        super().__post_init__()


@dataclass
class CompareArguments(EvaluationArguments):
    """What `skd compare` takes."""

    before: str = field(default="", metadata={"help": "Name or path of the student before."})
    after: str = field(default="", metadata={"help": "Name or path of the student after."})

    def __post_init__(self):
        for name in ("before", "after"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        super().__post_init__()


EVALUATE = Command(
    "evaluate",
    "Scores a student on held-out prompts: divergence to the teacher on the teacher's text and on the student's own samples, metrics "
    "of its greedy texts, and how well it drafts for the teacher.",
    (EvaluateArguments,),
    "  skd evaluate --student out --teacher TEACHER --dataset_name rows.jsonl",
)
COMPARE = Command(
    "compare",
    "Scores two students of one teacher on the same held-out prompts, with paired 95% intervals of the change.",
    (CompareArguments,),
    "  skd compare --before STUDENT --after out --teacher TEACHER --dataset_name rows.jsonl",
)


def run_evaluate(arguments: list[str]) -> int:
    """The command `skd evaluate`."""
    (options,) = EVALUATE.parse(arguments)
    with EVALUATE.one_line_errors():
        (scores,), teacher, data, texts = scores_of({"student": options.student}, options)
    figures = {name: float(ratio(values)) for name, values in scores.values.items()}
    examples = examples_of(data, texts, student=scores)
    _show(
        scores_table(scores, teacher, f"{options.student}", options.divergence),
        {"divergence": options.divergence, "metrics": figures, "examples": examples},
        options.output_file,
    )
    return 0


def run_compare(arguments: list[str]) -> int:
    """The command `skd compare`."""
    (options,) = COMPARE.parse(arguments)
    with COMPARE.one_line_errors():
        scores, teacher, data, texts = scores_of({"before": options.before, "after": options.after}, options)
    comparison = {**compare(*scores, teacher), "divergence": options.divergence}
    if options.num_draft_tokens:
        comparison["num_draft_tokens"] = options.num_draft_tokens
    examples = examples_of(data, texts, before=scores[0], after=scores[1])
    _show(
        comparison_table(comparison, "Before and after"),
        {"comparison": comparison, "examples": examples},
        options.output_file,
    )
    return 0


def scores_of(students: dict[str, str], options: EvaluationArguments) -> tuple[list[Scores], dict, HeldOut, list[str]]:
    """The scores of each student, the teacher's own, the prompts, and the teacher's texts."""
    split = options.dataset_split or ("train" if Path(options.dataset_name).is_file() else "test")
    rows = options.fill(
        load_rows(
            options.dataset_name, split, config=options.dataset_config, num_rows=options.num_rows, seed=options.seed
        )
    )
    room, vocab_size = _limits({**students, "teacher": options.teacher}, options)
    first = next(iter(students.values()))
    with naming("student", first):
        tokenizer = AutoTokenizer.from_pretrained(first, trust_remote_code=options.trust_remote_code)
    teacher = _load("teacher", options.teacher, options)
    data, teacher_ids, found = None, [], []
    for name, path in students.items():
        student = _load(name, path, options)
        _check_tokenizer(path, student, teacher, tokenizer, options)
        decoding = Decoding.of(tokenizer, student, teacher, options.max_new_tokens, options.batch_size)
        decoding = replace(decoding, seed=options.seed, vocab_size=vocab_size)
        drafting = (
            Drafting(options.num_draft_tokens, num_rows=options.draft_rows) if options.num_draft_tokens else None
        )
        evaluation = Evaluation(
            tokenizer, decoding, text_metrics(options.metrics), drafting, DIVERGENCES[options.divergence]()
        )
        if data is None:
            data = held_out(
                rows,
                tokenizer,
                decoding.eos_token_ids,
                options.chat_template_kwargs,
                room,
                vocab_size,
                is_limited_by_positions=True,
            )
            teacher_ids = generate(teacher, data.prompt_ids, decoding=decoding, description="teacher: greedy text")
        found.append(score(student, teacher, data, teacher_ids, evaluation=evaluation, name=name))
        del student
    texts = decode(tokenizer, teacher_ids)
    return found, scored(text_metrics(options.metrics), texts, data.references, "reference"), data, texts


def _check_tokenizer(path: str, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer, options) -> None:
    """Refuses a student whose ids are not the teacher's, so not those of the other student either; says what is doubtful. A folder may be
    without a tokenizer, as an adapter's: then it is the one that all are given."""
    own = tokenizer_at(path, trust_remote_code=options.trust_remote_code)
    if own is None:
        logger.warning(f"{path} has no tokenizer, so it was not verified that its ids are those of the others.")
    try:
        doubt = check_vocabularies(student, teacher, own or tokenizer, trust_remote_code=options.trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if doubt is not None:
        logger.warning(f"{path}: {doubt}")


def examples_of(data: HeldOut, teacher_texts: list[str], **students: Scores) -> list[dict[str, str | None]]:
    """Prompt, reference, and what the teacher and each student wrote."""
    columns = {"prompt": data.prompts, "reference": data.references, "teacher": teacher_texts}
    columns |= {name: scores.responses for name, scores in students.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _limits(models: dict[str, str], options: EvaluationArguments) -> tuple[int | None, int]:
    """The longest prompt that leaves room for a response (`None`: no limit), and the number of ids, of all models: they are given one set
    of prompts, and one text of the teacher's for each.

    Raises:
        `ValueError`: if the response takes all positions of a model.
    """
    configs = {
        role if role in ("student", "teacher") else f"student {role}": text_config(
            role, name, options.trust_remote_code
        )
        for role, name in models.items()
    }
    positions = {role: positions_of(config) for role, config in configs.items()}
    return room_beside(options.max_new_tokens, positions), min(config.vocab_size for config in configs.values())


def _load(role: str, name: str, options: EvaluationArguments) -> PreTrainedModel:
    with naming(role, name):
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
        ).to(PartialState().device)


def _show(table: Table, content: dict, output_file: str | None) -> None:
    if not PartialState().is_main_process:
        return
    Console().print(table)
    if output_file:
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(output_file).write_text(as_json(content, indent=2))
        print(output_file)
