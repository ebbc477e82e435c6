"""What transformers says of SmolLM2-135M-Instruct, in float32, from the GGUF file that it reads itself.

    pip install -e ".[hf,gguf]" && make smollm2 && python tests/real_model/make_reference.py

Writes reference.npz: the perplexity of page.txt, the largest logits at some of its positions, and answers to
a few questions, the likeliest token each time.  Takes some minutes.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from paged_kv.models.model_files import found_path

HERE = Path(__file__).parent
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue?",
    "Give me three tips for a good night's sleep.",
    "Translate to French: good morning, my friends.",
    "Write one sentence about a lighthouse.",
]
NUM_POSITIONS, NUM_LARGEST, NUM_NEW = 32, 64, 48


@torch.no_grad()
def main() -> None:
    path = found_path("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer((HERE / "page.txt").read_text(), return_tensors="pt").input_ids
    logits = model(ids).logits[0]
    chosen = torch.log_softmax(logits[:-1].double(), -1).gather(1, ids[0, 1:, None])
    positions = np.linspace(0, len(logits) - 1, NUM_POSITIONS).astype(int)
    largest = logits[positions].topk(NUM_LARGEST)
    found = {
        "ids": ids[0].numpy().astype(np.int32),
        "perplexity": np.exp(-chosen.mean().item()),
        "positions": positions.astype(np.int32),
        "largest_ids": largest.indices.numpy().astype(np.int32),
        "largest_logits": largest.values.numpy(),
        "questions": np.array(QUESTIONS),
    }
    for i, question in enumerate(QUESTIONS):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        new = model.generate(prompt, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=2)[0]
        found[f"prompt_{i}"] = prompt[0].numpy().astype(np.int32)
        found[f"answer_{i}"] = new[prompt.shape[1] :].numpy().astype(np.int32)
        print(question, "--", tokenizer.decode(found[f"answer_{i}"]))
    np.savez_compressed(HERE / "reference.npz", **found)
    print("perplexity", found["perplexity"])


if __name__ == "__main__":
    main()
