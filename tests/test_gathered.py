import numpy as np
import pytest
from conftest import fill, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from support import STORED

from paged_kv import ArgumentError, CacheClosed, StaleSequence

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = ("float32", "float16", "bfloat16")


def filled_cache(rng, lengths, **options):
    cache = make_cache(**options)
    seqs = [cache.sequence() for _ in lengths]
    for seq, length in zip(seqs, lengths, strict=True):
        while len(seq) < length:
            fill(cache, [seq], [min(16, length - len(seq))], rng)
    return cache, seqs


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=4),
    stored=st.sampled_from(STORED),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, 20]),
    seed=st.integers(0, 2**32),
)
def test_each_sequence_is_what_it_holds_and_zeros_follow(lengths, stored, dtype, window, seed):
    rng = np.random.default_rng(seed)
    options = {"head_dim_v": 16, "dtype": stored, "window": window, "max_seq_len": 100, "max_step_tokens": 16}
    cache, seqs = filled_cache(rng, lengths, **options)
    k, v, found = cache.gather(seqs, 1, dtype=dtype)
    held = [len(seq.held_positions) for seq in seqs]
    assert found.tolist() == held and found.dtype == np.int32
    assert k.shape == (len(lengths), max(held, default=0), 2, 32)
    assert v.shape == (*k.shape[:3], 16)
    assert k.dtype == v.dtype == np.dtype(dtype)
    for i, seq in enumerate(seqs):
        for side, alone in zip((k, v), seq.gather(1), strict=True):
            np.testing.assert_array_equal(side[i, : held[i]], alone.astype(dtype))
            assert not side[i, held[i] :].any()
    cache.check()


def test_out_may_be_longer_strided_and_of_another_order(rng):
    cache, seqs = filled_cache(rng, [5, 0, 33])
    k, v, _ = cache.gather(seqs, 0)
    by_head = [np.full((3, 2, 40, 32), np.nan, np.float16) for _ in range(2)]
    out = tuple(side.transpose(0, 2, 1, 3) for side in by_head)
    found = cache.gather(seqs, 0, out=out)
    assert found[0] is out[0] and found[1] is out[1]
    for side, alone in zip(out, (k, v), strict=True):
        np.testing.assert_array_equal(side[:, :33], alone.astype(np.float16))
        assert not side[:, 33:].any()


def test_torch_gets_tensors(rng):
    torch = pytest.importorskip("torch")
    cache, seqs = filled_cache(rng, [5, 20])
    k, v, lengths = cache.gather(seqs, 1, dtype=torch.bfloat16)
    assert k.dtype == v.dtype == torch.bfloat16 and lengths.tolist() == [5, 20]
    torch.testing.assert_close(k[1, :20], torch.from_numpy(seqs[1].gather(1)[0]).bfloat16())
    by_head = [torch.full((2, 2, 20, 32), torch.nan) for _ in range(2)]
    cache.gather(seqs, 1, out=[side.transpose(1, 2) for side in by_head])
    torch.testing.assert_close(by_head[1][1].transpose(0, 1), torch.from_numpy(seqs[1].gather(1)[1]))


def test_what_cannot_be_is_refused(rng):
    cache, seqs = filled_cache(rng, [5, 20])
    k, v = np.empty((2, 20, 2, 32), np.float32), np.zeros((2, 20, 2, 32), np.float32)
    read_only = v.copy()
    read_only.flags.writeable = False
    for out in (
        (k, k),
        (k, k[::-1]),
        (k, v[:, :19]),
        (k, np.empty((2, 21, 2, 32), np.float32)),
        (k, v.astype(np.float64)),
        (k, read_only),
        (k, np.lib.stride_tricks.as_strided(v, strides=(0, *v.strides[1:]))),
        (k,),
        k,
        5,
    ):
        with pytest.raises(ArgumentError, match="out"):
            cache.gather(seqs, 0, out=out)
    for dtype in ("int8", "float64", np.int32):
        with pytest.raises(ArgumentError, match="dtype"):
            cache.gather(seqs, 0, dtype=dtype)
    with pytest.raises(ArgumentError, match="give one of them"):
        cache.gather(seqs, 0, dtype="float32", out=(k, v))
    with pytest.raises(ArgumentError, match="layer"):
        cache.gather(seqs, 2)
    with pytest.raises(ArgumentError, match="seqs"):
        cache.gather([None], 0)
    with pytest.raises(StaleSequence):
        cache.gather([make_cache().sequence()], 0)
    seqs[0].free()
    with pytest.raises(StaleSequence):
        cache.gather(seqs, 0)
    cache.close()
    with pytest.raises(CacheClosed):
        cache.gather(seqs[1:], 0)
