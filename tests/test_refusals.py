"""docs/refusals.md says what the source says: every message that refuses or warns, in its own words."""

import importlib.util
import re
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_model

from skd_trl import SKDConfig, SKDTrainer


ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("refusals", ROOT / "docs" / "refusals.py")
refusals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(refusals)


def plain(text):
    return re.sub(r"\\([<*])", r"\1", text)


def test_the_page_is_that_of_the_source():
    assert refusals.PAGE.read_text() == refusals.page(), "run `make refusals`"


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout": "everybody"},
        {"packing": True},
        {"max_new_tokens": 256, "max_length": 128},
        {"divergence": "jsd", "divergence_kwargs": {"beta": 0.1}, "beta": 0.3},
        {"schedules": {"accept_top_k": {"end": 5}}, "rollout": "student"},
    ],
)
def test_an_error_is_found_on_the_page_by_its_words(tmp_path, settings):
    with pytest.raises(ValueError) as error:
        SKDConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    patterns = [
        re.sub(r"‹[^›]*›", ".*", re.escape(plain(line.removeprefix("- error: "))))
        for line in refusals.PAGE.read_text().splitlines()
        if line.startswith("- error: ")
    ]
    assert any(re.fullmatch(pattern, str(error.value), re.DOTALL) for pattern in patterns), error.value


def test_a_warning_of_a_check_is_on_the_page(tmp_path, caplog):
    args = SKDConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=128, max_new_tokens=16)
    with pytest.raises(ValueError):  # no data set; the pair has been checked by then
        SKDTrainer(tiny_model(), tiny_model(seed=1), args, processing_class=byte_tokenizer())
    (message,) = [text for text in caplog.messages if "No tokenizer was found for the teacher" in text]
    words = message.split(". ")[-1]
    assert words in refusals.PAGE.read_text()
