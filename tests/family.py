"""Random models of the llama family, as config.json and tensors under transformers' names."""

import json

import numpy as np

from paged_kv.models.bitnet import TINY_BITNET
from paged_kv.models.checkpoint import bits_of_float32, float32_of_bits
from paged_kv.models.tensor_file import write_tensors
from paged_kv.text.tokenizer import open_tokenizer

#: Of every family; head_dim is 16 where nothing else is said.
SIZES = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2},
    **{"tie_word_embeddings": False},
}
FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {},
}


def fields_of(name):
    """config.json of one of FAMILIES."""
    return SIZES | {"model_type": name.split()[0]} | FAMILIES[name]


def tensors_of(fields, seed=0):
    """float32 of bfloat16's values, each by its name."""
    rng = np.random.default_rng(seed)
    hidden, inter, dim = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    q_out, kv_out = (fields[f"num_{kind}_heads"] * dim for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (fields["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for i in range(fields["num_hidden_layers"]):
        widths = {"q": (q_out, hidden), "k": (kv_out, hidden), "v": (kv_out, hidden), "o": (hidden, q_out)}
        layer = {f"self_attn.{name}_proj.weight": shape for name, shape in widths.items()}
        layer |= {"mlp.gate_proj.weight": (inter, hidden), "mlp.up_proj.weight": (inter, hidden)}
        layer |= {"mlp.down_proj.weight": (hidden, inter)}
        layer |= {f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        biased = "qkvo" if fields.get("attention_bias") else "qkv" if fields["model_type"] == "qwen2" else ""
        layer |= {f"self_attn.{name}_proj.bias": widths[name][:1] for name in biased}
        if fields["model_type"] == "qwen3":
            layer |= {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.standard_normal(shape) / (np.sqrt(shape[1]) if "_proj.weight" in name else 1)
        tensors[name] = float32_of_bits(bits_of_float32(array.astype(np.float32)))
    return tensors


def save(folder, fields, tensors):
    """A folder as transformers saves it."""
    (folder / "config.json").write_text(json.dumps(fields))
    write_tensors(folder / "model.safetensors", tensors)
    return folder


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_folder(folder):
    """A random llama with a tokenizer and a chat template, of 512 positions."""
    made = open_tokenizer(TINY_BITNET / "tokenizer.json")
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    fields = fields_of("llama") | {
        **{"vocab_size": made.get_vocab_size(), "eos_token_id": made.token_to_id("<|im_end|>")},
        **{"bos_token_id": None, "max_position_embeddings": 512},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return save(folder, fields, tensors_of(fields))


def reference_logits(fields, tensors, ids):
    """Logits after each of `ids`, in float64, one token's attention after the other."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    dim, eps, kind = fields["head_dim"], fields["rms_norm_eps"], fields["model_type"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    angles = np.outer(np.arange(len(ids)), fields["rope_theta"] ** (-np.arange(0, dim, 2) / dim))

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def rotate(x):
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def project(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = norm(x, w[f"{layer}input_layernorm.weight"])
        q, k, v = (
            project(normed, f"{layer}self_attn.{name}_proj").reshape(len(ids), -1, dim) for name in "qkv"
        )
        if kind == "qwen3":
            q, k = (
                norm(q, w[f"{layer}self_attn.q_norm.weight"]),
                norm(k, w[f"{layer}self_attn.k_norm.weight"]),
            )
        if kind != "smollm3" or (i + 1) % 4:
            q, k = rotate(q), rotate(k)
        attended = np.empty((len(ids), heads, dim))
        for t in range(len(ids)):
            first = max(0, t + 1 - fields.get("sliding_window", len(ids)))
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = k[first : t + 1, group] @ q[t, head] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                attended[t, head] = weights / weights.sum() @ v[first : t + 1, group]
        x = x + project(attended.reshape(len(ids), -1), f"{layer}self_attn.o_proj")
        normed = norm(x, w[f"{layer}post_attention_layernorm.weight"])
        gate, up = (project(normed, f"{layer}mlp.{name}_proj") for name in ("gate", "up"))
        x = x + project(gate / (1 + np.exp(-gate)) * up, f"{layer}mlp.down_proj")
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
