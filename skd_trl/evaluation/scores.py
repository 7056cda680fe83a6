"""How near a student is to its teacher, and to the references, on held-out prompts.

ROUGE-1/2/L of the student's greedy text, against the references and against the teacher's own greedy text; and the
divergence KL(teacher || student) per token, on the teacher's greedy text (where the teacher would go) and on the
student's own samples (where the student goes, which is what on-policy training aims at). Everything is kept by prompt, so
that comparison.py can pair what was before with what is after. Work is shared out over all processes.

Letters: B rows of a batch, P prompt, T response, V vocabulary, N positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class HeldOut:
    """Prompts as token ids, with their texts, reference summaries, and the teacher's greedy answers once it gave them."""

    prompt_ids: list[list[int]]
    prompts: list[str]
    references: list[str]


@dataclass(frozen=True)
class Scores:
    """
    What a student did on each held-out prompt.

    `values` maps a metric's name to an array `(rows, 2)`: what the row adds to the metric, and the row's weight (1 for
    ROUGE, the number of tokens for a divergence). The metric is the sum of the first column over that of the second.
    """

    responses: list[str]
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Decoding:
    """How texts are made: tokens at most, rows at once, the ids that end a text, the id that pads, seed of samples."""

    max_new_tokens: int
    batch_size: int
    eos_token_ids: list[int]
    pad_token_id: int
    seed: int = 0


def held_out(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """The prompts of `rows` as the models read them: through the chat template where they are conversations."""
    prompt_ids = [
        tokenizer(prompt).input_ids
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in rows["prompt"]
    ]
    return HeldOut(
        prompt_ids=prompt_ids,
        prompts=[text_of(prompt) for prompt in rows["prompt"]],
        references=[text_of(completion) for completion in rows["completion"]],
    )


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: HeldOut,
    teacher_responses: list[list[int]],
    *,
    decoding: Decoding,
    name: str,
) -> Scores:
    """Score `student` on `data`; `teacher_responses` are the teacher's greedy ones, from `generate`."""
    greedy = generate(student, data.prompt_ids, decoding=decoding, description=f"{name}: greedy text")
    samples = generate(student, data.prompt_ids, decoding=decoding, do_sample=True, description=f"{name}: samples")
    responses = decode(tokenizer, greedy)
    models = (student, teacher, data.prompt_ids)
    return Scores(
        responses=responses,
        values={
            "kl_teacher_text": token_divergence(
                *models, teacher_responses, decoding=decoding, description=f"{name}: KL on the teacher's text"
            ),
            "kl_student_samples": token_divergence(
                *models, samples, decoding=decoding, description=f"{name}: KL on its own samples"
            ),
            **rouge(responses, decode(tokenizer, teacher_responses), suffix="teacher"),
            **rouge(responses, data.references, suffix="reference"),
        },
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    *,
    decoding: Decoding,
    do_sample: bool = False,
    description: str,
) -> list[list[int]]:
    """
    One response for each prompt, with its end-of-sequence token where it has one; shared out over all processes.

    Sampling is from the model's own distribution, at temperature 1. What the model's generation config asks for
    (Qwen2's has a repetition penalty) does not count: the text of the bare model is what is compared.
    """
    responses = {}
    lengths = [len(ids) for ids in prompt_ids]
    with evaluating(model), torch.random.fork_rng():
        for batch in batches(lengths, decoding.batch_size, description):
            torch.manual_seed(decoding.seed + batch[0])
            input_ids, attention_mask = left_pad(
                [prompt_ids[row] for row in batch], decoding.pad_token_id, model.device
            )
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=decoding.max_new_tokens,
                do_sample=do_sample,
                temperature=1.0,
                top_p=1.0,
                top_k=0 if do_sample else 50,  # 50 is the default: anything else is warned about in greedy search
                repetition_penalty=1.0,
                eos_token_id=decoding.eos_token_ids,
                pad_token_id=decoding.pad_token_id,
                use_cache=True,
                synced_gpus=PartialState().num_processes > 1,  # sharded models: every forward is everybody's
            )
            for row, ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                ends = [position for position, token in enumerate(ids) if token in decoding.eos_token_ids]
                responses[row] = ids[: ends[0] + 1] if ends else ids
    return gather_rows(responses)


@torch.no_grad()
def token_divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt_ids: list[list[int]],
    responses: list[list[int]],
    *,
    decoding: Decoding,
    description: str,
    max_logits: int = 2**26,
    chunk_size: int = 128,
) -> np.ndarray:
    """
    KL(teacher || student) over the response tokens of each row, in nats: `(rows, 2)`, the sum and the token count.

    Only the logits of response positions are computed, of as many rows at once as keep them below `max_logits` numbers;
    probabilities are taken `chunk_size` positions at a time. Vocabularies padded to different sizes are cut to the
    shared range.
    """
    sums = {}
    vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)
    # from the limit on response length, not from the responses: all processes have to cut the same number of batches
    rows_at_once = min(decoding.batch_size, max(1, max_logits // (decoding.max_new_tokens * vocab_size)))
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, responses, strict=True)]
    with evaluating(student), evaluating(teacher):
        for batch in batches(lengths, rows_at_once, description):
            prompts, prompt_mask = left_pad([prompt_ids[row] for row in batch], decoding.pad_token_id, student.device)
            tails = [torch.tensor(responses[row], device=student.device) for row in batch]
            mask = pad_sequence([torch.ones_like(tail) for tail in tails], batch_first=True)  # (B, T)
            input_ids = torch.cat([prompts, pad_sequence(tails, True, decoding.pad_token_id)], dim=1)
            attention_mask = torch.cat([prompt_mask, mask], dim=1)
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
                "logits_to_keep": mask.shape[1] + 1,
                "use_cache": False,
            }
            # logits at t predict token t + 1, so the last of the T + 1 rows has nothing to predict
            student_logits = student(**inputs).logits[:, :-1, :vocab_size][mask.bool()]  # (N, V)
            teacher_logits = teacher(**inputs).logits[:, :-1, :vocab_size][mask.bool()].to(student_logits.device)
            divergence = torch.cat(
                [
                    F.kl_div(
                        s.float().log_softmax(-1), t.float().log_softmax(-1), log_target=True, reduction="none"
                    ).sum(-1)
                    for s, t in zip(student_logits.split(chunk_size), teacher_logits.split(chunk_size), strict=True)
                ]
            )
            counts = mask.sum(1).tolist()
            for row, values in zip(batch, divergence.double().split(counts), strict=True):
                sums[row] = (values.sum().item(), len(values))
    return np.array(gather_rows(sums), dtype=np.float64)


def rouge(predictions: list[str], targets: list[str], *, suffix: str) -> dict[str, np.ndarray]:
    """ROUGE F-measures in percent, as columns of `Scores.values`."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(target, prediction) for prediction, target in zip(predictions, targets, strict=True)]
    return {f"{kind}_{suffix}": np.array([[100 * score[kind].fmeasure, 1.0] for score in scores]) for kind in ROUGE}


def text_of(value: str | list[dict[str, str]]) -> str:
    """The plain text of a `completion`, whether it is a string or a conversation."""
    return value if isinstance(value, str) else value[-1]["content"]


def decode(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]


def batches(lengths: list[int], batch_size: int, description: str) -> Iterator[list[int]]:
    """
    Row numbers of this process's batches, longest rows first, with a progress bar on the main process.

    Every process gets the same number of rows (some twice), so that models whose forward is collective stay in step.
    """
    state = PartialState()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    order += order[: -len(order) % state.num_processes]
    mine = order[state.process_index :: state.num_processes]
    starts = range(0, len(mine), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=not state.is_main_process):
        yield mine[start : start + batch_size]


def gather_rows(mine: dict[int, object]) -> list:
    """The results of all processes' rows, in the order of the rows."""
    results = dict(gather_object(list(mine.items())))
    return [results[row] for row in sorted(results)]


def left_pad(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `(B, P)`."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


class evaluating:
    """Put a model into evaluation mode for a block, and back as it was."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_) -> None:
        self.model.train(self.was_training)


def decoding_for(
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    max_new_tokens: int,
    batch_size: int,
) -> Decoding:
    """A text ends where the tokenizer, the student or the teacher says that it does."""
    ends = [tokenizer.eos_token_id]
    for model in (student, teacher):
        eos_token_id = model.generation_config.eos_token_id
        ends += eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    eos_token_ids = sorted({token for token in ends if token is not None})
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_token_ids[0]
    return Decoding(max_new_tokens, batch_size, eos_token_ids, pad_token_id)
