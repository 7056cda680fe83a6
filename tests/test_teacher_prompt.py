"""A teacher that reads another prompt than the student: its data, the sampler, the loss, one update however a batch is cut."""

import re

import pytest
import reference
import torch
from datasets import Dataset, IterableDataset
from test_skd_trainer import losses, make_trainer, update_of
from tiny import byte_tokenizer, tiny_model

from skd_trl import SKDConfig
from skd_trl.data.batches import DataCollatorForDistillation, ResponseTokens, as_teacher_reads
from skd_trl.data.dataset import has_own_prompts, prepare_dataset
from skd_trl.data.row_rules import RowRules
from skd_trl.data.teacher_prompts import DEFAULT_TEMPLATE, with_context
from skd_trl.training.distributed import keyed_generator


TOKENIZER = byte_tokenizer()
CONTEXTS = ["the answer has an a", "b", "first a, then b" * 3, "abab"]
ROWS = [
    {
        "prompt": [{"role": "user", "content": "q" * (3 + i)}],
        "completion": [{"role": "assistant", "content": "ab" * (1 + (5 * i) % 7)}],
        "privileged_context": CONTEXTS[i % 4],
    }
    for i in range(8)
]


def user_ids(text):
    turns = [{"role": "user", "content": text}]
    return TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


# Data


def prepare(dataset, every_answer=False, **rules_of_teacher):
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    rules = RowRules(
        60, 20, needs_response=False, eos_token_ids=(TOKENIZER.eos_token_id,), every_answer=every_answer, **rules_of_teacher
    )  # fmt: skip
    return prepare_dataset(dataset, TOKENIZER, rules)


def test_the_context_goes_into_the_teachers_prompt_alone_and_the_response_is_one():
    dataset = prepare(ROWS)
    assert dataset.column_names == ["prompt_ids", "response_ids", "teacher_prompt_ids"]
    for row, given in zip(dataset, ROWS, strict=True):
        text = given["prompt"][0]["content"]
        assert row["prompt_ids"] == user_ids(text)
        assert row["teacher_prompt_ids"] == user_ids(f"{text}\n\n{given['privileged_context']}")
        assert row["response_ids"] == TOKENIZER(given["completion"][0]["content"]).input_ids + [TOKENIZER.eos_token_id]
    assert prepare([{k: v for k, v in ROWS[0].items() if k != "privileged_context"}]).column_names == [
        "prompt_ids",
        "response_ids",
    ]


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, "{privileged_context}: {prompt} {{x}}"])
@pytest.mark.parametrize(
    "context", ["a hint", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], 7]
)
@pytest.mark.parametrize("prompt", ["a text", [{"role": "system", "content": "s"}, {"role": "user", "content": "q?"}]])
def test_prompts_are_joined_with_contexts_as_trl_joins_them(prompt, context, template):
    sdft = pytest.importorskip("trl.experimental.sdft.sdft_trainer")
    builders = [value for value in vars(sdft).values() if hasattr(value, "_compose_teacher_prompt")]
    if not builders:
        pytest.skip("this TRL composes the teacher's prompt elsewhere")
    args = type("Args", (), {"teacher_prompt_template": template})
    builder = builders[0](type("Trainer", (), {"args": args}))
    assert with_context(prompt, context, template) == builder._compose_teacher_prompt(prompt, context)


def test_a_teacher_prompt_is_a_text_or_a_conversation_as_the_rows_own_prompt_is():
    (row,) = prepare([{"prompt": "q", "completion": "a", "teacher_prompt": "Think of q"}])
    assert row["teacher_prompt_ids"] == TOKENIZER("Think of q").input_ids
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "and q?"}]
    (row,) = prepare([{**{k: ROWS[0][k] for k in ("prompt", "completion")}, "teacher_prompt": turns}])
    expected = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert row["teacher_prompt_ids"] == expected


def test_each_answer_of_a_conversation_has_the_context_in_its_own_question():
    turns = [
        {"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b"))
    ]
    first, second = prepare([{"messages": turns, "privileged_context": "X"}], every_answer=True)
    assert TOKENIZER.decode(first["teacher_prompt_ids"]).count("1\n\nX") == 1
    text = TOKENIZER.decode(second["teacher_prompt_ids"])
    assert "user\n1<" in text and "2\n\nX" in text
    with pytest.raises(ValueError, match="one `teacher_prompt` for 2 answers"):
        prepare([{"messages": turns, "teacher_prompt": turns[:1]}], every_answer=True)


def test_a_column_that_is_null_leaves_the_word_to_the_other_one():
    row = {"prompt": "q", "completion": "a"}
    for column, text in (("teacher_prompt", "x"), ("privileged_context", "q\n\nx")):
        both = {"teacher_prompt": None, "privileged_context": None, column: "x"}
        (prepared,) = prepare([{**row, **both}])
        assert TOKENIZER.decode(prepared["teacher_prompt_ids"]) == text


BAD_ROWS = {
    "Row 1.*its `privileged_context` is empty": [ROWS[0], {**ROWS[1], "privileged_context": ""}],
    "its `teacher_prompt` is empty": [{"prompt": "q", "completion": "a", "teacher_prompt": None}],
    "both `teacher_prompt` and `privileged_context`": [{**ROWS[0], "teacher_prompt": ROWS[0]["prompt"]}],
    "its prompt is a conversation and its `teacher_prompt` is plain text": [
        {**{k: ROWS[0][k] for k in ("prompt", "completion")}, "teacher_prompt": "q"}
    ],
    "beside token ids": [{"prompt_ids": [1], "response_ids": [2], "privileged_context": "x"}],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_ROWS)
def test_rows_whose_teacher_has_nothing_to_read_are_named(message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        prepare(BAD_ROWS[message])


def test_rows_with_a_long_prompt_of_the_teachers_own_are_left_out_and_counted(caplog):
    limits = {"max_teacher_prompt_length": len(user_ids("qqqq\n\nb"))}
    dataset = prepare(ROWS[:4], **limits)
    assert len(dataset) == 1
    assert "3 of 4 rows of the train data set have a prompt for the teacher over its limit" in caplog.text


def test_references_end_at_the_positions_that_the_teacher_has_left_beside_its_own_prompt(caplog):
    room = len(user_ids("qqqqq\n\n" + CONTEXTS[2])) + 5
    dataset = prepare(ROWS[:4], max_teacher_text_length=room)
    assert len(dataset[2]["response_ids"]) == 5
    assert "In 1 of 4 rows" in caplog.text


def test_a_stream_has_prompts_of_the_teachers_own_too():
    rows = list(prepare(IterableDataset.from_generator(lambda: iter(ROWS))))
    assert [row["teacher_prompt_ids"] for row in rows] == prepare(ROWS)["teacher_prompt_ids"][:]


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def with_hint(row):
    return {"prompt": row["prompt"], "completion": row["completion"], "privileged_context": row["hint"]}


PAIRS = [
    {"prompt": "q" * (3 + i), "completion": "ab" * (1 + i), "teacher_prompt": "Think of q" * i} for i in range(1, 8)
]
ALONE = {"prompt": "qqq", "completion": "ab"}
# A stream's rows, the same rows as a map-style set has them, and how both are formatted.
STREAMED = {
    "made by formatting_func": (
        [{**{k: v for k, v in row.items() if k != "privileged_context"}, "hint": row["privileged_context"]} for row in ROWS],
        None,
        with_hint,
    ),
    "prepared": (prepare(ROWS).to_list(), None, None),
    "from the second row on": ([ALONE, *PAIRS], [{**ALONE, "teacher_prompt": "qqq"}, *PAIRS], None),
}  # fmt: skip


@pytest.mark.parametrize("case", STREAMED)
def test_a_stream_has_the_batches_and_the_loss_of_a_map_style_set_whatever_its_first_row_says(tmp_path, case):
    rows, same_rows, formatting_func = STREAMED[case]
    settings = {
        "rollout": "dataset", "shuffle_dataset": False, "per_device_train_batch_size": 8, "learning_rate": 0.0,
        "formatting_func": formatting_func,
    }  # fmt: skip
    trainers = [make_trainer(tmp_path, given, **settings) for given in (stream_of(rows), same_rows or rows)]
    streamed, expected = (trainer.data_collator(list(trainer.train_dataset)) for trainer in trainers)
    streamed.pop("skipped_rows")
    assert streamed.keys() == expected.keys() and "teacher_prompts" in streamed
    assert all(torch.equal(streamed[name], expected[name]) for name in streamed)
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0])[0] == pytest.approx(losses(trainers[1])[0], rel=1e-5)
    assert losses(trainers[0])[0] == pytest.approx(mean_divergence(trainers[0], expected), rel=1e-4)


@pytest.mark.parametrize("make_set", [Dataset.from_list, stream_of])
def test_a_prepared_set_tells_whether_its_rows_say_what_the_teacher_reads(make_set):
    plain = [{k: v for k, v in row.items() if k != "privileged_context"} for row in ROWS]
    assert has_own_prompts(prepare(make_set(ROWS)))
    assert has_own_prompts(prepare(make_set(prepare(ROWS).to_list())))
    assert not has_own_prompts(prepare(make_set(plain)))
    assert not has_own_prompts(None)


@pytest.mark.parametrize("template", ["{prompt}", "{other} {privileged_context}", "{privileged_context"])
def test_a_template_that_cannot_join_them_is_refused(tmp_path, template):
    with pytest.raises(ValueError, match="teacher_prompt_template"):
        SKDConfig(str(tmp_path), bf16=False, use_cpu=True, teacher_prompt_template=template)


# Batches


def test_the_teachers_view_of_a_batch_has_the_same_response_tokens_after_its_own_prompts():
    rows = [
        {"prompt_ids": [1, 2], "response_ids": [7, 8, 9], "teacher_prompt_ids": [3, 4, 5, 6]},
        {"prompt_ids": [1, 2, 3, 4, 5], "response_ids": [], "teacher_prompt_ids": [9]},
        {"prompt_ids": [1], "response_ids": [8], "teacher_prompt_ids": []},  # reads the student's
    ]
    batch = DataCollatorForDistillation(0)(rows)
    view = as_teacher_reads(batch)
    assert [ids[mask == 1].tolist() for ids, mask in zip(view["input_ids"], view["attention_mask"], strict=True)] == [
        [3, 4, 5, 6, 7, 8, 9],
        [9],
        [1, 8],
    ]
    own, other = ResponseTokens.of(batch), ResponseTokens.of(view)
    for name in ("labels", "rows", "positions"):
        assert torch.equal(getattr(own, name), getattr(other, name))
    assert as_teacher_reads(view) is view


# The sampler and the loss


def captured(trainer):
    seen, original = [], trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: seen.append(inputs) or original(model, inputs, *rest)
    return seen


def test_sampled_responses_are_those_of_the_specification_with_a_second_prompt(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, shuffle_dataset=False, per_device_train_batch_size=4, max_grad_norm=0.0)
    rows = {tuple(row["prompt_ids"]): row["teacher_prompt_ids"] for row in trainer.train_dataset}
    seen = captured(trainer)
    generator = keyed_generator("sampling", trainer.args.seed, 0, 0)
    uniforms = torch.rand((4, 16, 3), generator=generator)
    student, teacher = (reference.in_float64(tiny_model(seed=seed)) for seed in (1, 2))
    trainer.train()
    (batch,) = seen
    num_different = 0
    for i, labels in enumerate(batch["labels"]):
        prompt = batch["prompts"][i][batch["prompt_attention_mask"][i] == 1].tolist()
        arguments = {
            "accepts": reference.top_k_accepts(80), "max_new_tokens": 16, "eos_token_ids": trainer.eos_token_ids,
            "uniforms": uniforms[i], "student_sampling": {}, "teacher_sampling": {},
        }  # fmt: skip
        tokens, replaced = reference.interleave(
            student, teacher, prompt, teacher_prompt=rows[tuple(prompt)], **arguments
        )
        assert labels[labels != -100].tolist() == tokens
        assert batch["replaced"][i, : len(tokens)].tolist() == replaced
        num_different += tokens != reference.interleave(student, teacher, prompt, **arguments)[0]
    assert num_different > 0  # the second prompt matters


def mean_divergence(trainer, batch):
    """Forward KL per response token by plain forwards, one row at a time."""
    terms = []
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    for i, labels in enumerate(batch["labels"]):
        response = labels[labels != -100].tolist()
        prompt = batch["prompts"][i][batch["prompt_attention_mask"][i] == 1].tolist()
        own = batch["teacher_prompts"][i][batch["teacher_prompt_attention_mask"][i] == 1].tolist()
        with torch.no_grad():
            q, p = (
                model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
                for model, ids in ((student, prompt), (teacher, own))
            )
        terms.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(terms).mean().item()


@pytest.mark.parametrize("rollout", ["dataset", "interleaved", "student"])
def test_the_loss_is_the_divergence_from_the_teacher_after_its_own_prompt(tmp_path, rollout):
    trainer = make_trainer(tmp_path, ROWS, rollout=rollout, learning_rate=0.0)
    seen = captured(trainer)
    trainer.train()
    assert ("teacher_hidden_states" in seen[0]) == (rollout == "interleaved")
    assert losses(trainer)[0] == pytest.approx(mean_divergence(trainer, seen[0]), rel=1e-4)


def test_an_evaluation_judges_references_after_the_teachers_own_prompts(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, eval_dataset=Dataset.from_list(ROWS), per_device_eval_batch_size=3)
    batch = trainer.data_collator(list(trainer.eval_dataset))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_divergence(trainer, batch), rel=1e-4)


SETTINGS = [
    {"rollout": "dataset"},
    {"rollout": "interleaved"},
    {"rollout": "student"},
    {"rollout": "interleaved", "lmbda": 0.5, "lmbda_unit": "prompt"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_eight_rows_with_two_prompts_each_are_one_update_however_they_are_cut(tmp_path, settings):
    settings = {**settings, "max_grad_norm": 0.0, "shuffle_dataset": False, "seed": 3}
    whole = make_trainer(tmp_path, ROWS, per_device_train_batch_size=8, **settings)
    expected = update_of(whole)
    assert expected.norm() > 0.1
    for batch_size in (4, 1):
        cut = make_trainer(
            tmp_path, ROWS, per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size,
            **settings,
        )  # fmt: skip
        assert (update_of(cut) - expected).norm() < 1e-4 * expected.norm()
        assert losses(cut)[0] == pytest.approx(losses(whole)[0], rel=1e-4)


def test_sampled_rows_of_a_mixed_step_keep_the_teachers_prompts(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, per_device_train_batch_size=8, lmbda=0.5, lmbda_unit="prompt")
    owns = {tuple(row["prompt_ids"]): row["teacher_prompt_ids"] for row in trainer.train_dataset}
    seen = captured(trainer)
    trainer.train()
    (batch,) = seen
    for i in range(8):
        prompt = batch["prompts"][i][batch["prompt_attention_mask"][i] == 1].tolist()
        own = batch["teacher_prompts"][i][batch["teacher_prompt_attention_mask"][i] == 1].tolist()
        assert own == owns[tuple(prompt)]
