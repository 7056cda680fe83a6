"""Time-outs by mark, and deprecations that libraries log, rather than warn of, as failures (warnings: `filterwarnings` in pyproject.toml)."""

import logging

import pytest
from processes import HANGS_AFTER


LIBRARIES = ("transformers", "trl", "accelerate", "peft", "datasets")


def pytest_collection_modifyitems(items):
    """Time-outs are for what hangs: a busy machine takes three times as long as an idle one. Others: `timeout` in pyproject.toml."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.timeout(2 * HANGS_AFTER))  # several starts, each with its limit
        elif item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(HANGS_AFTER))


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
