"""Packages that are not needed to keep a cache, imported where they are used."""

import importlib
from types import ModuleType


def require(package: str, extra: str) -> ModuleType:
    """The package; an ImportError that names the extra when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {package}: pip install 'paged_kv[{extra}]'", name=package
        ) from error
