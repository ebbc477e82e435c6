"""A step: one forward pass of a batch of sequences.

It reserves the slots of all new tokens at once, stores keys and values layer by layer, and commits.  Before
the commit no sequence has changed; rollback undoes the reservation.

    with cache.step(seqs, new) as step:             reserves, or raises and changes nothing
        ... step.positions ...
        for layer in range(num_layers):
            out = step.attend(layer, q, k, v)       one C call: writes, then attends
                                                    leaving `with` commits, an exception rolls back

Imports sequence.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attention.arrays import numpy_of
from .attention.prepared import PreparedAppend, PreparedAttention
from .errors import ArgumentError, LayerNotWritten, ReentrantCall, StepClosed
from .lifetime import Uncopyable
from .pages.new_tokens import new_tokens_of
from .sequence import Sequence
from .store import Store


class Step(Uncopyable):
    """New tokens of some sequences, between reservation and commit; made by `cache.step(seqs, new)`.

    Rows of q, k and v are the new tokens of all sequences one after the other: sequence i has the rows
    ``qo_indptr[i]`` to ``qo_indptr[i + 1] - 1``.  The arrays below are read-only.  A step belongs to one
    thread; one that is collected while it is open is rolled back.
    """

    __slots__ = (
        "__weakref__",
        "_calls",
        "_handle",
        "_plan",
        "_seqs",
        "_store",
    )
    _instead = "it is one forward pass; open another one"

    def __init__(self, store: Store, seqs: Iterable[Sequence], new: object) -> None:
        self._store = store
        self._seqs, seq_ids = seq_ids_of(seqs)
        tokens = new_tokens_of(new, len(seq_ids))
        with store.lock:
            store.reclaim_abandoned()
            self._plan = plan = store.open_plan(self, seq_ids, tokens)
            try:
                self._handle = plan.handle
                #: Prepared calls, by what they do.  A method takes one for as long as it runs, so that a call
                #: inside it, of a signal handler or another thread, prepares its own.
                self._calls = store.spare_calls(plan.num_tokens)
            except BaseException:  # an interrupt, after which this step has no owner
                store.roll_back(plan)
                raise

    # ---- what was reserved

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 [num_tokens]: the position of each new token in its sequence."""
        return self._plan.positions

    @property
    def qo_indptr(self) -> NDArray[np.int32]:
        """int32 [num_seqs + 1]: where each sequence's rows begin."""
        return self._plan.qo_indptr

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32 [num_seqs], including the new tokens."""
        return self._plan.seq_lens

    @property
    def bytes_not_read(self) -> int:
        """Of shared pages, by `attend` so far: they are read once for all sequences that begin with them."""
        return int(self._handle.bytes_not_read)

    @property
    def values_not_read(self) -> float:
        """The share of runs of 64 tokens whose values `attend(skip_values_below=)` has left out so far."""
        num_runs = int(self._handle.num_value_runs)
        return int(self._handle.num_value_runs_skipped) / num_runs if num_runs else 0.0

    @property
    def slot_mapping(self) -> NDArray[np.int64]:
        """int64 [num_tokens]: page_id * page_size + offset of each new token."""
        return self._plan.slot_mapping

    @property
    def first_page(self) -> NDArray[np.int32]:
        """int32 [num_seqs]: the logical page at which each row of `block_table` begins; 0 with sinks."""
        return self._plan.first_page

    @property
    def kv_indptr(self) -> NDArray[np.int32]:
        """int32 [num_seqs + 1]: where each sequence's pages begin in a list of all that the step reads, in
        logical order; `attend(return_mass=True)` has a row for each."""
        return self._plan.kv_indptr

    @property
    def block_table(self) -> NDArray[np.int32]:
        """int32 [num_seqs, max_pages]: page ids in logical order from `first_page` on; -1 beyond a sequence's
        end, for pages between sinks and window that no new token sees, and for pages that were dropped.

        Cost: built at each access; attention does not need it.
        """
        return self._plan.block_table

    # ---- layer by layer

    def write(self, layer: int, k: Any, v: Any) -> None:
        """Store the new tokens' keys and values of one layer; a second write replaces the first.

        Parameters
        ----------
        layer : int
        k : [num_tokens, num_kv_heads, head_dim], float32, float16 or bfloat16 (of ml_dtypes): a numpy array
            or a torch CPU tensor, dense along the last axis
        v : [num_tokens, num_kv_heads, head_dim_v], likewise

        Values are rounded to nearest even; finite ones beyond the stored range saturate, NaN and inf pass.
        Raises: ArgumentError, StepClosed, CacheClosed.
        """
        pages, calls = self._store.pages(layer), self._calls
        call = calls.pop("write", None)
        if call is None or not call.repeat(pages, self._handle, k, v):
            call = PreparedAppend(pages, self._plan.num_tokens, k, v)
            call.run(pages, self._handle)
        calls["write"] = call

    def attend(
        self,
        layer: int,
        q: Any,
        k: Any = None,
        v: Any = None,
        *,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        sinks: Any = None,
        alibi_slopes: Any = None,
        window: int | None = None,
        num_sink_tokens: int = 0,
        out: Any = None,
        return_lse: bool = False,
        return_mass: bool = False,
        top_pages: int | None = None,
        skip_values_below: float = 0.0,
    ) -> Any:
        """Store k and v as `write` does, then attend: each row of q to its sequence's tokens up to its own.

        Parameters
        ----------
        layer : int
        q : [num_tokens, num_q_heads, head_dim], of the dtypes and kinds that `write` takes; num_q_heads is a
            multiple of num_kv_heads, and q head h reads kv head ``h // (num_q_heads / num_kv_heads)``
        k, v : as for `write`; neither: what was written
        sm_scale : factor of the scores; None: 1 / sqrt(head_dim)
        logits_soft_cap : above 0, a score s becomes ``cap * tanh(s / cap)``
        sinks : [num_q_heads], logits that join the sum of the softmax and have no value
        alibi_slopes : [num_q_heads]; ``slope * (j - i)`` is added to the score of query i and key j
        window, num_sink_tokens : of this call, as those of a cache, in a cache without a window: the row at
            position p sees ``p - window + 1`` to p, and the first sinks; None: all up to p
        out : where the result goes, of its shape and q's dtype; q itself will do
        return_lse : also the natural logarithm of the softmax's sum
        return_mass : also how much attention each page gets

        top_pages : how many pages a kv head reads, of sequences with one new token: those whose mean keys
            score highest, and always the sinks' pages, the first one at least, and those of the newest 64
            tokens.  None: all
        skip_values_below : of sequences with one new token, the values of runs of 64 tokens are not read that
            together get less than this share of the row's attention: the output is off by at most as much
            times the largest value.  0: all are read

        Returns: [num_tokens, num_q_heads, head_dim_v] of q's dtype and kind, `out` when it was given; with
        return_lse or return_mass a tuple of it, lse, float32 [num_tokens, num_q_heads], and mass, float32
        [pages, num_kv_heads], of q's kind.  The pages are the step's: sequence i has the rows
        ``kv_indptr[i]`` to ``kv_indptr[i + 1] - 1`` of mass, for each page the probabilities of its tokens,
        summed over the rows of q and averaged over the q heads of the kv head; NaN counts as 0.  Keys and
        values count as they are stored.  A row's bits depend on its q and its sequence only, not on the
        batch, the chunks or the threads.
        Raises: ArgumentError, LayerNotWritten, StepClosed, CacheClosed.
        Cost: reads the keys and values of each sequence once for every block of its rows.
        """
        if (k is None) is not (v is None):
            raise ArgumentError("give k and v, or neither, to attend to what was written")
        pages, calls, threads = self._store.pages(layer), self._calls, self._store.threads
        if window is not None or num_sink_tokens:
            self._require_no_window(window)
        options = (
            *(sm_scale, logits_soft_cap, sinks, alibi_slopes, return_lse),
            *(window, num_sink_tokens, return_mass, top_pages, skip_values_below),
        )
        if top_pages is not None:
            self._store.keep_means()
        verb = "attend" if k is None else "write and attend"
        call, result = calls.pop(verb, None), None
        if call is not None:
            result = call.repeat(threads, pages, self._handle, q, k, v, out, options)
        if result is None:
            new = PreparedAttention(pages, self._plan.num_tokens, q, k, v, out, options, self._plan.num_pages)
            result = new.run(threads, pages, self._handle)
            call = new if new.can_repeat else call
        calls[verb] = call
        return result

    def _require_no_window(self, window: object) -> None:
        if window is None:
            raise ArgumentError("num_sink_tokens goes with a window; give both")
        if self._store.tables.window is not None:
            raise ArgumentError(
                f"window is {window!r:.40}, and the cache has a window of {self._store.tables.window.size}, "
                "which holds for all calls; build it without one"
            )

    # ---- the end

    def commit(self, counts: object = None) -> None:
        """Append the new tokens to their sequences.

        Parameters
        ----------
        counts : integers, [num_seqs]: how many of each sequence's new tokens stay, its first ones, as when a
            draft is verified; the others are rolled back.  None: all

        Sequences that would hold more than their budgets drop pages, which `eviction` chooses.
        Raises: LayerNotWritten, naming the layer, and then the step is rolled back; ArgumentError for counts
        that the step does not have; what an eviction policy raises, and then the step is open; StepClosed,
        CacheClosed.
        Cost: O(sequences + released pages).
        """
        kept = None if counts is None else self._kept_counts(counts)
        budgets = self._store.budgets
        drops = None if budgets is None else budgets.choose(self._plan, kept)
        with self._store.lock:
            self._store.reclaim_abandoned()
            self._require_open()
            try:
                self._store.commit(self._plan, kept, drops)
            except LayerNotWritten:
                layer = self._plan.is_written.index(0)
                self._store.roll_back(self._plan)
                text = f"layer {layer} has no keys and values; the step was rolled back"
                raise LayerNotWritten(text) from None
            self._store.keep_calls(self._plan.num_tokens, self._calls)

    def _kept_counts(self, counts: object) -> NDArray[np.int32]:
        self._require_open()
        num_new = np.diff(self._plan.qo_indptr)
        kept = np.asarray(numpy_of("counts", counts))
        if kept.ndim != 1 or len(kept) != len(num_new) or (len(kept) and kept.dtype.kind not in "iu"):
            wanted = f"give an integer for each of {len(num_new)} sequences"
            raise ArgumentError(f"counts is {kept.dtype} {list(kept.shape)}; {wanted}")
        wrong = np.flatnonzero((kept < 0) | (kept > num_new))
        if len(wrong):
            i = int(wrong[0])
            raise ArgumentError(f"counts[{i}] is {kept[i]}, outside 0 to the {num_new[i]} new tokens")
        return kept.astype(np.int32)

    def rollback(self) -> None:
        """Undo the step.  Raises: StepClosed, CacheClosed.  Cost: O(its new pages)."""
        store = self._store
        try:
            lock = store.lock
        except (
            ReentrantCall
        ):  # in a finaliser or a signal handler, inside a call on this cache: when that is over
            store.roll_back_later(self._plan)
            return
        with lock:
            store.reclaim_abandoned()
            self._require_open()
            store.roll_back(self._plan)
            store.keep_calls(self._plan.num_tokens, self._calls)

    def __enter__(self) -> "Step":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._plan.is_open or self._store.closed:
            return
        if error is None:
            self.commit()
        else:
            self.rollback()

    def _require_open(self) -> None:
        if not self._handle.is_open:
            raise StepClosed("the step was committed or rolled back already; open another one")


def seq_ids_of(seqs: Iterable[Sequence]) -> tuple[tuple[Sequence, ...], list[int]]:
    """The sequences, and their ids; ArgumentError for anything that is no sequence."""
    try:
        handles = tuple(seqs)
        return handles, [seq._seq_id for seq in handles]
    except (AttributeError, TypeError):
        raise ArgumentError(f"seqs is {seqs!r:.80}; give a list of what cache.sequence() returned") from None
