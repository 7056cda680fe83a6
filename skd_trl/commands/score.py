"""The command `score`: a teacher's scores of given responses, written beside the rows; see `training/score.py`."""

from ..training.score import main


def run(arguments: list[str]) -> int:
    return main(arguments)
