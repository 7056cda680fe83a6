"""The benchmarks run as they are, on tiny models: what they measure means nothing here, that they measure does."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tape import Tape
from tiny import save_models


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Script: its arguments, and how many rows its tables have together.
CASES = {
    "sampler": ("--batch_sizes 1 2 --fixed_batch 2 --num_tokens 6 --one_by_one_lengths 2", 9),
    "cost_model": ("--num_tokens 6 --lengths 1 2 --batch_size 2 --num_prompts 3", 2),
    "peers": (
        "--batch_size 2 --max_new_tokens 4 --prompt_tokens 100 130 --trainers 'SKDTrainer interleaved' DistillationTrainer",
        7,
    ),
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
    "paired": (
        f"--before {BENCHMARKS.parent} --arms sampling step --batch_size 2 --num_tokens 4 --max_new_tokens 4",
        2,
    ),
    "memory": ("--vocab_sizes 2000 --lengths 32 --batch_size 8 --hidden_sizes 8 16", 1),
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
        [
            sys.executable,
            BENCHMARKS / f"{name}.py",
            *shlex.split(arguments),
            *models,
            "--repeats",
            "1",
            "--output",
            result,
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    text = result.read_text()
    assert f"benchmarks/{name}.py" in text and "medians of 1" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    headers = [line for line in text.splitlines() if line.startswith("|---")]
    assert len(rows) - len(headers) == num_rows
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_line_of_the_published_memory_is_what_the_plan_says(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu_memory = importlib.import_module("gpu_memory")
    options = gpu_memory.settings().parse_args([])
    (line, plans), *more = gpu_memory.lines("8B:0.6B", options, ["ZeRO-3, 8 GPUs"], ["LoRA"])
    docs = Path(__file__).parents[1] / "docs"
    assert not more and line in (docs / "multi_gpu.md").read_text()
    # What is larger on a larger GPU: a whole teacher instead of an eighth of it.
    assert plans[0].held["teacher"] * 8 == pytest.approx(plans[1].held["teacher"], rel=0.01)
    for name in ("one_gpu", "multi_gpu"):
        rows = [
            row
            for row in (docs / f"{name}.md").read_text().splitlines()
            if row.startswith(("| one GPU |", "| ZeRO-3, "))
        ]
        assert len(rows) == len(gpu_memory.PAIRS) * 2 * (1 if name == "one_gpu" else 3)


def test_kernels_and_bytes_of_a_round_predict_what_a_gpu_does(monkeypatch):
    """In small: every kernel is counted once, more rows move more bytes, and a forward's time gives that of a kernel."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu, prediction = importlib.import_module("gpu"), importlib.import_module("gpu_prediction")
    small, large = (
        prediction.counted_round(gpu.build, gpu.PAIRS["small"], 512, rows, 16, 3, gpu.Forced()) for rows in (2, 4)
    )
    assert {part: len(sizes) for part, sizes in small.sizes.items()} == {
        part: len(sizes) for part, sizes in large.sizes.items()
    }
    assert all(sum(large.sizes[part]) > sum(small.sizes[part]) > 0 for part in small.sizes)
    student = small.work("student")
    assert len(student.sizes) > len(small.work("teacher").sizes)  # three forwards of two layers, and one of three
    shortest = prediction.shortest_kernel(student, 1e-3)
    assert student.in_a_graph(shortest) == pytest.approx(1e-3) and student.eager(0) >= 16e-6 * len(student.sizes)
    assert 3 < prediction.rounds_of_window(4, 12, 5, 0.8) < 8 and prediction.rounds_of_window(1, 12, 3, 1.0) == 4


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_in_small_and_no_case_fails(tmp_path):
    result = tmp_path / "gpu.md"
    subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--small", "--output", result],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    text = result.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    # Head, round and window, generate twice, loss; ours with each of five steps, theirs.
    assert len(rows) == 1 + 2 + 2 + 1 + 3 * 6 + 3
    assert "failed" not in text and "not run" not in text and "not captured" not in text and "floor" in text


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def bench_of(gpu, path, seconds=1000.0):
    return gpu.Bench(torch.device("cpu"), 512, 3, 16, 12, 3, time.perf_counter() + seconds, path)


def test_what_has_to_be_measured_on_a_gpu_fits_its_limit(gpu):
    ten_for_the_models = 10
    assert sum(gpu.ESSENTIAL.values()) + ten_for_the_models < 235
    assert list(gpu.ESSENTIAL)[-1] == "sampling window, Inductor in a graph"


def test_the_table_is_written_after_each_case_and_an_error_needs_no_message(gpu, tmp_path):
    bench = bench_of(gpu, tmp_path / "results" / "gpu.md")
    seen = []

    def fails(error):
        seen.append(bench.path.read_text() if bench.path.exists() else "")
        raise error

    first, second, third, fourth = list(gpu.SECONDS)[:4]
    for name, error in (
        (first, ValueError()),
        (second, RuntimeError("\nout of memory\nTried")),
        (third, KeyError("x")),
    ):
        bench.case(name, lambda error=error: fails(error))
    bench.stop_at = time.perf_counter()
    bench.case(fourth, lambda: fails(ValueError()))
    assert [text.count("failed") for text in seen] == [0, 1, 2]
    text = bench.path.read_text()
    assert f"| {first} | failed | - | ValueError |" in text and "| RuntimeError: out of memory |" in text
    assert f"| {fourth} | not run |  | no time was left |" in text


def test_a_command_that_a_machine_lacks_is_unknown(gpu):
    assert gpu.output_of("no-such-nvidia-smi", "--query") == "unknown"
    assert gpu.output_of(sys.executable, "-c", "print('580.1 more')") == "580.1"


class NeverCaptured(Tape):
    def capture(self, play):
        raise RuntimeError("operation not permitted")


@pytest.mark.parametrize("make_graph", [Tape, NeverCaptured])
def test_rounds_that_were_not_captured_are_not_reported_as_a_graph(gpu, tmp_path, make_graph):
    bench = bench_of(gpu, tmp_path / "gpu.md")
    student, teacher = (gpu.build("student in small", 512, bench.device, torch.float32) for _ in range(2))
    gpu.sampling(bench, student, teacher, 1e-3, {"graph": {"capture": True, "make_graph": make_graph}})
    text = bench.path.read_text()
    if make_graph is Tape:
        assert [line[0] for line in bench.lines] == ["round, graph", "sampling window, graph"]
        assert re.search(r"tokens/s; [1-9]\d* graphs", text) and "failed" not in text
    else:
        (line,) = bench.lines
        assert line[1] == "failed" and "not captured: RuntimeError: operation not permitted" in line[3]


def test_a_teacher_has_its_own_forward_after_a_step(gpu, tmp_path, monkeypatch):
    bench = bench_of(gpu, tmp_path / "gpu.md")
    teacher = gpu.build("teacher in small", 512, bench.device, torch.float32)
    patched = []

    class Trainer:
        def __init__(self, *, teacher_model, **arguments):
            teacher_model._original_forward = teacher_model.forward
            teacher_model.forward = lambda *args, **kwargs: None  # as accelerate does

        def train(self):
            patched.append("forward" in teacher.__dict__)
            raise ValueError

    monkeypatch.setattr("trl.DistillationTrainer", Trainer)
    gpu.steps(bench, gpu.PAIRS["small"], teacher, ["step, DistillationTrainer at its defaults"])
    assert patched == [True] and "forward" not in teacher.__dict__
    assert bench.lines[0][1] == "failed" and bench.lines[0][3] == "ValueError"
