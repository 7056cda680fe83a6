"""A data set to ids: every row that cannot be used is an error or is counted, named and explained."""

import dataclasses
import logging
import pickle

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from datasets.distributed import split_dataset_by_node
from tiny import CHATML, EOS, byte_tokenizer
from torch.utils.data import DataLoader

from skd_trl.data.batches import FILLS_UP, DataCollatorForDistillation
from skd_trl.data.dataset import prepare_dataset
from skd_trl.data.row_reports import NOTES, PROBLEMS
from skd_trl.data.row_rules import RowRules
from skd_trl.data.streams import MAX_CONSECUTIVE_SKIPS, DealtStream


TOKENIZER = byte_tokenizer()
GOOD = {"prompt": "2+2=", "completion": "4"}
LONG = {"prompt": "2" * 40, "completion": "4"}


RULES = {field.name for field in dataclasses.fields(RowRules)}


def prepare(dataset, tokenizer=TOKENIZER, **changes):
    """A prepared data set: the arguments that are fields of `RowRules` are its rules."""
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    settings = {
        "max_prompt_length": 30,
        "max_response_length": 10,
        "needs_response": False,
        "eos_token_ids": (tokenizer.eos_token_id,),
    } | changes
    rules = RowRules(**{name: value for name, value in settings.items() if name in RULES})
    return prepare_dataset(
        dataset, tokenizer, rules, **{name: value for name, value in settings.items() if name not in RULES}
    )


def stream(rows, num_shards=1) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


def numbered(numbers) -> list[dict]:
    """Rows "0", "1", ...: those whose number is divisible by 3 have a prompt over the limit."""
    return [{"prompt": f"{n:2d}" * (20 if n % 3 == 0 else 1)} for n in numbers]


def prompts(dataset) -> list[str]:
    return [TOKENIZER.decode(row["prompt_ids"]) for row in dataset]


def test_rows_come_out_as_ids_in_their_order_and_the_callers_data_set_stays_as_it_was():
    dataset = Dataset.from_list([{**GOOD, "extra": 1}, {"prompt": "3+3=", "completion": "6", "extra": 2}])
    before = dataset.to_list()
    prepared = prepare(dataset)
    assert prepared.column_names == ["prompt_ids", "response_ids"]
    assert prompts(prepared) == ["2+2=", "3+3="]
    assert TOKENIZER.decode(prepared[1]["response_ids"]) == f"6{EOS}"
    assert dataset.to_list() == before and dataset.column_names == ["prompt", "completion", "extra"]


def test_prompts_alone_have_empty_responses_even_when_the_first_thousand_rows_have_none():
    rows = [{"prompt": "2+2=", "completion": ""}] * 1001 + [GOOD]  # 1000: rows that `datasets` infers types from
    prepared = prepare(rows)
    assert prepared[0]["response_ids"] == [] and len(prepared[1001]["response_ids"]) == 2


def test_a_data_set_with_a_format_is_read_as_plain_rows():
    dataset = Dataset.from_list([{"input_ids": [5, 6, 257], "completion_mask": [0, 1, 1]}]).with_format("torch")
    assert prepare(dataset).to_list() == [{"prompt_ids": [5], "response_ids": [6, 257]}]
    assert dataset.format["type"] == "torch"


def test_long_prompts_are_left_out_and_one_warning_names_them(caplog):
    prepared = prepare([LONG, GOOD, *[LONG] * 7])
    assert prompts(prepared) == ["2+2="]
    assert len(caplog.messages) == 1
    for part in ("8 of 9", "max_prompt_length=30", "Rows 0, 2, 3, 4, 5 and 3 more", "40 tokens"):
        assert part in caplog.messages[0]


def test_a_data_set_of_long_prompts_only_is_an_error():
    with pytest.raises(ValueError, match="max_prompt_length=30.*No usable row is left"):
        prepare([LONG, LONG])


def test_long_references_are_cut_and_one_warning_counts_them(caplog):
    prepared = prepare([GOOD, {"prompt": "2+2=", "completion": "four" * 9}])
    assert TOKENIZER.decode(prepared[1]["response_ids"]) == "fourfourfo"
    assert len(caplog.messages) == 1 and "1 of 2" in caplog.messages[0] and "=10" in caplog.messages[0]


def test_a_prompt_keeps_its_room_however_long_its_reference_is():
    assert prompts(prepare([{"prompt": "2" * 30, "completion": "4" * 500}])) == ["2" * 30]


@pytest.mark.parametrize("prompt", [None, ""])
def test_a_row_without_a_prompt_is_an_error_that_names_it(prompt):
    with pytest.raises(ValueError, match="1 of 3 rows of the train data set have no prompt.*Row 1."):
        prepare([GOOD, {"prompt": prompt, "completion": "4"}, GOOD])


def test_data_sets_of_different_forms_may_be_concatenated_in_any_order():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    forms = [Dataset.from_list([{"messages": turns}]), Dataset.from_list([{"prompt": "q", "completion": "a"}])]
    alone = [prepare(form)[0] for form in forms]
    assert list(prepare(concatenate_datasets(forms))) == alone
    assert list(prepare(concatenate_datasets(forms[::-1]))) == alone[::-1]


def test_a_row_without_a_reference_is_an_error_only_where_references_are_needed():
    rows = [GOOD, {"prompt": "2+2=", "completion": None}, {"prompt": "2+2=", "completion": ""}]
    with pytest.raises(ValueError, match="2 of 3 rows of the eval data set have no reference.*Rows 1, 2."):
        prepare(rows, needs_response=True, name="eval")
    assert len(prepare(rows)) == 3


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_list([]), "is empty"),
        (Dataset.from_dict({"prompt": []}), "is empty"),
        (DatasetDict({"train": Dataset.from_list([GOOD])}), "one split"),
        ([{"text": "2+2=4"}], "columns .*text.*Give `messages`"),
        (Dataset.from_list([GOOD]).with_transform(lambda batch: batch), "with_transform"),
        ([{"messages": [{"role": "user", "content": "2+2?"}], "image": "a.png"}], "Only text"),
        (IterableDataset.from_generator(lambda: iter([])), "is empty"),
        (stream([{"text": "2+2=4"}]), "columns .*text.*Give `messages`"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_before_training(dataset, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataset)


def test_conversations_without_a_chat_template_are_refused_with_what_to_do():
    rows = [{"messages": [{"role": "user", "content": "2+2?"}]}]
    for dataset in (rows, stream(rows)):
        with pytest.raises(ValueError, match="Set `tokenizer.chat_template`"):
            prepare(dataset, byte_tokenizer(chat_template=None))


def test_a_row_that_the_template_refuses_is_named_with_the_templates_reason():
    tokenizer = byte_tokenizer(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    rows = [{"messages": [{"role": role, "content": "2+2?"}]} for role in ("user", "system")]
    with pytest.raises(ValueError, match="Row 1.*no system"):
        prepare(rows, tokenizer)


def test_what_a_template_does_to_the_boundary_is_warned_about_once_with_a_count(caplog):
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    prepare([row] * 6, byte_tokenizer(template), max_prompt_length=100)
    assert len(caplog.messages) == 1
    assert "6 of 6" in caplog.messages[0] and 'chat_template_kwargs={"enable_thinking": False}' in caplog.messages[0]


def test_only_the_first_rank_warns_and_every_rank_raises(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare([LONG, GOOD])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(ValueError):
        prepare([LONG])


def test_preparing_twice_gives_one_fingerprint_and_other_limits_another(tmp_path):
    path = str(tmp_path / "data")
    Dataset.from_list([GOOD]).save_to_disk(path)
    tokenizer = byte_tokenizer()
    dataset = Dataset.load_from_disk(path)
    first = prepare(dataset, tokenizer)
    tokenizer("used in between")
    assert prepare(dataset, tokenizer)._fingerprint == first._fingerprint
    assert prepare(dataset, tokenizer, max_response_length=1)._fingerprint != first._fingerprint
    assert prepare(dataset, byte_tokenizer(num_extra_tokens=1))._fingerprint != first._fingerprint


def test_several_processes_give_what_one_gives():
    rows = numbered(range(1, 12))
    assert prepare(rows, num_proc=2).to_list() == prepare(rows).to_list()


def test_prepared_rows_can_be_prepared_again():
    once = prepare([GOOD])
    assert prepare(once, needs_response=True).to_list() == once.to_list()


def test_a_stream_gives_what_the_data_set_gives_and_each_row_carries_what_was_skipped_before_it():
    rows = numbered(range(8))
    streamed = list(prepare(stream(rows)))
    assert [{key: row[key] for key in ("prompt_ids", "response_ids")} for row in streamed] == prepare(rows).to_list()
    assert [row["skipped_rows"] for row in streamed] == [1, 0, 1, 0, 1]
    columns = ["prompt_ids", "response_ids", "teacher_prompt_ids", "skipped_rows"]
    assert prepare(stream(rows)).column_names == columns


def test_a_stream_skips_every_kind_of_unusable_row_and_logs_its_reason(caplog):
    rows = [GOOD, {"prompt": None, "completion": "4"}, {"prompt": "2+2=", "completion": None}, LONG, GOOD]
    streamed = list(prepare(stream(rows), needs_response=True))
    assert [row["skipped_rows"] for row in streamed] == [0, 3]
    for row, reason in ((1, "prompt is missing"), (2, "no reference"), (3, "max_prompt_length is 30")):
        assert any(f"row {row} " in message and reason in message for message in caplog.messages)


def test_a_stream_without_column_names_works():
    prepared = prepare(IterableDataset.from_generator(lambda: iter([GOOD, LONG, GOOD])))
    assert prompts(prepared) == ["2+2="] * 2


def test_the_log_of_a_stream_is_rate_limited(caplog):
    list(prepare(stream([LONG] * 99 + [GOOD])))
    assert len(caplog.messages) == 4  # the first three and the tenth


def test_a_stream_that_is_nothing_but_unusable_rows_is_an_error_and_not_a_hang():
    def endless():
        while True:
            yield LONG

    with pytest.raises(ValueError, match=f"None of the first {MAX_CONSECUTIVE_SKIPS} rows of .* 40 tokens"):
        prepare(IterableDataset.from_generator(endless))
    later = prepare(stream([GOOD] + [LONG] * MAX_CONSECUTIVE_SKIPS))
    with pytest.raises(ValueError, match=f"last {MAX_CONSECUTIVE_SKIPS} rows .* 40 tokens"):
        list(later)


def test_a_short_stream_of_unusable_rows_is_refused_with_the_reason_and_the_limit():
    with pytest.raises(
        ValueError, match=r"None of the first 3 rows of the train stream .*3 long_prompt.* max_prompt_length is"
    ):
        prepare(stream([LONG] * 3))


def test_a_long_stream_with_a_usable_row_now_and_then_is_no_error():
    rows = ([LONG] * (MAX_CONSECUTIVE_SKIPS - 1) + [GOOD]) * 2
    assert [row["skipped_rows"] for row in prepare(stream(rows))] == [MAX_CONSECUTIVE_SKIPS - 1] * 2


def test_every_epoch_of_a_stream_gives_the_same_rows():
    prepared = prepare(stream(numbered(range(1, 8))))
    assert list(prepared) == list(prepared)


def test_a_stream_survives_pickling():
    prepared = prepare(stream(numbered(range(8))))
    assert list(pickle.loads(pickle.dumps(prepared))) == list(prepared)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_skipped_rows_of_a_stream_reach_the_trainer_from_data_loader_workers(num_workers):
    prepared = prepare(stream(numbered(range(24)), num_shards=2))
    loader = DataLoader(prepared, batch_size=4, num_workers=num_workers, collate_fn=DataCollatorForDistillation(0))
    batches = list(loader)
    assert sum(len(batch["prompts"]) for batch in batches) == 16
    assert sum(int(batch["skipped_rows"].sum()) for batch in batches) == 8


@pytest.mark.parametrize("num_shards", [1, 2], ids=["rows_in_turn", "shards"])
def test_two_processes_see_every_usable_row_once(num_shards):
    prepared = prepare(stream(numbered(range(24)), num_shards))
    ranks = [list(split_dataset_by_node(prepared, rank, 2)) for rank in (0, 1)]
    assert sorted(prompts(ranks[0]) + prompts(ranks[1])) == sorted(prompts(prepared))
    assert sum(row["skipped_rows"] for rank in ranks for row in rank) == 8


def test_a_resumed_stream_goes_on_where_it_stopped():
    prepared = prepare(stream(numbered(range(24))))
    expected = prompts(prepared)
    iterator = iter(prepared)
    seen = prompts(next(iterator) for _ in range(5))
    state = prepared.state_dict()
    resumed = prepare(stream(numbered(range(24))))
    resumed.load_state_dict(state)
    assert seen + prompts(resumed) == expected
    assert prompts(prepare(stream(numbered(range(24)))).skip(5)) == expected[5:]  # as `accelerate` skips batches


def test_every_message_can_be_formatted():
    limits = RowRules(7, 7, False, ())
    for text in [*PROBLEMS.values(), *NOTES.values()]:
        assert "{limits" not in text.format(limits=limits)


@pytest.mark.parametrize("multiple, filled", [(4, 3), (5, 0), (6, 1), (1, 0)])
def test_a_stream_for_several_processes_is_filled_up_with_rows_that_are_marked(multiple, filled):
    prepared = prepare(stream([GOOD] * 5, num_shards=2))
    rows = list(DealtStream(prepared, multiple))
    assert [row["skipped_rows"] == FILLS_UP for row in rows] == [False] * 5 + [True] * filled
    assert [row["prompt_ids"] for row in rows] == [list(prepared)[0]["prompt_ids"]] * (5 + filled)
