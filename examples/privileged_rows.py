"""Rows whose teacher reads the reference, and the student not: the offline demo's text with a `privileged_context` column.

`python examples/privileged_rows.py` writes examples/assets/privileged/{train,test}.jsonl from examples/assets/text.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path("examples/assets/text"), help="what offline_assets.py wrote")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/assets/privileged"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = (options.text / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        with open(options.output_dir / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                row["privileged_context"] = row["completion"][-1]["content"]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
