"""The draw without a sort or scan of the vocabulary draws what the plain one draws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_trl.sampling.acceptance import Mixture
from skd_trl.sampling.draft import Draft, DraftInSteps, Judgement
from skd_trl.sampling.nucleus import Nucleus
from skd_trl.sampling.sampling_params import SamplingParams, draw, draw_among, draw_from_probs, shaped_probs


def cumulative_in_float64(logits, sampling):
    """Of the shaped distribution, by sorting, one row at a time, in numpy."""
    probs = np.exp(np.float64(logits) / sampling.temperature)
    probs /= probs.sum()
    if 0 < sampling.top_k < len(probs):
        probs = np.where(probs >= np.sort(probs)[-sampling.top_k], probs, 0)
        probs /= probs.sum()
    if sampling.top_p < 1:
        ordered = np.sort(probs)[::-1]
        last = np.searchsorted(np.cumsum(ordered), sampling.top_p)
        probs = np.where(probs >= ordered[min(last, len(ordered) - 1)], probs, 0)
        probs /= probs.sum()
    return np.cumsum(probs)


SAMPLING = [
    SamplingParams(),
    SamplingParams(0.5, 0.5),
    SamplingParams(top_p=0.9),
    SamplingParams(0.7, 0.8, top_k=20),
    SamplingParams(top_k=7),
]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([5, 64, 512, 513, 640, 2000, 4100]),
    st.sampled_from(SAMPLING),
    st.floats(0, 8),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_draws_by_candidates_are_the_plain_draws_wherever_the_nucleus_fits(
    vocab_size, sampling, scale, has_ties, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, vocab_size, generator=generator) * scale
    if has_ties:
        logits = logits.round()
    uniforms = torch.rand(8, generator=generator)
    nucleus, plain = Nucleus((20, 100)), draw(logits, sampling, uniforms)
    for level in (0, 1, 2):
        nucleus.level = level
        nucleus.begin_round()
        drawn = nucleus.draw(logits, sampling, uniforms)
        fitted = nucleus.fitted(8)
        missed = torch.zeros(8, dtype=torch.bool) if fitted is None else ~fitted
        assert level < 2 or not missed.any()
        assert torch.equal(drawn[~missed], plain[~missed])
        probs = nucleus.probs(logits, sampling)
        assert torch.equal(probs[~missed], shaped_probs(logits, sampling)[~missed])
    for row in range(8):
        values = logits[row].numpy()
        edges = cumulative_in_float64(values, sampling)
        if np.abs(edges - uniforms[row].item()).min() > 1e-5 and nucleus_is_clear(values, sampling):
            if sampling.top_p == 1 or sampling.top_k == 0:
                assert plain[row] == np.searchsorted(edges, uniforms[row].item(), side="right")


def nucleus_is_clear(logits: np.ndarray, sampling: SamplingParams) -> bool:
    """Whether rounding in fp32 cannot decide what the nucleus keeps: not its mass, nor which of two tokens is the last."""
    scaled = logits.astype(np.float64) / sampling.temperature
    ordered = np.sort(np.exp(scaled - scaled.max()))[::-1]
    ordered /= ordered.sum()
    lasts, mass_is_clear = [], True
    if 0 < sampling.top_k < len(ordered):
        lasts.append(ordered[sampling.top_k - 1])
    if sampling.top_p < 1:
        mass = np.cumsum(ordered)
        lasts.append(ordered[min(int(np.searchsorted(mass, sampling.top_p)), len(ordered) - 1)])
        mass_is_clear = np.abs(mass - sampling.top_p).min() > 1e-5
    are_apart = [((ordered == last) | (np.abs(ordered / last - 1) > 1e-5)).all() for last in lasts]
    return bool(mass_is_clear and all(are_apart))


@pytest.mark.parametrize("vocab_size", [3, 512, 1000, 1280])
def test_a_token_of_probability_zero_is_never_drawn_at_either_end_of_the_noise(vocab_size):
    probs = torch.zeros(6, vocab_size)
    probs[:, [1, vocab_size // 2]] = torch.tensor([0.3, 0.7]) * torch.tensor([1, 1e-30, 1e-3, 1, 3, 1e20])[:, None]
    for dtype, last in ((torch.float32, 1 - 2**-24), (torch.float64, 1 - 2**-53)):
        for noise, token in ((0.0, 1), (0.29, 1), (0.31, vocab_size // 2), (last, vocab_size // 2)):
            assert draw_from_probs(probs, torch.full((6,), noise, dtype=dtype)).tolist() == [token] * 6


def test_a_token_of_probability_zero_is_not_drawn_where_a_blocks_end_is_rounded_up():
    """The second block's end, 1 + 0.75 x 2^-52, is 1 + 2^-52 in floats: the target, 1, seems to be before the block."""
    probs = torch.zeros(1, 640)
    probs[0, [0, 129, 639]] = torch.tensor([1.0, 0.75 * 2**-52, 1.0])
    assert draw_from_probs(probs, torch.tensor([0.5])).item() == 129


def test_draws_follow_the_probabilities_across_blocks():
    """The inverse CDF at 4,000 equally spaced numbers: each token as often as its probability says, within one."""
    probs = torch.rand(1300, generator=torch.Generator().manual_seed(0)) ** 4
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(draw_from_probs(probs.expand(4000, -1), uniforms), minlength=1300)
    assert (counts - 4000 * probs / probs.sum()).abs().max() <= 1


def test_probabilities_that_are_no_numbers_draw_some_id_of_the_vocabulary():
    for size in (10, 1280):
        logits = torch.full((2, size), float("nan"))
        for sampling in SAMPLING:
            assert (draw(logits, sampling, torch.rand(2)) < size).all()
            assert (Nucleus((8,)).draw(logits, sampling, torch.rand(2)) < size).all()


def test_more_candidates_are_kept_for_a_while():
    nucleus, levels = Nucleus((64, 1024)), []
    for missed in [1, 1, *[0] * 40]:
        nucleus.observe(missed)
        levels.append(nucleus.level)
    assert levels[:2] == [1, 2] and levels[2:18] == [2] * 16 and levels[18] == 1 and levels[-1] == 0
    assert nucleus.num_candidates(49152) == 64 and nucleus.num_candidates(2000) == 64
    assert nucleus.num_candidates(1000) is None
    nucleus.level = 2
    assert nucleus.num_candidates(151936) is None


@pytest.mark.parametrize("size", [1, 64])
def test_a_draw_among_some_ids_is_the_draw_from_all_when_only_these_have_probabilities(size):
    generator = torch.Generator().manual_seed(size)
    ids = torch.stack([torch.randperm(1300, generator=generator)[:size].sort().values for _ in range(50)])
    probs = torch.rand(50, size, generator=generator) * (torch.rand(50, size, generator=generator) < 0.6)
    probs[:, -1] += 0.1
    whole, otherwise = torch.zeros(50, 1300).scatter(1, ids, probs), torch.full((50, 1), 7)
    for noise in (0.0, 0.3, 0.7, 1 - 2**-24):
        uniforms = torch.full((50,), noise)
        assert torch.equal(draw_among(probs, ids, uniforms, otherwise), draw_from_probs(whole, uniforms))
        for nothing in (torch.zeros_like(probs), torch.full_like(probs, float("nan"))):
            assert draw_among(nothing, ids, uniforms, otherwise).tolist() == [7] * 50


@pytest.mark.parametrize("own, other", [(0.5, 0.8), (1.0, 1.0), (1.0, 0.7), (0.6, 1.0)])
def test_distributions_that_are_cut_together_are_those_that_are_cut_apart(own, other):
    """What the draws have found out of the student is what its logits say, with nuclei for both, none or one of them."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = (torch.randn(6, 3, 1300, generator=generator) * 4 for _ in range(2))
    uniforms, coins, index = (
        torch.rand(6, 4, generator=generator),
        torch.rand(6, 3, generator=generator),
        torch.full((6, 1), 1),
    )
    nucleus, sampling = Nucleus((64,)), (SamplingParams(0.5, own), SamplingParams(1.2, other))
    nucleus.begin_round(keeps_drawn=True)
    tokens = [nucleus.draw(logits[:, g], sampling[0], uniforms[:, g]) for g in range(3)]
    facts = {
        "tokens": torch.stack(tokens, dim=1), "judgement": Judgement(teacher_logits, {}), "student_sampling": sampling[0],
        "teacher_sampling": sampling[1], "coins": coins, "nucleus": nucleus,
    }  # fmt: skip
    steps = list(zip(tokens, logits.unbind(1), strict=True))
    together = DraftInSteps(steps, True, drawn=nucleus.take_drawn(), is_drafted=True, **facts)
    apart = Draft(student_logits=logits, **{**facts, "nucleus": Nucleus()})
    assert len(together.drawn) == 3 and torch.equal(together.student_logits, logits)
    rule = Mixture(0.4)
    accepted = rule(together)
    assert torch.equal(accepted, rule(apart)) and accepted.any() and not accepted.all()
    torch.testing.assert_close(together.both_shaped_probs, apart.both_shaped_probs, rtol=1e-6, atol=0)
    for of in ("student", "teacher"):
        torch.testing.assert_close(together.shaped_probs(of), apart.shaped_probs(of), rtol=1e-6, atol=0)
    assert nucleus.fitted(6).all() if own < 1 or other < 1 else nucleus.fitted(6) is None
    drawn = [rule.replacement(draft.column(index), uniforms[:, 3]) for draft in (together, apart)]
    assert torch.equal(*drawn)
