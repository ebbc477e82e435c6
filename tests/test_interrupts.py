"""Signals at random moments lose nothing and hang nothing: a short campaign, in a process of its own.

`make test-long` runs it for minutes, from a fixed seed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import SEED

SECONDS = float(os.environ.get("PAGED_KV_INTERRUPT_SECONDS", "4"))


def test_signals_at_random_moments_lose_nothing():
    """Notebooks, timeouts by signal and SIGUSR1 statistics interrupt a call between any two lines."""
    script = Path(__file__).with_name("interrupts.py")
    seed = 1 if SECONDS > 60 else SEED
    command = [sys.executable, str(script), "--seconds", str(SECONDS), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 120)
    assert done.returncode == 0, done.stderr[-3000:]
    walks, interrupts, calls = map(int, re.findall(r"\d+", done.stdout))
    assert walks >= 1 and interrupts >= 50 and calls >= 1
