"""Folders as transformers saves them: what is saved is read again, and what is wrong is named."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import rows

from paged_kv import ArgumentError
from paged_kv.models.bitnet import SHAPES, BitNetModel, DecoderConfig
from paged_kv.models.checkpoint import Checkpoint, bits_of_float32, float32_of_bits
from paged_kv.models.layers import rope_frequencies
from paged_kv.models.tensor_file import DTYPES, TensorFile, write_tensors
from paged_kv.models.ternary import pack_ternary, ternarise, unpack_ternary

CONFIG = DecoderConfig(160, 64, 96, 2, 4, 2, 16, 128, 10000.0, 1e-5, 1, (2, 3))
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


# ---- a folder that says more than is read

LLAMA = {
    **{"model_type": "llama", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2},
}


def llama_tensors(rng):
    shapes = {"model.embed_tokens": (160, 64), "model.norm": (64,), "lm_head": (160, 64)}
    for i in range(2):
        block = {
            **{"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)},
            **{"self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)},
            **{"mlp.down_proj": (64, 96), "input_layernorm": (64,), "post_attention_layernorm": (64,)},
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": rows(rng, *shape) * np.float32(0.1) for name, shape in shapes.items()}


@pytest.fixture
def llama(tmp_path):
    """A folder with a small llama, its head its own."""
    write_tensors(tmp_path / "model.safetensors", llama_tensors(np.random.default_rng(3)))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


LEFT_OVER = {
    "a bias": {"model.layers.0.self_attn.q_proj.bias": np.full(64, 3.0, np.float32)},
    "a bias of 64 bits": {"model.layers.0.self_attn.q_proj.bias": np.full(64, 3.0)},
    "a BitNet's norm": {"model.layers.1.self_attn.inner_attn_ln.weight": np.ones(64, np.float32)},
    "another BitNet's norm": {"model.layers.1.mlp.ffn_layernorm.weight": np.ones(96, np.float32)},
    "a norm of queries": {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)},
    "an adapter": {"model.layers.0.self_attn.q_proj.lora_A": np.ones((4, 64), np.float32)},
    "an adapter of integers": {"model.layers.0.self_attn.q_proj.lora_A.default": np.ones((4, 64), np.int64)},
    "a third layer": {"model.layers.2.input_layernorm.weight": np.ones(64, np.float32)},
    "a scale of weights": {"model.layers.0.self_attn.q_proj.weight_scale": np.ones(1, np.float32)},
    "a buffer of floats": {"model.something": np.ones(1, np.float32)},
}
HARMLESS = {
    "rotary frequencies": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
    "rotary frequencies of all": {"model.rotary_emb.inv_freq": np.ones(8, np.float32)},
    "positions": {"model.position_ids": np.arange(128)},
    "a mask": {"model.layers.0.self_attn.mask": np.ones((4, 4), bool)},
    "counts of 64-bit floats": {"model.counts": np.ones(3)},
}
NAMES_OF_DTYPES = {"int64": "I64", "float64": "F64", "bool": "BOOL"}


def add(folder, tensors):
    """Append tensors, of any dtype, to a folder's file."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = {np.dtype(kind).name: name for name, kind in DTYPES.items()} | NAMES_OF_DTYPES
    for name, array in tensors.items():
        begin = len(body)
        body += array.tobytes()
        header[name] = {
            **{"dtype": names[array.dtype.name], "shape": array.shape},
            **{"data_offsets": [begin, len(body)]},
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("tensors", LEFT_OVER.values(), ids=LEFT_OVER)
def test_a_tensor_that_no_part_takes_is_named(llama, tensors):
    """llama.cpp PR #4283, #7931, mlc-llm PR #3494: biases and norms were dropped without a word."""
    BitNetModel.from_pretrained(llama)
    add(llama, tensors)
    (name,) = tensors
    with pytest.raises(ArgumentError, match=name.replace(".", r"\.")):
        BitNetModel.from_pretrained(llama)


@pytest.mark.parametrize("tensors", HARMLESS.values(), ids=HARMLESS)
def test_a_tensor_that_no_part_needs_is_passed_over(llama, tensors):
    """xinfer #222, mlx-examples #1232: a buffer of another dtype stopped a whole file from being read."""
    expected = logits_of(BitNetModel.from_pretrained(llama))
    add(llama, tensors)
    np.testing.assert_array_equal(logits_of(BitNetModel.from_pretrained(llama)), expected)


def test_an_untied_model_without_a_head_is_refused(llama):
    """TensorRT-LLM #3324: the embedding took the place of a head that was missing."""
    tied = llama / "config.json"
    expected = logits_of(BitNetModel.from_pretrained(llama))
    changed(llama, **{"lm_head.weight": None})
    for fields in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": None}):
        tied.write_text(json.dumps(LLAMA | fields))
        with pytest.raises(ArgumentError, match=r"no tensor lm_head\.weight"):
            BitNetModel.from_pretrained(llama)
    tied.write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    assert not np.array_equal(logits_of(BitNetModel.from_pretrained(llama)), expected)
    tied.write_text(json.dumps(LLAMA | {"tie_word_embeddings": "yes"}))
    with pytest.raises(ArgumentError, match="tie_word_embeddings"):
        BitNetModel.from_pretrained(llama)


def test_a_head_beside_a_tied_embedding_is_not_used(llama):
    (llama / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    with_head = logits_of(BitNetModel.from_pretrained(llama))
    without = logits_of(BitNetModel.from_pretrained(changed(llama, **{"lm_head.weight": None})))
    np.testing.assert_array_equal(with_head, without)


FLOATS = ["model.norm", "lm_head", "model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*FLOATS, "model.embed_tokens", "model.layers.1.post_attention_layernorm"])
def test_a_value_that_is_not_finite_is_named(llama, name, value):
    array = TensorFile(llama / "model.safetensors")[f"{name}.weight"].copy()
    array.reshape(-1)[5] = value
    with pytest.raises(ArgumentError, match=rf"{name}\.weight.*not finite"):
        BitNetModel.from_pretrained(changed(llama, **{f"{name}.weight": array}))


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("head", ["int8", "bfloat16", "float32"])
def test_the_largest_weights_stay_finite(llama, weights, head):
    """3.4e38 is finite in float32, and rounds to an infinity in bfloat16."""
    array = TensorFile(llama / "model.safetensors")["lm_head.weight"].copy()
    array[3] = 0
    array[3, 5] = 3.4e38
    changed(llama, **{"lm_head.weight": array})
    model = BitNetModel.from_pretrained(llama, weights=weights, head=head)
    assert np.isfinite(logits_of(model)[:, :3]).all()
    bits = bits_of_float32(np.array([3.4e38, -3.4e38, 3.3895e38, np.finfo(np.float32).max], np.float32))
    assert np.isfinite(float32_of_bits(bits)).all()


def split(folder, twice=()):
    """The folder's tensors in two shards; those of `twice` are in both, and differ in the second one."""
    whole = folder / "model.safetensors"
    tensors = {name: array.copy() for name, array in TensorFile(whole).items()}
    whole.unlink()
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    index = {}
    for i, half in enumerate(halves):
        part = {name: tensors[name] for name in half}
        if i == 1:
            part |= {name: tensors[name] * 2 for name in twice}
        write_tensors(folder / f"part-{i}.safetensors", part)
        index |= {name: f"part-{i}.safetensors" for name in half}
    return index


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_tensor_of_two_shards_comes_from_the_one_that_the_index_names(llama):
    """colibri #1479: the later file won, whatever the index said."""
    expected = logits_of(BitNetModel.from_pretrained(llama))
    name = next(iter(TensorFile(llama / "model.safetensors")))
    index = split(llama, twice=[name])
    write_index(llama, {"weight_map": index})
    np.testing.assert_array_equal(logits_of(BitNetModel.from_pretrained(llama)), expected)
    write_index(llama, {"weight_map": index | {name: "part-1.safetensors"}})
    assert not np.array_equal(logits_of(BitNetModel.from_pretrained(llama)), expected)
    write_index(llama, {"weight_map": index | {list(index)[-1]: "part-0.safetensors"}})
    with pytest.raises(ArgumentError, match=r"part-0\.safetensors has no tensor"):
        BitNetModel.from_pretrained(llama)


INDICES = {
    "without a map": ({}, "weight_map"),
    "a map that is a list": ({"weight_map": ["a"]}, "weight_map"),
    "a map of null": ({"weight_map": None}, "weight_map"),
    "a file of null": ({"weight_map": {"a": None}}, "weight_map"),
    "a file of numbers": ({"weight_map": {"a": 5}}, "weight_map"),
    "a list": ([1], "not a JSON object"),
    "a file elsewhere": ({"weight_map": {"a": "../b.safetensors"}}, "outside"),
    "an absolute path": ({"weight_map": {"a": "/b.safetensors"}}, "outside"),
    "NUL": ({"weight_map": {"a": "b\0c"}}, "outside"),
    "the folder": ({"weight_map": {"a": "."}}, "outside"),
    "its parent": ({"weight_map": {"a": ".."}}, "outside"),
    "nothing": ({"weight_map": {"a": ""}}, "outside"),
}


@pytest.mark.parametrize(("index", "words"), INDICES.values(), ids=INDICES)
def test_an_index_that_is_none_is_named(llama, index, words):
    write_index(llama, index)
    with pytest.raises(ArgumentError, match=rf"index\.json.*{words}"):
        BitNetModel.from_pretrained(llama)


def test_a_shard_that_is_not_there_is_an_os_error(llama):
    write_index(llama, {"weight_map": {"a": "gone.safetensors"}})
    with pytest.raises(FileNotFoundError, match="gone"):
        BitNetModel.from_pretrained(llama)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text",
    [b"", b'{"a": ', b"version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe\x00", b"[]", b"null"],
    ids=["empty", "cut", "git-lfs", "no text", "a list", "null"],
)
def test_every_json_file_of_a_folder_is_named_when_it_cannot_be_read(llama, name, text):
    (llama / name).write_bytes(text)
    with pytest.raises(ArgumentError, match=name):
        BitNetModel.from_pretrained(llama)


@pytest.mark.parametrize(
    ("fields", "stop_ids"),
    [
        ({"eos_token_id": [2, 9]}, (2, 9)),
        ({"eos_token_id": 9}, (2, 9)),
        ({"eos_token_id": None}, (2,)),
        ({"temperature": 0.6}, (2,)),
    ],
    ids=str,
)
def test_end_tokens_are_those_of_both_files(llama, fields, stop_ids):
    """vLLM #4180, ollama #3759: an instruct llama's end of turn stands in generation_config.json only."""
    (llama / "generation_config.json").write_text(json.dumps(fields))
    assert BitNetModel.from_pretrained(llama).config.stop_ids == stop_ids


@pytest.mark.parametrize("eos", ["2", [2, "9"], 2.5, {}, True], ids=str)
def test_end_tokens_that_are_none_are_named(llama, eos):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ArgumentError, match=r"generation_config\.json: eos_token_id"):
        BitNetModel.from_pretrained(llama)


@pytest.mark.parametrize("shape", [[1] * 70, [0, 2**63], [0, 2**62, 4]], ids=["70 axes", "2**63", "2**64"])
def test_a_shape_that_no_array_has_is_named(tmp_path, shape):
    path = tmp_path / "model.safetensors"
    num_bytes = 0 if 0 in shape else 4
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, num_bytes]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    with pytest.raises(ArgumentError, match="a is F32"):
        TensorFile(path)["a"]


def test_the_small_models_file_is_whole():
    """Every array of it is taken."""
    assert BitNetModel.tiny().config.vocab_size == 2048
