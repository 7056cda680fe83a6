"""Hides `trl.experimental.gkd`, as after its removal from TRL: `PYTHONPATH=tests pytest -p without_gkd`, or imported first."""

import sys


NAME = "trl.experimental.gkd"


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == NAME or name.startswith(f"{NAME}."):
            raise ModuleNotFoundError(f"{name} is hidden by {__file__}", name=name)


if NAME in sys.modules:
    raise RuntimeError(f"{NAME} is already imported, so it cannot be hidden: import {__name__} before skd_trl.")
sys.meta_path.insert(0, Hidden())


def pytest_report_header():
    return f"{NAME} is hidden"
