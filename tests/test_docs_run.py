"""README and docs as they are read: every block of code and every command is run, page by page, or is listed with the reason why not.

The folder that they run in has tiny models under the names that the pages use (`Qwen/Qwen2-0.5B-Instruct` is a folder in it), so the
code of a block is not touched. Commands that train or sample get options that make them small. What needs a GPU, a server, a hub or
hours is `NOT_RUN`: its options are parsed by its own parser, and its files have to exist.
"""

import argparse
import contextlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from teacher_server import serving
from test_docs import FENCE, PAGES, ROOT
from tiny import save_models
from transformers import AutoModelForCausalLM

from skd_trl import ACCEPTANCE_RULES, DIVERGENCES, GATES, SKDConfig, SKDTrainer
from skd_trl.__main__ import main
from skd_trl.commands.options import Command
from skd_trl.serving.server import _parser as serve_parser


MODELS = {
    "STUDENT": 2, "TEACHER": 1, "out": 3, "examples/assets/student-20": 2, "examples/assets/teacher": 1,
    "Qwen/Qwen2-0.5B-Instruct": 2, "Qwen/Qwen2-7B-Instruct": 1, "Qwen/Qwen2.5-0.5B-Instruct": 2,
    "Qwen/Qwen3-0.6B": 2, "Qwen/Qwen3-8B": 1, "Qwen/Qwen2.5-7B-Instruct": 1, "Qwen/Qwen2.5-Coder-7B-Instruct": 3,
}  # fmt: skip
QUESTIONS = ("What does a compiler do?", "Name a colour.", "2 + 2?", "What is a queue?") * 3

# What is added to a command so that it takes a second, by its beginning.
TRAINING = (
    "--max_steps 2 --max_new_tokens 4 --num_draft_tokens 2 --per_device_train_batch_size 2 --logging_steps 1 --use_cpu true "
    "--bf16 false --report_to none --save_strategy no"
)
SMALL = {
    "skd train --config": f"{TRAINING} --max_prompt_length 64 --gradient_accumulation_steps 1 --draft_rows 1",
    "skd train": TRAINING,
    "skd evaluate": "--max_new_tokens 4 --num_rows 3",
    "skd compare": "--max_new_tokens 4 --num_rows 3",
    "skd check": "--use_cpu true",
    "skd report": "",
    "skd score": "",
    "python examples/watch_sampling.py": "--max_new_tokens 6",
    "python examples/train_summarization.py": f"{TRAINING} --num_eval_rows 2 --draft_rows 2",
}
# The beginning of a command, and why it is parsed and not run.
NOT_RUN = {
    "skd serve": "needs vLLM: tests/vllm_checks.py",
    "vllm serve": "is vLLM's",
    "python -m venv": "of Python",
    "accelerate launch": "needs several GPUs and a hub: tests/test_distributed.py, tests/test_engines.py",
    "python examples/offline_assets.py": "downloads 1.6 GB: tests/test_examples.py runs its parts",
    "python examples/compare_methods.py": "takes an hour: tests/test_examples.py runs it in small",
    "python -m pytest": "this",
    "pip install": "needs an index: `make package` in CI",
    "make": "CI calls these targets, but for the demo, whose command examples/README.md has",
    "source": "of a shell",
    "xdg-open": "needs a desktop",
}
# Names that a block takes from its reader.
READER = {"docs/teachers.md": {"rows": Dataset.from_list([{"prompt": "2 + 2?", "teacher_id": "code"}, {"prompt": "Hi", "teacher_id": "prose"}])}}  # fmt: skip
# What a reader of a page has run before.
BEFORE = {"docs/report.md": "python examples/train_summarization.py --config examples/configs/demo.yaml"}
LANGUAGES = {"bash", "python", "yaml", "json", "bibtex"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The folder in which a reader of the docs works: the repository's examples, models and rows by the names of the pages."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").symlink_to(ROOT / "tests")
    save_models(folder, MODELS)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "A word."}]}
        for question in QUESTIONS
    ]
    text = "\n".join(map(json.dumps, rows))
    pairs = "\n".join(json.dumps({"prompt": row["messages"][:1], "completion": row["messages"][1:]}) for row in rows)
    for name in ("rows.jsonl", "held_out.jsonl"):
        (folder / name).write_text(text)
    (folder / "dialogues.csv").write_text("dialogue,summary\n" + '"A: Hi. B: Bye.",They part.\n' * 4)
    (folder / "HuggingFaceH4/ultrachat_200k").mkdir(parents=True)
    for split in ("train_sft", "test_sft"):
        (folder / f"HuggingFaceH4/ultrachat_200k/{split}.jsonl").write_text(text)
    (folder / "trl-lib/Capybara").mkdir(parents=True)
    (folder / "trl-lib/Capybara/train.jsonl").write_text("\n".join(text.splitlines()[:2]))
    (folder / "examples/assets/text").mkdir()
    for split in ("train", "test"):
        (folder / f"examples/assets/text/{split}.jsonl").write_text(pairs)
    return folder


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block of code. A line that begins with ```{ is MyST's and no code."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_as_it_is_printed(page, reader, monkeypatch):
    blocks = blocks_of(page)
    if not blocks:
        pytest.skip("no code")
    # A block's defaults ask for bf16, which transformers refuses without a GPU; a CPU computes it as well.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(reader / "cache"))
    monkeypatch.chdir(reader)
    monkeypatch.setattr(sys, "path", [str(reader / "examples"), str(reader / "benchmarks"), *sys.path])
    name = str(page.relative_to(ROOT))
    names = {"__name__": "docs", **READER.get(name, {})}
    if name in BEFORE and not Path("runs/demo").exists():
        run_command(BEFORE[name])
    for language, text in blocks:
        assert language in LANGUAGES, f"{name}: nothing says how a block of {language!r} is run"
        if language == "python":
            with restored_registries():
                exec(compile(text, f"<{name}>", "exec"), names)
        elif language == "bash":
            for command in commands_of(text):
                run_command(command)
        elif language == "yaml":
            Path("page.yaml").write_text(text)
            run_command("skd train --config page.yaml")
        elif language == "json":
            make_trainer_of(json.loads(text))


def commands_of(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.partition("#")[0].split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


def run_command(command: str) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"\w+=\S*", words[0]):  # environment variables
        words = words[1:]
    command = shlex.join(words)
    if any(command.startswith(beginning) for beginning in NOT_RUN):
        return parse(words)
    beginning = next((one for one in SMALL if command.startswith(one)), None)
    assert beginning is not None, f"{command!r} is in neither SMALL nor NOT_RUN"
    words += shlex.split(SMALL[beginning])
    with serving(AutoModelForCausalLM.from_pretrained("TEACHER"), top_k=64) as server:
        words = [word.replace("http://HOST:8000", server.url) for word in words]
        code = main(words[1:]) if words[0] == "skd" else run_script(words[1:])
    assert not code, command


def run_script(words: list[str]) -> int | str | None:
    """A script with its arguments, in this process."""
    before, sys.argv = sys.argv, words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def parse(words: list[str]) -> None:
    """What can be known of a command without running it."""
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pip":
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = [name for word in words for name in re.findall(r"\[(\w+)\]", word)]
        assert set(extras) <= set(setup["options.extras_require"]), words
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or load_config_from_file(launch.config_file)
        parse_script([launch.training_script, *launch.training_script_args])
    elif words[:2] == ["skd", "serve"]:
        serve_parser().parse_known_args(words[2:])  # it leaves what it does not know to vLLM
    elif words[0] == "skd":
        with parsing_only(), pytest.raises(Parsed):
            main(words[1:])
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all(Path(word).exists() for word in words[3:])
    elif words[0] == "python" and words[1] != "-m":
        parse_script(words[1:])


class Parsed(Exception):
    """Raised once the options are understood."""


def parse_script(words: list[str]) -> None:
    with parsing_only(), pytest.raises(Parsed):
        assert not run_script(words), words


@contextlib.contextmanager
def parsing_only():
    """Parsers end what called them with [`Parsed`]."""

    def then_end(real):
        def parse(*args, **kwargs):
            real(*args, **kwargs)
            raise Parsed

        return parse

    with pytest.MonkeyPatch.context() as patch:
        # TRL's parser calls `parse_known_args`, a command's parser calls TRL's.
        patch.setattr(argparse.ArgumentParser, "parse_args", then_end(argparse.ArgumentParser.parse_args))
        patch.setattr(Command, "parse", then_end(Command.parse))
        yield


@contextlib.contextmanager
def restored_registries():
    registries = (ACCEPTANCE_RULES, DIVERGENCES, GATES)
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)


def make_trainer_of(row: dict) -> None:
    """A row that a page prints is one that the trainer takes."""
    trainer = SKDTrainer(
        model="STUDENT", teacher_model="TEACHER", args=SKDConfig("row_out"), train_dataset=Dataset.from_list([row])
    )
    assert len(trainer.train_dataset) == 1


def all_commands() -> list[str]:
    return [
        command
        for page in PAGES
        for language, text in blocks_of(page)
        if language == "bash"
        for command in commands_of(text)
    ]


@pytest.mark.parametrize("beginning", [*SMALL, *NOT_RUN])
def test_no_entry_is_left_of_a_command_that_is_gone(beginning):
    assert any(beginning in command for command in all_commands())


def test_every_target_that_a_page_names_is_called_by_ci_or_runs_a_command_that_is_tested():
    workflows = " ".join(path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml"))
    named = {word for command in all_commands() if command.startswith("make ") for word in command.split()[1:]}
    called = set(re.findall(r"run: make ([\w-]+)", workflows))
    makefile = (ROOT / "Makefile").read_text()
    scripts = [command.partition(" ")[2] for command in all_commands() if command.startswith("python examples/")]
    for target in named - called:
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE).group(1)
        needed_by_ci = any(re.search(rf"^{one}:.*\b{target}\b", makefile, re.MULTILINE) for one in called)
        assert needed_by_ci or any(script in recipe for script in scripts), target
