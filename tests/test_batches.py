"""Batches: nothing is lost, nothing is added, and what a row teaches does not depend on the rows beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_skd_trainer import make_trainer
from tiny import tiny_model
from transformers import RwkvConfig, RwkvForCausalLM

from skd_trl.data.batches import DataCollatorForDistillation, ResponseTokens, merge_prompts
from skd_trl.sampling.rollout import Rollout
from skd_trl.training.sampled_batches import sampled_batches


PAD = 0
IDS = st.lists(st.integers(0, 9), max_size=6)  # the padding id is among them, as where it is the end-of-sequence id
ROWS = st.lists(st.fixed_dictionaries({"prompt_ids": st.lists(st.integers(0, 9), min_size=1, max_size=6),
                                       "response_ids": IDS}), min_size=1, max_size=4)  # fmt: skip


@settings(deadline=None)
@given(rows=ROWS, multiple=st.sampled_from([None, 1, 4]))
def test_every_row_is_its_prompt_its_response_and_padding(rows, multiple):
    batch = DataCollatorForDistillation(PAD, pad_to_multiple_of=multiple)(rows)
    longest = max(len(row["prompt_ids"] + row["response_ids"]) for row in rows)
    num_columns = batch["input_ids"].shape[1]
    assert num_columns == (longest if multiple != 4 else -(-longest // 4) * 4)
    for i, row in enumerate(rows):
        prompt, response = row["prompt_ids"], row["response_ids"]
        padding = num_columns - len(prompt + response)
        assert batch["input_ids"][i].tolist() == prompt + response + [PAD] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(prompt + response) + [0] * padding
        assert batch["labels"][i].tolist() == [-100] * len(prompt) + response + [-100] * padding


@settings(deadline=None)
@given(rows=ROWS)
def test_prompts_to_sample_for_are_padded_at_the_left(rows):
    batch = DataCollatorForDistillation(PAD)(rows)
    width = max(len(row["prompt_ids"]) for row in rows)
    for i, row in enumerate(rows):
        padding = width - len(row["prompt_ids"])
        assert batch["prompts"][i].tolist() == [PAD] * padding + row["prompt_ids"]
        assert batch["prompt_attention_mask"][i].tolist() == [0] * padding + [1] * len(row["prompt_ids"])


def test_prompts_of_several_batches_are_one_left_padded_batch():
    collator = DataCollatorForDistillation(PAD)
    batches = [
        collator([{"prompt_ids": ids, "response_ids": [1]} for ids in part]) for part in ([[5], [6, 7]], [[8, 9, 4]])
    ]
    ids, mask = merge_prompts(batches).values()
    assert ids.tolist() == [[0, 0, 5], [0, 6, 7], [8, 9, 4]]
    assert mask.tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_the_counts_of_skipped_rows_of_a_stream_stay_with_their_rows():
    rows = [{"prompt_ids": [5], "response_ids": [], "skipped_rows": n} for n in (0, 3)]
    assert DataCollatorForDistillation(PAD)(rows)["skipped_rows"].tolist() == [0, 3]
    assert "skipped_rows" not in DataCollatorForDistillation(PAD)([{"prompt_ids": [5], "response_ids": []}])


@pytest.mark.parametrize(("arguments", "field"), [((None,), "pad_token"), ((0, 0), "pad_to_multiple_of")])
def test_a_collator_that_cannot_pad_says_what_to_set(arguments, field):
    with pytest.raises(ValueError, match=field):
        DataCollatorForDistillation(*arguments)


# Response tokens


@settings(deadline=None)
@given(rows=ROWS)
def test_response_tokens_know_their_label_row_place_and_what_predicts_them(rows):
    batch = DataCollatorForDistillation(PAD)(rows)
    tokens = ResponseTokens.of(batch)
    # Of each token: label, row, position in the response, and the column before it.
    expected = [
        (label, i, position, len(row["prompt_ids"]) + position - 1)
        for i, row in enumerate(rows)
        for position, label in enumerate(row["response_ids"])
    ]
    columns = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])[..., None]
    found = [tokens.labels, tokens.rows, tokens.positions, tokens.predicted_by(columns)[:, 0]]
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected
    assert tokens.shape == (len(rows), max(len(row["response_ids"]) for row in rows))


@settings(deadline=None)
@given(rows=ROWS)
def test_values_by_row_and_position_are_picked_in_order_and_put_back(rows):
    tokens = ResponseTokens.of(DataCollatorForDistillation(PAD)(rows))
    values = torch.arange(1, 1 + len(tokens.labels) * 2).view(-1, 2)
    as_rows = tokens.as_rows(values)
    assert as_rows.shape == (*tokens.shape, 2)
    assert torch.equal(tokens.pick(as_rows), values)
    assert (as_rows != 0).sum() == values.numel()  # and 0 on padding


# Sampled responses


def test_micro_batches_take_their_rows_of_a_rollout_without_the_columns_of_longer_rows():
    collator = DataCollatorForDistillation(PAD)
    given = [
        collator([{"prompt_ids": ids, "response_ids": [9, 9]} for ids in part])
        for part in ([[5], [6, 7]], [[8, 3, 4]])
    ]
    rollout = Rollout(
        input_ids=torch.tensor([[5, 1, 2, 0, 0, 0, 0], [6, 7, 1, 0, 0, 0, 0], [8, 3, 4, 1, 2, 3, 4]]),
        attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1] * 7]),
        labels=torch.tensor([[-100, 1, 2] + [-100] * 4, [-100, -100, 1] + [-100] * 4, [-100] * 3 + [1, 2, 3, 4]]),
        replaced=torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]]).bool(),
        proposals=torch.zeros(3, 4, dtype=torch.long),
        teacher_rank=torch.tensor([[7, 0, -1, -1], [8, -1, -1, -1], [0, 9, 0, 9]]),
        teacher_signal={"teacher_hidden_states": torch.arange(24.0).view(3, 4, 2)},
        num_rounds=0, num_drafted=0, num_truncated=0,
    )  # fmt: skip
    first, second = sampled_batches(rollout, given)
    assert first["input_ids"].tolist() == [[5, 1, 2], [6, 7, 1]]
    assert first["labels"].tolist() == [[-100, 1, 2], [-100, -100, 1]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert first["replaced"].tolist() == [[True, False], [True, False]]
    assert first["teacher_rank"].tolist() == [[7, 0], [8, -1]]
    assert torch.equal(first["teacher_hidden_states"], rollout.teacher_signal["teacher_hidden_states"][:2, :2])
    assert torch.equal(second["teacher_hidden_states"], rollout.teacher_signal["teacher_hidden_states"][2:])
    for batch, before in zip((first, second), given, strict=True):
        assert torch.equal(batch["prompts"], before["prompts"])
    unjudged = sampled_batches(Rollout(**{**vars(rollout), "teacher_signal": {}}), given)
    assert "teacher_hidden_states" not in unjudged[1]


# What a row teaches


def causal_model(name, seed):
    if name != "rwkv":
        return tiny_model(name, seed=seed)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 512}
    config = RwkvConfig(vocab_size=259, pad_token_id=None, bos_token_id=None, eos_token_id=None, **sizes)
    model, generator = RwkvForCausalLM(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # as they come, its states hardly matter
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# rwkv reads its padding like any other token: only after the row does that no harm.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "rwkv"])
def test_loss_and_gradient_of_a_padded_batch_are_the_sum_of_its_rows_alone(tmp_path, architecture):
    trainer = make_trainer(
        tmp_path, model=causal_model(architecture, 1), teacher=causal_model(architecture, 2), rollout="dataset"
    )
    rows = [trainer.train_dataset[i] for i in (0, 1, 2, 5)]
    assert len({(len(row["prompt_ids"]), len(row["response_ids"])) for row in rows}) == 4
    num_tokens = sum(len(row["response_ids"]) for row in rows)

    def loss_and_gradient(batches):
        trainer.model.zero_grad()
        losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_tokens) for batch in batches]
        sum(losses).backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        return sum(losses).item(), torch.cat(gradients)

    loss, gradient = loss_and_gradient([trainer.data_collator(rows)])
    loss_alone, gradient_alone = loss_and_gradient([trainer.data_collator([row]) for row in rows])
    assert loss_alone > 0.01
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    assert (gradient - gradient_alone).norm() < 1e-4 * gradient_alone.norm()
