"""Teacher's servers for tests, real ones over HTTP, in this process: ours, and vLLM's routes, whose prompt log-probabilities are spoilt
where they come from the prefix cache, as vLLM's are. `fault` makes one misbehave."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from local_scorer import LocalScorer
from tiny import byte_tokenizer

from skd_trl.loss.lm_head import LMHead
from skd_trl.sampling.top_judgement import Scores
from skd_trl.serving.wire import (
    HEAD_ROUTE,
    HIDDEN_STATES_ROUTE,
    INFO_ROUTE,
    SCORE_ROUTE,
    VERSION,
    Head,
    pack_head,
    pack_hidden_states,
    pack_scores,
    unpack_request,
)


class Server(ThreadingHTTPServer):
    request_queue_size = (
        128  # a client opens as many connections at once; of five, the others are tried again after a second
    )


class TeacherServer:
    """`fault` is one of "hangs", "nan", "error", "half" (an answer for half of the texts), "free" (generates what it likes), or empty."""

    def __init__(
        self,
        model,
        vocab_size=259,
        api_key=None,
        name="tiny",
        kind="own",
        port=0,
        top_k=50,
        tokenizer=None,
        max_length=512,
    ):
        self.max_length = max_length
        self.scorer, self.top_k = LocalScorer(model, top_k, vocab_size), top_k
        self.tokenizer = tokenizer or byte_tokenizer()
        self.api_key, self.name, self.kind, self.fault = api_key, name, kind, ""
        self.block_size, self.max_logprobs = 4, 300
        self.questions: list[dict] = []  # what vLLM's route to generate was told
        self.cached: set[tuple[int, ...]] = set()  # beginnings in the prefix cache
        self.why_no_hidden_states = ""
        self.paths: list[str] = []
        self.num_bytes: list[int] = []  # of the answers
        self.num_texts = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                outer.handle(self, b"")

            def do_POST(self):  # noqa: N802
                outer.handle(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *args):
                pass

        self.http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.paths.append(request.path)
        if self.fault == "hangs":
            time.sleep(5)
        status, answer = self.answer(request, body)
        self.num_bytes.append(len(answer))
        request.send_response(status)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)

    def answer(self, request, body) -> tuple[int, bytes]:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return 401, b"no"
        if self.fault == "error":
            return 500, b"out of memory"
        if self.kind != "none" and request.path == "/tokenize":
            return 200, json.dumps({"tokens": self.tokenizer.encode(json.loads(body)["prompt"])}).encode()
        if self.kind == "own" and request.path == INFO_ROUTE:
            said = {
                "version": VERSION,
                "model": self.name,
                "vocab_size": self.scorer.vocab_size,
                "max_length": self.max_length,
            }
            said |= {"top_k": self.top_k, "why_no_hidden_states": self.why_no_hidden_states}
            return 200, json.dumps(said).encode()
        if self.kind == "own" and request.path == SCORE_ROUTE:
            question = unpack_request(body)
            texts = question.texts[:1] if self.fault == "half" else question.texts
            return 200, pack_scores(self.scores(texts, question.num_scored, question.top_k))
        if self.kind == "own" and request.path == HIDDEN_STATES_ROUTE and not self.why_no_hidden_states:
            question = unpack_request(body)
            texts = question.texts[:1] if self.fault == "half" else question.texts
            return 200, pack_hidden_states(self.hidden_states(texts, question.num_scored))
        if self.kind == "own" and request.path == HEAD_ROUTE and not self.why_no_hidden_states:
            head = LMHead.of(self.scorer.model)
            return 200, pack_head(Head(head.weight.detach(), head.bias, head.scale, head.softcap or 0.0))
        if self.kind != "own" and request.path == "/v1/models":
            return 200, json.dumps({"data": [{"id": self.name, "max_model_len": 512}]}).encode()
        if self.kind == "generate" and request.path == "/inference/v1/generate":
            return self.generate(json.loads(body))
        if self.kind in ("generate", "completions") and request.path == "/v1/completions":
            return self.completions(json.loads(body))
        return 404, b"nothing here"

    def scores(self, texts, num_scored, top_k) -> Scores:
        with self.lock:  # one model
            self.scorer.top_k = top_k
            self.num_texts += len(texts)
            scores = self.scorer.score(texts, num_scored, range(len(texts)))
        if self.fault == "nan":
            scores.log_probs.fill_(torch.nan)
        return scores

    def hidden_states(self, texts, num_scored) -> torch.Tensor:
        with self.lock:
            self.num_texts += len(texts)
            states = self.scorer.hidden_states(texts, num_scored, range(len(texts)))
        return torch.full_like(states, torch.nan) if self.fault == "nan" else states

    def generate(self, said) -> tuple[int, bytes]:
        if "token_ids" not in said:
            return 422, b"token_ids is missing"
        text, params = said["token_ids"], said["sampling_params"]
        self.questions.append(params)
        if "prompt_logprobs" not in params:
            if params["logprobs"] > self.max_logprobs:
                words = f"Requested sample logprobs of {params['logprobs']}, which is greater than max allowed: {self.max_logprobs}"
                return 400, json.dumps({"error": {"message": words}}).encode()
            content = self.next(text, params["logprobs"], params.get("allowed_token_ids", []))
            return 200, json.dumps({"choices": [{"logprobs": {"content": [content]}}]}).encode()
        num_cached, blocks = 0, [tuple(text[:end]) for end in range(self.block_size, len(text), self.block_size)]
        if params.get("skip_reading_prefix_cache", True) is False:
            num_cached = max([len(block) for block in blocks if block in self.cached], default=0)
        self.cached.update(blocks)
        entries = self.entries(text, params["prompt_logprobs"])
        for position in range(1, num_cached + 1):  # what is predicted by positions from the cache is anything
            entries[position] = {token: {**value, "logprob": -7.5} for token, value in entries[position].items()}
        return 200, json.dumps({"prompt_logprobs": entries, "choices": []}).encode()

    def completions(self, said) -> tuple[int, bytes]:
        if "prompt" not in said:
            return 422, b"prompt is missing"
        if "prompt_logprobs" in said:
            return 200, json.dumps(
                {"choices": [{"prompt_logprobs": self.entries(said["prompt"], said["prompt_logprobs"])}]}
            ).encode()
        best = self.next(said["prompt"], said["logprobs"])["top_logprobs"]
        named = {f"token_id:{entry['token_id']}": entry["logprob"] for entry in best}
        return 200, json.dumps({"choices": [{"logprobs": {"top_logprobs": [named]}}]}).encode()

    def entries(self, text, top_k):
        """One dict a position, the first `None`; the text's own token is there whatever its rank."""
        scores = self.scores([text], len(text) - 1, top_k)
        entries: list = [None]
        for position, token in enumerate(text[1:]):
            order = scores.log_probs[0, position].argsort(descending=True, stable=True).tolist()
            entry = {
                int(scores.ids[0, position, index]): {
                    "logprob": float(scores.log_probs[0, position, index]),
                    "rank": rank + 1,
                }
                for rank, index in enumerate(order)
            }
            own = {
                "logprob": float(scores.token_log_probs[0, position]),
                "rank": int(scores.token_ranks[0, position]) + 1,
            }
            entries.append({**entry, token: own})
        return entries

    def next(self, text, top_k, allowed=()):
        """One generated token and its alternatives: first the token, then the most probable ones, `top_k` together."""
        scores = self.scores([[*text, *allowed]], len(allowed), top_k)
        pairs = zip(scores.ids[0, 0].tolist(), scores.log_probs[0, 0].tolist(), strict=True)
        best = sorted(({"token_id": token, "logprob": value} for token, value in pairs), key=lambda x: -x["logprob"])
        best = [{**entry, "rank": index + 1} for index, entry in enumerate(best)]
        own = best[0]
        if allowed and self.fault != "free":
            rank, log_prob = int(scores.token_ranks[0, 0]) + 1, float(scores.token_log_probs[0, 0])
            own = {"token_id": allowed[0], "logprob": log_prob, "rank": rank}
        if self.fault == "nan":
            own = {**own, "logprob": -9999.0, "rank": None}
        others = [entry for entry in best if entry["token_id"] != own["token_id"]]
        return {**own, "top_logprobs": [own, *others][:top_k]}


@contextmanager
def serving(model, **options) -> Iterator[TeacherServer]:
    server = TeacherServer(model, **options)
    try:
        yield server
    finally:
        server.stop()
