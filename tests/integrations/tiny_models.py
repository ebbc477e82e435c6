"""Tiny random models of transformers' families, in float32."""

import torch
import transformers

TINY = {
    **{"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
    **{"initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
HEADS_OF_32 = {"head_dim": 32, "sliding_window": 20}
#: (configuration, what is not tiny's, the attention to compare with: eager where sdpa refuses).
FAMILIES = {
    "llama": ("Llama", {}, "sdpa"),
    "mistral": ("Mistral", {"sliding_window": 20}, "sdpa"),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
        "sdpa",
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}, "sdpa"),
    "gemma2": (
        "Gemma2",
        HEADS_OF_32 | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
        "eager",
    ),
    "gemma3": (
        "Gemma3Text",
        HEADS_OF_32 | {"sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
        "sdpa",
    ),
    "gpt-oss": ("GptOss", HEADS_OF_32 | {"num_local_experts": 4, "num_experts_per_tok": 2}, "eager"),
    "phi3": ("Phi3", {"sliding_window": 40}, "sdpa"),
    "gemma3n": (
        "Gemma3nText",
        HEADS_OF_32
        | {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "intermediate_size": 96, "laurel_rank": 8}
        | {"vocab_size_per_layer_input": 199, "hidden_size_per_layer_input": 16}
        | {"layer_types": ["sliding_attention", "full_attention"] * 3},
        "sdpa",
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
        | {"v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        "sdpa",
    ),
    "minicpm3": (
        "MiniCPM3",
        {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
        | {"v_head_dim": 16, "num_key_value_heads": 4},
        "sdpa",
    ),
}


def model_of(family):
    kind, more, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(TINY | more))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.generation_config.eos_token_id = None
    return model
