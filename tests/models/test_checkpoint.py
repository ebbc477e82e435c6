"""Folders as transformers saves them: what is saved is read again, and what is wrong is named."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import rows

from paged_kv import ArgumentError
from paged_kv.models.bitnet import SHAPES, BitNetConfig, BitNetModel
from paged_kv.models.checkpoint import Checkpoint, bits_of_float32, float32_of_bits
from paged_kv.models.layers import rope_frequencies
from paged_kv.models.tensor_file import TensorFile, write_tensors
from paged_kv.models.ternary import pack_ternary, ternarise, unpack_ternary

CONFIG = BitNetConfig(160, 64, 96, 2, 4, 2, 16, 128, 10000.0, 1e-5, 1, (2, 3))
NAME = "model.layers.1.mlp.down_proj"


def logits_of(model, num_tokens=20):
    ids = np.arange(num_tokens) * 7 % model.config.vocab_size
    with model.new_cache(num_pages=4) as cache, cache.step([cache.sequence()], [num_tokens]) as step:
        return model.forward(ids, step, np.arange(num_tokens))


@pytest.fixture
def folder(tmp_path):
    BitNetModel.random(CONFIG, seed=5).save_pretrained(tmp_path)
    return tmp_path


def changed(folder, **tensors):
    """The folder, with some tensors replaced; None: left out.  Double underscores are dots."""
    path = folder / "model.safetensors"
    kept = {name: array.copy() for name, array in TensorFile(path).items()}
    for name, array in tensors.items():
        kept[name] = array
    write_tensors(path, {name: array for name, array in kept.items() if array is not None})
    return folder


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("head", ["int8", "float32"])
def test_what_is_saved_is_read(tmp_path, inverse, head):
    config = dataclasses.replace(CONFIG, inverse_scales=inverse)
    model, calls = BitNetModel.random(config, head=head), []
    model.save_pretrained(tmp_path)
    read = BitNetModel.from_pretrained(
        tmp_path, head=head, progress=lambda done, of: calls.append((done, of))
    )
    assert read.config == config and calls == [(1, 2), (2, 2)]
    assert read.config.stop_ids == (2, 3)
    assert read.weight_bytes == model.weight_bytes
    expected, got = logits_of(model), logits_of(read)
    if inverse:  # 1 / (1 / scale) is off by a bit now and then
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.05 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(got, expected)


def test_a_stored_scale_of_either_direction_is_the_same_matrix(folder):
    tensors = TensorFile(folder / "model.safetensors")
    # Powers of two have exact reciprocals, so that the bits must be the same.
    scales = {name: np.array([0.25], np.float32) for name in tensors if name.endswith("weight_scale")}
    multiplied = logits_of(BitNetModel.from_pretrained(changed(folder, **scales)))
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["linear_class"] == "autobitlinear"
    config["quantization_config"]["linear_class"] = "bitlinear"
    (folder / "config.json").write_text(json.dumps(config))
    inverse = {name: 1 / scale for name, scale in scales.items()}
    divided = logits_of(BitNetModel.from_pretrained(changed(folder, **inverse)))
    np.testing.assert_array_equal(divided, multiplied)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_master_weights_become_ternary(folder, dtype):
    """A projection in floats stands for the ternary matrix that training would have rounded it to."""
    rng = np.random.default_rng(0)
    master = (rows(rng, 64, 96) * np.float32(0.02)).astype(np.float32)
    stored = bits_of_float32(master) if dtype == "bfloat16" else master.astype(dtype)
    seen = float32_of_bits(stored) if dtype == "bfloat16" else stored.astype(np.float32)
    weight, scale = ternarise(seen)
    assert 0.2 < (weight == 0).mean() < 0.5
    packed = changed(folder, **{f"{NAME}.weight": pack_ternary(weight), f"{NAME}.weight_scale": scale})
    expected = logits_of(BitNetModel.from_pretrained(packed))
    floats = changed(folder, **{f"{NAME}.weight": stored, f"{NAME}.weight_scale": None})
    np.testing.assert_array_equal(logits_of(BitNetModel.from_pretrained(floats)), expected)


def test_weights_lie_where_their_names_say(tmp_path):
    """q, k, v, and gate and up: of a projection the model's matrix has the rows that the file has."""
    model = BitNetModel.random(CONFIG, seed=9)
    model.save_pretrained(tmp_path)
    stored = {
        name: unpack_ternary(array) for name, array in TensorFile(tmp_path / "model.safetensors").items()
        if name.endswith("_proj.weight")
    }  # fmt: skip
    for i, block in enumerate(model.blocks):
        codes = block.attention.qkv.codes().astype(int) - 1
        qkv = [stored[f"model.layers.{i}.self_attn.{name}_proj.weight"] for name in "qkv"]
        np.testing.assert_array_equal(codes, np.concatenate(qkv))
        codes = block.gate_up.codes().astype(int) - 1
        gate, up = (stored[f"model.layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        np.testing.assert_array_equal(codes[:8], gate[:8])
        np.testing.assert_array_equal(codes[8:16], up[:8])
        np.testing.assert_array_equal(codes[-8:], up[-8:])


def test_files_in_several_parts(folder):
    expected = logits_of(BitNetModel.from_pretrained(folder))
    whole = folder / "model.safetensors"
    tensors = list(TensorFile(whole).items())
    index = {}
    for i, part in enumerate((tensors[:7], tensors[7:])):
        write_tensors(folder / f"part-{i}.safetensors", dict(part))
        index |= {name: f"part-{i}.safetensors" for name, _ in part}
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(logits_of(BitNetModel.from_pretrained(folder)), expected)
    index[NAME] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ArgumentError, match="outside"):
        BitNetModel.from_pretrained(folder)


WRONG = {
    "missing": ({f"{NAME}.weight": None}, f"no tensor {NAME}.weight"),
    "without a scale": ({f"{NAME}.weight_scale": None}, f"no tensor {NAME}.weight_scale"),
    "of another shape": ({f"{NAME}.weight": np.ones((16, 95), np.uint8)}, rf"{NAME}.weight .*\[16, 95\]"),
    "all zeros, packed": ({f"{NAME}.weight": np.full((16, 96), 0x55, np.uint8)}, f"{NAME}.weight .*zeros"),
    "all zeros, floats": ({f"{NAME}.weight": np.zeros((64, 96), "f4")}, f"{NAME}.weight .*zeros"),
    "code 3": ({f"{NAME}.weight": np.full((16, 96), 0xFF, np.uint8)}, f"{NAME}.weight.*code 3"),
    "integers": ({f"{NAME}.weight": np.ones((64, 96), np.int8)}, f"{NAME}.weight .*int8"),
    "a scale of zero": ({f"{NAME}.weight_scale": np.zeros(1, "f4")}, f"{NAME}.weight_scale .*zeros"),
    "a scale of NaN": ({f"{NAME}.weight_scale": np.full(1, np.nan, "f4")}, f"{NAME}.weight_scale .*finite"),
    "no embedding": ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight"),
    "an embedding of zeros": (
        {"model.embed_tokens.weight": np.zeros((160, 64), np.uint16)},
        "model.embed_tokens.weight .*zeros",
    ),
    "a norm of another width": (
        {"model.norm.weight": np.ones(63, "f4")},
        r"model.norm.weight .*\[63\], not \[64\]",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_tensor_is_named(folder, tensors, message):
    with pytest.raises(ArgumentError, match=message):
        BitNetModel.from_pretrained(changed(folder, **tensors))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "gpt2"),
        ("hidden_act", "gelu", "gelu"),
        ("attention_bias", True, "biases"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2}, "yarn"),
        ("hidden_size", None, "hidden_size"),
        ("num_hidden_layers", 3, r"no tensor model\.layers\.2\."),
        ("vocab_size", 161, r"model\.embed_tokens\.weight has the shape \[160, 64\], not \[161, 64\]"),
    ],
)
def test_a_config_that_asks_for_what_is_not_there(folder, field, value, message):
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match=message):
        BitNetModel.from_pretrained(folder)


def test_bits_of_bfloat16_round_to_nearest_even(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = (rows(rng, 5000) * 10.0 ** rng.integers(-30, 30, 5000)).astype(np.float32)
    values[:3] = 0, -0.0, 1 + 2**-8
    bits = bits_of_float32(values)
    np.testing.assert_array_equal(bits, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(float32_of_bits(bits), bits.view(ml_dtypes.bfloat16).astype(np.float32))


def test_checkpoints_hold_floats_only_where_floats_are_due():
    checkpoint = Checkpoint({"a": np.ones((2, 2), np.int8), "b": np.full((2, 2), 0x7F80, np.uint16)}, "here")
    with pytest.raises(ArgumentError, match="here: a is int8"):
        checkpoint.floats("a", (2, 2))
    with pytest.raises(ArgumentError, match="here: b holds values that are not finite"):
        checkpoint.nonzero("b", (2, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_real_sizes_have_the_bytes_they_are_known_for(shape):
    """2 bits a weight: 0.52 GB of matrices for 2B-4T, 1.6 GB for 7B."""
    config = SHAPES[shape]
    q_out, kv_out = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    block = config.hidden_size * (2 * q_out + 2 * kv_out + 3 * config.intermediate_size)
    gigabytes = block * config.num_hidden_layers / 4e9
    known = {"2b-4t": 0.52, "7b": 1.62, "700m": 0.17}
    assert gigabytes == pytest.approx(known[shape], rel=0.03)


def test_llama_3_scales_slow_turns_only():
    scaling = {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192},
    }
    plain, scaled = rope_frequencies(128, 500000.0), rope_frequencies(128, 500000.0, scaling)
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    slow = wavelengths > 8192
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = ~slow & (wavelengths > 8192 / 4)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_a_shape_that_is_not_known_is_refused():
    with pytest.raises(ArgumentError, match="2b-4t, 7b, 700m"):
        BitNetModel.random("13b")
    with pytest.raises(ArgumentError, match="int4"):
        BitNetModel.random(CONFIG, head="int4")
