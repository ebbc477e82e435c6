"""The benchmarks at toy size, so that they never rot, and what one of them promises that no clock decides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {
    "append_latency.py": {"what", "dtype", "batch", "position", "ns_per_token_and_head", "of_write"},
    "attention.py": {"work", "kernel", "us", "gb_per_s", "of_walk", "of_read", "gflop_per_s"},
    "requested_table.py": {"figure", "claim_before", "claim_after", "naive", "preallocated", "ours"},
    "matrices.py": {"rows", "tokens_per_s", "ms", "g_products_per_s", "of_read_ceiling"},
    "bitnet.py": {"way", "sequences", "decode_tokens_per_s", "ms_per_step", "faster"},
    "seam.py": {"call", "us", "us_of_c", "us_over_c"},
    "eviction.py": {"policy", "pages", "given", "computed", "of_bound"},
    "cascade.py": {"what", "sequences", "us", "plain", "faster", "of_bound"},
    "sharing.py": {"what", "num_tokens", "us", "of_empty"},
    "serving_overhead.py": {"what", "num_sequences", "us", "us_per_sequence"},
    "planning.py": {"num_sequences", "us", "us_per_sequence"},
    "budgets.py": {"what", "batch", "us_plain", "us", "of_plain", "low", "high", "bar"},
    "utilization.py": {
        *("trace", "policy", "page_size", "utilization"),
        *("bound", "of_all_memory", "sequences_at_once", "bytes"),
    },
}


def run(script, *options):
    command = [sys.executable, str(FOLDER / script), "--toy", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


def test_every_benchmark_is_among_them():
    scripts = {path.name for path in FOLDER.glob("*.py") if "def main" in path.read_text()}
    need_more = {"compare.py", "plot_rivals.py"}  # rivals, a model, transformers
    need_more |= {"real_model.py", "real_model_quality.py", "transformers_cache.py"}
    need_more |= {"serving.py", "quality.py", "quality_budgets.py"}
    assert scripts == {*SCRIPTS, *need_more, "run_all.py"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_prints_rows_of_json(script):
    shown = run(script, "--json")
    assert shown.count("\n") == 1
    rows = json.loads(shown)
    assert rows and all(SCRIPTS[script] <= row.keys() for row in rows)


def test_a_benchmark_prints_a_table():
    lines = run("planning.py").splitlines()
    assert lines[0].startswith("cpu ") and len(lines) == 4


def test_quality_measures_the_embedded_model_too(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import quality

    def none(_):
        raise ImportError("no model")

    monkeypatch.setattr(quality.ModelFiles, "open", none)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--quick", "--dtypes", "bfloat16,int8@64"])
    quality.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the embedded BitNet")
    same, rounded = lines[-2].split(), lines[-1].split()
    assert same[0] == "bfloat16" and float(same[3]) == 0 and rounded[0] == "int8@64"


def test_budgets_are_measured_with_the_embedded_model_too(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import quality
    import quality_budgets

    def none(_):
        raise ImportError("no model")

    monkeypatch.setattr(quality.ModelFiles, "open", none)
    monkeypatch.setattr(sys, "argv", ["quality_budgets.py", "--quick"])
    quality_budgets.main()
    shown = capsys.readouterr().out
    assert shown.startswith("the embedded BitNet") and shown.count("last rows") == 3


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import harness

    return harness


def test_results_are_packed_without_loss(harness):
    results = {
        "machine": {"cpu": "a", "cpus": 2},
        "rows": [{"a": 1, "b": "x"}, {"a": 2.5, "c": [1, 2]}],
        "nothing": [],
    }
    text = harness.packed(results)
    assert harness.unpacked(text) == results
    assert text.count(b"\n") == 8  # a line for each row


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_that_are_kept_can_be_read(harness, path):
    results = harness.unpacked(path.read_text())
    assert results.pop("machine")["cpu"]
    assert all(isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in results.values())


def test_rivals_give_what_float64_gives(tmp_path, harness):
    pytest.importorskip("torch")
    run("compare.py", "--json", str(tmp_path / "rows.json"))
    rows = harness.unpacked((tmp_path / "rows.json").read_text())["rows"]
    assert {row["work"] for row in rows} == {"decode", "prefill", "append"}
    assert {"paged_kv", "torch", "walk"} <= {row["rival"] for row in rows}
    assert all(row["error"] < 1e-5 for row in rows)


def test_rivals_are_drawn(tmp_path):
    row = {"shape": "4/2/32", "dtype": "float32", "cell": "2x64", "rival": "torch"}
    figures = {"decode": "of_walk", "prefill": "gflop_per_s", "append": "ns_per_token_and_head"}
    rows = [row | {"work": work, figure: 0.5} for work, figure in figures.items()]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    command = [sys.executable, str(FOLDER / "plot_rivals.py"), str(tmp_path / "rows.json"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=100)
    for work in figures:
        assert (tmp_path / f"{work}.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_drawn(tmp_path):
    run("utilization.py", "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def utilization(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import utilization

    return utilization


@pytest.mark.parametrize("trace", [0, 1])
def test_pages_waste_what_the_last_page_must_and_fill_memory(utilization, trace):
    """No clock is in it: the same requests give the same figures everywhere."""
    row, _ = utilization.measure(utilization.TRACES[trace], "paged", 16, 10)
    assert 1 - row["utilization"] <= 1.05 * (1 - row["bound"])
    assert row["of_all_memory"] >= 0.95
    reserved, _ = utilization.measure(utilization.TRACES[trace], "reserved", 1, 10)
    assert reserved["of_all_memory"] < 0.4


@pytest.mark.parametrize(("trace", "least"), [(3, 1.5), (4, 4.0), (5, 0.95)])
def test_forks_and_windows_hold_more_than_arrays_do(utilization, trace, least):
    """Shared prompts, held once, take what sequences see beyond what memory has; rings let go of the rest."""
    row, _ = utilization.measure(utilization.TRACES[trace], "paged", 16, 10)
    # Where the one that appended in place has ended, the page stays with the shared prompt.
    assert 0.97 * row["bound"] <= row["utilization"] <= row["bound"]
    assert row["of_all_memory"] >= least
