"""torch tensors wherever arrays are, without a copy; and torch's own attention gives the same."""

import numpy as np
import pytest
from conftest import make_cache, rows
from support import tolerances

import paged_kv
from paged_kv import ArgumentError

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def tensors(rng, *shapes, dtype=torch.float32):
    return [torch.from_numpy(rows(rng, *shape)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 1), (2, 3)])
def test_scaled_dot_product_attention_gives_the_same(kernel, dtype, num_kv_heads, group, rng):
    heads = num_kv_heads * group
    q, k, v = tensors(rng, (300, heads, 64), (300, num_kv_heads, 64), (300, num_kv_heads, 64), dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    shape = {"num_kv_heads": num_kv_heads, "head_dim": 64, "dtype": name, "num_pages": 20}
    with make_cache(num_layers=1, **shape) as cache:
        seq = cache.sequence()
        with cache.step([seq], [300]) as step:
            out, lse = step.attend(0, q, k, v, return_lse=True)
    assert out.dtype == dtype and isinstance(lse, torch.Tensor) and lse.dtype == torch.float32
    wide = [x.double().transpose(0, 1)[None] for x in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    expected = expected[0].transpose(0, 1)
    atol, _ = tolerances(q.double().numpy(), k.double().numpy(), v.double().numpy(), dtype=name)
    np.testing.assert_allclose(out.double().numpy(), expected.numpy(), rtol=0, atol=atol)


def scored(q, k, v, score_mod, sinks=None):
    """Attention as flex_attention defines it: score_mod(score, head, q_idx, kv_idx) on each causal score."""
    group, shift = q.shape[1] // k.shape[1], len(k) - len(q)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    head = torch.arange(q.shape[1])[:, None, None]
    q_idx, kv_idx = torch.arange(len(q))[None, :, None] + shift, torch.arange(len(k))[None, None]
    scores = torch.where(kv_idx <= q_idx, score_mod(scores, head, q_idx, kv_idx), -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, len(q), 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("option", ["soft cap", "alibi", "both", "sinks"])
def test_score_mods_of_flex_attention_give_the_same(kernel, option, rng):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    mods = {
        "soft cap": lambda s, h, i, j: 2 * torch.tanh(s / 2),
        "alibi": lambda s, h, i, j: s + slopes.double()[h] * (j - i),
        "both": lambda s, h, i, j: 2 * torch.tanh(s / 2) + slopes.double()[h] * (j - i),
        "sinks": lambda s, h, i, j: s,
    }
    options = {"logits_soft_cap": 2.0} if option in ("soft cap", "both") else {}
    options |= {"alibi_slopes": slopes} if option in ("alibi", "both") else {}
    options |= {"sinks": slopes.to(torch.bfloat16)} if option == "sinks" else {}
    q, k, v = tensors(rng, (50, 4, 64), (200, 2, 64), (200, 2, 64))
    with make_cache(num_layers=1, head_dim=64, num_pages=20) as cache:
        seq = cache.sequence()
        with cache.step([seq], [150]) as step:
            step.write(0, k[:150], v[:150])
        with cache.step([seq], [50]) as step:
            out = step.attend(0, q, k[150:], v[150:], **options)
    expected = scored(q.double(), k.double(), v.double(), mods[option], options.get("sinks"))
    atol, _ = tolerances(q.numpy(), k.numpy(), v.numpy(), alibi_slopes=[0.5])
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=0, atol=atol)


def test_slices_of_a_fused_projection_are_taken_where_they_are(rng):
    fused, plain = tensors(rng, (40, 8, 32), (40, 4, 32))
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [40])
        expected = step.attend(0, q.contiguous(), k.contiguous(), v.contiguous())
        assert torch.equal(step.attend(0, q, k, v), expected)
        result = step.attend(0, q, k, v, out=plain)
        assert result is plain and torch.equal(plain, expected)
        with pytest.raises(ArgumentError, match="overlaps k"):
            step.attend(0, q, k, v, out=fused[:, 4:])
        assert step.attend(0, q, k, v, out=q) is q
        assert torch.equal(q, expected)


def test_the_bits_of_tensors_are_those_of_arrays(kernel, rng):
    q, k, v = (rows(rng, 40, heads, 32) for heads in (4, 2, 2))
    with make_cache(num_layers=1, dtype="bfloat16") as cache:
        step = cache.step([cache.sequence()], [40])
        expected = step.attend(0, q, k, v)
        got = step.attend(0, *(torch.from_numpy(x) for x in (q, k, v)))
        np.testing.assert_array_equal(got.numpy(), expected)
        mixed = step.attend(0, q, torch.from_numpy(k), v)
        np.testing.assert_array_equal(mixed, expected)


def test_a_result_is_of_the_kind_of_q_whatever_took_the_last_one(rng):
    q, k, v = (rows(rng, 3, heads, 32) for heads in (4, 2, 2))
    tensor = torch.from_numpy(q.copy())
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [3])
        expected = step.attend(0, q, k, v)
        for given, out in ((q, torch.empty(3, 4, 32)), (tensor, np.empty_like(q))):
            for _ in range(2):
                assert step.attend(0, given, k, v, out=out) is out
                result = step.attend(0, given, k, v)
                assert type(result) is type(given)
                np.testing.assert_array_equal(np.asarray(result), expected)
                np.testing.assert_array_equal(np.asarray(out), expected)


def test_tensors_that_cannot_be_taken_are_refused(rng):
    q, k, v = tensors(rng, (3, 4, 32), (3, 2, 32), (3, 2, 32))
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [3])
        for bad, reason in (
            (q.clone().requires_grad_(), "requires grad"),
            (q.double(), "is torch.float64"),
            (q.to(torch.complex64), "is torch.complex64"),
            (q.int(), "is torch.int32"),
            (q.to_sparse(), "strided CPU tensor"),
            (q.to("meta"), "strided CPU tensor"),
            (q[:2], "shape"),
            (q.transpose(1, 2), "gaps|shape"),
        ):
            with pytest.raises(ArgumentError, match=f"^q .*({reason})"):
                step.attend(0, bad, k, v)
        with pytest.raises(ArgumentError, match="several elements in one place"):
            step.attend(0, q, k, v, out=torch.empty(1, 4, 32).expand(3, 4, 32))
        with torch.no_grad():
            step.attend(0, q.clone().requires_grad_(), k, v)
        step.commit()


def test_a_dtype_of_torch_names_what_pages_store():
    with make_cache(dtype=torch.bfloat16) as cache:
        assert cache.stats().pool_bytes == 16 * 2 * 2 * 2 * 16 * 32 * 2
    with make_cache(dtype=torch.int8) as cache:
        assert set(cache.stats().formats) == {"int8"}
    with pytest.raises(ArgumentError, match="dtype"):
        make_cache(dtype=torch.float64)


def test_foreign_pages_and_indices_may_be_tensors(rng):
    q, k, v = tensors(rng, (2, 4, 32), (5, 2, 16, 32), (5, 2, 16, 32), dtype=torch.bfloat16)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    lists = {"qo_indptr": [0, 1, 2], "kv_indptr": [0, 3, 5], "kv_indices": [4, 0, 2, 1, 3]}
    lists["kv_last_page_len"] = [7, 16]
    given = {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()}
    out = paged_kv.paged_attention(q, k, v, **given)
    wide = paged_kv.paged_attention(q.float().numpy(), k.float().numpy(), v.float().numpy(), **lists)
    assert out.dtype == torch.bfloat16
    # a kernel that multiplies pairs of bfloat16 rounds in another order than one that widens them first
    torch.testing.assert_close(out.float(), torch.from_numpy(wide), rtol=2**-7, atol=2**-7)


def test_parts_may_be_tensors(rng):
    outputs, lses = tensors(rng, (2, 5, 3, 16), (2, 5, 3))
    out, lse = paged_kv.merge_states(outputs.to(torch.bfloat16), lses)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(lse, lses.logsumexp(0))
    weights = (lses - lses.logsumexp(0)).exp()[..., None]
    expected = (weights * outputs.to(torch.bfloat16).float()).sum(0)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


def test_tensors_that_look_like_the_last_ones_are_validated_for_what_may_differ(rng):
    with make_cache() as cache:
        step = cache.step([cache.sequence()], [1])
        q, k = torch.from_numpy(rows(rng, 1, 2, 32)), torch.from_numpy(rows(rng, 1, 2, 32))
        wide = torch.from_numpy(rows(rng, 1, 6, 32))
        for _ in range(3):
            for v in (k, torch.from_numpy(rows(rng, 1, 2, 32)), wide[:, 1:3], wide[:, 3:5]):
                # One token: its value, whatever the scores are.
                assert torch.equal(step.attend(0, q, k, v), v)
                assert torch.equal(step.attend(0, q, k, v, out=torch.empty_like(q)), v)
        with pytest.raises(ArgumentError, match="requires grad"):
            step.attend(0, q.clone().requires_grad_(), k, k)
        with pytest.raises(ArgumentError, match="strided CPU tensor"):
            step.attend(0, q, k.to_sparse(), k)
        with pytest.raises(ArgumentError, match="overlaps"):
            step.attend(0, wide[:, 0:2], k, k, out=wide[:, 1:3])
        step.rollback()


# ---- tensors whose pointer is not their value


class Wrapper(torch.Tensor):
    """As quantised weights are: a shape and a dtype, and the values somewhere else."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def emptied(tensor, num_bytes=0):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


def shrunk_below(tensor):
    """Its storage ends in the middle of the last value's row."""
    storage = tensor.untyped_storage()
    storage.resize_((tensor.storage_offset() + tensor.numel() - 1) * tensor.element_size())
    return tensor


def fake(tensor):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


#: pytorch #116683, PR #122309, PR #172127, PR #56058, PR #61925.
NOT_IN_MEMORY = {
    "its storage was freed": emptied,
    "its storage was shrunk": lambda tensor: emptied(tensor, 64),
    "a slice of one that was shrunk": lambda tensor: shrunk_below(
        torch.cat([tensor, tensor])[1 : 1 + len(tensor)]
    ),
    "a wrapper": Wrapper,
    "a fake": fake,
    "zeros without memory": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "negated in a flag": lambda tensor: torch._neg_view(tensor),
    "the imaginary part of a conjugate": lambda tensor: torch.complex(tensor, tensor).conj().imag,
}


@pytest.mark.parametrize("spoil", NOT_IN_MEMORY.values(), ids=NOT_IN_MEMORY)
@pytest.mark.parametrize("place", ["q", "k", "v", "out"])
@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_tensor_whose_memory_is_not_its_value_is_refused(spoil, place, is_repeated, rng):
    arrays = dict(zip(("q", "k", "v", "out"), tensors(rng, *[(4, 2, 32)] * 4), strict=True))
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [4])
        for _ in range(2 * is_repeated):  # from the second on, only addresses are set
            step.attend(0, arrays["q"], arrays["k"], arrays["v"], out=arrays["out"])
            step.write(0, arrays["k"], arrays["v"])
        spoilt = arrays | {place: spoil(arrays[place])}
        with pytest.raises(ArgumentError, match=place):
            step.attend(0, spoilt["q"], spoilt["k"], spoilt["v"], out=spoilt["out"])
        if place in ("k", "v"):
            with pytest.raises(ArgumentError, match=place):
                step.write(0, spoilt["k"], spoilt["v"])
        step.rollback()


@pytest.mark.parametrize("spoil", NOT_IN_MEMORY.values(), ids=NOT_IN_MEMORY)
@pytest.mark.parametrize("place", ["q", "k_pages", "v_pages"])
def test_foreign_pages_whose_memory_is_not_their_value_are_refused(spoil, place, rng):
    given = dict(
        zip(("q", "k_pages", "v_pages"), tensors(rng, (1, 2, 32), *[(2, 16, 2, 32)] * 2), strict=True)
    )
    given[place] = spoil(given[place])
    lists = {"qo_indptr": [0, 1], "kv_indptr": [0, 2], "kv_indices": [0, 1], "kv_last_page_len": [3]}
    with pytest.raises(ArgumentError, match=place):
        paged_kv.paged_attention(**given, **lists)


@pytest.mark.parametrize("spoil", [emptied, Wrapper, fake], ids=["freed", "a wrapper", "a fake"])
def test_lists_and_ids_without_memory_are_refused(spoil, rng):
    q, k, v = tensors(rng, (1, 2, 32), (2, 16, 2, 32), (2, 16, 2, 32))
    lists = {"qo_indptr": [0, 1], "kv_indptr": [0, 2], "kv_indices": [0, 1], "kv_last_page_len": [3]}
    for name, values in lists.items():
        with pytest.raises(ArgumentError, match=name):
            paged_kv.paged_attention(q, k, v, **lists | {name: spoil(torch.tensor(values))})
    for name in ("sinks", "alibi_slopes"):
        with pytest.raises(ArgumentError, match=name):
            paged_kv.paged_attention(q, k, v, **lists, **{name: spoil(torch.zeros(2))})
    outputs, lses = tensors(rng, (2, 5, 3, 16), (2, 5, 3))
    with pytest.raises(ArgumentError, match="lses"):
        paged_kv.merge_states(list(outputs), [lses[0], spoil(lses[1])])
    with pytest.raises(ArgumentError, match="outputs"):
        paged_kv.merge_states([outputs[0], spoil(outputs[1])], list(lses))
    with make_cache() as cache:
        seq = cache.sequence()
        for new in ([spoil(torch.tensor([1, 2]))], spoil(torch.tensor([1]))):
            with pytest.raises(ArgumentError, match="new"):
                cache.step([seq], new)


def test_values_with_a_flag_are_taken_where_they_are_copied_anyway(rng):
    q, k, v = tensors(rng, (1, 2, 32), (2, 16, 2, 32), (2, 16, 2, 32))
    lists = {"qo_indptr": [0, 1], "kv_indptr": [0, 2], "kv_indices": [0, 1], "kv_last_page_len": [3]}
    sinks = torch.tensor([1.0, -2.0])
    expected = paged_kv.paged_attention(q, k, v, **lists, sinks=-sinks)
    assert torch.equal(paged_kv.paged_attention(q, k, v, **lists, sinks=torch._neg_view(sinks)), expected)


def test_counts_and_ids_may_be_tensors():
    with make_cache() as cache:
        seqs = [cache.sequence() for _ in range(2)]
        cache.step(seqs, torch.tensor([3, 2])).rollback()
        cache.step(seqs, [torch.tensor([5, 6, 7]), torch.tensor([8], dtype=torch.int32)]).rollback()
        with pytest.raises(ArgumentError, match="outside"):
            cache.step(seqs, [torch.tensor([5, -6]), 1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at its import
@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_tangent_is_refused_and_not_lost(is_repeated, rng):
    from torch.autograd import forward_ad

    q, k, v = tensors(rng, *[(4, 2, 32)] * 3)
    with make_cache(num_layers=1) as cache, forward_ad.dual_level():
        step = cache.step([cache.sequence()], [4])
        for _ in range(2 * is_repeated):
            step.attend(0, q, k, v)
        for place in range(3):
            given = [q, k, v]
            given[place] = forward_ad.make_dual(given[place], torch.ones_like(q))
            with pytest.raises(ArgumentError, match="tangent"):
                step.attend(0, *given)
        step.rollback()


def test_a_tensor_of_vmap_is_refused(rng):
    q, k, v = tensors(rng, (2, 4, 2, 32), *[(4, 2, 32)] * 2)
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [4])
        with pytest.raises(ArgumentError, match="q has no memory"):
            torch.func.vmap(lambda q: step.attend(0, q, k, v))(q)
        step.rollback()


def test_plain_subclasses_and_parameters_are_taken(rng):
    q, k, v = tensors(rng, *[(4, 2, 32)] * 3)
    with make_cache(num_layers=1) as cache:
        step = cache.step([cache.sequence()], [4])
        expected = step.attend(0, q, k, v)
        Plain = type("Plain", (torch.Tensor,), {})
        for given in (q.as_subclass(Plain), torch.nn.Parameter(q, requires_grad=False)):
            assert torch.equal(step.attend(0, given, k, v).as_subclass(torch.Tensor), expected)
        step.rollback()
