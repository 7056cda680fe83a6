"""Deprecations that libraries log, rather than warn of, are failures too (warnings: `filterwarnings` in pyproject.toml)."""

import logging

import pytest


LIBRARIES = ("transformers", "trl", "accelerate", "peft", "datasets")


class Deprecations(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if "deprecated" in (message := record.getMessage()):
            self.found.append(f"{record.name}: {message}")


@pytest.fixture(autouse=True)
def nothing_deprecated_is_logged(pytestconfig):
    """Off where warnings are shown only (`-W default`, as with the oldest releases)."""
    if any(option.startswith("default") for option in pytestconfig.getoption("pythonwarnings") or ()):
        yield
        return
    handler = Deprecations()
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    yield
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(handler)
    assert not handler.found
