"""A file is replaced whole or stays as it was, whatever fails, and whatever reads it meanwhile."""

import mmap
import os
import resource
import stat

import numpy as np
import pytest

from paged_kv.files import replace_files
from paged_kv.models.bitnet import BitNetModel
from paged_kv.models.tensor_file import TensorFile, write_tensors


def failing(error):
    def write(file):
        file.write(b"half of it")
        raise error

    return write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").write_bytes(b"old a")
    (tmp_path / "b").write_bytes(b"old b")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [OSError(28, "no space"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("which", ["a", "b", "new"])
def test_a_writer_that_fails_leaves_every_file_as_it_was(folder, error, which):
    before = contents(folder)
    writers = {folder / name: lambda file: file.write(b"new") for name in ("a", "b", "new")}
    writers[folder / which] = failing(error)
    with pytest.raises(type(error)):
        replace_files(writers)
    assert contents(folder) == before


def test_who_maps_the_old_file_keeps_its_bytes(folder):
    with open(folder / "a", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        replace_files({folder / "a": lambda file: file.write(b"x" * 10)})
        assert mapped[:] == b"old a"
    assert contents(folder) == {"a": b"x" * 10, "b": b"old b"}


def test_a_link_is_replaced_and_not_what_it_points_to(folder):
    """Folders of a hub's cache are links into a store that several revisions share."""
    (folder / "link").symlink_to("a")
    replace_files({folder / "link": lambda file: file.write(b"new")})
    assert contents(folder) == {"a": b"old a", "b": b"old b", "link": b"new"}
    assert not (folder / "link").is_symlink()


def test_permissions_are_those_of_the_old_file_or_the_usual_ones(folder):
    os.chmod(folder / "a", 0o640)
    mask = os.umask(0o027)
    try:
        replace_files({folder / name: lambda file: file.write(b"new") for name in ("a", "new")})
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes["a"] == 0o640 and modes["new"] == 0o640


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_files({tmp_path / "none" / "a": lambda file: None})


def test_tensors_of_every_dtype_and_shape_are_read_back(tmp_path, rng):
    path = tmp_path / "x.safetensors"
    tensors = {
        "f": rng.standard_normal((3, 4)).astype(np.float32),
        "transposed": rng.standard_normal((3, 4)).astype(np.float16).T,
        "empty": np.empty((0, 5), np.float32),
        "none": np.empty((), np.uint8),
        "bits": rng.integers(0, 2**16, 7).astype(np.uint16),
    }
    write_tensors(path, tensors)
    read = TensorFile(path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.fixture
def saved(tmp_path):
    BitNetModel.tiny().save_pretrained(tmp_path)
    return tmp_path


def test_a_model_is_saved_into_the_folder_it_came_from(saved):
    """transformers #37713, safetensors #762: the file was emptied while tensors were mapped from it."""
    before = contents(saved)
    model = BitNetModel.from_pretrained(saved)
    tokens = model.generate_sequence(5, 0, [5, 9]).tolist()
    model.save_pretrained(saved)
    assert contents(saved) == before
    assert model.generate_sequence(5, 1, [5, 9]).tolist() == tokens
    assert BitNetModel.from_pretrained(saved).generate_sequence(5, 0, [5, 9]).tolist() == tokens


def test_a_full_disk_leaves_the_old_checkpoint(saved):
    before = contents(saved)
    model = BitNetModel.from_pretrained(saved)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, usual[1]))
    try:
        with pytest.raises(OSError):
            model.save_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert contents(saved) == before
