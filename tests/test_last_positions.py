"""The end of the longest sequence: 2**31 - 1 tokens, and everything right up to there.

Positions are int32; what is added to one of them is not.  Sequences get near the end by a shift: with a
window, a row's cells repeat, so a sequence of few tokens is turned into one of many that holds the same
pages.
"""

import numpy as np
import pytest
from conftest import fill, make_cache, rows
from support import tolerances

import paged_kv
from paged_kv import ArgumentError, SequenceTooLong

MOST = 2**31 - 1


def shifted_to(cache, seq, length, rng):
    """Fill a sequence so that it stands where one of `length` tokens does; returns its last keys
    and values.
    """
    tables = cache._store.tables
    window = tables.window
    sinks = -(-window.num_sink_tokens // cache.page_size)
    period = (tables.page_ids.shape[1] - sinks) * cache.page_size
    short = length % period + 2 * period
    written = [np.empty((0, 2, 32), np.float32)] * 2
    while len(seq) < short:
        count = min(window.max_step_tokens, short - len(seq))
        (layer,) = fill(cache, [seq], [count], rng)
        written = [np.concatenate(pair) for pair in zip(written, layer, strict=True)]
    row = tables.rows.row(seq._seq_id)
    tables.rows.seq_lens[row] = tables.rows.reserved_lens[row] = length
    tables.first_held[row] += (length - short) // cache.page_size
    return written


@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("num_sinks", [0, 3])
def test_a_windowed_sequence_is_right_up_to_its_last_token(kernel, page_size, num_sinks, rng):
    window = 40
    cache = make_cache(
        num_layers=1,
        page_size=page_size,
        num_pages=24,
        window=window,
        num_sink_tokens=num_sinks,
        max_step_tokens=70,
        num_threads=2,
    )
    seq = cache.sequence()
    length = MOST - 2 * page_size - 5
    k, v = shifted_to(cache, seq, length, rng)
    slopes = np.array([0.5, 0.25, 0.0, 1.0], np.float32)
    while length < MOST:
        count = int(min(rng.integers(1, 9), MOST - length))
        q, new_k, new_v = (rows(rng, count, heads, 32) for heads in (4, 2, 2))
        with cache.step([seq], [count]) as step:
            assert step.positions.tolist() == list(range(length, length + count))
            out, lse = step.attend(0, q, new_k, new_v, alibi_slopes=slopes, return_lse=True)
        k, v, length = np.concatenate([k, new_k]), np.concatenate([v, new_v]), length + count
        kept = min(len(k), window + count + 10)
        seen_k, seen_v = (np.concatenate([side[:num_sinks], side[-kept:]]) for side in (k, v))
        positions = np.concatenate([np.arange(num_sinks), np.arange(length - kept, length)])
        options = {"alibi_slopes": slopes, "window": window, "num_sink_tokens": num_sinks, "return_lse": True}
        expected, expected_lse = paged_kv.reference.attend(q, seen_k, seen_v, positions, **options)
        atol, lse_atol = tolerances(q, seen_k, seen_v)
        # A sink is 2**31 tokens away: its score's own rounding counts where a slope is not 0.
        np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=lse_atol)
        held = seq.held_positions
        assert held[-1] == length - 1 and len(held) == window + num_sinks
        np.testing.assert_array_equal(seq.gather(0)[0], np.concatenate([k[:num_sinks], k[-window:]]))
        cache.check()
    for count in (1, 70):
        with pytest.raises(SequenceTooLong, match=str(MOST)):
            cache.step([seq], [count])
    assert len(seq) == MOST
    seq.fork().free()
    seq.truncate(MOST - 1)
    fill(cache, [seq], [1], rng)
    cache.check()


@pytest.mark.parametrize("page_size", [1000, 1024, 2**20, MOST])
def test_lists_of_somebody_elses_pages_are_right_up_to_there(kernel, page_size, rng):
    """One page, again and again: it is at the end of 2**31 - 1 tokens as it is at its beginning."""
    k_row, v_row, q = rows(rng, 1, 1, 1, 8), rows(rng, 1, 1, 1, 8), rows(rng, 2, 2, 8)
    k, v = (np.broadcast_to(row, (1, page_size, 1, 8)) for row in (k_row, v_row))
    num_pages = -(-MOST // page_size)
    indices = np.zeros(num_pages, np.int32)
    last = MOST - (num_pages - 1) * page_size
    for back in (0, 1, 64, 65):
        if back >= last:
            break
        out = paged_kv.paged_attention(
            q,
            k,
            v,
            qo_indptr=[0, 2],
            kv_indptr=[0, num_pages],
            kv_indices=indices,
            kv_last_page_len=[last - back],
            window=100,
            num_sink_tokens=2,
        )
        # Sums of 102 weights, and of as many weighted values, each addition rounded to 2**-24 of its result.
        rtol = 2 * 102 * 2.0**-24
        np.testing.assert_allclose(out, np.broadcast_to(v_row[0, 0], out.shape), rtol=rtol, atol=0)
    if last < page_size:
        with pytest.raises(ArgumentError, match=str(MOST)):
            paged_kv.paged_attention(
                q,
                k,
                v,
                qo_indptr=[0, 2],
                kv_indptr=[0, num_pages],
                kv_indices=indices,
                kv_last_page_len=[last + 1],
                window=100,
            )
