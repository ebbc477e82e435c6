"""Attention over keys and values of 8 and 4 bits, by others and us: what `compare.py --work low_bit` times.

The classes are rivals as those of rivals.py, whose decode() stores k and v in fewer bits.  Errors are against
float64 attention over the values before they were rounded, so they show what the format costs, too.

    paged_kv int8, int8,int4, int4   one scale a token and head; keys of int4: of each dim of 64 tokens
    openvino u8, u4                  KV_CACHE_PRECISION: keys by channel of 32 tokens, values by token
    onnxruntime int8, int4           GroupQueryAttention: one scale a channel, for all tokens
    vllm fp8                         e4m3, the scale 1

Imported by compare.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from rivals import VLLM, OnnxRuntime, OpenVINO, PagedKV, copies_of


class Packed(PagedKV):
    """Old pages packed; the newest 64 tokens as they are opened."""

    options: ClassVar[dict[str, Any]] = {}

    def cache_options(self, k):
        return self.options


class Int8(Packed):
    options: ClassVar = {"dtype": "int8"}


class Int8Int4(Packed):
    options: ClassVar = {"dtype": ("int8", "int4")}


class Int4(Packed):
    options: ClassVar = {"dtype": "int4", "max_step_tokens": 64}


class OpenVINO8(OpenVINO):
    """KV_CACHE_PRECISION u8; each page is filled by the operator, as a prompt of its own."""

    precision = "u8"

    def cache_parameters(self, parameter, num_kv_heads, dim, kind):
        import openvino as ov

        return [parameter(f"{name}_cache.0", [-1] * 4, ov.Type.dynamic) for name in ("key", "value")]

    def cache_precision(self, precision):
        return self.precision

    def pools(self, model, q, k, v, table, copies):
        import openvino as ov

        batch, context, _, dim = k.shape
        num_pages = batch * context // 32
        kind, bits = getattr(ov.Type, self.precision), int(self.precision[1:])
        shapes = {}
        for each in model.inputs:
            if "cache" in each.get_any_name():
                lengths = [length.get_length() for length in list(each.get_partial_shape())[1:]]
                shapes[each.get_any_name()] = [num_pages, *lengths]
        pools = [torch.zeros(math.prod(shape) * bits // 8, dtype=torch.uint8) for shape in shapes.values()]

        def tensors(each):
            return {
                name: ov.Tensor(pool.numpy(), ov.Shape(shape), kind)
                for (name, shape), pool in zip(shapes.items(), each, strict=True)
            }

        rows = [x.reshape(num_pages * 32, -1) for x in (k, v)]
        request = model.create_infer_request()
        begins = np.arange(num_pages + 1, dtype=np.int32)
        given = {
            "q": torch.zeros(num_pages * 32, q.shape[-2] * dim, dtype=k.dtype),
            "k": rows[0],
            "v": rows[1],
        }
        given = {name: self.tensor(x) for name, x in given.items()} | tensors(pools)
        lists = {"past_lens": begins[1:] * 0, "subsequence_begins": begins * 32, "max_context_len": 32}
        lists |= {"block_indices": table.numpy(), "block_indices_begins": begins}
        given |= {name: ov.Tensor(np.asarray(x, np.int32)) for name, x in lists.items()}
        for name, each in given.items():
            request.set_tensor(name, each)
        request.infer()
        self.filled = [copies_of(pool, copies) for pool in pools]
        return [tensors([pool[i] for pool in self.filled]) for i in range(copies)]


class OpenVINO4(OpenVINO8):
    precision = "u4"


class Onnx8(OnnxRuntime):
    """A scale for each head and dim, which all tokens share."""

    dtypes = (torch.bfloat16, torch.float32)
    bits = 8

    def low_bit(self, x):
        """[batch, heads, tokens, dim]: codes as the operator stores them, and scales [1, heads, 1, dim]."""
        most = 127 if self.bits == 8 else 7
        scales = np.abs(x).max((0, 2), keepdims=True) / most
        codes = np.clip(np.rint(x / scales), -most - 1, most).astype(np.int8)
        if self.bits == 4:
            nibbles = (codes + 8).astype(np.uint8)
            codes = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        return codes, scales.astype(np.float32)

    def decode(self, q, k, v, copies):
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy
        batch, context, num_kv_heads, dim = k.shape
        session = self.session(q.shape[1], num_kv_heads, dim, torch.float32, self.bits)
        q, k, v = (x.float().numpy() for x in (q, k, v))
        fixed = {"query": q.reshape(batch, 1, -1)}
        fixed |= {
            name: np.ascontiguousarray(x[:, -1]).reshape(batch, 1, -1)
            for name, x in (("key", k), ("value", v))
        }
        fixed |= {"seqlens_k": np.full(batch, context - 1, np.int32)}
        fixed |= {"total_sequence_length": np.array([context], np.int32)}
        pasts = []
        for name, x in (("k", k), ("v", v)):
            codes, fixed[f"{name}_scale"] = self.low_bit(x.transpose(0, 2, 1, 3))
            pasts.append([codes, *(codes.copy() for _ in range(copies - 1))])
        fixed = {name: value(np.ascontiguousarray(array)) for name, array in fixed.items()}
        out = value(np.empty((batch, 1, q.shape[1] * dim), np.float32))
        self.shape = q.shape
        return self.bound(session, fixed, pasts, out)


class Onnx4(Onnx8):
    bits = 4


class VLLMFp8(VLLM):
    dtypes = (torch.bfloat16,)
    stored = "fp8_e4m3"


LOW_BIT = {
    "paged_kv": PagedKV,
    "paged_kv int8": Int8,
    "paged_kv int8,int4": Int8Int4,
    "paged_kv int4": Int4,
    "openvino u8": OpenVINO8,
    "openvino u4": OpenVINO4,
    "onnxruntime int8": Onnx8,
    "onnxruntime int4": Onnx4,
    "vllm fp8": VLLMFp8,
}
