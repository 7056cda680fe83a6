"""Templates that print less than a row holds: nothing of an answer is lost without a word."""

import itertools
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import prepare
from test_tokenization import ANSWER, QUESTION, THINKING, texts, tokenize, trl_template
from tiny import BOS, CHATML, EOS, byte_tokenizer

from skd_trl.data.conversations import as_text
from skd_trl.data.row_rules import RowRules
from skd_trl.data.templates import habits_of, missing_from
from skd_trl.data.tokenization import tokenize_row


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "two", "b": 2}}}
STRIPS = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
FIELDS = CHATML.replace("{{ m['content'] }}", "<think>{{ m['reasoning_content'] }}</think>{{ m['content'] }}")
TRIMS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")


def answer(content, **others):
    return {"role": "assistant", "content": content, **others}


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (CHATML, answer(None, tool_calls=[CALL])),
        (TRIMS, answer(None, tool_calls=[CALL])),
        (CHATML, answer("", tool_calls=[CALL])),
        (CHATML, answer(None, reasoning_content="Two twos.")),
        (CHATML, answer("", thinking="Two twos.")),
        (STRIPS, answer("<think>Two twos.</think>")),
    ],
)
def test_an_answer_of_which_nothing_is_printed_is_refused_and_where_it_is_sampled_noted(template, lost):
    row = {"messages": [QUESTION, lost]}
    refused = tokenize(row, byte_tokenizer(template), needs_response=True)
    assert refused["problem"] == "lost_answer" and ("calls" in refused["detail"] or "reasoning" in refused["detail"])
    sampled = tokenize(row, byte_tokenizer(template))
    assert (
        sampled["problem"] == "" and sampled["response_ids"] == [] and sampled["notes"] == ["lost_answer", "to_sample"]
    )
    with pytest.raises(ValueError, match="1 of 2 rows .*prints nothing.*Row 1"):
        prepare(
            [{"messages": [QUESTION, ANSWER]}, row],
            byte_tokenizer(template),
            needs_response=True,
            max_prompt_length=99,
        )


@pytest.mark.parametrize(
    ("template", "given", "note"),
    [
        (STRIPS, answer("<think>Two twos.</think>It is 4."), "lost_reasoning"),
        (STRIPS, answer("Two twos.</think>It is 4."), "lost_reasoning"),
        (THINKING, answer("It is 4.", reasoning_content="Two twos."), "lost_reasoning"),
        (CHATML, answer("It is 4.", reasoning="Two twos."), "lost_reasoning"),
        (CHATML, answer("It is 4.", tool_calls=[CALL]), "lost_calls"),
        (
            CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('!')[0] }}"),
            answer("It is 4.!!! Really."),
            "lost_text",
        ),
    ],
)
def test_what_is_missing_of_an_answer_is_named(template, given, note):
    row = {"messages": [QUESTION, given]}
    assert tokenize(row, byte_tokenizer(template))["notes"] == [note]
    assert texts(row, byte_tokenizer(template))[1].startswith("It is 4.")


@pytest.mark.parametrize(
    ("template", "given"),
    [
        (CHATML, answer("<think>\nTwo twos.\n</think>\n\nIt is 4.")),
        (FIELDS, answer("It is 4.", reasoning_content="Two\n twos.")),
        (TRIMS, answer("  It is 4. \n")),
        (CHATML, answer("x = '<a>' if \"b\" else {'é': 1}")),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}"), answer('é "quoted"\n\\ and a tab\t')),
    ],
)
def test_nothing_is_noted_where_all_of_it_is_printed(template, given):
    assert tokenize({"messages": [QUESTION, given]}, byte_tokenizer(template))["notes"] == []


def test_reasoning_that_a_real_template_strips_is_noted_once_and_not_asked_for():
    row = {"messages": [QUESTION, answer("<think>Two twos.</think>It is 4.")]}
    tokenizer = byte_tokenizer(trl_template("deepseek_r1_distill"))
    result = tokenize(row, tokenizer)
    assert "lost_reasoning" in result["notes"] and not {"not_prefix", "empty_reasoning"} & set(result["notes"])
    assert "Two twos" not in tokenizer.decode(result["response_ids"])


def test_calls_beside_a_null_content_are_the_label_where_the_template_prints_them():
    row = {"messages": [QUESTION, answer(None, tool_calls=[CALL])]}
    response = texts(row, byte_tokenizer(trl_template("qwen2_5")))[1]
    assert response == f'\n<tool_call>\n{{"name": "add", "arguments": {{"a": "two", "b": 2}}}}\n</tool_call>{EOS}'[1:]
    assert tokenize(row, byte_tokenizer(trl_template("qwen2_5")))["notes"] == []


IN_TEXT = {**CALL, "function": {**CALL["function"], "arguments": '{"a":"two","b":2}'}}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qwen2_5", "dict"),
        ("qwen3", "either"),
        ("qwen3_5_think", "dict"),
        ("llama3_1", "dict"),
        ("gptoss", "dict"),
        ("gemma4_v5", "dict"),
        ("deepseekv3", "text"),
        ("llama3", "either"),
    ],
)
def test_real_templates_are_given_arguments_of_calls_as_they_want_them(name, arguments):
    tokenizer = byte_tokenizer(trl_template(name))
    tokenizer.bos_token = BOS
    assert habits_of(tokenizer, tokenizer.chat_template).arguments == arguments
    if name == "llama3":  # knows no calls
        return
    as_dict, as_text = (
        tokenize({"messages": [QUESTION, answer(None, tool_calls=[call])]}, tokenizer) for call in (CALL, IN_TEXT)
    )
    responses = [tokenizer.decode(result["response_ids"]) for result in (as_dict, as_text)]
    assert not {"lost_calls", "lost_answer"} & {*as_dict["notes"], *as_text["notes"]}
    for response in responses:
        assert "two" in response and '\\"' not in response and "'a'" not in response
    if arguments == "dict":
        assert responses[0] == responses[1]
    else:  # the text as it is given
        assert [json.loads(re.search(r'{"a".*?}', response)[0]) for response in responses] == [
            {"a": "two", "b": 2}
        ] * 2


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("{{ c['function']['arguments'] | tojson }}", '{"a": "two", "b": 2}'),
        ("{{ c['function']['arguments'] + '' }}", '{"a": "two", "b": 2}'),
        ("{{ c['function']['arguments'] }}", '{"a": "two", "b": 2}'),
        ("{% for k, v in c['function']['arguments'].items() %}{{ k }}={{ v }};{% endfor %}", "a=two;b=2;"),
    ],
)
def test_a_call_is_printed_alike_from_a_dict_and_from_text_and_never_as_python(printed, expected):
    calls = "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}" + printed + "{% endfor %}"
    tokenizer = byte_tokenizer(CHATML.replace("{{ m['content'] }}", calls))
    for call in (CALL, IN_TEXT):
        row = {"messages": [QUESTION, answer(None, tool_calls=[call])]}
        assert (
            texts(row, tokenizer)[1].replace('":"', '": "').replace('","', '", "').replace('":2', '": 2')
            == expected + EOS
        )


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_calls_beside_a_null_content_are_printed_or_lost_by_name_where_the_template_fails_on_null(name):
    row = {"messages": [QUESTION, answer(None, tool_calls=[CALL])]}
    result = tokenize(row, byte_tokenizer(trl_template(name)), needs_response=True)
    if (
        name == "deepseek_r1_distill" and result["problem"]
    ):  # prints calls beside a null that reaches it: not in all transformers
        assert result["problem"] == "lost_answer" and "calls of tools" in result["detail"]
    else:
        assert '{"a": "two", "b": 2}' in byte_tokenizer().decode(result["response_ids"])


@pytest.mark.parametrize("template", [CHATML, TRIMS])
def test_a_null_content_before_the_answer_is_not_printed_as_the_word(template):
    history = [QUESTION, answer(None, tool_calls=[CALL]), {"role": "user", "content": None}]
    prompt, _ = texts({"messages": [*history, ANSWER]}, byte_tokenizer(template))
    assert "None" not in prompt and f"{BOS}user\n{EOS}" in prompt


def test_a_turn_or_tools_that_the_template_leaves_out_of_the_prompt_are_noted():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ('user', 'assistant') %}")
    for other in ({"role": "tool", "content": "4"}, {"role": "system", "content": "Be brief."}):
        assert tokenize({"messages": [other, QUESTION, ANSWER]}, byte_tokenizer(silent))["notes"] == ["lost_turn"]
    row = {"messages": [QUESTION, ANSWER], "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert tokenize(row, byte_tokenizer())["notes"] == ["lost_tools"]
    assert tokenize(row, byte_tokenizer("{{ tools | tojson }}" + CHATML))["notes"] == []


def test_reasoning_of_earlier_turns_may_be_left_out():
    row = {"messages": [QUESTION, answer("<think>Two.</think>Four."), {"role": "user", "content": "Sure?"}, ANSWER]}
    assert tokenize(row, byte_tokenizer(STRIPS))["notes"] == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen2_5", "joined"),
        ("qwen3", "joined"),
        ("llama3", "joined"),
        ("gemma3", "joined"),
        ("smolvlm", "needed"),
        ("qwen2_5_vl", "joined"),
    ],
)
def test_real_templates_are_given_contents_as_they_want_them(name, parts):
    tokenizer = byte_tokenizer(trl_template(name))
    tokenizer.bos_token = BOS  # llama3's template prints one
    assert habits_of(tokenizer, tokenizer.chat_template).parts == parts
    for content in ("What is 2+2?", [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]):
        prompt, response = texts({"messages": [{"role": "user", "content": content}, ANSWER]}, tokenizer)
        assert "What is 2+2?" in prompt and "{'type'" not in prompt and "It is 4." in response


def test_texts_are_found_in_json_and_apart_from_white_space():
    assert missing_from('say "a\\nb"', {"text": ["a\nb"]}) == set()
    assert missing_from("caf\\u00e9", {"text": ["café"]}) == set()
    assert missing_from("a", {"text": ["a", "b"], "calls": ["a"]}) == {"text"}


NAMES = (
    "chatml", "qwen2_5", "qwen3", "qwen3_5_think", "llama3", "llama3_1", "gemma3", "phi3", "deepseek_r1_distill", "glm4moe",
    "smolvlm", "qwen2_5_vl",
)  # fmt: skip
WORDS = st.sampled_from(["alpha", "be ta", " gamma\n", "<b>", 'd"e', "é🙂", ""])
LOST = {"lost_answer", "lost_reasoning", "lost_calls", "lost_text", "lost_turn", "lost_tools"}


@st.composite
def conversations(draw):
    """Turns of all roles, contents in texts, parts and nulls, reasoning and calls. Each text is unlike any other."""
    numbers = itertools.count(100)

    def content(role):
        text = f"{draw(WORDS)}{role}{next(numbers)}{draw(WORDS)}"
        kind = draw(st.sampled_from(["text", "text", "text", "parts", "null", "reasoning"]))
        if kind == "parts":
            return [{"type": "text", "text": text}, {"type": "text", "text": f"part{next(numbers)}"}]
        reasoning = (
            f"<think>\nthought{next(numbers)}\n</think>\n\n" if kind == "reasoning" and role == "assistant" else ""
        )
        return None if kind == "null" else reasoning + text

    turns = [{"role": "system", "content": content("system")}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": content("user")}, {"role": "assistant", "content": content("assistant")}]
        if draw(st.integers(0, 3)) == 0:
            name = f"call{next(numbers)}"
            arguments = {"x": name + "x"}
            function = {"name": name, "arguments": draw(st.sampled_from([arguments, json.dumps(arguments)]))}
            calls = [{"type": "function", "function": function}]
            form = draw(st.sampled_from(["list", "text", "older"]))
            turns[-1]["function_call" if form == "older" else "tool_calls"] = {
                "list": calls,
                "text": json.dumps(calls),
                "older": function,
            }[form]
            if draw(st.booleans()):
                turns += [
                    {"role": "tool", "content": content("tool")},
                    {"role": "assistant", "content": content("assistant")},
                ]
    return turns


def test_a_tools_answer_in_parts_is_text_also_where_the_template_prints_such_parts_as_python():
    parts = [{"type": "text", "text": "4 is "}, {"type": "text", "text": "it."}]
    turns = [QUESTION, {"role": "tool", "content": parts}, ANSWER]
    tokenizer = template_tokenizer("glm4moe")
    (result,) = tokenize_row(
        {"messages": turns}, tokenizer=tokenizer, rules=RowRules(None, None, True, (tokenizer.eos_token_id,))
    )
    prompt = tokenizer.decode(result["prompt_ids"])
    assert "4 is it." in prompt and "'text'" not in prompt


def template_tokenizer(name):
    tokenizer = byte_tokenizer(CHATML if name == "chatml" else trl_template(name))
    tokenizer.bos_token = BOS
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(turns=conversations(), kind=st.sampled_from(["messages", "completion", "every"]))
def test_every_row_is_rendered_whole_or_refused_or_counted_by_name(name, turns, kind):
    tokenizer = template_tokenizer(name)
    row = {"messages": turns}
    if kind == "completion":
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        row = {"prompt": turns[:first], "completion": turns[first:]}
    rules = RowRules(None, None, True, (tokenizer.eos_token_id,), every_answer=kind == "every")
    results = tokenize_row(row, tokenizer=tokenizer, rules=rules)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    chosen = {"messages": answers[-1:], "completion": answers[:1], "every": answers}[kind]
    if len(results) != len(chosen):  # refused as a whole, or answers with nothing before them
        assert all(result["detail"] for result in results) or kind == "every"
        return
    for index, result in zip(chosen, results, strict=True):
        if result["problem"]:
            assert result["problem"] in ("unreadable", "lost_answer", "no_response", "no_prompt") and result["detail"]
            continue
        check_row(turns[:index], turns[index], result, tokenizer)


def check_row(history, answer, result, tokenizer):
    prompt, response = (squeezed(tokenizer.decode(result[key])) for key in ("prompt_ids", "response_ids"))
    notes = set(result["notes"])
    text = as_text(answer["content"]).rpartition("</think>")
    pieces = {"lost_text": text[2], "lost_reasoning": text[0].replace("<think>", "")}
    calls = answer.get("tool_calls") or [{"function": answer[key]} for key in ("function_call",) if key in answer]
    calls = json.loads(calls) if isinstance(calls, str) else calls
    pieces["lost_calls"] = "".join(call["function"]["name"] for call in calls)
    for note, piece in pieces.items():
        assert note in notes or squeezed(piece) in response, (note, piece, response)
        assert not piece.strip() or squeezed(piece) not in prompt
    for turn in history:
        said = squeezed(as_text(turn["content"]).rpartition("</think>")[2])
        as_json = squeezed(json.dumps(as_text(turn["content"]).strip())[1:-1])  # how some print what a tool said
        assert said in prompt or as_json in prompt or "lost_turn" in notes
        assert said not in response or not said
    assert "{'type'" not in prompt + response and "None" not in prompt + response and "{'x'" not in prompt + response
    assert '\\"x\\"' not in prompt + response  # arguments that were JSON already
    shaped = [
        {**turn, "content": "" if turn["content"] is None else as_text(turn["content"])} for turn in [*history, answer]
    ]
    is_plain = all(not {"tool_calls", "function_call"} & turn.keys() and turn["content"] for turn in shaped)
    if (
        is_plain
        and not notes & {"not_prefix", *LOST}
        and habits_of(tokenizer, tokenizer.chat_template).parts != "needed"
    ):
        rendered = squeezed(tokenizer.apply_chat_template(shaped, tokenize=False))
        assert rendered.startswith(prompt + response)


def squeezed(text):
    return "".join(text.split())
