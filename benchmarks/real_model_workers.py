"""One contender of real_model.py in a process of its own: SmolLM2-135M-Instruct, one measurement at a time.

Each reads the names of measurements from its standard input and answers with seconds, as a line of JSON:

    prompt              a prompt of 512 tokens, to the logits of the last one
    decode S C          a step of S streams that hold C tokens each, several of them
    load                from the file to the first token, by a process of its own (ours only)
"""

import json
import subprocess
import sys
import time
from typing import Any

import numpy as np

PROMPT_TOKENS, PAGE_SIZE = 512, 64


def prompt_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1000, 40000, count).tolist()


class Ours:
    """weights, head, dtype of pages"""

    def __init__(self, weights: str, head: str, kv_dtype: str) -> None:
        from paged_kv.models.decoder import DecoderModel

        self.model, self.kv_dtype = (
            DecoderModel.from_pretrained("smollm2", weights=weights, head=head),
            kv_dtype,
        )
        self.options = (weights, head)

    def _cache(self, streams: int, length: int) -> Any:
        pages = streams * -(-length // PAGE_SIZE)
        return self.model.new_cache(
            num_pages=pages, page_size=PAGE_SIZE, max_sequences=streams, dtype=self.kv_dtype
        )

    def prompt(self) -> list[float]:
        ids = prompt_of(PROMPT_TOKENS)
        with self._cache(1, len(ids)) as cache:
            begin = time.perf_counter()
            with cache.step([cache.sequence()], [ids]) as step:
                self.model.forward(ids, step, [-1])[0].argmax()
            return [time.perf_counter() - begin]

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        config, rng, times = self.model.config, np.random.default_rng(0), []
        with self._cache(streams, context + steps) as cache:
            # Sequences with rows of their own: prompts that share pages would be read once for all.
            seqs = [cache.sequence() for _ in range(streams)]
            shape = (context, config.num_key_value_heads, config.head_dim)
            for seq in seqs:
                with cache.step([seq], [context]) as step:
                    for layer in range(config.num_hidden_layers):
                        k, v = (rng.standard_normal(shape, np.float32) for _ in "kv")
                        step.write(layer, k, v)
            ids = np.full(streams, 5)
            for _ in range(steps):
                begin = time.perf_counter()
                with cache.step(seqs, [1] * streams) as step:
                    ids = self.model.forward(ids, step, np.arange(streams)).argmax(1)
                times.append(time.perf_counter() - begin)
        return times

    def load(self) -> list[float]:
        code = (
            "import time; begin = time.perf_counter()\n"
            "from paged_kv.models.decoder import DecoderModel\n"
            "m = DecoderModel.from_pretrained('smollm2', weights={!r}, head={!r})\n".format(*self.options)
            + "with m.new_cache(num_pages=1) as cache, cache.step([cache.sequence()], [1]) as step:\n"
            "    m.forward([5], step, [-1])[0].argmax()\n"
            "print(time.perf_counter() - begin)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return [float(done.stdout)]


class Transformers:
    """the folder, dtype, "dynamic" or "static" """

    def __init__(self, folder: str, dtype: str, cache: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch, self.transformers, self.cache = torch, transformers, cache
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    def _cache(self, length: int) -> Any:
        if self.cache == "static":
            return self.transformers.StaticCache(self.model.config, max_cache_len=length)
        return self.transformers.DynamicCache(config=self.model.config)

    def prompt(self) -> list[float]:
        ids, cache = self.torch.tensor([prompt_of(PROMPT_TOKENS)]), self._cache(PROMPT_TOKENS + 1)
        with self.torch.inference_mode():
            begin = time.perf_counter()
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return [time.perf_counter() - begin]

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        torch, config, times = self.torch, self.model.config, []
        cache = self._cache(context + steps + 1)
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (streams, config.num_key_value_heads, context, head_dim)
        with torch.inference_mode():
            for layer in range(config.num_hidden_layers):
                rows = [torch.randn(shape).to(self.model.dtype) for _ in "kv"]
                cache.update(*rows, layer, {"cache_position": torch.arange(context)})
            ids = torch.full((streams, 1), 5)
            for i in range(steps):
                begin = time.perf_counter()
                ids = (
                    self.model(
                        ids, past_key_values=cache, use_cache=True, position_ids=torch.tensor([[context + i]])
                    )
                    .logits[:, -1:]
                    .argmax(-1)
                )
                times.append(time.perf_counter() - begin)
        return times


class LlamaCpp:
    """the GGUF file"""

    def __init__(self, path: str) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # it must live as long as the library
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )

    def _context(self, streams: int, length: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = streams * length, streams
        params.n_batch, params.n_ubatch = max(512, streams * 64), 512
        params.n_threads = params.n_threads_batch = 2
        return self.api.llama_init_from_model(self.model, params)

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """rows: (id, position, sequence, whether its logits are needed)"""
        api, vocab_size = self.api, self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        batch = api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (id, position, sequence, is_needed) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = id, position, 1, is_needed
            batch.seq_id[i][0] = sequence
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        needed = [i for i, row in enumerate(rows) if row[3]]
        logits = (np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (vocab_size,)) for i in needed)
        ids = [int(row.argmax()) for row in logits]
        api.llama_batch_free(batch)
        return ids

    def prompt(self) -> list[float]:
        context, ids = self._context(1, 1024), prompt_of(PROMPT_TOKENS)
        self._decode(context, [(5, 0, 0, True)])  # its graph and buffers
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        begin = time.perf_counter()
        self._decode(context, [(id, i, 0, i == len(ids) - 1) for i, id in enumerate(ids)])
        took = time.perf_counter() - begin
        self.api.llama_free(context)
        return [took]

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        held = self._context(streams, -(-(context + steps + 2) // 256) * 256)
        ids, times = [5] * streams, []
        for sequence in range(streams):
            prompt = prompt_of(context, sequence)
            for at in range(0, context, 512):
                part = [(id, at + i, sequence, False) for i, id in enumerate(prompt[at : at + 512])]
                part[-1] = (*part[-1][:3], True)
                self._decode(held, part)
        for i in range(steps):
            begin = time.perf_counter()
            ids = self._decode(held, [(id, context + i, sequence, True) for sequence, id in enumerate(ids)])
            times.append(time.perf_counter() - begin)
        self.api.llama_free(held)
        return times


def serve(kind: str, *arguments: str) -> None:
    """Answer until the standard input ends."""
    contender = {"ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}[kind](*arguments)
    print("ready", flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(getattr(contender, name)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
