"""The specification: interleaved sampling for one row, one token at a time, without a cache, in float64.

Nothing here comes from `skd_trl`. Noise is a table of uniform numbers by position and role, so that the fast sampler can be
compared for equality, token by token.
"""

import copy

import torch


def probabilities(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The distribution one draws from: temperature, then top-k, then nucleus, as transformers orders them. (V,) float64."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probs = (logits.double() / temperature).softmax(-1)
    if top_k:
        probs = torch.where(probs >= probs.sort(descending=True).values[top_k - 1], probs, 0.0)
        probs = probs / probs.sum()
    if top_p < 1:
        order = probs.argsort(descending=True)
        mass_before = probs[order].cumsum(0) - probs[order]
        probs = torch.zeros_like(probs).index_copy(0, order[mass_before < top_p], probs[order[mass_before < top_p]])
        probs = probs / probs.sum()
    return probs


def draw(probs, u):
    """The first token whose cumulative probability exceeds `u` of the total."""
    cumulative = probs.cumsum(0)
    return int((cumulative > u * cumulative[-1]).nonzero()[0])


def in_float64(model):
    return copy.deepcopy(model).double().eval()


@torch.no_grad()
def next_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0, -1]


def top_k_accepts(k):
    """SKD's own rule, Algorithm 1: the proposal is among the teacher's top k. (No coin, no student.)"""
    return lambda token, teacher_logits, student_probs, teacher_probs, coin: (
        int((teacher_logits > teacher_logits[token]).sum()) < k
    )


def interleave(
    student,
    teacher,
    prompt,
    *,
    accepts,
    max_new_tokens,
    eos_token_ids,
    uniforms,
    student_sampling,
    teacher_sampling,
    residual=None,
    teacher_prompt=None,
):
    """One response: `tokens`, `replaced` (bool each). `uniforms` (max_new_tokens, 3): the student's draw, the coin, the
    teacher's draw. `residual(student_probs, teacher_probs)` is what a replacement is drawn from; the teacher's
    distribution if there is none. `teacher_prompt` is what the teacher reads, if not the student's prompt."""
    tokens, replaced = [], []
    for position in range(max_new_tokens):
        student_probs = probabilities(next_logits(student, prompt + tokens), **student_sampling)
        teacher_logits = next_logits(teacher, (teacher_prompt or prompt) + tokens)
        teacher_probs = probabilities(teacher_logits, **teacher_sampling)
        u_student, coin, u_teacher = uniforms[position].tolist()
        token = draw(student_probs, u_student)
        rejected = not accepts(token, teacher_logits, student_probs, teacher_probs, coin)
        if rejected:
            token = draw(teacher_probs if residual is None else residual(student_probs, teacher_probs), u_teacher)
        tokens.append(token)
        replaced.append(rejected)
        if token in eos_token_ids:
            break
    return tokens, replaced
