"""`skd`, or `python -m skd_trl`: its commands, each a module of `commands/`.

Exit codes: 0, or 1 where a command's answer is no, or 2 for a command that cannot be understood or carried out.
"""

import argparse
import importlib
import os
import sys
import warnings

from . import __version__


# Name -> module of `commands/`, its function, and what it does.
COMMANDS = {
    "check": ("check", "run", "whether a student and a teacher work together, and what they take"),
    "train": ("train", "run", "distil a teacher into a student"),
    "evaluate": ("evaluate", "run_evaluate", "score a student on held-out prompts"),
    "compare": ("evaluate", "run_compare", "score two students of one teacher on the same prompts"),
    "watch": ("watch", "run", "show one response being written, round by round"),
    "report": ("report", "run", "figures, plots and a page of a run, also of one that is not over"),
    "score": ("score", "run", "write a teacher's scores of given responses, for a training without it"),
    "serve": ("serve", "run", "a teacher on vLLM, for trainers on other machines"),
    "env": ("env", "run", "versions and devices, for issues"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` (by default those of the process) name, and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if os.getcwd() not in sys.path and "" not in sys.path:
        # A console script does not look there for the user's own modules.
        sys.path.insert(0, os.getcwd())
    # TRL gives transformers the name that all its releases know; whoever runs a command can do nothing about that.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    if arguments and arguments[0] in COMMANDS:
        module, function, _ = COMMANDS[arguments[0]]
        return getattr(importlib.import_module(f"skd_trl.commands.{module}"), function)(arguments[1:])
    parser = argparse.ArgumentParser("skd", description="Speculative knowledge distillation for TRL.")
    parser.add_argument("--version", action="version", version=f"skd_trl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command")
    for name, (_, _, what) in COMMANDS.items():
        commands.add_parser(name, help=what)
    parser.parse_args(arguments)  # refuses all but a request for help
    parser.print_help()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
