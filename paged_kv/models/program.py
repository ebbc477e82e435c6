"""A decoder's products, prepared once for the arrays that they work on.

    part 0       q k v and heads of layer 0
                 ── attention, which is the step's ──
    part 1       o, gate and up, down of layer 0; q k v and heads of layer 1
                 ── attention ──
    ...          one C call a part, and one claim of the threads

A pass of few tokens is a hundred short products.  Python's part of each, for which threads wait, would be a
fifth of such a pass.

Imports layers, matrix and report.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._binding import check, ffi, lib, shared_threads
from .layers import DecoderBlock, KVStep, Rotation
from .matrix import ADD, STORE, Matrix
from .report import Stopwatch
from .ternary import FloatArray

#: Operations of a layer: q k v, heads, o, gate and up, down; attention is after the second.
OPS_OF_LAYER, OPS_BEFORE_ATTENTION = 5, 2


class Program:
    """The forward pass of some blocks, for up to `capacity` tokens.  One pass at a time.

    blocks : at least one, all of the same widths
    capacity : tokens
    """

    def __init__(self, blocks: Sequence[DecoderBlock], capacity: int) -> None:
        attention = blocks[0].attention
        self.capacity, self._blocks = capacity, tuple(blocks)
        self._num_q, self._num_kv, self._dim = (
            attention.num_q_heads,
            attention.num_kv_heads,
            attention.head_dim,
        )
        widths = (attention.qkv.num_in, attention.qkv.num_out, attention.o.num_in, blocks[0].down.num_in)
        #: float32 [capacity, width]: the residual stream, projections, attended heads, gated values.
        self.x, self._qkv, self._attended, self._gated = (
            np.empty((capacity, width), np.float32) for width in widths
        )
        self._threads = shared_threads()
        self._ops = ffi.new("pkv_op[]", OPS_OF_LAYER * len(blocks))
        #: What the operations point to.
        self._kept: list[Any] = []
        for layer, block in enumerate(blocks):
            self._prepare(self._ops + OPS_OF_LAYER * layer, block)
        self._tokens = ffi.new("pkv_tokens *")
        #: Counts the time of the operations; None: nothing does.
        self.clock: Stopwatch | None = None

    def _prepare(self, ops: Any, block: DecoderBlock) -> None:
        attention, eps = block.attention, block.attention.eps
        self._product(ops[0], attention.qkv, self.x, attention.input_norm, eps, self._qkv, STORE)
        heads = ops[1].heads
        heads.rows, heads.stride = self._floats(self._qkv), self._qkv.shape[1]
        heads.num_q_heads, heads.num_kv_heads, heads.head_dim = self._num_q, self._num_kv, self._dim
        heads.bias = self._floats(attention.qkv_bias)
        heads.q_norm, heads.k_norm = self._floats(attention.q_norm), self._floats(attention.k_norm)
        heads.eps, heads.is_rotated = eps, attention.is_rotated
        self._product(ops[2], attention.o, self._attended, attention.sub_norm, eps, self.x, ADD)
        ops[2].bias = self._floats(attention.o_bias)
        norm = block.post_attention_norm
        self._product(ops[3], block.gate_up, self.x, norm, eps, self._gated, block.epilogue)
        self._product(ops[4], block.down, self._gated, block.ffn_sub_norm, eps, self.x, ADD)

    def _product(
        self,
        op: Any,
        matrix: Matrix,
        x: FloatArray,
        norm: FloatArray | None,
        eps: float,
        out: FloatArray,
        epilogue: int,
    ) -> None:
        op.matrix = matrix.described
        self._kept.append(matrix)
        call = op.product
        call.x, call.x_stride, call.norm, call.eps = self._floats(x), x.shape[1], self._floats(norm), eps
        call.out, call.out_stride, call.epilogue = self._floats(out), out.shape[1], epilogue

    def _floats(self, array: NDArray[Any] | None) -> Any:
        if array is None:
            return ffi.NULL
        pointer = ffi.from_buffer("float[]", np.ascontiguousarray(array, np.float32))
        self._kept.append(pointer)
        return pointer

    def run(self, step: KVStep, rotation: Rotation) -> None:
        """Turn x, of as many tokens as the step has, into what the last block makes of it.

        Raises: what the step's `attend` raises.
        """
        positions, tables = step.positions, rotation.tables
        num_tokens, tokens = len(positions), self._tokens
        pointers = [ffi.from_buffer("float[]", table) for table in tables]
        at = ffi.from_buffer("int32_t[]", np.ascontiguousarray(positions))
        tokens.num_rows, tokens.positions, tokens.num_positions = num_tokens, at, len(tables[0])
        tokens.cosines, tokens.sines = pointers
        heads = self._qkv[:num_tokens].reshape(num_tokens, -1, self._dim)
        num_rotated = self._num_q + self._num_kv
        q, k, v = heads[:, : self._num_q], heads[:, self._num_q : num_rotated], heads[:, num_rotated:]
        out = self._attended[:num_tokens].reshape(num_tokens, self._num_q, self._dim)
        self._run(0, OPS_BEFORE_ATTENTION)
        last = len(self._blocks) - 1
        for layer in range(last):
            step.attend(layer, q, k, v, out=out)
            self._run(OPS_OF_LAYER * layer + OPS_BEFORE_ATTENTION, OPS_OF_LAYER)
        step.attend(last, q, k, v, out=out)
        self._run(OPS_OF_LAYER * last + OPS_BEFORE_ATTENTION, OPS_OF_LAYER - OPS_BEFORE_ATTENTION)

    def _run(self, first: int, count: int) -> None:
        begin = time.perf_counter() if self.clock is not None else 0.0
        check(lib.pkv_run_ops(self._threads, self._ops + first, count, self._tokens), "run_ops")
        if self.clock is not None:
            self.clock.seconds += time.perf_counter() - begin
