"""A real vLLM as the teacher's server: ours, and its own `vllm serve`. Not part of the suite: `make test-vllm` runs it.

VLLM_PYTHON=.venv-vllm/bin/python python -m pytest tests/vllm_checks.py
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from scipy.stats import chisquare
from test_sampler import left_padded, responses
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.sampling.sampling_params import SamplingParams, shaped_probs
from skd_trl.sampling.served_teacher import ServedTeacher
from skd_trl.serving.client import TeacherClient


PYTHON = Path(os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()
ASSETS = Path(__file__).parents[1] / "examples" / "assets"
START_SECONDS = 600
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
GREEDY, FREE = SamplingParams(temperature=0.0), SamplingParams()
QUESTIONS = ["What is a package?", "The library reads", "To install it,", "A short description of"]


class Server:
    """A process that serves until the end of a `with` block, and is then gone with all that it started."""

    def __init__(self, kind: str, model: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        own = ["-m", "skd_trl", "serve", "--model", str(model)]
        stock = ["-m", "vllm.entrypoints.cli.main", "serve", str(model), "--max-logprobs", "64"]
        stock += ["--enable-scale-out", "--enable-prompt-tokens-details"]
        self.command = [str(PYTHON), *(own if kind == "own" else stock), "--port", str(port), *OPTIONS]

    def __enter__(self):
        environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                time.sleep(2)
        self.__exit__()
        raise RuntimeError(f"{' '.join(self.command)} did not start within {START_SECONDS} s.")

    def __exit__(self, *_):
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@pytest.fixture(scope="module", params=["own", "stock"])
def server(request):
    with Server(request.param, ASSETS / "teacher") as running:
        yield running


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "teacher", dtype=torch.float32).eval()


@pytest.mark.timeout(1200)
def test_greedy_text_with_k_of_one_is_the_local_teachers_up_to_near_ties(server, teacher):
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "student-14", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    prompts = [tokenizer(question)["input_ids"] for question in QUESTIONS]

    def text(participant):
        rollout = interleaved_sample(
            LocalParticipant(student, GREEDY), participant, *left_padded(prompts), accept=ACCEPTANCE_RULES["top_k"](k=1),
            max_new_tokens=32, eos_token_ids=[tokenizer.eos_token_id], execution=Execution(3),
        )  # fmt: skip
        return responses(rollout, prompts)

    served = text(ServedTeacher(TeacherClient(server.url, 64), GREEDY, vocab_size=teacher.config.vocab_size))
    for prompt, here, there in zip(prompts, text(LocalParticipant(teacher, GREEDY)), served, strict=True):
        different = [i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
        if different:
            context = torch.tensor([prompt + here[: different[0]]])
            logits = teacher(input_ids=context).logits[0, -1]
            gap = (logits[here[different[0]]] - logits[there[different[0]]]).abs()
            print(f"near tie at token {different[0]}: {gap:.2e}", file=sys.stderr)
            assert gap < 1e-3
        else:
            assert here == there


@pytest.mark.timeout(1200)
def test_scores_are_those_of_the_model_with_and_without_a_cached_beginning(server, teacher):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(100, 40000, (300,), generator=generator).tolist()
    client = TeacherClient(server.url, 64)
    for end in (250, 255, 256, 260, 300):
        scores = client.score([text[:end]], 5, [0])
        log_probs = teacher(input_ids=torch.tensor([text[:end]])).logits[0, -6:-1].log_softmax(-1)
        own = log_probs.gather(-1, torch.tensor(text[end - 5 : end])[:, None])
        torch.testing.assert_close(scores.token_log_probs[0], own[:, 0], rtol=0, atol=1e-3)
        assert ((log_probs > own + 1e-3).sum(-1) <= scores.token_ranks[0]).all()
        assert ((log_probs > own - 1e-3).sum(-1) >= scores.token_ranks[0]).all()
        best = log_probs.topk(64, dim=-1)
        torch.testing.assert_close(
            scores.log_probs[0].sort(-1, descending=True).values, best.values, rtol=0, atol=1e-3
        )


@pytest.mark.timeout(1200)
def test_two_tokens_have_the_distribution_that_the_rule_prescribes(tmp_path):
    # 4,000 rows, 20 outcomes at most with an expected count of 20 or more, the rest in one; false alarms 1 in 1,000.
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }
    student, teacher = (tiny_model("llama", seed=seed, **sizes) for seed in (1, 2))
    teacher.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prompt, rows, k = [5, 9, 20], 4000, 8
    sharp = SamplingParams(temperature=0.6)
    with Server("own", tmp_path) as server:
        rollout = interleaved_sample(
            LocalParticipant(student, sharp), ServedTeacher(TeacherClient(server.url, 64), sharp), *left_padded([prompt] * rows),
            accept=ACCEPTANCE_RULES["top_k"](k=k), max_new_tokens=2, eos_token_ids=[258],
            noise=torch.Generator().manual_seed(0), execution=Execution(2, max_rows=500),
        )  # fmt: skip
    expected: dict[tuple[int, ...], float] = {}
    for first, probability in enumerate(two_step(student, teacher, prompt, sharp, k).tolist()):
        if first == 258:
            expected[(first,)] = probability
        elif probability > 1e-4:
            for second, of_second in enumerate(two_step(student, teacher, [*prompt, first], sharp, k).tolist()):
                expected[(first, second)] = probability * of_second
    common = {outcome: p for outcome, p in expected.items() if p * rows >= 20}
    counts = dict.fromkeys(common, 0)
    for response in responses(rollout, [prompt] * rows):
        if tuple(response) in counts:
            counts[tuple(response)] += 1
    observed, wanted = list(counts.values()), [p * rows for p in common.values()]
    assert len(common) >= 5
    result = chisquare([*observed, rows - sum(observed)], [*wanted, rows - sum(wanted)])
    assert result.pvalue > 1e-3


@torch.no_grad()
def two_step(student, teacher, context, sampling, k):
    """The distribution of one token: the student's where the teacher ranks it in its top k, the teacher's for the rest."""
    own, other = (model(input_ids=torch.tensor([context])).logits[0, -1] for model in (student, teacher))
    accepted = shaped_probs(own, sampling) * ((other[:, None] < other).sum(-1) < k)
    return accepted + (1 - accepted.sum()) * shaped_probs(other, sampling)
