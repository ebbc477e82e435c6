"""PagedCache in transformers' generate: the tokens of its own caches, on tiny random models in float32."""

import copy
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import FAMILIES, TINY, model_of  # noqa: E402

from paged_kv import ArgumentError, OutOfPages  # noqa: E402
from paged_kv.integrations.transformers import PagedCache  # noqa: E402
from paged_kv.models.model_files import ModelFiles  # noqa: E402
from paged_kv.models.tensor_file import write_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
transformers.logging.set_verbosity_error()

#: The cache's name, which 5.24 changed.
KEY = "cache" if "cache" in transformers.LlamaForCausalLM.forward.__annotations__ else "past_key_values"
#: Families whose windows count padding between turns in transformers; ours are those without padding.
COUNTS_PADDING = ("mistral", "qwen2", "gemma3n", "gpt-oss")
HOW = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """(family, transformers' model, the same for ours)"""
    theirs, ours = model_of(request.param), model_of(request.param)
    theirs.set_attn_implementation(FAMILIES[request.param][2])
    return request.param, theirs, ours


@pytest.fixture(scope="module")
def llama():
    return model_of("llama"), model_of("llama")


def new_cache(model, **options):
    return PagedCache.for_model(model, **({"memory": "24MiB", "page_size": 16} | options))


def ragged(*lengths, seed=1):
    """Inputs with padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(lengths):
        ids[row, -count:] = torch.randint(3, 199, (count,), generator=generator)
        mask[row, -count:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, inputs, cache=None, **how):
    torch.manual_seed(5)
    named = HOW | how | ({} if cache is None else {KEY: cache})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**inputs, **named)


REPEATED = ragged(12)["input_ids"].repeat(1, 4)
CASES = {
    "greedy": (ragged(37), {}),
    "ragged": (ragged(45, 9, 30, 1), {}),
    "a prompt in parts": (ragged(45, 9, 30, 1), {"prefill_chunk_size": 16}),
    "beams": (ragged(20, 7), {"num_beams": 3}),
    "beams, 2 returned": (ragged(20, 7), {"num_beams": 4, "num_return_sequences": 2}),
    "sampling, 3 returned": (ragged(37), {"do_sample": True, "num_return_sequences": 3}),
    "prompt look-up": (
        {"input_ids": REPEATED, "attention_mask": torch.ones_like(REPEATED)},
        {"prompt_lookup_num_tokens": 4},
    ),
}


def hold(cache):
    """Nothing is left open, and the pools are sound."""
    for pool in cache._pools:
        assert pool.step is None
        pool.cache.check()


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_same_tokens(models, case):
    _, theirs, ours = models
    inputs, how = CASES[case]
    cache = new_cache(ours)
    expected = generated(theirs, inputs, **how)
    assert torch.equal(generated(ours, inputs, cache, **how), expected)
    hold(cache)
    cache.reset()  # the same prompts again begin with what the pools have of them
    assert torch.equal(generated(ours, inputs, cache, **how), expected)
    hold(cache)


def test_another_model_assists(models):
    _, theirs, ours = models
    assistant = model_of("llama")
    for one in (assistant, theirs):
        cache = new_cache(ours)
        expected = generated(theirs, ragged(37), assistant_model=assistant)
        assert torch.equal(generated(ours, ragged(37), cache, assistant_model=one), expected)
        hold(cache)


def test_a_copy_of_a_prompts_cache_goes_on(models):
    _, theirs, ours = models

    def continued(model, cache):
        prompt, found = ragged(33, seed=3), []
        with torch.no_grad():
            cache = model(**prompt, **{KEY: cache})[KEY]
        for count in (5, 11):
            more = ragged(count, seed=count)["input_ids"]
            ids = torch.cat([prompt["input_ids"], more], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found.append(generated(model, inputs, copy.deepcopy(cache)))
        return found

    own = transformers.DynamicCache(config=theirs.config)
    for got, expected in zip(continued(ours, new_cache(ours)), continued(theirs, own), strict=True):
        assert torch.equal(got, expected)


def test_a_second_turn_with_padding_between(models):
    """Families whose windows count padding are held to the conversation without it."""
    family, theirs, ours = models

    def turns(model, cache, rows):
        first, second = ragged(18, 6, seed=8), ragged(10, 4, seed=9)
        first, second = ({name: x[rows] for name, x in part.items()} for part in (first, second))
        out = generated(model, first, cache, max_new_tokens=6)
        seen = cache.get_seq_length()
        ids = torch.cat([out[:, :seen], second["input_ids"]], 1)
        ones = torch.ones(len(ids), seen - 18, dtype=torch.long)
        mask = torch.cat([first["attention_mask"], ones, second["attention_mask"]], 1)
        if family in COUNTS_PADDING and model is theirs:  # one row, without its padding
            ids, mask = ids[mask.bool()][None], mask[mask.bool()][None]
            cache = transformers.DynamicCache(config=theirs.config)
        return generated(model, {"input_ids": ids, "attention_mask": mask}, cache, max_new_tokens=10)[:, -10:]

    got = turns(ours, new_cache(ours), [0, 1])
    if family in COUNTS_PADDING:
        expected = torch.cat(
            [turns(theirs, transformers.DynamicCache(config=theirs.config), [row]) for row in (0, 1)]
        )
    else:
        expected = turns(theirs, transformers.DynamicCache(config=theirs.config), [0, 1])
    assert torch.equal(got, expected)


def test_columns_that_are_cropped_are_computed_again(models):
    _, theirs, ours = models

    def cropped(model, cache):
        ids = ragged(37)["input_ids"]
        with torch.no_grad():
            if hasattr(cache, "activate_past_recording"):
                cache.activate_past_recording()
            cache = model(ids, **{KEY: cache})[KEY]
            cache.crop(-5)
            return model(ids[:, -5:], **{KEY: cache}).logits.argmax(-1)

    own = transformers.DynamicCache(config=theirs.config)
    assert torch.equal(cropped(ours, new_cache(ours)), cropped(theirs, own))


# ---- prefixes


def test_a_prompt_begins_with_what_the_pools_have_of_it(llama):
    theirs, ours = llama
    cache = new_cache(ours)
    shared = ragged(100, seed=4)["input_ids"]
    for tail, found in ((7, 0), (9, 100), (3, 100)):
        ids = torch.cat([shared, ragged(tail, seed=tail)["input_ids"]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        before = cache.stats()[0].num_hit_tokens
        assert torch.equal(generated(ours, inputs, cache), generated(theirs, inputs))
        assert cache.stats()[0].num_hit_tokens - before == found
        cache.reset()
    salted = new_cache(ours, salt=b"another")
    generated(ours, inputs, salted)
    assert salted.stats()[0].num_hit_tokens == 0


def test_rows_begin_at_the_column_that_all_of_them_have(llama):
    theirs, ours = llama
    cache = new_cache(ours)
    inputs = ragged(60, 45, 30, seed=6)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours(**inputs, position_ids=places, **{KEY: cache})
    cache.reset()
    changed = inputs["input_ids"].clone()
    changed[1, 40:] = 7  # of 15 columns of padding and 45 tokens
    assert cache.start(changed, inputs["attention_mask"]) == 40
    assert [len(seq) for seq in cache._pools[0].seqs] == [40, 25, 10]
    cache.reset()
    inputs["input_ids"] = changed
    assert torch.equal(generated(ours, inputs, cache), generated(theirs, inputs))
    hold(cache)
    with pytest.raises(ArgumentError, match="reset"):
        cache.start(changed)
    cache.reset()
    between = torch.ones_like(changed)
    between[0, 5] = 0
    with pytest.raises(ArgumentError, match="between tokens"):
        cache.start(changed, between)
    assert cache.start(torch.full((2, 9), 3)) == 0  # nothing is known of these


def test_keys_at_other_positions_are_not_found(llama):
    """Without position_ids, transformers counts padding: these keys are not those of the same ids alone."""
    _, ours = llama
    cache, inputs = new_cache(ours), ragged(60, 45, seed=6)
    with torch.no_grad():
        ours(**inputs, **{KEY: cache})
    cache.reset()
    assert cache.start(inputs["input_ids"][1:, 15:]) == 0
    cache.reset()
    with torch.no_grad():  # without padding, they are
        ours(inputs["input_ids"][:1], **{KEY: cache})
    cache.reset()
    assert cache.start(inputs["input_ids"][:1]) == 59


def test_all_logits_of_a_prompt_are_computed(llama):
    """A call that wants them leaves no column out, whatever the pools have."""
    theirs, ours = llama
    ids, cache = ragged(70)["input_ids"], new_cache(ours)
    with torch.no_grad():
        for _ in range(2):
            got = ours(ids, **{KEY: cache}).logits
            cache.reset()
        assert got.shape == (1, 70, 199)
        torch.testing.assert_close(got, theirs(ids).logits, rtol=1e-4, atol=1e-4)


# ---- what else a cache meets


def test_other_caches_are_as_before(llama):
    theirs, ours = llama
    inputs = ragged(45, 9)
    new_cache(ours)
    expected = generated(theirs, inputs)
    assert torch.equal(generated(ours, inputs), expected)
    assert torch.equal(generated(ours, inputs, cache_implementation="static"), expected)


def test_too_few_pages_leave_the_cache_as_it_was(llama):
    theirs, ours = llama
    cache = new_cache(ours, num_pages=6)
    with pytest.raises(OutOfPages):
        generated(ours, ragged(45, 30), cache)
    cache.reset()
    hold(cache)
    assert torch.equal(generated(ours, ragged(9), cache), generated(theirs, ragged(9)))


def test_a_pass_that_raises_is_undone(llama):
    theirs, ours = llama
    cache, inputs = new_cache(ours), ragged(19)

    def fail(*_):
        raise ZeroDivisionError

    hook = ours.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generated(ours, inputs, cache)
    hook.remove()
    assert torch.equal(generated(ours, inputs, cache), generated(theirs, inputs))
    hold(cache)


def test_inputs_of_embeddings_are_taken(llama):
    theirs, ours = llama
    ids = ragged(21)["input_ids"]
    embedded = ours.get_input_embeddings()(ids).detach()
    inputs = {"inputs_embeds": embedded, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generated(ours, inputs, new_cache(ours)), generated(theirs, inputs))


def test_rows_of_a_prompts_cache_are_repeated(llama):
    """A cache of one row, for a batch of three."""
    theirs, ours = llama
    prompt, cache = ragged(50), new_cache(ours)
    with torch.no_grad():
        ours(**prompt, **{KEY: cache})
        more = ragged(4, 4, 4, seed=2)["input_ids"]
        got = ours(more, **{KEY: cache}).logits
        whole = torch.cat([prompt["input_ids"].repeat(3, 1), more], 1)
        torch.testing.assert_close(got, theirs(whole).logits[:, -4:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="holds 3 rows, the batch has 2"), torch.no_grad():
        ours(ragged(4, 4)["input_ids"], **{KEY: cache})


def test_rows_are_selected(llama):
    theirs, ours = llama
    inputs, cache = ragged(30, 12, 25), new_cache(ours)
    with torch.no_grad():
        ours(**inputs, **{KEY: cache})
        cache.batch_select_indices(torch.tensor([2, 0, 2]))
        more = ragged(3, 3, 3, seed=2)["input_ids"]
        mask = torch.cat([inputs["attention_mask"][[2, 0, 2]], torch.ones(3, 3, dtype=torch.long)], 1)
        got = ours(more, attention_mask=mask, **{KEY: cache}).logits
        ids = torch.cat([inputs["input_ids"][[2, 0, 2]], more], 1)
        expected = theirs(ids, attention_mask=mask).logits[:, -3:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    hold(cache)


def test_rows_hold_their_budget_and_go_on(llama):
    inputs = ragged(150, 100)
    for policy in ("attention", "window"):
        cache = new_cache(llama[1], eviction=policy, budget_tokens=112, max_step_tokens=256)
        assert generated(llama[1], inputs, cache).shape == (2, 190)
        assert all(len(seq.held_positions) <= 112 for pool in cache._pools for seq in pool.seqs)
        hold(cache)
    # A budget that nothing exceeds changes nothing.
    cache = new_cache(llama[1], eviction="attention", budget_tokens=400)
    assert (generated(llama[1], inputs, cache) == generated(llama[0], inputs)).all()


def test_attention_of_another_kind_is_named():
    config = transformers.Lfm2Config(**TINY | {"layer_types": ["full_attention", "conv"] * 2})
    with pytest.raises(ArgumentError, match="layer 1 of Lfm2ForCausalLM is"):
        PagedCache.for_model(transformers.AutoModelForCausalLM.from_config(config))
    model = model_of("deepseek-v3")
    model.config.kv_lora_rank = 36
    with pytest.raises(ArgumentError, match="latents of 36 with 16 rotated have no shape"):
        PagedCache.for_model(model)
    with pytest.raises(ArgumentError, match="latent keys are read whole"):
        PagedCache.for_model(model_of("deepseek-v3"), eviction="window", budget_tokens=512)
    with pytest.raises(ArgumentError, match="dtype"):
        PagedCache.for_model(model_of("llama"), dtype=torch.float64)


def test_gradients_are_refused(llama):
    _, ours = llama
    with pytest.raises(ArgumentError, match=r"grad"):
        ours(ragged(5)["input_ids"], **{KEY: new_cache(ours)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_pages_of_fewer_bits_are_near(llama, dtype):
    theirs, ours = llama
    ids, cache = ragged(80)["input_ids"], new_cache(ours, dtype=dtype)
    with torch.no_grad():
        got, expected = ours(ids, **{KEY: cache}).logits, theirs(ids).logits
    assert (got - expected).std() <= 0.02 * expected.std()


def test_the_lines_of_the_readme_generate(llama):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = next(
        part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "PagedCache" in part
    )
    if KEY != "cache":
        example = example.replace("cache=cache", f"{KEY}=cache")
    theirs, ours = llama
    names = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    got = names["generated"](ours, ragged(45, 9) | HOW)
    assert torch.equal(got, generated(theirs, ragged(45, 9)))


def test_a_real_model_answers_as_with_its_own_cache(tmp_path):
    """SmolLM2, from the weights that its GGUF file holds."""
    pytest.importorskip("gguf")
    try:
        files = ModelFiles.open("smollm2")
    except ArgumentError as error:
        pytest.skip(str(error))
    fields = files.fields.plain() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_tensors(tmp_path / "model.safetensors", dict(files.checkpoint.tensors))
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, ours = (load(tmp_path, dtype=torch.float32).eval() for _ in range(2))
    cache = new_cache(ours, memory="256MiB")
    reference = np.load(Path(__file__).parents[1] / "real_model" / "reference.npz")
    for i in range(3):
        ids = torch.from_numpy(reference[f"prompt_{i}"].astype(np.int64))[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache.reset()
        got = generated(ours, inputs, cache, max_new_tokens=24)
        assert torch.equal(got, generated(theirs, inputs, max_new_tokens=24))
        assert got[0, ids.shape[1] :].tolist() == reference[f"answer_{i}"][:24].tolist()
    # The questions begin with the same words of the system.
    assert cache.stats()[0].num_hit_tokens > 30
