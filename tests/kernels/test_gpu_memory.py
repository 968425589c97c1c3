"""What the tests of real sizes take of a GPU's memory, counted on tensors without data."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from gptkernels import testing
from gptkernels.compile_report import _Literals
from gptkernels.testing import Case, OpSpec, assert_within_budget, outputs, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.test_gpu import REAL_SIZES

GIB = 2**30


class Peak(TorchDispatchMode):
    """Counts the bytes that are held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak = 0, 0
        self._storages: set[int] = set()

    def _freed(self, storage: int, size: int) -> None:
        self.held -= size
        self._storages.discard(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self._storages
            ):
                self._storages.add(key)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result


def peak_of_check(spec: OpSpec, case: Case, dtype: torch.dtype) -> int:
    """Bytes that the inputs, the plain result and the float64 result of one check take together at most."""
    with torch.device("meta"), _Literals(), Peak() as counted:
        inputs = spec.make_inputs(case, dtype, torch.device("meta"), 0)
        grads = tuple(torch.empty_like(out) for out in outputs(spec.reference(**inputs.tensors, **inputs.options)))
        plain = run(spec.reference, inputs, grads)
        exact = run(spec.reference, inputs.mapped(lambda t: t.double()), tuple(g.double() for g in grads))
        assert plain.keys() == exact.keys()
    return counted.peak


def test_peak_counts_what_is_held_at_a_time():
    with Peak() as counted:
        a = torch.empty(1000, dtype=torch.uint8)
        b = a[:10].clone()
        del a
        b.add_(1)
        torch.empty(500, dtype=torch.uint8)
    assert (counted.peak, counted.held) == (1010, 10)


@pytest.mark.parametrize(("spec", "case", "dtype"), [p for p in REAL_SIZES if p.values[2] == torch.bfloat16])
def test_a_check_of_a_real_size_fits_beside_others(spec: OpSpec, case: Case, dtype: torch.dtype):
    """78 GiB are there. Attention's checks run alone, those of the other operations three at a time."""
    limit = 60 if spec.name == "attention" else 8 if spec.name == "attention_varlen" else 22
    assert peak_of_check(spec, case, dtype) <= limit * GIB


def test_long_results_are_compared_to_their_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(testing, "PIECE", 4)
    exact = torch.rand(3, 3, dtype=torch.float64)
    plain = exact.float()
    assert_within_budget("x", plain, plain, exact)
    wrong = plain.clone()
    wrong[2, 2] += 1e-3
    with pytest.raises(AssertionError, match="x: error 1"):
        assert_within_budget("x", wrong, plain, exact)
