"""`paged-kv bench-model` on a model that is small: its rows, its arithmetic, its refusals."""

import io
import json
import re

import numpy as np
import pytest

from paged_kv import ArgumentError
from paged_kv.commands import bench_model, cli
from paged_kv.commands.live_line import LiveLine
from paged_kv.commands.timing import timed_matrices
from paged_kv.models import bitnet
from paged_kv.models.bitnet import BitNetModel, DecoderConfig
from paged_kv.models.report import Stopwatch

SMALL = DecoderConfig(64, 64, 96, 2, 4, 2, 16, 512, 10000.0, 1e-5, 1, 2)
FIELDS = (
    *("shape", "batch", "context", "prefill_tokens_per_s", "decode_tokens_per_s"),
    *("ms_per_step", "bytes_per_step", "read_fraction"),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bitnet.SHAPES, "small", SMALL)
    monkeypatch.setattr(bench_model, "CEILING_BYTES", 2**22)


def run(capsys, *arguments):
    code = cli.main(["bench-model", "--shape", "small", "--steps", "2", *arguments])
    return code, capsys.readouterr()


def test_json_is_one_line_of_rows(capsys):
    code, shown = run(capsys, "--batch", "1,3", "--context", "20,70", "--json")
    assert code == 0 and shown.out.count("\n") == 1
    rows = json.loads(shown.out)
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 20), (3, 20), (1, 70), (3, 70)]
    weight_bytes = BitNetModel.random(SMALL).weight_bytes
    for row in rows:
        assert set(FIELDS) <= row.keys() and row["shape"] == "small"
        assert row["decode_tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"], rel=1e-3)
        parts = row["weights_ms"] + row["attention_ms"] + row["rest_ms"]
        assert 0 < parts < 3 * row["ms_per_step"] and row["read_fraction"] > 0
        # Of the step, which appends: the new token is read too.  2 layers x 2 heads x 16 x 2 bytes, k and v.
        kv_bytes = row["batch"] * (row["context"] + 3) * 2 * 2 * 2 * 16 * 2
        assert row["bytes_per_step"] == weight_bytes + kv_bytes
        assert row["recompute_speedup"] is None


def test_the_table_has_a_line_for_each_row_and_a_column_against_no_cache(capsys):
    code, shown = run(capsys, "--context", "16,40", "--recompute")
    lines = shown.out.splitlines()
    assert code == 0 and len(lines) == 4 and lines[0].startswith("kernel ")
    assert "no cache" in lines[1] and all(re.search(r"\d+x$", line) for line in lines[2:])


def test_auto_doubles_the_batch_until_it_does_not_pay(monkeypatch):
    bench = bench_model.ModelBench("small", BitNetModel.random(SMALL), "bfloat16", 1, LiveLine(io.StringIO()))

    def measured(per_s):
        rows = iter(per_s)
        row = bench.measure(1, 16)

        def measure(batch, context):
            fields = vars(row) | {"batch": batch, "decode_tokens_per_s": next(rows)}
            return bench_model.Row(**fields)

        return measure

    measure = measured([10, 19, 30, 31])
    monkeypatch.setattr(bench, "measure", measure)
    rows, why = bench.best_batch(16, 2**30)
    assert [row.batch for row in rows] == [1, 2, 4, 8] and why.startswith("batch 4: 8 sequences were +3 %")


def test_auto_stays_within_its_budget():
    bench = bench_model.ModelBench("small", BitNetModel.random(SMALL), "float32", 1, LiveLine(io.StringIO()))
    page_bytes = 64 * bench.token_bytes
    bench.measure = lambda batch, context: bench_model.Row(
        "small", batch, context, 1.0, 2.0**batch, 1.0, 1.0, 1.0, 1.0, 1, 0.5, batch * page_bytes
    )
    rows, why = bench.best_batch(16, 3 * page_bytes + 1)
    assert [row.batch for row in rows] == [1, 2, 3] and "do not fit" in why
    with pytest.raises(ArgumentError, match="--memory"):
        bench.best_batch(16, page_bytes - 1)


@pytest.mark.parametrize(
    "bad",
    [
        *(["--shape", "13b"], ["--batch", "0"], ["--batch", "1,x"], ["--context", "-3"], ["--steps", "0"]),
        *(["--context", "511"], ["--memory", "much"], ["--batch", "auto", "--memory", "1KiB"]),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, bad):
    code, shown = run(capsys, *bad)
    assert code == 2 and shown.err.startswith("paged-kv: ") and not shown.out


def test_matrices_are_timed_within_the_block_only():
    model, clock = BitNetModel.random(SMALL), Stopwatch()
    before = model.matrices

    def logits():
        with model.new_cache(num_pages=1) as cache, cache.step([cache.sequence()], [9]) as step:
            return model.forward(np.arange(9), step, [8])

    with timed_matrices(model, clock):
        timed = logits()
    seconds = clock.seconds
    assert seconds > 0 and model.matrices == before
    np.testing.assert_array_equal(logits(), timed)
    assert clock.seconds == seconds
