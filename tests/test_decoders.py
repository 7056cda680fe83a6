"""The script behind docs/decoders.md: its check passes right decoders, and can fail."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import decoders  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "xglm"])  # XGLM views positions as one row
def test_a_decoder_that_the_sampler_can_run_is_found_exact(name):
    result = decoders.check(decoders.entries()[name])
    assert result.verdict == "exact", result.reason
    assert 0 < result.figure < decoders.TOLERANCE


def test_a_model_that_the_package_refuses_is_found_refused_with_its_reason():
    result = decoders.check(decoders.entries()["roberta"])
    assert result.verdict == "refused"
    assert "RobertaForCausalLM" in result.reason


@pytest.mark.parametrize("name, fault", [("gemma2", "window"), ("llama", "position"), ("llama", "stale")])
def test_a_planted_fault_is_not_found_exact(name, fault):
    """Found wrong by the script, or refused where the package proves its cache before it samples."""
    assert decoders.check(decoders.entries()[name], fault).verdict in ("wrong", "refused")


def test_a_window_that_a_model_does_not_have_is_no_fault():
    assert decoders.check(decoders.entries()["llama"], "window").verdict == "exact"


def test_an_abort_and_a_model_that_never_ends_are_verdicts(monkeypatch):
    import faulthandler
    import os
    import time

    def abort():
        faulthandler.disable()  # pytest's would print a traceback that looks like a failure
        os.abort()

    bodies = {"abort": abort, "hang": lambda: time.sleep(60)}
    entries = {name: decoders.Entry(name, "LlamaForCausalLM", {}) for name in bodies}
    monkeypatch.setattr(decoders, "check", lambda entry, fault: bodies[entry.model_type]())
    results = decoders.check_all(entries, None, timeout=10, num_processes=2)
    assert results["abort"] == decoders.Result("crash", "the process ended with exit code -6")
    assert results["hang"] == decoders.Result("crash", "no end within 10 seconds")


def test_a_page_is_read_back_as_it_was_written():
    page = Path(__file__).parents[1] / "docs" / "decoders.md"
    try:
        made, results = decoders.read_page(page)
    except SystemExit as refusal:  # other versions are installed
        pytest.skip(str(refusal))
    tables = page.read_text().partition("| verdict |")[2]
    assert decoders.table(decoders.entries(), results, made).partition("| verdict |")[2] == tables
    assert made.startswith("Made by `python benchmarks/decoders.py")
