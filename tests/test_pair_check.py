"""Does my pair work? What works is called good, and each thing that cannot work is found under its own topic."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from tiny import byte_tokenizer, save_models, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from skd_trl import SKDConfig
from skd_trl.__main__ import main
from skd_trl.training.findings import Verdict, require
from skd_trl.training.launch_check import check_launch
from skd_trl.training.pair_check import check_pair
from skd_trl.training.pair_checks import PAIR_CHECKS


def arguments(**settings):
    return SKDConfig("x", **{"use_cpu": True, "bf16": False, "max_new_tokens": 16, **settings})


def found(student=None, teacher=None, tokenizer=None, **settings):
    """Findings by topic; every topic has one, whatever the models are."""
    student, teacher = student or tiny_model(seed=1), teacher or tiny_model(seed=2)
    findings = check_pair(student, teacher, tokenizer or byte_tokenizer(), arguments(**settings))
    assert [finding.topic for finding in findings] == list(PAIR_CHECKS)
    return {finding.topic: finding for finding in findings}


def save_with_swapped_bytes(directory):
    """A teacher whose tokenizer differs by two ids."""
    other = byte_tokenizer()
    content = json.loads(other._tokenizer.to_str())
    ids = content["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    other._tokenizer = type(other._tokenizer).from_str(json.dumps(content))
    tiny_model(seed=2).save_pretrained(directory)
    other.save_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_models(directory, {"student": 1, "teacher": 2})
    save_with_swapped_bytes(directory / "other")
    return directory


def test_a_good_pair_is_good_in_every_topic(saved):
    student, teacher = (AutoModelForCausalLM.from_pretrained(saved / name) for name in ("student", "teacher"))
    student.train()
    findings = found(student, teacher, AutoTokenizer.from_pretrained(saved / "student"))
    assert {finding.verdict for finding in findings.values()} == {Verdict.GOOD}
    require(list(findings.values()))
    assert student.training and not any(module._forward_hooks for module in student.modules())


def test_different_tokenizers_are_refused_under_vocabulary_alone(saved):
    findings = found(teacher=AutoModelForCausalLM.from_pretrained(saved / "other"))
    refused = [finding for finding in findings.values() if finding.verdict == Verdict.REFUSED]
    assert [finding.topic for finding in refused] == ["vocabulary"]
    with pytest.raises(ValueError, match="different tokenizers: id .* is 'A' for the student and 'B' for the teacher"):
        require(refused)


def test_padded_heads_share_the_smaller_range(saved):
    finding = found(tiny_model(seed=1, vocab_size=264), tiny_model(seed=2, vocab_size=272))["vocabulary"]
    assert finding.verdict == Verdict.WARNING and "No tokenizer was found for the teacher" in finding.detail
    teacher = tiny_model(seed=2, vocab_size=272)
    teacher.config._name_or_path = str(saved / "teacher")
    finding = found(tiny_model(seed=1, vocab_size=264), teacher)["vocabulary"]
    assert (
        finding.verdict == Verdict.GOOD and "264 ids, the teacher's 272; the first 264 are compared" in finding.detail
    )


def test_different_ends_are_a_warning_that_does_not_stop_a_training(caplog):
    findings = found(tiny_model(seed=1, eos_token_id=257), tiny_model(seed=2, eos_token_id=258))
    ends = findings["ends of sequence"]
    assert ends.verdict == Verdict.WARNING and "only the teacher with 258" in ends.detail
    with caplog.at_level(logging.WARNING):
        require([ends])
    assert "only the teacher with 258" in caplog.text


def test_a_pair_without_any_end_of_sequence_is_a_warning():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    finding = found(tokenizer=tokenizer)["ends of sequence"]
    assert finding.verdict == Verdict.WARNING and "every response runs to max_new_tokens" in finding.detail


def test_an_encoder_decoder_is_refused_by_name_in_every_topic_that_runs_it():
    sizes = {"vocab_size": 259, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    findings = found(T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)))
    assert "T5ForConditionalGeneration (model_type='t5') is an encoder-decoder" in findings["sampling"].detail
    assert {findings[topic].verdict for topic in ("sampling", "heads", "padding")} == {Verdict.REFUSED}


@pytest.mark.parametrize("positions, verdict", [(16, Verdict.REFUSED), (17, Verdict.GOOD)])
def test_prompts_need_at_least_one_position_beside_the_response(positions, verdict):
    teacher = tiny_model("gpt2", seed=2, n_positions=positions, max_position_embeddings=positions)
    finding = found(teacher=teacher)["room for prompts"]
    assert finding.verdict == verdict
    said = "the teacher has 16 positions" if verdict == Verdict.REFUSED else "Prompts of up to 1 tokens"
    assert said in finding.detail


def test_shared_weights_and_unloaded_ones_are_refused_under_placement():
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    assert found(student, student)["placement"].detail == "The student is its own teacher, on one device."
    teacher.model.layers[0] = student.model.layers[0]
    finding = found(student, teacher)["placement"]
    assert finding.verdict == Verdict.REFUSED and "shares weights with the student" in finding.detail
    finding = found(teacher=tiny_model(seed=2).to("meta"))["placement"]
    assert finding.verdict == Verdict.REFUSED and "The teacher has weights on the meta device" in finding.detail


def roberta(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RobertaForCausalLM(
        RobertaConfig(vocab_size=259, initializer_range=0.4, pad_token_id=256, **sizes, **settings)
    )


def test_a_model_that_sees_later_tokens_is_refused_under_padding():
    finding = found(roberta(is_decoder=False))["padding"]
    assert finding.verdict == Verdict.REFUSED and "The student, RobertaForCausalLM, is not causal" in finding.detail
    assert found(roberta(is_decoder=True))["padding"].verdict == Verdict.GOOD


def test_a_model_whose_rows_depend_on_the_padding_behind_them_is_refused():
    model = tiny_model(seed=1)

    def add_padding_share(module, args, kwargs, output):
        output[0].add_((kwargs["attention_mask"] == 0).float().mean(dim=1)[:, None, None])

    model.get_decoder().register_forward_hook(add_padding_share, with_kwargs=True)
    finding = found(model)["padding"]
    assert finding.verdict == Verdict.REFUSED and "for a row that padding follows" in finding.detail


def test_broken_weights_are_refused_as_such():
    model = tiny_model(seed=1)
    model.get_decoder().norm.weight.data[0] = float("nan")
    assert "makes NaN or infinite hidden states" in found(model)["padding"].detail


def test_a_head_that_does_more_than_is_known_is_refused():
    assert "does not compute its logits as a linear map" in found(roberta(is_decoder=True))["heads"].detail


def test_a_model_without_a_cache_is_refused_for_sampling_and_good_for_given_responses():
    torch.manual_seed(0)
    without_cache = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=259, n_embd=32, n_layer=1, n_head=2))
    assert "rollout='dataset'" in found(without_cache)["sampling"].detail
    findings = found(without_cache, rollout="dataset")
    assert findings["sampling"].verdict == Verdict.UNCHECKED
    assert findings["heads"].verdict == findings["padding"].verdict == Verdict.GOOD


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_reason_to_refuse(dtype):
    findings = found(tiny_model("gemma2", seed=1).to(dtype), tiny_model("llama", seed=2).to(dtype))
    assert findings["padding"].verdict == findings["heads"].verdict == Verdict.GOOD


class Launched:
    """An accelerator as that of one of several processes."""

    def __init__(self, num_processes, even_batches):
        self.own, self.num_processes, self.even_batches = Accelerator(cpu=True), num_processes, even_batches

    def __getattr__(self, name):
        return getattr(self.own, name)


@pytest.mark.parametrize("drops_last", [False, True])
@pytest.mark.parametrize("even_batches", [False, True])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_that_are_not_even_are_refused_on_several_processes_unless_the_last_is_dropped(
    num_processes, even_batches, drops_last
):
    findings = check_launch(
        tiny_model(seed=1), tiny_model(seed=2), arguments(dataloader_drop_last=drops_last), Launched(num_processes, even_batches)
    )  # fmt: skip
    engine = next(finding for finding in findings if finding.topic == "engine")
    if num_processes == 2 and not even_batches and not drops_last:
        assert engine.verdict == Verdict.REFUSED
        assert "even_batches=False" in engine.detail and "dataloader_drop_last=True" in engine.detail
    else:
        assert engine.verdict == Verdict.GOOD


# The command


def test_the_command_prints_a_table_and_ends_with_1_where_something_is_refused(saved):
    process = subprocess.run(
        [sys.executable, "-m", "skd_trl", "check", "--model", "student", "--teacher_model_name_or_path", "other"],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        cwd=saved, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    rows = {line.split("│")[1].strip(): line for line in process.stdout.splitlines() if line.startswith("│")}
    assert "refused" in rows["vocabulary"] and "different tokenizers" in rows["vocabulary"]
    assert all("good" in rows[topic] for topic in ("sampling", "heads", "padding", "engine"))


def test_a_trainings_file_serves_the_command_and_a_good_pair_ends_with_0(saved, tmp_path, capsys):
    config = tmp_path / "training.yaml"
    config.write_text(
        f"model_name_or_path: {saved / 'student'}\nteacher_model_name_or_path: {saved / 'teacher'}\n"
        "dataset_name: none\nmax_length: 500\nrollout: dataset\n"
    )
    assert main(["check", "--config", str(config), "--max_length", "100"]) == 0
    output = capsys.readouterr().out
    assert "up to 99 tokens" in output and "not checked" in output and "refused" not in output


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    assert "check" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["chekc"], "invalid choice: 'chekc'"),
        (["check"], "--model is missing: the student's name or path"),
        (["check", "--model", "no/where", "--teacher_model_name_or_path", "no/where"], "no/where"),
        (["check", "--model", "x", "--rolout", "student"], "--rolout"),
        (["check", "--model", "x", "--rollout", "nobody"], "nobody"),
        (["check", "--model", "x", "--config", "no/where.yaml"], "no/where.yaml"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why_and_ends_with_2(words, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
