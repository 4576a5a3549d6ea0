#!/usr/bin/env python3
"""The demo model must solve its problems and find its needles through the quantized cache.

Usage: test_demo_model.py BINARY CONFIG
A cache that is damaged shows here first: a needle at 2,000 tokens lies in sealed pages. Runs
models/training/measure.py on a part of the held-out sets. Standard library only.
"""

import pathlib
import subprocess
import sys

from server_process import serve

MEASURE = pathlib.Path(__file__).parents[2] / "models" / "training" / "measure.py"
ITEMS = 40


def main():
    binary, config = sys.argv[1:3]
    with serve(binary, config) as server:
        return subprocess.run(
            [sys.executable, MEASURE, "--url", server.url, "--limit", str(ITEMS),
             "--min-problems", "0.8", "--min-recall", "0.8"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
