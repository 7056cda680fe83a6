"""The batch layout: nothing is lost, nothing is added, and prompts end at one column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skd_trl.data.batches import DataCollatorForDistillation


PAD = 0
IDS = st.lists(st.integers(0, 9), max_size=6)  # the padding id is among them, as where it is the end-of-sequence id
ROWS = st.lists(st.fixed_dictionaries({"prompt_ids": st.lists(st.integers(0, 9), min_size=1, max_size=6),
                                       "response_ids": IDS}), min_size=1, max_size=4)  # fmt: skip


@settings(deadline=None)
@given(rows=ROWS, multiple=st.sampled_from([None, 1, 4]))
def test_every_row_can_be_read_back_from_its_batch(rows, multiple):
    batch = DataCollatorForDistillation(PAD, pad_to_multiple_of=multiple)(rows)
    num_prompt_columns = batch["prompts"].shape[1]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for i, row in enumerate(rows):
        kept = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][kept].tolist() == row["prompt_ids"] + row["response_ids"]
        assert (batch["input_ids"][i][~kept] == PAD).all()
        labels = batch["labels"][i]
        assert labels[labels != -100].tolist() == row["response_ids"]
        assert (labels[:num_prompt_columns] == -100).all()
        # left-padded prompt, right-padded response
        assert kept[: num_prompt_columns - len(row["prompt_ids"])].sum() == 0
        assert kept[num_prompt_columns : num_prompt_columns + len(row["response_ids"])].all()
    assert torch.equal(batch["prompts"], batch["input_ids"][:, :num_prompt_columns])
    assert torch.equal(batch["prompt_attention_mask"], batch["attention_mask"][:, :num_prompt_columns])


@settings(deadline=None)
@given(rows=ROWS)
def test_columns_are_rounded_up_and_no_further(rows):
    plain, rounded = DataCollatorForDistillation(PAD)(rows), DataCollatorForDistillation(PAD, 4)(rows)
    prompt, response = (max(len(row[key]) for row in rows) for key in ("prompt_ids", "response_ids"))
    assert plain["prompts"].shape[1] == prompt and plain["input_ids"].shape[1] == prompt + response
    assert rounded["prompts"].shape[1] == -(-prompt // 4) * 4
    assert rounded["input_ids"].shape[1] == -(-prompt // 4) * 4 + -(-response // 4) * 4


def test_a_batch_of_prompts_alone_has_no_response_columns():
    batch = DataCollatorForDistillation(PAD, pad_to_multiple_of=4)([{"prompt_ids": [5, 6], "response_ids": []}])
    assert batch["input_ids"].shape == batch["prompts"].shape == (1, 4)
    assert (batch["labels"] == -100).all()


def test_the_counts_of_skipped_rows_of_a_stream_stay_with_their_rows():
    rows = [{"prompt_ids": [5], "response_ids": [], "skipped_rows": n} for n in (0, 3)]
    assert DataCollatorForDistillation(PAD)(rows)["skipped_rows"].tolist() == [0, 3]
    assert "skipped_rows" not in DataCollatorForDistillation(PAD)([{"prompt_ids": [5], "response_ids": []}])


@pytest.mark.parametrize(("arguments", "field"), [((None,), "pad_token"), ((0, 0), "pad_to_multiple_of")])
def test_a_collator_that_cannot_pad_says_what_to_set(arguments, field):
    with pytest.raises(ValueError, match=field):
        DataCollatorForDistillation(*arguments)
