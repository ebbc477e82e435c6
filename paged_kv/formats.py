"""The formats of a cache's pages: what tokens are stored in, and what pages are packed into as they age.

    layouts, recent = layouts_of(layout, recent_tokens, open_dtype)     packed once, or not at all
    layouts, recent = ageing_layouts(layout, Ageing())                  packed twice
    packing = packing_of(recent, num_sink_tokens, ageing, window)       when pages are packed; None: never

`layouts` has the format of new tokens first; recent[f] newest tokens keep their pages in layouts[f].

Imports store.
"""

from dataclasses import dataclass, replace

from ._binding import integer
from .errors import ArgumentError
from .pages.block_table import Packing
from .pages.layout import ARRAY_DTYPES, BY_CHANNEL, PageLayout, num_pages, public_name, stored_dtypes
from .pages.new_tokens import MAX_TOKENS
from .pages.slabs import slab_sizes
from .store import PackedPages

#: Packed pages have whole runs, so that a run has one format.
RUN_TOKENS = 64


@dataclass(frozen=True)
class Ageing:
    """Pages in fewer bits as their tokens age: a commit packs those that are all older than the newest
    recent_tokens into `then`, and those all older than the newest `after` into `last`.

    then, last : dtypes as `PagedKVCache` takes them; a page of each is smaller than one of the format before
    by : "age"; or "mass": of the pages older than recent_tokens, those that get most attention keep `then`,
        as many as `after` tokens leave room for, wherever they are.  Attention mass is collected for it; a
        cache with a window has none

    Pages of the first num_sink_tokens stay as they were stored.  A commit packs as many pages of a format as
    its tokens fill, at most, so that a single token packs one; more that are due wait for the next commits.
    """

    recent_tokens: int = 64
    then: object = "int8"
    after: int = 512
    last: object = "int4"
    by: str = "age"


def layouts_of(
    layout: PageLayout, recent_tokens: object, open_dtype: object
) -> tuple[tuple[PageLayout, ...], tuple[int, ...]]:
    """The formats of a cache whose old pages have this layout, and how many newest tokens do not.

    Without packing, which pages of all dtypes but keys of int4 do without, `layout` alone.
    """
    must_pack = layout.dtypes[0] == BY_CHANNEL
    if recent_tokens is None and must_pack and open_dtype is None:
        recent_tokens = 64
    recent = 0 if recent_tokens is None else integer("recent_tokens", recent_tokens, 0, MAX_TOKENS)
    if not recent and open_dtype is None and not must_pack:
        return (layout,), ()
    _require_runs(layout)
    usual = "int8" if must_pack else "bfloat16"
    opened = replace(layout, dtypes=stored_dtypes(usual if open_dtype is None else open_dtype))
    if opened.dtypes[0] == BY_CHANNEL:
        raise ArgumentError("open_dtype has keys of int4, which only packed pages have")
    if opened.page_bytes <= layout.page_bytes:
        raise ArgumentError(
            f"open pages of {public_name(opened.dtypes)} are no larger than packed ones of "
            f"{public_name(layout.dtypes)}; leave recent_tokens and open_dtype out"
        )
    return (opened, layout), (recent,)


def ageing_layouts(opened: PageLayout, ageing: object) -> tuple[tuple[PageLayout, ...], tuple[int, ...]]:
    """The formats of a cache whose tokens are stored as `opened`, and how many newest tokens keep each."""
    if not isinstance(ageing, Ageing):
        raise ArgumentError(f"precision_policy is {ageing!r:.60}; give Ageing(...)")
    recent = integer("recent_tokens", ageing.recent_tokens, 0, MAX_TOKENS)
    after = integer("after", ageing.after, recent, MAX_TOKENS)
    _require_runs(opened)
    if ageing.by not in ("age", "mass"):
        raise ArgumentError(f'by is {ageing.by!r:.60}; give "age" or "mass"')
    packed = (replace(opened, dtypes=stored_dtypes(dtype)) for dtype in (ageing.then, ageing.last))
    layouts = (opened, *packed)
    names = [public_name(one.dtypes) for one in layouts]
    for name, one, before in zip(names, layouts[:-1], layouts[1:], strict=False):
        if one.dtypes[0] == BY_CHANNEL:
            raise ArgumentError(f"{name} has keys of int4, which only the last format can have")
        if one.page_bytes <= before.page_bytes:
            raise ArgumentError(f"pages of {', '.join(names)} do not become smaller as they age")
    return layouts, (recent, after)


def packing_of(
    recent: tuple[int, ...], num_sink_tokens: int, ageing: Ageing | None, window: object
) -> Packing | None:
    """When pages leave the formats that `layouts_of` or `ageing_layouts` gave."""
    is_by_mass = ageing is not None and ageing.by == "mass"
    if is_by_mass and window is not None:
        raise ArgumentError('a window keeps no attention mass; give Ageing(by="age"), or no window')
    return Packing(recent, num_sink_tokens, is_by_mass) if recent else None


def _require_runs(layout: PageLayout) -> None:
    if layout.page_size % RUN_TOKENS:
        raise ArgumentError(f"page_size is {layout.page_size}; pages that are packed take a multiple of 64")


def packed_pages(
    layouts: tuple[PageLayout, ...], num_packed: int, packing: Packing, max_step_tokens: int, is_exact: bool
) -> PackedPages:
    """Slabs for num_packed pages of the last format; is_exact: with all others, else beside those of a step,
    and, with several packed formats, beside those that a sequence's newest tokens keep.
    """
    sizes, page_size = tuple(one.page_bytes for one in layouts), layouts[0].page_size
    num_bytes = num_packed * sizes[-1]
    of_a_step = num_pages(max_step_tokens, page_size) + 1
    least = [0 for _ in sizes]
    if is_exact:
        least[0] = min(of_a_step, num_bytes // 4 // sizes[0])
    else:
        least[0] = min(of_a_step, num_packed + 1)
        num_bytes += (least[0] + 2) * sizes[0]
        if len(sizes) > 2:
            least[0] += num_pages(packing.num_sink_tokens, page_size)
            for format, recent in enumerate(packing.recent_tokens):
                least[format] += min(num_pages(recent, page_size) + 1, num_packed)
                num_bytes += least[format] * sizes[format]
    slabs = slab_sizes(num_bytes, sizes, tuple(least))
    if not is_exact:  # what a slab wastes counts for none of them
        others = sum(slabs.floors[:-1])
        slabs = replace(slabs, num_slabs=others + num_pages(num_packed, slabs.places[-1]))
    return PackedPages(layouts[1:], slabs, packing)


def format_tag(layouts: tuple[PageLayout, ...], packing: Packing | None) -> bytes:
    """What belongs to a page's hash beside the fingerprint: which values its tokens are rounded to."""
    if packing is not None:
        names = ">".join(public_name(one.dtypes) for one in layouts)
        numbers = ",".join(map(str, (*packing.recent_tokens, packing.num_sink_tokens)))
        return f"|{names}|{numbers}{',mass' if packing.is_by_mass else ''}".encode()
    dtypes = layouts[0].dtypes
    is_plain = dtypes[0] == dtypes[1] and dtypes[0] in ARRAY_DTYPES
    return b"" if is_plain else f"|{public_name(dtypes)}".encode()
