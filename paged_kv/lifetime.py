"""Lifetimes: owners of parts of a cache, how these parts are released, and locks that know their thread.

An owner (a sequence, a step, a pool) releases what it holds exactly once.  So it cannot be copied, and what
it holds is released even when it is collected at a bad moment: while a lock is held, or while an exception of
a signal handler propagates.  Owners therefore have no `__del__`: that is Python code, which an
interrupt can end before its first line.  A `Ref` is recorded before anything is taken.  When the owner is
collected, the interpreter appends the `Ref` to a queue without running Python code; the next call processes
the queue.

Imports errors.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Protocol
from weakref import ref

from .errors import NotCopyable, ReentrantCall


class Uncopyable:
    """Base of objects that own something: `copy`, `deepcopy` and `pickle` raise NotCopyable."""

    __slots__ = ()

    #: What to do instead.
    _instead = "share the object itself"

    def __reduce__(self) -> NoReturn:
        raise NotCopyable(f"a {type(self).__name__} owns memory and cannot be copied; {self._instead}")


class Ref(ref[Any]):
    """A weak reference to an owner, and `held`: what to release when the owner is gone.

    Ref(owner, on_death) calls on_death with itself when the owner is collected.  on_death must be a builtin
    such as `deque.append`, which no interrupt can enter.
    """

    __slots__ = ("held",)
    held: Any


class OwnedLock:
    """A lock that raises where it would wait for its own thread.

        with owned_lock.taken(): ...

    A signal handler or a finaliser interrupts its thread anywhere.  Inside a call that holds this lock,
    waiting would never end, and continuing would expose half-done state.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        # An RLock knows its owner; `taken` makes sure that it is entered once.  `taken` does not acquire it:
        # an interrupt before the `with` block begins would leave it locked.  `with` acquires it in C.
        self.lock: Any = threading.RLock()

    @property
    def is_mine(self) -> bool:
        """Does this thread hold it?"""
        return bool(self.lock._is_owned())

    def taken(self) -> Any:
        """For `with`.  Raises: ReentrantCall."""
        if self.lock._is_owned():
            raise reentrant_call()
        return self.lock


def reentrant_call() -> ReentrantCall:
    return ReentrantCall(
        "this thread is inside another call on the same object: a signal handler or a finaliser ran in the "
        "middle of it; call again when that has returned"
    )


class Change:
    """For `with`, around each change of something that an interrupt can tear.

    A change that did not end is repaired before the next one begins.
    """

    def __init__(self, repair: Callable[[], None]) -> None:
        self.is_under_way = False
        self._repair = repair

    def __enter__(self) -> None:
        if self.is_under_way:
            self._repair()
        self.is_under_way = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.is_under_way = False


# ---- forked children

#: A Ref for each lock, by a number of its own; and those whose locks are gone.
_locks: dict[int, Ref] = {}
_lost_locks: deque[Ref] = deque()
_numbers = itertools.count()


class Renewed(Protocol):
    """State to reset in a forked child, where the threads that were changing it do not exist."""

    def renew(self) -> None: ...


def renew_in_children(lock: Renewed) -> None:
    """Call its `renew` in forked children, for as long as it lives."""
    with suppress(IndexError):  # another thread may take the last one
        while _lost_locks:
            _locks.pop(_lost_locks.popleft().held, None)
    noted = Ref(lock, _lost_locks.append)
    noted.held = next(_numbers)
    _locks[noted.held] = noted


def _renew_all() -> None:
    for noted in list(_locks.values()):
        if (lock := noted()) is not None:
            lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
