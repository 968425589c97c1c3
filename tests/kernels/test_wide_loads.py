"""Loads and stores of 16 bytes where rows end or start anywhere, in the PTX of an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

SCRIPT = """
import json, re, sys
import triton
from gptkernels import compile_report
op, cases = sys.argv[1:]
for launch in compile_report.launches(["sm_90"], [op], ["bf16"]):
    if cases in launch.case:
        ptx = triton.compile(launch.source, target=launch.gpu, options=launch.options).asm["ptx"]
        found = re.findall(r"\\b(ld|st)\\.global\\S*?\\.(v4\\.b32|b16)", ptx)
        print(json.dumps([launch.source.fn.__name__, [f"{access} {width}" for access, width in found]]))
"""


def accesses(op: str, cases: str) -> list[tuple[str, Counter[str]]]:
    """The kernels of `cases`, each with its accesses of 16 bytes and of 2: "ld v4.b32", "st b16" and so on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, op, cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(kernel, Counter(found)) for kernel, found in map(json.loads, done.stdout.splitlines())]


def test_causal_softmax():
    found = accesses("softmax", "-causal")
    assert len(found) == 4  # rows in registers and longer ones, forward and backward
    for _, kernel in found:
        assert kernel["ld v4.b32"] > 0
        assert kernel["st v4.b32"] > 0
        assert kernel["ld b16"] == kernel["st b16"] == 0


def test_cross_entropy_of_an_odd_number_of_classes():
    alone, with_gradient = (
        kernel for name, kernel in accesses("cross_entropy", "1024x50257") if name == "_long_kernel"
    )
    # The target's logit and the row's edges are read 2 bytes at a time, and the edges' gradient is written so.
    assert alone == {"ld v4.b32": 2, "ld b16": alone["ld b16"]}
    assert with_gradient["ld v4.b32"] == 4
    assert with_gradient["st v4.b32"] == 2
    assert max(alone["ld b16"], with_gradient["ld b16"], with_gradient["st b16"]) <= 2
