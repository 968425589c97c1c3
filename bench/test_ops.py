"""Times every operation's bench cases, forward and backward, beside PyTorch's; wrong results fail before they are timed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gptkernels.testing import SPECS, Case, OpSpec, assert_within_budget, outputs

from bench import rows
from bench.measure import affordable, ceilings, device, own_backends, rounds_within, waiting
from bench.peers import peers

DTYPES = [torch.float32, torch.bfloat16]


def _points():
    for spec in SPECS:
        for dtype in DTYPES:
            for index, case in enumerate(affordable(spec, dtype)):
                compiled = device() == "cuda" or (index == 0 and dtype == torch.float32)
                for direction in ("forward", "backward"):
                    for name in [*own_backends(), *peers(spec, device(), compiled)]:
                        label = f"{spec.name}-{case.name}-{str(dtype).removeprefix('torch.')}-{direction}-{name}"
                        yield pytest.param(spec, case, dtype, direction, name, id=label)


@pytest.mark.parametrize(("spec", "case", "dtype", "direction", "contender"), _points())
def test_op(benchmark, spec: OpSpec, case: Case, dtype: torch.dtype, direction: str, contender: str):
    others = peers(spec, device(), compiled=contender == "compile")
    function = others.get(contender) or partial(spec.function, backend=contender)
    inputs = spec.make_inputs(case, dtype, torch.device(device()), 0)
    leaves = rows.with_gradients(inputs)
    outs = outputs(function(**leaves.tensors, **leaves.options))
    with torch.no_grad():
        exact = inputs.mapped(lambda t: t.double())
        plain, expected = (outputs(spec.reference(**i.tensors, **i.options)) for i in (inputs, exact))
        for triple in zip(outs, plain, expected):
            assert_within_budget(contender, *triple, plain_error=1e-4 if triple[0].numel() == 1 else None)
    flops, moved = rows.work(spec, case, dtype, direction)
    benchmark.group = rows.row_name(spec, case, dtype, direction)
    run = waiting(rows.calls(function, leaves, outs, rows.output_gradients(spec, outs))[direction])
    benchmark.pedantic(run, rounds=rounds_within(run, 4.0) if device() == "cpu" else 50, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    bandwidth, rate = ceilings(dtype)
    benchmark.extra_info.update(
        contender=contender,
        device=device(),
        gb_per_s=moved / seconds / 1e9,
        tflop_per_s=flops / seconds / 1e12,
        share_of_ceiling=max(moved / seconds / bandwidth, flops / seconds / rate),
    )
