"""Imports point down only, also under TYPE_CHECKING."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "paged_kv"

#: From the ground up; a module imports from floors below its own, and from none beside it.
FLOORS = [
    {
        "errors",
        "machine",
        "reference",
        "extras",
        "files",
        "commands.live_line",
        "models.report",
        "_old_paths",
        "pages.token_keys",
        "pages.counts",
        "serving.counters",
    },
    {"_binding", "lifetime", "pages.layout", "pages.entry", "integrations.torch_op"},
    {"attention.arrays", "pages.slabs"},
    {"attention.array_template", "attention.merge"},
    {"attention.prepared"},
    {"attention.foreign"},
    {
        "pages.pool",
        "pages.plan",
        "pages.new_tokens",
        "pages.salts",
        "pages.evicted",
        "pages.events",
        "pages.rows",
        "pages.eviction",
    },
    {"pages.block_table", "pages.retention"},
    {"pages.prefix_index"},
    {"pages.match", "pages.windowed_index", "pages.budgets"},
    {"pages.idle_pages"},
    {"store"},
    {"gathered", "frames", "formats", "cache_stats"},
    {"sequence"},
    {"step", "pin"},
    {"cache", "ring"},
    {"integrations.layer_pools", "integrations.continuous_batching"},
    {"integrations.latents"},
    {"integrations.transformers"},
    {"models.ternary", "models.sampling", "models.token_ids", "models.session"},
    {"models.matrix", "commands.baselines"},
    {"models.layers", "models.tensor_file", "models.json_file"},
    {"models.checkpoint", "models.config", "models.gguf_file"},
    {
        "models.model_files",
        "models.program",
        "text.gguf_vocabulary",
        "text.chat_template",
        "text.stop_strings",
    },
    {"text.tokenizer", "commands.texts"},
    {"models.decoder"},
    {"models.bitnet"},
    {"commands.model_options"},
    {"serving.request", "serving.grammar", "commands.timing"},
    {"serving.admission", "serving.options", "serving.handle", "serving.beam"},
    {"serving.batch"},
    {"serving.generate", "serving.engine"},
    {"server.errors", "server.schemas"},
    {"server.limits", "server.service", "server.tools"},
    {"server.stream", "server.metrics"},
    {"server.pool"},
    {"server.completions"},
    {"server.responses"},
    {"server.app"},
    {"commands.demo_prompts"},
    {"commands.demo", "commands.info"},
    {"commands.bench_model"},
    {
        "commands.generate",
        "commands.chat",
        "commands.perplexity",
        "commands.serve",
        "commands.replay",
        "commands.top",
    },
    {"commands.cli"},
    {"__main__"},
]
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text())


def imports_of(name, tree):
    """The package's own modules that `name` imports, by their names within it."""
    parents = ["paged_kv", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
        base = ".".join(part for part in base[1:] if part)
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            yield inner if inner in FLOOR_OF or inner == "_native" else base


def test_every_module_has_a_floor_and_imports_from_below():
    seen = set()
    for name, tree in modules():
        seen.add(name)
        for imported in imports_of(name, tree):
            if imported == "_native":
                assert name == "_binding", f"{name} imports the compiled module; only _binding may"
                continue
            below = FLOOR_OF[imported] < FLOOR_OF[name]
            assert below, f"{name} imports {imported}, which is not on a floor below"
    assert seen == set(FLOOR_OF)
