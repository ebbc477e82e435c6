"""What a generation took: tokens, steps and times."""

from dataclasses import dataclass


@dataclass
class Stopwatch:
    """Seconds that were spent, as far as a timed thing counted them."""

    seconds: float = 0.0


@dataclass
class GenerationReport:
    """What a generation took.  Times are of steps that held prompt tokens, and of those that held none.

    num_prompt_tokens : computed
    num_cached_tokens : of prompts, that the cache had
    num_preemptions : requests that were sent back to wait, since the pool was full
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0

    def count_step(self, num_prompt_tokens: int, num_new_tokens: int, elapsed_ns: int) -> None:
        self.num_steps += 1
        self.num_prompt_tokens += num_prompt_tokens
        self.num_new_tokens += num_new_tokens
        if num_prompt_tokens:
            self.prefill_ns += elapsed_ns
        else:
            self.decode_ns += elapsed_ns

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, prefill included."""
        elapsed_ns = self.prefill_ns + self.decode_ns
        return self.num_new_tokens / elapsed_ns * 1e9 if elapsed_ns else 0.0

    def __str__(self) -> str:
        cached = f" ({self.num_cached_tokens:,} prompt tokens cached)" if self.num_cached_tokens else ""
        return (
            f"{self.num_prompt_tokens:,} prompt and {self.num_new_tokens:,} new tokens in {self.num_steps:,} "
            f"steps{cached}: prefill {self.prefill_ns / 1e6:,.0f} ms, decode {self.decode_ns / 1e6:,.0f} ms, "
            f"{self.tokens_per_s:,.1f} tokens/s"
        )
