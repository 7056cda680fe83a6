"""The command line: help, wrong options, and each command on tiny models and every form of rows."""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from assets import arguments_for, save_assets
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from teacher_server import serving
from test_pair_check import save_with_swapped_bytes
from tiny import EOS, byte_tokenizer, tiny_model
from trl import ModelConfig

import skd_trl
from skd_trl import SKDConfig, SKDTrainer
from skd_trl.__main__ import COMMANDS, main
from skd_trl.commands import check, loading, options, rows, train, train_options, train_rows, watch
from skd_trl.data.dataset import prepare_dataset
from skd_trl.data.row_rules import RowRules
from skd_trl.training.run_files import read_logs


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return save_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def run(arguments, capsys) -> tuple[int, str]:
    """Exit code and all that was printed."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


# Help and wrong options


def test_no_argument_gives_help_and_every_command_has_its_line(capsys):
    code, output = run([], capsys)
    assert code == 0
    assert all(re.search(rf"^ +{name} +\w", output, re.MULTILINE) for name in COMMANDS)


def test_an_unknown_command_is_refused_with_those_that_there_are(capsys):
    code, output = run(["trian"], capsys)
    assert code == 2
    assert "invalid choice: 'trian'" in output and "train" in output.replace("trian", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_fits_a_screen(name, capsys):
    code, output = run([name, "--help"], capsys)
    assert code == 0
    lines = output.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
    assert lines[0].startswith(f"usage: skd {name}")


def test_every_option_is_in_one_group_and_is_explained_by_it_and_by_its_name():
    command = train_options.train_command("speckd")
    groups = command.groups()
    names = [field.name for fields in groups.values() for field in fields]
    assert len(names) == len(set(names)) and {"gate", "lora_r", "learning_rate", "dataset_name"} <= set(names)
    assert set(groups) <= set(options.TITLES)
    assert {"gate", "gate_floor"} <= {field.name for field in groups["speckd"]}
    everything = command.help_text("all")
    assert all(f"--{name}\n" in everything for name in names)
    assert "--gate_floor" in command.help_text("speckd") and "--lora_r" not in command.help_text("speckd")
    assert "accepted" in command.help_text("accept_top_k")


def test_the_version_is_told(capsys):
    assert run(["--version"], capsys) == (0, f"skd_trl {skd_trl.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_leaves_out_nothing_but_what_others_explain(name, capsys):
    """Options of TRL and transformers are shortened to the usual ones; a command's are all there."""
    _, output = run([name, "--help"], capsys)
    shortened = re.findall(r"^(\w+)(?::[^\n]*)?(?:\n  .*)*? and\s+\d+\s+more", output, re.MULTILINE)
    assert set(shortened) <= set(options.SHORTENED)


WRONG = [
    (["--gate", "spec_k"], "--gate is no option. It belongs to SpecKD's trainer: add --trainer speckd."),
    (["--learning_rat", "1"], "--learning_rat is no option. Did you mean --learning_rate?"),
    (["--student", "x"], "--student is no option. Did you mean --model_name_or_path?"),
    (["--teacher", "x"], "--teacher is no option. Did you mean --teacher_model_name_or_path?"),
    (["--learning_rate", "much"], "invalid float value: 'much'"),
    (["--accept", "best"], "accept='best' is unknown; choose one of top_k"),
    (["--trainer", "gkd"], "invalid choice: 'gkd'"),
    (["--dataset_name", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
    (["--num_eval_rows", "-1"], "num_eval_rows=-1"),
    (["stray"], "'stray' belongs to no option"),
    (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    (["--help", "nothing"], "no such group of options; choose one of"),
    (["--dataset_train_split", "dev"], "has no split 'dev'; it has test, train."),
    (["--metrics", "bleu"], "metric 'bleu' is unknown"),
    (["--accept_kwargs", "{alpha: 1}"], "'{alpha: 1}' is no JSON: "),
    (["--teacher_sft", "{'max_steps': 1}"], "is no JSON: Expecting property name enclosed in double quotes"),
    (["--config", "BROKEN.yaml"], "the file named by --config is no YAML: while parsing a flow sequence"),
    (["--model_name_or_path", "./nowhere"], "the student './nowhere' does not exist: there is no such folder."),
    (["--teacher_model_name_or_path", "a/b/c"], "the teacher 'a/b/c' does not exist: there is no such folder."),
    (["--model_name_or_path", "nowhere"], "the student 'nowhere' cannot be loaded, neither here nor from the hub. "),
    (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint='nowhere' is no folder; "),
    (["--dataset_name", "EMPTY.jsonl"], "EMPTY.jsonl has no rows: the file is empty."),
    (["--dataset_name", "BROKEN.jsonl"], "BROKEN.jsonl cannot be read as .jsonl: JSON parse error"),
]
FILES = {"BROKEN.yaml": "accept: [top_k\n", "EMPTY.jsonl": "", "BROKEN.jsonl": '{"messages": [\n'}


@pytest.mark.parametrize("wrong, message", WRONG, ids=[" ".join(wrong) for wrong, _ in WRONG])
def test_a_wrong_command_gives_one_line_with_a_hint_and_exit_code_2(
    wrong, message, assets, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    code, output = run(["train", *arguments_for(assets, output_dir=tmp_path / "run"), *wrong], capsys)
    assert code == 2
    assert message in output and "Traceback" not in output


SCORED = ["--model", "m", "--dataset", "x.jsonl", "--output_dir", "scores"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            ["watch", "--accept", "min_prob", "--accept_kwargs", '{"beta": 1}'],
            "unexpected 'beta'; min_prob takes alpha.",
        ),
        (["watch", "--num_draft_tokens", "0"], "num_draft_tokens='0' must be at least 1, or 'auto'."),
        (["watch", "--max_new_tokens", "0"], "max_new_tokens=0 must be at least 1."),
        (["score", *SCORED, "--max_response_length", "0"], "max_response_length=0 must be at least 1."),
        (["score", *SCORED, "--batch_size", "0"], "batch_size=0 must be at least 1."),
        (["serve", "--model", "m", "--top_k", "0"], "top_k=0 must be at least 1."),
        (["watch", "--accept", "best"], "accept='best' is unknown; choose one of top_k"),
        (["evaluate", "--dataset_name", "x", "--metrics", "bleu"], "metric 'bleu' is unknown"),
        (["evaluate", "--dtype", "int4"], "invalid choice: 'int4' (choose from 'auto', 'float32'"),
        (["score", "--topk", "5"], "--topk is no option. Did you mean --top_k?"),
        (["check", "--acept", "top_k"], "--acept is no option. Did you mean --accept?"),
        (["evaluate", "--model_name_or_path", "x"], "--model_name_or_path is no option. Did you mean --student?"),
        (
            [
                "watch",
                "--student",
                "x",
                "--teacher",
                "y",
                "--prompt",
                "q",
                "--accept",
                "min_prob",
                "--accept_top_k",
                "3",
            ],
            "accept_top_k=3",
        ),
        (["check"], "--model is missing: the student's name or path."),
        (["train", "--dataset_name", "x"], "--model_name_or_path is missing: the student's name or path."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_say_in_a_line_what_is_wrong_with_an_option(wrong, message, capsys):
    pair = {"watch": ["--student", "s", "--teacher", "t"], "evaluate": ["--student", "s", "--teacher", "t"]}
    code, output = run([wrong[0], *pair.get(wrong[0], []), *wrong[1:]], capsys)
    assert code == 2 and message in output and "Traceback" not in output


@pytest.mark.parametrize("more", [[], ["--use_peft", "true"]])
def test_the_check_of_a_pair_lists_each_topic_once(more, assets, capsys):
    pair = ["--model", assets / "student", "--teacher_model_name_or_path", assets / "teacher"]
    code, output = run(["check", *pair, "--max_new_tokens", "8", *more], capsys)
    topics = re.findall(r"^│ (\w[\w ]*?) +│", output, re.MULTILINE)
    assert code == 0 and len(topics) > 8 and len(topics) == len(set(topics))


def test_several_gpus_in_one_process_are_refused_before_a_supervised_stage(assets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SKDConfig, "n_gpu", property(lambda self: 2))
    stage = ["--student_sft", '{"max_steps": 1}']
    code, output = run(["train", *arguments_for(assets, output_dir=tmp_path / "out"), *stage], capsys)
    assert code == 2 and "One process sees 2 GPUs" in output and not (tmp_path / "out" / "student_sft").exists()


def test_the_check_runs_on_a_machine_with_several_gpus(assets, capsys, monkeypatch):
    """A training would be started with a process for each; the check is one process that sees them all."""
    original = SKDConfig.__post_init__

    def with_two(self):
        original(self)
        self._n_gpu = 2

    monkeypatch.setattr(SKDConfig, "__post_init__", with_two)
    pair = ["--model", assets / "student", "--teacher_model_name_or_path", assets / "teacher"]
    code, output = run(["check", *pair, "--max_new_tokens", "8"], capsys)
    assert code == 0 and "refused" not in output


def test_the_check_looks_at_each_of_several_teachers(assets, tmp_path, capsys):
    save_with_swapped_bytes(tmp_path / "other")
    teachers = {"good": str(assets / "teacher"), "other": str(tmp_path / "other")}
    command = [
        "check",
        "--model",
        assets / "student",
        "--teacher_models",
        json.dumps(teachers),
        "--max_new_tokens",
        "8",
    ]
    code, output = run(command, capsys)
    _, good, other = re.split(r"With the teacher '\w+'", output)
    assert code == 1 and "refused" not in good and "different tokenizers" in " ".join(other.split())


def test_the_check_of_a_file_is_of_the_adapter_and_the_type_that_it_trains(assets, tmp_path, capsys):
    config, told = tmp_path / "config.yaml", []
    pair = f"model_name_or_path: {assets / 'student'}\nteacher_model_name_or_path: {assets / 'teacher'}\nmax_new_tokens: 8\n"
    for more in ("dtype: bfloat16\n", "use_peft: true\nlora_r: 4\n"):
        config.write_text(pair + more)
        code, output = run(["check", "--config", config], capsys)
        assert code == 0, output
        told.append(" ".join(output.replace("│", " ").split()))
    assert "bfloat16" in told[0] and "bfloat16" not in told[1]
    assert "LORA; no adapter" in told[1] and "LORA" not in told[0]


@pytest.mark.parametrize("is_there", [True, False])
def test_the_check_asks_a_teachers_server(is_there, assets, capsys, monkeypatch):
    monkeypatch.setattr(check, "PATIENCE", 1.0)
    with serving(tiny_model(seed=1), tokenizer=byte_tokenizer(), top_k=64) as server:
        url = server.url if is_there else "http://127.0.0.1:9"
        command = ["check", "--model", assets / "student", "--teacher_model_server_url", url, "--max_new_tokens", "8"]
        code, output = run(command, capsys)
    said = " ".join(output.replace("│", " ").split())
    assert (code, "good tiny answers" in said, "No teacher's server answers" in said) == (
        not is_there,
        is_there,
        not is_there,
    )


def test_a_teacher_keeps_the_type_of_its_file_on_an_accelerator_and_is_fp32_on_a_cpu(tmp_path, monkeypatch):
    """A teacher of 7 billion parameters in TRL's fp32 would take 28 GB."""
    for has_accelerator, given, expected in (
        (True, "float32", "auto"),
        (False, "float32", "float32"),
        (True, "bfloat16", "bfloat16"),
    ):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=has_accelerator: found)
        args = SKDConfig(str(tmp_path), use_cpu=True, bf16=False, teacher_model_name_or_path="teacher")
        loading.set_model_init_kwargs(args, ModelConfig(model_name_or_path="student", dtype=given))
        assert args.teacher_model_init_kwargs["dtype"] == expected and args.model_init_kwargs["dtype"] == given


@pytest.mark.parametrize("teacher", [{"teacher_model_kind": "base"}, {"teacher_model_server_url": ["http://h:1"]}])
def test_a_student_is_fine_tuned_first_whoever_its_teacher_is(teacher, tmp_path):
    """The configuration is made once more after the stage, with all its checks."""
    args = SKDConfig(str(tmp_path), use_cpu=True, bf16=False, **teacher)
    loading.set_model_init_kwargs(args, ModelConfig(model_name_or_path="student"))
    assert replace(args).teacher_model_init_kwargs is None


def test_a_run_is_resumed_from_its_last_whole_checkpoint_or_the_one_that_is_named(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()  # killed while it was written
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-best")  # of the user's
    for wanted, found in (
        ("true", "checkpoint-10"),
        (str(tmp_path / "checkpoint-2"), "checkpoint-2"),
        ("false", None),
    ):
        args = SKDConfig(str(tmp_path), resume_from_checkpoint=wanted, use_cpu=True, bf16=False)
        expected = found and str(tmp_path / found)
        assert train.checkpoint_to_resume(args) == expected
    with pytest.raises(ValueError, match="has checkpoint-2, checkpoint-10"):
        train.checkpoint_to_resume(SKDConfig(str(tmp_path), resume_from_checkpoint="x", use_cpu=True, bf16=False))


CUT = {"missing": None, "empty": "", "cut": '{"log_history": [{"lo', "no state": "3"}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
def test_a_checkpoint_whose_state_was_cut_is_left_out_and_named(content, tmp_path, caplog):
    for step in (4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step == 4 or content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}" if step == 4 else content)
    settings = {"use_cpu": True, "bf16": False}
    args = SKDConfig(str(tmp_path), resume_from_checkpoint="true", **settings)
    assert train.checkpoint_to_resume(args) == str(tmp_path / "checkpoint-4")
    said = [message for message in caplog.messages if "left out" in message]
    reason = "is missing" if content is None else "cannot be read to its end"
    assert len(said) == 2 and all(f"its trainer_state.json {reason}" in message for message in said)
    assert "checkpoint-12 " in said[0] and "checkpoint-10 " in said[1]
    named = SKDConfig(str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-12"), **settings)
    with pytest.raises(ValueError, match="checkpoint-12' has no trainer_state.json .* has checkpoint-4.$"):
        train.checkpoint_to_resume(named)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="has no whole checkpoint, so start without it"):
        train.checkpoint_to_resume(args)


def test_modules_in_the_current_folder_are_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "metric_in_the_folder.py").write_text("def length(predictions, targets): return [1.0]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    arguments = ["evaluate", "--student", "./no", "--teacher", "./no", "--dataset_name", "no.jsonl"]
    code, output = run([*arguments, "--metrics", "metric_in_the_folder:length"], capsys)
    assert code == 2 and "'no.jsonl' does not exist" in output


@pytest.mark.parametrize("name", ["evaluate", "compare", "watch", "report", "score", "train"])
def test_a_command_without_what_it_needs_says_what_is_missing(name, capsys):
    code, output = run([name], capsys)
    assert code == 2
    assert f"skd {name}: error: " in output and re.search("missing|is not set", output)


def test_an_option_of_another_trainer_is_told_before_what_is_missing(capsys):
    code, output = run(["train", "--gate", "spec_k"], capsys)
    assert code == 2 and "add --trainer speckd" in output


def test_a_file_of_options_is_read_and_the_command_line_overrides_it(assets, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer: speckd\ngate_top_k: 7\ndataset_name: rows\nmax_new_tokens: 3\nuse_cpu: true\nbf16: false\n"
    )
    arguments = ["--config", str(config), "--max_new_tokens", "5"]
    assert train.chosen_trainer(arguments) == "speckd"
    script_args, training_args, _ = train_options.train_command("speckd").parse(arguments)
    assert (script_args.dataset_name, training_args.gate_top_k, training_args.max_new_tokens) == ("rows", 7, 5)


def test_no_in_a_file_is_the_word_and_not_a_boolean(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("eval_strategy: no\nsave_strategy: no\ndataset_name: rows\nuse_cpu: true\nbf16: false\n")
    _, training_args, _ = train_options.train_command().parse(["--config", str(config)])
    assert (training_args.eval_strategy, training_args.save_strategy) == ("no", "no")


def test_the_trainer_is_that_of_the_command_line_then_of_the_file_then_skd(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("trainer: speckd\n")
    assert train.chosen_trainer(["--config", str(config), "--trainer", "skd"]) == "skd"
    assert train.chosen_trainer(["--config", str(config)]) == "speckd"
    assert train.chosen_trainer(["--learning_rate", "1.0"]) == "skd"


def test_an_unknown_option_of_a_file_is_refused_as_one_of_the_command_line(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("gate: spec_k\ndataset_name: rows\nuse_cpu: true\nbf16: false\n")
    code, output = run(["train", "--config", config], capsys)
    assert code == 2 and "add --trainer speckd" in output


def test_the_module_is_a_command_too():
    process = subprocess.run([sys.executable, "-m", "skd_trl", "env"], capture_output=True, text=True, check=True)
    assert re.search(r"- skd_trl: \d", process.stdout) and "- accelerators: " in process.stdout


# Rows


def test_rows_come_from_files_folders_and_saved_data_sets(tmp_path):
    dataset = Dataset.from_list([{"prompt": f"p{i}"} for i in range(6)])
    (tmp_path / "folder").mkdir()
    dataset.to_json(tmp_path / "rows.jsonl")
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    dataset.to_json(tmp_path / "folder" / "test.jsonl")
    dataset.save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "folder", "saved"):
        assert rows.load_rows(str(tmp_path / name), "train")["prompt"][:] == dataset["prompt"][:]
    assert rows.split_names(str(tmp_path / "folder")) == ["test", "train"]
    two = rows.load_rows(str(tmp_path / "rows.jsonl"), "train", num_rows=2, seed=1)["prompt"][:]
    assert len(set(two)) == 2 and two != dataset["prompt"][:2]
    stream = rows.load_rows(str(tmp_path / "rows.jsonl"), "train", num_rows=2, streaming=True)
    assert [row["prompt"] for row in stream] == ["p0", "p1"]


def test_a_split_may_be_numbered_files_and_a_file_compressed(tmp_path):
    dataset = Dataset.from_list([{"prompt": f"p{i}"} for i in range(5)])
    for i in range(2):
        dataset.shard(2, i, contiguous=True).to_parquet(tmp_path / f"train-0000{i}-of-00002.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    dataset.to_json(tmp_path / "test.jsonl.gz", compression="gzip")
    assert rows.split_names(str(tmp_path)) == ["test", "train"]
    for split in ("train", "test"):
        assert rows.load_rows(str(tmp_path), split)["prompt"][:] == dataset["prompt"][:]
    assert rows.load_rows(str(tmp_path / "test.jsonl.gz"), "train")["prompt"][:] == dataset["prompt"][:]


@pytest.mark.parametrize("other", ["train.parquet", "train.jsonl.gz", "train-00000-of-00001.jsonl"])
def test_two_files_that_may_each_be_a_split_are_refused(other, tmp_path):
    for name in ("train.jsonl", other):
        (tmp_path / name).write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"has train\S+ and train\S+: each may be its split 'train'"):
        rows.load_rows(str(tmp_path), "train")


def test_a_part_of_a_split_that_is_missing_is_told(tmp_path):
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match="has 1 of the 2 files of its split 'train'"):
        rows.load_rows(str(tmp_path), "train")


def test_rows_that_are_not_there_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "train.jsonl").write_text('{"prompt": "p"}\n')
    for name, split, message in (
        ("./nowhere", "train", "there is no such file or folder"),
        (str(tmp_path / "notes.txt"), "train", "a .txt file; give one of .jsonl"),
        (str(tmp_path), "test", "has no split 'test'; it has train"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.load_rows(name, split)


def test_texts_of_a_csv_file_stay_as_they_are(tmp_path):
    lines = ["year,code,label,completion", "1990,001,true,None", ",002,false,N/A"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    for streaming in (False, True):
        found = list(rows.load_rows(str(tmp_path / "rows.csv"), "train", streaming=streaming))
        assert [list(row.values()) for row in found] == [
            ["1990", "001", "true", "None"],
            [None, "002", "false", "N/A"],
        ]


@pytest.mark.parametrize("form", ["lines", "list", "nested", "compressed"])
def test_dates_of_a_json_file_stay_the_texts_that_they_are(form, tmp_path):
    given = [{"prompt": "when?", "completion": f"2021-01-0{day}", "at": f"2021-01-0{day}T10:00:00"} for day in (1, 2)]
    if form == "nested":
        given = [{"messages": [{"role": "user", "content": row["completion"]}]} for row in given]
    lines = json.dumps(given) if form == "list" else "\n".join(map(json.dumps, given))
    file = tmp_path / ("rows.json" if form == "list" else "rows.jsonl.gz" if form == "compressed" else "rows.jsonl")
    file.write_bytes(gzip.compress(lines.encode()) if form == "compressed" else lines.encode())
    for streaming in (False, True):
        assert list(rows.load_rows(str(file), "train", streaming=streaming)) == given
    file.write_bytes(file.read_bytes().replace(b"2021", b"2022") if form != "compressed" else file.read_bytes())
    assert ("2022" in str(list(rows.load_rows(str(file), "train")))) == (form != "compressed")


def test_rows_that_are_held_out_are_not_trained_on():
    dataset = Dataset.from_list([{"prompt": f"p{i}"} for i in range(30)])
    kept, held_out = rows.hold_out(dataset, 200, seed=0)
    assert (len(kept), len(held_out)) == (27, 3)
    assert sorted(kept["prompt"][:] + held_out["prompt"][:]) == sorted(dataset["prompt"][:])
    assert len(rows.hold_out(dataset, 2, seed=0)[1]) == 2


def test_columns_become_conversations_by_templates():
    dataset = Dataset.from_list([{"question": "1 + 1?", "answer": "{2}", "id": 7}])
    prompt, answer = {"role": "user", "content": "Solve: 1 + 1?"}, {"role": "assistant", "content": "{2}"}
    both = rows.from_templates(dataset, "Solve: {question}", "{answer}")
    assert both[:] == {"prompt": [[prompt]], "completion": [[answer]]}
    assert list(rows.from_templates(dataset.to_iterable_dataset(), "Solve: {question}", None)) == [
        {"prompt": [prompt]}
    ]
    for prompt_template, completion_template, message in (
        ("{what}", None, r"prompt_template names \['what'\], and the rows have the columns \['question'"),
        ("{question}", "fixed", "completion_template='fixed' names no column"),
        (None, "{answer}", "needs a prompt_template"),
        ("{question", None, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            rows.from_templates(dataset, prompt_template, completion_template)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_null_in_a_column_of_a_template_leaves_the_text_empty_and_the_row_is_named(is_stream):
    dataset = Dataset.from_list([{"d": "hi", "s": "x"}, {"d": None, "s": "y"}, {"d": "ho", "s": None}])
    made = rows.from_templates(
        dataset.to_iterable_dataset() if is_stream else dataset, "Summarize: {d} ({d})", "It says {s}"
    )
    texts = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in made]
    assert texts == [("Summarize: hi (hi)", "It says x"), ("", "It says y"), ("Summarize: ho (ho)", "")]


@pytest.mark.parametrize("null, problem", [("d", "have no prompt"), ("s", "have no reference response")])
def test_a_null_in_a_column_of_a_template_is_reported_by_row(null, problem):
    dataset = Dataset.from_list([{"d": "hi", "s": "x"}, {"d": "hi", "s": "x", null: None}])
    tokenizer = byte_tokenizer()
    rules = RowRules(None, None, needs_response=True, eos_token_ids=(tokenizer.eos_token_id,))
    with pytest.raises(ValueError, match=f"1 of 2 rows of the train data set {problem}.* Row 1. "):
        prepare_dataset(rows.from_templates(dataset, "Summarize: {d}", "It says {s}"), tokenizer, rules)


# The commands on tiny models


MESSAGES = [{"role": "user", "content": "hello 世界"}, {"role": "assistant", "content": "hi 🎉"}]
FORMS = {
    "messages": {"messages": MESSAGES},
    "prompts": {"prompt": MESSAGES[:1]},
    "columns": {"question": "hello 世界", "answer": "hi 🎉"},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_any_form_is_trained_on_compared_and_reported(form, assets, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([json.dumps(FORMS[form])] * 20))
    out = tmp_path / "out"
    templates = {"prompt_template": "{question}", "completion_template": "{answer}"} if form == "columns" else {}
    settings = {
        **templates,
        "dataset_name": file,
        "output_dir": out,
        "save_strategy": "no",
        "draft_rows": 1,
        "max_steps": 1,
    }
    code, output = run(["train", *arguments_for(assets, **settings)], capsys)
    assert code == 0
    assert "2 of its train rows are held out, 18 are left to train on" in output
    assert "The student before and after, on 2 held-out prompts" in output
    assert re.search(r"step 1/1  loss \d", output)
    found = json.loads((out / "metrics.json").read_text())
    assert ("rouge1_reference" in found["comparison"]["metrics"]) == (form != "prompts")
    assert "draft_tokens_per_forward_greedy" in found["comparison"]["metrics"]
    assert found["progress"] == {"step": 1, "num_steps": 1, "is_over": True}
    assert (out / "samples.html").exists() and (out / "model.safetensors").exists()
    assert f"| teacher | `{assets / 'teacher'}` |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "column", "reason"),
    [
        ({"teacher_model_name_or_path": "teacher"}, "messages", None),
        ({"teacher_model_server_url": ["http://localhost:1"]}, "messages", "no single teacher"),
        ({"teacher_models": {"a": "one", "b": "two"}}, "messages", "no single teacher"),
        ({"teacher_model_kind": "ema"}, "messages", "the student itself"),
        ({"teacher_model_name_or_path": "teacher"}, "privileged_context", "differ from the student's"),
    ],
)
def test_the_student_is_compared_by_default_where_one_teacher_is_at_hand(options, column, reason, tmp_path, capsys):
    rows = Dataset.from_dict({column: ["text"]})
    script_args, training_args = (
        train_options.TrainArguments(dataset_name="rows.jsonl"),
        SKDConfig(output_dir=str(tmp_path), bf16=False, **options),
    )
    train_rows.decide_comparison(script_args, training_args, rows)
    assert script_args.compare is (reason is None)
    assert (reason or "") in capsys.readouterr().out
    wanted = train_options.TrainArguments(dataset_name="rows.jsonl", compare=True)
    train_rows.decide_comparison(wanted, training_args, rows)
    assert wanted.compare is True


@pytest.mark.slow
def test_speckd_is_trained_without_a_comparison_where_none_is_wanted(assets, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"output_dir": out, "trainer": "speckd", "gate_top_k": 9, "compare": False, "max_steps": 1}
    code, output = run(["train", *arguments_for(assets, **settings)], capsys)
    assert code == 0 and "before" not in output
    assert json.loads((out / "evaluation.json").read_text())["settings"]["gate_top_k"] == 9


@pytest.mark.slow
def test_two_checkpoints_are_compared_and_one_is_evaluated_with_the_same_figures(assets, tmp_path, capsys):
    common = ["--teacher", assets / "teacher", "--dataset_name", assets / "text", "--max_new_tokens", "4"]
    common += ["--metrics", "exact_match", "rouge", "--num_draft_tokens", "2"]
    evaluated, compared = tmp_path / "one.json", tmp_path / "two.json"
    code, output = run(["evaluate", "--student", assets / "student", *common, "--output_file", evaluated], capsys)
    assert code == 0 and "KL on teacher's text" in output and "exact match teacher" in output
    pair = ["--before", assets / "student", "--after", assets / "teacher"]
    code, output = run(["compare", *pair, *common, "--output_file", compared], capsys)
    assert code == 0 and "better" in output
    one, two = (json.loads(path.read_text()) for path in (evaluated, compared))
    for name, metric in two["comparison"]["metrics"].items():
        assert metric["before"]["value"] == pytest.approx(one["metrics"][name])
    assert two["comparison"]["metrics"]["kl_teacher_text"]["after"]["value"] == pytest.approx(0, abs=1e-6)
    assert two["comparison"]["metrics"]["draft_accepted_greedy"]["after"]["value"] == 100
    assert [row["before"] for row in two["examples"]] == [row["student"] for row in one["examples"]]


@pytest.mark.slow
def test_rows_with_other_columns_are_scored_and_evaluated_as_their_conversations_are(assets, tmp_path, capsys):
    texts = [("hello", "hi"), ("what now?", "tea"), ("why", "why not")]
    found = []
    for form in ("columns.csv", "messages.jsonl"):
        file, arguments = tmp_path / form, ["--dataset_name", tmp_path / form]
        if form == "columns.csv":
            Dataset.from_list([{"question": asked, "answer": said} for asked, said in texts]).to_csv(file)
            arguments += ["--prompt_template", "Say: {question}", "--completion_template", "{answer}"]
        else:
            Dataset.from_list(
                [
                    {
                        "prompt": [{"role": "user", "content": f"Say: {asked}"}],
                        "completion": [{"role": "assistant", "content": said}],
                    }
                    for asked, said in texts
                ]
            ).to_json(file)
        scores, figures = tmp_path / f"scores of {form}", tmp_path / f"{form}.figures"
        code, output = run(
            ["score", "--model", assets / "teacher", "--output_dir", scores, "--top_k", 3, *arguments], capsys
        )
        assert code == 0, output
        arguments += [
            "--max_new_tokens",
            4,
            "--num_draft_tokens",
            0,
            "--metrics",
            "exact_match",
            "--output_file",
            figures,
        ]
        code, output = run(
            ["evaluate", "--student", assets / "student", "--teacher", assets / "teacher", *arguments], capsys
        )
        assert code == 0, output
        found.append((rows.load_rows(str(scores), "train").to_list(), json.loads(figures.read_text())))
    assert found[0] == found[1] and len(found[0][0]) == 3
    assert {row["reference"] for row in found[0][1]["examples"]} == {"hi", "tea", "why not"}


def test_students_and_teacher_of_three_vocabulary_sizes_are_compared_an_adapter_among_them(assets, tmp_path, capsys):
    """The teacher's texts are for both students, so they are of the ids that all have, the later student's too."""
    for name, size in (("teacher", 300), ("before", 280)):
        shutil.copytree(assets / "teacher", tmp_path / name)
        tiny_model(seed=size, vocab_size=size).save_pretrained(tmp_path / name)
    base = tiny_model(seed=3)
    base.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "after")
    common = ["--teacher", tmp_path / "teacher", "--dataset_name", assets / "text", "--max_new_tokens", 12]
    common += ["--num_draft_tokens", 2, "--metrics", "exact_match", "--output_file", tmp_path / "found.json"]
    code, output = run(["compare", "--before", tmp_path / "before", "--after", tmp_path / "after", *common], capsys)
    assert code == 0, output
    metrics = json.loads((tmp_path / "found.json").read_text())["comparison"]["metrics"]
    assert metrics["kl_teacher_text"]["num_prompts"] == 5 and "draft_accepted_sampled" in metrics


def test_a_later_student_without_a_tokenizer_has_that_of_the_first(assets, tmp_path, capsys, caplog):
    tiny_model(seed=5).save_pretrained(tmp_path / "bare")
    common = ["--teacher", assets / "teacher", "--dataset_name", assets / "text", "--max_new_tokens", 4]
    common += ["--num_draft_tokens", 0, "--metrics", "exact_match"]
    code, output = run(["compare", "--before", assets / "student", "--after", tmp_path / "bare", *common], capsys)
    assert code == 0, output
    assert "bare has no tokenizer, so it was not verified" in caplog.text


@pytest.mark.parametrize("command", ["compare", "watch"])
def test_a_student_of_another_tokenizer_is_refused(command, assets, tmp_path, capsys):
    save_with_swapped_bytes(tmp_path / "other")
    common = ["--teacher", assets / "teacher", "--max_new_tokens", 4]
    rows_and_more = ["--dataset_name", assets / "text", "--num_draft_tokens", 0, "--metrics", "exact_match"]
    students = {
        "compare": ["--before", assets / "student", "--after", tmp_path / "other", *rows_and_more],
        "watch": ["--student", tmp_path / "other"],
    }
    code, output = run([command, *students[command], *common], capsys)
    assert code == 2 and "different tokenizers" in output


def test_another_divergence_is_named_where_its_figures_are(assets, tmp_path, capsys):
    common = ["--teacher", assets / "teacher", "--dataset_name", assets / "text", "--max_new_tokens", 4]
    common += ["--metrics", "exact_match", "--num_draft_tokens", 0, "--divergence", "jsd"]
    for command, students in (
        ("evaluate", ["--student", assets / "student"]),
        ("compare", ["--before", assets / "student", "--after", assets / "teacher"]),
    ):
        file = tmp_path / f"{command}.json"
        code, output = run([command, *students, *common, "--output_file", file], capsys)
        found = json.loads(file.read_text())
        assert code == 0 and "the divergence jsd" in " ".join(output.split())
        assert found.get("comparison", found)["divergence"] == "jsd"


def test_a_response_that_takes_all_positions_of_a_model_is_refused_before_models_load(assets, tmp_path, capsys):
    shutil.copytree(assets / "student", tmp_path / "short")
    tiny_model(max_position_embeddings=64).save_pretrained(tmp_path / "short")
    common = ["--teacher", assets / "teacher", "--dataset_name", assets / "text", "--max_new_tokens"]
    code, output = run(["evaluate", "--student", assets / "student", *common, 512], capsys)
    assert code == 2
    assert "max_new_tokens=512 leaves no room for a prompt: the student has 512 positions" in output
    assert "Lower max_new_tokens." in output and "max_prompt_length" not in output
    pair = ["--before", assets / "student", "--after", tmp_path / "short"]
    code, output = run(["compare", *pair, *common, 64], capsys)
    assert code == 2 and "max_new_tokens=64 leaves no room for a prompt: the student after has 64 positions" in output


def test_prompts_that_leave_no_room_are_left_out_with_a_note_of_options_that_the_command_has(
    assets, tmp_path, capsys, caplog
):
    rows = [{"prompt": "x" * 497}, {"prompt": "x" * 496}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["evaluate", "--student", assets / "student", "--teacher", assets / "teacher", "--max_new_tokens", 16]
    command += ["--dataset_name", tmp_path / "rows.jsonl", "--num_draft_tokens", 0, "--num_rows", 0]
    code, output = run([*command, "--output_file", tmp_path / "found.json"], capsys)
    assert code == 0
    (note,) = [record.message for record in caplog.records if "held-out data set" in record.message]
    assert "1 of 2 rows" in note and "over the 496 tokens that the models' positions leave" in note
    assert "Lower max_new_tokens" in note and "max_prompt_length" not in note
    assert len(json.loads((tmp_path / "found.json").read_text())["examples"]) == 1


@pytest.mark.slow
@pytest.mark.slow
def test_a_set_is_evaluated_on_without_a_comparison(assets, tmp_path, capsys):
    settings = {
        "output_dir": tmp_path / "out",
        "compare": False,
        "max_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    code, output = run(["train", *arguments_for(assets, **settings)], capsys)
    assert code == 0 and "before and after" not in output
    assert [entry["step"] for entry in read_logs(tmp_path / "out" / "logs.jsonl") if "eval_loss" in entry] == [1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compare_at_evaluation": True}, "no effect without eval_strategy"),
        (
            {"compare_at_evaluation": True, "compare": False, "eval_strategy": "epoch"},
            "no effect without a comparison",
        ),
        ({"report_to": "tensorboard"}, "report_to='tensorboard', which is not installed"),
    ],
)
def test_a_setting_that_cannot_act_is_told_before_models_load(
    settings, message, assets, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "is_tensorboard_available", lambda: False)
    code, output = run(["train", *arguments_for(assets, output_dir=tmp_path / "out", **settings)], capsys)
    assert code == 2 and message in output


def test_a_run_that_is_killed_leaves_what_its_report_needs(assets, tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"output_dir": out, "save_strategy": "no", "max_steps": 3000, "draft_rows": 0, "log_fixed_prompts": 1}
    command = [sys.executable, "-m", "skd_trl", "train", *arguments_for(assets, **settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_logs(out / "logs.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    code, output = run(["report", out], capsys)
    assert code == 0 and output.count(str(out)) == 3
    logs = read_logs(out / "logs.jsonl")
    found = json.loads((out / "metrics.json").read_text())
    assert found["progress"] == {"step": len(logs), "num_steps": 3000, "is_over": False}
    assert found["training"]["loss"]["last"] == logs[-1]["loss"]
    page = (out / "samples.html").read_text()
    assert f"step {len(logs)} of 3000" in page and 'id="progress"' in page and 'id="texts"' in page


# Watching


WATCHED = ["--prompt", "hello", "--num_draft_tokens", "3", "--max_new_tokens", "10"]
WATCHED += ["--teacher_temperature", "1", "--teacher_top_p", "1"]


def test_a_teacher_that_is_the_student_is_warned_about(assets, tmp_path, caplog):
    path = str(assets / "student")
    config = SKDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_new_tokens=4, max_length=32)
    rows = Dataset.from_list([{"prompt": "q"}])
    SKDTrainer(path, path, config, train_dataset=rows)
    assert f"Student and teacher are both {path!r}" in caplog.text


def test_watching_shows_every_token_of_the_response_and_who_wrote_it(assets, capsys):
    watched = ["watch", "--student", assets / "student", "--teacher", assets / "teacher", *WATCHED]
    code, output = run([*watched, "--accept_top_k", "60"], capsys)
    assert code == 0
    tokens, accepted, replaced = (
        int(re.search(pattern, output).group(1))
        for pattern in (r"(\d+) tokens in", r"(\d+) accepted,", r"(\d+) replaced \(")
    )
    assert accepted + replaced == tokens
    assert replaced > 0 and output.count(">⟦") >= replaced
    code, again = run([*watched, "--accept", "never"], capsys)
    assert code == 0 and "10 replaced" in again or "100%" in again


def rounds_shown(marks) -> str:
    tokenizer = byte_tokenizer()
    a, b, c, d, e, f = tokenizer("abcdef").input_ids[:6]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(watch.rounds_table([([a, b, c], 1), ([e, f, a], 3)], [a, d, e, f], tokenizer, marks))
    return console.export_text()


def test_the_rounds_of_a_draft_show_what_was_accepted_replaced_and_dropped():
    text = rounds_shown(watch.Marks.of(Console(force_terminal=True, color_system="truecolor")))
    assert "a b>d c" in text and "1 of 3" in text
    assert "e f" in text and "2 of 3" in text and EOS not in text  # the last one is behind the end


def test_in_a_pipe_the_tokens_are_told_apart_without_colours():
    text = rounds_shown(watch.Marks.of(Console(file=io.StringIO())))
    assert "a ~b~>⟦d⟧ (c)" in text
    assert "~proposed~>⟦replaced by the teacher⟧  (dropped)" in text


def test_the_console_script_is_installed_where_the_package_is():
    if shutil.which("skd") is None:
        pytest.skip("the package was not installed again since it has a console script")
    assert "train" in subprocess.run(["skd"], capture_output=True, text=True, check=True).stdout
