"""The specification of divergences, gates and the weighted loss: float64, one position at a time, full logits.

Imports nothing from skd_trl. Divergences and gates take probabilities: p the teacher's, q the student's, each `(V,)`.
"""

import math

import torch


def _kl(a, b):
    return sum(float(x) * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0)


def _mix(a, b, share):
    return [share * float(x) + (1 - share) * float(y) for x, y in zip(a, b, strict=True)]


def _jsd(p, q, beta=0.5):
    mixture = _mix(p, q, beta)
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


DIVERGENCES = {
    "forward_kl": lambda p, q: _kl(p, q),
    "reverse_kl": lambda p, q: _kl(q, p),
    "jsd": _jsd,
    "skew_forward_kl": lambda p, q, alpha=0.1: _kl(p, _mix(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha=0.1: _kl(q, _mix(q, p, alpha)),
}


def entropy(p):
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def total_variation(p, q):
    return sum(abs(float(x) - float(y)) for x, y in zip(p, q, strict=True)) / 2


def _rank(p, token):
    return sum(float(x) > float(p[token]) for x in p)


def _inverse_cdf(q, u):
    cumulative = 0.0
    for token, probability in enumerate(q):
        cumulative += float(probability)
        if u < cumulative:
            return token
    return len(q) - 1


def _greedy_top_k(p, q, label, uniforms, k=5):
    return float(_rank(p, int(torch.argmax(q))) < k)


def _spec_k(p, q, label, uniforms, k=5, exact=False):
    if exact:
        return 1 - total_variation(p, q) ** k
    for draw, judge in zip(uniforms[:k], uniforms[k:], strict=True):
        token = _inverse_cdf(q, float(draw))
        if float(judge) < float(p[token]) / float(q[token]):
            return 1.0
    return 0.0


def _hellinger(p, q, label, uniforms):
    return 1 - math.sqrt(sum((math.sqrt(x) - math.sqrt(y)) ** 2 for x, y in zip(p, q, strict=True)) / 2)


def _accept_ratio(p, q, label, uniforms, exact=False):
    ratio = min(1.0, float(p[label]) / float(q[label]))
    return ratio if exact else float(float(uniforms[0]) < ratio)


ACCEPTANCES = {
    "greedy_top_k": _greedy_top_k,
    "spec_k": _spec_k,
    "one_minus_tv": lambda p, q, label, uniforms: 1 - total_variation(p, q),
    "hellinger": _hellinger,
    "min_prob": lambda p, q, label, uniforms, alpha=0.25: float(p[label] >= alpha),
    "accept_ratio": _accept_ratio,
    "entropy_gap": lambda p, q, label, uniforms: 1 / (1 + math.exp(entropy(p) - entropy(q))),
}


def acceptances(name, p, q, labels, uniforms, **parameters):
    """The named gate's acceptances `(N,)` from probabilities `(N, V)`."""
    num_positions = len(p)
    if name == "student_entropy_top":
        kept = math.ceil(parameters.get("share", 0.2) * num_positions)
        order = sorted(range(num_positions), key=lambda position: -entropy(q[position]))
        return torch.tensor([float(position in order[:kept]) for position in range(num_positions)])
    if name == "random":
        inner = acceptances("greedy_top_k", p, q, labels, uniforms[:, :-1], **parameters)
        return inner[torch.tensor(sorted(range(num_positions), key=lambda position: float(uniforms[position, -1])))]
    if name == "inverted":
        return 1 - acceptances("greedy_top_k", p, q, labels, uniforms, **parameters)
    if name == "same_mean":
        inner = acceptances("greedy_top_k", p, q, labels, uniforms, **parameters)
        return inner.mean().expand(len(inner))
    rows = zip(p, q, labels, uniforms, strict=True)
    return torch.tensor(
        [ACCEPTANCES[name](p, q, int(label), noise, **parameters) for p, q, label, noise in rows], dtype=torch.float64
    )


def logits(hidden, weight, bias=None, scale=1.0, softcap=None):
    """Full logits `(N, V)`, float64."""
    raw = hidden.double() @ weight.double().T
    raw = (raw if bias is None else raw + bias.double()) * scale
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def coarsened(probs, ids):
    """Probabilities `(N, V)` as those of k + 1 outcomes: the `ids` `(N, k)` of each position, and all other tokens in one."""
    known = probs.gather(-1, ids)
    if ids.shape[-1] == probs.shape[-1]:
        return known
    others = [[token for token in range(probs.shape[-1]) if token not in row] for row in ids.tolist()]
    return torch.cat([known, probs.gather(-1, torch.tensor(others)).sum(-1, keepdim=True)], -1)


def divergence(name, student_logits, teacher_logits, **parameters):
    """Per position `(N,)`, differentiable, from full float64 logits; written with softmax, not log-softmax."""
    q, p = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if name == "jsd":
        beta = parameters.get("beta", 0.5)
        mixture = beta * p + (1 - beta) * q
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    alpha = parameters.get("alpha", 0.1)
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
    }[name]()
