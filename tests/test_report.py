"""The report of a run: what it reads, what the page shows, and what of it a killed run has."""

import itertools
import json
import math
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from skd_trl.evaluation import page as pages
from skd_trl.evaluation import report
from skd_trl.training import run_files


@pytest.fixture
def run_dir(tmp_path):
    history = [
        {"step": step, "loss": 2.0 / step, "acceptance_rate": 0.5, "replaced_share": 0.5, "epoch": 0.1}
        for step in range(1, 31)
    ]
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [*history, {"step": 30, "train_loss": 1.0}]})
    )
    (tmp_path / "completions").mkdir()
    for step in range(1, 31):
        row = {
            "step": step,
            "prompt": "<script>alert('prompt')</script>",
            "response": "unused",
            "tokens": ["<b>bold</b>", " plain", "\n", "&amp;", "<|im_end|>"],
            "replaced": [True, False, False, True, False],
            "proposals": ["<i>", " plain", "\n", " other", "<|im_end|>"],
            "is_fixed": False,
        }
        pd.DataFrame([row] * 2).to_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
    return tmp_path


def test_the_page_marks_replaced_tokens_and_escapes_every_text(run_dir):
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    assert "<script" not in page and "<b>bold" not in page
    assert "&lt;script&gt;" in page
    num_samples = pages.MAX_STEPS * 2
    marked = re.findall(r'<span class="token replaced( special)?" title="[^"]*">([^<]*)</span>', page)
    assert [text for _, text in marked] == ["&lt;b&gt;bold&lt;/b&gt;", "&amp;amp;"] * num_samples
    assert page.count('<del class="proposal">') == 2 * num_samples
    assert "in place of the student&#39;s “&lt;i&gt;”" in page


@pytest.mark.parametrize("rollout, said", [("student", "the student alone"), ("interleaved", "together"), (None, "")])
def test_the_page_says_who_wrote_the_responses(run_dir, rollout, said):
    (run_dir / "evaluation.json").write_text(json.dumps({"settings": {"rollout": rollout}}))
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    assert said in page
    assert ("together" in page) == (rollout == "interleaved")


def test_the_page_knows_no_proposal_where_the_teacher_wrote_alone(run_dir):
    for file in (run_dir / "completions").iterdir():
        rows = pd.read_parquet(file)
        rows.assign(proposals=None, replaced=[[True] * 5] * len(rows)).to_parquet(file)
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    assert '<del class="proposal">' not in page
    assert page.count(': the teacher&#39;s"') == 5 * 2 * pages.MAX_STEPS


def test_the_page_needs_no_network(run_dir):
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_the_page_shows_the_first_and_the_last_of_many_steps(run_dir):
    report.write_report(run_dir)
    steps = re.findall(r'id="step-(\d+)"', (run_dir / "samples.html").read_text())
    assert len(steps) == pages.MAX_STEPS
    assert steps[0] == "1" and steps[-1] == "30"


def test_metrics_hold_first_last_and_mean_of_what_was_logged(run_dir):
    report.write_report(run_dir)
    training = json.loads((run_dir / "metrics.json").read_text())["training"]
    assert training["loss"] == pytest.approx({"first": 2.0, "last": 2 / 30, "mean": np.mean(2 / np.arange(1, 31))})
    assert training["train_loss"]["last"] == 1.0
    assert "epoch" not in training


def strict(text: str):
    """JSON as a reader outside Python takes it."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_in_every_file_of_a_run_and_its_report_reads_them_back(tmp_path):
    control = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=3)
    args, log_file = SimpleNamespace(output_dir=str(tmp_path)), run_files.LogFile()
    log_file.on_train_begin(args, control, None)
    for control.global_step, loss in enumerate((2.0, math.inf, math.nan), start=1):
        log_file.on_log(args, control, None, logs={"loss": loss, "grad_norm": math.nan})
    lost = {"value": math.nan, "low": math.nan, "high": math.nan}
    metric = {"before": lost | {"value": 1.0}, "after": lost, "change": lost, "teacher": None, "better": "lower"}
    compared = {"num_prompts": 8, "metrics": {"kl_teacher_text": metric}}
    run_files.write_settings(tmp_path, {"seed": 1}, comparison=compared)
    assert [strict(line)["loss"] for line in (tmp_path / "logs.jsonl").read_text().splitlines()] == [2.0, None, None]
    assert strict((tmp_path / "evaluation.json").read_text())["comparison"]["metrics"]["kl_teacher_text"]["after"] == {
        "value": None, "low": None, "high": None,
    }  # fmt: skip
    report.write_report(tmp_path)
    found = strict((tmp_path / "metrics.json").read_text())
    assert found["training"]["loss"] == {"first": 2.0, "last": None, "mean": None}
    assert found["comparison"]["metrics"]["kl_teacher_text"]["before"]["value"] == 1.0
    page = (tmp_path / "samples.html").read_text()
    assert "1.00" in page and "nan" in page


def test_a_run_without_samples_or_evaluation_is_reported_from_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "loss": float(step)}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert [path.name for path in report.write_report(tmp_path)] == ["metrics.json", "training.png", "samples.html"]
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["loss"]["last"] == 10
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no logs.jsonl and no trainer_state.json.*save_state"):
        report.write_report(tmp_path)


def test_what_convinces_comes_first_and_the_index_leads_to_all_of_it(run_dir):
    (run_dir / "evaluation.json").write_text(json.dumps({"settings": {"seed": 1}, "examples": EXAMPLES}))
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    index = re.findall(r'<a href="#([a-z]+)">', page)
    places = [page.index(f'id="{name}"') for name in index]
    assert index == ["texts", "training", "samples", "settings"]
    assert places == sorted(places)
    assert "<details" not in page  # prompts are readable as they are
    assert "Finished" not in page


EXAMPLES = [{"prompt": "ask", "reference": "so", "teacher": "thus", "before": "eh", "after": "thus"}]


def test_prompts_that_are_sampled_again_show_each_step_beside_the_other(run_dir):
    for file in (run_dir / "completions").iterdir():
        rows = pd.read_parquet(file)
        pd.concat([rows.head(1).assign(is_fixed=True, prompt="again"), rows]).to_parquet(file)
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    progress = page[page.index('id="progress"') : page.index('id="samples"')]
    assert progress.count("again") >= 1 and progress.count('<div class="prompt">') == 1
    assert [int(step) for step in re.findall(r"<dt>step (\d+)<br>", progress)][:2] == [1, 4]
    assert progress.count("2 of 5 replaced") == pages.MAX_STEPS


def test_a_character_of_several_tokens_is_one_piece_and_marked_if_a_part_of_it_is_the_teachers():
    row = {
        "prompt": "p",
        "tokens": ["a", "", "", "世", "", "🎉"],
        "replaced": [False, False, True, False, False, False],
        "proposals": ["a", "", "x", "世", "", "🎉"],
    }
    sample = pages.shown_sample(row)
    assert [(piece["text"], piece["replaced"], piece["proposal"]) for piece in sample["pieces"]] == [
        ("a", False, ""),
        ("世", True, "x"),
        ("🎉", False, ""),
    ]
    assert (sample["num_tokens"], sample["num_replaced"]) == (6, 1)
    assert sample["pieces"][1]["title"].startswith("tokens 2 to 4: the teacher")


def test_a_run_that_was_killed_at_a_third_is_reported_up_to_there(run_dir):
    (run_dir / "trainer_state.json").unlink()
    lines = [{"step": step, "loss": 2.0 / step, "teacher_rank": 3.0, "max_steps": 30} for step in range(1, 11)]
    (run_dir / "logs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 11, "lo')
    before = {"prompts": ["ask"], "references": [None], "teacher_texts": ["thus"], "responses": ["eh"], "values": {}}
    (run_dir / "before.json").write_text(json.dumps(before))
    report.write_report(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["progress"] == {"step": 10, "num_steps": 30, "is_over": False}
    assert metrics["training"]["loss"] == pytest.approx(
        {"first": 2, "last": 0.2, "mean": np.mean(2 / np.arange(1, 11))}
    )
    assert "max_steps" not in metrics["training"]
    page = (run_dir / "samples.html").read_text()
    assert "Not finished: step 10 of 30" in page
    assert "<dd>eh</dd>" in page and "<dd>thus</dd>" in page and '<dt class="own">after</dt>' not in page
    assert "<dt>reference</dt>" not in page
    assert "Rank" in page and "Who wrote the tokens" not in page  # a panel for what the log has, and no other


def test_the_log_that_goes_furthest_is_reported(run_dir):
    (run_dir / "checkpoint-10").mkdir()
    (run_dir / "checkpoint-10" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 10, "loss": 1.0}]})
    )
    (run_dir / "logs.jsonl").write_text(json.dumps({"step": 12, "loss": 0.5}))
    assert report.read_run(run_dir).last_step == 30
    (run_dir / "trainer_state.json").unlink()
    assert report.read_run(run_dir).history == [{"step": 12, "loss": 0.5}]


@pytest.mark.parametrize("older", ["trainer_state.json", "checkpoint-40/trainer_state.json"])
def test_of_two_runs_in_one_directory_the_last_one_is_reported(run_dir, older):
    """Whatever the first one, which went further, has left there."""
    if older != "trainer_state.json":
        (run_dir / "trainer_state.json").unlink()
    (run_dir / older).parent.mkdir(exist_ok=True)
    (run_dir / older).write_text(json.dumps({"log_history": [{"step": 40, "loss": 1.0}]}))
    hour_ago = time.time() - 3600
    os.utime(run_dir / older, (hour_ago, hour_ago))
    (run_dir / "logs.jsonl").write_text(json.dumps({"step": 3, "loss": 0.5}))
    assert report.read_run(run_dir).history == [{"step": 3, "loss": 0.5}]


def test_a_new_run_puts_the_completions_of_an_earlier_one_aside_and_a_resumed_one_does_not(run_dir):
    args, log_file = SimpleNamespace(output_dir=str(run_dir)), run_files.LogFile()
    log_file.on_train_begin(args, SimpleNamespace(is_world_process_zero=True, global_step=7), None)
    assert len(report.read_completions(run_dir)) == 60
    for number in (1, 2):
        log_file.on_train_begin(args, SimpleNamespace(is_world_process_zero=True, global_step=0), None)
        assert report.read_completions(run_dir).empty
        assert any((run_dir / f"completions-{number}").iterdir())
        shutil.copytree(run_dir / "completions-1", run_dir / "completions")


def test_a_run_that_was_made_longer_is_over_where_its_last_step_is(run_dir):
    (run_dir / "trainer_state.json").unlink()
    lines = [{"step": 3, "loss": 1.0, "max_steps": 3}, {"step": 3, "train_runtime": 9.0, "max_steps": 3}]
    for more, is_over in (([], True), ([{"step": 8, "loss": 0.5, "max_steps": 400}], False)):
        (run_dir / "logs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines + more))
        assert report.read_run(run_dir).is_over == is_over


def test_a_killed_run_is_as_long_as_it_was_to_be_where_a_checkpoint_went_as_far_as_the_log(run_dir):
    """A checkpoint's entries do not say how long the run was to be; its state does."""
    (run_dir / "trainer_state.json").unlink()
    (run_dir / "checkpoint-4").mkdir()
    state = {"log_history": [{"step": 4, "loss": 1.0}], "max_steps": 6}
    (run_dir / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    (run_dir / "logs.jsonl").write_text(json.dumps({"step": 4, "loss": 1.0, "max_steps": 6}))
    report.write_report(run_dir)
    assert json.loads((run_dir / "metrics.json").read_text())["progress"] == {
        "step": 4,
        "num_steps": 6,
        "is_over": False,
    }
    assert "Not finished: step 4 of 6" in (run_dir / "samples.html").read_text()


CUT = {"empty": b"", "cut": b'{"log_history": [{"lo', "zeros": b"\0" * 64, "no state": b"3"}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
def test_a_state_that_was_cut_while_it_was_written_is_left_out(run_dir, content):
    (run_dir / "checkpoint-40").mkdir()
    (run_dir / "checkpoint-40" / "trainer_state.json").write_bytes(content)
    assert report.read_run(run_dir).last_step == 30
    (run_dir / "trainer_state.json").write_bytes(content)
    (run_dir / "logs.jsonl").write_text(json.dumps({"step": 12, "loss": 0.5}))
    assert report.read_run(run_dir).history == [{"step": 12, "loss": 0.5}]
    (run_dir / "logs.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no trainer_state.json that can be read"):
        report.read_run(run_dir)


@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desk_in_both_themes(run_dir):
    """Needs playwright and chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    report.write_report(run_dir)
    colours, errors = set(), []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in itertools.product((400, 1400), ("light", "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto((run_dir / "samples.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("figure svg").count() == 2 and page.locator(".replaced").first.is_visible()
            assert not page.locator(".proposal").first.is_visible()
            page.check("#show-proposals")
            assert page.locator(".proposal").first.is_visible()
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        browser.close()
    assert len(colours) == 2 and not errors


def test_the_plots_of_the_page_are_drawn_in_its_colours(run_dir):
    report.write_report(run_dir)
    page = (run_dir / "samples.html").read_text()
    plots = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(plots) == 2  # loss, and who wrote the tokens
    assert not any(re.search(r"#(?!\w*-)[0-9a-f]{6}\b", plot) for plot in plots)
    assert all("currentColor" in plot for plot in plots) and "var(--blue)" in plots[0]
    ids = [set(re.findall(r'id="(m[0-9a-f]+|p[0-9a-f]+)"', plot)) for plot in plots]
    assert not ids[0] & ids[1]
