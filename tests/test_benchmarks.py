"""The benchmarks run as they are, on tiny models: what they measure means nothing here, that they measure does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_models


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Script: its arguments, and how many rows its tables have together.
CASES = {
    "sampler": ("--batch_sizes 1 2 --fixed_batch 2 --num_tokens 6 --one_by_one_lengths 2", 9),
    "cost_model": ("--num_tokens 6 --lengths 1 2 --batch_size 2 --num_prompts 3", 2),
    "step": ("--batch_size 2 --max_new_tokens 4", 5),
    "draft_length": ("--num_tokens 6 --batch_size 2 --acceptance 0.8 real --lengths 1 2", 2),
    "scaling": (
        "--lengths 8 16 --length_batch 2 --batch_sizes 1 2 --vocab_sizes 259 300 --vocab_batch 2 --num_tokens 4 "
        "--num_positions 8",
        6,
    ),
    "hybrid": (
        "--num_tokens 4 --batch_sizes 2 --acceptance 0.7 --lengths 1 2 --hidden_sizes 64 64 --num_layers 4 4",
        3,
    ),
    "memory": ("--vocab_sizes 2000 --lengths 32 64 --batch_size 8 --hidden_sizes 8 16", 2),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Tiny models and texts, laid out like those of `make assets`, with prompts of all lengths that are asked for."""
    directory = tmp_path_factory.mktemp("assets")
    save_models(directory, {"teacher": 1, "student-14": 2})
    (directory / "text").mkdir()
    for split in ("train", "test"):
        rows = [
            {
                "prompt": [{"role": "user", "content": "x" * length}],
                "completion": [{"role": "assistant", "content": "short"}],
            }
            for length in range(45, 110, 2)
        ]
        (directory / "text" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_runs_and_writes_its_tables(name, assets, tmp_path):
    arguments, num_rows = CASES[name]
    models = [] if name in ("hybrid", "memory") else ["--assets", str(assets)]
    result = tmp_path / f"{name}.md"
    subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments.split(), *models, "--repeats", "1", "--output", result],
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    text = result.read_text()
    assert f"benchmarks/{name}.py" in text and "medians of 1" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    headers = [line for line in text.splitlines() if line.startswith("|---")]
    assert len(rows) - len(headers) == num_rows
    assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.slow
def test_the_memory_of_the_papers_pairs_is_counted_without_loading_them():
    found = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_memory.py", "--num_gpus", "8"],
        check=True,
        timeout=200,
        capture_output=True,
        text=True,
    ).stdout
    rows = [line.split(" | ") for line in found.splitlines() if line.startswith("| zero")]
    assert len(rows) == 2 * 5
    published = (Path(__file__).parents[1] / "docs" / "multi_gpu.md").read_text()
    assert all(" | ".join(row) in published for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_in_small_and_no_case_fails(tmp_path):
    result = tmp_path / "gpu.md"
    subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--small", "--output", result],
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    text = result.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 2 + 2 + 1 + 6  # head, round and window, generate twice, loss, steps
    assert "failed" not in text and "not run" not in text and "floor" in text
