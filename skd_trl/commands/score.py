"""The command `score`: a teacher's scores of given responses, written beside the rows; see `training/score.py`."""

import argparse
import json
import logging

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.teacher_prompts import DEFAULT_TEMPLATE
from ..training.score import ScoreOptions, score
from .rows import load_rows


logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> int:
    """The command `score`; its options are those of [`ScoreOptions`]."""
    parser = argparse.ArgumentParser(
        "skd score",
        description="Writes a teacher's top-k log-probabilities of given responses beside the rows. Training with --rollout dataset "
        "reads them, and needs no teacher. Killed, it goes on where it was; launch it with torchrun for several processes.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the teacher's name or path")
    parser.add_argument(
        "--dataset", required=True, help="a name on the hub, a .jsonl, .json or .parquet file, or a folder of them"
    )
    parser.add_argument("--dataset_split", default="train", help="which split of it (train)")
    parser.add_argument("--output_dir", required=True, help="folder that gets scores-*.parquet")
    parser.add_argument("--top_k", type=int, default=64, help="tokens kept at each position (64: 0.5 KB a token)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows in one forward (8)")
    parser.add_argument(
        "--rows_per_file", type=int, default=1024, help="rows of a file; a killed run does one again (1024)"
    )
    parser.add_argument("--max_response_length", type=int, help="responses are cut after so many tokens (no limit)")
    parser.add_argument(
        "--teacher_prompt_template", default=DEFAULT_TEMPLATE, help="of rows with a privileged_context"
    )
    parser.add_argument("--chat_template_kwargs", type=json.loads, help="such as '{\"enable_thinking\": false}'")
    parser.add_argument("--dtype", default="auto", help="the weights' type, such as bfloat16 (as saved)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        names = (
            "top_k",
            "rows_per_file",
            "batch_size",
            "max_response_length",
            "teacher_prompt_template",
            "chat_template_kwargs",
        )
        score_options = ScoreOptions(**{name: getattr(options, name) for name in names})
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(state.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        dataset = load_rows(options.dataset, options.dataset_split)
        process = (state.process_index, state.num_processes)
        num_rows = score(dataset, model, tokenizer, options.output_dir, score_options, process=process)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    logger.info(
        f"Process {state.process_index + 1} of {state.num_processes} scored {num_rows} rows into {options.output_dir}."
    )
    state.destroy_process_group()
    return 0
