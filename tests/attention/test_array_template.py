"""Calls whose arrays look like an earlier call's: they give what they give alone, and refuse as much."""

import threading

import ml_dtypes
import numpy as np
import pytest
from conftest import fill, make_cache, rows
from hypothesis import given
from hypothesis import strategies as st

from paged_kv import ArgumentError
from paged_kv.attention import prepared
from paged_kv.step import Step

DTYPES = [np.dtype("f4"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)]
LAYOUTS = ["dense", "columns", "rows", "backwards"]


def laid_out(array, layout):
    """The same values, in another place and with other strides."""
    count, heads, dim = array.shape
    if layout == "columns":  # of a wider array, as q, k and v are of one product
        wide = np.full((count, heads + 2, dim), -7, array.dtype)
        wide[:, 1:-1] = array
        return wide[:, 1:-1]
    if layout == "rows":
        wide = np.full((2 * count, heads, dim), -7, array.dtype)
        wide[::2] = array
        return wide[::2]
    if layout == "backwards":
        return array[::-1].copy()[::-1]
    return array.copy()


calls = st.tuples(
    st.integers(1, 3),  # tokens
    st.sampled_from([2, 4]),  # q heads
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([None, 0.25, 1.0]),  # sm_scale
    st.sampled_from(["none", "own", "q"]),  # out
    st.booleans(),  # written first, then attended to
    st.sampled_from([None, np.float32, np.float64, list]),  # sinks
    st.sampled_from([None, np.float32, list]),  # alibi_slopes
)


@given(st.lists(calls, min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_calls_that_look_alike_or_not_give_what_each_gives_alone(drawn, seed):
    rng = np.random.default_rng(seed)
    with make_cache() as cache:
        seq = cache.sequence()
        for count, num_q_heads, dtype, layout, sm_scale, out_kind, is_written, *kinds in [*drawn, *drawn]:
            seq.reset()
            q = laid_out(rows(rng, count, num_q_heads, 32).astype(dtype), layout)
            k, v = (laid_out(rows(rng, count, 2, 32).astype(dtype), layout) for _ in "kv")
            per_head = [rows(rng, num_q_heads) for _ in kinds]
            given = [
                None if kind is None else values.tolist() if kind is list else values.astype(kind)
                for kind, values in zip(kinds, per_head, strict=True)
            ]
            options = {"sm_scale": sm_scale, "sinks": given[0], "alibi_slopes": given[1]}
            outputs = []
            for each in (cache, None):
                with make_cache() as alone:
                    step = (each or alone).step([seq if each else alone.sequence()], [count])
                    given_q = laid_out(q, layout)
                    own = laid_out(np.full_like(q, np.nan), layout)
                    out = {"none": None, "own": own, "q": given_q}[out_kind]
                    kv = (k, v)
                    if is_written:
                        step.write(1, k, v)
                        kv = ()
                    result = step.attend(1, given_q, *kv, **options, out=out)
                    assert out is None or result is out
                    outputs.append(result.copy())
                    step.rollback()
            for values, one in zip(per_head, given, strict=True):  # they are as they were
                assert one is None or np.array_equal(np.asarray(one, np.float32), values)
            assert outputs[0].dtype == dtype
            np.testing.assert_array_equal(outputs[0].view(np.uint8), outputs[1].view(np.uint8))


def repeated_step(rng, num_tokens=2, **options):
    """A step that has attended once, and arrays that look like those of that call."""
    cache = make_cache()
    step = cache.step([cache.sequence()], [num_tokens])
    q, k, v = rows(rng, num_tokens, 4, 32), rows(rng, num_tokens, 2, 32), rows(rng, num_tokens, 2, 32)
    step.attend(0, q, k, v, out=np.empty_like(q), **options)
    assert step._calls["write and attend"].can_repeat
    return step, q, k, v


def test_what_is_refused_at_first_is_refused_again(rng):
    step, q, k, v = repeated_step(rng)
    out = np.empty_like(q)
    out.setflags(write=False)
    with pytest.raises(ArgumentError, match="read-only"):
        step.attend(0, q, k, v, out=out)
    step, q, k, v = repeated_step(rng)
    memory = np.empty((3, 4, 32), np.float32)
    memory[:2] = q
    with pytest.raises(ArgumentError, match="overlaps q"):
        step.attend(0, memory[:2], k, v, out=memory[1:])
    step, q, k, v = repeated_step(rng)
    memory = np.empty((2, 4, 32), np.float32)
    inside = memory.reshape(-1)[:128].reshape(2, 2, 32)
    with pytest.raises(ArgumentError, match="overlaps v"):
        step.attend(0, q, k, inside, out=memory)
    for wrong in (True, "0.5", np.nan, np.array([1.0, 2.0])):
        step, q, k, v = repeated_step(rng)
        with pytest.raises(ArgumentError, match="sm_scale"):
            step.attend(0, q, k, v, sm_scale=wrong)
    step, q, k, v = repeated_step(rng, sinks=np.zeros(4, np.float32), alibi_slopes=[0, 0, 0, 1])
    for name in ("sinks", "alibi_slopes"):
        options = {"sinks": [0.0] * 4, "alibi_slopes": [0.0] * 4}
        for wrong in ([1.0] * 3, [np.nan] * 4, [np.inf, 0, 0, 0], ["a"] * 4, 5, [[1.0]] * 4):
            with pytest.raises(ArgumentError, match=name):
                step.attend(0, q, k, v, **options | {name: wrong})
    step, q, k, v = repeated_step(rng)
    with pytest.raises(ArgumentError, match=r"k has the shape \[2, 2, 16\]"):
        step.attend(0, q, k[:, :, :16], v)
    step, q, k, v = repeated_step(rng)
    with pytest.raises(ArgumentError, match="v is float64"):
        step.attend(0, q, k, v.astype(np.float64))
    step, q, k, v = repeated_step(rng)
    with pytest.raises(ArgumentError, match="give k and v"):
        step.attend(0, q, k)


def test_rows_of_the_last_step_are_refused_in_one_of_another_length(rng):
    step, q, k, v = repeated_step(rng)
    store, seq = step._store, step._seqs[0]
    step.rollback()
    step = Step(store, [seq], [3])
    with pytest.raises(ArgumentError, match=r"k has the shape \[2, 2, 32\]"):
        step.attend(0, q, k, v)
    with pytest.raises(ArgumentError, match=r"k has the shape \[2, 2, 32\]"):
        step.write(0, k, v)


def counted(monkeypatch):
    """Counts the calls that are validated in full."""
    made = []
    usual = prepared.Attention.__init__

    def init(self, *given):
        made.append(given[1])
        usual(self, *given)

    monkeypatch.setattr(prepared.Attention, "__init__", init)
    return made


def test_two_open_steps_in_turn_are_validated_once_each(rng, monkeypatch):
    """Micro-batches: their calls do not look alike."""
    made = counted(monkeypatch)
    with make_cache(num_layers=6) as cache:
        seqs = [cache.sequence(), cache.sequence()]
        for _ in range(3):
            with cache.step([seqs[0]], [1]) as one, cache.step([seqs[1]], [2]) as two:
                for layer in range(6):
                    one.attend(layer, rows(rng, 1, 4, 32), rows(rng, 1, 2, 32), rows(rng, 1, 2, 32))
                    two.attend(layer, rows(rng, 2, 4, 32), rows(rng, 2, 2, 32), rows(rng, 2, 2, 32))
    assert made == [1, 2]


def test_scales_sharing_and_layers_without_new_rows_leave_the_prepared_calls_in_use(rng, monkeypatch):
    made = counted(monkeypatch)
    with make_cache(num_layers=6) as cache:
        seq = cache.sequence()
        fill(cache, [seq], [5], rng)
        made.clear()
        forks = seq.fork(2)
        for _ in range(2):
            with cache.step(forks, [1, 1]) as step:  # whose pages are copied before each layer's first write
                for layer in range(6):
                    q, k, v = rows(rng, 2, 4, 32), rows(rng, 2, 2, 32), rows(rng, 2, 2, 32)
                    step.attend(layer, q, k, v, sm_scale=0.1 * (layer + 1), logits_soft_cap=float(layer))
                    step.attend(layer, q)
                    if layer % 2:
                        step.attend(layer, q, k, v, return_lse=True)
    assert len(made) == 2 + 2 * 3  # one of each kind, and those that are never repeated


def test_a_scale_that_is_refused_leaves_the_one_before(rng):
    step, q, k, v = repeated_step(rng)
    expected = step.attend(0, q, k, v, sm_scale=0.5, logits_soft_cap=2.0)
    for scales in ((0.25, -1.0), (np.nan, 3.0), (True, 2.0)):
        step.attend(0, q, k, v, sm_scale=0.5, logits_soft_cap=2.0)
        with pytest.raises(ArgumentError, match=r"sm_scale|logits_soft_cap"):
            step.attend(0, q, k, v, sm_scale=scales[0], logits_soft_cap=scales[1])
        again = step.attend(0, q, k, v, sm_scale=0.5, logits_soft_cap=2.0)
        np.testing.assert_array_equal(again, expected)


def test_slices_that_lie_between_each_other_are_apart(rng):
    step, q, k, v = repeated_step(rng)
    memory = np.empty((2, 8, 32), np.float32)
    memory[:, ::2] = q
    expected = step.attend(0, q, k, v)
    for _ in range(2):
        np.testing.assert_array_equal(step.attend(0, memory[:, ::2], k, v, out=memory[:, 1::2]), expected)


def test_threads_that_repeat_calls_of_one_cache_get_their_own_results(rng):
    with make_cache() as cache:
        failures = []

        def serve(seed):
            own = np.random.default_rng(seed)
            step = cache.step([cache.sequence()], [1])
            for _ in range(300):
                q, k, v = rows(own, 1, 2, 32), rows(own, 1, 2, 32), rows(own, 1, 2, 32)
                # One token: its value, whatever the scores are.
                if not np.array_equal(step.attend(0, q, k, v), v):
                    failures.append(seed)
            step.rollback()

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
