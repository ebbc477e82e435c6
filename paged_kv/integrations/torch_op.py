"""Attention over pages as a torch operator, so that torch.compile takes it as one node of a graph.

    out = torch.ops.paged_kv.attend(query, key, value, number, layer, scale, soft_cap, window, sinks)

An operator takes tensors and numbers only, so a step goes by a number: `number_of` gives an object one, for
as long as it lives.  What it writes are pages, which are no tensors: nothing is declared as changed, and an
operator stays where it is in a graph because its output is used.

Numbers are constants of a graph.  An object that keeps its number, as a StepOwner does over many steps, is
compiled once.

Imports errors.
"""

import itertools
import weakref
from typing import Any

import torch

from ..errors import ArgumentError

_numbers = itertools.count(1)
_owners: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


class StepOwner:
    """Holds the step that is open, under one number for all steps.

    step : set before each pass of the compiled function
    """

    def __init__(self) -> None:
        self.step: Any = None
        self.number = number_of(self)

    def attend_rows(
        self, layer: int, q: Any, k: Any, v: Any, *, scale: float, soft_cap: float, window: int, sinks: Any
    ) -> Any:
        if self.step is None:
            raise ArgumentError("there is no step; set `step` before the pass")
        return self.step.attend(
            layer, q, k, v, sm_scale=scale, logits_soft_cap=soft_cap, window=window or None, sinks=sinks
        )


def number_of(owner: Any) -> int:
    """A number for the operator, which does not keep the owner alive."""
    number = next(_numbers)
    _owners[number] = owner
    return number


@torch.library.custom_op("paged_kv::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    number: int,
    layer: int,
    scale: float,
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Store key and value in the pages of `number`'s step, and attend: [tokens, heads, dim of values].

    query : [tokens, q heads, dim]; key, value: [tokens, kv heads, dim]
    number : of a StepOwner
    window : 0: none
    """
    owner = _owners.get(number)
    if owner is None:
        raise ArgumentError(f"there is no owner of the number {number}; it was collected")
    out: torch.Tensor = owner.attend_rows(
        layer, query, key, value, scale=scale, soft_cap=soft_cap, window=window, sinks=sinks
    )
    return out


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
