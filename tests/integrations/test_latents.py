"""Latents as heads that pages can hold, and gathered from them."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_kv import ArgumentError  # noqa: E402
from paged_kv.integrations.latents import latent_shape, write_and_gather  # noqa: E402
from paged_kv.integrations.layer_pools import open_steps, pools_of  # noqa: E402


@pytest.mark.parametrize(
    ("rank", "rope", "shape"),
    [(512, 64, (2, 256, 32)), (256, 32, (1, 256, 32)), (32, 16, (1, 32, 16)), (1024, 64, (4, 256, 16))],
)
def test_latents_are_the_fewest_heads_that_pages_can_hold(rank, rope, shape):
    assert latent_shape(rank, rope) == shape


@pytest.mark.parametrize(("rank", "rope"), [(512, 8), (36, 16), (520, 64), (7, 7)])
def test_latents_of_no_such_shape_are_refused(rank, rope):
    with pytest.raises(ArgumentError, match=f"latents of {rank} with {rope} rotated"):
        latent_shape(rank, rope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_comes_back_with_what_is_new(dtype):
    torch.manual_seed(0)
    shape = latent_shape(512, 64)
    pools, places = pools_of([shape, shape], memory="1GiB", num_pages=10, dtype=str(dtype)[6:], page_size=16)
    (pool,), written = pools, None
    assert places == [(0, 0), (0, 1)]
    pool.seqs = [pool.cache.sequence() for _ in range(3)]
    seen = 0
    for columns in (20, 1, 7):
        open_steps(pools, [columns] * 3)
        new = [
            (torch.randn(3, 1, columns, dim) * (1 + layer)).to(dtype) for layer in (0, 1) for dim in (512, 64)
        ]
        written = new if written is None else [torch.cat(pair, 2) for pair in zip(written, new, strict=True)]
        for layer in (0, 1):
            found = write_and_gather(pool, layer, *new[2 * layer : 2 * layer + 2], seen)
            assert torch.equal(found[0], written[2 * layer])
            assert torch.equal(found[1], written[2 * layer + 1])
        pool.step.commit()
        seen += columns
    pool.cache.check()
