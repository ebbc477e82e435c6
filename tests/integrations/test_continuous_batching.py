"""transformers' generate_batch on its own pages, attended to in place: the tokens of generate, one by one."""

import os

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("psutil")

from tiny_models import FAMILIES, model_of  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import continuous_api  # noqa: E402

from paged_kv import ArgumentError  # noqa: E402
from paged_kv.integrations import continuous_batching  # noqa: E402
from paged_kv.integrations.continuous_batching import InPlaceCache, install  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
NUM_NEW = 16


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 199, (count,), generator=generator).tolist() for count in lengths]


def in_a_batch(model, prompts):
    """Pages of 16 and 40 tokens a step: prompts come in parts, beside requests that decode."""
    config = ContinuousBatchingConfig(page_size=16, num_blocks=60, max_batch_tokens=40)
    how = transformers.GenerationConfig(
        max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    found = model.generate_batch(
        prompts, generation_config=how, continuous_batching_config=config, progress_bar=False
    )
    by_prompt = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def one_by_one(model, prompts):
    how = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist() for ids in prompts]


#: transformers' own pages take no latent keys.
IN_A_BATCH = [family for family in FAMILIES if family not in ("deepseek-v3", "minicpm3")]


@pytest.mark.parametrize("family", IN_A_BATCH)
def test_a_batch_gives_the_tokens_of_each_alone(family):
    model, prompts = model_of(family), prompts_of(45, 9, 30, 61, 2)
    model.set_attn_implementation(FAMILIES[family][2])
    expected, before = one_by_one(model, prompts), model.config._attn_implementation
    with install(model):
        assert in_a_batch(model, prompts) == expected
    assert model.config._attn_implementation == before
    assert one_by_one(model, prompts[:1]) == expected[:1]


def test_nothing_is_gathered_of_layers_over_all_tokens(monkeypatch):
    model, prompts = model_of("llama"), prompts_of(45, 9)
    expected = one_by_one(model, prompts)

    def fail(*_):
        raise AssertionError("keys were gathered")

    with install(model):
        assert continuous_api.PagedAttentionCache is InPlaceCache
        monkeypatch.setattr(continuous_batching.PagedAttentionCache, "update", fail)
        assert in_a_batch(model, prompts) == expected


def test_models_that_are_not_installed_are_as_before():
    model, prompts = model_of("qwen3"), prompts_of(30, 7)
    expected = one_by_one(model, prompts)
    with install(model_of("llama")):
        assert in_a_batch(model, prompts) == expected


def test_every_model_may_be_installed():
    model, other = model_of("llama"), model_of("qwen3")
    prompts = prompts_of(30, 7)
    expected = [one_by_one(one, prompts) for one in (model, other)]
    begin = continuous_api.ContinuousMixin.init_continuous_batching
    with install():
        assert [in_a_batch(one, prompts) for one in (model, other)] == expected
        assert model.config._attn_implementation == continuous_batching.NAME
    assert continuous_api.ContinuousMixin.init_continuous_batching is begin


def test_a_version_that_has_moved_its_pages_gathers(monkeypatch):
    monkeypatch.setattr(continuous_api, "PagedAttentionCache", continuous_batching.PagedAttentionCache)
    monkeypatch.setattr(continuous_batching, "ALLOCATOR_PARTS", ("nothing of this name",))
    model, prompts = model_of("llama"), prompts_of(45, 9)
    expected = one_by_one(model, prompts)
    with pytest.warns(UserWarning, match="keeps its pages in another way"), install(model):
        assert continuous_api.PagedAttentionCache is continuous_batching.PagedAttentionCache
        assert in_a_batch(model, prompts) == expected


def test_generate_of_an_installed_model_is_refused():
    model = model_of("llama")
    with install(model), pytest.raises(ArgumentError, match="installed for generate_batch"):
        one_by_one(model, prompts_of(5))
