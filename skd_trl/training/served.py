"""A teacher behind a server, as the trainer's teacher: its checks when the run starts, and what the loss is told.

It sends its k most probable tokens of each position, so the loss hears the coarse signal (`loss/teacher_signal.py`); responses that
were sampled have it already, given ones are sent to be scored.

Shapes: B rows, N response tokens of a micro-batch, k known tokens.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase

from ..data.batches import Key, ResponseTokens, as_teacher_reads, teacher_prompts_of
from ..loss.teacher_signal import TopLogProbs
from ..sampling.acceptance import AcceptanceRule, Draft
from ..sampling.participants import Participant
from ..sampling.prompts import Prompts
from ..sampling.sampling_params import SamplingParams
from ..sampling.served_teacher import Scorer, ServedTeacher
from ..sampling.top_judgement import Scores, TopJudgement
from ..serving.client import Patience, TeacherClient
from .teachers import RecordedTeacher


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
    """A teacher that a server has; `scorer` is the connection. Without a model in this process."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    def participant(self, window, sampling, vocab_size, accelerator: Accelerator) -> Participant:
        prompts = Prompts(*teacher_prompts_of(window))
        return ServedTeacher(self.scorer, sampling, prompts=prompts, vocab_size=vocab_size)

    def signal(self, batch, tokens) -> TopLogProbs:
        if Key.TEACHER_TOP_IDS in batch:
            return super().signal(batch, tokens)
        return self._ask(batch, tokens)

    def keep(self, batch, tokens, signal) -> None:
        batch[Key.TEACHER_TOP_IDS] = tokens.as_rows(signal.ids)
        batch[Key.TEACHER_TOP_LOG_PROBS] = tokens.as_rows(signal.log_probs)
        batch[Key.TEACHER_LABEL_LOG_PROBS] = tokens.as_rows(signal.label_log_probs)

    def _ask(self, batch: dict[str, torch.Tensor], tokens: ResponseTokens) -> TopLogProbs:
        """The signal of given responses, scored together where they are of one length."""
        own = as_teacher_reads(batch)
        lengths = torch.bincount(tokens.rows, minlength=len(own[Key.INPUT_IDS])).tolist()
        texts = [
            row[mask.bool()].tolist() for row, mask in zip(own[Key.INPUT_IDS], own[Key.ATTENTION_MASK], strict=True)
        ]
        groups = {length: [row for row, n in enumerate(lengths) if n == length] for length in set(lengths) if length}

        def ask(length: int) -> Scores:
            return self.scorer.score([texts[row] for row in groups[length]], length, groups[length])

        k, device = self.scorer.top_k, tokens.labels.device
        ids = torch.zeros((len(tokens.labels), k), dtype=torch.long)
        log_probs, label_log_probs = torch.zeros(ids.shape), torch.zeros(len(ids))
        where = tokens.rows.cpu()
        if groups:
            with ThreadPoolExecutor(len(groups)) as threads:
                for length, scores in zip(groups, threads.map(ask, groups), strict=True):
                    for index, row in enumerate(groups[length]):
                        is_row = where == row
                        ids[is_row], log_probs[is_row] = scores.ids[index], scores.log_probs[index]
                        label_log_probs[is_row] = scores.token_log_probs[index]
        return TopLogProbs(ids.to(device), log_probs.to(device), label_log_probs.to(device))
