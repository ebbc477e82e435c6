"""The llama family beside its equations in float64, in steps of any size."""

import numpy as np
import pytest
from family import FAMILIES, fields_of, reference_logits, save, tensors_of

from paged_kv import ArgumentError
from paged_kv.models.decoder import DecoderModel


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_equations(tmp_path, name, rng):
    fields = fields_of(name)
    tensors = tensors_of(fields, seed=int(rng.integers(1000)))
    ids = rng.integers(0, fields["vocab_size"], 40)
    expected = reference_logits(fields, tensors, ids)
    model = DecoderModel.from_pretrained(save(tmp_path, fields, tensors), weights="bfloat16", head="float32")
    assert model.config.sliding_window == fields.get("sliding_window")
    with model.new_cache(num_pages=4, page_size=16, max_seq_len=64, dtype="float32") as cache:
        seq, got, at = cache.sequence(), [], 0
        for count in (17, 1, 1, 20, 1):  # a prompt, tokens, another prompt, a token
            with cache.step([seq], [count]) as step:
                got.append(model.forward(ids[at : at + count], step, np.arange(count)))
            at += count
    np.testing.assert_allclose(np.concatenate(got), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama with biases"])
def test_biases_and_norms_of_heads_are_required(tmp_path, name):
    fields = fields_of(name)
    tensors = tensors_of(fields)
    part = "k_norm.weight" if name == "qwen3" else "k_proj.bias"
    del tensors[f"model.layers.3.self_attn.{part}"]
    with pytest.raises(ArgumentError, match=rf"model\.layers\.3\.self_attn\.{part}"):
        DecoderModel.from_pretrained(save(tmp_path, fields, tensors))


def test_a_bias_that_the_family_has_not_is_refused(tmp_path):
    fields = fields_of("qwen2")
    with pytest.raises(ArgumentError, match=r"q_proj\.bias, which no part of this model takes"):
        DecoderModel.from_pretrained(save(tmp_path, fields | {"model_type": "mistral"}, tensors_of(fields)))
