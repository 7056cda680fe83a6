"""Per prompt, a sampled response or the reference (lmbda_unit="prompt"): rows keep their place, their prompt and their facts."""

import pytest
import torch
from test_skd_trainer import ROWS, KillAfter, Killed, losses, make_trainer, update_of

from skd_trl.data.mixed_batches import mix_sampled_rows


def batches_of(trainer):
    return [trainer.data_collator([trainer.train_dataset[i] for i in part]) for part in (range(4), range(4, 8))]


def texts(batch):
    return [labels[labels != -100].tolist() for labels in batch["labels"]]


def prompts(batch):
    return [
        ids[mask == 1].tolist() for ids, mask in zip(batch["prompts"], batch["prompt_attention_mask"], strict=True)
    ]


def spy_on_trained_batches(trainer):
    seen, original = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: seen.append(inputs) or original(model, inputs, *rest)
    return seen


def test_sampled_rows_take_the_places_they_were_drawn_for_and_the_others_stay(tmp_path):
    trainer = make_trainer(tmp_path, shuffle_dataset=False)
    given = batches_of(trainer)
    is_sampled = torch.tensor([False, True, False, False, True, True, False, False])
    rows = [trainer.train_dataset[i] for i in (1, 4, 5)]
    sampled = trainer.data_collator([{**row, "response_ids": [7, 8, 9][: 1 + n]} for n, row in enumerate(rows)])
    sampled["replaced"] = torch.tensor([[True, False, False], [False, True, False], [True, True, True]])
    mixed = mix_sampled_rows(given, [sampled], is_sampled, trainer.data_collator)
    assert [prompts(batch) for batch in mixed] == [prompts(batch) for batch in given]
    expected = [list(row) for batch in given for row in texts(batch)]
    expected[1], expected[4], expected[5] = [7], [7, 8], [7, 8, 9]
    assert [row for batch in mixed for row in texts(batch)] == expected
    where = [flags.nonzero().flatten().tolist() for batch in mixed for flags in batch["replaced"]]
    assert where == [[], [0], [], [], [1], [0, 1, 2], [], []]
    assert all("teacher_rank" not in batch for batch in mixed)


def test_about_lmbda_of_the_prompts_of_a_step_are_sampled_and_the_others_keep_their_reference(tmp_path):
    trainer = make_trainer(tmp_path, lmbda=0.5, lmbda_unit="prompt", max_steps=8, shuffle_dataset=False)
    references = {tuple(row["prompt_ids"]): row["response_ids"] for row in trainer.train_dataset}
    seen = spy_on_trained_batches(trainer)
    trainer.train()
    kept = [
        text == references[tuple(prompt)]
        for batch in seen
        for prompt, text in zip(prompts(batch), texts(batch), strict=True)
    ]
    # Binomial(32, 0.5) is within 5 standard deviations (14) but for 6e-7.
    assert len(kept) == 32 and 2 < sum(kept) < 30
    assert any(0 < sum(kept[i : i + 4]) < 4 for i in range(0, 32, 4))  # within one micro-batch
    mixed = [batch for batch in seen if "replaced" in batch]  # in the others nothing was sampled
    assert len(mixed) >= 6
    for batch in mixed:
        assert "teacher_hidden_states" not in batch
        for prompt, text, flags in zip(prompts(batch), texts(batch), batch["replaced"], strict=True):
            assert text != references[tuple(prompt)] or not flags.any()
    assert any(batch["replaced"].any() for batch in mixed)


@pytest.mark.parametrize("rollout", ["interleaved", "student"])
def test_at_its_ends_the_share_of_prompts_is_all_sampled_or_all_given(tmp_path, rollout):
    per_prompt = {"rollout": rollout, "lmbda_unit": "prompt", "max_grad_norm": 0.0}
    sampled = update_of(make_trainer(tmp_path, **per_prompt, lmbda=1.0))
    assert torch.equal(sampled, update_of(make_trainer(tmp_path, rollout=rollout, max_grad_norm=0.0)))
    # 1e-9: every prompt is drawn for, and none is sampled.
    given = update_of(make_trainer(tmp_path, **per_prompt, lmbda=1e-9))
    assert torch.equal(given, update_of(make_trainer(tmp_path, rollout="dataset", max_grad_norm=0.0)))


def test_a_mixed_step_is_one_update_however_its_rows_are_accumulated(tmp_path):
    settings = {"lmbda": 0.5, "lmbda_unit": "prompt", "max_grad_norm": 0.0}
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, **settings)
    expected = update_of(whole)
    cut = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    # fp32 sums of a few thousand terms in another order
    assert (update_of(cut) - expected).norm() < 1e-4 * expected.norm()
    assert losses(cut)[0] == pytest.approx(losses(whole)[0], rel=1e-4)


def test_a_killed_mixed_run_resumes_with_the_losses_of_an_uninterrupted_one(tmp_path):
    schedules = {"lmbda": {"start": 0.0, "end": 1.0}, "accept_top_k": {"start": 120, "end": 20}}
    settings = {
        "lmbda_unit": "prompt", "schedules": schedules, "accept_top_k": 120, "max_steps": 5, "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        make_trainer(tmp_path / "killed", callbacks=[KillAfter(3)], **settings).train()
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(set(losses(whole))) == 5
    assert losses(resumed) == losses(whole)


def test_without_references_a_mixed_run_is_refused_and_so_is_a_mixture_with_the_teachers_texts(tmp_path):
    with pytest.raises(ValueError, match="reference"):
        make_trainer(
            tmp_path, [{"prompt": row["messages"][0]["content"]} for row in ROWS], lmbda=0.5, lmbda_unit="prompt"
        )
    for settings in ({"seq_kd": True, "lmbda": 0.5}, {"rollout": "dataset"}):
        with pytest.raises(ValueError, match="lmbda_unit='prompt'.*Leave it at 'step'"):
            make_trainer(tmp_path, lmbda_unit="prompt", **settings)
