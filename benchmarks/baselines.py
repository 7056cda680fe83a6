"""What a user would run instead, written plainly, and the acceptance rule of the forced runs.

Each function writes exactly `num_tokens` tokens for each prompt (no end-of-sequence stops anything, so all arms do
the same work), draws with the same shaping, and ends with the teacher's last hidden states or logits of all responses,
which is what a distillation loss needs. Shapes: B prompts, P prompt, T response, G draft, V vocabulary.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from skd_trl.sampling.acceptance import AcceptanceRule
from skd_trl.sampling.draft import Draft, Judgement
from skd_trl.sampling.sampling_params import SamplingParams, shaped_probs


@dataclass(frozen=True)
class Bernoulli(AcceptanceRule):
    """Accepts each proposal with probability `rate`, whatever it is: acceptance as an independent variable."""

    rate: float = 0.8

    def __call__(self, draft: Draft) -> torch.Tensor:
        return draft.coins < self.rate


@torch.no_grad()
def one_by_one(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: list[torch.Tensor],
    *,
    accept: AcceptanceRule,
    num_draft_tokens: int,
    num_tokens: int,
    student_sampling: SamplingParams,
    teacher_sampling: SamplingParams,
) -> SimpleNamespace:
    """Speculative knowledge distillation as its authors run it: one prompt at a time, transformers' own cache cropped
    after each round, and a second forward of the teacher over the finished text. Theirs also decodes and tokenizes the
    text again, scores whole texts instead of responses, and goes through `generate`; all that is left out here."""
    outcome = SimpleNamespace(tokens=0, rounds=0)
    for prompt in prompts:
        text = prompt[None]
        caches = DynamicCache(config=student.config), DynamicCache(config=teacher.config)
        for model, cache in zip((student, teacher), caches, strict=True):
            model(text[:, :-1], past_key_values=cache, logits_to_keep=1)
        end = text.shape[1] + num_tokens
        while text.shape[1] < end:
            start, drafted, student_logits = text.shape[1], text, []
            for _ in range(min(num_draft_tokens, end - start)):
                logits = student(drafted[:, -1:], past_key_values=caches[0]).logits
                student_logits.append(logits)
                drafted = torch.cat([drafted, _draw(logits[:, -1], student_sampling)], dim=1)
            teacher_logits = teacher(drafted[:, start - 1 : -1], past_key_values=caches[1]).logits
            draft = Draft(
                drafted[:, start:],
                torch.cat(student_logits, dim=1),
                Judgement(teacher_logits, {}),
                student_sampling,
                teacher_sampling,
                torch.rand(1, drafted.shape[1] - start),
            )
            num_leading = int(accept(draft).long().cumprod(dim=1).sum())
            text = drafted[:, : start + num_leading]
            if text.shape[1] < drafted.shape[1]:
                text = torch.cat([text, _draw(teacher_logits[:, num_leading], teacher_sampling)], dim=1)
            for cache in caches:
                surplus = cache.get_seq_length() - (text.shape[1] - 1)
                if surplus > 0:
                    cache.crop(-surplus)
            outcome.rounds += 1
        teacher(text, logits_to_keep=num_tokens + 1)
        outcome.tokens += num_tokens
    return outcome


@torch.no_grad()
def assisted_generation(
    student,
    teacher,
    prompts: list[torch.Tensor],
    *,
    num_draft_tokens: int,
    num_tokens: int,
    sampling: SamplingParams,
) -> int:
    """transformers' assisted generation: the teacher's text, drafted by the student; it takes one prompt at a time. Always
    the same draft length: transformers' own settings draft 20 tokens, with this pair several times as slow."""
    drafting = GenerationConfig(
        num_assistant_tokens=num_draft_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    own, student.generation_config = student.generation_config, drafting
    try:
        for prompt in prompts:
            _generate(teacher, prompt[None], None, num_tokens, sampling, assistant_model=student)
    finally:
        student.generation_config = own
    return len(prompts) * num_tokens


@torch.no_grad()
def generate_then_score(
    student, teacher, prompt_ids, prompt_mask, *, num_tokens: int, sampling: SamplingParams
) -> int:
    """On-policy distillation as GKDTrainer samples it: the student's `generate`, then one forward of the teacher."""
    text = _generate(student, prompt_ids, prompt_mask, num_tokens, sampling)
    mask = torch.cat([prompt_mask, torch.ones_like(text[:, prompt_mask.shape[1] :])], dim=1)
    teacher(text, attention_mask=mask, logits_to_keep=num_tokens + 1)
    return len(prompt_ids) * num_tokens


@torch.no_grad()
def teacher_generate(teacher, prompt_ids, prompt_mask, *, num_tokens: int, sampling: SamplingParams) -> int:
    """Sequence-level distillation: the teacher's `generate`."""
    _generate(teacher, prompt_ids, prompt_mask, num_tokens, sampling)
    return len(prompt_ids) * num_tokens


def _generate(model, prompt_ids, prompt_mask, num_tokens: int, sampling: SamplingParams, **kwargs) -> torch.Tensor:
    config = GenerationConfig(
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        text = model.generate(prompt_ids, attention_mask=mask, generation_config=config, **kwargs)
    finally:
        model.generation_config = own
    if text.shape[1] != prompt_ids.shape[1] + num_tokens:
        raise RuntimeError(f"{text.shape[1] - prompt_ids.shape[1]} tokens were generated instead of {num_tokens}.")
    return text


def _draw(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    return torch.multinomial(shaped_probs(logits, sampling), 1)
