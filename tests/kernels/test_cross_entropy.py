"""The losses' edge cases: ignored targets, targets that are not classes, infinities, chunks, loss scales, no wait for a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from gptkernels import available_backends, cross_entropy, linear_cross_entropy
from gptkernels.linear_cross_entropy import reference
from gptkernels.linear_cross_entropy.spec import SPEC, _case
from gptkernels.testing import assert_within_budget, check_op, poisoned_memory
from torch.utils._python_dispatch import TorchDispatchMode

FUSED = [name for name in available_backends() if name != "reference"]
# Vocabularies that Triton keeps in registers, several rows a program and one, and that it walks through.
CLASSES = [pytest.param(n, id=i) for n, i in ((3, "several rows"), (4099, "one row"), (40_001, "long"))]


def losses_and_gradient(logits: torch.Tensor, target: torch.Tensor, backend: str, reduction: str = "none"):
    logits = logits.detach().requires_grad_()
    with poisoned_memory():
        losses = cross_entropy(logits, target, reduction=reduction, backend=backend)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), gradient


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("classes", CLASSES)
def test_ignored_rows_are_not_read(classes: int, backend: str, device: str):
    logits = torch.randn(5, classes, device=device)
    logits[1] = math.nan
    target = torch.tensor([0, -100, 2, 1, 0], device=device)
    for reduction in ("none", "mean"):
        losses, gradient = losses_and_gradient(logits, target, backend, reduction)
        kept = target != -100
        plain, plain_gradient = losses_and_gradient(logits[kept], target[kept], "reference", reduction)
        torch.testing.assert_close(losses[kept] if reduction == "none" else losses, plain)
        torch.testing.assert_close(gradient[kept], plain_gradient)
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("classes", CLASSES)
def test_triton_makes_a_target_that_is_no_class_nan(classes: int, device: str):
    """No error is raised: the host would have to wait for the device."""
    logits = torch.randn(6, classes, device=device)
    target = torch.tensor([0, -1, 2, classes, 2**32 + 1, 1], device=device)
    wrong = torch.tensor([False, True, False, True, True, False], device=device)
    losses, gradient = losses_and_gradient(logits, target, "triton")
    assert losses[wrong].isnan().all()
    assert gradient[wrong].isnan().all()
    plain, plain_gradient = losses_and_gradient(logits[~wrong], target[~wrong], "reference")
    torch.testing.assert_close(losses[~wrong], plain)
    torch.testing.assert_close(gradient[~wrong], plain_gradient)
    assert losses_and_gradient(logits, target, "triton", "mean")[0].isnan()
    # An ignored one may have any value.
    target[wrong] = -1
    assert cross_entropy(logits, target, ignore_index=-1, backend="triton").isfinite()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("classes", CLASSES)
def test_infinities_and_nan_stay_in_their_row(classes: int, backend: str, device: str):
    logits = torch.randn(7, classes, device=device)
    logits[0, 0] = -math.inf  # beside the target
    logits[1, 1] = -math.inf  # the target
    logits[2] = -math.inf
    logits[3, 2] = math.inf
    logits[4, 0] = math.nan
    logits[5] = torch.finfo(torch.float32).min
    logits[6] = -math.inf
    logits[6, 1] = 3.0
    target = torch.ones(7, dtype=torch.int32, device=device)
    losses, gradient = losses_and_gradient(logits, target, backend)
    plain, plain_gradient = losses_and_gradient(logits, target, "reference")
    torch.testing.assert_close(losses, plain, equal_nan=True)
    torch.testing.assert_close(gradient, plain_gradient, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_classes_at_the_edges_of_rows_that_start_anywhere(backend: str, dtype: torch.dtype, device: str):
    """Rows of an odd number of classes start at every multiple of an element; their first and last classes count too."""
    classes = 33_003
    logits = torch.randn(10, classes, device=device).to(dtype)
    logits[::2, :9], logits[1::2, -9:] = 12.0, 12.0  # the largest of their rows
    logits[9, -1] = math.nan
    target = torch.tensor([0, 1, 7, 8, 9, classes - 1, classes - 2, classes - 8, -100, 5], device=device)
    losses, gradient = losses_and_gradient(logits, target, backend)
    plain, plain_gradient = losses_and_gradient(logits.float(), target, "reference")
    torch.testing.assert_close(losses.float(), plain, equal_nan=True)
    torch.testing.assert_close(gradient, plain_gradient.to(dtype), equal_nan=True)


@pytest.mark.parametrize("backend", FUSED)
def test_strided_targets_and_row_weights(backend: str, device: str):
    logits = torch.randn(4, 6, 9, device=device)
    target = torch.randint(0, 9, (6, 4), device=device).T
    weights = torch.randn(6, 4, device=device).T
    leaf = logits.requires_grad_()
    results = []
    for name in (backend, "reference"):
        loss = cross_entropy(leaf, target, reduction="none", backend=name)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf, weights)[0]))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_triton_backward_twice_and_times_a_loss_scale(reduction: str, device: str):
    x = torch.randn(9, 16, device=device, requires_grad=True)
    weight = torch.randn(40, 16, device=device, requires_grad=True)
    target = torch.randint(0, 40, (9,), device=device)
    plain = torch.autograd.grad(
        cross_entropy(x @ weight.T, target, reduction=reduction, backend="reference"), (x, weight)
    )
    for loss in (
        linear_cross_entropy(x, weight, target, reduction=reduction, backend="triton"),
        cross_entropy(x @ weight.T, target, reduction=reduction, backend="triton"),
    ):
        for scale in (1.0, 3.0, 0.0):
            # The first backward gives its buffers away, the next ones compute them anew.
            gradients = torch.autograd.grad(scale * loss, (x, weight), retain_graph=True)
            for ours, theirs in zip(gradients, plain):
                torch.testing.assert_close(ours, scale * theirs)
    # The scale on the first backward: over several blocks of the kernel that multiplies.
    logits = torch.randn(20, 1000, device=device, requires_grad=True)
    target = torch.randint(0, 1000, (20,), device=device)
    loss = cross_entropy(logits, target, reduction=reduction, backend="triton")
    (gradient,) = torch.autograd.grad(5 * loss, logits)
    (plain,) = torch.autograd.grad(5 * cross_entropy(logits, target, reduction=reduction, backend="reference"), logits)
    torch.testing.assert_close(gradient, plain)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 2.0**16), ("sum", 2.0**10)])
@pytest.mark.parametrize("backend", FUSED)
def test_a_loss_scale_reaches_every_class_in_float16(reduction: str, scale: float, backend: str, device: str):
    """The gradients of classes that are not targets are small: without the scale, float16 would round them to 0."""
    classes, width = 8000, 16
    x, weight = 0.3 * torch.randn(24, width, device=device), torch.randn(classes, width, device=device)
    target = torch.randint(0, 10, (24,), device=device)

    def small_gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.half().to(dtype).requires_grad_() for t in (x, weight, x @ weight.T)]
        losses = (
            (linear_cross_entropy(leaves[0], leaves[1], target, reduction=reduction, backend=backend), leaves[:2]),
            (cross_entropy(leaves[2], target, reduction=reduction, backend=backend), leaves[2:]),
        )
        found = []
        for loss, inputs in losses:
            grad_out = torch.full_like(loss, scale)
            found += torch.autograd.grad(loss, inputs, grad_out, retain_graph=True)
            again = torch.autograd.grad(loss, inputs, grad_out)
            assert all(torch.equal(first, second) for first, second in zip(found[-len(inputs) :], again))
        return [found[0], found[1][10:], found[2][:, 10:]]

    ours, plain = (small_gradients(name, torch.float16) for name in (backend, "reference"))
    for name, *gradients in zip(("x", "weight", "logits"), ours, plain, small_gradients("reference", torch.float64)):
        assert_within_budget(f"grad_{name}", *gradients)


def test_compiled_float16_losses_are_the_eager_ones(device: str):
    x, weight = (torch.randn(n, 16, device=device, dtype=torch.float16, requires_grad=True) for n in (6, 40))
    target = torch.randint(0, 40, (6,), device=device)

    def losses(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        loss = linear_cross_entropy(x, weight, target, backend=FUSED[-1])
        return 2.0**14 * (loss + cross_entropy(x, target % 16, backend=FUSED[-1]))

    eager, compiled = (
        torch.autograd.grad(f(x, weight), (x, weight))
        for f in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager"))
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(eager, compiled))


@pytest.mark.parametrize("backend", FUSED)
def test_the_mean_of_no_targets_is_nan_and_its_gradient_zero(backend: str, device: str):
    target = torch.full((3,), -100, device=device)
    loss, gradient = losses_and_gradient(torch.randn(3, 8, device=device), target, backend, "mean")
    assert loss.isnan()
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_one_target_without_dimensions(backend: str, device: str):
    x, weight = torch.randn(7, device=device), torch.randn(7, 7, device=device)
    target = torch.tensor(2, device=device)
    for reduction in ("mean", "none"):
        loss, gradient = losses_and_gradient(x, target, backend, reduction)
        plain, plain_gradient = losses_and_gradient(x, target, "reference", reduction)
        torch.testing.assert_close((loss, gradient), (plain, plain_gradient))
        projected = linear_cross_entropy(x, weight, target, reduction=reduction, backend=backend)
        torch.testing.assert_close(projected, cross_entropy(weight @ x, target, backend="reference"))


@pytest.mark.parametrize("backend", FUSED)
def test_logits_may_change_in_place_between_forward_and_backward(backend: str, device: str):
    """As with PyTorch's own loss, if forward computed the gradient; if it did not, autograd raises an error."""

    def gradient(change: bool, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
        leaf = base.to(dtype).requires_grad_()
        logits = leaf * 1.0
        loss = cross_entropy(logits, target, backend=backend, **options).sum()
        if change:
            logits.zero_()
        return torch.autograd.grad(loss, leaf)[0]

    base, target = torch.randn(5, 9, device=device), torch.randint(0, 9, (5,), device=device)
    assert torch.equal(gradient(True), gradient(False))
    for later in ({"reduction": "none"}, {"dtype": torch.float16}):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(True, **later)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a value from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
        ), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_triton_never_waits_for_the_device(reduction: str, device: str):
    x = torch.randn(9, 16, device=device, requires_grad=True)
    weight = torch.randn(40, 16, device=device, requires_grad=True)
    target = torch.tensor([3, -100, 5, 1, 0, 39, 7, 7, -100], device=device)
    with NoWaiting():
        loss = linear_cross_entropy(x, weight, target, reduction=reduction, backend="triton").sum()
        loss = loss + cross_entropy(x, target.clamp_max(15), reduction=reduction, backend="triton").sum()
        torch.autograd.grad(2 * loss, (x, weight))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("gptkernels.linear_cross_entropy.triton")
    for name, value in (("MIN_TOKENS", 8), ("TOKEN_MULTIPLE", 8)):
        monkeypatch.setattr(triton, name, value)
    return triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        _case((100,), 24, 150, bias=True, ignored=0.3),
        _case((7, 13), 16, 64, reduction="none"),
        _case((50,), 40, 100, layout="slice", reduction="sum"),
    ],
    ids=lambda case: case.name,
)
def test_triton_over_several_chunks(case, dtype: torch.dtype, small_chunks, device: str):
    tokens = math.prod(case.parameters["tokens"])
    assert tokens / small_chunks.chunk_tokens(tokens, case.parameters["classes"], dtype.itemsize) > 3
    check_op(SPEC, case, dtype, "triton", device)


def test_triton_sums_the_weights_gradient_in_float32(small_chunks, monkeypatch: pytest.MonkeyPatch, device: str):
    """64 chunks with gradients of one sign: a bfloat16 sum would be rounded 64 times at its full size."""
    monkeypatch.setattr(small_chunks, "CHUNKS", 64)
    x = 1 + torch.rand(512, 16, device=device)
    weight = 0.1 * torch.randn(64, 16, device=device)
    target = torch.randint(0, 64, (512,), device=device)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (x, weight)]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.float32):
            loss = linear_cross_entropy(*leaves, target, reduction="sum", backend=backend)
        results.append(torch.autograd.grad(loss, leaves))
    for name, *gradients in zip(("grad_x", "grad_weight"), *results):
        assert_within_budget(name, *gradients)


@pytest.mark.parametrize(("tokens", "classes", "itemsize"), [(16384, 50257, 2), (65536, 50257, 2), (12288, 128256, 2)])
def test_triton_holds_about_a_fifth_of_the_logits_or_less(tokens: int, classes: int, itemsize: int):
    from gptkernels.linear_cross_entropy.triton import MAX_BYTES, chunk_tokens

    chunk = chunk_tokens(tokens, classes, itemsize)
    assert 2048 <= chunk <= 0.21 * tokens
    assert chunk * classes * itemsize <= MAX_BYTES
    last = tokens - chunk * ((tokens - 1) // chunk)
    assert last > 0.75 * chunk, "a short last chunk wastes its products"


@pytest.mark.skipif("native" not in FUSED, reason="about the CPU's chunks")
def test_native_over_two_chunks_in_float32():
    """64 MiB hold 139 of these rows."""
    check_op(SPEC, _case((150,), 8, 120_000, bias=True, reduction="none"), torch.float32, "native")


def test_the_reference_is_the_formula():
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (7, 3), (7,)))
    target = torch.tensor([0, 6, -100, 3, 3])
    logits = x @ weight.T + bias
    losses = logits.exp().sum(-1).log() - logits.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    losses[2] = 0
    for reduction, expected in (("none", losses), ("sum", losses.sum()), ("mean", losses.sum() / 4)):
        actual = reference.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
