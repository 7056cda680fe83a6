"""What people's rows hold, in the forms in which public data sets write it: the same prompt and label as the plain form."""

import dataclasses
import json

import pytest
from datasets import Dataset
from test_data import prepare
from test_skd_trainer import make_trainer
from test_tokenization import ANSWER, CHAT_PROMPT, QUESTION, texts, tokenize
from tiny import BOS, CHATML, EOS, byte_tokenizer, tiny_model

from skd_trl import SKDConfig
from skd_trl.data.row_rules import RowRules
from skd_trl.data.tokenization import tokenize_row
from skd_trl.training.models import pad_token_id


PLAIN = (CHAT_PROMPT, f"It is 4.{EOS}")
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% if tools is not none %}tools:{% endif %}" + CHATML
)
CALLS = CHATML.replace(
    "{{ m['content'] }}<|im_end|>",
    "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}<|im_end|>",
)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("human", ["human", "user", "User", " HUMAN ", "prompter"])
@pytest.mark.parametrize("answering", ["gpt", "model", "bot", "chatgpt", "Assistant", "GPT", "ai", "chatbot"])
def test_the_names_of_roles_in_public_data_sets_mean_what_the_plain_ones_mean(human, answering):
    for column, keys in (("conversations", ("from", "value")), ("messages", ("role", "content"))):
        row = {
            column: [dict(zip(keys, pair, strict=True)) for pair in ((human, "What is 2+2?"), (answering, "It is 4."))]
        }
        assert texts(row) == PLAIN


def test_a_call_in_json_text_is_the_assistants_and_an_observation_the_tools():
    call = {"name": "add", "arguments": {"a": 2}}
    row = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ]
    }
    prompt, response = texts(row, byte_tokenizer(CALLS))
    assert f"{BOS}assistant\n<call>{json.dumps(call)}</call>{EOS}\n{BOS}tool\n4{EOS}" in prompt
    assert response == f"It is 4.{EOS}"
    row["conversations"] = row["conversations"][:2]
    assert texts(row, byte_tokenizer(CALLS))[1] == f"<call>{json.dumps(call)}</call>{EOS}"
    row["conversations"][1]["value"] = "add 2"
    refused = tokenize(row, byte_tokenizer(CALLS))
    assert refused["problem"] == "unreadable" and "turn 1 of its `conversations` has a call" in refused["detail"]


ADD = {"name": "add", "arguments": {"a": 2}}


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{"type": "function", "function": ADD}]},
        {"tool_calls": [ADD]},
        {"tool_calls": json.dumps([{"type": "function", "function": ADD}])},
        {"tool_calls": json.dumps(ADD)},
        {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]},
        {"function_call": ADD},
        {"function_call": {"name": "add", "arguments": '{"a":2}'}},
        {"function_call": json.dumps(ADD), "tool_calls": None},
    ],
)
def test_calls_are_the_answer_however_they_are_written(calls):
    answer = {"role": "assistant", "content": None, **calls}
    prompt, response = texts({"messages": [QUESTION, answer]}, byte_tokenizer(CALLS))
    assert (prompt, response) == (CHAT_PROMPT, f"<call>{json.dumps(ADD)}</call>{EOS}")
    history = [QUESTION, answer, {"role": "function", "content": "4"}, ANSWER]
    assert f"{response}\n{BOS}tool\n4{EOS}" in texts({"messages": history}, byte_tokenizer(CALLS))[0]


@pytest.mark.parametrize("nothing", ["", "[]", "null", [], None])
def test_no_calls_are_no_calls_however_they_are_written(nothing):
    asks = CHATML + "{{ 'tool_calls' in messages[-1] }}"
    for key in ("tool_calls", "function_call"):
        assert texts({"messages": [QUESTION, {**ANSWER, key: nothing}]}, byte_tokenizer(CALLS)) == PLAIN
        assert texts({"messages": [{**QUESTION, key: nothing}]}, byte_tokenizer(asks))[0].endswith("False")


@pytest.mark.parametrize("calls", ["add(2)", '"add"', 4, [4], {"add": 2}, [{"function": "add"}], [{"function": {}}]])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_that_cannot_be_read_are_refused_by_row(key, calls):
    refused = tokenize({"messages": [QUESTION, {**ANSWER, key: calls}]}, byte_tokenizer(CALLS))
    assert refused["problem"] == "unreadable" and "turn 1 of its `messages` has a call" in refused["detail"]


@pytest.mark.parametrize("role", ["Alice", "", "assistent"])
def test_a_conversation_whose_last_role_is_not_known_is_refused_with_its_row(role):
    result = tokenize({"messages": [QUESTION, turn(role, "It is 4.")]})
    assert result["problem"] == "unreadable" and repr(role) in result["detail"] and "gpt" in result["detail"]
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, turn(role, "It is 4.")]}]
    with pytest.raises(ValueError, match="1 of 2 rows.*Row 1"):
        prepare(rows)


def test_an_unknown_role_before_the_end_is_the_templates_business():
    assert f"{BOS}critic\nHm.{EOS}" in texts({"messages": [turn("critic", "Hm."), QUESTION, ANSWER]})[0]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "What is 2+2?"}],
        [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}],
        [{"type": "input_text", "text": "What is 2+2?", "annotations": []}],
        ["What is ", "2+2?"],
        [{"type": "text", "text": "What is 2+2?", "image": None}],
    ],
)
def test_text_in_parts_is_the_text(content):
    assert (
        texts({"messages": [turn("user", content), turn("assistant", [{"type": "text", "text": "It is 4."}])]})
        == PLAIN
    )
    row = {"prompt": [turn("user", content)], "completion": [ANSWER]}
    assert texts(row) == PLAIN


def test_parts_are_handed_over_where_a_template_prints_them_and_texts_become_parts_where_it_prints_no_text():
    in_parts = "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    either = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + in_parts + "{% endif %}"
    content = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    for printed in (in_parts, either):
        tokenizer = byte_tokenizer(CHATML.replace("{{ m['content'] }}", printed))
        for question in (content, "What is 2+2?"):
            assert texts({"messages": [turn("user", question), ANSWER]}, tokenizer) == PLAIN


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "'image'"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
        ([{"type": "thinking", "thinking": "hm"}], "'thinking'"),
        ([{"type": "text"}], "'text'"),
        ([4], "'int'"),
        ({"parts": ["What?"]}, "dict"),
        (4, "int"),
    ],
)
def test_content_that_is_no_text_is_refused_by_row(content, named):
    result = tokenize({"messages": [turn("user", content), ANSWER]})
    assert result["problem"] == "unreadable" and "turn 0 of its `messages`" in result["detail"]
    assert named in result["detail"]


@pytest.mark.parametrize("nothing", ["[]", "", "null", "{}", " ", [], None])
def test_no_tools_print_no_preamble_however_they_are_written(nothing):
    tokenizer = byte_tokenizer(WITH_TOOLS)
    assert texts({"messages": [QUESTION, ANSWER], "tools": nothing}, tokenizer) == PLAIN


@pytest.mark.parametrize("tools", ['[{"name": "add"}]', [{"name": "add"}], ['{"name": "add"}']])
def test_tools_reach_the_template_as_dicts(tools):
    prompt = texts({"messages": [QUESTION], "tools": tools}, byte_tokenizer(WITH_TOOLS))[0]
    assert prompt.startswith('{"name": "add"}tools:')


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [{"type": "function", "function": {"name": "add", "parameters": json.dumps(SCHEMA)}}]},
        {"functions": [{"name": "add", "parameters": SCHEMA}]},
        {"functions": json.dumps([{"name": "add", "parameters": SCHEMA}]), "tools": None},
        {"functions": [{"name": "add", "parameters": json.dumps(SCHEMA)}]},
    ],
)
def test_tools_of_older_forms_reach_the_template_as_todays(columns):
    expected = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
    prompt = texts({"messages": [QUESTION], **columns}, byte_tokenizer(WITH_TOOLS))[0]
    assert prompt == f"{json.dumps(expected)}tools:{CHAT_PROMPT}"


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios"])
def test_columns_of_what_cannot_be_read_are_refused_by_name(column):
    row = {"messages": [QUESTION, ANSWER], column: ["a"]}
    assert f"a column '{column}'. Only text" in tokenize(row)["detail"]


@pytest.mark.parametrize("tools", ['{"name": "add"}', '"add"', "[4]", {"name": "add"}, "[not json"])
def test_tools_that_are_no_list_of_dicts_are_refused(tools):
    result = tokenize({"messages": [QUESTION], "tools": tools}, byte_tokenizer(WITH_TOOLS))
    assert result["problem"] == "unreadable" and "`tools`" in result["detail"]


def test_template_kwargs_may_be_json_text():
    tokenizer = byte_tokenizer("{{ mood }}|" + CHATML)
    row = {"messages": [QUESTION]}
    for kwargs in ('{"mood": "glad"}', {"mood": "glad"}):
        assert texts({**row, "chat_template_kwargs": kwargs}, tokenizer)[0].startswith("glad|")
    for kwargs in ("", "null", None, {}):
        assert (
            texts({**row, "chat_template_kwargs": kwargs}, tokenizer, chat_template_kwargs={"mood": "sad"})[0][:3]
            == "sad"
        )
    for kwargs in ("[1]", "glad", '"glad"'):
        refused = tokenize({**row, "chat_template_kwargs": kwargs}, tokenizer)
        assert refused["problem"] == "unreadable" and "`chat_template_kwargs`" in refused["detail"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "What is 2+2?"},
        {"conversations": json.dumps([QUESTION, ANSWER])},
        {"messages": {"role": ["user"], "content": ["What is 2+2?"]}},
        {"prompt": [QUESTION], "completion": ANSWER},
        {"prompt": QUESTION},
    ],
)
def test_what_is_no_list_of_turns_is_called_what_it_is(row):
    result = tokenize(row)
    assert result["problem"] == "unreadable"
    assert any(f"{kind}" in result["detail"] for kind in ("is of type str", "is of type dict", "is plain text"))


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_in_a_column_goes_before_the_turns(column):
    expected = texts({"messages": [turn("system", "Be brief."), QUESTION, ANSWER]})
    assert texts({"messages": [QUESTION, ANSWER], column: "Be brief."}) == expected
    assert texts({"prompt": [QUESTION], "completion": [ANSWER], column: "Be brief."}) == expected
    assert texts({"messages": [turn("system", "Be brief."), QUESTION, ANSWER], column: "Be brief."}) == expected
    assert texts({"messages": [QUESTION, ANSWER], column: None}) == PLAIN
    for row in ({"messages": [turn("system", "Be long."), QUESTION]}, {"prompt": "2+2=", "completion": "4"}):
        refused = tokenize({**row, column: "Be brief."})
        assert refused["problem"] == "unreadable" and f"`{column}`" in refused["detail"]


SEVERAL = [turn("assistant", "Let me ask."), turn("tool", "4"), ANSWER]


def test_a_completion_of_several_turns_leaves_the_prompt_as_it_is_given():
    row = {"prompt": [QUESTION], "completion": SEVERAL}
    assert texts(row) == (CHAT_PROMPT, f"Let me ask.{EOS}")
    assert tokenize(row)["notes"] == ["several_turns"]
    longer = {
        "prompt": [QUESTION, ANSWER, turn("user", "Sure?")],
        "completion": [ANSWER, turn("user", "Really?"), ANSWER],
    }
    assert texts(longer)[0] == texts({"prompt": longer["prompt"]})[0]


@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_a_completion_that_does_not_begin_with_an_answer_is_refused(role):
    result = tokenize({"prompt": [QUESTION], "completion": [turn(role, "4"), ANSWER]})
    assert result["problem"] == "unreadable" and repr(role) in result["detail"]


def test_a_counted_note_says_what_is_not_used_of_completions(caplog):
    prepare(
        [{"prompt": [QUESTION], "completion": SEVERAL}, {"prompt": [QUESTION], "completion": [ANSWER]}],
        max_prompt_length=200,
        max_response_length=50,
    )
    assert (
        len(caplog.messages) == 1
        and "In 1 of 2 rows" in caplog.messages[0]
        and "every_answer=True" in caplog.messages[0]
    )


def test_rows_with_roles_of_sharegpt_come_out_of_a_data_set_as_the_plain_ones_do():
    plain = [{"messages": [QUESTION, ANSWER]}]
    other = [{"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is 4."}]}]
    assert prepare(other, max_prompt_length=200).to_list() == prepare(plain, max_prompt_length=200).to_list()
    assert Dataset.from_list(other).column_names == ["conversations"]


DIALOGUE = [
    turn("system", "Be brief."),
    turn("user", "q1"),
    turn("assistant", "a1"),
    turn("user", "q2"),
    turn("assistant", "a2"),
]


def examples(row, **changes) -> list[tuple[str, str]]:
    tokenizer = byte_tokenizer()
    settings = {"max_prompt_length": None, "max_response_length": None, "needs_response": True, "every_answer": True}
    rules = RowRules(eos_token_ids=(tokenizer.eos_token_id,), **(settings | changes))
    results = tokenize_row(row, tokenizer=tokenizer, rules=rules)
    assert [result["problem"] for result in results] == [""] * len(results), results
    return [(tokenizer.decode(result["prompt_ids"]), tokenizer.decode(result["response_ids"])) for result in results]


def test_every_answer_is_a_row_after_what_came_before_it():
    expected = [texts({"messages": DIALOGUE[:3]}), texts({"messages": DIALOGUE})]
    assert [response for _, response in expected] == [f"a1{EOS}", f"a2{EOS}"]
    assert examples({"messages": DIALOGUE}) == expected
    assert examples({"prompt": DIALOGUE[:2], "completion": DIALOGUE[2:]}) == expected
    assert examples({"messages": DIALOGUE}, every_answer=False) == expected[1:]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_an_answer_that_is_marked_as_not_to_be_trained_on_is_none(mark):
    """OpenAI's, axolotl's and ms-swift's marks. The answer stays in the prompts of those after it."""
    first, last = [*DIALOGUE[:2], DIALOGUE[2] | mark, *DIALOGUE[3:]], [*DIALOGUE[:4], DIALOGUE[4] | mark]
    parts = {"prompt": first[:2], "completion": first[2:]}
    assert examples({"messages": first}) == examples(parts) == [texts({"messages": DIALOGUE})]
    assert examples({"messages": last}) == [texts({"messages": DIALOGUE[:3]})]
    marked = {"messages": [*DIALOGUE[:2], DIALOGUE[2] | mark]}
    prompt_alone = [(texts({"messages": DIALOGUE[:3]})[0], "")]
    for row in (marked, {"prompt": DIALOGUE[:2], "completion": marked["messages"][2:]}):
        for every in (True, False):
            assert examples(row, needs_response=False, every_answer=every) == prompt_alone
            with pytest.raises(ValueError, match=r"marked as not to be trained on \("):
                prepare([row], needs_response=True, every_answer=every, max_prompt_length=200)
    for other in ({"weight": 1}, {"train": True}, {"loss": None}):
        assert examples({"messages": [*DIALOGUE[:4], DIALOGUE[4] | other]}, every_answer=False) == [
            texts({"messages": DIALOGUE})
        ]


def test_with_every_answer_the_first_one_of_a_completion_continues_the_prompt():
    question, later = turn("user", "q"), [turn("user", "r"), turn("assistant", "c")]
    begun = {"prompt": [question, turn("assistant", "a ")], "completion": [turn("assistant", "b"), *later]}
    whole = examples({"messages": [question, turn("assistant", "a b"), *later]})
    prompt = texts({"prompt": begun["prompt"]})[0]
    assert prompt.endswith("assistant\na ")
    assert examples(begun) == [(prompt, f"b{EOS}"), whole[1]]
    begun["completion"][0] |= {"weight": 0}
    assert examples(begun) == whole[1:]


def test_with_every_answer_calls_of_tools_are_answers_too():
    row = {"prompt": [QUESTION], "completion": SEVERAL}
    assert examples(row) == [texts({"messages": [QUESTION, *SEVERAL[:1]]}), texts({"messages": [QUESTION, *SEVERAL]})]


def test_with_every_answer_a_greeting_is_no_answer_and_a_last_question_is_a_row_where_it_can_be_sampled():
    row = {"messages": [turn("assistant", "Hello."), *DIALOGUE[1:4]]}
    answered = examples(row)
    assert [response for _, response in answered] == [f"a1{EOS}"]
    assert examples(row, needs_response=False) == [*answered, texts(row)]
    parts = {"prompt": row["messages"][:2], "completion": row["messages"][2:]}
    assert examples(parts) == answered and examples(parts, needs_response=False) == [*answered, texts(row)]
    assert examples({"prompt": "2+2=", "completion": "4"}) == [("2+2=", f"4{EOS}")]


def test_with_every_answer_a_last_question_that_cannot_be_a_row_is_counted(caplog):
    rows = [{"messages": DIALOGUE}, {"messages": DIALOGUE[:4]}]
    assert len(prepare(rows, needs_response=True, every_answer=True, max_prompt_length=200)) == 3
    assert any(
        "In 1 of 2 rows of the train data set the conversation ends with a question" in m for m in caplog.messages
    )


def test_with_every_answer_each_run_of_a_tokenized_row_is_a_row():
    ids = [ord(letter) - 33 for letter in "abcdef"]  # bytes come in the order of their letters
    row = {"input_ids": ids, "completion_mask": [0, 1, 1, 0, 1, 0]}
    results = tokenize_row(
        row, tokenizer=byte_tokenizer(), rules=RowRules(None, None, True, (257,), every_answer=True)
    )
    assert [(r["prompt_ids"], r["response_ids"]) for r in results] == [(ids[:1], ids[1:3]), (ids[:4], ids[4:5])]


def test_the_log_counts_rows_and_answers_and_a_problem_names_its_row_and_answer(caplog):
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": DIALOGUE}]
    settings = {"max_prompt_length": 200, "every_answer": True}
    assert len(prepare(rows, **settings)) == 3
    assert any("the 2 rows of the train data set hold 3 answers" in message for message in caplog.messages)
    empty = [*DIALOGUE[:2], turn("assistant", ""), *DIALOGUE[3:]]
    with pytest.raises(ValueError, match=r"1 of 2 rows .*Row 1\. \(row 1: answer 1 of 2: .*no reference"):
        prepare([rows[0], {"messages": empty}], needs_response=True, **settings)


def test_a_stream_gives_every_answer_too():
    dataset = Dataset.from_list([{"messages": DIALOGUE}, {"messages": [QUESTION, ANSWER]}])
    settings = {"max_prompt_length": 200, "every_answer": True}
    streamed = list(prepare(dataset.to_iterable_dataset(), **settings))
    assert [{key: row[key] for key in ("prompt_ids", "response_ids")} for row in streamed] == prepare(
        dataset, **settings
    ).to_list()
    assert [row["skipped_rows"] for row in streamed] == [0, 0, 0]


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_a_trainer_trains_and_evaluates_on_every_answer(tmp_path, rollout):
    rows = [{"messages": DIALOGUE}]
    trainer = make_trainer(tmp_path, rows, eval_dataset=Dataset.from_list(rows), rollout=rollout, every_answer=True)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (2, 2)
    assert len(make_trainer(tmp_path, rows, rollout=rollout).train_dataset) == 1
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_a_reference_beyond_the_models_positions_is_cut_there_in_training_and_evaluation(
    tmp_path, architecture, rollout, caplog
):
    """Learned positions end with an IndexError."""
    pair = {"model": tiny_model(architecture, 1, max_position_embeddings=40)}
    pair["teacher"] = tiny_model(architecture, 2, max_position_embeddings=60)
    rows = [{"prompt": "2+2=", "completion": "4" * 90}, {"prompt": "2" * 20, "completion": "4"}]
    trainer = make_trainer(
        tmp_path, rows, eval_dataset=Dataset.from_list(rows), rollout=rollout, max_length=None, **pair
    )
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        lengths = [(len(row["prompt_ids"]), len(row["response_ids"])) for row in dataset]
        assert sorted(lengths) == [(4, 36), (20, 2)]
    num_read = 2 if rollout == "dataset" else 1  # training on sampled responses reads no reference
    assert sum("more than 40 tokens together" in message for message in caplog.messages) == num_read
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_where_nothing_is_sampled_prompt_and_reference_share_max_length(tmp_path):
    rows = [{"prompt": "2" * length, "completion": "4" * 200} for length in (4, 100, 127, 128)]

    def lengths(**settings):
        dataset = make_trainer(tmp_path, rows, shuffle_dataset=False, **settings).train_dataset
        return [(len(row["prompt_ids"]), len(row["response_ids"])) for row in dataset]

    assert lengths(rollout="dataset") == [(4, 124), (100, 28), (127, 1)]
    assert lengths(rollout="dataset", max_new_tokens=200) == [(4, 124), (100, 28), (127, 1)]  # bounds what is sampled
    assert lengths(rollout="dataset", max_prompt_length=100) == [(4, 28), (100, 28)]
    assert lengths(rollout="dataset", max_response_length=7) == [(4, 7), (100, 7), (127, 7)]
    assert lengths(rollout="student", max_new_tokens=16) == [(4, 16), (100, 16)]


@pytest.mark.parametrize("rollout", ["dataset", "student"])
@pytest.mark.parametrize("strategy, column", [("group_by_length", "length"), ("group_by_length", "size"), ("batch_rebalance", "length")])  # fmt: skip
def test_rows_can_be_sampled_by_their_lengths(tmp_path, rollout, strategy, column):
    fields = {field.name: field for field in dataclasses.fields(SKDConfig)}
    if strategy not in fields.get("train_sampling_strategy", fields["output_dir"]).metadata.get("choices", ()):
        pytest.skip(f"this transformers has no train_sampling_strategy={strategy!r}")
    rows = [{"prompt": "2" * (1 + 7 * i % 5), "completion": "4" * (1 + i)} for i in range(8)]
    trainer = make_trainer(
        tmp_path, rows, eval_dataset=Dataset.from_list(rows), rollout=rollout, train_sampling_strategy=strategy,
        length_column_name=column, per_device_train_batch_size=2,
    )  # fmt: skip
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert dataset[column][:] == [len(row["prompt_ids"]) + len(row["response_ids"]) for row in dataset]
    assert trainer.train().training_loss > 0 and trainer.evaluate()["eval_loss"] > 0
    assert column not in make_trainer(tmp_path, rows, rollout=rollout).train_dataset.column_names


@pytest.mark.parametrize("rollout", ["dataset", "student"])
def test_a_padding_token_that_the_models_lack_pads_nothing_and_changes_nothing(tmp_path, rollout):
    """Padding is masked: any id that both models have will do."""
    rows = [{"prompt": "2" * (1 + 3 * i), "completion": "4" * (9 - i)} for i in range(4)]
    losses = []
    for added in (False, True):
        tokenizer = byte_tokenizer()
        if added:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            assert tokenizer.pad_token_id == 259  # of 259 embeddings
        trainer = make_trainer(
            tmp_path, rows, eval_dataset=Dataset.from_list(rows), processing_class=tokenizer, rollout=rollout
        )
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("end", ["pad", "eos", None])
def test_padding_is_an_id_below_the_smaller_vocabulary(end):
    tokenizer = byte_tokenizer()
    expected = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, None: 0}[end]
    if end != "pad":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if end is None:
        tokenizer.eos_token = None
    assert pad_token_id(tokenizer, 259) == expected
    assert pad_token_id(tokenizer, 100) == 0


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"input_ids": [5, 6, 300], "completion_mask": [0, 0, 1]}, 300),
        ({"input_ids": [259, 6, 7], "labels": [-100, -100, 7]}, 259),
        ({"input_ids": [5, -1, 7], "completion_mask": [0, 0, 1]}, -1),
        ({"prompt_ids": [5], "response_ids": [6, 270]}, 270),
    ],
)
def test_rows_with_ids_that_the_models_or_the_tokenizer_lack_are_named(tmp_path, row, found):
    good = {name: [5, 6, 7][: len(ids)] for name, ids in row.items()} | {k: v for k, v in row.items() if "mask" in k}
    good |= {"labels": [-100, -100, 7]} if "labels" in row else {}
    for size in (259, 280):  # the head may be padded beyond the tokenizer
        pair = {"model": tiny_model(seed=1, vocab_size=size), "teacher": tiny_model(seed=2, vocab_size=size)}
        with pytest.raises(ValueError, match=f"1 of 2 rows of the train data set hold ids .*Row 1. .*the id {found};"):
            make_trainer(tmp_path, [good, row], rollout="dataset", **pair)
    assert len(make_trainer(tmp_path, [good, good], rollout="dataset").train_dataset) == 2


def test_a_text_with_a_token_that_was_added_to_the_tokenizer_alone_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "<tool>4"}]
    with pytest.raises(ValueError, match="1 of 2 rows .*Row 1. .*the id 259; the last that can be used is 258"):
        make_trainer(tmp_path, rows, processing_class=tokenizer, rollout="dataset")
