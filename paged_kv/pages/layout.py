"""The layout of pages in the pool's memory.

    [layer][page][kv head][k or v][token][dim]      and then, of int8 and int4, [token] scales

A page's share of one layer is contiguous, and a thread that walks its heads reads it in address order, K
before V.  Kernels take strides and know nothing of this.

Imports errors.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import ArgumentError

#: What pages may store, and the bytes of one value.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
#: And of values only.
VALUE_DTYPES = {**DTYPES, "int4": 0.5}
#: What keys of int4 are: a dim of 64 tokens has scales of its own, so a page has to be full.
BY_CHANNEL = "int4_by_channel"
#: Dtypes with scales; their bytes for each token and head.
SCALE_BYTES = {"int8": 2, "int4": 4, BY_CHANNEL: 0}
#: Dtypes that arrays have, too.
ARRAY_DTYPES = ("float32", "float16", "bfloat16")

LINE_BYTES = 64

#: Tokens per page unless the caller chooses: 16 reads 13 to 20 % slower, 128 wastes more of the last page.
DEFAULT_PAGE_SIZE = 64


@dataclass(frozen=True)
class Side:
    """The keys, or the values, of one head in a page: rows, then their scales where the dtype has some."""

    dtype: str
    dim: int
    page_size: int

    @property
    def row_bytes(self) -> int:
        """Of one token, without its scale."""
        return self.dim // 2 if self.dtype == BY_CHANNEL else int(self.dim * VALUE_DTYPES[self.dtype])

    @property
    def rows_bytes(self) -> int:
        """Of all tokens; a multiple of 64, since page_size is one of 16 and dim one of 8."""
        return self.page_size * self.row_bytes

    @property
    def num_bytes(self) -> int:
        """Rows and scales, these padded to whole cache lines."""
        scales = self.page_size * SCALE_BYTES.get(self.dtype, 0)
        if self.dtype == BY_CHANNEL:  # 4 bytes for each dim of 64 tokens
            scales = self.page_size * self.dim // 16
        return self.rows_bytes + -(-scales // LINE_BYTES) * LINE_BYTES


@dataclass(frozen=True)
class PageLayout:
    """Sizes in bytes that follow from a cache's shape."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtypes: tuple[str, str]  # of keys and of values
    page_size: int

    @property
    def keys(self) -> Side:
        """One head's keys in a page."""
        return Side(self.dtypes[0], self.head_dim, self.page_size)

    @property
    def values(self) -> Side:
        """One head's values in a page."""
        return Side(self.dtypes[1], self.head_dim_v, self.page_size)

    @property
    def head_bytes(self) -> int:
        """One head's keys and values in a page."""
        return self.keys.num_bytes + self.values.num_bytes

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


def dtype_name(dtype: object, among: Iterable[str] = ARRAY_DTYPES) -> str:
    """The name of one of some dtypes: from a string, torch's dtype, or what numpy takes for one."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name  # type: ignore[call-overload]
    except TypeError:
        name = repr(dtype).removeprefix("torch.")
    if name not in among:
        raise ArgumentError(f"dtype is {name}; it may be {', '.join(among)}")
    return str(name)


def stored_dtypes(dtype: object) -> tuple[str, str]:
    """The names of the dtypes that pages store, of keys and of values: from one for both, or from two."""
    if not isinstance(dtype, (tuple, list)):
        dtype = (dtype, dtype)
    if len(dtype) != 2:
        raise ArgumentError(f"dtype is {dtype!r:.60}; give one dtype, or two, of keys and of values")
    keys, values = (dtype_name(one, VALUE_DTYPES) for one in dtype)
    return BY_CHANNEL if keys == "int4" else keys, values


def public_name(dtypes: tuple[str, str]) -> str:
    """Of the dtypes of keys and of values, as "int8" or "int8,int4"."""
    return ",".join(dict.fromkeys("int4" if name == BY_CHANNEL else name for name in dtypes))


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
