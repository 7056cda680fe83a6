"""The command `score`: a teacher's scores of given responses, written beside the rows; see `training/score.py`."""

import json
import logging
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.teacher_prompts import DEFAULT_TEMPLATE
from ..training.score import ScoreOptions, score
from .loading import naming
from .options import Command
from .rows import RowTemplates, load_rows


logger = logging.getLogger(__name__)


@dataclass
class ScoreArguments(RowTemplates):
    """What `skd score` takes."""

    model: str = field(default="", metadata={"help": "The teacher's name or path."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the teacher's weights; auto is as saved.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    dataset: str = field(
        default="",
        metadata={"help": "A data set of the hub, a .jsonl, .json, .parquet or .csv file, or a folder of them."},
    )
    dataset_name: str = field(default="", metadata={"help": "The same, under the name that it has in other commands."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub's data set."})
    dataset_split: str = field(default="train", metadata={"help": "Which split of it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code that comes with a model."})
    output_dir: str = field(default="", metadata={"help": "Folder that gets scores-*.parquet."})
    top_k: int = field(default=64, metadata={"help": "Tokens kept at each position; 64 are 0.5 KB a token."})
    batch_size: int = field(default=8, metadata={"help": "Rows in one forward."})
    rows_per_file: int = field(
        default=1024, metadata={"help": "Rows of a file; a killed run does one file once more."}
    )
    max_response_length: int | None = field(
        default=None, metadata={"help": "Responses are cut after so many tokens. Default: no limit."}
    )
    teacher_prompt_template: str = field(
        default=DEFAULT_TEMPLATE, metadata={"help": "Of rows with a privileged_context."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Given to the chat template, such as '{\"enable_thinking\": false}'."}
    )

    def __post_init__(self):
        self.dataset = self.dataset or self.dataset_name
        for name in ("model", "dataset", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)

    def score_options(self) -> ScoreOptions:
        """How rows are scored."""
        names = ScoreOptions.__dataclass_fields__
        return ScoreOptions(**{name: getattr(self, name) for name in names})


SCORE = Command(
    "score",
    "Writes a teacher's top-k log-probabilities of given responses beside the rows. Training with --rollout dataset reads them, and "
    "needs no teacher. Killed, it goes on where it was; launch it with torchrun for several processes.",
    (ScoreArguments,),
    "  skd score --model TEACHER --dataset rows.jsonl --output_dir scores",
)


def run(arguments: list[str]) -> int:
    """The command itself."""
    (options,) = SCORE.parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    state = PartialState(cpu=not torch.cuda.is_available())
    with SCORE.one_line_errors():
        score_options = options.score_options()
        dataset = options.fill(load_rows(options.dataset, options.dataset_split, config=options.dataset_config))
        with naming("teacher", options.model):
            model = AutoModelForCausalLM.from_pretrained(
                options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code
            )
            model = model.to(state.device).eval()
            tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        process = (state.process_index, state.num_processes)
        num_rows = score(dataset, model, tokenizer, options.output_dir, score_options, process=process)
    logger.info(
        f"Process {state.process_index + 1} of {state.num_processes} scored {num_rows} rows into {options.output_dir}."
    )
    state.destroy_process_group()
    return 0
