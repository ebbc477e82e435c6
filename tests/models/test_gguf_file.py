"""GGUF files of our own making: the same model as from a folder, and what is not supported is named."""

import contextlib
import dataclasses
import json
import sys

import numpy as np
import pytest
from family import FAMILIES, fields_of, save, tensors_of

from paged_kv import ArgumentError
from paged_kv.models.checkpoint import float32_of_bits
from paged_kv.models.config import DecoderConfig
from paged_kv.models.decoder import DecoderModel
from paged_kv.models.gguf_file import ARCHITECTURES, LAYER_NAMES, OUTER_NAMES, GGUFFile
from paged_kv.models.layers import rope_frequencies

gguf = pytest.importorskip("gguf")

NAMES_THERE = {theirs: ours for ours, theirs in (LAYER_NAMES | OUTER_NAMES).items()}
TYPES = gguf.GGMLQuantizationType


def name_there(name):
    """GGUF's name of a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES_THERE:
        return f"{NAMES_THERE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES_THERE[part]}.{kind}"


def in_pairs(rows, num_heads):
    """Elements that rotate together side by side, as llama.cpp stores them."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def write(path, fields, tensors, kind=TYPES.F32, *, architecture=None, more=(), extra=()):
    """A GGUF file; matrices are quantised as `kind`.

    more : (name, value) of more fields, integers, floats or texts
    extra : (name, array) of more tensors; (name, bytes, type) of quantised ones
    """
    arch = architecture or fields["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_bos_token_id(fields["bos_token_id"])
    writer.add_eos_token_id(fields["eos_token_id"])
    for name, value in more:
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name.replace("ARCH", arch), value)
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}
    for name, array in tensors.items():
        part = name.split(".")[-2]
        if part in heads and ARCHITECTURES.get(arch):
            array = in_pairs(array, heads[part])
        if array.ndim == 1 or kind == TYPES.F32:
            writer.add_tensor(name_there(name), array)
        else:
            writer.add_tensor(name_there(name), gguf.quantize(array, kind), raw_dtype=kind)
    for name, array, *raw in extra:
        writer.add_tensor(name, array, raw_dtype=raw[0] if raw else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(path, **options):
    model = DecoderModel.from_pretrained(path, **options)
    ids = np.arange(30) * 7 % model.config.vocab_size
    with model.new_cache(num_pages=4, max_seq_len=64) as cache, cache.step([cache.sequence()], [30]) as step:
        return model.forward(ids, step, np.arange(30))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.split()[0] in ARCHITECTURES])
def test_a_file_is_the_model_of_the_folder(tmp_path, name, kind):
    fields = fields_of(name) | {"attention_bias": False}
    tensors = tensors_of(fields)
    path = write(tmp_path / "model.gguf", fields, tensors, TYPES[kind])
    expected = logits_of(save(tmp_path, fields, tensors), weights="bfloat16", head="float32")
    got = logits_of(path, weights="bfloat16", head="float32")
    if kind == "F16":  # small values lose bits
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_are_dequantised(tmp_path, kind):
    fields = fields_of("llama")
    tensors = tensors_of(fields)
    path = write(tmp_path / "model.gguf", fields, tensors, TYPES[kind])
    file = GGUFFile(path)
    assert set(file) == set(tensors) and len(file) == len(tensors)
    step = {"Q8_0": 1 / 127, "Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31}[kind]
    for name, array in tensors.items():
        got = file[name]
        assert got.dtype == np.float32 and got.shape == array.shape
        bound = 0 if array.ndim == 1 else 1.1 * step * np.abs(array).max()
        assert np.abs(got - array).max() <= bound, name
    rounded = {name: file[name] for name in tensors}
    expected = logits_of(save(tmp_path, fields, rounded), head="float32")
    np.testing.assert_array_equal(logits_of(path, head="float32"), expected)


def dequantised_types():
    """Every type that the package reads, as random bytes of 256 weights show."""
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, 256 // block * size), np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        if kind not in (TYPES.F32, TYPES.F16):  # numpy's own
            yield kind


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", list(dequantised_types()), ids=lambda kind: kind.name)
def test_every_type_that_the_package_reads_is_read(tmp_path, kind, rng):
    """Weights of a model are 256 wide here, as K-quants need it."""
    fields = fields_of("llama") | {"hidden_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    tensors = tensors_of(fields)
    name = "model.layers.0.mlp.up_proj.weight"
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (fields["intermediate_size"], 256 // block * size), np.uint8)
    del tensors[name]
    path = write(tmp_path / "model.gguf", fields, tensors, extra=[(name_there(name), stored, kind)])
    found = GGUFFile(path)[name]
    expected = gguf.dequantize(stored, kind)
    if found.dtype == np.uint16:
        found = float32_of_bits(found)
    np.testing.assert_array_equal(found, expected)


def test_the_config_is_found(tmp_path):
    fields = fields_of("llama")
    more = [("tokenizer.ggml.eot_token_id", 7)]
    file = GGUFFile(write(tmp_path / "model.gguf", fields, tensors_of(fields), more=more))
    config = DecoderConfig.from_fields(file.fields)
    expected = DecoderConfig.from_json(json.dumps(fields | {"eos_token_id": [2, 7]}))
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    assert config == dataclasses.replace(expected, rms_norm_eps=config.rms_norm_eps)


def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path):
    fields = fields_of("llama") | {"rope_theta": 500000.0}
    scaling = {
        **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8192},
    }
    plain = rope_frequencies(16, 500000.0)
    factors = (plain / rope_frequencies(16, 500000.0, scaling)).astype(np.float32)
    tensors = tensors_of(fields)
    file = GGUFFile(write(tmp_path / "a.gguf", fields, tensors, extra=[("rope_freqs.weight", factors)]))
    assert DecoderConfig.from_fields(file.fields).rope_scaling == scaling and "rope_freqs.weight" not in file
    other = GGUFFile(write(tmp_path / "b.gguf", fields, tensors, extra=[("rope_freqs.weight", factors**2)]))
    with pytest.raises(ArgumentError, match=r"b\.gguf: rope_freqs\.weight is not llama 3's"):
        _ = other.fields


UNSUPPORTED = {
    "experts": ([("ARCH.expert_count", 8)], "8 experts"),
    "scaling": ([("ARCH.rope.scaling.type", "yarn")], "'yarn'"),
    "parts of heads that rotate": ([("ARCH.rope.dimension_count", 8)], r"rope\.dimension_count is 8"),
    "values of another width": ([("ARCH.attention.value_length", 24)], r"attention\.value_length is 24"),
    "a window": ([("ARCH.attention.sliding_window", 128)], "sliding window"),
    "several files": ([("split.count", 3)], "one of 3 parts"),
}


@pytest.mark.parametrize(("more", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_named(tmp_path, more, words):
    fields = fields_of("llama")
    path = write(tmp_path / "model.gguf", fields, tensors_of(fields), more=more)
    with pytest.raises(ArgumentError, match=rf"model\.gguf.*{words}"):
        DecoderModel.from_pretrained(path)


def test_another_architecture_is_named(tmp_path):
    fields = fields_of("llama")
    path = write(tmp_path / "model.gguf", fields, tensors_of(fields), architecture="gemma3")
    with pytest.raises(ArgumentError, match="the architecture is 'gemma3'; llama, qwen2"):
        DecoderModel.from_pretrained(path)


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path):
    fields = fields_of("llama")
    tensors = tensors_of(fields)
    path = write(
        tmp_path / "a.gguf", fields, tensors, extra=[("blk.1.attn_sinks.weight", np.ones(4, np.float32))]
    )
    with pytest.raises(ArgumentError, match=r"blk\.1\.attn_sinks\.weight, which no part"):
        DecoderModel.from_pretrained(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ArgumentError, match=r"b\.gguf has no tensor model\.layers\.2\.mlp\.up_proj"):
        DecoderModel.from_pretrained(write(tmp_path / "b.gguf", fields, tensors))


def test_files_that_are_none_are_named(tmp_path, rng):
    fields = fields_of("llama")
    whole = write(tmp_path / "model.gguf", fields, tensors_of(fields)).read_bytes()
    for text, words in (
        (b"", "begins with"),
        (b"PK\3\4" + bytes(64), "no GGUF file"),
        (whole[:300], "cannot be read"),
    ):
        (tmp_path / "bad.gguf").write_bytes(text)
        with pytest.raises(ArgumentError, match=words):
            DecoderModel.from_pretrained(tmp_path / "bad.gguf")
    for _ in range(60):  # lengths, types and offsets that lie
        bent = bytearray(whole)
        bent[int(rng.integers(4, 3000))] = int(rng.integers(256))
        (tmp_path / "bad.gguf").write_bytes(bytes(bent))
        with contextlib.suppress(ArgumentError, MemoryError):
            DecoderModel.from_pretrained(tmp_path / "bad.gguf")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"paged_kv\[gguf\]"):
        DecoderModel.from_pretrained(write_nothing(tmp_path))


def write_nothing(folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder / "model.gguf"
