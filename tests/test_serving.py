"""The client and its routes against servers that answer, and servers that do not."""

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from local_scorer import LocalScorer
from teacher_server import TeacherServer, serving
from test_sampler import EOS, PROMPTS, V, left_padded, responses
from tiny import tiny_model

from skd_trl.__main__ import main
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.interleaved import Execution, interleaved_sample
from skd_trl.sampling.participants import LocalParticipant
from skd_trl.sampling.sampling_params import SamplingParams
from skd_trl.sampling.served_teacher import ServedTeacher
from skd_trl.serving.client import Patience, TeacherClient, TeacherServerError
from skd_trl.serving.wire import Request, pack_request, unpack_request


TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18, 19], [20, 21, 22, 23]]
QUICK = Patience(
    request_seconds=1.0, limit_seconds=1.5, first_pause=0.05, longest_pause=0.2
)  # where no answer is wanted
PATIENT = Patience(request_seconds=60.0, limit_seconds=120.0, first_pause=0.05, longest_pause=0.2)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=2)


@contextmanager
def quickly(client: TeacherClient):
    """Inside, the client gives up soon. A connection is made, and a fault is gone, at a busy machine's own speed."""
    before = client.patience, client.http.timeout
    client.patience, client.http.timeout = QUICK, (QUICK.request_seconds, QUICK.request_seconds)
    yield
    client.patience, client.http.timeout = before


def assert_equal(scores, wanted):
    for name, value in vars(wanted).items():
        torch.testing.assert_close(getattr(scores, name), value, msg=name)


@pytest.mark.parametrize("kind", ["own", "generate", "completions"])
@pytest.mark.parametrize("num_scored", [3, 0])
def test_each_route_gives_the_scores_of_the_model(model, kind, num_scored):
    with serving(model, kind=kind) as server:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        assert_equal(
            client.score(TEXTS, num_scored, [0, 1, 2]), LocalScorer(model, 20, V).score(TEXTS, num_scored, [])
        )
        assert (client.vocab_size, client.max_length) == (V if kind == "own" else None, 512)


@pytest.mark.parametrize("num_scored", [3, 0])
def test_hidden_states_and_head_make_the_models_logits(num_scored):
    capped = tiny_model("gemma2", seed=2).to(torch.bfloat16)
    with serving(capped) as server:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        states, head = client.hidden_states(TEXTS, num_scored, [0, 1, 2]), client.head()
    assert states.dtype == head.weight.dtype == torch.bfloat16
    logits = torch.tanh((states @ head.weight.T).float() / head.softcap) * head.softcap
    for row, text in zip(logits, TEXTS, strict=True):
        with torch.no_grad():
            expected = capped(input_ids=torch.tensor([text])).logits[0].float()
        expected = expected[-1:] if num_scored == 0 else expected[-1 - num_scored : -1]
        torch.testing.assert_close(row, expected, rtol=0.01, atol=0.02)


def test_a_token_costs_its_hidden_state_or_its_top_k_on_the_wire(model):
    texts = [[5 + i, *range(40)] for i in range(2)]
    with serving(model) as server:
        client = TeacherClient(server.url, 20)
        client.hidden_states(texts, 30, range(2))
        client.score(texts, 30, range(2))
    for num_bytes, of_token in zip(server.num_bytes[-2:], (model.config.hidden_size * 4, 20 * 8 + 8), strict=True):
        assert 0 <= num_bytes - 2 * 30 * of_token < 500  # the names and shapes of an answer


@pytest.mark.parametrize("kind", ["own", "generate"])
def test_a_server_without_hidden_states_says_why(model, kind):
    with serving(model, kind=kind) as server:
        server.why_no_hidden_states = "its head is quantised"
        client = TeacherClient(server.url, 20, patience=PATIENT)
        words = "head is quantised" if kind == "own" else "vLLM's own routes do not"
        for ask in (client.head, lambda: client.hidden_states(TEXTS, 2, [0, 1, 2])):
            with pytest.raises(ValueError, match=rf"gives no hidden states: .*{words}"):
                ask()


def test_a_round_asks_vllm_for_its_positions_alone_and_lets_it_use_its_cache(model):
    long = [text * 8 for text in TEXTS]
    with serving(model, kind="generate") as server:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        assert_equal(client.score(long, 5, [0, 1, 2]), LocalScorer(model, 20, V).score(long, 5, []))
        assert len(server.questions) == 3 * 5
        assert all("prompt_logprobs" not in asked for asked in server.questions)
        assert sum(server.num_bytes[-15:]) < 15 * 21 * 80  # 21 entries a position, whatever the length of the text


def test_many_positions_of_a_text_are_one_question_without_vllms_cache(model):
    long = [text * 8 for text in TEXTS]
    with serving(model, kind="generate") as server:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        for _ in range(2):  # the second time, the server's cache has the texts
            assert_equal(client.score(long, 20, [0, 1, 2]), LocalScorer(model, 20, V).score(long, 20, []))
        assert len(server.questions) == 2 * 3


def test_a_server_that_gives_fewer_log_probabilities_is_refused_with_the_option_that_helps(model):
    with serving(model, kind="generate") as server:
        server.max_logprobs = 20
        client = TeacherClient(server.url, 20, patience=PATIENT)
        with pytest.raises(ValueError, match=r"Start it with --max-logprobs 21, or set a lower teacher_top_k"):
            client.score(TEXTS, 2, [0, 1, 2])


def test_a_server_that_generates_other_tokens_than_it_is_told_is_refused(model):
    with serving(model, kind="generate") as server:
        server.fault = "free"
        with pytest.raises(ValueError, match="was told to generate token 8 and generated .*allowed_token_ids"):
            TeacherClient(server.url, 20, patience=PATIENT).score(TEXTS[:1], 3, [0])


def test_questions_that_are_asked_together_do_not_wait_for_one_another(model, monkeypatch):
    monkeypatch.setattr("skd_trl.serving.client.NUM_CONNECTIONS", 2)
    with serving(model, kind="generate") as server, ThreadPoolExecutor(8) as threads:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        for scores in threads.map(lambda text: client.score([text], 3, [0]), TEXTS * 8):
            assert scores.ids.shape == (1, 3, 20)


def test_the_routes_of_a_server_are_tried_from_the_best_to_the_slowest(model, caplog):
    with serving(model, kind="completions") as server:
        TeacherClient(server.url, 20, patience=PATIENT)
    assert "has only /v1/completions" in caplog.text
    with serving(model, kind="none") as server, pytest.raises(ValueError, match="is no teacher's server"):
        TeacherClient(server.url, 20, patience=PATIENT)


def test_without_a_server_the_error_names_the_address_and_the_command():
    with pytest.raises(TeacherServerError, match=r"No teacher's server answers at http://127.0.0.1:9 .*skd_trl serve"):
        TeacherClient("http://127.0.0.1:9", 20, patience=QUICK)


@pytest.mark.parametrize("request_seconds, limit_seconds, expected", [(120, 60, 60), (120, 0.5, 1), (30, 600, 30)])
def test_a_question_waits_no_longer_than_questions_are_repeated(model, request_seconds, limit_seconds, expected):
    """But a second: a limit of less, which asks once, would leave no time for the answer."""
    with serving(model) as server:
        client = TeacherClient(server.url, 20, patience=Patience(request_seconds, limit_seconds))
        assert client.http.timeout == (min(10, expected), expected)


def test_a_server_that_takes_a_connection_and_says_nothing_is_given_up_at_the_limit():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(TeacherServerError, match="No teacher's server answers at"):
            TeacherClient(f"http://127.0.0.1:{silent.getsockname()[1]}", 20, patience=Patience(limit_seconds=1.0))
        assert time.monotonic() - start < 20


def test_a_wrong_key_is_refused_at_once(model):
    with serving(model, api_key="right") as server:
        start = time.monotonic()
        with pytest.raises(ValueError, match="refuses the API key"):
            TeacherClient(server.url, 20, "wrong", patience=Patience(limit_seconds=60))
        assert time.monotonic() - start < 5
        TeacherClient(server.url, 20, "right", patience=PATIENT).score(TEXTS, 2, [0, 1, 2])


def test_more_tokens_than_the_server_gives_are_refused(model):
    with serving(model) as server, pytest.raises(ValueError, match=r"gives the teacher's 50 .* --top_k 60"):
        TeacherClient(server.url, 60, patience=PATIENT)


def test_replicas_of_different_teachers_are_refused(model):
    with (
        serving(model) as one,
        serving(model, name="another") as other,
        pytest.raises(ValueError, match=r"do not serve the same teacher: .*model='another'"),
    ):
        TeacherClient([one.url, other.url], 20, patience=PATIENT)


@pytest.mark.parametrize(
    ("fault", "words"), [("hangs", "ReadTimeout"), ("nan", "holds NaN"), ("error", "500"), ("half", "has shape")]
)
@pytest.mark.parametrize("signal", ["score", "hidden_states"])
def test_a_server_that_misbehaves_is_asked_again_and_given_up_at_the_limit(model, fault, words, signal):
    with serving(model) as server:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        ask = getattr(client, signal)
        server.fault = fault
        wanted = rf"has not answered for .*{words}.*resume from the last checkpoint"
        with quickly(client), pytest.raises(TeacherServerError, match=wanted):
            ask(TEXTS, 2, [0, 1, 2])
        server.fault = ""
        ask(TEXTS, 2, [0, 1, 2])


def test_a_nan_that_vllm_hides_behind_a_missing_rank_is_none_that_is_used(model):
    with serving(model, kind="generate") as server:
        client = TeacherClient(server.url, 20, patience=PATIENT)
        server.fault = "nan"
        with quickly(client), pytest.raises(TeacherServerError, match="holds NaN"):
            client.score(TEXTS, 2, [0, 1, 2])


@pytest.mark.parametrize("fault", ["hangs", "nan", "error", "half"])
def test_a_server_that_recovers_within_the_limit_gives_the_answer_that_was_asked_for(model, fault):
    with serving(model) as server:
        client = TeacherClient(server.url, 20, patience=Patience(1.0, 120.0, 0.05, 0.2))
        server.fault = fault
        timer = threading.Timer(0.5, setattr, (server, "fault", ""))
        timer.start()
        assert_equal(client.score(TEXTS, 2, [0, 1, 2]), LocalScorer(model, 20, V).score(TEXTS, 2, []))
        timer.join()


@pytest.mark.parametrize(
    "change", [{"name": "another"}, {"vocab_size": 200}, {"api_key": "new"}, {"kind": "generate"}]
)
def test_a_server_that_comes_back_as_another_one_is_refused(model, change):
    server = TeacherServer(model)
    client = TeacherClient(server.url, 20, patience=PATIENT)
    client.score(TEXTS, 2, [0, 1, 2])
    server.stop()
    timer = threading.Timer(0.2, lambda: other.append(TeacherServer(model, port=server.http.server_port, **change)))
    other: list[TeacherServer] = []
    timer.start()
    with pytest.raises(ValueError, match="refuses the API key" if "api_key" in change else "come back as another one"):
        client.score(TEXTS, 2, [0, 1, 2])
    timer.join()
    other[0].stop()


def test_texts_of_a_replica_that_is_gone_go_to_the_other(model):
    with serving(model) as one, serving(model) as other:
        client = TeacherClient([one.url, other.url], 20, patience=PATIENT)
        client.score(TEXTS, 2, [0, 1, 2])
        assert (one.num_texts, other.num_texts) == (2, 1)  # by key
        one.stop()
        assert_equal(client.score(TEXTS, 2, [0, 1, 2]), LocalScorer(model, 20, V).score(TEXTS, 2, []))


def test_a_server_that_restarts_within_a_sampling_changes_no_text(model):
    student = LocalParticipant(tiny_model("llama", seed=1), SamplingParams())
    noise = torch.rand(len(PROMPTS), 12, 3, generator=torch.Generator().manual_seed(3))

    def sampled(teacher):
        rule, execution = ACCEPTANCE_RULES["top_k"](k=30), Execution(2)
        arguments = {
            "accept": rule,
            "max_new_tokens": 12,
            "eos_token_ids": [EOS],
            "noise": noise,
            "execution": execution,
        }
        return responses(interleaved_sample(student, teacher, *left_padded(PROMPTS), **arguments))

    server = TeacherServer(model)
    port, new = server.http.server_port, []
    client = TeacherClient(server.url, 20, patience=PATIENT)

    def restart():
        while server.num_texts < 2 * len(PROMPTS):
            time.sleep(0.005)
        server.stop()
        time.sleep(0.3)
        new.append(TeacherServer(model, port=port))

    thread = threading.Thread(target=restart)
    thread.start()
    text = sampled(ServedTeacher(client, GREEDY))
    thread.join()
    assert new[0].num_texts > 0
    new[0].stop()
    assert text == sampled(LocalParticipant(model, GREEDY))


def test_a_question_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no request that this server knows"):
        unpack_request(b"something else")
    with pytest.raises(ValueError, match="needs a token before"):
        unpack_request(pack_request(Request([[1, 2]], 2, 5)))


def test_serving_without_vllm_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["serve", "--model", "anything"]) == 2
    assert "pip install vllm" in capsys.readouterr().out
