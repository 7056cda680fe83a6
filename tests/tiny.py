"""Tiny random models and a byte-level tokenizer: everything that the suite trains and samples with, made in code.

`initializer_range` is raised far above the default so that two random models really disagree: with 0.02 every next-token
distribution is nearly uniform, and an error in a mask or a position hardly moves it.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


PAD, EOS, BOS = "<|pad|>", "<|im_end|>", "<|im_start|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What each architecture needs beyond the common sizes. Windows are shorter than the texts the tests sample.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 7, "head_dim": 8},
    "gemma3_text": {
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 20.0,
    },
    "gemma2": {
        "sliding_window": 7,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 20.0,
        "attn_logit_softcapping": 20.0,
        "attn_implementation": "eager",
    },
    "gemma4_text": {  # its last layers use the keys and values of earlier ones
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 259,
    },
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "olmo2": {},
    "granite": {"logits_scaling": 0.5},
    "cohere": {"logit_scale": 2.0},
    "starcoder2": {"sliding_window": 7},
}
# Decoders with recurrent state, most of them beside attention.
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRIDS = {
    "qwen3_5_text": {  # gated delta net
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "kimi_linear": {  # KDA, latent attention, experts
        "layer_types": ["linear_attention", "full_attention"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_expert_group": 1,
        "topk_group": 1,
        **EXPERTS,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **MAMBA2,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},  # mamba 2 and attention in each layer
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "mamba2": {
        "attn_implementation": "eager",
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 16,
        "expand": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {  # lightning attention, experts
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "block_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba": {"attn_implementation": "eager", "state_size": 8, "num_hidden_layers": 2},
    # Given all of their states in one argument.
    "rwkv": {"attn_implementation": "eager"},
    "xlstm": {"attn_implementation": "eager", "hidden_size": 128, "num_heads": 4, "chunk_size": 16},
}
HYBRIDS = {name: sizes for name, sizes in HYBRIDS.items() if name in CONFIG_MAPPING}
# The oldest transformers that is tested does not know the newest of them.
ARCHITECTURES = {name: sizes for name, sizes in ARCHITECTURES.items() if name in CONFIG_MAPPING}


def byte_tokenizer(chat_template: str | None = CHATML, num_extra_tokens: int = 0) -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens (259 ids); `num_extra_tokens` adds more, which makes another tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS, BOS] + [f"<|extra_{i}|>" for i in range(num_extra_tokens)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, chat_template=chat_template, model_max_length=512
    )


def save_models(directory: Path, seeds: dict[str, int]) -> None:
    """Tiny models by name, with their tokenizer, as `examples/offline_assets.py` lays them out."""
    tokenizer = byte_tokenizer()
    for name, seed in seeds.items():
        model = tiny_model("llama", seed=seed)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def tiny_model(architecture: str = "llama", seed: int = 0, vocab_size: int = 259, **overrides) -> PreTrainedModel:
    """A random causal language model of `architecture`, in fp32, eval mode, without end-of-sequence ids of its own."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{**ARCHITECTURES, **HYBRIDS}[architecture],
        **overrides,
    }
    attn_implementation = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        for parameter in model.parameters():  # norms and biases start at 0 and 1: make them count
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
