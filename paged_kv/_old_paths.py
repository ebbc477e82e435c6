"""Old module paths: `import paged_kv.pool` finds `paged_kv.pages.pool`, the same module object.

Modules moved into folders after 0.1.0.  Python calls this finder last, and only for the names below.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGE = __package__

#: Old name to new name, within the package.
MOVED = {
    "array_template": "attention.array_template",
    "arrays": "attention.arrays",
    "block_table": "pages.block_table",
    "cli": "commands.cli",
    "demo": "commands.demo",
    "foreign": "attention.foreign",
    "generation": "commands.generate",
    "info": "commands.info",
    "layout": "pages.layout",
    "live_line": "commands.live_line",
    "manager": "ring",
    "model_bench": "commands.bench_model",
    "models.baselines": "commands.baselines",
    "models.batch": "serving.batch",
    "models.generate": "serving.generate",
    "models.timing": "commands.timing",
    "pool": "pages.pool",
    "texts": "commands.texts",
}


class _Alias(importlib.abc.Loader):
    """Loads nothing: the module is another one's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which the import system has replaced by the alias's


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        new = MOVED.get(fullname.removeprefix(f"{PACKAGE}."))
        if new is None or not fullname.startswith(f"{PACKAGE}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, _Alias(f"{PACKAGE}.{new}"))


def install() -> None:
    sys.meta_path.append(_Finder())
