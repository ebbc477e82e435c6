"""What does a crowd of chats get from a server: tokens a second, waiting times, memory?

    python benchmarks/serving.py [--chats 200] [--rate 2.0] [--only ours,vllm] [--json FILE] [--plot FILE]

Chats, each with one of a few system prompts and some turns, arrive as a Poisson process; a turn is sent when
the answer to the one before has come.  Each server is started by itself, with the same weights (SmolLM2-135M,
from `make smollm2`), answers the same trace over its HTTP API, streamed and greedy, and is ended.  Rivals run
in environments of their own: .venv-serving (make .venv-serving/ready), or --python NAME=PATH; one that is
missing is a row that says so.  After --limit seconds a server is ended: `requests` of `of` were answered,
and tokens of others count too, but not the waits of those that had none.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness import LiveLine, machine, packed, show

from paged_kv.files import replace_files
from paged_kv.models.model_files import found_path

ROOT = Path(__file__).parents[1]
RIVALS = ROOT / ".venv-serving"
WORDS = [
    "time",
    "people",
    "water",
    "city",
    "history",
    "music",
    "science",
    "energy",
    "light",
    "market",
    "river",
]
WORDS += ["mountain", "letter", "garden", "winter", "summer", "language", "number", "picture", "question"]
WORDS += ["answer", "travel", "kitchen", "office", "school", "doctor", "teacher", "morning", "evening"]
QUESTIONS = (
    "What is the most important thing to know about {}?",
    "Write two sentences about {} and {}.",
    "How does {} change over time, and why does it matter for {}?",
    "List three facts about {}.",
    "Explain {} to a child who has only seen {}.",
)
#: Seconds for a server to start, and for a request.
START_SECONDS, REQUEST_SECONDS = 300.0, 900.0


@dataclass
class Chat:
    """One client: when it comes, and what it says."""

    arrival: float
    system: str
    turns: list[str]


def trace(num_chats: int, rate: float, seed: int = 0) -> list[Chat]:
    """Chats by Poisson arrivals; eight system prompts of 60 to 300 words, one to four turns."""
    rng, now = random.Random(seed), 0.0
    systems = []
    for i in range(8):
        words = rng.choices(WORDS, k=rng.randint(60, 300))
        systems.append(f"You are assistant number {i}. Keep in mind: {' '.join(words)}.")
    chats = []
    for _ in range(num_chats):
        now += rng.expovariate(rate)
        turns = [
            rng.choice(QUESTIONS).format(*rng.sample(WORDS, 2)) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))
        ]
        chats.append(Chat(now, rng.choice(systems), turns))
    return chats


@dataclass
class Result:
    """What one request took; times in seconds.

    sent : since the trace began
    total : 0 while it goes on
    waits : between two pieces of text
    """

    sent: float
    first: float = 0.0
    total: float = 0.0
    num_tokens: int = 0
    waits: list[float] = field(default_factory=list)
    error: str = ""
    text: str = ""


async def ask(port: int, model: str, messages: list[dict[str, str]], max_tokens: int, result: Result) -> None:
    """A streamed chat completion, read with as little work as can be; the result fills as it comes."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    )
    head += f"Connection: close\r\nAuthorization: Bearer none\r\nContent-Length: {len(data)}\r\n\r\n"
    sent = last = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            result.error = (status + await reader.read(300)).decode(errors="replace")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices") or [{}]
            text = (choices[0].get("delta") or {}).get("content")
            if text:
                now = time.perf_counter()
                if result.num_tokens:
                    result.waits.append(now - last)
                else:
                    result.first = now - sent
                last, result.num_tokens = now, result.num_tokens + 1
                result.text += text
        writer.close()
    except OSError as error:
        result.error = repr(error)
    result.total = time.perf_counter() - sent


async def play(
    port: int, model: str, chats: list[Chat], max_tokens: int, limit: float, live: LiveLine, name: str
) -> tuple[list[Result], float]:
    """All chats; their results, and the seconds from the first arrival to the last answer, or the limit."""
    results: list[Result] = []
    begin = time.perf_counter()

    async def one(chat: Chat) -> None:
        await asyncio.sleep(max(0.0, chat.arrival - (time.perf_counter() - begin)))
        messages = [{"role": "system", "content": chat.system}]
        for turn in chat.turns:
            messages.append({"role": "user", "content": turn})
            result = Result(time.perf_counter() - begin)
            results.append(result)
            await asyncio.wait_for(ask(port, model, messages, max_tokens, result), REQUEST_SECONDS)
            messages.append({"role": "assistant", "content": result.text or "-"})
            live.update(f"{name}: {len(results)} of {sum(len(chat.turns) for chat in chats)} answers")

    tasks = [asyncio.create_task(one(chat)) for chat in chats]
    await asyncio.wait(tasks, timeout=limit)
    seconds = time.perf_counter() - begin - chats[0].arrival
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return results, seconds


# ---- servers


@dataclass
class Server:
    """How a server is started, and what the model is called there."""

    command: list[str]
    model: str
    environment: dict[str, str] = field(default_factory=dict)


def servers(port: int, gguf: Path, folder: Path, pythons: dict[str, str]) -> dict[str, Server]:
    def command(python: str, module: str, *options: object) -> list[str]:
        return [python, "-m", module, *map(str, options), "--host", "127.0.0.1", "--port", str(port)]

    offline = {"HF_HUB_OFFLINE": "1"}
    ours = ("serve", "--model", gguf, "--name", "ours", "--memory", "512MiB")
    transformers = ("serve", folder, "--continuous-batching", "--device", "cpu")
    # Without the CPU's products of bfloat16, float32 is what is fast for them.
    dtype = "bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
    transformers += ("--dtype", dtype)
    llama = ("--model", gguf, "--n_ctx", 4096, "--n_threads", 2, "--interrupt_requests", "false")
    vllm = ("--model", folder, "--served-model-name", "m", "--dtype", dtype, "--max-model-len", 4096)
    module = "vllm.entrypoints.openai.api_server"
    return {
        "ours": Server(command(sys.executable, "paged_kv", *ours), "ours"),
        "transformers": Server(
            command(pythons["transformers"], "transformers.cli.transformers", *transformers),
            str(folder),
            offline,
        ),
        "llama-cpp-python": Server(command(pythons["llama-cpp-python"], "llama_cpp.server", *llama), "any"),
        "vllm": Server(
            command(pythons["vllm"], module, *vllm), "m", offline | {"VLLM_CPU_KVCACHE_SPACE": "2"}
        ),
    }


def processes(root: int) -> list[int]:
    """A process and those that it has started."""
    found = [root]
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            for child in task.read_text().split():
                found += processes(int(child))
        except OSError:
            continue
    return found


def peak_mib(root: int) -> float:
    """The most memory that each of these processes had, added up."""
    total = 0
    for process in processes(root):
        try:
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_until_ready(port: int, model: str, process: subprocess.Popen) -> str:
    """Ask for a token until it comes; or what went wrong."""
    end = time.monotonic() + START_SECONDS
    message = [{"role": "user", "content": "Hi"}]
    while time.monotonic() < end:
        if process.poll() is not None:
            return f"ended with {process.returncode}"
        result = Result(0.0)
        await ask(port, model, message, 2, result)
        if result.num_tokens:
            return ""
        await asyncio.sleep(0.5)
    return f"did not answer within {START_SECONDS:.0f} s: {result.error}"


def measure(
    name: str,
    server: Server,
    port: int,
    chats: list[Chat],
    max_tokens: int,
    limit: float,
    live: LiveLine,
    log: Path,
) -> dict[str, object]:
    """One server's row."""
    row: dict[str, object] = {"server": name, "of": sum(len(chat.turns) for chat in chats)}
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                server.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | server.environment,
                start_new_session=True,
            )
        except OSError as error:
            return row | {"note": f"missing: {error}"}
    try:
        live.update(f"{name}: starting")
        problem = asyncio.run(wait_until_ready(port, server.model, process))
        if problem:
            return row | {"note": f"missing: {problem}; {log}"}
        results, seconds = asyncio.run(play(port, server.model, chats, max_tokens, limit, live, name))
        row |= summary(results, seconds) | {"peak_MiB": round(peak_mib(process.pid))}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        live.clear()
    return row


def summary(results: list[Result], seconds: float) -> dict[str, object]:
    """Rates, and quantiles in milliseconds."""
    good = [result for result in results if not result.error and result.num_tokens]
    num_tokens, num_whole = (
        sum(result.num_tokens for result in good),
        sum(result.total > 0 for result in good),
    )
    row: dict[str, object] = {
        "requests": num_whole,
        "failed": sum(bool(result.error) for result in results),
        "seconds": round(seconds, 1),
        "requests_per_s": round(num_whole / seconds, 2),
        "tokens_per_s": round(num_tokens / seconds, 1),
    }
    for name, values in (
        ("first_ms", [result.first for result in good]),
        ("between_ms", [wait for result in good for wait in result.waits]),
    ):
        cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
        for share in (50, 95, 99):
            row[f"{name}_p{share}"] = round(1e3 * cuts[share - 1], 1)
    return row


def export_folder(python: str, gguf: Path, folder: Path) -> str:
    """The same weights as a folder of transformers, in bfloat16; or what went wrong."""
    if (folder / "model.safetensors").is_file():
        return ""
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "path, name, out = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(path, gguf_file=name, dtype=torch.bfloat16)\n"
        "if hasattr(model.config, 'quantization_config'): del model.config.quantization_config\n"
        "plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)\n"
        "plain.load_state_dict(model.state_dict())\n"
        "plain.save_pretrained(out)\n"
        "AutoTokenizer.from_pretrained(path, gguf_file=name).save_pretrained(out)\n"
    )
    command = [python, "-c", code, str(gguf.parent), gguf.name, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr[-400:]


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Tokens a second and times to the first token."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "tokens_per_s" in row]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(row["server"]) for row in rows]
    colours = ["#0072b2", *["#999999"] * (len(rows) - 1)]
    left.barh(names, [row["tokens_per_s"] for row in rows], color=colours)
    left.set(xlabel="tokens a second")
    left.invert_yaxis()
    for offset, share in enumerate((50, 95, 99)):
        places = [i + 0.25 * (offset - 1) for i in range(len(rows))]
        values = [max(1.0, float(row[f"first_ms_p{share}"])) / 1e3 for row in rows]
        right.barh(places, values, 0.22, label=f"p{share}", color=("#56b4e9", "#0072b2", "#003a5d")[offset])
    right.set(xlabel="seconds to the first token", xscale="log", yticks=range(len(rows)), yticklabels=[])
    right.invert_yaxis()
    right.legend()
    replace_files({path: lambda file: figure.savefig(file, format=path.suffix[1:] or "png")})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2.0, help="chats that come in a second (default 2)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument(
        "--limit",
        type=float,
        default=300.0,
        help="seconds for a server; what is not answered then is left out of its times (default 300)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of servers, with commas")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="of a rival")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "serving", help="for logs and the folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    options = parser.parse_args()
    pythons = dict.fromkeys(("transformers", "llama-cpp-python", "vllm"), str(RIVALS / "bin" / "python"))
    pythons |= dict(pair.split("=", 1) for pair in options.python)
    options.build.mkdir(parents=True, exist_ok=True)
    gguf, folder = found_path("smollm2"), options.build / "smollm2"
    live, rows = LiveLine(sys.stderr), []
    chats = trace(options.chats, options.rate, options.seed)
    only = None if options.only is None else options.only.split(",")
    if only is None or {"transformers", "vllm"} & set(only):
        live.update("writing the weights as a folder")
        problem = export_folder(pythons["transformers"], gguf, folder)
        if problem:
            print(f"the folder of weights could not be written: {problem}", file=sys.stderr)
    port = free_port()
    for name, server in servers(port, gguf, folder, pythons).items():
        if only is None or name in only:
            log = options.build / f"{name}.log"
            rows.append(measure(name, server, port, chats, options.max_tokens, options.limit, live, log))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    show([{name: row.get(name, "") for name in columns} for row in rows], False)
    if options.json is not None:
        content = {"machine": machine(), "trace": [vars(options)], "serving": rows}
        replace_files(
            {options.json: lambda file: file.write(packed(json.loads(json.dumps(content, default=str))))}
        )
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
