"""`paged-kv chat`: a conversation with a model, in a terminal or for a script.

    the whole conversation ── chat template ── cache.sequence(ids) ── generate ── text, as it comes

Each turn renders the conversation from its beginning.  The prefix cache is the memory: of what earlier turns
have computed, nothing is computed again.

Imports model_options and generate.
"""

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from .._binding import integer, kernels
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..machine import num_cpus
from ..models.report import GenerationReport
from ..pages.layout import num_pages
from ..serving.generate import PAGE_SIZE, generate_stream
from .bench_model import rounded
from .live_line import LiveLine
from .model_options import Opened, opened, sampling_of
from .texts import require_text

#: Lines that are no message.
RESET, END = "/reset", "/exit"


@dataclass
class Turn:
    """What an answer took."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    pages_in_use: int
    pages: int


class Conversation:
    """Messages so far, and the cache that remembers them.

    found : the model
    cache : holds a conversation of the longest length
    max_tokens : of an answer
    sampling : as generate_stream takes it
    system : what the system says first; None: what the template says
    """

    def __init__(
        self,
        found: Opened,
        cache: PagedKVCache,
        max_tokens: int,
        sampling: dict[str, Any],
        stop: list[str],
        system: str | None = None,
    ) -> None:
        self._found, self.cache = found, cache
        self._max_tokens, self._sampling, self._stop = max_tokens, sampling, stop
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self.turn: Turn | None = None

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = list(self._system)

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, piece by piece; when it has ended, `turn` says what it took.

        An answer that is left early, by an exception or by closing the iterator, stays as far as it came.
        Raises: ArgumentError when the conversation has become too long, or the template refuses it.
        """
        model, tokenizer = self._found.model, self._found.tokenizer
        question = {"role": "user", "content": text}
        ids = tokenizer.chat([*self.messages, question])
        room = min(model.config.max_position_embeddings, self.cache.max_seq_len or len(ids)) - len(ids)
        if room < 1:
            raise ArgumentError(
                f"the conversation has {len(ids)} tokens, at most {len(ids) + room} fit; "
                f"{RESET} begins another one"
            )
        report, stream, pieces, num_new = GenerationReport(), tokenizer.stream(self._stop), list[str](), 0
        new = generate_stream(
            model,
            [ids],
            max_new_tokens=min(room, self._max_tokens),
            **self._sampling,
            tokenizer=tokenizer,
            stop=self._stop,
            cache=self.cache,
            report=report,
        )
        try:
            with closing(new):
                for _, id in new:
                    if isinstance(id, Exception):
                        raise id
                    num_new += 1
                    pieces.append(stream.add(id))
                    yield pieces[-1]
            pieces.append(stream.finish())
            yield pieces[-1]
        finally:
            said = "".join(pieces)
            self.messages += [question, {"role": "assistant", "content": said}]
            stats = self.cache.stats()
            self.turn = Turn(
                text=said,
                prompt_tokens=len(ids),
                cached_tokens=report.num_cached_tokens,
                new_tokens=num_new,
                prefill_tokens_per_s=_per_s(report.num_prompt_tokens, report.prefill_ns),
                decode_tokens_per_s=_per_s(num_new - 1, report.decode_ns),
                pages_in_use=stats.num_used_pages + stats.num_kept_pages,
                pages=stats.num_pages,
            )


def _per_s(count: int, ns: int) -> float:
    return 1e9 * count / ns if ns else 0.0


def run(options: argparse.Namespace) -> int:
    """The command; 0 when it went well."""
    texts = [require_text("--prompt", text) for text in options.prompt or []]
    system = None if options.system is None else require_text("--system", options.system)
    integer("--max-tokens", options.max_tokens, 1)
    if options.json and not texts:
        raise ArgumentError("--json needs --prompt")
    found = opened(options, LiveLine(sys.stderr))
    positions = found.model.config.max_position_embeddings
    context = integer(
        "--context", min(positions, 4096) if options.context is None else options.context, 1, positions
    )
    with found.model.new_cache(
        # A page more: the end of the last answer is written again by the next turn.
        num_pages=num_pages(context, PAGE_SIZE) + 1,
        page_size=PAGE_SIZE,
        max_sequences=1,
        **(found.cache_options | {"max_seq_len": context}),
    ) as cache:
        conversation = Conversation(
            found, cache, options.max_tokens, sampling_of(options), options.stop, system
        )
        if texts:
            for text in texts:
                show(conversation, text, options.json)
            return 0
        print(f"kernel {kernels().active}, {num_cpus()} threads, {context} tokens of context.", end=" ")
        print(f"{RESET} begins another conversation, {END} or Ctrl-D ends, Ctrl-C interrupts an answer.")
        converse(conversation, sys.stdin)
    return 0


def converse(conversation: Conversation, source: TextIO) -> None:
    """Answer each line, until the last one or END."""
    while True:
        print("\n> ", end="", flush=True)
        line = source.readline()
        text = line.strip()
        if not line or text == END:
            print()
            return
        if text == RESET:
            conversation.reset()
            print("A new conversation.")
        elif text:
            try:
                show(conversation, text, False)
            except ArgumentError as error:  # of this message; the conversation can go on
                print(f"paged-kv: {error}")


def show(conversation: Conversation, text: str, as_json: bool) -> None:
    """Answer, as it comes, and say what it took; or as one line of JSON."""
    with closing(conversation.answer(text)) as pieces:
        try:
            for piece in pieces:
                if not as_json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if as_json:
                raise
    turn = conversation.turn
    assert turn is not None
    if as_json:
        print(json.dumps({name: rounded(value) for name, value in asdict(turn).items()}))
        return
    print(
        f"\n[{turn.new_tokens} tokens, {turn.decode_tokens_per_s:,.0f} a second; "
        f"prompt of {turn.prompt_tokens}, {turn.cached_tokens} of them cached; "
        f"{turn.pages_in_use} of {turn.pages} pages]"
    )
