"""The layout of pages in the pool's memory.

    [layer][page][kv head][k or v][token][dim]

A page's share of one layer is contiguous, and a thread that walks its heads reads it in address order, K
before V.  Kernels take strides and know nothing of this.

Imports errors.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError

#: What pages may store, and the bytes of one value.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}

#: Tokens per page unless the caller chooses: 16 reads 13 to 20 % slower, 128 wastes more of the last page.
DEFAULT_PAGE_SIZE = 64


@dataclass(frozen=True)
class PageLayout:
    """Sizes in bytes that follow from a cache's shape."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    page_size: int

    @property
    def key_bytes(self) -> int:
        """One head's key of one token."""
        return self.head_dim * DTYPES[self.dtype]

    @property
    def value_bytes(self) -> int:
        """One head's value of one token."""
        return self.head_dim_v * DTYPES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """One head's keys and values in a page."""
        return self.page_size * (self.key_bytes + self.value_bytes)

    @property
    def page_share_bytes(self) -> int:
        """One layer's share of a page; a multiple of 64, since page_size is one of 16."""
        return self.num_kv_heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        """A page, all layers."""
        return self.num_layers * self.page_share_bytes


def num_pages(num_tokens: int, page_size: int) -> int:
    """How many pages hold num_tokens."""
    return -(-num_tokens // page_size)


def dtype_name(dtype: object) -> str:
    """The name of a dtype that pages can store: from a string, torch's dtype, or what numpy takes for one."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name  # type: ignore[call-overload]
    except TypeError:
        name = repr(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError(f"dtype is {name}; pages store {', '.join(DTYPES)}")
    return str(name)


def parse_memory(memory: object) -> object:
    """Bytes of a size such as "512MiB" or "1.5 GiB"; anything but a string is returned as it is."""
    if not isinstance(memory, str):
        return memory
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    number, unit = memory[:-3].strip(), memory[-3:]
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ArgumentError(f'memory is "{memory}"; write bytes, or a size such as "1.5GiB"') from None
