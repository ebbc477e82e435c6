"""Pack a trained checkpoint into tiny_bitnet.npz.

    python export.py --work DIR        reads DIR/checkpoint.pt

Projections become 2 bits a weight, in the layout of transformers' packed BitNet checkpoints; the
embedding, which is also the head, int8 with one float32 scale a row; norms stay float32.  The
README describes every array.  Imported by evaluate.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from model import Config, TinyBitNet, num_ternary_weights, ternary_codes, weight_scale
from reference import MODEL


def main():
    args = parse_arguments()
    model = load_trained(args.work / "checkpoint.pt")
    arrays = pack(model)
    np.savez(args.output, **arrays)
    print(
        f"{args.output}: {args.output.stat().st_size:,} bytes, {num_ternary_weights(model):,} "
        f"ternary weights, {100 * share_of_zeros(model):.1f} % of them zero"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoint.pt")
    parser.add_argument("--output", type=Path, default=MODEL / "tiny_bitnet.npz")
    return parser.parse_args()


def load_trained(path):
    model = TinyBitNet(Config())
    model.load_state_dict(torch.load(path, map_location="cpu")["model"])
    return model.eval()


@torch.no_grad()
def pack(model):
    """{array name: numpy array}; names are those of BitNetForCausalLM's state."""
    arrays = {"config": json_bytes(transformers_config(model.config))}
    for name, parameter in model.named_parameters():
        name = f"model.{name}"
        if name.endswith("_proj.weight"):
            scale = weight_scale(parameter)
            arrays[name] = pack_ternary(ternary_codes(parameter, scale).numpy())
            arrays[f"{name}_scale"] = scale.reshape(1).numpy()
        elif name == "model.embed_tokens.weight":
            arrays[name], arrays[f"{name}_scale"] = int8_rows(parameter.numpy())
        else:
            arrays[name] = parameter.numpy()
    return arrays


def pack_ternary(weights):
    """{-1, 0, 1} [out, in] -> uint8 [out / 4, in]: bits 2i, 2i + 1 of row r are row r + i * out / 4."""
    quarters = np.split((weights + 1).astype(np.uint8), 4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def int8_rows(matrix):
    """float [rows, columns] -> int8 [rows, columns] and float32 [rows], the worth of one unit."""
    scales = np.abs(matrix).max(axis=1) / 127
    return np.round(matrix / scales[:, None]).astype(np.int8), scales.astype(np.float32)


def transformers_config(config):
    """What transformers' DecoderConfig needs to build the same graph."""
    fields = asdict(config)
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **{name: value for name, value in fields.items() if name != "rope_theta"},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "relu2",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",  # y = (W x) * weight_scale
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        },
    }


def json_bytes(value):
    return np.frombuffer(json.dumps(value, indent=1).encode(), dtype=np.uint8)


def share_of_zeros(model):
    codes = [
        ternary_codes(parameter, weight_scale(parameter)).flatten()
        for name, parameter in model.named_parameters()
        if name.endswith("_proj.weight")
    ]
    return (torch.cat(codes) == 0).float().mean().item()


if __name__ == "__main__":
    main()
