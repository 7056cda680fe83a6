"""A connection to a teacher's server: `skd serve`, or any `vllm serve`, one or several replicas of it.

A replica is asked for the texts whose beginning it knows (its prefix cache). One that fails is left out for a while and the others
take its texts; when none answers, the questions are repeated with growing pauses until one does or a limit is reached.

Shapes: N texts, S scored positions, k known tokens, H hidden.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import requests
import torch

from ..sampling.served_hidden_states import HiddenStatesScorer
from ..sampling.top_judgement import Scores
from .routes import ROUTES, Http, Route, ServerRefusal
from .wire import Head


logger = logging.getLogger(__name__)

NUM_CONNECTIONS = 64
REST_SECONDS = 30.0  # for which a replica that failed is left out, if there are others


class TeacherServerError(RuntimeError):
    """No server has answered within the limit, or what it answered cannot be used."""


@dataclass(frozen=True)
class Patience:
    """`request_seconds`: for one question. `limit_seconds`: how long questions are repeated before the run is given up.
    `first_pause`, `longest_pause`: seconds between two tries; each is twice the one before."""

    request_seconds: float = 120.0
    limit_seconds: float = 600.0
    first_pause: float = 1.0
    longest_pause: float = 30.0


@dataclass
class Replica:
    url: str
    route: Route
    rests_until: float = field(default=0.0)
    has_failed: bool = field(default=False)  # since it last answered: it may be another server now


# Asks one replica for its share of the texts: tensors of which each has a row for each of these.
Question = Callable[[Route, Sequence[Sequence[int]]], tuple[torch.Tensor, ...]]


class TeacherClient(HiddenStatesScorer):
    """
    Args:
        urls (`str` or list of `str`): of the server, or of replicas that serve the same model: `http://host:8000`.
        top_k (`int`): k.
        api_key (`str`, *optional*): sent as `Authorization: Bearer KEY`.
        patience ([`Patience`], *optional*): time limits.

    Raises:
        `ValueError`: if replicas serve different models, or give fewer than `top_k` tokens, or refuse the key.
        [`TeacherServerError`]: if one of them does not answer within the limit.
    """

    def __init__(
        self, urls: str | Sequence[str], top_k: int, api_key: str | None = None, patience: Patience = Patience()
    ):  # noqa: B008 (frozen)
        urls = [urls] if isinstance(urls, str) else list(urls)
        self.top_k, self.patience = top_k, patience
        request_seconds = min(patience.request_seconds, max(patience.limit_seconds, 1.0))
        self.http = Http(request_seconds, api_key, NUM_CONNECTIONS)
        # One for the questions of a route, and one for replicas, which wait for those: in one pool they could wait for one another.
        self.threads, self.askers = (ThreadPoolExecutor(max_workers=NUM_CONNECTIONS) for _ in range(2))
        self.replicas = [Replica(url.rstrip("/"), self._find_route(url.rstrip("/"))) for url in urls]
        first = self.replicas[0]
        for replica in self.replicas:
            if replica.route.info != first.route.info:
                raise ValueError(
                    f"The servers do not serve the same teacher: {first.url} says {first.route.info}, and {replica.url} says "
                    f"{replica.route.info}. Start all replicas with the same model and options."
                )
        self.info = first.route.info
        self.model, self.vocab_size, self.max_length = self.info.model, self.info.vocab_size, self.info.max_length  # type: ignore[assignment]
        if self.info.top_k is not None and self.info.top_k < top_k:
            raise ValueError(
                f"The server gives the teacher's {self.info.top_k} most probable tokens, and {top_k} are asked for. Start it with "
                f"--top_k {top_k}, or ask for fewer."
            )

    def tokenize(self, text: str) -> list[int] | None:
        """The ids of `text` in the server's tokenizer, or `None` if it does not say."""
        return self.replicas[0].route.tokenize(text)

    def score(self, texts: Sequence[Sequence[int]], num_scored: int, keys: Sequence[int]) -> Scores:
        def ask(route: Route, share: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
            scores = route.score(share, num_scored, self.top_k)
            _check_scores(scores, (len(share), max(num_scored, 1)), self.top_k)
            return tuple(vars(scores).values())

        return Scores(*self._answers(texts, keys, ask))

    def hidden_states(self, texts: Sequence[Sequence[int]], num_scored: int, keys: Sequence[int]) -> torch.Tensor:
        def ask(route: Route, share: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
            states, shape = route.hidden_states(share, num_scored), (len(share), max(num_scored, 1))
            if states.shape[:2] != shape:
                raise ValueError(f"The answer has shape {tuple(states.shape)}, and {(*shape, 'H')} was asked for.")
            if not states.isfinite().all():
                raise ValueError("The answer holds NaN or infinity: the teacher's weights or its kernels are broken.")
            return (states,)

        return self._answers(texts, keys, ask)[0]

    def head(self) -> Head:
        """What makes logits of the hidden states, from the first replica that answers."""
        heads: list[Head] = []

        def ask(route: Route, share: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
            heads.append(route.head())
            return (torch.empty(len(share)),)

        self._answers([[]], [0], ask)
        return heads[-1]

    def _answers(self, texts: Sequence[Sequence[int]], keys: Sequence[int], ask: Question) -> tuple[torch.Tensor, ...]:
        """What the replicas answer, in the order of the texts. Raises [`TeacherServerError`] after the limit."""
        if not texts:
            raise ValueError("There is no text to score.")
        start, pause, failure = time.monotonic(), self.patience.first_pause, ""
        rows: list[tuple[torch.Tensor, ...] | None] = [None] * len(texts)
        while True:
            missing = [index for index, row in enumerate(rows) if row is None]
            failure = self._ask(texts, keys, missing, rows, ask) or failure
            if all(row is not None for row in rows):
                return tuple(torch.stack(values) for values in zip(*rows, strict=True))  # type: ignore[arg-type]
            waited = time.monotonic() - start
            if waited + pause > self.patience.limit_seconds:
                raise TeacherServerError(
                    f"The teacher's server has not answered for {waited:.0f} seconds ({failure}). See that it runs at "
                    f"{', '.join(replica.url for replica in self.replicas)}, and resume from the last checkpoint."
                )
            logger.warning(f"The teacher's server does not answer ({failure}); asking again in {pause:.0f} s.")
            time.sleep(pause)
            pause = min(2 * pause, self.patience.longest_pause)

    def _ask(self, texts, keys, missing, rows, question: Question) -> str:
        """Asks each replica for its share of the missing rows, all at once, and fills them in. Returns what went wrong, if anything."""
        now = time.monotonic()
        awake = [replica for replica in self.replicas if replica.rests_until <= now] or self.replicas
        shares: dict[int, list[int]] = {}
        for index in missing:
            shares.setdefault(keys[index] % len(awake), []).append(index)

        def ask(replica: Replica, share: list[int]) -> str:
            try:
                if replica.has_failed:  # a server that comes back may have been started with something else
                    found = type(replica.route).find(self.http, replica.url, self.threads)
                    said = None if found is None else found.info
                    if said != replica.route.info:
                        raise ServerRefusal(
                            f"The server at {replica.url} has come back as another one: it said {replica.route.info} before, and says "
                            f"{said} now. Start it with the same model and options, and resume from the last checkpoint."
                        )
                answer = question(replica.route, [texts[index] for index in share])
                replica.has_failed = False
            except ServerRefusal:
                raise
            except (requests.RequestException, ValueError, KeyError) as error:
                replica.rests_until, replica.has_failed = time.monotonic() + REST_SECONDS, True
                return f"{replica.url}: {type(error).__name__} {error}"
            for position, index in enumerate(share):
                rows[index] = tuple(values[position] for values in answer)
            return ""

        jobs = [self.askers.submit(ask, awake[which], share) for which, share in shares.items()]
        return "; ".join(failure for job in jobs if (failure := job.result()))

    def _find_route(self, url: str) -> Route:
        """The first route that the server has, waiting for one that is still starting."""
        start, pause = time.monotonic(), self.patience.first_pause
        while True:
            try:
                for make in ROUTES:
                    route = make(self.http, url, self.threads)
                    if route is not None:
                        return route
                raise ValueError(f"{url} is no teacher's server: start one with `skd serve` or `vllm serve`.")
            except requests.RequestException as error:
                if time.monotonic() - start + pause > self.patience.limit_seconds:
                    raise TeacherServerError(
                        f"No teacher's server answers at {url} ({type(error).__name__} {error}). Start it with `python -m skd_trl serve "
                        "--model NAME` or `vllm serve NAME`, and see that the address and the port are right."
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, self.patience.longest_pause)


def _check_scores(scores: Scores, shape: tuple[int, int], top_k: int) -> None:
    if scores.ids.shape != (*shape, top_k) or scores.token_log_probs.shape != shape:
        raise ValueError(f"The answer has shape {tuple(scores.ids.shape)}, and {(*shape, top_k)} was asked for.")
    if scores.log_probs.isnan().any() or scores.token_log_probs.isnan().any():
        raise ValueError("The answer holds NaN: the teacher's weights or its kernels are broken.")
    mass = scores.log_probs.double().exp().sum(-1)
    if (mass > 1.01).any() or (scores.log_probs > 1e-3).any():
        raise ValueError(f"The answer is no distribution: {top_k} tokens have a probability of {mass.max():.3f}.")
