"""Starting several processes and getting rid of them again, whatever becomes of them."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


ROOT = Path(__file__).parent.parent
# Limits are for what hangs, not for what is slow: a machine that others use takes three times as long as an idle one.
HANGS_AFTER = 900.0


@dataclass(frozen=True)
class Outcome:
    returncode: int
    output: str
    seconds: float


def launch(command: list[str], expect_failure: bool = False) -> Outcome:
    """Runs a module of this Python from the repository's root, on CPU; nothing of it is left afterwards.

    Raises:
        `AssertionError`: if it does not end in `HANGS_AFTER` seconds, or fails, with the end of its output.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "cpu_processes"])),
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=HANGS_AFTER)
    except subprocess.TimeoutExpired:
        kill_family(process)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end in {HANGS_AFTER:.0f} s:\n{output[-6000:]}") from None
    except BaseException:  # the test's own limit, or Control-C
        kill_family(process)
        raise
    outcome = Outcome(process.returncode, output, time.perf_counter() - start)
    if not expect_failure:
        assert outcome.returncode == 0, f"{command} failed:\n{output[-6000:]}"
    return outcome


def kill_family(process: subprocess.Popen) -> None:
    """Workers sit in sessions of their own, out of reach of a signal to the launcher's group."""
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [*family, process]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass


def torchrun(command: list[str], num_processes: int = 2, **kwargs) -> Outcome:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return launch([*launcher, *command], **kwargs)


def accelerate_launch(mode: str, command: list[str]) -> Outcome:
    """`accelerate launch` with the CPU variant of examples/accelerate/<mode>.yaml, on a free port."""
    config = f"examples/accelerate/cpu/{mode}.yaml"
    return launch(["accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", *command])
