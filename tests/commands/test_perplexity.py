"""`paged-kv perplexity`: exp of the mean negative log-likelihood, in chunks of any size."""

import json

import numpy as np
import pytest
from family import fields_of, reference_logits, save, tensors_of

from paged_kv import ArgumentError
from paged_kv.commands import cli, perplexity
from paged_kv.models.bitnet import TINY_BITNET, BitNetModel
from paged_kv.models.decoder import DecoderModel
from paged_kv.text.tokenizer import open_tokenizer


def test_likelihoods_are_those_of_the_equations(tmp_path, monkeypatch, rng):
    fields = fields_of("qwen2")
    tensors = tensors_of(fields)
    model = DecoderModel.from_pretrained(save(tmp_path, fields, tensors), weights="bfloat16", head="float32")
    ids = rng.integers(0, fields["vocab_size"], 50).tolist()
    logits = reference_logits(fields, tensors, np.array(ids))[:-1]
    likelihoods = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = likelihoods[np.arange(49), ids[1:]]
    for step_tokens in (256, 49, 48, 7):
        monkeypatch.setattr(perplexity, "STEP_TOKENS", step_tokens)
        got = perplexity.log_likelihoods(model, ids, dtype="float32")
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_the_command_takes_the_file_as_it_is(capsys, tmp_path):
    pytest.importorskip("tokenizers")
    file = tmp_path / "text.py"
    file.write_bytes("import os\r\n\tx = '🙂'\n\n".encode())
    folder = tmp_path / "model"
    model = BitNetModel.tiny()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((TINY_BITNET / "tokenizer.json").read_bytes())
    ids = open_tokenizer(folder / "tokenizer.json").encode("import os\r\n\tx = '🙂'\n\n").ids
    expected = np.exp(-perplexity.log_likelihoods(DecoderModel.from_pretrained(folder), ids).mean())
    options = ["perplexity", "--model", str(folder), "--file", str(file)]
    assert cli.main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"perplexity": round(expected, 6), "tokens": len(ids)}
    assert cli.main(options) == 0
    assert capsys.readouterr().out == f"perplexity {expected:.4f} of {len(ids)} tokens\n"


def test_texts_that_are_too_short_or_too_long_are_refused():
    model = BitNetModel.tiny()
    for ids in ([5], [5] * 1025):
        with pytest.raises(ArgumentError, match=f"the text has {len(ids)} tokens"):
            perplexity.log_likelihoods(model, ids)
    with pytest.raises(ArgumentError, match="ids"):
        perplexity.log_likelihoods(model, [])
