"""The ways to ask a server how probable the last tokens of texts are, the best one first.

Ours sends the asked positions alone, in binary, or the hidden states that predict them. vLLM's `/inference/v1/generate` is told to
generate a token, one question a position: the answer has this position alone, and what comes before it is read from the prefix cache.
Many positions of one row are asked in one question for log-probabilities of the whole prompt, for which vLLM leaves its cache aside.
`/v1/completions` has these alone, so it computes each text from its beginning.

Shapes: N texts, S scored positions, k known tokens, H hidden.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter

from ..sampling.top_judgement import Scores
from .wire import (
    HEAD_ROUTE,
    HIDDEN_STATES_ROUTE,
    INFO_ROUTE,
    MEDIA_TYPE,
    SCORE_ROUTE,
    VERSION,
    Head,
    Request,
    pack_request,
    unpack_head,
    unpack_hidden_states,
    unpack_scores,
)


logger = logging.getLogger(__name__)

MOST_ASKED_ALONE = 16  # positions of one row that are each a question; a round of sampling has fewer


class ServerRefusal(ValueError):
    """The server has understood the question and refuses it: asking again would not help."""


class Http:
    """One pool of connections, with a time limit for each question and the API key in it."""

    def __init__(self, request_seconds: float, api_key: str | None, num_connections: int):
        self.timeout = (min(10.0, request_seconds), request_seconds)  # to connect, and for the answer
        self.session = requests.Session()
        if api_key:
            self.session.headers["Authorization"] = f"Bearer {api_key}"
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_connections=num_connections, pool_maxsize=num_connections))

    def get(self, url: str) -> requests.Response:
        return self.session.get(url, timeout=self.timeout)

    def post(self, url: str, **content: Any) -> requests.Response:
        return self.session.post(url, timeout=self.timeout, **content)


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of its teacher. `vocab_size` and `top_k` are `None` where it does not say; `why_no_hidden_states` is empty
    where it gives them."""

    model: str
    vocab_size: int | None
    max_length: int
    top_k: int | None
    why_no_hidden_states: str = "vLLM's own routes do not; use `python -m skd_trl serve`"


class Route(ABC):
    """One way to ask one server. `score` raises [`ServerRefusal`], or an error of requests where asking again may help."""

    info: ServerInfo

    @classmethod
    @abstractmethod
    def find(cls, http: "Http", url: str, threads: ThreadPoolExecutor) -> "Route | None":
        """This way to ask the server at `url`, or `None` if it does not have it."""

    @abstractmethod
    def score(self, texts: Sequence[Sequence[int]], num_scored: int, top_k: int) -> Scores:
        """See [`~skd_trl.sampling.served_teacher.Scorer`]."""

    def hidden_states(self, texts: Sequence[Sequence[int]], num_scored: int) -> torch.Tensor:
        """See [`~skd_trl.sampling.served_hidden_states.HiddenStatesScorer`]."""
        raise self.no_hidden_states()

    def head(self) -> Head:
        """What makes logits of these."""
        raise self.no_hidden_states()

    def no_hidden_states(self) -> ServerRefusal:
        return ServerRefusal(f"{self.url} gives no hidden states: {self.info.why_no_hidden_states}.")

    http: "Http"
    url: str

    def tokenize(self, text: str) -> list[int] | None:
        """The ids of `text` in the server's tokenizer, or `None` if it does not say. Both kinds have vLLM's route."""
        response = self.http.post(self.url + "/tokenize", json={"model": self.info.model, "prompt": text})
        return response.json()["tokens"] if response.status_code == 200 else None


class OwnRoute(Route):
    """Of `python -m skd_trl serve`."""

    def __init__(self, http: Http, url: str, info: ServerInfo):
        self.http, self.url, self.info = http, url, info

    @classmethod
    def find(cls, http: Http, url: str, threads: ThreadPoolExecutor) -> "OwnRoute | None":
        response = http.get(url + INFO_ROUTE)
        if response.status_code == 404:
            return None
        said = answered(response).json()
        if said["version"] != VERSION:
            raise ServerRefusal(
                f"The server at {url} speaks version {said['version']} and this client {VERSION}: install one skd_trl on both."
            )
        names = ("model", "vocab_size", "max_length", "top_k", "why_no_hidden_states")
        return cls(http, url, ServerInfo(**{name: said[name] for name in names}))

    def score(self, texts, num_scored, top_k) -> Scores:
        return unpack_scores(self._ask(SCORE_ROUTE, Request(texts, num_scored, top_k)))

    def hidden_states(self, texts, num_scored) -> torch.Tensor:
        if self.info.why_no_hidden_states:
            raise self.no_hidden_states()
        return unpack_hidden_states(self._ask(HIDDEN_STATES_ROUTE, Request(texts, num_scored)))

    def head(self) -> Head:
        if self.info.why_no_hidden_states:
            raise self.no_hidden_states()
        return unpack_head(answered(self.http.get(self.url + HEAD_ROUTE)).content)

    def _ask(self, route: str, request: Request) -> bytes:
        headers = {"Content-Type": MEDIA_TYPE}
        return answered(self.http.post(self.url + route, data=pack_request(request), headers=headers)).content


class StockRoute(Route):
    """A route of vLLM's, which takes one text at a time; the server batches those that are asked together."""

    path: str

    def __init__(self, http: Http, url: str, threads: ThreadPoolExecutor, info: ServerInfo):
        self.http, self.url, self.threads, self.info = http, url, threads, info

    @classmethod
    def find(cls, http: Http, url: str, threads: ThreadPoolExecutor) -> "StockRoute | None":
        response = http.get(url + "/v1/models")
        if response.status_code == 404:
            return None
        model = answered(response).json()["data"][0]
        route = cls(http, url, threads, ServerInfo(model["id"], None, model["max_model_len"], None))
        if http.post(url + cls.path, json={}).status_code == 404:
            return None
        route.warn()
        return route

    def warn(self) -> None:
        """Says at start what this route costs."""

    def score(self, texts, num_scored, top_k) -> Scores:
        rows = list(self.threads.map(lambda text: self._of_text(text, num_scored, top_k), texts))
        return Scores(*(torch.stack(values) for values in zip(*rows, strict=True)))

    @abstractmethod
    def _of_text(self, text: Sequence[int], num_scored: int, top_k: int) -> tuple[torch.Tensor, ...]: ...

    def _post(self, body: dict[str, Any]) -> requests.Response:
        return self.http.post(self.url + self.path, json={"model": self.info.model, "stream": False, **body})


class GenerateRoute(StockRoute):
    path = "/inference/v1/generate"

    def score(self, texts, num_scored, top_k) -> Scores:
        if num_scored > MOST_ASKED_ALONE:
            return super().score(texts, num_scored, top_k)
        asked = [(text, len(text) - num_scored + i) for text in texts for i in range(max(num_scored, 1))]
        rows = list(self.threads.map(lambda one: self._of_position(one[0], one[1], top_k), asked))
        values = (torch.stack(values) for values in zip(*rows, strict=True))
        return Scores(*(value.view(len(texts), -1, *value.shape[2:]) for value in values))

    def _of_position(self, text: Sequence[int], position: int, top_k: int) -> tuple[torch.Tensor, ...]:
        """What is said of one token, the only one that may be generated, or of any that would follow the text."""
        if position == len(text):
            best = self._generated(text, {"logprobs": top_k})["top_logprobs"]
            return scores_of_position({entry["token_id"]: entry["logprob"] for entry in best}, None, None, top_k)
        # The token itself comes first among its alternatives: one more than k is asked for, as it may be none of them.
        options = {"logprobs": top_k + 1, "allowed_token_ids": [text[position]], "ignore_eos": True}
        said = self._generated(text[:position], options)
        if said["token_id"] != text[position]:
            raise ServerRefusal(
                f"{self.url} was told to generate token {text[position]} and generated {said['token_id']}: its vLLM does not follow "
                "`allowed_token_ids`. Use another version, or `python -m skd_trl serve`."
            )
        if said["rank"] is None:
            raise ValueError("The answer holds NaN: the teacher's weights or its kernels are broken.")
        best = {entry["token_id"]: entry["logprob"] for entry in said["top_logprobs"]}
        return scores_of_position(best, said["logprob"], said["rank"] - 1, top_k)

    def _generated(self, text: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        response = self._ask(text, options)
        if response.status_code == 400 and "max allowed" in response.text:
            raise ServerRefusal(
                f"{self.url} gives fewer log-probabilities of a token than the {options['logprobs']} that are asked for, teacher_top_k and "
                f"one more. Start it with --max-logprobs {options['logprobs']}, or set a lower teacher_top_k."
            )
        return answered(response).json()["choices"][0]["logprobs"]["content"][0]

    def _of_text(self, text, num_scored, top_k):
        said = answered(self._ask(text, {"prompt_logprobs": top_k})).json()
        start = len(text) - num_scored
        rows = [_of_entry(said["prompt_logprobs"][i], text[i], top_k) for i in range(start, len(text))]
        return tuple(torch.cat(values) for values in zip(*rows, strict=True))

    def _ask(self, text, options) -> requests.Response:
        params = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, **options}
        return self._post({"token_ids": list(text), "sampling_params": params})


class CompletionsRoute(StockRoute):
    path = "/v1/completions"

    def warn(self) -> None:
        logger.warning(
            f"{self.url} has only /v1/completions, which computes each text from its beginning in every round: five to ten times slower "
            "at 600 tokens. Start vLLM with --enable-scale-out, or use `python -m skd_trl serve`."
        )

    def _of_text(self, text, num_scored, top_k):
        options = (
            {"logprobs": top_k, "return_tokens_as_token_ids": True} if num_scored == 0 else {"prompt_logprobs": top_k}
        )
        body = {"prompt": list(text), "max_tokens": 1, "temperature": 0.0, **options}
        choice = answered(self._post(body)).json()["choices"][0]
        if num_scored == 0:
            named = choice["logprobs"]["top_logprobs"][0]
            best = {int(name.removeprefix("token_id:")): log_prob for name, log_prob in named.items()}
            return scores_of_position(best, None, None, top_k)
        rows = [
            _of_entry(choice["prompt_logprobs"][i], text[i], top_k) for i in range(len(text) - num_scored, len(text))
        ]
        return tuple(torch.cat(values) for values in zip(*rows, strict=True))


# The order in which a server is tried.
ROUTES = (OwnRoute.find, GenerateRoute.find, CompletionsRoute.find)


def answered(response: requests.Response) -> requests.Response:
    """The response, if it is one. Raises [`ServerRefusal`] for what asking again would not change."""
    if response.status_code in (401, 403):
        raise ServerRefusal(
            f"{response.url} refuses the API key ({response.status_code}). Give the one that the server was started with."
        )
    if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
        raise ServerRefusal(f"{response.url} refuses the question ({response.status_code}): {response.text[:500]}")
    response.raise_for_status()
    return response


def _of_entry(entry: dict[str, dict], token: int, top_k: int) -> tuple[torch.Tensor, ...]:
    """One position of vLLM's `prompt_logprobs`: the best tokens, and the text's own if it is not one of them."""
    own = entry[str(token)]
    best = {int(name): said["logprob"] for name, said in entry.items() if said["rank"] <= top_k}
    return scores_of_position(best, own["logprob"], own["rank"] - 1, top_k)


def scores_of_position(
    best: dict[int, float], own_log_prob: float | None, own_rank: int | None, top_k: int
) -> tuple[torch.Tensor, ...]:
    """The four tensors of [`Scores`] at one position: the `top_k` most probable of `best` in the order of their ids."""
    chosen = sorted(sorted(best, key=lambda token: -best[token])[:top_k])
    return (
        torch.tensor([chosen]),
        torch.tensor([[best[token] for token in chosen]]),
        torch.tensor([-torch.inf if own_log_prob is None else own_log_prob]),
        torch.tensor([-1 if own_rank is None else own_rank]),
    )
