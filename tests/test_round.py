"""A round is a function over fixed buffers; what it writes is what the sampler wrote before there was such a round."""

import json
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from data.record_texts import ARCHITECTURES, ENDS, NUM_TOKENS, RULES, SAMPLING, inputs
from tape import WAITS, Tape
from test_sampler import PROMPTS, left_padded, responses, sample
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from skd_trl import ACCEPTANCE_RULES, Execution, LocalParticipant, Participant, SamplingParams, interleaved_sample
from skd_trl.sampling import interleaved
from skd_trl.sampling.prompts import Prompts
from skd_trl.sampling.rounds import Rounds


RECORDED = json.loads((Path(__file__).parent / "data" / "texts.json").read_text())


@cache
def pair(architecture):
    return tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)


@pytest.mark.parametrize("num_draft_tokens, captured", [(1, False), (3, False), (6, False), (3, True)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_noise_gives_the_texts_of_the_sampler_before(architecture, rule, num_draft_tokens, captured):
    """`data/texts.json` was made by `data/record_texts.py` with the code of commit 808d384."""
    ids, mask, noise = inputs()
    num_replays, rounds = Tape.num_replays, Rounds(capture=True, make_graph=Tape) if captured else None
    rollout = interleaved_sample(
        *(LocalParticipant(model, SamplingParams(**SAMPLING)) for model in pair(architecture)),
        ids,
        mask,
        accept=ACCEPTANCE_RULES[rule](**RULES[rule]),
        max_new_tokens=NUM_TOKENS,
        eos_token_ids=ENDS,
        noise=noise,
        execution=Execution(num_draft_tokens, max_rows=3, rounds=rounds),
    )
    assert captured == (Tape.num_replays > num_replays + 4)
    for i, recorded in enumerate(RECORDED[f"{architecture}/{rule}"]):
        count = len(recorded["tokens"])
        assert rollout.labels[i][rollout.labels[i] != -100].tolist() == recorded["tokens"]
        assert rollout.replaced[i, :count].long().tolist() == recorded["replaced"]
        assert rollout.proposals[i, :count].tolist() == recorded["proposals"]
        assert rollout.teacher_rank[i, :count].tolist() == recorded["teacher_rank"]


class HostWaits(TorchDispatchMode):
    """Collects the operators that make the host wait for a device: a number read, or a shape that depends on data."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, self.num_operators = [], 0
        for name in ("tolist", "numpy", "cpu"):  # which on a CPU are no operators
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda x, n=name, f=original: (self.note(n), f(x))[1])

    def note(self, name):
        if self.is_on:
            self.seen.append(name)

    is_on = False

    def __enter__(self):
        self.is_on = True
        return super().__enter__()

    def __exit__(self, *error):
        self.is_on = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.num_operators += 1
        if name in WAITS or (name == "index" and any(getattr(i, "dtype", None) == torch.bool for i in args[1])):
            self.note(name)
        return func(*args, **(kwargs or {}))


EVERY_RULE = {
    "top_k": {"k": 40},
    "top_p": {"p": 0.7},
    "min_prob": {},
    "mixture": {},
    "speculative": {},
    "always": {},
    "never": {},
}


def test_every_rule_is_tried_below():
    assert EVERY_RULE.keys() == ACCEPTANCE_RULES.keys()


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_a_round_never_waits_for_the_device(monkeypatch, rule):
    waits, original, rounds = HostWaits(monkeypatch), interleaved.interleave_round, []

    def watched(*arguments):
        rounds.append(1)
        with waits:
            return original(*arguments)

    monkeypatch.setattr(interleaved, "interleave_round", watched)
    student, teacher = pair("llama")
    nucleus = SamplingParams(0.7, top_p=0.8, top_k=100)
    sample(
        student, teacher, rule=ACCEPTANCE_RULES[rule](**EVERY_RULE[rule]), student_sampling=nucleus,
        teacher_sampling=nucleus, max_rows=3,
    )  # fmt: skip
    assert len(rounds) > 3 and waits.num_operators > 100
    assert waits.seen == []


def test_what_waits_for_the_device_is_seen(monkeypatch):
    waits, scores = HostWaits(monkeypatch), torch.arange(3.0)
    scores.tolist()
    with waits:
        float(scores.sum())
        scores[scores > 1]
        scores.tolist()
    assert waits.seen == ["_local_scalar_dense", "index", "tolist"]


TEACHER_PROMPTS = [[50, 60], [1, 2, 3, 4, 5, 6, 7, 8], [7], [100, 101, 102, 103, 104, 105]]


@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("num_draft_tokens", [1, 4])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_teacher_with_prompts_of_its_own_judges_after_these(architecture, num_draft_tokens, max_rows):
    """Against the reference, where only the teacher reads the other prompt."""
    models = pair(architecture)
    noise = torch.rand((len(PROMPTS), 16, 3), generator=torch.Generator().manual_seed(5))
    ends = set(range(0, 259, 11))
    rollout = interleaved_sample(
        LocalParticipant(models[0]),
        LocalParticipant(models[1], prompts=Prompts(*left_padded(TEACHER_PROMPTS))),
        *left_padded(PROMPTS),
        accept=ACCEPTANCE_RULES["top_k"](k=25),
        max_new_tokens=16,
        eos_token_ids=ends,
        noise=noise,
        execution=Execution(num_draft_tokens, max_rows),
    )
    exact = [reference.in_float64(model) for model in models]
    for row, prompt in enumerate(PROMPTS):
        tokens, replaced = reference.interleave(
            *exact,
            prompt,
            teacher_prompt=TEACHER_PROMPTS[row],
            accepts=reference.top_k_accepts(25),
            max_new_tokens=16,
            eos_token_ids=ends,
            uniforms=noise[row],
            student_sampling={},
            teacher_sampling={},
        )
        assert responses(rollout)[row] == tokens
        assert rollout.replaced[row, : len(tokens)].tolist() == replaced
        own = models[1].get_decoder()(torch.tensor([TEACHER_PROMPTS[row] + tokens]))[0]
        kept = rollout.teacher_hidden_states[row, : len(tokens)]
        fresh = own[0, len(TEACHER_PROMPTS[row]) - 1 : -1]
        assert (kept - fresh).abs().max() < 2e-5 * fresh.abs().max()
    assert rollout.replaced.any()


def test_prompts_of_another_number_are_refused():
    with pytest.raises(ValueError, match="teacher has 2 separate prompts for 4 rows"):
        interleaved_sample(
            pair("llama")[0],
            LocalParticipant(pair("llama")[1], prompts=Prompts(*left_padded(PROMPTS[:2]))),
            *left_padded(PROMPTS),
            accept=ACCEPTANCE_RULES["top_k"](),
            max_new_tokens=4,
            eos_token_ids=[],
        )


def test_a_participant_of_a_users_making_writes_the_response():
    """The interface is what `Participant` declares: here a student that proposes the same token over and over."""

    class Parrot(Participant):
        def step(self, uniforms):
            tokens = torch.full_like(uniforms, 42, dtype=torch.long)
            return tokens, torch.nn.functional.one_hot(tokens, 259).float()

    ids, mask = left_padded(PROMPTS)
    arguments = {"max_new_tokens": 6, "eos_token_ids": [], "noise": torch.Generator().manual_seed(0)}
    alone = interleaved_sample(Parrot(), Participant(), ids, mask, accept=ACCEPTANCE_RULES["always"](), **arguments)
    assert responses(alone) == [[42] * 6] * 4
    judged = interleaved_sample(
        Parrot(), pair("llama")[1], ids, mask, accept=ACCEPTANCE_RULES["top_k"](k=30), **arguments
    )
    assert judged.replaced.any() and not judged.replaced.all()
    tokens = torch.tensor(responses(judged))
    assert (tokens[~judged.replaced] == 42).all() and (judged.teacher_rank[judged.replaced] >= 30).all()
