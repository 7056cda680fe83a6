"""One row to ids: what belongs to the prompt, what to the response, on templates and tokenizers that make it hard."""

from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BOS, CHATML, EOS, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from skd_trl.data.row_rules import RowRules
from skd_trl.data.tokenization import tokenize_row


QUESTION = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
# Prints `<think>` before an answer to come, and nothing before a written one.
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without a pre-tokenizer that splits: merges cross spaces, newlines and the prompt's end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    texts = ["It is 4.\n\nThe end", "Hello world, hello", "<think>\n\n</think>\n\nIt is"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|pad|>", EOS, BOS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token=EOS, chat_template=CHATML)


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece does in Llama 2: every text that is tokenized on its own starts with a space mark."""
    letters = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(letters)}
    merges = [("▁", "w"), ("l", "o"), ("▁", "a")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tokenize(row, tokenizer=None, formatting_func=None, **changes):
    tokenizer = tokenizer or byte_tokenizer()
    settings = {
        "max_prompt_length": None,
        "max_response_length": None,
        "needs_response": False,
        "eos_token_ids": (tokenizer.eos_token_id,),
    }
    rules = RowRules(**(settings | changes))
    (result,) = tokenize_row(row, tokenizer=tokenizer, rules=rules, formatting_func=formatting_func)
    return result


def texts(row, tokenizer=None, **changes) -> tuple[str, str]:
    tokenizer = tokenizer or byte_tokenizer()
    result = tokenize(row, tokenizer, **changes)
    assert result["problem"] == "", result["detail"]
    return tokenizer.decode(result["prompt_ids"]), tokenizer.decode(result["response_ids"])


CHAT_PROMPT = f"{BOS}user\nWhat is 2+2?{EOS}\n{BOS}assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"conversations": [{"from": "user", "value": "What is 2+2?"}, {"from": "assistant", "value": "It is 4."}]},
        {"messages": [QUESTION, ANSWER], "prompt": "the text form beside it", "prompt_id": "7"},
    ],
    ids=["messages", "prompt_completion", "from_value", "messages_and_text"],
)
def test_every_chat_form_gives_the_inference_prompt_and_an_answer_that_ends_at_its_end_token(row):
    assert texts(row) == (CHAT_PROMPT, f"It is 4.{EOS}")  # and not the newline that ChatML prints after it


def test_the_prompt_is_what_apply_chat_template_hands_the_model_at_inference():
    tokenizer = byte_tokenizer()
    at_inference = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True)["input_ids"]
    assert tokenize({"messages": [QUESTION, ANSWER]})["prompt_ids"] == at_inference


def test_only_the_last_assistant_turn_is_the_reference():
    prompt, response = texts({"messages": [QUESTION, ANSWER, {"role": "user", "content": "Sure?"}, ANSWER]})
    assert prompt.count("It is 4.") == 1 and prompt.endswith(f"Sure?{EOS}\n{BOS}assistant\n")
    assert response == f"It is 4.{EOS}"


def test_a_conversation_that_ends_with_the_user_is_a_prompt_alone():
    assert texts({"messages": [QUESTION]}) == (CHAT_PROMPT, "")
    assert texts({"prompt": [QUESTION]}) == (CHAT_PROMPT, "")


def test_a_prompt_that_ends_with_the_assistant_is_the_start_of_its_answer():
    assert texts({"prompt": [QUESTION, {"role": "assistant", "content": "It is"}]}) == (CHAT_PROMPT + "It is", "")


BEGUN = {"prompt": [QUESTION, {"role": "assistant", "content": "It is"}]}


def test_a_completion_continues_a_prompt_that_ends_with_the_assistant():
    row = {**BEGUN, "completion": [{"role": "assistant", "content": " 4."}]}
    assert texts(row) == (texts(BEGUN)[0], f" 4.{EOS}")
    assert texts({**row, "privileged_context": "X"}) == texts(row)
    read = byte_tokenizer().decode(tokenize({**row, "privileged_context": "X"})["teacher_prompt_ids"])
    assert read == texts(BEGUN)[0].replace("2+2?", "2+2?\n\nX")
    assert texts({**row, "completion": [{**row["completion"][0], "weight": 0}]}) == texts(BEGUN)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen2_5", "deepseek_r1_distill", "gemma3", "gemma4_v5"])
def test_real_templates_let_a_completion_continue_the_prompt_that_is_sampled_from(name):
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = trl_template(name)
    result = tokenize({**BEGUN, "completion": [{"role": "assistant", "content": " 4."}]}, tokenizer)
    assert result["prompt_ids"] == tokenize(BEGUN, tokenizer)["prompt_ids"]
    assert tokenizer.decode(result["prompt_ids"]).endswith("It is")
    assert tokenizer.decode(result["response_ids"]).startswith(" 4.")


def test_a_template_that_trims_leaves_the_space_to_the_response():
    trimming = byte_tokenizer(CHATML.replace("m['content']", "m['content'] | trim"))
    assert trimming.chat_template != CHATML
    row = {"prompt": [QUESTION, {"role": "assistant", "content": "It is "}]}
    assert texts(row, trimming)[0].endswith("assistant\nIt is")
    row["completion"] = [{"role": "assistant", "content": "4."}]
    assert texts(row, trimming) == (CHAT_PROMPT + "It is", f" 4.{EOS}")


def test_a_beginning_that_the_template_renders_otherwise_once_it_goes_on_is_refused():
    reversing = byte_tokenizer(CHATML.replace("m['content']", "m['content'] | replace('is 4', 'equals 4')"))
    row = {**BEGUN, "completion": [{"role": "assistant", "content": " 4."}]}
    result = tokenize(row, reversing)
    assert result["problem"] == "unreadable" and "ends with the beginning of an answer" in result["detail"]


def test_a_call_of_a_tool_is_over_and_two_answers_in_a_row_are_two_turns():
    called = {"role": "assistant", "content": "I ask.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    for row in (
        {"prompt": [QUESTION, called]},
        {"prompt": [QUESTION, called], "completion": [ANSWER]},
        {"messages": [QUESTION, {"role": "assistant", "content": "I ask."}, ANSWER]},
        {"messages": [QUESTION, {"role": "assistant", "content": "I ask."}, {**ANSWER, "weight": 0}]},
    ):
        assert texts(row)[0] == f"{CHAT_PROMPT}I ask.{EOS}\n{BOS}assistant\n"


def test_plain_text_gets_one_end_token_like_in_sfttrainer():
    assert texts({"prompt": "2+2=", "completion": "4"}) == ("2+2=", f"4{EOS}")
    assert texts({"prompt": "2+2=", "completion": f"4{EOS}"}) == ("2+2=", f"4{EOS}")
    assert texts({"prompt": "2+2="}) == ("2+2=", "")


def test_a_text_that_brings_its_bos_does_not_get_a_second_one():
    tokenizer = prefix_space_tokenizer()
    for prompt in ("what", "<s>what"):
        assert tokenize({"prompt": prompt, "completion": "lo"}, tokenizer)["prompt_ids"].count(1) == 1


def test_a_chat_template_that_prints_bos_gives_one_bos():
    tokenizer = prefix_space_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    result = tokenize({"messages": [QUESTION, ANSWER]}, tokenizer)
    assert result["prompt_ids"].count(1) == 1 and 1 not in result["response_ids"]


def test_a_tokenizer_that_adds_its_end_token_does_not_close_the_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    assert texts({"prompt": "2+2=", "completion": "4"}, tokenizer) == ("2+2=", f"4{EOS}")


def test_tokens_that_merge_across_the_boundary_are_split_there_and_noted():
    tokenizer = merging_tokenizer()
    prompt, response = "Hello wor", "ld, hello"
    merged = tokenizer(prompt + response)["input_ids"]
    alone = tokenizer(prompt)["input_ids"]
    assert merged[: len(alone)] != alone  # else this test shows nothing
    result = tokenize({"prompt": prompt, "completion": response}, tokenizer)
    assert result["notes"] == ["merged"] and result["prompt_ids"] == alone
    assert tokenizer.decode(result["response_ids"]) == response + EOS


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1, max_size=12), response=st.text(min_size=1, max_size=12))
def test_prompt_and_response_ids_decode_to_the_text_whatever_it_is(prompt, response):
    for tokenizer in (merging_tokenizer_once, byte_tokenizer_once):
        expected = tokenizer.decode(tokenizer(prompt)["input_ids"]), response + EOS
        assert texts({"prompt": prompt, "completion": response}, tokenizer) == expected


merging_tokenizer_once, byte_tokenizer_once = merging_tokenizer(), byte_tokenizer()


def test_a_response_split_off_by_a_merge_gets_no_space_from_a_prefix_space_tokenizer():
    tokenizer = prefix_space_tokenizer()
    result = tokenize({"prompt": "hel", "completion": "o"}, tokenizer)
    assert result["notes"] == ["merged"]  # "lo" is one token
    assert tokenizer.decode(result["prompt_ids"] + result["response_ids"]).replace("<s>", "").strip() == "helo</s>"


def test_a_generation_prompt_that_is_no_prefix_stays_the_prompt_and_the_answer_stays_whole():
    tokenizer = byte_tokenizer(THINKING)
    row = {"messages": [QUESTION, ANSWER]}
    assert texts(row, tokenizer) == (CHAT_PROMPT + "<think>\n", f"It is 4.{EOS}")
    assert tokenize(row, tokenizer)["notes"] == ["not_prefix"]


def test_an_answer_that_begins_like_the_generation_prompt_goes_on_loses_nothing():
    answer = {"role": "assistant", "content": "<th>4</th>"}
    assert texts({"messages": [QUESTION, answer]}, byte_tokenizer(THINKING))[1] == f"<th>4</th>{EOS}"


def test_a_history_that_reads_differently_once_answered_never_enters_the_response():
    # Mistral's templates print the system prompt into the last user turn only while it is last.
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% if loop.last %}Be brief. {% endif %}"
        "{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    prompt, response = texts({"messages": [QUESTION, ANSWER]}, byte_tokenizer(template))
    assert (prompt, response) == ("[INST]Be brief. What is 2+2?[/INST]", f"It is 4.{EOS}")


def trl_template(name: str) -> str:
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {name} template")
    return path.read_text()


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["thinking", "no_thinking"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen2_5", "deepseek_r1_distill", "gemma3", "gemma4_v5"])
def test_no_real_template_leaks_its_answer_into_the_prompt_or_loses_a_piece(name, kwargs):
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = trl_template(name)
    at_inference = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, **kwargs)["input_ids"]
    result = tokenize({"messages": [QUESTION, ANSWER]}, tokenizer, chat_template_kwargs=kwargs)
    assert result["problem"] == "" and result["prompt_ids"] == at_inference
    response = tokenizer.decode(result["response_ids"])
    assert "It is 4." in response and "2+2" not in response
    rendered = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False, **kwargs)
    if "not_prefix" not in result["notes"]:
        assert rendered.startswith(tokenizer.decode(result["prompt_ids"]) + response)


def test_an_empty_reasoning_block_before_the_answer_is_noted_unless_the_prompt_has_it():
    tokenizer = byte_tokenizer(trl_template("qwen3"))
    row = {"messages": [QUESTION, ANSWER]}
    assert tokenize(row, tokenizer)["notes"] == ["empty_reasoning"]
    assert tokenize(row, tokenizer, chat_template_kwargs={"enable_thinking": False})["notes"] == []
    with_reasoning = {"role": "assistant", "content": "<think>\nTwo twos.\n</think>\n\nIt is 4."}
    assert tokenize({"messages": [QUESTION, with_reasoning]}, tokenizer)["notes"] == []


def test_chat_template_kwargs_reach_the_template_and_a_rows_own_go_before_them():
    tokenizer = byte_tokenizer("{{ mood }}{{ style }}|" + CHATML)
    row = {"messages": [QUESTION], "chat_template_kwargs": {"mood": "glad ", "other": None}}
    assert texts(row, tokenizer, chat_template_kwargs={"mood": "sad ", "style": "terse"})[0].startswith("glad terse|")


@pytest.mark.parametrize("tools", ['[{"name": "add"}]', [{"name": "add", "unset": None}]], ids=["json", "list"])
def test_tools_reach_the_template(tools):
    tokenizer = byte_tokenizer("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML)
    assert texts({"messages": [QUESTION], "tools": tools}, tokenizer)[0].startswith('{"name": "add"}')


def test_keys_that_arrow_filled_with_none_are_not_shown_to_the_template():
    tokenizer = byte_tokenizer(CHATML + "{{ 'tool_calls' in messages[0] }}")
    assert texts({"messages": [{**QUESTION, "tool_calls": None}]}, tokenizer)[0].endswith("False")


def test_assistant_masks_of_tokenized_rows_are_read_as_trl_reads_them():
    ids = [5, 6, 7, 8, 9, 10]
    found = tokenize({"input_ids": ids, "assistant_masks": [0, 1, 0, 0, 1, 1]})
    assert (found["prompt_ids"], found["response_ids"]) == ([5, 6, 7, 8], [9, 10])
    both = {"input_ids": ids, "assistant_masks": [0, 1, 0, 1, 1, 0], "completion_mask": [0, 0, 0, 0, 1, 1]}
    found = tokenize(both)
    assert (found["prompt_ids"], found["response_ids"]) == ([5, 6, 7, 8], [9])
    assert tokenize({"input_ids": ids, "assistant_masks": [0, 1]})["problem"] == "unreadable"
    for mask in ([0, 1], [0, 0, 0, 0, 1, 1, 1]):
        assert tokenize({**both, "completion_mask": mask})["problem"] == "unreadable"


@pytest.mark.parametrize("mask", ["completion_mask", "labels"])
def test_rows_that_trl_tokenized_split_at_their_mask(mask):
    eos = byte_tokenizer().eos_token_id
    column = [0, 0, 0, 1, 1] if mask == "completion_mask" else [-100, -100, -100, 8, eos]
    result = tokenize({"input_ids": [5, 6, 7, 8, eos], mask: column})
    assert (result["prompt_ids"], result["response_ids"]) == ([5, 6, 7], [8, eos])


def test_a_tokenized_row_of_several_turns_keeps_its_last_as_the_response_and_drops_padding():
    result = tokenize({"input_ids": [5, 6, 7, 8, 9, 0], "completion_mask": [0, 1, 0, 1, 1, 0]})
    assert (result["prompt_ids"], result["response_ids"]) == ([5, 6, 7], [8, 9])


def test_prepared_rows_come_out_as_they_went_in():
    for limit in (None, 3):  # a cut response has no end token, and is not blamed for it twice
        first = tokenize({"messages": [QUESTION, ANSWER]}, max_response_length=limit)
        again = tokenize({key: first[key] for key in ("prompt_ids", "response_ids")}, max_response_length=limit)
        assert again == first | {"notes": []}


def test_the_response_stops_at_the_end_token_of_either_model():
    ids = byte_tokenizer()("4\n")["input_ids"]
    row = {"input_ids": [5, *ids, 257], "completion_mask": [0, 1, 1, 1]}
    assert tokenize(row, eos_token_ids=(257, ids[1]))["response_ids"] == ids


def test_text_after_the_first_end_token_is_left_out_and_noted():
    result = tokenize({"prompt": "2+2=", "completion": f"4{EOS} and more"})
    assert byte_tokenizer().decode(result["response_ids"]) == f"4{EOS}" and result["notes"] == ["early_eos"]


def test_a_template_whose_turns_close_with_no_end_token_is_noted():
    tokenizer = byte_tokenizer(CHATML.replace(EOS, "<end>"))
    assert tokenize({"messages": [QUESTION, ANSWER]}, tokenizer)["notes"] == ["no_eos"]


def test_a_long_response_is_cut_without_an_end_token_and_the_prompt_stays_whole():
    result = tokenize({"prompt": "2+2=", "completion": "four"}, max_response_length=3)
    assert byte_tokenizer().decode(result["response_ids"]) == "fou" and result["notes"] == ["cut_response"]
    assert tokenize({"prompt": "2+2=", "completion": "four"}, max_response_length=5)["notes"] == []


def test_a_prompt_over_its_limit_is_unusable_and_one_at_its_limit_is_not():
    assert tokenize({"prompt": "2+2="}, max_prompt_length=3)["problem"] == "long_prompt"
    assert tokenize({"prompt": "2+2="}, max_prompt_length=4)["problem"] == ""


FILLED = {
    "prepared": {"prompt_ids": [7, 8], "response_ids": [9]},
    "tokenized": {"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1]},
    "messages": {"messages": [QUESTION, ANSWER]},
    "conversations": {"conversations": [{"from": "user", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
    "pair": {"prompt": [QUESTION], "completion": [ANSWER]},
    "text": {"prompt": "2+2=", "completion": "4"},
}


@pytest.mark.parametrize("form", FILLED)
def test_a_row_of_concatenated_data_sets_is_read_from_the_columns_that_are_not_null(form):
    others = {name: None for row in FILLED.values() for name in row}
    for needs_response in (False, True):
        expected = tokenize(FILLED[form], needs_response=needs_response)
        assert expected["problem"] == "" and expected["response_ids"]
        assert tokenize({**others, **FILLED[form]}, needs_response=needs_response) == expected
    assert tokenize(others)["problem"] == "no_prompt"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": None}, "no_prompt"),
        ({"messages": [], "prompt": "2+2="}, "no_prompt"),
        ({"prompt": ""}, "no_prompt"),
        ({"prompt": None, "completion": [ANSWER]}, "no_prompt"),
        ({"prompt": [], "completion": [ANSWER]}, "no_prompt"),
        ({"messages": None}, "no_prompt"),
        ({"messages": []}, "no_prompt"),
        ({"messages": [ANSWER]}, "no_prompt"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "no_prompt"),
        ({"conversations": None}, "no_prompt"),
        ({"input_ids": [], "completion_mask": []}, "no_prompt"),
        ({"input_ids": [7, 8], "completion_mask": [1, 1]}, "no_prompt"),
        ({"prompt_ids": None, "response_ids": None}, "no_prompt"),
        ({"messages": ["What is 2+2?"]}, "unreadable"),
        ({"prompt": [QUESTION], "completion": "It is 4."}, "unreadable"),
        ({"prompt": "2+2=", "completion": [ANSWER]}, "unreadable"),
        ({"prompt": 4}, "unreadable"),
        ({"input_ids": [7, 8], "completion_mask": [1]}, "unreadable"),
        ({"messages": [QUESTION], "tools": "{not json"}, "unreadable"),
        ({"text": "2+2=4"}, "form"),
        ({"input_ids": [7, 8]}, "form"),
        ({"messages": [QUESTION], "images": []}, "form"),
    ],
)
def test_an_unusable_row_says_which_kind_it_is(row, problem):
    result = tokenize(row)
    assert result["problem"] == problem and result["detail"] and result["prompt_ids"] == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [QUESTION]}, "no_response"),
        ({"messages": [QUESTION, {"role": "assistant", "content": ""}]}, "no_response"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "no_response"),
        ({"prompt": "2+2=", "completion": ""}, "no_response"),
        ({"prompt": "2+2=", "completion": None}, "no_response"),
        ({"prompt": "2+2="}, "form"),
        ({"input_ids": [7, 8], "completion_mask": [0, 0]}, "no_response"),
    ],
)
def test_a_row_without_a_reference_is_unusable_only_where_references_are_needed(row, problem):
    assert tokenize(row, needs_response=True)["problem"] == problem
    assert tokenize(row)["problem"] == ""


def test_a_template_that_refuses_a_conversation_names_its_reason():
    tokenizer = byte_tokenizer("{{ raise_exception('roles must alternate') }}")
    result = tokenize({"messages": [QUESTION]}, tokenizer)
    assert result["problem"] == "unreadable" and "roles must alternate" in result["detail"]


def test_a_conversation_for_a_tokenizer_without_a_template_says_what_to_set():
    result = tokenize({"messages": [QUESTION]}, byte_tokenizer(chat_template=None))
    assert result["problem"] == "form" and "chat_template" in result["detail"]


def test_a_formatting_func_gives_rows_and_a_text_is_refused():
    row = {"question": "2+2=", "answer": "4"}
    made = tokenize(row, formatting_func=lambda row: {"prompt": row["question"], "completion": row["answer"]})
    assert byte_tokenizer().decode(made["response_ids"]) == f"4{EOS}"
    refused = tokenize(row, formatting_func=lambda row: row["question"] + row["answer"])
    assert refused["problem"] == "form" and "formatting_func" in refused["detail"]


def test_the_rows_of_the_caller_are_not_changed():
    row = {"conversations": [{"from": "user", "value": "What is 2+2?"}]}
    tokenize(row)
    assert row == {"conversations": [{"from": "user", "value": "What is 2+2?"}]}
