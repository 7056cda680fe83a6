"""Made `texts.json` at commit 808d384, whose sampler the present one has to agree with on the same noise.

Run there, with its `tests` folder on the path: `python record_texts.py texts.json`. It uses that commit's interface.
"""

import json
import sys

import torch
from tiny import tiny_model

from skd_trl import ACCEPTANCE_RULES, SamplingParams, interleaved_sample


ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gemma2", "gpt2", "gpt_neox")
RULES = {"top_k": {"k": 40}, "min_prob": {"alpha": 0.02}, "mixture": {"gamma": 0.5}, "top_p": {"p": 0.7}}
LENGTHS, NUM_TOKENS, ENDS = [5, 1, 13, 3, 2, 8, 4], 20, [257, 7, 99, 180]
SAMPLING = {"temperature": 1.0, "top_p": 0.9}


def inputs():
    """Left-padded prompts (7, 13), their mask, and the noise (7, 20, 3)."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 250, (length,), generator=generator) for length in LENGTHS]
    ids = torch.stack([torch.nn.functional.pad(prompt, (max(LENGTHS) - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - length for length in LENGTHS]).long()
    return ids, mask, torch.rand(len(LENGTHS), NUM_TOKENS, 3, generator=generator)


def record():
    ids, mask, noise = inputs()
    texts = {}
    for architecture in ARCHITECTURES:
        student, teacher = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
        for rule, parameters in RULES.items():
            for num_draft_tokens in (1, 3, 6):
                rollout = interleaved_sample(
                    student, teacher, ids, mask, accept=ACCEPTANCE_RULES[rule](**parameters),
                    num_draft_tokens=num_draft_tokens, max_new_tokens=NUM_TOKENS, eos_token_ids=ENDS, pad_token_id=0,
                    student_sampling=SamplingParams(**SAMPLING), teacher_sampling=SamplingParams(**SAMPLING),
                    uniforms=noise, max_rows=3,
                )  # fmt: skip
                rows = []
                for i, row in enumerate(rollout.labels):
                    tokens = row[row != -100].tolist()
                    count = len(tokens)
                    rows.append(
                        {
                            "tokens": tokens,
                            "replaced": rollout.replaced[i, :count].long().tolist(),
                            "proposals": rollout.proposals[i, :count].tolist(),
                            "teacher_rank": rollout.teacher_rank[i, :count].tolist(),
                        }
                    )
                assert texts.setdefault(f"{architecture}/{rule}", rows) == rows  # whatever the draft length
    return texts


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:
        json.dump(record(), file, separators=(",", ":"))
