"""Module paths of 0.1.0 find the modules that have moved."""

import importlib
import subprocess
import sys

import pytest

from paged_kv._old_paths import MOVED
from paged_kv.models import bitnet, config, decoder, layers, report


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_at_its_new_path(old):
    new = importlib.import_module(f"paged_kv.{MOVED[old]}")
    assert importlib.import_module(f"paged_kv.{old}") is new
    assert new.__name__ == new.__spec__.name == f"paged_kv.{MOVED[old]}"


def test_names_are_imported_from_old_paths_first():
    """In a process that has imported nothing by its new path."""
    code = (
        "from paged_kv.models.generate import generate, Batch, Request, Admission, ServingCache\n"
        "from paged_kv.pool import PagePool\n"
        "from paged_kv.attention import merge_states\n"
        "import paged_kv.manager as ring\n"
        "from paged_kv import layout\n"
        "import paged_kv\n"
        "assert ring.KVCacheManager is paged_kv.KVCacheManager and layout.DTYPES\n"
        "assert PagePool.__module__ == 'paged_kv.pages.pool'\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_path_that_never_was_is_missing():
    with pytest.raises(ModuleNotFoundError, match=r"paged_kv\.pools"):
        importlib.import_module("paged_kv.pools")


def test_the_names_of_0_1_0_are_the_decoders():
    assert bitnet.BitNetConfig is config.BitNetConfig is config.DecoderConfig
    assert bitnet.BitNetBlock is layers.BitNetBlock is layers.DecoderBlock
    assert bitnet.BitNetAttentionLayer is layers.BitNetAttentionLayer is layers.SelfAttention
    assert bitnet.GenerationReport is report.GenerationReport
    assert issubclass(bitnet.BitNetModel, decoder.DecoderModel)
