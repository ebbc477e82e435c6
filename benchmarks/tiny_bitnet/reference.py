"""tiny_bitnet.npz in plain numpy: the whole forward pass, no cache.

    python reference.py "# textwrap.py\\n" --num-tokens 40

Slow on purpose: every new token computes all positions again, so that there is nothing to keep in
step.  A faster implementation is right when it gives these logits.

    x -> RMSNorm -> q, k, v -> RoPE(q, k) -> attention -> attn_sub_norm -> o_proj -> + x
      -> RMSNorm -> relu(gate)^2 * up -> ffn_sub_norm -> down_proj -> +

Needs numpy alone.
"""

import argparse
import json
from pathlib import Path

import bpe
import numpy as np

MODEL = Path(__file__).parents[2] / "paged_kv/models/tiny_bitnet"


def load(path=MODEL / "tiny_bitnet.npz"):
    """(config, weights): the embedding as floats, projections as (ternary float32, scale)."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    config = json.loads(arrays.pop("config").tobytes())
    weights = {}
    for name, array in arrays.items():
        if name.endswith("_proj.weight"):
            weights[name] = unpack_ternary(array), arrays[f"{name}_scale"][0]
        elif name == "model.embed_tokens.weight":
            weights[name] = array * arrays[f"{name}_scale"][:, None]
        elif name.endswith("norm.weight"):
            weights[name] = array
    return config, weights


def unpack_ternary(packed):
    """uint8 [out / 4, in] -> {-1, 0, 1} float32 [out, in]; two bits a weight, value = code - 1."""
    quarters = [(packed >> shift & 3).astype(np.float32) - 1 for shift in (0, 2, 4, 6)]
    return np.concatenate(quarters)


def forward(config, weights, ids):
    """ids [length] -> logits float32 [length, vocab_size]."""
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids]
    for i in range(config["num_hidden_layers"]):
        layer = Layer(config, weights, f"model.layers.{i}.")
        x = x + layer.attention(layer.norm(x, "input_layernorm"))
        x = x + layer.feed_forward(layer.norm(x, "post_attention_layernorm"))
    x = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return x @ embedding.T  # the head is the embedding


class Layer:
    """One layer's weights under their short names."""

    def __init__(self, config, weights, prefix):
        self.config, self.weights, self.prefix = config, weights, prefix

    def norm(self, x, name):
        return rms_norm(x, self.weights[f"{self.prefix}{name}.weight"], self.config["rms_norm_eps"])

    def project(self, x, name):
        return bit_linear(x, *self.weights[f"{self.prefix}{name}_proj.weight"])

    def attention(self, x):
        length, head_dim = len(x), self.config["head_dim"]
        q, k, v = (self.project(x, f"self_attn.{name}").reshape(length, -1, head_dim) for name in "qkv")
        theta = self.config["rope_parameters"]["rope_theta"]
        out = causal_attention(rotate(q, theta), rotate(k, theta), v)
        return self.project(self.norm(out.reshape(length, -1), "self_attn.attn_sub_norm"), "self_attn.o")

    def feed_forward(self, x):
        gate, up = self.project(x, "mlp.gate"), self.project(x, "mlp.up")
        hidden = np.maximum(gate, 0) ** 2 * up
        return self.project(self.norm(hidden, "mlp.ffn_sub_norm"), "mlp.down")


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def bit_linear(x, ternary, weight_scale):
    """x rounded to int8 per token, times the ternary matrix, times both scales."""
    scale = 127 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5))
    rounded = np.clip(np.round(x * scale), -128, 127)  # np.round: half to even, as torch
    # Sums of at most 864 products up to 128: whole numbers below 2**24, so exact in float32.
    return (rounded @ ternary.T) / scale * weight_scale


def rotate(x, theta):
    """RoPE on [length, heads, head_dim]: dimension i turns with dimension i + head_dim / 2."""
    length, _, head_dim = x.shape
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies)[:, None, :]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def causal_attention(q, k, v):
    """q [length, q heads, head_dim]; k, v [length, kv heads, head_dim]; a group of q heads shares one."""
    length, num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[1]
    hidden = np.triu(np.ones((length, length), dtype=bool), k=1)
    out = np.empty_like(q)
    for head in range(num_q_heads):
        scores = q[:, head] @ k[:, head // group].T / np.float32(np.sqrt(head_dim))
        scores[hidden] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = scores / scores.sum(axis=-1, keepdims=True) @ v[:, head // group]
    return out


def generate(config, weights, ids, num_tokens, temperature=0.0, seed=0):
    """Append num_tokens ids, or fewer when the end token comes.  Temperature 0 takes the likeliest."""
    rng = np.random.default_rng(seed)
    ids = list(ids)
    for _ in range(num_tokens):
        logits = forward(config, weights, ids)[-1]
        if temperature > 0:  # the Gumbel trick: noise, then the likeliest, samples from the softmax
            logits = logits / temperature + rng.gumbel(size=len(logits))
        ids.append(int(np.argmax(logits)))
        if ids[-1] == config["eos_token_id"]:
            break
    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt", help=r"text to go on from; \n is a new line")
    parser.add_argument("--num-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    tokenizer = bpe.Tokenizer(MODEL / "tokenizer.json")
    config, weights = load()
    ids = [config["bos_token_id"], *tokenizer.encode(args.prompt.replace(r"\n", "\n"))]
    print(tokenizer.decode(generate(config, weights, ids, args.num_tokens, args.temperature)))


if __name__ == "__main__":
    main()
