"""What a check before training found: a topic, a verdict and a sentence.

A check returns a verdict with its detail, or raises `ValueError` for what cannot be trained: what was found, why it cannot work,
what to change. The trainers raise the first refusal; `skd check` prints all findings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from accelerate.logging import get_logger


logger = get_logger(__name__)


class Verdict(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    REFUSED = "refused"
    LATER = "checked once the models are placed"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """What a check found about one topic; `detail` is a sentence for people."""

    topic: str
    verdict: Verdict
    detail: str


def finding_of(topic: str, check: Callable[..., tuple[Verdict, str]], *args) -> Finding:
    """What `check(*args)` finds about `topic`; whatever it raises is a refusal."""
    try:
        return Finding(topic, *check(*args))
    except ValueError as error:
        return Finding(topic, Verdict.REFUSED, str(error))
    except Exception as error:  # whatever a model raises that cannot run on plain rows of tokens
        logger.debug(f"The check of {topic} failed.", exc_info=True)
        return Finding(
            topic,
            Verdict.REFUSED,
            f"The check of {topic} ended with {type(error).__name__}: {error}. Training would fail in the same way: use "
            "causal language models that take rows of input_ids and an attention_mask, or report this pair.",
        )


def is_incomplete(findings: list[Finding]) -> bool:
    """Whether something is left for `check_placed`."""
    return any(finding.verdict == Verdict.LATER for finding in findings)


def require(findings: list[Finding]) -> None:
    """Logs warnings, and raises `ValueError` with the detail of the first refusal."""
    for finding in findings:
        if finding.verdict == Verdict.REFUSED:
            raise ValueError(finding.detail)
        if finding.verdict == Verdict.WARNING:
            logger.warning(finding.detail)
