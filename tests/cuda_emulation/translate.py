#!/usr/bin/env python3
"""Turns a .cu file of ours into C++ for emulation.h: translate.py in.cu out.cc"""
import os
import re
import sys


def arguments(text):
    """Splits at commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def launch(match):
    kernel, configuration, argument = match.groups()
    grid, block, shared, stream = arguments(configuration)
    return (f"::innerq::emulation::EmulateKernel({{{grid}, {block}, {shared}, {stream}}}, "
            f"[=] {{ {kernel}({argument}); }})")


def read(path):
    """The file's text, with that of headers that have kernels in place of their inclusion."""

    def inline(match):
        header = read(os.path.join(root, match.group(1)))
        return header.replace("#pragma once", "") if "__global__" in header else match.group(0)

    text = open(path, encoding="utf-8").read()
    return re.sub(r'^#include "(kernels/cuda/\w+\.cuh)"$', inline, text, flags=re.M)


root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
source = read(sys.argv[1])
source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];",
                r"\1* \2 = reinterpret_cast<\1*>(::innerq::emulation::dynamic_shared);", source)
source = re.sub(r"(\w+(?:<[\w, ]+>)?)<<<(.+?)>>>\((\w+)\)", launch, source, flags=re.S)
assert "<<<" not in source, "a launch that translate.py does not understand"
with open(sys.argv[2], "w", encoding="utf-8") as out:
    out.write('#include "tests/cuda_emulation/emulation.h"\n' + source)
