"""What a round does besides the models' forwards, counted operator by operator."""

from collections import Counter

import pytest
import torch
from tape import Recorder
from test_sampler import sample
from tiny import tiny_model

from skd_trl.sampling import interleaved, participants
from skd_trl.sampling.acceptance import ACCEPTANCE_RULES
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.sampling_params import SamplingParams


V, G = 2000, 5


class Counting(Recorder):
    """The operators that are no views, inside a model's forward and outside, with the lengths of what they read."""

    def __init__(self):
        super().__init__()
        self.outside, self.inside, self.is_inside, self.steps, self.casts = [], [], False, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.calls)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.calls) > before:
            longest = max((x.shape[-1] for x in args if isinstance(x, torch.Tensor) and x.ndim), default=0)
            name = func.overloadpacket.__name__
            (self.inside if self.is_inside else self.outside).append((name, longest))
            if name == "_to_copy" and isinstance(args[0], torch.nn.Parameter):
                self.casts.append(tuple(args[0].shape))
        return output


@pytest.fixture
def rounds(monkeypatch):
    """Runs `sample`, and gives what each round did."""
    counted, original = [], interleaved.interleave_round

    def watched(*arguments):
        counted.append(Counting())
        with counted[-1]:
            return original(*arguments)

    def forward(self, *arguments, f=RaggedDecoder._run, **keywords):
        if counted:
            counted[-1].is_inside = True
        try:
            return f(self, *arguments, **keywords)
        finally:
            if counted:
                counted[-1].is_inside = False

    def step(self, uniforms, f=participants.LocalParticipant.step):
        before = len(counted[-1].outside)
        output = f(self, uniforms)
        counted[-1].steps.append(counted[-1].outside[before:])
        return output

    monkeypatch.setattr(interleaved, "interleave_round", watched)
    monkeypatch.setattr(RaggedDecoder, "_run", forward)
    monkeypatch.setattr(participants.LocalParticipant, "step", step)

    def run(rule, sampling, dtype=torch.float32, **overrides):
        student, teacher = (tiny_model(seed=seed, vocab_size=V, **overrides).to(dtype) for seed in (1, 2))
        counted.clear()
        sample(
            student, teacher, rule=rule, student_sampling=sampling, teacher_sampling=sampling, num_draft_tokens=G,
            max_new_tokens=8, noise=torch.rand(4, 8, 3, generator=torch.Generator().manual_seed(0)),
        )  # fmt: skip
        return counted

    return run


SHARP = SamplingParams(0.2, top_p=0.5)


@pytest.mark.parametrize("sampling", [SHARP, SamplingParams()])
@pytest.mark.parametrize("rule", ["top_k", "mixture", "always"])
def test_no_sort_and_no_scan_of_the_vocabulary(rounds, rule, sampling):
    arguments = {"k": 25} if rule == "top_k" else {}
    for done in rounds(ACCEPTANCE_RULES[rule](**arguments), sampling, dtype=torch.bfloat16):
        scans = [call for call in done.outside if call[0] in ("sort", "cumsum", "cumprod", "argsort") and call[1] >= V]
        assert scans == []
        assert done.inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ACCEPTANCE_RULES)
def test_a_drafted_token_takes_at_most_25_operators_outside_the_models(rounds, rule, dtype):
    """Of a whole round (noise, drafting, judging, replacing, writing) for each drafted token, with nuclei and without."""
    arguments, most = ({"k": 25} if rule == "top_k" else {}), 25 * G
    if rule == "never":  # drafts nothing: its round is one token, and one draw
        most = 39
    for sampling in (SHARP, SamplingParams(0.7)):
        if dtype == torch.bfloat16 and rule != "top_k" and sampling is not SHARP:
            continue
        done = rounds(ACCEPTANCE_RULES[rule](**arguments), sampling, dtype=dtype)
        assert all(one.inside for one in done) and len(done[0].steps) == (0 if rule == "never" else G)
        for one in done:
            if rule == "never" or len(one.steps) == G:
                assert len(one.outside) <= most, Counter(name for name, _ in one.outside)


@pytest.mark.parametrize("sampling", [SamplingParams(0.0), SamplingParams(), SamplingParams(0.7, top_k=50)])
@pytest.mark.parametrize("rule", ["top_k", "top_p"])
def test_so_it_does_with_other_draws(rounds, rule, sampling):
    for one in rounds(ACCEPTANCE_RULES[rule](), sampling):
        assert len(one.outside) <= 25 * len(one.steps) or len(one.steps) < G


def test_no_weight_is_cast_unless_the_models_are_run_in_another_type_than_theirs(rounds):
    rule = ACCEPTANCE_RULES["top_k"](k=25)
    assert not any(one.casts for one in rounds(rule, SHARP, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert any(one.casts for one in rounds(rule, SHARP))
