"""Evaluation: divergences, texts, metrics, the student as a draft model, intervals, before and after.

The plain computation beside each: one row, no padding, no cache, float64.
"""

import io
import json
import math
import random
import string
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from test_skd_trainer import ROWS, make_trainer
from tiny import byte_tokenizer, tiny_model
from transformers import GenerationConfig

from skd_trl import DIVERGENCES
from skd_trl.evaluation import bootstrap, callback, comparison, divergence, text_metrics
from skd_trl.evaluation.divergence import token_divergence
from skd_trl.evaluation.draft_model import Drafting, draft_acceptance, num_forwards
from skd_trl.evaluation.held_out import Decoding, HeldOut, held_out, prompt_text
from skd_trl.evaluation.scores import METRICS, Evaluation, Scores, evaluate, text_scores
from skd_trl.evaluation.texts import generate
from skd_trl.training.run_files import as_json


# Divergence


PROMPTS = [[40, 41, 42], list(range(50, 70)), [60] * 7, [80, 81]]
RESPONSES = [[100, 101], [102, 103, 104, 105], [106], [107, 108, 109]]


def decoding(batch_size: int = 2, max_new_tokens: int = 8, eos_token_ids: tuple[int, ...] = (257,)):
    return Decoding(max_new_tokens, batch_size, list(eos_token_ids), pad_token_id=256)


@torch.no_grad()
def expected_divergence(student, teacher, vocab_size: int, responses=RESPONSES) -> list[float]:
    """KL(teacher || student) summed over each response: one row at a time, float64."""
    sums = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([prompt + response])
        q, p = (
            model(ids).logits[0, len(prompt) - 1 : -1, :vocab_size].double().softmax(-1)
            for model in (student, teacher)
        )
        sums.append((p * (p.log() - q.log())).sum().item())
    return sums


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("batch_size, max_logits, chunk_size", [(1, 2**26, 128), (3, 2**26, 2), (4, 1, 3)])
def test_token_divergence_is_the_textbook_sum_however_it_is_cut(
    architecture, batch_size, max_logits, chunk_size, monkeypatch
):
    monkeypatch.setattr(divergence, "CHUNK_SIZE", chunk_size)
    student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    found = token_divergence(
        student, teacher, PROMPTS, RESPONSES, decoding=decoding(batch_size), max_logits=max_logits,
    )  # fmt: skip
    np.testing.assert_allclose(found[:, 0], expected_divergence(student, teacher, 259), rtol=1e-4)
    assert found[:, 1].tolist() == [len(response) for response in RESPONSES]


def test_token_divergence_compares_the_shared_range_of_padded_vocabularies():
    student, teacher = tiny_model(seed=1, vocab_size=264), tiny_model(seed=2, vocab_size=272)
    found = token_divergence(student, teacher, PROMPTS, RESPONSES, decoding=decoding())
    np.testing.assert_allclose(found[:, 0], expected_divergence(student, teacher, 264), rtol=1e-4)


def test_a_student_that_is_its_teacher_has_no_divergence():
    model = tiny_model()
    found = token_divergence(model, model, PROMPTS, RESPONSES, decoding=decoding())
    assert np.abs(found[:, 0]).max() < 1e-6


@torch.no_grad()
def test_greedy_texts_are_those_of_one_row_without_cache_and_end_with_their_end():
    model = tiny_model()
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 8:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(ids[len(prompt) :])
    end = expected[1][2]  # make a token that the second row writes an end of sequence
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in expected]
    model.train()
    found = generate(model, PROMPTS, decoding=decoding(eos_token_ids=(end,)))
    assert found == cut
    assert model.training


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.3},
        {"typical_p": 0.3},
        {"epsilon_cutoff": 0.03},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"suppress_tokens": list(range(40, 250))},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 5.0},
        {"forced_eos_token_id": 257},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"guidance_scale": 2.0},
        {"max_time": 1e-9},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_no_setting_of_a_models_generation_config_changes_its_texts(settings):
    model, ends = tiny_model(), decoding(eos_token_ids=(257, 100))

    def texts():
        return [generate(model, PROMPTS, decoding=ends, do_sample=do_sample) for do_sample in (False, True)]

    expected = texts()
    own = model.generation_config = GenerationConfig(**settings)
    assert texts() == expected
    assert model.generation_config is own


def test_a_model_and_what_it_wraps_keep_their_generation_configs_where_generation_fails_too():
    model = tiny_model()
    own = model.generation_config = GenerationConfig(min_p=0.3)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    expected = generate(tiny_model(), PROMPTS, decoding=decoding(), do_sample=True)
    assert generate(wrapped, PROMPTS, decoding=decoding(), do_sample=True) == expected
    assert model.generation_config is own and wrapped.generation_config is own
    with pytest.raises(IndexError):
        generate(wrapped, [[999]], decoding=decoding())
    assert model.generation_config is own and wrapped.generation_config is own


def test_samples_depend_on_the_seed_alone_and_leave_the_global_generator_as_it_was():
    model = tiny_model()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (generate(model, PROMPTS, decoding=decoding(), do_sample=True) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert first != generate(model, PROMPTS, decoding=decoding())


@torch.no_grad()
def test_texts_are_of_the_first_ids_alone_in_the_shares_that_these_have_to_each_other():
    """One token after one prompt, 4,000 rows; four standard errors of a binomial: false alarm below 1e-4, and the seed is fixed."""
    model = tiny_model(vocab_size=300)
    shares = model(torch.tensor([PROMPTS[0]])).logits[0, -1, :259].softmax(-1)
    first = replace(decoding(4000, 1, ()), vocab_size=259)
    drawn = torch.tensor(generate(model, [PROMPTS[0]] * 4000, decoding=first, do_sample=True)).flatten()
    assert (
        drawn.max()
        < 259
        <= max(generate(model, [PROMPTS[0]] * 4000, decoding=decoding(4000, 1, ()), do_sample=True))[0]
    )
    top = shares.argmax()
    share = (drawn == top).double().mean().item()
    assert share == pytest.approx(shares[top].item(), abs=4 * math.sqrt(shares[top] * (1 - shares[top]) / 4000))
    assert generate(model, PROMPTS[:1], decoding=first) == [[top.item()]]


@pytest.mark.parametrize("sizes", [(259, 300), (300, 259)])
def test_a_student_is_compared_with_a_teacher_of_another_vocabulary_size(sizes):
    tokenizer = byte_tokenizer()
    student, teacher = (tiny_model(seed=seed, vocab_size=size) for seed, size in enumerate(sizes, start=1))
    ends = Decoding.of(tokenizer, student, teacher, 8, 2)
    answers = generate(teacher, PROMPTS, decoding=ends)
    data = HeldOut(PROMPTS, ["p"] * 4, [None] * 4)
    scores = evaluate(student, teacher, data, answers, evaluation=Evaluation(tokenizer, ends, {}, Drafting()))
    expected = expected_divergence(student, teacher, 259, answers)
    np.testing.assert_allclose(scores.values["kl_teacher_text"][:, 0], expected, rtol=1e-4)
    assert scores.values["kl_student_samples"][:, 1].min() > 0 and "draft_accepted_sampled" in scores.values


def test_a_trainer_scores_a_pair_of_two_vocabulary_sizes_before_its_first_step(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny_model(seed=1, vocab_size=300), teacher=tiny_model(seed=2))
    held = callback.HeldOutEvaluation(trainer, Dataset.from_list(ROWS), metrics=[])
    trainer.add_callback(held)
    trainer.train()
    assert held.before.means().keys() == {"kl_teacher_text", "kl_student_samples"}


def test_padding_is_with_an_id_that_both_models_have():
    """A padding token that was added to the tokenizer alone is read by no model, so it is none to pad with."""
    tokenizer, model = byte_tokenizer(), tiny_model()
    tokenizer.add_special_tokens({"pad_token": "<|added|>"})
    ends = Decoding.of(tokenizer, model, model, 4, 4)
    assert tokenizer.pad_token_id == 259 and ends.pad_token_id == tokenizer.eos_token_id
    assert len(generate(model, PROMPTS, decoding=ends)) == 4


def test_a_prompt_with_an_id_that_a_model_lacks_is_refused_by_its_row():
    rows = [{"input_ids": ids, "completion_mask": [0, 1]} for ids in ([40, 257], [258, 41])]
    with pytest.raises(ValueError, match="1 of 2 rows.*Row 1.*the id 258; the last that can be used is 257"):
        held_out(Dataset.from_list(rows), byte_tokenizer(), [257], num_ids=258)


# Metrics of texts


def shortness(predictions, targets):
    return [len(target) - len(prediction) for prediction, target in zip(predictions, targets, strict=True)]


def test_rouge_is_full_for_the_same_text_and_nothing_for_another():
    metrics = text_metrics.text_metrics(["rouge"])
    scores = text_metrics.scored(metrics, ["a small tool", "x y"], ["a small tool", "p q"], "reference")
    assert {name: values[:, 0].tolist() for name, values in scores.items()} == {
        f"rouge{kind}_reference": [100.0, 0.0] for kind in "12L"
    }


def test_rouge_of_english_is_that_of_rouge_score_itself():
    """Code, quotes, dashes and signs are what its tokenizer leaves out; 200 random texts of ASCII beside them."""
    texts = [
        "The generators were running; they'd run_fast, 3.5x (really!)",
        "“Don’t run” — generating x² ≤ 10€ • it’s fine…\n\tdef f(self_name): return A1B2",
        "the generator ran 35 times: run fast, really fine",
        "",
        "...",
    ]
    generator = random.Random(0)
    texts += ["".join(generator.choices(string.printable + "  aeiou", k=60)) for _ in range(200)]
    pairs = [(prediction, target) for prediction in texts[:5] for target in texts[:5]] + list(pairwise(texts))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = [scorer.score(target, prediction) for prediction, target in pairs]
    found = text_metrics.rouge([prediction for prediction, _ in pairs], [target for _, target in pairs])
    assert found == {kind: [100 * row[kind].fmeasure for row in expected] for kind in found}
    assert sum(0 < value < 100 for value in found["rouge1"]) > 50


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Столица России", ["столица", "россии"]),
        ("Größe, naïve", ["größe", "naïve"]),
        ("cafe\u0301", ["café"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("北京大学。", ["北", "京", "大", "学"]),
        ("データを見る", ["デ", "ー", "タ", "を", "見", "る"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("用Python写2行", ["用", "python", "写", "2", "行"]),
    ],
)
def test_rouge_knows_the_words_of_other_scripts(text, tokens):
    assert text_metrics.words(text, stem=str) == tokens
    assert text_metrics.rouge([text], [text])["rouge1"] == [pytest.approx(100)]
    assert text_metrics.rouge([text], ["другой 書"])["rouge1"] == [0]


def test_rouge_of_another_script_is_the_share_of_its_tokens_in_common():
    found = text_metrics.rouge(["北京大学"], ["北京"])
    assert found["rouge1"] == [pytest.approx(100 * 2 * 2 / (4 + 2))]
    assert found["rouge2"] == [pytest.approx(100 * 2 * 1 / (3 + 1))]


def test_a_metric_may_be_any_function_and_rows_without_a_reference_have_no_part_in_it():
    metrics = text_metrics.text_metrics([shortness, "exact_match"])
    scores = text_metrics.scored(metrics, ["a", "bb", "c"], ["abc", None, "c"], "reference")
    assert scores["shortness_reference"].tolist() == [[2, 1], [0, 0], [0, 1]]
    assert scores["exact_match_reference"].tolist() == [[0, 1], [0, 0], [100, 1]]
    assert text_metrics.scored(metrics, ["a"], [None], "reference") == {}
    assert text_metrics.text_metrics(["test_evaluation:shortness"])["shortness"](["a"], ["abc"]) == [2]


@pytest.mark.parametrize(
    "name, message",
    [
        ("bleu", "unknown; choose one of rouge, exact_match"),
        ("nowhere:f", "cannot be imported"),
        ("math:pi", "of type float"),
    ],
)
def test_a_metric_that_is_none_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        text_metrics.text_metrics([name])


def test_a_metric_that_loses_rows_is_refused():
    with pytest.raises(ValueError, match="'lossy' returned 1 numbers for 2 rows"):
        text_metrics.scored({"lossy": lambda p, t: [1.0]}, ["a", "b"], ["a", "b"], "teacher")


# Held-out prompts


def test_every_form_of_rows_gives_the_prompt_that_the_trainer_would_read():
    tokenizer = byte_tokenizer()
    question, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    chat = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    for rows in (
        [{"messages": [question, answer]}],
        [{"prompt": [question], "completion": [answer]}],
        [{"prompt": [question]}],
    ):
        data = held_out(Dataset.from_list(rows), tokenizer, [tokenizer.eos_token_id])
        assert data.prompt_ids == [chat] and data.prompts == ["hi"]
        assert data.references == [None if set(rows[0]) == {"prompt"} else "hello"]
    several = [{"role": "system", "content": "be short"}, question]
    data = held_out(Dataset.from_list([{"prompt": several}]), tokenizer, [tokenizer.eos_token_id])
    assert data.prompts == ["system: be short\n\nuser: hi"]


# The student as a draft model


@torch.no_grad()
def drafts_accepted_one_by_one(student, teacher, prompt, max_new_tokens) -> list[bool]:
    """Of each token of the teacher's greedy text, whether it is the student's greedy token too: no sampler, no cache."""
    ids, accepted = list(prompt), []
    for _ in range(max_new_tokens):
        own, drafted = (model(torch.tensor([ids])).logits[0, -1].argmax().item() for model in (teacher, student))
        accepted.append(own == drafted)
        ids.append(own)
    return accepted


def near(teacher, seed=5, by=0.02):
    """A student that often agrees with `teacher`."""
    student = tiny_model("llama", seed=1)
    student.load_state_dict(teacher.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return student


def plain_forwards(accepted, num_draft_tokens):
    """Speculative decoding played out: draft, accept, and one token of the teacher after that."""
    forwards, left = 0, list(accepted)
    while left:
        forwards += 1
        for _ in range(num_draft_tokens):
            if not left or not left.pop(0):
                break
        else:
            left = left[1:]  # the token that the teacher gives after a draft that it accepted as a whole
    return forwards


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
def test_greedy_drafts_are_accepted_where_both_models_write_the_same_token(num_draft_tokens):
    teacher = tiny_model("llama", seed=2)
    student = near(teacher)
    expected = [drafts_accepted_one_by_one(student, teacher, prompt, 24) for prompt in PROMPTS]
    assert 0.2 < np.mean(expected) < 0.95  # else the test would see little
    found = draft_acceptance(
        student, teacher, PROMPTS, decoding=decoding(3, 24, ()), num_draft_tokens=num_draft_tokens, temperature=0.0
    )
    assert found["accepted"].tolist() == [[100.0 * sum(row), 24.0] for row in expected]
    forwards = [plain_forwards(row, num_draft_tokens) for row in expected]
    assert found["tokens_per_forward"].tolist() == [[24.0, number] for number in forwards]


@torch.no_grad()
def test_sampled_drafts_are_accepted_as_often_as_the_distributions_overlap():
    """One token after one prompt, 4,000 rows: the share accepted is sum_v min(p, q), the definition of speculative sampling."""
    teacher = tiny_model("llama", seed=2)
    student = near(teacher, by=0.05)
    p, q = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1) for model in (teacher, student))
    overlap = torch.minimum(p, q).sum().item()
    assert 0.2 < overlap < 0.9
    found = draft_acceptance(
        student, teacher, [PROMPTS[0]] * 4000, decoding=decoding(4000, 1, ()), num_draft_tokens=1, temperature=1.0
    )
    share = found["accepted"][:, 0].sum() / found["accepted"][:, 1].sum() / 100
    # Four standard errors of a binomial: false alarm below 1e-4, and the seeds are fixed.
    assert share == pytest.approx(overlap, abs=4 * math.sqrt(overlap * (1 - overlap) / 4000))


def test_how_drafts_are_batched_changes_no_decision():
    teacher, student = tiny_model("llama", seed=2), near(tiny_model("llama", seed=2))
    one, all_at_once = (
        draft_acceptance(student, teacher, PROMPTS, decoding=decoding(size, 16), temperature=1.0) for size in (1, 4)
    )
    assert all(np.array_equal(one[name], all_at_once[name]) for name in one)


def test_a_student_that_is_its_teacher_gets_one_token_more_than_it_drafts_from_each_forward():
    model = tiny_model()
    found = draft_acceptance(model, model, PROMPTS, decoding=decoding(4, 24, ()), num_draft_tokens=5, temperature=0.0)
    assert found["accepted"][:, 0].tolist() == [2400.0] * 4
    assert found["tokens_per_forward"].tolist() == [[24.0, 4.0]] * 4
    assert num_forwards([False] * 3, 5) == 3
    assert num_forwards([], 5) == 0


# Everything together


def test_prompts_alone_are_evaluated_by_all_that_needs_no_reference():
    teacher, tokenizer = tiny_model(seed=2), byte_tokenizer()
    data = HeldOut(PROMPTS, ["p"] * 4, [None] * 4)
    evaluation = Evaluation(tokenizer, decoding(), drafting=Drafting(num_rows=2))
    answers = generate(teacher, PROMPTS, decoding=decoding())
    student = near(teacher)
    scores = evaluate(student, teacher, data, answers, evaluation=evaluation)
    assert set(scores.values) == {name for name in METRICS if "reference" not in name}
    assert scores.values["draft_accepted_greedy"][2:].tolist() == [[0, 0], [0, 0]]
    np.testing.assert_allclose(
        scores.values["kl_teacher_text"][:, 0], expected_divergence(student, teacher, 259, answers), rtol=1e-3
    )
    assert scores.means()["kl_teacher_text"] == pytest.approx(
        scores.values["kl_teacher_text"][:, 0].sum() / scores.values["kl_teacher_text"][:, 1].sum()
    )


def test_another_divergence_takes_the_place_of_the_kl():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    reverse = token_divergence(
        student, teacher, PROMPTS, RESPONSES, decoding=decoding(), divergence=DIVERGENCES["reverse_kl"]()
    )
    np.testing.assert_allclose(reverse[:, 0], expected_divergence(teacher, student, 259), rtol=1e-4)


def test_an_evaluation_of_the_trainer_has_the_held_out_metrics_too_once_for_several_sets(tmp_path):
    rows = Dataset.from_list(ROWS)
    trainer = make_trainer(tmp_path, eval_dataset={"one": rows, "two": rows})
    prompts = rows.select_columns(["prompt"]) if "prompt" in rows.column_names else rows
    held = callback.HeldOutEvaluation(trainer, prompts, metrics=["exact_match"])
    trainer.add_callback(held)
    metrics = trainer.evaluate()
    student, teacher = held.student, held.teacher
    answers = generate(teacher, held.data.prompt_ids, decoding=held.evaluation.decoding)
    expected = token_divergence(student, teacher, held.data.prompt_ids, answers, decoding=held.evaluation.decoding)
    assert metrics["eval_kl_teacher_text"] == pytest.approx(expected[:, 0].sum() / expected[:, 1].sum())
    assert "eval_exact_match_teacher" in metrics and "eval_one_loss" in metrics
    logged = [entry for entry in trainer.state.log_history if "eval_kl_teacher_text" in entry]
    assert len(logged) == 1
    assert set(held.seconds) == {"evaluation_held-out"}


def test_held_out_prompts_that_training_would_leave_out_are_left_out(tmp_path, caplog):
    """A model with learned positions would end the run with an IndexError."""
    trainer = make_trainer(tmp_path, model=tiny_model("gpt2", seed=1), teacher=tiny_model("gpt2", seed=2))
    longest = trainer._rules.max_prompt_length
    rows = Dataset.from_list([{"prompt": "short"}, {"prompt": "q" * (longest + 1)}, {"prompt": "q" * longest}])
    held = callback.HeldOutEvaluation(trainer, rows, metrics=[])
    assert [len(ids) for ids in held.data.prompt_ids] == [5, longest]
    held.score("before")


@pytest.mark.parametrize(
    "teacher, said",
    [({"a": tiny_model(seed=1), "b": tiny_model(seed=2)}, "several teachers"), (None, "recorded scores")],
)
def test_a_run_without_one_fixed_teacher_is_not_compared_and_told_why(teacher, said):
    trainer = SimpleNamespace(teacher_model=teacher)
    with pytest.raises(ValueError, match=f"{said}.*--compare false"):
        callback.HeldOutEvaluation(trainer, Dataset.from_list(ROWS))


# Intervals


def test_the_ratio_of_sums_is_that_of_a_plain_loop_and_rows_without_weight_have_no_part():
    values = np.array([[3.0, 2.0], [5.0, 4.0], [0.0, 0.0]])
    rows = np.array([[0, 0, 1], [2, 2, 1]])
    assert bootstrap.ratio(values) == 8 / 6
    assert bootstrap.ratio(values, rows).tolist() == [11 / 8, 5 / 4]
    assert np.isnan(bootstrap.ratio(np.zeros((2, 2))))


# Comparison


def test_people_are_shown_the_prompt_that_the_models_read():
    """Some sets have the first question as `prompt` beside all turns; the turns are what counts, for both."""
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    assert prompt_text({"prompt": "u", "messages": None}) == "u"
    assert prompt_text({"prompt": "u", "messages": turns}) == "user: u\n\nassistant: a\n\nuser: u"
    assert (
        prompt_text({"prompt": turns[:1]})
        == prompt_text({"messages": turns[:2]})
        == prompt_text({"prompt": "u"})
        == "u"
    )


@pytest.mark.parametrize("role", ["Assistant", " assistant", "gpt", "model", "AI"])
def test_people_are_not_shown_the_reference_whatever_its_role_is_called(role):
    turns = [{"role": "Human", "content": "u"}, {"role": role, "content": "a"}]
    shared = [{"from": turn["role"], "value": turn["content"]} for turn in turns]
    rows = [{"messages": turns}, {"messages": shared}, {"conversations": shared}]
    assert [prompt_text(row) for row in rows] == ["u"] * 3
    data = held_out(Dataset.from_list(rows[:1]), byte_tokenizer(), [257])
    assert data.prompts == ["u"] and data.references == ["a"]


def test_people_are_shown_system_prompts_and_texts_in_parts_as_the_models_read_them():
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]
    row = {"system": "s", "messages": [{"role": "human", "content": parts}, {"role": "gpt", "content": "a"}]}
    assert prompt_text(row) == "system: s\n\nuser: uv"
    call = {"role": "function_call", "content": '{"name": "f"}'}
    assert prompt_text({"prompt": [row["messages"][0], call]}) is None
    assert prompt_text({"input_ids": [1, 2]}) is None


def length(predictions, targets):
    return {"length": [float(len(prediction)) for prediction in predictions]}


length.higher_is_better = False


def test_a_metric_of_the_user_says_itself_whether_higher_is_better():
    metrics = {
        "length": length,
        "exact_match": lambda predictions, targets: [
            100.0 * (p == t) for p, t in zip(predictions, targets, strict=True)
        ],
    }
    targets = {"teacher": ["a", "b"] * 3, "reference": ["a", None] * 3}
    before, after = (
        Scores(texts, *text_scores(metrics, texts, targets)) for texts in (["aaaa", "bbbb"] * 3, ["a", "b"] * 3)
    )
    assert after.lower_is_better == {"length_teacher", "length_reference"}
    compared = comparison.compare(before, after, {"length_reference": np.array([[1.0, 1.0], [0.0, 0.0]] * 3)})
    verdicts = {name: comparison.verdict(metric) for name, metric in compared["metrics"].items()}
    assert verdicts["length_teacher"] == verdicts["exact_match_teacher"] == "better"
    longer = Scores(before.responses, before.values, after.lower_is_better)
    assert comparison.verdict(comparison.compare(after, longer, {})["metrics"]["length_teacher"]) == "worse"
    caption = str(comparison.comparison_table(compared).caption)
    assert "The teacher's own length reference: 1.00." in caption and "ROUGE" not in caption


def scores(values, weights=None) -> Scores:
    array = np.stack(
        [np.asarray(values, float), np.ones(len(values)) if weights is None else np.asarray(weights, float)], 1
    )
    return Scores([""] * len(values), dict.fromkeys(METRICS, array))


def test_divergences_are_averaged_over_tokens_not_over_prompts():
    metric = comparison.compare(scores([1.0, 9.0], [1, 3]), scores([1.0, 9.0], [1, 3]), {})["metrics"][
        "kl_teacher_text"
    ]
    assert metric["before"]["value"] == 10 / 4


def test_the_paired_interval_of_a_constant_change_has_no_width():
    values = np.random.default_rng(0).normal(50, 20, size=40)
    metric = comparison.compare(scores(values), scores(values + 2), {})["metrics"]["rougeL_teacher"]
    assert metric["change"] == pytest.approx({"value": 2, "low": 2, "high": 2})
    assert metric["before"]["high"] - metric["before"]["low"] > 5
    assert comparison.verdict(metric) == "better"


def test_verdicts_know_which_way_is_better_and_when_it_is_unclear():
    values = np.linspace(1, 2, 20)
    lower = comparison.compare(scores(values), scores(values - 0.5), {})["metrics"]
    assert comparison.verdict(lower["kl_teacher_text"]) == "better"
    assert comparison.verdict(lower["rouge1_teacher"]) == "worse"
    noise = np.where(np.arange(20) % 2, 0.5, -0.5)
    assert (
        comparison.verdict(comparison.compare(scores(values), scores(values + noise), {})["metrics"]["rouge1_teacher"])
        == "unclear"
    )


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("num_lost", [1, 8])
def test_a_change_that_is_not_finite_is_unclear(number, num_lost):
    """A student of NaN was called better, in what is better when lower."""
    after = scores([number] * num_lost + [9.0] * (8 - num_lost))
    compared = comparison.compare(scores([1.0] * 8), after, {})
    assert {comparison.verdict(metric) for metric in compared["metrics"].values()} == {"unclear"}
    from_file = json.loads(as_json(compared))
    assert {comparison.verdict(metric) for metric in from_file["metrics"].values()} == {"unclear"}


def test_of_five_prompts_no_change_is_called_better_and_of_six_it_is():
    """Five changes of one sign come about by chance once in sixteen times. Rows without a weight are no prompts of the metric."""
    for weights, called in (([1] * 5, "unclear"), ([1] * 5 + [0], "unclear"), ([1] * 6, "better")):
        values = np.linspace(1, 2, len(weights))
        compared = comparison.compare(scores(values, weights), scores(values * 2, weights), {})
        assert comparison.verdict(compared["metrics"]["rouge1_teacher"]) == called
        caption = str(comparison.comparison_table(compared).caption)
        assert ("Of fewer than 6 prompts no change" in caption) == (called == "unclear")


def test_a_comparison_that_does_not_say_of_how_many_prompts_is_shown():
    compared = comparison.compare(scores([1.0, 2.0] * 4), scores([2.0, 3.0] * 4), {})
    for metric in compared["metrics"].values():
        del metric["num_prompts"]
    assert comparison.verdict(compared["metrics"]["rouge1_teacher"]) == "better"
    assert "Of fewer" not in str(comparison.comparison_table(compared).caption)


def test_a_change_that_rounds_to_nothing_has_no_sign():
    metric = comparison.compare(scores([1.0] * 6), scores([0.999] * 6), {})["metrics"]["kl_teacher_text"]
    assert comparison.comparison_row("kl_teacher_text", metric)["change"] == "+0.00 [+0.00, +0.00]"


def test_the_bootstrap_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(size=400)
    metric = comparison.compare(scores(values), scores(values), {})["metrics"]["kl_teacher_text"]["before"]
    # 2 x 1.96 standard errors; 2,000 resamples put the ends within a few percent
    assert metric["high"] - metric["low"] == pytest.approx(3.92 * values.std() / math.sqrt(400), rel=0.1)


def test_the_table_fits_eighty_columns():
    table = comparison.comparison_table(
        comparison.compare(
            scores([10.0, 20.0, 31.0]), scores([30.0, 50.0, 55.0]), {"rougeL_reference": np.ones((3, 2))}
        )
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert all(metric.label in text for metric in METRICS.values())


def test_scores_of_before_are_read_back_for_the_same_prompts_only(tmp_path):
    data = HeldOut([[1]], ["prompt"], ["reference"])
    callback.write_scores(tmp_path / "before.json", data, scores([1.0]), [[5, 6]], ["text"])
    found, answers = callback.read_scores(tmp_path / "before.json", data)
    assert answers == [[5, 6]]
    assert found.values["kl_teacher_text"].tolist() == [[1.0, 1.0]]
    assert callback.read_scores(tmp_path / "before.json", HeldOut([[1]], ["other"], ["r"])) is None
    assert callback.read_scores(tmp_path / "missing.json", data) is None


def test_scores_that_are_not_numbers_are_null_in_their_file_and_not_numbers_when_they_are_read_back(tmp_path):
    data, file = HeldOut([[1]] * 2, ["prompt"] * 2, [None] * 2), tmp_path / "before.json"
    callback.write_scores(file, data, scores([math.nan, 1.0]), [[5], [6]], ["", ""])
    assert "NaN" not in file.read_text() and "null" in file.read_text()
    values = callback.read_scores(file, data)[0].values["kl_teacher_text"]
    np.testing.assert_array_equal(values, [[math.nan, 1.0], [1.0, 1.0]])
