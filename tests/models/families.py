"""Families of language models, each as a tiny random model of the transformers that is installed."""

from typing import Any

import torch

# Settings that most configurations know, and parts that some families share.
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
HEAD: dict[str, Any] = {"head_dim": 8}
WINDOW: dict[str, Any] = {
    **HEAD,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK: dict[str, Any] = {
    **LATENT,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
DELTA_NET: dict[str, Any] = {
    **HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
CONVOLUTIONS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_L_cache": 3,
}

# family -> what its settings change in SHAPE; where the name is not transformers' own, that is "type"
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bert": {},
    "bert, as a decoder": {"type": "bert", "is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {},
    "cohere2": WINDOW,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "doge": {},
    "ernie4_5": HEAD,
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": WINDOW,
    "falcon": {},
    "falcon, alibi": {"type": "falcon", "alibi": True},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "gemma": HEAD,
    "gemma2": {**HEAD, "sliding_window": 6},
    "gemma3_text": WINDOW,
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": {**DEEPSEEK, **HEAD},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
    },
    "gpt_neox": {},
    "gpt_oss": {**EXPERTS, **WINDOW},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {
        **MAMBA,
        **EXPERTS,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": {**EXPERTS, **CONVOLUTIONS, "num_dense_layers": 1},
    "llama": {},
    "llama, own head": {"type": "llama", "tie_word_embeddings": False},
    "llama4_text": {**EXPERTS, **HEAD, "intermediate_size_mlp": 48},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "minimax": {
        **EXPERTS,
        **HEAD,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
    "minimax_m2": {**EXPERTS, **HEAD},
    "ministral": HEAD,
    "mistral": {"sliding_window": 6},
    "mixtral": EXPERTS,
    "modernbert-decoder": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "nanochat": HEAD,
    "nemotron": {},
    "nemotron_h": {**MAMBA, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 16},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "openai-gpt": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": HEAD,
    "qwen3_5_text": DELTA_NET,
    "qwen3_moe": {**EXPERTS, **HEAD},
    "qwen3_next": {**EXPERTS, **DELTA_NET, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "roberta, as a decoder": {"type": "roberta", "is_decoder": True},
    "rwkv": {"attention_hidden_size": 32},
    "seed_oss": HEAD,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
    "vaultgemma": WINDOW,
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 96},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}


def tiny_model(family: str) -> Any:
    """Return a frozen transformers.PreTrainedModel of a family, the same each time.

    Its weights are larger than fresh ones are: its layers are then as far from linear as trained ones.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"type": family, **SHAPE, **FAMILIES[family]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("type"), **settings))
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.endswith("A_log"):  # the logarithms of Mamba's decays are no weights
            weight.data.mul_(5.0)
    return model.requires_grad_(False).eval()
