"""torch.ops.paged_kv.attend: the step's attention, eager and in one compiled graph."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_cache, rows

torch = pytest.importorskip("torch")

from paged_kv import ArgumentError  # noqa: E402
from paged_kv.integrations.torch_op import StepOwner, number_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def inputs_of(rng, num_tokens):
    return [torch.from_numpy(rows(rng, num_tokens, heads, 32)) for heads in (4, 2, 2)]


def test_the_operator_is_the_steps_attention(rng):
    owner, seen = StepOwner(), []
    with make_cache(num_layers=2, num_kv_heads=2, head_dim=32, num_pages=9) as cache:
        seq, other = cache.sequence(), cache.sequence()
        for count in (40, 1, 1):
            q, k, v = inputs_of(rng, count)
            sinks = torch.from_numpy(rows(rng, 4))
            options = {"scale": 0.3, "soft_cap": 20.0, "window": 11, "sinks": sinks}
            with cache.step([seq], [count]) as owner.step:
                got = [torch.ops.paged_kv.attend(q, k, v, owner.number, 0, 0.2)]
                got.append(torch.ops.paged_kv.attend(q, k, v, owner.number, 1, **options))
            with cache.step([other], [count]) as step:
                expected = [step.attend(0, q, k, v, sm_scale=0.2)]
                expected.append(
                    step.attend(1, q, k, v, sm_scale=0.3, logits_soft_cap=20.0, window=11, sinks=sinks)
                )
            seen += [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(seen)


def test_torchs_own_checks_of_an_operator(rng):
    owner = StepOwner()
    with make_cache(num_layers=1, num_kv_heads=2, head_dim=32) as cache:
        owner.step = cache.step([cache.sequence()], [5])
        arguments = (*inputs_of(rng, 5), owner.number, 0, 0.2)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.paged_kv.attend, arguments, test_utils=tests)
        owner.step.rollback()


def test_a_number_without_an_owner_is_named(rng):
    q, k, v = inputs_of(rng, 3)
    number = number_of(StepOwner())  # collected at once
    with pytest.raises(ArgumentError, match=f"number {number}"):
        torch.ops.paged_kv.attend(q, k, v, number, 0, 0.2)
    owner = StepOwner()
    with pytest.raises(ArgumentError, match="no step"):
        torch.ops.paged_kv.attend(q, k, v, owner.number, 0, 0.2)


def test_the_library_itself_imports_no_torch():
    code = "import sys, paged_kv, paged_kv.serving.generate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Layer(torch.nn.Module):
    """Projections, attention over pages, and a residual."""

    def __init__(self, owner, layer):
        super().__init__()
        self.qkv, self.o = torch.nn.Linear(64, 8 * 32), torch.nn.Linear(4 * 32, 64)
        self.number, self.layer = owner.number, layer

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 8, 32).split([4, 2, 2], 1)
        out = torch.ops.paged_kv.attend(q, k, v, self.number, self.layer, 32**-0.5)
        return x + self.o(out.flatten(1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_model_is_one_graph(rng, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # other tests set it
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    torch.manual_seed(0)
    owner, graphs = StepOwner(), []
    model = torch.nn.Sequential(Layer(owner, 0), Layer(owner, 1)).eval()

    def count(graph, inputs):
        graphs.append(sum("paged_kv.attend" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with make_cache(num_layers=2, num_kv_heads=2, head_dim=32, num_pages=9) as cache, torch.no_grad():
        seqs = [cache.sequence(), cache.sequence()]
        for tokens in (40, 3, 3, 3):
            x, found = torch.from_numpy(rows(rng, tokens, 64)), []
            for seq, run in zip(seqs, (model, compiled), strict=True):
                with cache.step([seq], [tokens]) as owner.step:
                    found.append(run(x))
            np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert graphs == [2]  # one graph, for steps of any number of tokens
