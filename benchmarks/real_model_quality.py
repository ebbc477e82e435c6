"""What rounding weights, head and pages costs a real model, against transformers in float32.

    make smollm2 && pip install -e ".[hf,gguf]" && python benchmarks/real_model_quality.py [--json FILE]

The next-token distributions of a page of English (tests/real_model/page.txt): the largest and the mean
difference of logits, the mean Kullback-Leibler divergence, how often the likeliest token is the same, and the
perplexity.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from paged_kv.models.decoder import DecoderModel
from paged_kv.models.model_files import ModelFiles
from paged_kv.models.tensor_file import write_tensors
from paged_kv.text.tokenizer import ModelTokenizer

PAGE = Path(__file__).parents[1] / "tests" / "real_model" / "page.txt"
#: Weights, head and pages.
SETTINGS = [
    *(("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "float32")),
    *(("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "bfloat16", "float16")),
    *(("bfloat16", "int8", "float32"), ("int8", "float32", "float32")),
    *(("int8", "bfloat16", "bfloat16"), ("int8", "int8", "bfloat16")),
]


def ours(files: ModelFiles, ids: list[int], weights: str, head: str, kv_dtype: str) -> np.ndarray:
    """Logits after each token, float32 [num_ids, vocab_size]."""
    model = DecoderModel.from_pretrained(files, weights=weights, head=head)
    cache = model.new_cache(num_pages=-(-len(ids) // 64), dtype=kv_dtype)
    with cache, cache.step([cache.sequence()], [len(ids)]) as step:
        return model.forward(ids, step, np.arange(len(ids)))


def theirs(files: ModelFiles, ids: list[int], dtype: str) -> np.ndarray:
    """The same by transformers, from the weights that the file holds, dequantised."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = files.fields.plain() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(fields))
        write_tensors(folder / "model.safetensors", dict(files.checkpoint.tensors))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def compared(got: np.ndarray, expected: np.ndarray, ids: list[int]) -> dict[str, float]:
    p, q = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), 1)[:, None] for x in (expected, got)
    )
    divergence = (np.exp(p) * (p - q)).sum(1)
    return {
        "largest": float(np.abs(got - expected).max()),
        "rms": float(np.sqrt(np.square(got - expected).mean())),
        "divergence": float(divergence.mean()),
        "same": float((got.argmax(1) == expected.argmax(1)).mean()),
        "perplexity": float(np.exp(-q[np.arange(len(ids) - 1), ids[1:]].mean())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    options = parser.parse_args()
    files = ModelFiles.open("smollm2")
    ids = ModelTokenizer.from_pretrained(files).encode(PAGE.read_text())
    expected = theirs(files, ids, "float32")
    rows = {"transformers, float32": compared(expected, expected, ids)}
    rows["transformers, bfloat16"] = compared(theirs(files, ids, "bfloat16"), expected, ids)
    for setting in SETTINGS:
        rows["weights {}, head {}, pages {}".format(*setting)] = compared(
            ours(files, ids, *setting), expected, ids
        )
    print(f"{'':50} {'largest':>8} {'rms':>8} {'mean KL':>9} {'same':>8} {'perplexity':>11}")
    for name, row in rows.items():
        print(
            f"{name:50} {row['largest']:8.3f} {row['rms']:8.4f} {row['divergence']:9.1e} "
            f"{100 * row['same']:6.2f} % {row['perplexity']:11.4f}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
