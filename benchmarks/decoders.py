"""Which decoders of the installed transformers `interleaved_sample` can run: every causal language model, tiny and random.

Each class is built small, with its windows, experts, latent attention, shared keys and soft caps switched on, and checked in a
process with a time limit. With greedy draws, `top_k` with K = V must write the student's text and K = 1 the teacher's, as the
model writes it without a cache, from prompts of different lengths; the teacher's hidden states that the sampler keeps must be
those of a forward without a cache. A choice between two logits that are equal but for rounding is no error.

    python benchmarks/decoders.py                                            # all of them, into docs/decoders.md
    python benchmarks/decoders.py --only llama gemma3_text --fault window    # prints, writes nothing
    python benchmarks/decoders.py --only rwkv xlstm --update                 # these rows of the page again

`--fault` plants an error in the sampler and counts the classes that show it: the proof that the check can fail.

Shapes: B prompts, P prompt, T response, V vocabulary, H hidden.
"""

import argparse
import dataclasses
import importlib
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import torch
import transformers
from rich.progress import track
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import skd_trl
from skd_trl import ACCEPTANCE_RULES, Execution, LocalParticipant, SamplingParams, interleaved_sample
from skd_trl.sampling.ragged_cache import RaggedDecoder
from skd_trl.sampling.ragged_layers import RaggedLayer


V, WINDOW = 259, 7
PROMPT_LENGTHS, NUM_NEW_TOKENS, NUM_DRAFT_TOKENS = (3, 7, 11), 14, 3
# The largest error of a hidden state, and the lead of the best logit over the chosen one, relative to the largest value: rounding
# through a few layers of fp32, with room. What is beyond is checked again in fp64, where rounding is far below, and an error is not.
TOLERANCE = 1e-4
VERDICTS = {
    "exact": "The sampler writes what the model writes without a cache.",
    "refused": "The package says that it cannot, and why, before it samples.",
    "wrong": "The sampler writes something else, without a word.",
    "crash": "Another exception than the package's own refusal, an abort, or no end within the time limit.",
    "cannot be built": "The model does not run on token ids alone, without a cache, so there is nothing to compare with.",
}

# Sizes, under every name that a config has for them: a config is given those that are its own.
SIZES = {
    "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size": V,
    "hidden_size d_model n_embd dim emb_dim embedding_size input_embedding_size output_embedding_size lru_width "
    "word_embed_proj_dim embedding_dim embed_dim backbone_hidden_size": 32,
    "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff ffn_hidden_size feed_forward_size "
    "intermediate_size_mlp dense_intermediate_size": 64,
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
    "num_blocks layers": 4,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads": 2,
    "head_dim dim_head d_head kv_channels global_head_dim swa_head_dim query_pre_attn_scalar": 8,
    "q_lora_rank kv_lora_rank o_lora_rank": 16,
    "qk_rope_head_dim qk_nope_head_dim v_head_dim swa_v_head_dim index_head_dim index_n_heads rotary_dim": 8,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group zero_expert_num": 2,
    "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers": 1,
    "max_position_embeddings n_positions max_target_positions max_seq_len model_max_length n_ctx": 128,
    "sliding_window attention_window_size sliding_window_size local_attention keep_window_size index_topk": WINDOW,
    "hidden_size_per_layer_input laurel_rank adapter_rank ple_embed_dim router_hidden_size": 8,
    "state_size ssm_state_size mamba_d_state mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim "
    "linear_head_dim": 8,
    "linear_num_key_heads linear_num_value_heads linear_num_heads": 4,
    "max_window_layers": 1,
    "mamba_chunk_size chunk_size": 16,
    "use_sliding_window is_decoder": True,
    "is_encoder_decoder add_cross_attention tie_word_embeddings use_mamba_kernels": False,
    "initializer_range init_std": 0.4,
    "final_logit_softcapping attn_logit_softcapping": 20.0,
}
SIZES = {name: value for names, value in SIZES.items() for name in names.split()}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keyword arguments of a config, by model type, beyond the sizes; those of a part of it under the part's name.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
BLT_PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
BLT_CODER = {**BLT_PART, "hidden_size_global": 32}
ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
QWEN4 = {**INDEXER, "ngram_vocab_size_base": 100, "split_ngram_parts": 4, "hc_lowrank": 8}
SHARED_KV = {"num_kv_shared_layers": 2}
OVERRIDES: dict[str, dict] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "patcher_config": BLT_PART,
        "encoder_config": BLT_CODER,
        "decoder_config": BLT_CODER,
        "global_config": BLT_PART,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0}, "attn_config.rope_theta": 10_000.0},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma2": {"attn_implementation": "eager"},
    "gemma3n_text": {**SHARED_KV, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4": {"text_config": SHARED_KV},
    "gemma4_text": SHARED_KV,
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4_unified_text": SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2, "L_cycles": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minimax": {"sliding_window": None},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": V, "shape_vocab_size": V},
    "vaultgemma": {"attn_implementation": "eager"},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {
        "hidden_size": 128,
        "embedding_dim": 128,
    },  # its cache expects widths that are rounded up to multiples of 64
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_d_state": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# Other configurations of a model type: what one verdict for all of them would hide.
ALL_FULL = {"layer_types": ["full_attention"] * 4}
HYBRIDS = ("granitemoehybrid", "kimi_linear", "lfm2", "minimax", "qwen3_5_text")
VARIANTS: dict[str, tuple[str, dict]] = {
    **{f"{name}, attention only": (name, ALL_FULL) for name in HYBRIDS},
    "bart, fewer encoder layers": ("bart", {"encoder_layers": 2}),
    "bamba, attention only": ("bamba", {"attn_layer_indices": [0, 1, 2, 3]}),
    "jamba, attention only": ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    "nemotron_h, attention only": (
        "nemotron_h",
        {"layers_block_type": ["full_attention", "moe", "full_attention", "mlp"]},
    ),
    "gpt_neo, global only": ("gpt_neo", {"attention_types": [[["global"], 4]]}),
    "llama4_text, full only": ("llama4_text", ALL_FULL),
    "llama4_text, full only, floor_scale 8": ("llama4_text", {**ALL_FULL, "floor_scale": 8}),
    "llama4_text, chunks of 8": ("llama4_text", {"attention_chunk_size": 8}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
}
# Text models outside the auto mapping.
OUTSIDE = {
    "clvp_decoder": "ClvpForCausalLM",
    "csm_depth_decoder_model": "CsmDepthDecoderForCausalLM",
    "kosmos_2_text_model": "Kosmos2TextForCausalLM",
    "kosmos_2_5_text_model": "Kosmos2_5TextForCausalLM",
    "blip_text_model": "BlipTextLMHeadModel",
    "flaubert": "FlaubertWithLMHeadModel",
}


@dataclass(frozen=True)
class Entry:
    """One configuration of a class; `overrides` are keyword arguments of its config beyond the sizes."""

    model_type: str
    class_name: str
    overrides: dict


@dataclass(frozen=True)
class Result:
    """The verdict on one entry; `figure` is the largest relative error of a hidden state, NaN where none was compared."""

    verdict: str
    reason: str = ""
    figure: float = math.nan


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own.add_argument(
        "--only", nargs="+", metavar="NAME", help="model types (or names in the table); prints, writes nothing"
    )
    own.add_argument(
        "--update", action="store_true", help="with --only: put these rows into the page, which keeps the others"
    )
    own.add_argument("--fault", choices=list(FAULTS), help="plant this error in the sampler; prints, writes nothing")
    own.add_argument("--timeout", type=float, default=120, help="seconds for one class")
    own.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="classes checked at once")
    own.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "decoders.md")
    args = own.parse_args()
    chosen = entries()
    if args.only:
        unknown = sorted(set(args.only) - set(chosen))
        if unknown:
            own.error(f"unknown names: {', '.join(unknown)}; the names are those of the table in docs/decoders.md")
    if args.update and (args.fault or not args.only):
        own.error("--update needs --only, and no --fault")
    checked = {name: chosen[name] for name in args.only} if args.only else chosen
    before = read_page(args.output) if args.update else None
    started = time.perf_counter()
    results = check_all(checked, args.fault, args.timeout, args.processes)
    minutes = (time.perf_counter() - started) / 60
    command = f"`{shlex.join(['python', 'benchmarks/decoders.py', *sys.argv[1:]])}`"
    if before is not None:
        made, of_others = before
        args.output.write_text(table(chosen, {**of_others, **results}, f"{made} Later: {command}."))
    if args.only or args.fault:
        for name, result in sorted(results.items(), key=lambda item: (list(VERDICTS).index(item[1].verdict), item[0])):
            print(f"{result.verdict:16} {name:28} {result.figure:8.1e}  {result.reason}")
    else:
        args.output.write_text(table(chosen, results, f"Made by {command} in {minutes:.0f} minutes."))
    counts = Counter(result.verdict for result in results.values())
    print(
        f"{len(results)} in {minutes:.1f} minutes: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    )


def entries() -> dict[str, Entry]:
    """Everything that is checked, by its name in the table."""
    classes = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **OUTSIDE}
    found = {name: Entry(name, class_name, OVERRIDES.get(name, {})) for name, class_name in classes.items()}
    for name, (model_type, overrides) in VARIANTS.items():
        found[name] = Entry(model_type, classes[model_type], {**OVERRIDES.get(model_type, {}), **overrides})
    return dict(sorted(found.items()))


# --- the models ---------------------------------------------------------------------------------------------------------


def tiny_model(entry: Entry, seed: int) -> PreTrainedModel:
    """A random model in fp32 and eval mode; two seeds disagree about nearly every token."""
    model_class = class_of(entry)
    config = model_class.config_class(**settings(model_class.config_class, entry.overrides))
    for name, value in entry.overrides.items():  # what the config's constructor does not take
        if "." in name:
            part, attribute = name.split(".")
            setattr(getattr(config, part), attribute, value)
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=entry.overrides.get("attn_implementation"))
    for parameter in model.parameters():  # norms and biases start at 0 and 1: make them count
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def class_of(entry: Entry) -> type[PreTrainedModel]:
    if hasattr(transformers, entry.class_name):
        return getattr(transformers, entry.class_name)
    folder = model_type_to_module_name(entry.model_type)
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), entry.class_name)


def settings(config_class: type[PreTrainedConfig], overrides: dict) -> dict:
    """Keyword arguments of a tiny config: sizes under its own names, kinds of layer in turn, the same for its parts."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    names = set(fields)
    found = {name: value for name, value in SIZES.items() if name in names}
    found |= {name: special_token(fields[name]) for name in SPECIAL_TOKENS if name in names}
    if (
        "qk_rope_head_dim" in names
    ):  # latent attention: as many heads of keys as of queries, and a head size made of parts
        found.pop("head_dim", None)
        found["num_key_value_heads"] = found["num_attention_heads"]
    if "layer_types" in names and (kinds := kinds_of_layer(config_class, names)):
        found["layer_types"] = kinds
    parts = {**config_class.sub_configs, **getattr(config_class, "sub_configs_defaults", {})}
    for name, default in parts.items():
        own = overrides.get(name) or {}
        if model_type := getattr(default, "model_type", None) if isinstance(default, SubConfigSpec) else None:
            found[name] = {"model_type": model_type, **settings(CONFIG_MAPPING[model_type], own)}
        elif isinstance(default, type) and default is not AutoConfig:
            found[name] = settings(default, own)
    found |= {
        name: value
        for name, value in overrides.items()
        if name not in parts and name != "attn_implementation" and "." not in name
    }
    return found


def special_token(field: dataclasses.Field) -> int | None:
    """The default id where the vocabulary has it (positions may be counted from padding), else none, else 0."""
    if isinstance(field.default, int) and 0 <= field.default < V:
        return field.default
    return None if "None" in str(field.type) else 0


def kinds_of_layer(config_class: type[PreTrainedConfig], names: set[str]) -> list[str]:
    """The kinds that the default config has, in turn, and sliding windows wherever the config knows them."""
    try:
        kinds = list(dict.fromkeys(config_class().layer_types))
    except (AttributeError, TypeError, ValueError):
        return []
    if kinds == ["full_attention"] and "sliding_window" in names:
        kinds = ["sliding_attention", "full_attention"]
    num_layers = 4
    return [kinds[layer % len(kinds)] for layer in range(num_layers)] if len(kinds) > 1 else []


# --- the check ----------------------------------------------------------------------------------------------------------


def sample(student: nn.Module, teacher: nn.Module, prompts: list[list[int]], top_k: int, temperature: float):
    """Texts, one list for each prompt, and the teacher's hidden states (T, H) that predict their tokens. The only place that
    calls the sampler."""
    width = max(map(len, prompts))
    sampling = SamplingParams(temperature=temperature)
    rollout = interleaved_sample(
        LocalParticipant(student, sampling, vocab_size=V),
        LocalParticipant(teacher, sampling, vocab_size=V),
        torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        accept=ACCEPTANCE_RULES["top_k"](k=top_k),
        max_new_tokens=NUM_NEW_TOKENS,
        eos_token_ids=[],
        noise=torch.Generator().manual_seed(0),
        execution=Execution(NUM_DRAFT_TOKENS),
    )
    texts = [labels[labels != -100].tolist() for labels in rollout.labels]
    hidden = [states[: len(text)] for states, text in zip(rollout.teacher_hidden_states, texts, strict=True)]
    return texts, hidden


def check(entry: Entry, fault: str | None = None) -> Result:
    """The verdict on one entry, in this process."""
    try:
        student, teacher = tiny_model(entry, seed=1), tiny_model(entry, seed=2)
        prompts = random_prompts()
        for model in (student, teacher):
            uncached(model, prompts[-1], num_last=2)
    except Exception as error:
        return Result("cannot be built", first_line(error))
    with FAULTS[fault]() if fault else nullcontext():
        found = compare(student, teacher, prompts)
        if found.verdict != "wrong" or fault:
            return found
        for model in (student.double(), teacher.double()):
            model.config.get_text_config()._experts_implementation = "eager"  # grouped products know no float64
        again = compare(student, teacher, prompts)
    if again.verdict == "exact":
        return Result("exact", f"in fp64 ({again.figure:.0e}); fp32 rounds this far", found.figure)
    return found


def compare(student: nn.Module, teacher: nn.Module, prompts: list[list[int]]) -> Result:
    """Three texts for each prompt against the models without a cache: the student's (K = V), the teacher's (K = 1), and one with
    proposals accepted and rejected at any place of a block, of which the hidden states are compared alone."""
    largest, problems, written = 0.0, [], []
    runs = [("K = V", V, 0.0, student), ("K = 1", 1, 0.0, teacher), ("K = 100", 100, 1.0, None)]
    for title, top_k, temperature, author in runs:
        try:
            texts, kept = sample(student, teacher, prompts, top_k, temperature)
        except Exception as error:
            return Result("refused" if is_refusal(error) else "crash", first_line(error))
        if texts == written:
            return Result("cannot be built", "student and teacher write the same texts, which would prove nothing")
        written = texts
        for prompt, text, states in zip(prompts, texts, kept, strict=True):
            if len(text) != NUM_NEW_TOKENS:
                problems.append(f"{title}: {len(text)} tokens instead of {NUM_NEW_TOKENS}")
                continue
            fresh, _ = uncached(teacher, prompt + text[:-1], num_last=len(text))
            errors = (states - fresh).abs().amax(dim=-1) / fresh.abs().max()
            largest = max(largest, float(errors.max()) if errors.isfinite().all() else math.inf)
            if not (errors <= TOLERANCE).all():
                place = int((~(errors <= TOLERANCE)).nonzero()[0])
                problems.append(
                    f"{title}, prompt of {len(prompt)}: hidden states differ from token {place} on, by {errors.max():.1e}"
                )
            if author is None:
                continue
            _, logits = uncached(author, prompt + text[:-1], num_last=len(text))
            for place in (
                0,
                NUM_NEW_TOKENS // 2,
            ):  # without the tokens behind it: an author need not be causal without a cache
                logits[place] = uncached(author, prompt + text[:place], num_last=1)[1][0]
            chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
            leads = (logits[:, :V].amax(dim=-1) - chosen) / logits.abs().max()
            if not (leads <= TOLERANCE).all():
                place = int((~(leads <= TOLERANCE)).nonzero()[0])
                problems.append(
                    f"{title}, prompt of {len(prompt)}: token {place} is not the model's, whose own leads by {leads[place]:.1e}"
                )
    if problems:
        return Result("wrong", problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else ""), largest)
    return Result("exact", "", largest)


@torch.no_grad()
def uncached(model: nn.Module, tokens: list[int], num_last: int) -> tuple[Tensor, Tensor]:
    """What goes into the head (num_last, H), and the logits (num_last, V), of the last tokens, from one forward without a cache."""
    caught: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: caught.append(args[0])) if head is not None else None
    try:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    return (caught[-1][0, -num_last:] if caught else logits[0, -num_last:]), logits[0, -num_last:]


def random_prompts() -> list[list[int]]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randint(10, 250, (length,), generator=noise).tolist() for length in PROMPT_LENGTHS]


def is_refusal(error: Exception) -> bool:
    """Whether the package itself raised it, as a `ValueError`."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and Path(raised_in).is_relative_to(Path(skd_trl.__file__).parent)


def first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, ValueError) and is_refusal(error) else f"{type(error).__name__}: {text}"


# --- planted faults -----------------------------------------------------------------------------------------------------


@contextmanager
def window_ignored() -> Iterator[None]:
    """The masks of windowed layers show all of the text."""
    made = RaggedDecoder.__init__

    def without_windows(decoder, *args, **kwargs):
        made(decoder, *args, **kwargs)
        decoder.spans = dict.fromkeys(decoder.spans)

    with mock.patch.object(RaggedDecoder, "__init__", without_windows):
        yield


@contextmanager
def positions_one_off() -> Iterator[None]:
    """From a decoder's third forward on, after its prompts and first block, the model is told positions one too high."""
    run = RaggedDecoder.__call__

    def shifted(decoder, *args, **kwargs):
        decoder.num_forwards = getattr(decoder, "num_forwards", 0) + 1
        if decoder.num_forwards < 3:
            return run(decoder, *args, **kwargs)
        hook = decoder.model.register_forward_pre_hook(one_higher, with_kwargs=True)
        try:
            return run(decoder, *args, **kwargs)
        finally:
            hook.remove()

    def one_higher(module, args, kwargs):
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + 1}

    with mock.patch.object(RaggedDecoder, "__call__", shifted):
        yield


@contextmanager
def last_layer_stale() -> Iterator[None]:
    """The last layer keeps the keys that a slot has, so what a rejected proposal wrote is never overwritten."""
    write, last = RaggedLayer.update, {}

    def write_once(layer, keys, values, *args, **kwargs):
        fresh = not layer.is_initialized
        if fresh:
            last[id(layer.window)] = layer
        if fresh or last[id(layer.window)] is not layer:
            return write(layer, keys, values, *args, **kwargs)
        row, column = layer.window.index, layer.window.positions
        before = layer.keys[row, :, column].clone()
        seen = write(layer, keys, values, *args, **kwargs)
        is_written = (before != 0).any(dim=-1, keepdim=True)
        layer.keys[row, :, column] = torch.where(is_written, before, layer.keys[row, :, column])
        return seen

    with mock.patch.object(RaggedLayer, "update", write_once):
        yield


FAULTS: dict[str, Callable] = {
    "window": window_ignored,
    "position": positions_one_off,
    "stale": last_layer_stale,
}


# --- all of them --------------------------------------------------------------------------------------------------------


def check_all(chosen: dict[str, Entry], fault: str | None, timeout: float, num_processes: int) -> dict[str, Result]:
    """Each entry in a process forked from this one, which has imported everything; an abort or a hang is a verdict."""
    forked = multiprocessing.get_context("fork")
    waiting, running, results = list(chosen.items()), {}, {}
    for _ in track(range(len(chosen)), description="decoders"):
        while waiting and len(running) < num_processes:
            name, entry = waiting.pop(0)
            receiver, sender = forked.Pipe(duplex=False)
            process = forked.Process(target=report, args=(sender, entry, fault))
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic() + timeout)
        first_deadline = min(deadline for _, _, deadline in running.values())
        ready = wait(list(running), timeout=max(0.0, first_deadline - time.monotonic()))
        receiver = ready[0] if ready else min(running, key=lambda pipe: running[pipe][2])
        name, process, _ = running.pop(receiver)
        results[name] = outcome(receiver if ready else None, process, timeout)
    return results


def outcome(receiver, process, timeout: float) -> Result:
    """What a process has sent; `receiver` is None where its time is over."""
    if receiver is None:
        process.kill()
        process.join()
        return Result("crash", f"no end within {timeout:.0f} seconds")
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        return Result("crash", f"the process ended with exit code {process.exitcode}")
    process.join()
    return result


def report(sender, entry: Entry, fault: str | None) -> None:
    """The body of one process."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sender.send(check(entry, fault))


def read_page(page: Path) -> tuple[str, dict[str, Result]]:
    """How a page that `table` has written was made, and its results."""
    text = page.read_text()
    if f"transformers {transformers.__version__} (" not in text or f"torch {torch.__version__} (" not in text:
        raise SystemExit(
            f"{page} was made with other versions of transformers or torch than are installed: run all of it again."
        )
    results, verdict = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            verdict = line[3:].lower()
        elif verdict and line.startswith("| ") and not line.startswith("| model type"):
            name, _, figure, reason = re.split(r" (?<!\\)\| ", line[2:-2], maxsplit=3)
            results[name] = Result(verdict, reason.replace("\\|", "|"), float(figure) if figure else math.nan)
    return text[text.index("Made by ") : text.index("\n", text.index("Made by "))], results


def table(chosen: dict[str, Entry], results: dict[str, Result], made: str) -> str:
    """The page: how it was `made`, a summary, and one table for each verdict."""
    counts = Counter(result.verdict for result in results.values())
    num_classes = len({chosen[name].class_name for name in results})
    lines = [
        "# Decoders that can be sampled from",
        "",
        f"Every causal language model of transformers {transformers.__version__} ({len(results)} configurations of {num_classes} "
        f"classes), tiny and random, on torch {torch.__version__} (CPU, fp32), Python {platform.python_version()}. "
        f"{made}",
        "",
        f"{len(PROMPT_LENGTHS)} prompts of {', '.join(map(str, PROMPT_LENGTHS))} tokens, {NUM_NEW_TOKENS} new tokens each, blocks of "
        f"{NUM_DRAFT_TOKENS}, windows of {WINDOW}. With greedy draws K = V has to write the student's text and K = 1 the teacher's, "
        "as the model writes it without a cache, and the teacher's hidden states that the sampler keeps have to be those of a "
        f"forward without a cache; both within {TOLERANCE:.0e} of the largest value. A third text, drawn with K = 100, is rejected at "
        "any place of a block; its hidden states are compared too. The figure is the largest error of a hidden state, relative to "
        "the largest state.",
        "",
        "| verdict | number | meaning |",
        "|---|---|---|",
        *(f"| {verdict} | {counts[verdict]} | {meaning} |" for verdict, meaning in VERDICTS.items()),
    ]
    for verdict in VERDICTS:
        rows = {name: result for name, result in results.items() if result.verdict == verdict}
        if not rows:
            continue
        lines += [
            "",
            f"## {verdict.capitalize()}",
            "",
            "| model type | class | figure | reason |",
            "|---|---|---|---|",
        ]
        for name, result in sorted(rows.items()):
            figure = "" if math.isnan(result.figure) else f"{result.figure:.1e}"
            reason = result.reason.replace("|", "\\|")
            lines.append(f"| {name} | {chosen[name].class_name} | {figure} | {reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
