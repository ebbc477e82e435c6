"""Random models beside transformers': BitNet with scales of either direction, and the llama family.

Rounding to 8 bits is a step function, so BitNet is compared with what transformers' model differs by from
itself when its embedding is off by 1e-6 of its value (the largest of four seeds), at most and at the median.
A llama has no such steps: its tolerance is its activations' rounding.
"""

import copy
import dataclasses
import os

import numpy as np
import pytest

from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.models.decoder import DecoderModel

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = DecoderConfig(320, 128, 192, 3, 8, 2, 16, 512, 10000.0, 1e-5, 1, 2)
LENGTHS = (70, 129, 5)
LLAMA_3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, CONFIG.vocab_size, length) for length in LENGTHS]


@torch.no_grad()
def theirs(model, prompts, window=None):
    logits = []
    for ids in prompts:
        i = np.arange(len(ids))
        seen = i[None] <= i[:, None]
        if window is not None:
            seen &= i[None] > i[:, None] - window
        mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-1e30)))[None, None]
        logits.append(model(torch.from_numpy(ids)[None], attention_mask=mask).logits[0].float().numpy())
    return logits


def distances(got, expected):
    """The largest difference of each token's logits."""
    return np.concatenate([np.abs(a - b).max(1) for a, b in zip(got, expected, strict=True)])


def jitter_of(model, prompts, expected, window=None):
    """(at most, at the median)"""
    jitter = np.zeros(2)
    for seed in range(4):
        off, noise = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        weight = off.model.embed_tokens.weight
        with torch.no_grad():
            head = off.lm_head.weight.clone()
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=noise))
            off.lm_head.weight = torch.nn.Parameter(head)
        found = distances(theirs(off, prompts, window), expected)
        jitter = np.maximum(jitter, [found.max(), np.median(found)])
    return jitter


def prefill(model, prompts, window=None):
    """All prompts in one step, ragged."""
    with model.new_cache(num_pages=40, page_size=16, window=window, dtype="float32") as cache:
        seqs = [cache.sequence() for _ in prompts]
        with cache.step(seqs, prompts) as step:
            rows = model.forward(np.concatenate(prompts), step, np.arange(len(step.positions)))
        return np.split(rows, step.qo_indptr[1:-1])


def decode(model, prompts, window=None):
    """Each prompt token by token, beside the others."""
    logits = [[] for _ in prompts]
    with model.new_cache(num_pages=40, page_size=16, window=window, dtype="float32") as cache:
        seqs = [cache.sequence() for _ in prompts]
        for i in range(max(map(len, prompts))):
            going = [j for j, ids in enumerate(prompts) if i < len(ids)]
            with cache.step([seqs[j] for j in going], [1] * len(going)) as step:
                rows = model.forward([prompts[j][i] for j in going], step, np.arange(len(going)))
            for j, row in zip(going, rows, strict=True):
                logits[j].append(row)
    return [np.stack(rows) for rows in logits]


@pytest.fixture(scope="module", params=["autobitlinear", "bitlinear"])
def bitnet(request, tmp_path_factory):
    """(the folder, transformers' model of it)."""
    folder = tmp_path_factory.mktemp("bitnet")
    config = dataclasses.replace(CONFIG, inverse_scales=request.param == "bitlinear")
    BitNetModel.random(config, seed=11).save_pretrained(folder)
    model = transformers.BitNetForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    linear = model.model.layers[0].self_attn.q_proj
    assert type(linear).__name__.lower() == request.param
    torch.nn.Module.float(model)  # the embedding is stored in bfloat16
    return folder, model.eval()


@pytest.mark.parametrize("window", [None, 40])
def test_a_bitnet_gives_the_same_logits(bitnet, prompts, window):
    folder, model = bitnet
    ours = BitNetModel.from_pretrained(folder, head="float32")
    expected = theirs(model, prompts, window)
    got = prefill(ours, prompts, window)
    found = distances(got, expected)
    largest, median = jitter_of(model, prompts, expected, window)
    assert found.max() <= 1.5 * largest and np.median(found) <= 1.5 * median
    for together, alone in zip(got, decode(ours, prompts, window), strict=True):
        np.testing.assert_array_equal(together, alone)


def test_the_8_bit_head_costs_little(bitnet, prompts):
    """Of the logits' size, a hundredth; and it is the head alone that differs."""
    folder, _ = bitnet
    exact = np.concatenate(prefill(BitNetModel.from_pretrained(folder, head="float32"), prompts))
    rounded = np.concatenate(prefill(BitNetModel.from_pretrained(folder), prompts))
    assert 0 < np.abs(rounded - exact).std() <= 0.01 * exact.std()


#: Of the llama family: what is not the default of its configuration.
FAMILIES = {
    "llama": {},
    "llama with llama 3's positions": {"rope_parameters": LLAMA_3 | {"rope_theta": 10000.0}},
    "llama, tied": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True},
    "mistral with a window": {"sliding_window": 40, "head_dim": 32},
    "mistral without": {"sliding_window": None},
    "qwen2": {},
    "qwen2 with windows": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 5, "pad_token_id": None},
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_llama_family_gives_the_same_logits(tmp_path, prompts, name, weights):
    """Its weights rounded first: what is left is the rounding of activations to 16 bits, or nothing."""
    kind = CLASSES[name.replace(",", "").split()[0]]
    sizes = {
        **{"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{"bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"},
    }
    config = getattr(transformers, f"{kind}Config")(**(sizes | FAMILIES[name]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("_proj.weight"):
                groups = parameter.reshape(len(parameter), -1, 32)
                scales = (groups.abs().amax(2, keepdim=True) / 127).bfloat16().float()
                rounded = ((groups / scales).round() * scales).reshape(parameter.shape)
                parameter.copy_(rounded if weights == "int8" else parameter.bfloat16())
            elif parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    expected = theirs(model, prompts, getattr(config, "sliding_window", None))
    ours = DecoderModel.from_pretrained(tmp_path, head="float32", weights=weights)
    size = np.concatenate(expected).std()
    got = prefill(ours, prompts, ours.config.sliding_window)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=(1e-4 if weights == "int8" else 2e-5) * size)
    for together, alone in zip(got, decode(ours, prompts, ours.config.sliding_window), strict=True):
        np.testing.assert_array_equal(together, alone)
