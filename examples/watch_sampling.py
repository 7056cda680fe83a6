"""
Watch student and teacher of the offline demo write one response together, round by round: `skd watch` with their paths.

python examples/watch_sampling.py
python examples/watch_sampling.py --accept_top_k 5 --num_draft_tokens 3 --prompt "What does a compiler do?"
python examples/watch_sampling.py --student Qwen/Qwen2-0.5B-Instruct --teacher Qwen/Qwen2-7B-Instruct
"""

import sys
from pathlib import Path

from skd_trl.commands.watch import run


STUDENT, TEACHER = "examples/assets/student-20", "examples/assets/teacher"


if __name__ == "__main__":
    if not Path(TEACHER).is_dir() and "--teacher" not in sys.argv:
        sys.exit(f"error: {TEACHER} does not exist; run `python examples/offline_assets.py` first.")
    sys.exit(run(["--student", STUDENT, "--teacher", TEACHER, *sys.argv[1:]]))
