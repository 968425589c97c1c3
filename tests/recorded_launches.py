"""Checks that compile_report records, on tensors without data, the launches that launchers make on tensors in memory.

test_bench_gpu.py runs it in a process where Triton does not interpret.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from gptkernels import _triton, compile_report
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, outputs

TARGET = compile_report.TARGETS["sm_90"]


def keys(recorded: list[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """For each launch the kernel's name and the key of Triton's cache."""
    return {
        (source.name, source.hash(), str(target), str(sorted(options.items()))) for source, target, options in recorded
    }


def main() -> None:
    checked = 0
    for spec in SPECS:
        if "triton" not in FUSED[spec.name]:
            continue
        for case in spec.cases:
            with compile_report._recorded(TARGET) as recorded:
                compile_report._run_without_data(spec, case, torch.bfloat16)
            with (
                compile_report._recorded(TARGET) as launched,
                mock.patch.object(_triton, "_device", create=True) as device,
            ):
                device.return_value = TARGET.multiprocessors, TARGET.launcher_arch
                inputs = spec.make_inputs(case, torch.bfloat16, torch.device("cpu"), 0)
                with torch.no_grad():
                    spec.function(**inputs.tensors, **inputs.options, backend="triton")
                leaves = inputs.mapped(lambda t: t.requires_grad_())
                outs = outputs(spec.function(**leaves.tensors, **leaves.options, backend="triton"))
                outs = [out for out in outs if out.requires_grad]
                grads = [torch.ones_like(out) for out in outs]
                torch.autograd.grad(outs, list(leaves.differentiable().values()), grads, allow_unused=True)
            missing = {key[0] for key in keys(launched) - keys(recorded)}
            assert not missing, f"{spec.name} {case.name}: launched otherwise than recorded: {missing}"
            checked += len(launched)
    assert checked > 100
    print("all the same")


if __name__ == "__main__":
    main()
