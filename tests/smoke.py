"""What an installed copy has to do with nothing but its own dependencies: import, answer on the command line, sample, train a step.

`make package` runs it in an empty environment, outside the repository. It prints the place that the package was imported from.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import skd_trl
from skd_trl import SKDConfig, SKDTrainer, SpecKDConfig, SpecKDTrainer


ALPHABET = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def tiny_model(seed: int, num_layers: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(ALPHABET), hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers,
            num_attention_heads=4, num_key_value_heads=2, eos_token_id=0,
        )
    )  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def train(trainer_class, config_class, folder: Path) -> dict[str, float]:
    args = config_class(
        str(folder), max_steps=2, max_new_tokens=8, max_length=32, per_device_train_batch_size=2, num_draft_tokens=3,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        model=tiny_model(1, 1),
        teacher_model=tiny_model(2, 2),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "What is it? "}, {"prompt": "And why? "}] * 2),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["loss"] > 0 for entry in logs), logs
    return logs[-1]


def main() -> None:
    repository = Path(__file__).resolve().parent.parent
    where = Path(skd_trl.__file__).resolve()
    assert repository / "skd_trl" not in where.parents, f"{where} is the repository's own copy"
    assert version("skd_trl") == skd_trl.__version__
    assert (where.parent / "py.typed").is_file()
    for command in ([sys.executable, "-m", "skd_trl"], [str(Path(sys.executable).parent / "skd")]):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "train" in shown and "check" in shown, shown
    with tempfile.TemporaryDirectory() as folder:
        skd = train(SKDTrainer, SKDConfig, Path(folder) / "skd")
        speckd = train(SpecKDTrainer, SpecKDConfig, Path(folder) / "speckd")
    assert 0 <= skd["replaced_share"] <= 1 and 0 <= speckd["token_acceptance_rate"] <= 1
    print(f"skd_trl {skd_trl.__version__} from {where.parent}: imported, answered, sampled and trained.")


if __name__ == "__main__":
    main()
