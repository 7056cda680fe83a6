"""A teacher behind a server, as the trainer's teacher: its checks when the run starts, and what the loss is told.

It sends its k most probable tokens of each position, so the loss is told the coarse signal (`loss/teacher_signal.py`), or its last hidden
states, which are the exact one. Responses that were sampled have it already, given ones are sent to be scored.

Shapes: B rows, N response tokens of a micro-batch, k known tokens, H hidden.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase

from ..data.batches import Key, ResponseTokens, as_teacher_reads, teacher_prompts_of
from ..loss.lm_head import LMHead
from ..loss.teacher_signal import HiddenStates, TopLogProbs
from ..sampling.acceptance import AcceptanceRule
from ..sampling.draft import Draft
from ..sampling.participants import Participant
from ..sampling.prompts import Prompts
from ..sampling.sampling_params import SamplingParams
from ..sampling.served_hidden_states import HiddenStatesScorer, ServedHiddenStates
from ..sampling.served_teacher import Scorer, ServedTeacher
from ..sampling.top_judgement import Scores, TopJudgement
from ..serving.client import Patience, TeacherClient, TeacherServerError
from ..serving.routes import ServerRefusal
from .teachers import RecordedTeacher, Teacher


logger = get_logger(__name__)

API_KEY = "SKD_TEACHER_API_KEY"  # in the environment: a configuration is logged and saved
PROBE = "The quick brown fox jumps over the lazy dog. 0123456789, and once more from the beginning: " * 4
# Nats between two scores of one token with and without the prefix cache. In bf16 0.05 is common.
NOTICED, REFUSED = 0.3, 2.0


def connect(urls: Sequence[str], top_k: int, limit_seconds: float) -> TeacherClient:
    """A connection to a server, or to its replicas; the API key is in the environment variable `SKD_TEACHER_API_KEY`."""
    return TeacherClient(urls, top_k, os.environ.get(API_KEY), Patience(limit_seconds=limit_seconds))


def check_server(client: TeacherClient, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """
    Scores a probe text with the server's prefix cache and without, and looks at the server's tokenizer.

    Args:
        client ([`TeacherClient`]): the connection.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        vocab_size (`int`): how many ids the student has.

    Raises:
        `ValueError`: for another tokenizer, and where the two scores differ by more than rounding.
    """
    ids = tokenizer(PROBE)["input_ids"]
    theirs = client.tokenize(PROBE)
    if theirs is None:
        logger.warning(
            f"The teacher's server does not say how it tokenizes, so its tokenizer could not be compared: see that {client.model} has "
            "the student's."
        )
    elif theirs != ids:
        raise ValueError(
            f"The teacher's server turns a probe text into {len(theirs)} tokens, {theirs[:8]} ..., and the student's tokenizer into "
            f"{len(ids)}, {ids[:8]} .... Serve a teacher with the student's tokenizer."
        )
    if max(ids) >= vocab_size:
        raise ValueError(f"The student has {vocab_size} ids, and its tokenizer uses {max(ids)}.")
    long = ids[: client.max_length - 8]
    client.score([long[:-4]], 2, [0])  # its beginning is in the cache from now on
    with_cache, without = client.score([long], 4, [0]), client.score([long], len(long) - 1, [0])
    gap = float((with_cache.token_log_probs - without.token_log_probs[:, -4:]).abs().max())
    if gap > REFUSED:
        raise ValueError(
            f"The teacher's server scores one text in two ways: with its prefix cache and without they differ by {gap:.2f} nats. Its "
            "kernels or its cache are broken: try --enforce-eager, or another version of vLLM."
        )
    if gap > NOTICED:
        logger.warning(f"The teacher's server scores one text with its prefix cache and without {gap:.2f} nats apart.")


def fetched_head(client: TeacherClient, device: torch.device) -> LMHead:
    """
    The head of a server's teacher, for the whole run; checked by the server's own scores of a few tokens.

    Args:
        client ([`TeacherClient`]): the connection.
        device (`torch.device`): where the logits are to be made.

    Raises:
        `ValueError`: if the server gives no hidden states, or these and the head do not make its scores.
    """
    sent = client.head()
    bias = None if sent.bias is None else sent.bias.to(device)
    head = LMHead(sent.weight.to(device), bias, sent.scale, sent.softcap or None)
    text = torch.arange(2, min(32, len(sent.weight))).tolist()
    states, scores = client.hidden_states([text], 4, [0]), client.score([text], 4, [0])
    log_probs = head.logits(states[0].to(device)).log_softmax(-1).cpu()
    own = log_probs.gather(-1, torch.tensor(text[-4:])[:, None]).squeeze(-1)
    gap = float((own - scores.token_log_probs[0]).abs().max())
    if gap > REFUSED:
        raise ValueError(
            f"The server's hidden states and head make other log-probabilities than its own, by {gap:.2f} nats. Its kernels are "
            "broken: try --enforce-eager or another version of vLLM, or train with teacher_signal='top_k'."
        )
    if gap > NOTICED:
        logger.warning(f"The server's hidden states and head make log-probabilities {gap:.2f} nats from its own.")
    return head


def check_rule(rule: AcceptanceRule, top_k: int, vocab_size: int) -> None:
    """Tries a rule on what a server sends. Raises `ValueError` if it needs more."""
    k = min(top_k, vocab_size)
    ids, zeros = torch.arange(k)[None, None], torch.zeros(1, 1)
    scores = Scores(ids, torch.full((1, 1, k), -1.0).log_softmax(-1), zeros - 1, zeros.long())
    logits = torch.zeros(1, 1, vocab_size)
    draft = Draft(
        zeros.long(), logits, TopJudgement(scores, vocab_size), SamplingParams(), SamplingParams(), zeros + 0.5
    )
    rule(draft)
    rule.replacement(draft, torch.zeros(1))


class RemoteTeacher(RecordedTeacher):
    """A teacher that a server has, which sends its top k; `scorer` is the connection. Without a model in this process."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def participant(self, window, sampling, vocab_size, accelerator: Accelerator) -> Participant:
        prompts = Prompts(*teacher_prompts_of(window))
        return ServedTeacher(self.scorer, sampling, prompts=prompts, vocab_size=vocab_size)

    def signal(self, batch, tokens) -> TopLogProbs:
        if Key.TEACHER_TOP_IDS in batch:
            return super().signal(batch, tokens)

        def ask(texts: list[list[int]], num_scored: int, keys: list[int]) -> tuple[torch.Tensor, ...]:
            scores = self.scorer.score(texts, num_scored, keys)
            return scores.ids, scores.log_probs, scores.token_log_probs

        k = self.scorer.top_k
        none = torch.empty((0, k), dtype=torch.long), torch.empty((0, k)), torch.empty(0)
        return TopLogProbs(*at_response_tokens(batch, tokens, ask, none))

    def keep(self, batch, tokens, signal) -> None:
        batch[Key.TEACHER_TOP_IDS] = tokens.as_rows(signal.ids)
        batch[Key.TEACHER_TOP_LOG_PROBS] = tokens.as_rows(signal.log_probs)
        batch[Key.TEACHER_LABEL_LOG_PROBS] = tokens.as_rows(signal.label_log_probs)


class RemoteHiddenStates(Teacher):
    """A teacher that a server has, which sends its last hidden states; `head`, which makes logits of them, is a copy here."""

    inner = []

    def __init__(self, scorer: HiddenStatesScorer, head: LMHead):
        self.scorer, self.head = scorer, head

    def participant(self, window, sampling, vocab_size, accelerator: Accelerator) -> Participant:
        prompts = Prompts(*teacher_prompts_of(window))
        make_logits = partial(self.head.logits, vocab_size=vocab_size)
        return ServedHiddenStates(self.scorer, make_logits, sampling, prompts=prompts, vocab_size=vocab_size)

    def signal(self, batch, tokens) -> HiddenStates:
        if Key.TEACHER_HIDDEN_STATES in batch:
            return HiddenStates(tokens.pick(batch[Key.TEACHER_HIDDEN_STATES]), self.head)

        def ask(texts: list[list[int]], num_scored: int, keys: list[int]) -> tuple[torch.Tensor, ...]:
            return (self.scorer.hidden_states(texts, num_scored, keys),)

        assert self.head.weight is not None  # a server's head is its tensors
        none = (self.head.weight.new_empty((0, self.head.weight.shape[1]), device="cpu"),)
        return HiddenStates(*at_response_tokens(batch, tokens, ask, none), self.head)

    def keep(self, batch, tokens, signal) -> None:
        assert isinstance(signal, HiddenStates)
        batch[Key.TEACHER_HIDDEN_STATES] = tokens.as_rows(signal.states)


@contextmanager
def failing_at_the_end(participant: Participant, teacher: Teacher) -> Iterator[None]:
    """Inside, a sampling goes on to its end whatever becomes of the teacher's server, and afterwards the failure is raised. Where the
    student's forwards are collective the other processes are in the middle of theirs, and one that stopped would leave them there."""
    if not isinstance(participant, ServedTeacher):
        yield
        return
    state = teacher.head.weight[0] if isinstance(teacher, RemoteHiddenStates) else torch.empty(0)
    participant.scorer = late = LateFailure(participant.scorer, state.detach().cpu())
    yield
    if late.failure is not None:
        raise late.failure


class LateFailure(HiddenStatesScorer):
    """Answers as `scorer` does until it is given up, and from then on with anything: `failure` is why. `state` (H,) is any hidden
    state."""

    def __init__(self, scorer: Scorer, state: torch.Tensor):
        self.scorer, self.state = scorer, state
        self.vocab_size, self.max_length, self.top_k = scorer.vocab_size, scorer.max_length, scorer.top_k
        self.failure: Exception | None = None

    def score(self, texts: Sequence[Sequence[int]], num_scored: int, keys: Sequence[int]) -> Scores:
        shape = (len(texts), max(num_scored, 1))
        ids, ranks = torch.arange(self.top_k).expand(*shape, -1), torch.zeros(shape, dtype=torch.long)
        uniform = torch.full(ids.shape, -math.log(self.top_k))
        return self._or(
            lambda: self.scorer.score(texts, num_scored, keys), Scores(ids, uniform, uniform[..., 0], ranks)
        )

    def hidden_states(self, texts: Sequence[Sequence[int]], num_scored: int, keys: Sequence[int]) -> torch.Tensor:
        assert isinstance(self.scorer, HiddenStatesScorer)
        ask, any_states = self.scorer.hidden_states, self.state.expand(len(texts), max(num_scored, 1), -1)
        return self._or(lambda: ask(texts, num_scored, keys), any_states)

    def _or(self, ask: Callable[[], Any], anything: Any) -> Any:
        if self.failure is None:
            try:
                return ask()
            except (TeacherServerError, ServerRefusal) as error:
                self.failure = error
        return anything


def at_response_tokens(
    batch: dict[str, torch.Tensor],
    tokens: ResponseTokens,
    ask: Callable[[list[list[int]], int, list[int]], tuple[torch.Tensor, ...]],
    none: tuple[torch.Tensor, ...],
) -> list[torch.Tensor]:
    """
    What a server says of given responses, asked together where they are of one length.

    Args:
        batch, tokens: a micro-batch and its N response tokens.
        ask (`Callable`): texts (M of them), S and keys to tensors (M, S, ...).
        none (`tuple` of `torch.Tensor`): what it answers of no token, (0, ...).

    Returns:
        Tensors (N, ...) on the device of the batch.
    """
    own = as_teacher_reads(batch)
    lengths = torch.bincount(tokens.rows, minlength=len(own[Key.INPUT_IDS])).tolist()
    texts = [row[mask.bool()].tolist() for row, mask in zip(own[Key.INPUT_IDS], own[Key.ATTENTION_MASK], strict=True)]
    groups = {length: [row for row, n in enumerate(lengths) if n == length] for length in set(lengths) if length}
    answers = [values.new_empty((len(tokens.labels), *values.shape[1:])) for values in none]
    where = tokens.rows.cpu()
    with ThreadPoolExecutor(max(len(groups), 1)) as threads:
        said = threads.map(ask, ([texts[row] for row in rows] for rows in groups.values()), groups, groups.values())
        for rows, of_rows in zip(groups.values(), said, strict=True):
            for values, answer in zip(answers, of_rows, strict=True):
                for index, row in enumerate(rows):
                    values[where == row] = answer[index].to(values.dtype)
    return [values.to(tokens.labels.device) for values in answers]
