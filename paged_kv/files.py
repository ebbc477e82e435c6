"""Files that are written whole or not at all.

A reader that has the old file open, in another process or as a memory map, keeps the old bytes; a new reader
sees all of the new ones.  An interrupt, a full disk or a crash leaves the old file as it was.
"""

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

#: Writes a file's contents.
Writer = Callable[[BinaryIO], object]


def replace_files(writers: dict[Path, Writer]) -> None:
    """Write new files next to these paths, flush them to the disk, and rename them to the paths.

    If a writer raises, the new files are removed and the old ones stay.  A path that is a symbolic link is
    replaced; what it points to is not touched.  A new file has the permissions of the old one, or those that
    `open` would give it.

    Raises: OSError, and what the writers raise.
    """
    written: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            written[path] = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            with open(written[path], "xb") as file:
                write(file)
                file.flush()
                if path.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                os.fsync(file.fileno())
        for path in list(written):
            os.replace(written[path], path)
            del written[path]
    finally:
        for new in written.values():
            with suppress(OSError):
                new.unlink()
    for folder in {path.parent for path in writers}:
        _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """So that a crash of the machine does not forget the new names; some file systems cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
