"""A real vLLM as the teacher's server: ours, and its own `vllm serve`. Not part of the suite: `make test-vllm` runs it.

VLLM_PYTHON=.venv-vllm/bin/python python -m pytest tests/vllm_checks.py
"""

import os
import sys
import time
from pathlib import Path

import pytest
import requests
import torch
from datasets import Dataset
from scipy.stats import chisquare
from test_mixed_batches import spy_on_trained_batches
from test_recorded import without_teacher
from test_sampler import left_padded, responses
from test_skd_trainer import losses, update_of
from tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_trl import SKDConfig, SKDTrainer
from skd_trl.loss.lm_head import LMHead
from skd_trl.loss.teacher_signal import top_log_probs
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.sampling.sampling_params import SamplingParams, shaped_probs
from skd_trl.sampling.served_teacher import ServedTeacher
from skd_trl.serving.client import TeacherClient
from skd_trl.training.teachers import OneTeacher


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from vllm_server import VLLMServer  # noqa: E402


ASSETS = Path(__file__).parents[1] / "examples" / "assets"
GREEDY, FREE = SamplingParams(temperature=0.0), SamplingParams()
QUESTIONS = ["What is a package?", "The library reads", "To install it,", "A short description of"]


@pytest.fixture(scope="module", params=["own", "stock"])
def server(request):
    """One at a time: tests of one kind come one after the other."""
    with VLLMServer(request.param, ASSETS / "teacher") as running:
        yield running
        if request.param == "own":
            assert ends_with_its_engine(running)


def ends_with_its_engine(server: VLLMServer) -> bool:
    """Whether SIGTERM to the server's process alone ends those of the engine too."""
    server.process.terminate()
    for _ in range(60):
        try:
            server.process.poll()
            os.killpg(server.process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(1)
    return False


own = pytest.mark.parametrize("server", ["own"], indirect=True)


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


ROWS = [
    {"prompt": question, "completion": f" {question.lower()} and what follows from it."} for question in QUESTIONS * 2
]
RUN = {
    "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "num_draft_tokens": 4, "max_new_tokens": 24, "max_length": 128, "teacher_temperature": 0.0, "max_grad_norm": 0.0,
    "shuffle_dataset": False, "learning_rate": 1e-5,
}  # fmt: skip


def make_run(tmp_path, trainer_class=SKDTrainer, teacher=None, **settings):
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(ASSETS / "student-14", dtype=torch.float32),
        teacher_model=teacher,
        args=SKDConfig(output_dir=str(tmp_path), **{**RUN, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(ASSETS / "teacher"),
    )


@own
@pytest.mark.timeout(1200)
def test_hidden_states_are_those_of_the_model_with_and_without_a_cached_beginning(server, teacher):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(100, 40000, (300,), generator=generator).tolist()
    client = TeacherClient(server.url, 64)
    sizes = []
    client.http.session.hooks["response"].append(lambda response, **_: sizes.append(len(response.content)))
    head = client.head()
    torch.testing.assert_close(head.weight, LMHead.of(teacher).weight.detach(), rtol=0, atol=0)
    assert (head.bias, head.scale, head.softcap) == (None, 1.0, 0.0)
    for end, num_scored in [(250, 5), (255, 5), (256, 5), (260, 5), (300, 5), (300, 5), (300, 0), (300, 299)]:
        states = client.hidden_states([text[:end], text[: end - 20]], min(num_scored, end - 21), [0, 1])
        for row, length in enumerate((end, end - 20)):
            expected = teacher.model(input_ids=torch.tensor([text[:length]])).last_hidden_state[0]
            asked = min(num_scored, end - 21)
            expected = expected[-1:] if asked == 0 else expected[-1 - asked : -1]
            assert (states[row] - expected).norm() < 1e-3 * expected.norm()
    sizes.clear()
    client.hidden_states([text[:200]] * 8, 5, list(range(8)))
    client.score([text[:200]] * 8, 5, list(range(8)))
    print(
        f"bytes a token on the wire: {sizes[0] / 40:.0f} of hidden states, {sizes[1] / 40:.0f} of the top 64",
        file=sys.stderr,
    )
    assert sizes[0] < 40 * 576 * 4 + 200 and sizes[1] < 40 * 520 + 500
    assert requests.get(server.url + "/skd/v1/info", timeout=60).json()["num_repeated"] > 0


@own
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("settings", [{"rollout": "dataset"}, {"rollout": "interleaved"}], ids=["given", "sampled"])
def test_loss_and_gradient_of_hidden_states_are_those_of_the_teacher_in_this_process(
    server, teacher, tmp_path, settings
):
    exact = {"teacher_model_server_url": [server.url], "teacher_signal": "hidden_states"}
    served = make_run(tmp_path / "served", without_teacher(SKDTrainer), **exact, **settings)
    local = make_run(tmp_path / "local", teacher=teacher, **settings)
    batches = [spy_on_trained_batches(run) for run in (served, local)]
    updates = [update_of(run) for run in (served, local)]
    assert torch.equal(batches[0][0]["labels"], batches[1][0]["labels"])
    gap = float((updates[0] - updates[1]).norm() / updates[1].norm())
    print(
        f"{settings}: loss {losses(served)[0]} and {losses(local)[0]}, gradients differ by {gap:.1e}", file=sys.stderr
    )
    assert gap < 1e-3 and losses(served)[0] == pytest.approx(losses(local)[0], rel=1e-3)


class TopOfLocal(OneTeacher):
    """A teacher in this process of which the loss is told 64 tokens."""

    def signal(self, batch, tokens):
        signal = super().signal(batch, tokens)
        return top_log_probs(signal.states, signal.head, tokens.labels, 64, len(signal.head.weight))


class LocalRun(SKDTrainer):
    _statistics = ("student_entropy",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._teacher = TopOfLocal(self._inner_teacher, self.teacher_model)


@pytest.mark.timeout(1200)
def test_a_run_with_the_served_teacher_is_that_with_the_local_one_up_to_near_ties(server, teacher, tmp_path):
    settings = {"max_steps": 2, "accept_top_k": 10}
    served = make_run(
        tmp_path / "served", without_teacher(SKDTrainer), teacher_model_server_url=[server.url], **settings
    )
    local = make_run(tmp_path / "local", LocalRun, teacher=teacher, **settings)
    batches = [spy_on_trained_batches(run) for run in (served, local)]
    for run in (served, local):
        run.train()
    num_rows = num_different = 0
    for one, other in zip(*batches, strict=True):
        for ids, of_local in zip(
            *(batch["input_ids"] * batch["attention_mask"] for batch in (one, other)), strict=True
        ):
            num_rows += 1
            places = (ids != of_local[: len(ids)]).nonzero().flatten().tolist()
            if places:  # the teacher's logits are close there: of its favourites, or around rank 10
                num_different += 1
                logits = teacher(input_ids=of_local[None, : places[0]]).logits[0, -1]
                ordered = logits.sort(descending=True).values
                own = logits[torch.stack([ids[places[0]], of_local[places[0]]])]
                gap = min(float((own[0] - own[1]).abs()), float((own[:, None] - ordered[9:11]).abs().min()))
                print(f"near tie at token {places[0]}: {gap:.2e}", file=sys.stderr)
                assert gap < 1e-3
    print(
        f"{num_different} of {num_rows} responses differ; loss {losses(served)} and {losses(local)}", file=sys.stderr
    )
    assert num_different < num_rows / 2
    if num_different == 0:
        assert losses(served) == pytest.approx(losses(local), rel=1e-3)


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
    with VLLMServer("own", tmp_path) as server:
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
