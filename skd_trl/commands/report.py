"""`skd report`: metrics.json, training.png and samples.html of a run, also of one that is still going on or was killed."""

from dataclasses import dataclass, field
from pathlib import Path

from .options import Command


@dataclass
class ReportArguments:
    """What `skd report` takes."""

    run_dir: str = field(default="", metadata={"help": "Output directory of a training run."})

    def __post_init__(self):
        if not self.run_dir:
            raise ValueError("--run_dir is missing: the output directory of a training run.")


REPORT = Command(
    "report",
    "Writes metrics.json, training.png and samples.html into the output directory of a run: one that is over, is still going on, or "
    "was killed.",
    (ReportArguments,),
    "  skd report out",
)


def run(arguments: list[str]) -> int:
    """The command itself; the directory may be given without the option's name."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run_dir", *arguments]
    (options,) = REPORT.parse(arguments)
    with REPORT.one_line_errors():
        try:
            from ..evaluation.report import write_report
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed; pip install 'skd_trl[report]'.") from error
        for path in write_report(Path(options.run_dir)):
            print(path)
    return 0
