"""What is known of the response tokens: filled in where not given, and what a trainer tells of its batches."""

import pytest
import torch
from test_skd_trainer import make_trainer

from skd_trl import SpecKDTrainer
from skd_trl.loss.gates import Gate
from skd_trl.loss.response_facts import ResponseFacts


def test_facts_that_are_not_given_say_one_response_of_which_nothing_is_known():
    facts = ResponseFacts.of(torch.tensor([7, 5, 9]))
    assert facts.labels.tolist() == [7, 5, 9] and facts.position.tolist() == [0, 1, 2]
    assert facts.is_end.tolist() == facts.replaced.tolist() == [False] * 3
    assert facts.teacher_rank.tolist() == [-1] * 3 and facts.uniforms.shape == (3, 0)


def test_cut_facts_put_together_are_the_facts():
    facts = ResponseFacts(
        labels=torch.tensor([7, 5, 9]), position=torch.tensor([0, 1, 0]), is_end=torch.tensor([False, True, True]),
        replaced=torch.tensor([True, False, False]), teacher_rank=torch.tensor([4, 0, 1]), uniforms=torch.rand(3, 2),
    )  # fmt: skip
    again = ResponseFacts.cat([facts[:1], facts[1:]])
    for name in ("labels", "position", "is_end", "replaced", "teacher_rank", "uniforms"):
        assert torch.equal(getattr(again, name), getattr(facts, name))
        assert torch.equal(getattr(facts[1:], name), getattr(facts, name)[1:])


@pytest.mark.parametrize("rollout", ["interleaved", "student", "teacher", "dataset"])
def test_a_gate_in_a_trainer_sees_the_facts_of_its_batch(tmp_path, rollout):
    trainer = make_trainer(
        tmp_path,
        trainer_class=SpecKDTrainer,
        rollout=rollout,
        gate_keep_eos=True,
        **({"accept_top_k": 120} if rollout == "interleaved" else {}),
    )
    seen, batches = [], []
    gate = Gate(lambda distributions, facts: seen.append(facts) or facts.replaced, floor=0.5)
    trainer._gate_for = lambda inputs: batches.append(inputs) or gate
    trainer.train()
    facts = ResponseFacts.cat(seen)
    expected, positions = [], []
    for batch in batches:
        for row in batch["labels"]:
            expected += row[row != -100].tolist()
            positions += range(int((row != -100).sum()))
    assert facts.labels.tolist() == expected and facts.position.tolist() == positions
    assert facts.is_end.tolist() == [label in trainer.eos_token_ids for label in expected]
    starts = facts.position[1:] == 0
    assert starts[facts.is_end[:-1]].all()  # after an end of sequence the next response begins
    if rollout == "interleaved":
        assert 0 < facts.replaced.sum() < len(facts)
        assert torch.equal(facts.replaced, facts.teacher_rank >= 120) and facts.teacher_rank.min() >= 0
    else:
        assert facts.replaced.eq(rollout == "teacher").all() and facts.teacher_rank.eq(-1).all()
