"""Configurations of others: what is silent has transformers' defaults, what is wrong is
named with its file.
"""

import json

import pytest

from paged_kv import ArgumentError
from paged_kv.models.config import DecoderConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192},
}


def config_of(**fields):
    """LLAMA with other fields; ... leaves one out."""
    kept = {name: value for name, value in (LLAMA | fields).items() if value is not ...}
    return DecoderConfig.from_json(json.dumps(kept), "here/config.json")


SERVED = {
    "no rope_theta": ({"rope_theta": ...}, {"rope_theta": 10000.0}),
    "rope_theta null": ({"rope_theta": None}, {"rope_theta": 10000.0}),
    "rope_theta an integer": ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
    "no positions": ({"max_position_embeddings": ...}, {"max_position_embeddings": 2048}),
    "no activation": ({"hidden_act": ...}, {"hidden_act": "silu"}),
    "no eps": ({"rms_norm_eps": ...}, {"rms_norm_eps": 1e-6}),
    "no kv heads": ({"num_key_value_heads": ...}, {"num_key_value_heads": 4}),
    "a begin token of null": ({"bos_token_id": None}, {"bos_token_id": None}),
    "no begin token": ({"bos_token_id": ...}, {"bos_token_id": None}),
    "no end token": ({"eos_token_id": None}, {"stop_ids": ()}),
    "several end tokens": ({"eos_token_id": [2, 9]}, {"stop_ids": (2, 9)}),
    "a list of one": ({"eos_token_id": [2]}, {"stop_ids": (2,)}),
    "an end token beyond the vocabulary": ({"eos_token_id": 128009}, {"stop_ids": (128009,)}),
    "scaling of null": ({"rope_scaling": None}, {"rope_scaling": None}),
    "empty scaling": ({"rope_scaling": {}}, {"rope_scaling": None}),
    "default scaling": ({"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
    "default scaling by its old name": ({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
    "llama 3": ({"rope_scaling": LLAMA3}, {"rope_scaling": LLAMA3}),
    "llama 3 in parameters": (
        {"rope_theta": ..., "rope_parameters": LLAMA3 | {"rope_theta": 7.0}},
        {"rope_scaling": LLAMA3, "rope_theta": 7.0},
    ),
    "parameters that scale nothing": (
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": None, "rope_theta": 7.0},
    ),
    "empty parameters": ({"rope_parameters": {}}, {"rope_theta": 50000.0}),
    "a quantization of null": ({"quantization_config": None}, {"inverse_scales": False}),
    "biases": ({"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
    "a mistral": (
        {"model_type": "mistral", "num_key_value_heads": ..., "num_attention_heads": 8},
        {"num_key_value_heads": 8, "sliding_window": 4096, "qkv_bias": False},
    ),
    "a mistral without a window": (
        {"model_type": "mistral", "sliding_window": None},
        {"sliding_window": None},
    ),
    "a mistral's window": ({"model_type": "mistral", "sliding_window": 64}, {"sliding_window": 64}),
    "key heads of null": (
        {"model_type": "qwen3", "num_key_value_heads": None},
        {"num_key_value_heads": 4, "head_dim": 128, "qk_norms": True, "qkv_bias": False},
    ),
    "a qwen2": (
        {"model_type": "qwen2", "attention_bias": True, "sliding_window": 64, "max_window_layers": 1},
        {"qkv_bias": True, "o_bias": False, "sliding_window": None, "head_dim": 16},
    ),
    "a qwen2 whose windows begin behind its layers": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64},
        {"sliding_window": None},
    ),
    "a qwen2 with windows everywhere": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
        {"sliding_window": 64},
    ),
    "a smollm3": (
        {"model_type": "smollm3", "num_hidden_layers": 9, "rope_theta": ...},
        {"unrotated_layers": (3, 7), "rope_theta": 2000000.0},
    ),
    "a smollm3 that lists its layers": (
        {"model_type": "smollm3", "no_rope_layers": [0, 1, 1]},
        {"unrotated_layers": (0,)},
    ),
    "a silent bitnet": (
        {"model_type": "bitnet", "hidden_act": ..., "rope_theta": ..., "rms_norm_eps": ...},
        {"hidden_act": "relu2", "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    ),
}


@pytest.mark.parametrize(("fields", "expected"), SERVED.values(), ids=SERVED)
def test_what_can_be_served_is_served(fields, expected):
    """llm-awq PR #326, vLLM #9481, mlx-examples #909: configurations are silent in many ways."""
    config = config_of(**fields)
    assert {name: getattr(config, name) for name in expected} == expected


SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
]
BAD_SIZES = [0, -1, 2**31, 10**30, 32.0, 32.5, "32", True, [32], {}]
BAD_NUMBERS = [0, -1, -1e-9, "x", True, [], {}, 1e39, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize("value", BAD_SIZES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_none_is_named_with_its_file(name, value):
    with pytest.raises(ArgumentError, match=rf"here/config\.json.*{name}"):
        config_of(**{name: value})


@pytest.mark.parametrize("name", [*SIZES[:5]])
def test_a_size_that_is_missing_is_named(name):
    for value in (..., None):
        with pytest.raises(ArgumentError, match=rf"here/config\.json has no {name}"):
            config_of(**{name: value})


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=str)
def test_a_theta_that_turns_nothing_is_named(value):
    for fields in ({"rope_theta": value}, {"rope_parameters": {"rope_theta": value}}):
        with pytest.raises(ArgumentError, match=r"here/config\.json.*rope_theta"):
            config_of(**fields)


@pytest.mark.parametrize("value", [-1, -1e-6, 2, "x", True, float("nan")], ids=str)
def test_an_eps_outside_its_range_is_named(value):
    with pytest.raises(ArgumentError, match=r"here/config\.json.*rms_norm_eps"):
        config_of(rms_norm_eps=value)


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", [..., None, *BAD_NUMBERS], ids=str)
def test_each_number_of_a_scaling_is_checked(name, value):
    scaling = {key: number for key, number in (LLAMA3 | {name: value}).items() if number is not ...}
    for field in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ArgumentError, match=rf"here/config\.json: {field}.*{name}"):
            config_of(**{field: scaling})


WRONG = {
    "a scaling of text": ({"rope_scaling": "linear"}, "rope_scaling"),
    "a scaling that is not there": ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
    "a scaling without a type": ({"rope_scaling": {"type": 5}}, "rope_scaling"),
    "frequencies the wrong way round": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}},
        "high_freq_factor",
    ),
    "a trained length that is none": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings",
    ),
    "parameters that are a list": ({"rope_parameters": []}, "rope_parameters"),
    "a quantization of text": ({"quantization_config": "x"}, "quantization_config"),
    "an end token of text": ({"eos_token_id": "2"}, "eos_token_id"),
    "end tokens of text": ({"eos_token_id": [2, "3"]}, "eos_token_id"),
    "an end token of a float": ({"eos_token_id": 2.0}, "eos_token_id"),
    "a begin token of text": ({"bos_token_id": "1"}, "bos_token_id"),
    "a begin token below 0": ({"bos_token_id": -1}, "bos_token_id"),
    "a begin token beyond the vocabulary": ({"bos_token_id": 320}, "bos_token_id"),
    "another family": ({"model_type": "gpt2"}, "model_type"),
    "no family": ({"model_type": 5}, "model_type"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "biases of the feed-forward": ({"mlp_bias": True}, "biases"),
    "a bitnet's biases": ({"model_type": "bitnet", "attention_bias": True}, "biases"),
    "biases of text": ({"mlp_bias": "true"}, "mlp_bias"),
    "windows on some layers": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
        "sliding_window is 4096 on some layers",
    ),
    "windows by layer_types": (
        {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]},
        "some layers",
    ),
    "a window of 0": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    "too few rotated layers": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
    "rotated layers of text": ({"model_type": "smollm3", "no_rope_layers": "1"}, "no_rope_layers"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_attention_heads"),
    "heads of 25": ({"hidden_size": 100}, "head_dim"),
    "heads of 512": ({"head_dim": 512}, "head_dim"),
    "no multiple of 8": ({"intermediate_size": 100}, "intermediate_size"),
}


@pytest.mark.parametrize(("fields", "words"), WRONG.values(), ids=WRONG)
def test_what_is_not_there_or_is_none_is_named(fields, words):
    with pytest.raises(ArgumentError, match=rf"here/config\.json.*{words}"):
        config_of(**fields)


TEXTS = {
    "nothing": (b"", "is empty"),
    "cut": (b'{"vocab_size": 32', "is not JSON"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "a number": (b"5", "not a JSON object"),
    "bytes that are no text": (b"\xff\xfe\xfa\x00\x80", "is not JSON"),
    "nested without end": (b"[" * 100000, "is not JSON"),
    "a number of 5,000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "JSON"),
    "NUL": (b"\x00\x00", "is not JSON"),
}


@pytest.mark.parametrize(("text", "words"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_object_is_named(text, words):
    with pytest.raises(ArgumentError, match=f"here/config.json .*{words}"):
        DecoderConfig.from_json(text, "here/config.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_config_in_any_encoding_of_json_is_read(encoding):
    """Windows' editors put a mark before the text."""
    assert DecoderConfig.from_json(json.dumps(LLAMA).encode(encoding)).vocab_size == 320


def test_a_config_that_is_built_by_hand_is_checked_too():
    with pytest.raises(ArgumentError, match="head_dim is 12"):
        DecoderConfig(160, 64, 96, 2, 4, 2, 12, 128, 10000.0, 1e-5, 1, 2)
    with pytest.raises(ArgumentError, match="rope_theta"):
        DecoderConfig(160, 64, 96, 2, 4, 2, 16, 128, -1.0, 1e-5, 1, 2)


def test_what_is_written_is_read():
    config = DecoderConfig(160, 64, 96, 2, 4, 2, 16, 128, 10000.0, 1e-5, None, (2, 3))
    assert DecoderConfig.from_json(config.to_json()) == config
    assert config.with_stop_ids((3, 7)).stop_ids == (2, 3, 7)
