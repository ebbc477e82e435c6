"""The reference itself, against cases that can be worked out by hand."""

import numpy as np

from paged_kv import reference


def test_one_token_gives_its_value():
    v = np.arange(8.0).reshape(1, 1, 8)
    np.testing.assert_array_equal(reference.attend(np.ones((1, 1, 8)), np.ones((1, 1, 8)), v), v)


def test_equal_scores_give_the_mean_of_what_is_seen():
    v = np.array([1.0, 3.0, 8.0]).reshape(3, 1, 1)
    out = reference.attend(np.zeros((2, 1, 1)), np.ones((3, 1, 1)), v)
    np.testing.assert_allclose(out.ravel(), [2.0, 4.0])


def test_scores_are_scaled_dot_products():
    k, v = np.array([[[0.0, 0.0]], [[2.0, 0.0]]]), np.array([[[0.0, 0.0]], [[1.0, 0.0]]])
    q = np.array([[[3.0, 7.0]]])
    weight = np.exp(6 / np.sqrt(2)) / (1 + np.exp(6 / np.sqrt(2)))
    np.testing.assert_allclose(reference.attend(q, k, v)[0, 0], [weight, 0.0])
    weight = np.exp(3.0) / (1 + np.exp(3.0))
    np.testing.assert_allclose(reference.attend(q, k, v, sm_scale=0.5)[0, 0], [weight, 0.0])


def test_a_group_of_q_heads_shares_a_kv_head():
    v = np.array([[[1.0], [2.0]]])
    out = reference.attend(np.ones((1, 4, 1)), np.ones((1, 2, 1)), v)
    np.testing.assert_array_equal(out.ravel(), [1, 1, 2, 2])


def test_a_soft_cap_bends_scores_before_alibi_is_added():
    k, v = np.array([1.0, 2.0]).reshape(2, 1, 1), np.array([0.0, 1.0]).reshape(2, 1, 1)
    options = {"sm_scale": 3.0, "logits_soft_cap": 2.0, "alibi_slopes": [0.5]}
    older, newer = 2 * np.tanh(1.5) - 0.5, 2 * np.tanh(3.0)
    out, lse = reference.attend(np.ones((1, 1, 1)), k, v, **options, return_lse=True)
    np.testing.assert_allclose(out.item(), np.exp(newer) / (np.exp(older) + np.exp(newer)))
    np.testing.assert_allclose(lse.item(), np.log(np.exp(older) + np.exp(newer)))


def test_a_sink_takes_weight_and_gives_no_value():
    v = np.full((1, 1, 1), 6.0)
    out, lse = reference.attend(np.zeros((1, 1, 1)), v, v, sinks=[np.log(2.0)], return_lse=True)
    np.testing.assert_allclose(out.item(), 2.0)
    np.testing.assert_allclose(lse.item(), np.log(3.0))


def test_a_row_that_sees_nothing_gives_nothing():
    k = np.empty((0, 1, 1))
    out, lse = reference.attend(np.ones((2, 2, 1)), k, k, causal=False, return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()
    out, lse = reference.attend(np.ones((2, 2, 1)), k, k, causal=False, sinks=[1.0, 2.0], return_lse=True)
    assert (out == 0).all() and (lse == [1.0, 2.0]).all()


def test_values_may_be_wider_than_keys_and_rows_see_all_without_causality():
    v = np.arange(6.0).reshape(2, 1, 3)
    out = reference.attend(np.zeros((1, 1, 1)), np.ones((2, 1, 1)), v)
    np.testing.assert_allclose(out[0, 0], [1.5, 2.5, 3.5])
    out = reference.attend(np.zeros((2, 1, 1)), np.ones((2, 1, 1)), v, causal=False)
    np.testing.assert_allclose(out[:, 0], [[1.5, 2.5, 3.5]] * 2)
