"""Attention over cached keys and values by others, and by us, on the same inputs: what compare.py times.

A rival is a class.  It gets q, k and v as torch tensors of one dtype, and how many copies of the cache to
make, so that together they fit no cache; it returns as many calls, each of which computes the attention of
the newest tokens of one copy, and `result(what the call returned)` as [rows, q heads, head_dim].

    decode(q, k, v, copies)   q [batch, q heads, dim], k and v [batch, context, kv heads, dim]; where
                              `appends` says so, the call writes each sequence's newest key and value first
    prefill(q, k, v, copies)  q [new, q heads, dim], k and v [context, kv heads, dim]: the newest rows
    append(k, v, copies)      k and v as for decode: only writes each sequence's newest token

What cannot be imported is left out: `available()` says which there are and why the others are not.

Imported by compare.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import paged_kv

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Rival:
    """What a rival says of itself; `needs` is a module, or None."""

    needs: str | None = None
    is_paged = False
    appends = False
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        torch.set_num_threads(num_threads)

    @classmethod
    def why_not(cls) -> str | None:
        """Why it cannot be timed here; None: it can."""
        if cls.needs and not importlib.util.find_spec(cls.needs):
            return f"{cls.needs} is not installed"
        return None

    def result(self, out):
        return out.double().numpy()


def copies_of(tensor, copies):
    return [tensor, *(tensor.clone() for _ in range(copies - 1))]


class PagedKV(Rival):
    """paged_kv: a layer for each copy; pages in random order."""

    is_paged = appends = True

    def step(self, q, k, v, copies, num_new):
        batch, context, num_kv_heads, dim = k.shape
        page_size = min(64, context)
        options = self.cache_options(k)
        spare = 0 if NAMES[k.dtype] in options.values() else 8 * batch  # open pages beside packed ones
        self.cache = paged_kv.PagedKVCache(
            copies,
            num_kv_heads,
            dim,
            num_pages=batch * -(-context // page_size) + spare,
            page_size=page_size,
            num_threads=self.num_threads,
            **options,
        )
        seqs = [self.cache.sequence() for _ in range(batch)]
        # Sequences that grow in turns, a page at a time and in random order, get scattered pages.
        turns = np.random.default_rng(0).permutation(np.repeat(np.arange(batch), (context - num_new) // 64))
        for i in [*turns, *range(batch)]:
            begin = len(seqs[i])
            count = min(64, context - num_new - begin)
            if count:
                with self.cache.step([seqs[i]], [count]) as step:
                    for layer in range(copies):
                        step.write(layer, k[i, begin : begin + count], v[i, begin : begin + count])
        return self.cache.step(seqs, [num_new] * batch)

    def cache_options(self, k):
        return {"dtype": NAMES[k.dtype]}

    def decode(self, q, k, v, copies):
        step, out = self.step(q, k, v, copies, 1), torch.empty_like(q)
        new_k, new_v = k[:, -1].contiguous(), v[:, -1].contiguous()
        self.pages = step.block_table[step.block_table >= 0]
        return [lambda i=i: step.attend(i, q, new_k, new_v, out=out) for i in range(copies)]

    def append(self, k, v, copies):
        step = self.step(None, k, v, copies, 1)
        new_k, new_v = k[:, -1].contiguous(), v[:, -1].contiguous()
        if k.dtype == torch.float32:
            new_k, new_v = new_k.numpy(), new_v.numpy()
        return [lambda i=i: step.write(i, new_k, new_v) for i in range(copies)]

    def prefill(self, q, k, v, copies):
        new = len(q)
        step, out = self.step(q, k[None], v[None], copies, new), torch.empty_like(q)
        return [lambda i=i: step.attend(i, q, k[-new:], v[-new:], out=out) for i in range(copies)]


class TorchSDPA(Rival):
    """scaled_dot_product_attention over contiguous [batch, heads, context, dim]; a group is rows."""

    def decode(self, q, k, v, copies):
        batch, _, dim = q.shape
        rows = q.reshape(batch, k.shape[2], -1, dim)
        keys, values = (copies_of(x.transpose(1, 2).contiguous(), copies) for x in (k, v))

        def call(i):
            return F.scaled_dot_product_attention(rows, keys[i], values[i]).reshape(q.shape)

        return [lambda i=i: call(i) for i in range(copies)]

    def prefill(self, q, k, v, copies):
        new, num_q_heads, _ = q.shape
        is_whole, group = new == len(k), num_q_heads // k.shape[1]
        rows = q.transpose(0, 1)[None].contiguous()
        # Heads repeated beforehand: faster than enable_gqa.
        repeated = [x.transpose(0, 1).repeat_interleave(group, 0)[None].contiguous() for x in (k, v)]
        keys, values = (copies_of(x, copies) for x in repeated)
        mask = None if is_whole else torch.ones(new, len(k), dtype=torch.bool).tril(len(k) - new)

        def call(i):
            out = F.scaled_dot_product_attention(rows, keys[i], values[i], attn_mask=mask, is_causal=is_whole)
            return out[0].transpose(0, 1)

        return [lambda i=i: call(i) for i in range(copies)]


class TorchGather(Rival):
    """Pages of 16 gathered by index_select into buffers that are kept, then scaled_dot_product_attention; new
    tokens by index_copy_."""

    is_paged = True

    def append(self, k, v, copies):
        batch, context, num_kv_heads, dim = k.shape
        slots = torch.randperm(batch * context // 16).reshape(batch, -1)[:, -1] * 16 + 15
        pools = [copies_of(x.reshape(-1, num_kv_heads, dim).clone(), copies) for x in (k, v)]
        new = [x[:, -1].contiguous() for x in (k, v)]

        def call(i):
            for pool, rows in zip(pools, new, strict=True):
                pool[i].index_copy_(0, slots, rows)

        return [lambda i=i: call(i) for i in range(copies)]

    def decode(self, q, k, v, copies):
        batch, context, num_kv_heads, dim = k.shape
        rows = q.reshape(batch, num_kv_heads, -1, dim)
        table = torch.randperm(batch * context // 16)
        pools = []
        for x in (k, v):
            pool = torch.empty(len(table), 16, num_kv_heads, dim, dtype=x.dtype)
            pool[table] = x.reshape(pool.shape)
            pools.append(copies_of(pool, copies))
        buffers = [torch.empty_like(pools[0][0]) for _ in "kv"]
        keys, values = (buffer.view(k.shape).transpose(1, 2) for buffer in buffers)

        def call(i):
            for pool, buffer in zip(pools, buffers, strict=True):
                torch.index_select(pool[i], 0, table, out=buffer)
            return F.scaled_dot_product_attention(rows, keys, values).reshape(q.shape)

        return [lambda i=i: call(i) for i in range(copies)]


class Numpy(Rival):
    """numpy's matmul over contiguous [batch, heads, context, dim]; new tokens into a pool of slots."""

    dtypes = (torch.float32,)

    def append(self, k, v, copies):
        batch, context, num_kv_heads, dim = k.shape
        slots = np.random.default_rng(0).permutation(batch * context)[:batch]
        pools = [copies_of(x.reshape(-1, num_kv_heads, dim).clone(), copies) for x in (k, v)]
        pools = [[pool.numpy() for pool in each] for each in pools]
        new = [x[:, -1].numpy().copy() for x in (k, v)]

        def call(i):
            for pool, rows in zip(pools, new, strict=True):
                pool[i][slots] = rows

        return [lambda i=i: call(i) for i in range(copies)]

    def decode(self, q, k, v, copies):
        batch, _, dim = q.shape
        rows = q.reshape(batch, k.shape[2], -1, dim).numpy() * np.float32(dim**-0.5)
        keys, values = (copies_of(x.transpose(1, 2).contiguous(), copies) for x in (k, v))

        def call(i):
            scores = rows @ keys[i].numpy().swapaxes(2, 3)
            np.exp(scores - scores.max(-1, keepdims=True), scores)
            scores /= scores.sum(-1, keepdims=True)
            return torch.from_numpy((scores @ values[i].numpy()).reshape(q.shape))

        return [lambda i=i: call(i) for i in range(copies)]


class OnnxRuntime(Rival):
    """GroupQueryAttention, past and present in one contiguous buffer."""

    needs, appends = "onnxruntime", True
    dtypes = (torch.float32, torch.float16)

    def session(self, num_q_heads, num_kv_heads, dim, dtype, bits=None):
        """bits : of the cache, 8 or 4; None: it has q's dtype."""
        import onnxruntime
        from onnx import TensorProto, helper

        kind = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
        stored = {None: kind, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
        past = ["batch", num_kv_heads, "most", dim // 2 if bits == 4 else dim]
        inputs = {"query": (kind, ["batch", 1, num_q_heads * dim])}
        inputs |= {name: (kind, ["batch", 1, num_kv_heads * dim]) for name in ("key", "value")}
        inputs |= {name: (stored, past) for name in ("past_key", "past_value")}
        inputs |= {"seqlens_k": (TensorProto.INT32, ["batch"])}
        inputs |= {"total_sequence_length": (TensorProto.INT32, [1])}
        outputs = {"output": inputs["query"], "present_key": (stored, past), "present_value": (stored, past)}
        names, attributes = list(inputs), {"num_heads": num_q_heads, "kv_num_heads": num_kv_heads}
        if bits:
            scales = {f"{name}_scale": (kind, [1, num_kv_heads, 1, dim]) for name in "kv"}
            names, inputs = [*names, *[""] * 5, *scales], inputs | scales
            attributes |= {"kv_cache_bit_width": bits}
            attributes |= {f"{name}_quant_type": "PER_CHANNEL" for name in "kv"}
        node = helper.make_node(
            "GroupQueryAttention", names, list(outputs), domain="com.microsoft", **attributes
        )
        infos = [
            [helper.make_tensor_value_info(name, *what) for name, what in each.items()]
            for each in (inputs, outputs)
        ]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(
            helper.make_graph([node], "attention", *infos), opset_imports=opsets, ir_version=10
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.num_threads, 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def decode(self, q, k, v, copies):
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy
        batch, context, num_kv_heads, dim = k.shape
        session = self.session(q.shape[1], num_kv_heads, dim, q.dtype)
        fixed = {"query": q.reshape(batch, 1, -1).numpy()}
        fixed |= {
            name: x[:, -1:].reshape(batch, 1, -1).contiguous().numpy()
            for name, x in (("key", k), ("value", v))
        }
        fixed |= {"seqlens_k": np.full(batch, context - 1, np.int32)}
        fixed |= {"total_sequence_length": np.array([context], np.int32)}
        fixed = {name: value(array) for name, array in fixed.items()}
        out = value(np.empty_like(q.reshape(batch, 1, -1).numpy()))
        pasts = [[past.numpy() for past in copies_of(x.transpose(1, 2).contiguous(), copies)] for x in (k, v)]
        self.shape = q.shape
        return self.bound(session, fixed, pasts, out)

    def bound(self, session, fixed, pasts, out):
        """One call for each copy of the past keys and values, which the operator extends in place."""
        import onnxruntime

        self.held, self.out = [pasts, fixed, out], out
        calls = []
        for copied in zip(*pasts, strict=True):
            binding = session.io_binding()
            for name, each in fixed.items():
                binding.bind_ortvalue_input(name, each)
            for name, past in zip(("key", "value"), copied, strict=True):
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(past)
                self.held.append(buffer)
                binding.bind_ortvalue_input(f"past_{name}", buffer)
                binding.bind_ortvalue_output(f"present_{name}", buffer)
            binding.bind_ortvalue_output("output", out)
            calls.append(lambda binding=binding: session.run_with_iobinding(binding))
        return calls

    def result(self, out):
        return self.out.numpy().astype(np.float64).reshape(self.shape)


class OpenVINO(Rival):
    """PagedAttentionExtension, pages of 32; it appends by itself."""

    needs, is_paged, appends = "openvino", True, True

    def compiled(self, num_q_heads, num_kv_heads, dim, dtype):
        import openvino as ov
        from openvino.op import _PagedAttentionExtension

        ops = ov.opset13
        kind = {"float32": ov.Type.f32, "float16": ov.Type.f16, "bfloat16": ov.Type.bf16}[NAMES[dtype]]
        self.kind = kind

        def parameter(name, shape, what=ov.Type.i32):
            return ops.parameter(ov.PartialShape(shape), what, name=name)

        def none(what):
            return ops.constant(np.empty(0, what))

        heads = {"q": num_q_heads, "k": num_kv_heads, "v": num_kv_heads}
        tensors = [parameter(name, [-1, count * dim], kind) for name, count in heads.items()]
        caches = self.cache_parameters(parameter, num_kv_heads, dim, kind)
        lists = [parameter(name, [-1]) for name in ("past_lens", "subsequence_begins")]
        lists += [parameter(name, [-1]) for name in ("block_indices", "block_indices_begins")]
        longest = parameter("max_context_len", [])
        i32, f32 = np.int32, np.float32
        # Scale, window and slopes; then scores, rotation, eviction, sparsity and the rest, all unused.
        options = [ops.constant(f32(dim**-0.5)), ops.constant(i32(0)), none(f32), longest]
        options += [none(i32)] * 3 + [none(f32), none(f32), ops.constant(i32(128)), ops.constant(i32(8))]
        options += [none(f32), ops.constant(i32(0)), *[none(i32)] * 4, none(np.uint8), none(i32)]
        nodes = [*tensors, *caches, *lists, *options]
        attention = _PagedAttentionExtension([node.output(0) for node in nodes])
        for name, value in (("k_head_size", dim), ("v_head_size", dim)):
            attention.get_rt_info()[name] = value
        for name in ("num_k_heads", "num_v_heads"):
            attention.get_rt_info()[name] = num_kv_heads
        model = ov.Model([attention.output(0)], [*tensors, *caches, *lists, longest], "attention")
        precision = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[NAMES[dtype]]
        return ov.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "KV_CACHE_PRECISION": self.cache_precision(precision),
                "INFERENCE_NUM_THREADS": self.num_threads,
                "NUM_STREAMS": 1,
            },
        )

    def cache_parameters(self, parameter, num_kv_heads, dim, kind):
        shape = [-1, num_kv_heads, 32, dim]
        return [parameter(f"{name}_cache.0", shape, kind) for name in ("key", "value")]

    def cache_precision(self, precision):
        return precision

    def pools(self, model, q, k, v, table, copies):
        """The caches of each copy, by the names of the model's inputs."""
        pages_each = len(table) // len(k)
        pools = []
        for x in (k, v):
            padded = torch.zeros(len(k), pages_each * 32, *k.shape[2:], dtype=x.dtype)
            padded[:, : k.shape[1]] = x
            pool = torch.empty(len(table), k.shape[2], 32, k.shape[3], dtype=x.dtype)
            pool[table] = padded.reshape(-1, 32, *k.shape[2:]).transpose(1, 2)
            pools.append(copies_of(pool, copies))
        self.filled = pools
        return [
            {"key_cache.0": self.tensor(pools[0][i]), "value_cache.0": self.tensor(pools[1][i])}
            for i in range(copies)
        ]

    def tensor(self, x):
        import openvino as ov

        if x.dtype == torch.bfloat16:
            bits = x.contiguous().view(torch.int16).numpy().view(np.uint16)
            return ov.Tensor(bits, ov.Shape(list(x.shape)), ov.Type.bf16)
        return ov.Tensor(x.contiguous().numpy(), shared_memory=True)

    def attend(self, q, k, v, copies):
        """q [batch, new, q heads, dim], k and v with the new tokens at their ends."""
        import openvino as ov

        batch, new, num_q_heads, dim = q.shape
        context, num_kv_heads = k.shape[1:3]
        pages_each = -(-context // 32)
        table = torch.randperm(batch * pages_each)
        model = self.compiled(num_q_heads, num_kv_heads, dim, k.dtype)
        pools = self.pools(model, q, k, v, table, copies)
        rows = {"q": q, "k": k[:, context - new :], "v": v[:, context - new :]}
        given = {name: self.tensor(x.reshape(batch * new, -1)) for name, x in rows.items()}
        lists = {
            "past_lens": [context - new] * batch,
            "subsequence_begins": np.arange(batch + 1) * new,
            "block_indices": table.numpy(),
            "block_indices_begins": np.arange(batch + 1) * pages_each,
            "max_context_len": context,
        }
        given |= {name: ov.Tensor(np.asarray(each, np.int32)) for name, each in lists.items()}
        self.held, self.shape = [rows, pools, given], (batch * new, num_q_heads, dim)
        requests = []
        for i in range(copies):
            request = model.create_infer_request()
            for name, each in (given | pools[i]).items():
                request.set_tensor(name, each)
            requests.append(request)
        return [lambda request=request: (request.infer() and request) or request for request in requests]

    def decode(self, q, k, v, copies):
        return self.attend(q[:, None], k, v, copies)

    def prefill(self, q, k, v, copies):
        return self.attend(q[None], k[None], v[None], copies)

    def result(self, out):
        data = np.array(out.get_output_tensor(0).data)
        if self.kind.get_type_name() == "bf16":
            data = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).double().numpy()
        return data.astype(np.float64).reshape(self.shape)


class VLLM(Rival):
    """vLLM's CPU operators alone, pages of 128; VLLM_OPERATORS names the library."""

    is_paged = appends = True
    dtypes = (torch.float32, torch.bfloat16)
    isa = "vec"
    stored = "auto"

    @classmethod
    def why_not(cls):
        path = os.environ.get("VLLM_OPERATORS", "")
        return None if Path(path).is_file() else "VLLM_OPERATORS names no file"

    def pools(self, k, v, copies):
        """Pages with these tokens in them, a table, each token's slot, and what writes."""
        torch.ops.load_library(os.environ["VLLM_OPERATORS"])
        ops = torch.ops._C
        batch, context, num_kv_heads, dim = k.shape
        pages_each = -(-context // 128)
        table = torch.randperm(batch * pages_each).reshape(batch, -1).to(torch.int32)
        at = torch.arange(context)
        slots = table[:, at // 128].long() * 128 + at % 128
        kind = k.dtype if self.stored == "auto" else torch.uint8
        pool = torch.zeros(batch * pages_each, num_kv_heads, 256, dim, dtype=kind)

        def write(caches, keys, values, where):
            ops.cpu_attn_reshape_and_cache(keys, values, *caches, where, self.isa, 1.0, 1.0, self.stored)

        rows = [x.reshape(-1, num_kv_heads, dim) for x in (k, v)]
        write(pool.chunk(2, dim=2), *rows, slots.reshape(-1))
        return ops, [each.chunk(2, dim=2) for each in copies_of(pool, copies)], table, slots, write

    def append(self, k, v, copies):
        _, pools, _, slots, write = self.pools(k, v, copies)
        new, where = [x[:, -1].contiguous() for x in (k, v)], slots[:, -1].contiguous()
        return [lambda i=i: write(pools[i], *new, where) for i in range(copies)]

    def attend(self, q, k, v, copies, new):
        """q [batch * new, q heads, dim]."""
        ops, pools, table, slots, write = self.pools(k, v, copies)
        batch, context, num_kv_heads, dim = k.shape
        lens = torch.full((batch,), context, dtype=torch.int32)
        begins = torch.arange(batch + 1, dtype=torch.int32) * new
        options = (begins, True, -1, self.isa, True, None, self.stored)
        plan = ops.get_scheduler_metadata(batch, q.shape[1], num_kv_heads, dim, lens, k.dtype, *options)
        rows = [x[:, context - new :].reshape(-1, num_kv_heads, dim).contiguous() for x in (k, v)]
        where, out = slots[:, context - new :].reshape(-1).contiguous(), torch.empty_like(q)
        before = (
            begins,
            lens,
            dim**-0.5,
            True,
            None,
            -1,
            table,
            0.0,
            plan,
            None,
            None,
            1.0,
            1.0,
            self.stored,
        )

        def call(i):
            write(pools[i], *rows, where)
            ops.cpu_attention_with_kv_cache(q, *pools[i], out, *before)
            return out

        return [lambda i=i: call(i) for i in range(copies)]

    def decode(self, q, k, v, copies):
        return self.attend(q, k, v, copies, 1)

    def prefill(self, q, k, v, copies):
        return self.attend(q, k[None], v[None], copies, len(q))


class DynamicCache(Rival):
    """transformers: DynamicCache.update, which concatenates, and its sdpa attention."""

    needs, appends = "transformers", True

    def cache(self, k, copies):
        from transformers.cache_utils import DynamicCache as Cache

        return Cache()

    def decode(self, q, k, v, copies):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = q.shape[1] // k.shape[2], True
        rows, cache = q[:, :, None], self.cache(k, copies)
        new = [x[:, -1:].transpose(1, 2).contiguous() for x in (k, v)]
        for i in range(copies):
            cache.update(*(x[:, :-1].transpose(1, 2).contiguous() for x in (k, v)), i)
        before = [dict(vars(layer)) for layer in cache.layers]
        for state in before:
            if "cumulative_length" in state:
                state["cumulative_length"] = state["cumulative_length"].clone()

        def call(i):
            out = sdpa_attention_forward(module, rows, *cache.update(*new, i), self.mask)[0].reshape(q.shape)
            # As it was before the new token: it would grow otherwise, and hold what it concatenated.
            vars(cache.layers[i]).update(before[i])
            if "cumulative_length" in before[i]:
                cache.layers[i].cumulative_length = before[i]["cumulative_length"].clone()
            return out

        return [lambda i=i: call(i) for i in range(copies)]

    mask = None


class StaticCache(DynamicCache):
    """transformers: StaticCache.update, into buffers with room for 128 more, and sdpa attention, masked."""

    def cache(self, k, copies):
        from transformers import LlamaConfig
        from transformers.cache_utils import StaticCache as Cache

        _, context, num_kv_heads, dim = k.shape
        config = LlamaConfig(
            num_hidden_layers=copies,
            num_attention_heads=num_kv_heads,
            num_key_value_heads=num_kv_heads,
            hidden_size=num_kv_heads * dim,
            head_dim=dim,
        )
        self.mask = (torch.arange(context + 128) < context)[None, None, None].expand(len(k), 1, 1, -1)
        return Cache(config=config, max_cache_len=context + 128)


RIVALS = {
    "paged_kv": PagedKV,
    "openvino": OpenVINO,
    "onnxruntime": OnnxRuntime,
    "vllm": VLLM,
    "torch": TorchSDPA,
    "torch gather": TorchGather,
    "DynamicCache": DynamicCache,
    "StaticCache": StaticCache,
    "numpy": Numpy,
}


def available(rivals: dict[str, type[Rival]] = RIVALS) -> tuple[dict[str, type[Rival]], dict[str, str]]:
    """The rivals that can be timed here, and why the others cannot."""
    reasons = {name: rival.why_not() for name, rival in rivals.items()}
    return (
        {name: rival for name, rival in rivals.items() if not reasons[name]},
        {name: reason for name, reason in reasons.items() if reason},
    )
