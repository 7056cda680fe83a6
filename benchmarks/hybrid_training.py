"""A hybrid student learns from a hybrid teacher, both trained on the spot: does acceptance rise, does the divergence fall?

Nothing is downloaded. A tokenizer, a teacher and a smaller student with the layers of Qwen3.5 (gated delta net and attention) are
trained on the descriptions of Debian's packages that `make assets` has, the student for a few steps only; then SKDTrainer trains it
on the continuations of descriptions that both write together. The divergence is KL(teacher || student) a token, in nats, over
samples of both on held-out prompts.

As a control, a copy of the student goes on for as many steps, of as many rows, on the descriptions themselves.

    python benchmarks/hybrid_training.py --clock cpu
"""

import copy
import tempfile
from pathlib import Path

import torch
from common import ASSETS, Report, load_rows, parser, prepare
from datasets import Dataset
from hybrid import hybrid
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skd_trl import ACCEPTANCE_RULES, SKDConfig, SKDTrainer, interleaved_sample
from skd_trl.evaluation.divergence import token_divergence
from skd_trl.evaluation.held_out import Decoding


PAD, EOS = "<|pad|>", "<|end|>"


def main() -> None:
    own = parser(__doc__.splitlines()[0], models=False, repeats=1)
    own.add_argument("--assets", type=Path, default=ASSETS, help="directory made by examples/offline_assets.py")
    own.add_argument("--vocab_size", type=int, default=2048)
    own.add_argument("--hidden_sizes", type=int, nargs=2, default=[64, 192], help="of student and teacher")
    own.add_argument("--num_layers", type=int, nargs=2, default=[4, 4], help="of student and teacher")
    own.add_argument("--first_steps", type=int, nargs=2, default=[60, 160], help="on text, of student and teacher")
    own.add_argument("--window", type=int, default=96, help="tokens of a row in these")
    own.add_argument("--steps", type=int, default=60, help="of SKDTrainer")
    own.add_argument("--batch_size", type=int, default=16)
    own.add_argument("--prompt_length", type=int, default=16)
    own.add_argument("--max_new_tokens", type=int, default=32)
    own.add_argument("--accept_top_k", type=int, default=25)
    own.add_argument("--num_held_out", type=int, default=64)
    args = own.parse_args()
    clock = prepare(args)
    report = Report("hybrid_training", "A hybrid student learns from a hybrid teacher", args)
    texts = {split: descriptions(args, split) for split in ("train", "test")}
    tokenizer = train_tokenizer(texts["train"], args.vocab_size)
    started, sizes = clock(), zip(args.hidden_sizes, args.num_layers, strict=True)
    student, teacher = (hybrid(*size, vocab_size=args.vocab_size) for size in sizes)
    windows = token_windows(tokenizer, texts["train"], args.window)
    losses = {}
    for name, model, num_steps in zip(("student", "teacher"), (student, teacher), args.first_steps, strict=True):
        losses[name] = pretrain(model, windows, num_steps, args.batch_size, name)
    control = copy.deepcopy(student)

    held_out = [tokenizer(text)["input_ids"][: args.prompt_length] for text in texts["test"]]
    held_out = [ids for ids in held_out if len(ids) == args.prompt_length][: args.num_held_out]
    decoding = Decoding(args.max_new_tokens, 32, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    before = divergences(student, teacher, held_out, decoding)
    history = distil(args, student, teacher, tokenizer, texts["train"])
    after = divergences(student, teacher, held_out, decoding)
    pretrain(control, windows.flip(0), args.steps, args.batch_size, "control", learning_rate=5e-4)
    of_control = divergences(control, teacher, held_out, decoding)

    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (student, teacher)]
    report.table(
        f"KL(teacher || student) a token, {len(held_out)} held-out prompts",
        ["student", "of the teacher's samples", "of the student's samples"],
        [["before", *before], [f"after {args.steps} steps of SKDTrainer", *after], ["control, on text", *of_control]],
        f"Student of {sizes[0]:.1f} and teacher of {sizes[1]:.1f} million parameters; losses on text at the end {losses['student']:.2f} "
        f"and {losses['teacher']:.2f}. The control takes as many steps of as many rows of {args.window} tokens.",
    )  # fmt: skip
    part = max(len(history) // 6, 1)
    rows = []
    for first in range(0, len(history), part):
        entries = history[first : first + part]
        means = [
            sum(e[name] for e in entries) / len(entries) for name in ("acceptance_rate", "replaced_share", "loss")
        ]
        rows.append([f"{first + 1} to {first + len(entries)}", *means])
    report.table(
        f"Training, K = {args.accept_top_k}, batch {args.batch_size}",
        ["steps", "acceptance", "share replaced by the teacher", "loss"],
        rows,
        f"Means. All together took {(clock() - started) / 60:.1f} minutes of the clock above.",
    )


def descriptions(args, split: str) -> list[str]:
    """The packages' descriptions, without the instruction before them."""
    return [row["prompt"][-1]["content"].split("\n\n", 1)[-1] for row in load_rows(args, split)]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS)


def token_windows(tokenizer, texts: list[str], length: int) -> torch.Tensor:
    """All texts one after the other, each with its end, cut into (N, length), in a shuffled order."""
    ids = [token for own in tokenizer(texts)["input_ids"] for token in [*own, tokenizer.eos_token_id]]
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def pretrain(model: PreTrainedModel, windows, num_steps: int, batch_size: int, name: str, learning_rate=2e-3) -> float:
    """Plain next-token training. Returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    losses = []
    model.train()
    for step in track(range(num_steps), description=name, console=Console(stderr=True), transient=True):
        first = step * batch_size % (len(windows) - batch_size)
        batch = windows[first : first + batch_size]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    last = losses[-max(num_steps // 10, 1) :]
    return sum(last) / len(last)


def distil(args, student, teacher, tokenizer, texts: list[str]) -> list[dict]:
    """Trains `student` in place. Returns what was logged in each step."""
    prompts = [tokenizer.decode(tokenizer(text)["input_ids"][: args.prompt_length]) for text in texts]
    with tempfile.TemporaryDirectory() as directory:
        config = SKDConfig(
            output_dir=directory, per_device_train_batch_size=args.batch_size, max_steps=args.steps, learning_rate=5e-4,
            accept_top_k=args.accept_top_k, num_draft_tokens=4, max_new_tokens=args.max_new_tokens, max_length=128,
            temperature=1.0, student_top_p=1.0, teacher_temperature=1.0, teacher_top_p=1.0, divergence="forward_kl",
            gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = SKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": prompt} for prompt in prompts[: args.steps * args.batch_size]]
            ),
            processing_class=tokenizer,
        )
        trainer.train()
        student.eval()
        return [entry for entry in trainer.state.log_history if "acceptance_rate" in entry and "loss" in entry]


@torch.no_grad()
def divergences(student, teacher, prompts: list[list[int]], decoding: Decoding) -> list[float]:
    """Nats a token over the teacher's continuations and over the student's."""
    found, ids = [], torch.tensor(prompts)
    for rule in ("never", "always"):
        rollout = interleaved_sample(
            student, teacher, ids, torch.ones_like(ids), accept=ACCEPTANCE_RULES[rule](),
            max_new_tokens=decoding.max_new_tokens, eos_token_ids=decoding.eos_token_ids, noise=torch.Generator().manual_seed(1),
        )  # fmt: skip
        responses = [labels[labels != -100].tolist() for labels in rollout.labels]
        sums = token_divergence(student, teacher, prompts, responses, decoding=decoding)
        found.append(float(sums[:, 0].sum() / sums[:, 1].sum()))
    return found


if __name__ == "__main__":
    main()
