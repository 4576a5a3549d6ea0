#!/usr/bin/env python3
"""Runs a program under Nsight Compute and prints how long its kernels take.

Usage: kernel_times.py PROGRAM [ARGUMENT ...]
Prints a line per kernel and grid, most time first: launches, mean microseconds, mean share of the
device memory's peak bandwidth, grid, name. Caches are emptied before each kernel and clocks are
locked (ncu's defaults), so times compare with each other, not with those of a program that runs
freely. It is no error that there is no ncu, or none that may count: a line says so.
"""
import collections
import csv
import re
import shutil
import subprocess
import sys
import tempfile

TIME, MEMORY = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"


def short_name(name):
    """A demangled kernel's name without its parameters, our namespaces, and types of constants."""
    name = re.sub(r"\((int|bool|unsigned int)\)|innerq::|cuda::|^void |"
                  r"(\(anonymous namespace\)|<unnamed>)::", "", name)
    depth = 0
    for at in range(len(name) - 1, -1, -1):  # of the brackets that end the name
        depth += (name[at] == ")") - (name[at] == "(")
        if depth == 0:
            return name[:at] if name.endswith(")") else name
    return name


def read_kernels(lines):
    """(name, grid, microseconds, percent of the peak) of each launch in ncu's raw page as CSV."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(lines[begin:])
    units = next(rows, None)
    if units is None:
        return []
    assert units[TIME] in ("ns", "nsecond"), f"expected nanoseconds, found {units[TIME]!r}"
    number = lambda text: float(text.replace(",", ""))  # noqa: E731
    return [(short_name(row["Kernel Name"]), row["Grid Size"], number(row[TIME]) / 1000,
             number(row[MEMORY])) for row in rows]


def main():
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if shutil.which("ncu") is None:
        print("no ncu here: skipped")
        return 0
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base",
                   "--metrics", f"{TIME},{MEMORY}", "--log-file", log.name, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        lines = log.read().splitlines()
    if any("ERR_NVGPUCTRPERM" in line for line in lines):
        print("ncu may not read this device's counters: skipped")
        return 0
    kernels = read_kernels(lines) if done.returncode == 0 else []
    if not kernels:
        print(f"ncu ended with {done.returncode} and no kernels:", *lines[-5:], sep="\n  ")
        return 1
    groups = collections.defaultdict(list)
    for name, grid, *measured in kernels:
        groups[name, grid].append(measured)
    print(f"{'launches':>8} {'us':>9} {'memory':>7}  {'grid':18} kernel")
    total = lambda group: sum(us for us, _ in group[1])  # noqa: E731
    for (name, grid), rows in sorted(groups.items(), key=total, reverse=True):
        times, shares = zip(*rows)
        count = len(rows)
        print(f"{count:8} {sum(times) / count:9.1f} {sum(shares) / count:6.0f}%  {grid:18} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
