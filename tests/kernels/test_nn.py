"""gptkernels.nn's modules equal torch.nn's: construction, state, repr, and results in every configuration, fused or not."""

from __future__ import annotations

import copy
import math
import pickle

import gptkernels
import pytest
import torch
from gptkernels.testing import assert_within_budget
from torch import Tensor, nn

TWINS = {
    "LayerNorm": ((8,), {}),
    "LayerNorm eps": ((8, 0.1), {}),
    "LayerNorm without affine": ((8,), {"elementwise_affine": False}),
    "LayerNorm without bias": ((8,), {"bias": False}),
    "LayerNorm bf16": ((8,), {"dtype": torch.bfloat16}),
    "LayerNorm two dims": (((3, 8),), {}),
    "LayerNorm two dims, plain": (((3, 8),), {"elementwise_affine": False}),
    "LayerNorm three dims, no bias": (([2, 3, 8],), {"bias": False}),
    "RMSNorm": ((8,), {}),
    "RMSNorm eps": ((8, 0.1), {}),
    "RMSNorm without affine": ((8,), {"elementwise_affine": False}),
    "RMSNorm two dims": (((3, 8),), {"eps": 1e-3}),
    "Softmax": ((-1,), {}),
    "Softmax dim 0": ((0,), {}),
    "Softmax dim 1": ((), {"dim": 1}),
    "GELU": ((), {}),
    "GELU tanh": (("tanh",), {}),
}


def pair(case: str) -> tuple[nn.Module, nn.Module]:
    """The twin and ours, made with the same arguments from the same seed; parameters off their initial values."""
    name = case.split()[0]
    arguments, options = TWINS[case]
    made = []
    for home in (nn, gptkernels.nn):
        torch.manual_seed(0)
        module = getattr(home, name)(*arguments, **options)
        for parameter in module.parameters():
            parameter.data += torch.randn_like(parameter)
        made.append(module)
    return made[0], made[1]


@pytest.mark.parametrize("case", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_are_the_twins(case: str, dtype: torch.dtype):
    twin, ours = pair(case)
    results: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for _ in range(8):  # compared together: the error of a single draw's few gradients depends on chance
        x, grad = (torch.randn(4, 2, 3, 8).to(dtype) * 2 + 1 for _ in range(2))
        for found, module, to in zip(results, (ours, twin, twin), (dtype, dtype, torch.float64)):
            module = copy.deepcopy(module).to(to)
            leaf = x.to(to).requires_grad_()
            out = module(leaf)
            gradients = torch.autograd.grad(out, [leaf, *module.parameters()], grad.to(to))
            for name, value in zip(["out", "x", *dict(module.named_parameters())], (out.detach(), *gradients)):
                found.setdefault(name, []).append(value)
    for name, values in results[0].items():
        assert_within_budget(name, *(torch.stack(v) for v in (values, results[1][name], results[2][name])))


@pytest.mark.parametrize("case", TWINS)
def test_construction_state_and_repr_are_the_twins(case: str):
    twin, ours = pair(case)
    assert repr(ours) == repr(twin)
    assert isinstance(ours, type(twin))
    state = ours.state_dict()
    assert state.keys() == twin.state_dict().keys()
    assert all(torch.equal(state[n], t) and state[n].dtype == t.dtype for n, t in twin.state_dict().items())
    twin.load_state_dict(state)
    assert repr(pickle.loads(pickle.dumps(ours))) == repr(copy.deepcopy(ours)) == repr(twin)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_leave_what_does_not_fit_to_the_twin(name: str):
    for shape, x in ((8, torch.zeros(2, 7)), ((3, 8), torch.zeros(8)), (8, torch.zeros(2, 8, dtype=torch.long))):
        errors = []
        for home in (nn, gptkernels.nn):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                getattr(home, name)(shape)(x)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_float64_and_no_dimensions_and_no_dimension_given():
    x = torch.randn(3, 8, dtype=torch.float64)
    for name, module in (("LayerNorm", 8), ("RMSNorm", 8), ("Softmax", -1)):
        ours, twin = getattr(gptkernels.nn, name)(module).double(), getattr(nn, name)(module).double()
        torch.testing.assert_close(ours(x), twin(x), rtol=1e-12, atol=1e-12)
    assert gptkernels.nn.GELU()(torch.tensor(1.0)) == nn.GELU()(torch.tensor(1.0))
    assert gptkernels.nn.Softmax(-1)(torch.tensor(1.0)) == 1.0
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        assert torch.equal(gptkernels.nn.Softmax()(x), nn.functional.softmax(x, 1))
    with pytest.raises(IndexError):
        gptkernels.nn.Softmax(2)(x)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("case", TWINS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_the_twins(case: str, layout: torch.layout):
    """Where PyTorch's modules take nested tensors, ours give the same rows; elsewhere the same error."""
    twin, ours = pair(case)
    dtype = next((p.dtype for p in twin.parameters()), torch.float32)
    rows = [torch.randn(2, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    try:
        expected = twin(nested).unbind()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            ours(nested)
        return
    for a, b in zip(ours(nested).unbind(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_softmax_of_a_row_of_minus_infinity_is_zero():
    x = torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]])
    assert nn.Softmax(-1)(x)[1].isnan().all()
    out = gptkernels.nn.Softmax(-1)(x)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[0], x[0].softmax(-1))


def test_autocast_keeps_the_dtype_of_the_input():
    """As PyTorch's modules do on the CPU; on a GPU PyTorch's norms and softmax give float32, and ours do not."""
    x = torch.randn(4, 8)
    for module in (
        gptkernels.nn.LayerNorm(8),
        gptkernels.nn.RMSNorm(8),
        gptkernels.nn.Softmax(-1),
        gptkernels.nn.GELU(),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                out = module(x.to(dtype))
                assert out.dtype == dtype
                twin = getattr(nn, type(module).__name__)
                assert out.dtype == twin.forward(module, x.to(dtype)).dtype


LOGITS = {
    "rows": ((6, 5), (6,)),
    "one row": ((5,), ()),
    "images": ((2, 5, 3, 2), (2, 3, 2)),
    "sequence": ((2, 5, 3), (2, 3)),
}


@pytest.mark.parametrize("layout", LOGITS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 2},
        {"label_smoothing": 0.1},
        {"weight": torch.arange(1.0, 6.0)},
        {"weight": torch.arange(1.0, 6.0), "label_smoothing": 0.2, "ignore_index": 2, "reduction": "sum"},
        {"size_average": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_cross_entropy_is_the_twins(layout: str, options: dict):
    shape, target_shape = LOGITS[layout]
    logits = torch.randn(shape)
    target = torch.randint(0, 5, target_shape)
    if "ignore_index" in options and target.dim():
        target.view(-1)[0] = 2
    twin, ours = nn.CrossEntropyLoss(**options), gptkernels.nn.CrossEntropyLoss(**options)
    assert repr(ours) == repr(twin)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    results = []
    for loss in (ours, twin):
        leaf = logits.clone().requires_grad_()
        out = loss(leaf, target)
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)  # a mean over no targets is NaN


def test_cross_entropy_of_probabilities_is_the_twins():
    logits, target = torch.randn(6, 5), torch.rand(6, 5).softmax(-1)
    assert torch.equal(gptkernels.nn.CrossEntropyLoss()(logits, target), nn.CrossEntropyLoss()(logits, target))


def test_cross_entropy_of_16_bit_logits_is_float32():
    logits, target = torch.randn(6, 5).bfloat16(), torch.randint(0, 5, (6,))
    out = gptkernels.nn.CrossEntropyLoss()(logits, target)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, nn.functional.cross_entropy(logits.float(), target))
    with torch.autocast("cpu", torch.bfloat16):
        assert gptkernels.nn.CrossEntropyLoss()(logits, target).dtype == nn.CrossEntropyLoss()(logits, target).dtype


def linear_losses(*arguments, **options) -> list:
    made = []
    for home in (gptkernels.nn, nn):
        torch.manual_seed(0)
        made.append(home.LinearCrossEntropyLoss(*arguments, **options))
    return made


def loss_and_gradients(loss: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone().requires_grad_()
    out = loss(leaf, target)
    return out, *torch.autograd.grad(out.sum(), (leaf, *loss.parameters()))


needs_twin = pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this PyTorch has no such module")


@needs_twin
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"bias": True, "reduction": "none"},
        {"ignore_index": 2, "reduction": "sum"},
        {"label_smoothing": 0.1},
        {"weight": torch.arange(1.0, 6.0)},
        {"out_features": (3,)},
    ],
    ids=str,
)
def test_linear_cross_entropy_is_the_twins(options: dict):
    ours, twin = linear_losses(7, 5, **options)
    assert repr(ours) == repr(twin)
    assert ours.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in ours.state_dict().items())
    x, target = torch.randn(6, 7), torch.randint(0, 5, (6, *options.get("out_features", ())))
    for a, b in zip(loss_and_gradients(ours, x, target), loss_and_gradients(twin, x, target)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    probabilities = torch.rand(6, 5, *options.get("out_features", ())).softmax(1)
    if "ignore_index" not in options:
        assert torch.equal(ours(x, probabilities), twin(x, probabilities))


def test_linear_cross_entropy_takes_batches_of_sequences():
    ours = gptkernels.nn.LinearCrossEntropyLoss(7, 5, bias=True)
    x, target = torch.randn(2, 3, 7), torch.randint(0, 5, (2, 3))
    target[0, 0] = -100
    plain = nn.functional.cross_entropy(ours.linear(x).flatten(0, 1), target.flatten())
    torch.testing.assert_close(ours(x, target), plain)


def test_the_loss_for_a_pytorch_without_it_has_the_same_state_and_results():
    from gptkernels.nn import _LinearCrossEntropyLoss

    torch.manual_seed(0)
    plain = _LinearCrossEntropyLoss(7, 5, bias=True, label_smoothing=0.1)
    x, target = torch.randn(6, 7), torch.randint(0, 5, (6,))
    expected = nn.functional.cross_entropy(plain.linear(x), target, label_smoothing=0.1)
    assert torch.equal(plain(x, target), expected)
    assert list(plain.state_dict()) == ["linear.weight", "linear.bias"]
    if hasattr(nn, "LinearCrossEntropyLoss"):
        torch.manual_seed(0)
        theirs = nn.LinearCrossEntropyLoss(7, 5, bias=True, label_smoothing=0.1)
        assert all(torch.equal(t, plain.state_dict()[n]) for n, t in theirs.state_dict().items())


@pytest.mark.parametrize("case", ["LayerNorm two dims", "RMSNorm", "Softmax", "GELU tanh"])
def test_compiles_without_graph_breaks(case: str):
    _, ours = pair(case)
    x = torch.randn(2, 3, 8)
    with gptkernels.use_backend("reference"):  # which compiles fast; the kernels' ops have tests of their own
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
