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
