"""A real model, whole: ours, transformers and llama.cpp on the same weights, in turns.

    make smollm2 && pip install -e ".[hf,gguf]" llama-cpp-python
    python benchmarks/real_model.py [--rounds 3] [--only NAME ...] [--what NAME ...] [--json FILE]

Contenders are processes of their own, and one of them works at a time; each measurement goes round all of
them before the next round.  Figures are the medians of the rounds, ratios the medians of the ratios within a
round.
Contenders that cannot be imported are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import machine

from paged_kv.commands.info import read_gb_per_s
from paged_kv.machine import num_cpus
from paged_kv.models.decoder import DecoderModel
from paged_kv.models.model_files import ModelFiles, found_path
from paged_kv.models.tensor_file import write_tensors

#: Measurements: (the worker's words, tokens of a step).
WHAT = {
    "a prompt of 512": ("prompt", 512),
    "decode, 1 stream": ("decode 1 64 48", 1),
    "decode, 16 streams": ("decode 16 64 24", 16),
    "1 stream, 1,024 tokens": ("decode 1 1024 24", 1),
    "16 streams, 1,024 tokens each": ("decode 16 1024 12", 16),
}
OURS = {
    "ours, int8": ("int8", "int8", "bfloat16"),
    "ours, bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
}
LLAMA_TYPES = {"Q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16"}
READ_BYTES = 256 << 20


class Contender:
    def __init__(self, *words: str) -> None:
        worker = Path(__file__).with_name("real_model_workers.py")
        self.process = subprocess.Popen(
            [sys.executable, str(worker), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.is_ready = self.process.stdout.readline().strip() == "ready"

    def seconds(self, words: str) -> float | None:
        """The median of what it measured, but for the first step; None where it failed."""
        if not self.is_ready:
            return None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.is_ready = bool(line.strip())
        times = json.loads(line) if self.is_ready else []
        return statistics.median(times[1:] or times) if times else None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def contenders(folder: Path, only: list[str] | None) -> dict[str, Contender]:
    """By their names; files of other types are written into the folder."""
    files = ModelFiles.open("smollm2")
    words = {name: ("ours", *options) for name, options in OURS.items()}
    fields = files.fields.plain() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields))
    write_tensors(folder / "model.safetensors", dict(files.checkpoint.tensors))
    for dtype in ("float32", "bfloat16"):
        for cache in ("dynamic", "static"):
            words[f"transformers {dtype}, {cache}"] = ("transformers", str(folder), dtype, cache)
    words["llama.cpp Q4_1"] = ("llama.cpp", str(found_path("smollm2")))
    words |= {f"llama.cpp {name}": ("llama.cpp", str(folder / f"{name}.gguf")) for name in LLAMA_TYPES}
    words = {name: spec for name, spec in words.items() if not only or name in only}
    if any(name.startswith("llama.cpp") for name in words):
        write_llama_files(folder)
    return {name: Contender(*spec) for name, spec in words.items()}


def write_llama_files(folder: Path) -> None:
    try:
        import llama_cpp
    except ImportError:
        return
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    for name, kind in LLAMA_TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = (
            getattr(llama_cpp, f"LLAMA_FTYPE_{kind}"),
            True,
            2,
        )
        source, target = str(found_path("smollm2")).encode(), str(folder / f"{name}.gguf").encode()
        llama_cpp.llama_model_quantize(source, target, params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", metavar="CONTENDER")
    parser.add_argument("--what", nargs="*", default=list(WHAT), choices=list(WHAT))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(Path(folder), options.only)
        rates = {what: {name: [] for name in found} for what in options.what}
        for round_number in range(options.rounds + 1):  # the first does not count
            for what in options.what:
                words, num_tokens = WHAT[what]
                for name, contender in found.items():
                    seconds = contender.seconds(words)
                    if seconds is not None and round_number:
                        rates[what][name].append(num_tokens / seconds)
        first = next(iter(found))
        loads = [found[first].seconds("load") for _ in range(3)] if first in OURS else []
        for contender in found.values():
            contender.close()
    show(rates, loads)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"machine": machine(), "rates": rates, "loads": loads}, indent=1)
        )


def show(rates: dict[str, dict[str, list[float]]], loads: list[float]) -> None:
    names = list(next(iter(rates.values())))
    print(f"{'tokens/s (our int8 is so many times as fast)':30}")
    print(f"{'':32}" + "".join(f"{what:>32}" for what in rates))
    for name in names:
        cells = []
        for by_name in rates.values():
            values, base = by_name[name], by_name[names[0]]
            if not values:
                cells.append("-")
                continue
            ratio = statistics.median(b / v for b, v in zip(base, values, strict=False))
            cells.append(f"{statistics.median(values):,.1f} ({ratio:.2f})")
        print(f"{name:32}" + "".join(f"{cell:>32}" for cell in cells))
    ceiling = read_gb_per_s(READ_BYTES, num_cpus())
    print(f"read ceiling {ceiling:.1f} GB/s")
    for name, (weights, head, _) in OURS.items():
        values = rates.get("decode, 1 stream", {}).get(name)
        if values:
            num_bytes = DecoderModel.from_pretrained("smollm2", weights=weights, head=head).weight_bytes
            share = num_bytes * statistics.median(values) / 1e9 / ceiling
            print(f"{name}: 1 stream reads {num_bytes / 1e6:.0f} MB a token, {share:.2f} of the ceiling")
    if loads:
        print(f"from the file to the first token: {statistics.median(loads):.2f} s")


if __name__ == "__main__":
    main()
