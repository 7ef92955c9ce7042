"""``python -m tests.fuzz --seconds S``: the fuzz tests with one seed after the other.

Each round is a run of pytest with ``--hypothesis-seed``, which is printed; the same seed tries the
same again. The status is that of the first round that found something, else 0.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.bounds import EXAMPLES_VARIABLE

FOLDER = Path(__file__).parent
DEFAULT_S = 600.0
EXAMPLES = 1000
"""Per test and round; a round takes a few minutes."""
KILL_AFTER_S = 30.0
"""For the last round to end when its time is over."""
CUT_OFF = 124


def main() -> int:
    """Runs rounds until the time is over. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=DEFAULT_S, help="default: 600")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="per test and round")
    parser.add_argument("--seed", type=int, help="one round with it, as long as it takes")
    parser.add_argument("words", nargs="*", metavar="PYTEST_ARGUMENT", help="such as -- -k files")
    options = parser.parse_args()
    if options.seed is not None:
        return _round(options.seed, options.examples, options.words, None)
    end_s = time.monotonic() + options.seconds
    num_rounds = 0
    while (left_s := end_s - time.monotonic()) > 0:
        seed = random.SystemRandom().randrange(2**32)
        status = _round(seed, options.examples, options.words, left_s)
        if status == CUT_OFF:
            break
        if status != 0:
            print(f"found with --seed {seed}", flush=True)
            return status
        num_rounds += 1
    print(f"{num_rounds} whole rounds in {options.seconds:g} s, nothing found", flush=True)
    return 0


def _round(seed: int, examples: int, words: list[str], left_s: float | None) -> int:
    print(f"seed {seed}, {examples} examples of each test", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(FOLDER)]
    command += [f"--hypothesis-seed={seed}", "--timeout=0", *words]
    environment = {**os.environ, EXAMPLES_VARIABLE: str(examples)}
    with subprocess.Popen(command, env=environment) as run:
        try:
            return run.wait(left_s)
        except subprocess.TimeoutExpired:
            run.terminate()
            try:
                run.wait(KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                run.kill()
            print("the time is over; the last round was cut off", flush=True)
            return CUT_OFF


if __name__ == "__main__":
    sys.exit(main())
