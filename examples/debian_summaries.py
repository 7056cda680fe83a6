"""Debian's package descriptions as a summarization set: the long text is what to summarize, the synopsis its summary.

Real, short, human-written, and at hand on every Debian or Ubuntu machine: `apt-get update` into a private directory (the
machine's own lists stay as they are) brings the descriptions (`Translation-en`) and the source package of each binary
package (`Packages`). Packages of one source describe each other, so a source gives one row, and rows are split by a hash
of the source's name, which does not move when the archive changes. Each text falls under its package's licence: this
file builds the set, and the set is not for committing or sharing.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


INSTRUCTION = "Summarize this software package in one short line."
HUB_ALTERNATIVE = (
    "With access to the Hugging Face hub, use its data instead: examples/train_summarization.py --config "
    "examples/configs/dialogsum_qwen2.yaml (or --dataset_name with any prompt/completion data set)."
)

# Shares of the sources, out of 100 hash buckets; the rest is for training.
SPLIT_BUCKETS = {"test": range(0, 8), "validation": range(8, 12), "train": range(12, 100)}

NUM_TEXT_WORDS = range(25, 61)
NUM_SYNOPSIS_WORDS = range(4, 15)
BULLET = re.compile(r" [-*+o•] ")
NOT_A_PROGRAM = re.compile(r"transitional|dummy|debug|dbgsym|meta-?package", re.IGNORECASE)


def build_text(output_dir: Path) -> dict[str, int]:
    """
    Write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `output_dir`, with the columns `prompt` (one user turn),
    `completion` (one assistant turn), `package` and `source`.

    Returns:
        `dict[str, int]`: number of rows of each split.

    Raises:
        RuntimeError: if apt is missing, fails, or its lists hold no descriptions.
    """
    with tempfile.TemporaryDirectory() as directory:
        packages, translations = download_index(Path(directory))
    rows = select_rows(parse_stanzas(packages), parse_stanzas(translations))
    if len(rows) < 1000:
        raise RuntimeError(
            f"apt's lists gave {len(rows)} usable descriptions where a Debian archive gives about 16,000, so the "
            f"machine's sources are not those of Debian or Ubuntu, or could not be read. {HUB_ALTERNATIVE}"
        )
    counts = dict.fromkeys(SPLIT_BUCKETS, 0)
    files = {split: open(output_dir / f"{split}.jsonl", "w", encoding="utf-8") for split in SPLIT_BUCKETS}
    for row in rows:
        split = split_of(row["source"])
        counts[split] += 1
        files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
    for file in files.values():
        file.close()
    return counts


def download_index(directory: Path) -> tuple[str, str]:
    """The texts of apt's `Packages` and `Translation-en` lists, fetched into `directory` and nowhere else."""
    helper = "/usr/lib/apt/apt-helper"
    if shutil.which("apt-get") is None or not os.path.exists(helper):
        raise RuntimeError(
            "apt-get was not found. The offline text is made from Debian's package index, so this machine has to be a "
            f"Debian or an Ubuntu. {HUB_ALTERNATIVE}"
        )
    options = {
        "Acquire::Languages": "en",
        "Dir::State::lists": directory / "lists",
        "Dir::Cache": directory / "cache",
        "APT::Sandbox::User": "root",  # apt's own user may not enter a private directory; it would warn and go on
    }
    arguments = [argument for key, value in options.items() for argument in ("-o", f"{key}={value}")]
    for part in ("lists/partial", "cache/archives/partial"):
        (directory / part).mkdir(parents=True)
    run_apt(["apt-get", "-q", *arguments, "update"], capture=False)

    def read(kind: str) -> str:
        listed = run_apt(["apt-get", *arguments, "indextargets", "--format", "$(FILENAME)", f"Created-By: {kind}"])
        files = sorted(file for file in listed.splitlines() if os.path.exists(file))
        return "\n".join(run_apt([helper, "cat-file", file]) for file in files)

    return read("Packages"), read("Translations")


def run_apt(command: list[str], capture: bool = True) -> str:
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE if capture else None,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` failed with status {result.returncode}: {result.stderr.strip()[-600:]}. "
            f"Check that this machine's apt sources can be reached. {HUB_ALTERNATIVE}"
        )
    return result.stdout or ""


def parse_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Blocks of `Field: value` lines parted by empty lines; a continuation line keeps its leading space."""
    for block in re.split(r"\n{2,}", text):
        stanza, field = {}, ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t"):
                stanza[field] = f"{stanza.get(field, '')}\n{line}"
            else:
                field, _, value = line.partition(":")
                stanza[field] = value.strip()
        if "Package" in stanza:
            yield stanza


def select_rows(packages: Iterable[dict[str, str]], translations: Iterable[dict[str, str]]) -> list[dict]:
    """
    One row per source package, in an order that depends on the sources' names only.

    Of a source's packages the one that bears its name is taken, else the first by name; a description that another source has
    too (forks, versions side by side) is taken once.
    """
    source_of = {}
    for stanza in packages:  # `Source: name (version)` is there only where it differs from the package's name
        source_of.setdefault(stanza["Package"], stanza.get("Source", stanza["Package"]).split()[0])

    chosen = {}
    for stanza in translations:
        package, row = stanza["Package"], summarization_row(stanza)
        if row is None or package not in source_of:
            continue
        source = source_of[package]
        rank = (package != source, package)
        if source not in chosen or rank < chosen[source][0]:
            chosen[source] = (rank, {**row, "package": package, "source": source})

    rows, seen = [], set()
    for source in sorted(chosen, key=lambda source: (hash_of(source), source)):
        row = chosen[source][1]
        text = row["prompt"][0]["content"]
        if text not in seen:
            seen.add(text)
            rows.append(row)
    return rows


def summarization_row(stanza: dict[str, str]) -> dict | None:
    """`prompt` and `completion` of one description, or `None` where it is no prose to summarize."""
    synopsis, *lines = stanza.get("Description-en", "").split("\n")
    synopsis = " ".join(synopsis.split())
    if any(line.startswith("  ") or BULLET.match(line) for line in lines):  # Debian policy: two spaces are verbatim
        return None
    text = " ".join(line.strip() for line in lines if line.strip() != ".")  # a lone dot parts paragraphs
    if len(text.split()) not in NUM_TEXT_WORDS or len(synopsis.split()) not in NUM_SYNOPSIS_WORDS:
        return None
    if NOT_A_PROGRAM.search(f"{stanza['Package']} {synopsis} {text}"):
        return None
    return {
        "prompt": [{"role": "user", "content": f"{INSTRUCTION}\n\n{text}"}],
        "completion": [{"role": "assistant", "content": synopsis}],
    }


def split_of(source: str) -> str:
    """The split that a source belongs to; versions side by side (`gcc-12`, `gcc-13`) stay together."""
    family = re.sub(r"[-.\d]+$", "", source) or source
    bucket = hash_of(family) % 100
    return next(split for split, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
