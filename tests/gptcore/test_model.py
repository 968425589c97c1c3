"""The GPT against Hugging Face's GPT-2, against itself (fused and explicit, cached and not), and every refusal."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from gptkernels.testing import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import GPT, GPTConfig
from gptcore.models import from_pretrained
from gptcore.nn import SelfAttention
from gptcore.weights import WeightsError, from_huggingface, save_huggingface, to_huggingface

CONFIG = GPTConfig(vocab_size=61, context=24, n_layer=2, n_head=2, width=32, kernels="reference")


KERNELS = ["reference", *(["triton"] if torch.cuda.is_available() else ["triton", "native"])]


def make(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():  # biases and norms off their initial values, or a swapped pair would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A Hugging Face GPT-2 of the same size with random weights, and the folder it was saved in."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    sizes = {"vocab_size": 61, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off, attn_implementation="eager"))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("attention_impl", ["fused", "explicit"])
def test_logits_and_gradients_are_hugging_faces(gpt2, kernels: str, attention_impl: str, device: str):
    plain, folder = gpt2
    plain = plain.to(device)
    ours = GPT.from_pretrained(folder, kernels=kernels, attention_impl=attention_impl).to(device)
    exact = type(plain)(plain.config).to(device).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in plain.state_dict().items()})
    # Of several draws together: the elements of one tensor err by causes that they share, and one draw's error is luck.
    results: list[dict[str, list[torch.Tensor]]] = [{}, {}, {}]
    for draw in range(4):
        x, y = tokens(2, 19, seed=2 * draw + 1).to(device), tokens(2, 19, seed=2 * draw + 2).to(device)
        for model, found in zip((plain, exact, ours), results):
            if model is ours:
                values = {"logits": ours(x), **gradients(ours, ours.loss(x, y))}
            else:
                logits = model(x).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
                values = {"logits": logits, **from_huggingface(gradients(model, loss))}
            for name, value in values.items():
                found.setdefault(name, []).append(value.detach())
    assert set(results[2]) == set(results[0])
    for name, values in results[2].items():
        assert_within_budget(name, *(torch.stack(v) for v in (values, results[0][name], results[1][name])))


def test_weights_move_both_ways_bit_by_bit(gpt2, tmp_path):
    from transformers import GPT2LMHeadModel

    theirs, _ = gpt2
    model = make()
    state = model.state_dict()
    back = from_huggingface(to_huggingface(state, model.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    save_huggingface(tmp_path, model.config, state)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, model(tokens(2, 9)), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) == model.num_parameters()


def test_save_and_load(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path, kernels="reference")
    assert loaded.config == dataclasses.replace(model.config, kernels="reference")
    assert torch.equal(loaded(tokens(2, 9)), make(kernels="reference")(tokens(2, 9)))
    loaded.to(torch.float64)
    assert "lm_head.weight" not in loaded.state_dict()


def test_a_folder_says_what_a_model_is_and_not_how_it_ran(tmp_path):
    """Trained with kernels, dropout and attention of one machine, it loads on any."""
    model = make(kernels="triton", dropout=0.3, attention_impl="explicit")
    model.save_pretrained(tmp_path / "new")
    described = json.loads((tmp_path / "new/config.json").read_text())
    assert described["model_type"] == "gpt"
    assert not {"kernels", "dropout", "attention_impl"} & set(described)
    # As the version before wrote it, which knew one model.
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old/config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    for folder in (tmp_path / "new", tmp_path / "old"):
        loaded = from_pretrained(folder)
        assert isinstance(loaded, GPT)
        assert loaded.config == dataclasses.replace(model.config, kernels="auto", dropout=0.0, attention_impl="fused")
    (tmp_path / "new/config.json").write_text(json.dumps(described | {"model_type": "gru"}))
    with pytest.raises(WeightsError, match=r"new/config\.json: model_type: got 'gru'; accepted are gpt, bert"):
        from_pretrained(tmp_path / "new")
    (tmp_path / "new/config.json").write_text(json.dumps(described | {"gptcore_format": 2}))
    with pytest.raises(WeightsError, match=r"new/config\.json: .*gptcore_format: got 2; accepted is 1"):
        from_pretrained(tmp_path / "new")


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if func.namespace.startswith("gptkernels") and "multiplies" not in name:  # asked once in a process
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def every_fused_call(backend: str, attention_impl: str) -> dict[str, int]:
    """Residual and norm together, bias and GELU together, the loss without logits."""
    inner, layers = {"fused": "attention", "explicit": "softmax"}[attention_impl], CONFIG.n_layer
    expected = {"layer_norm": 1, "add_layer_norm": 2 * layers, inner: layers, "gelu": layers}
    calls = {
        f"gptkernels_{backend}.{op}_{way}.default": n for op, n in expected.items() for way in ("forward", "backward")
    }
    # The loss and its gradients are one call.
    return calls | {f"gptkernels_{backend}.linear_cross_entropy_backward.default": 1}


@pytest.mark.parametrize("attention_impl", ["fused", "explicit"])
def test_the_flag_reaches_every_op(attention_impl: str, device: str):
    model = make(kernels="triton", attention_impl=attention_impl).to(device)
    with Counter() as counter:
        model.loss(tokens(1, 9).to(device), tokens(1, 9).to(device)).backward()
    assert counter.calls == every_fused_call("triton", attention_impl)
    with Counter() as counter:
        make(kernels="reference").to(device)(tokens(1, 9).to(device))
    assert counter.calls == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels run on the CPU")
@pytest.mark.parametrize("attention_impl", ["fused", "explicit"])
def test_on_a_cpu_auto_takes_every_native_op(attention_impl: str):
    model = make(kernels="auto", attention_impl=attention_impl)
    with Counter() as counter:
        model.loss(tokens(1, 9), tokens(1, 9)).backward()
    assert counter.calls == every_fused_call("native", attention_impl)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("attention_impl", ["fused", "explicit"])
def test_a_cache_changes_nothing(kernels: str, attention_impl: str, device: str):
    model = make(kernels=kernels, attention_impl=attention_impl).to(device)
    x = tokens(3, 20).to(device)
    whole = model(x)
    cache = model.new_cache()
    pieces = [model(part, cache) for part in x.split([7, 1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="tokens: got 5 after 20 in the cache; accepted is up to the context, 24"):
        model(tokens(3, 5).to(device), cache)
    with pytest.raises(ValueError, match="got a batch of 2; accepted is the cache's, 3"):
        model(tokens(2, 1).to(device), cache)


def test_attention_weights_can_be_read():
    model = make(attention_impl="explicit")
    x = tokens(2, 9)
    logits, weights = model(x, return_attention=True)
    torch.testing.assert_close(logits, make()(x), rtol=1e-4, atol=1e-5)  # explicit is fused
    assert len(weights) == CONFIG.n_layer
    for layer in weights:
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 2, 9))
        assert (layer.triu(1) == 0).all()
        assert (layer.tril() > 0).sum() == 2 * 2 * 45
    with pytest.raises(ValueError, match="attention_impl is 'fused'"):
        make()(x, return_attention=True)


def test_a_later_token_changes_no_earlier_logit():
    model, x = make(), tokens(1, 9)
    other = x.clone()
    other[0, 6] = (x[0, 6] + 1) % CONFIG.vocab_size
    a, b = model(x), model(other)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 6:], b[:, 6:])


def test_compiled_equals_eager():
    model = make()
    x = tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_loss_counts_what_is_not_ignored():
    model, x, y = make(), tokens(2, 5), tokens(2, 5, seed=3)
    y[0, 2:] = -100
    log_probabilities = model(x).log_softmax(-1)
    expected = -torch.stack(
        [log_probabilities[b, t, y[b, t]] for b in range(2) for t in range(5) if y[b, t] >= 0]
    ).mean()
    torch.testing.assert_close(model.loss(x, y), expected)


def test_dropout_acts_in_training_only():
    model, x = make(dropout=0.5), tokens(1, 9)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), make()(x))


@pytest.mark.parametrize("attention_impl", ["fused", "explicit"])
def test_dropout_reaches_the_attention_weights(attention_impl: str):
    layer = SelfAttention(64, 2, causal=True, dropout=0.5, implementation=attention_impl)
    x = torch.randn(2, 9, 64)
    torch.manual_seed(1)
    draws = torch.stack([layer(x)[0] for _ in range(200)])
    layer.eval()
    plain = layer(x)[0]
    assert torch.equal(plain, layer(x)[0])
    # The first token sees itself alone: its one weight is dropped or doubled, all heads' at different times.
    assert len(draws[:, 0, 0].unique(dim=0)) >= 4
    spread = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - plain).abs() <= 5 * spread).all()  # the expectation is what comes out without dropout


def test_initial_weights_follow_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("mini", vocab_size=512))
    assert float(model.h[1].mlp.c_fc.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.h[1].mlp.c_proj.weight.std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert GPT.num_parameters(GPT(GPTConfig.preset("tiny", vocab_size=512))) == 512 * 64 + 64 * 64 + 2 * 49984 + 128


def test_presets_are_gpt2s_sizes():
    with torch.device("meta"):
        sizes = {
            n: GPT(GPTConfig.preset(n)).num_parameters() for n in ("gpt2-124m", "gpt2-medium", "gpt2-large", "gpt2-xl")
        }
    assert sizes == {
        "gpt2-124m": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"tokens: got id 61; accepted are 0 to 60", lambda: make()(torch.tensor([[3, 61]]))),
        (ValueError, r"tokens: got id -1", lambda: make()(torch.tensor([[3, -1]]))),
        (ValueError, r"tokens: got shape \(3,\); accepted is \(batch, tokens\)", lambda: make()(torch.tensor([1, 2, 3]))),
        (TypeError, r"tokens: got dtype torch\.float32", lambda: make()(torch.ones(1, 3))),
        (ValueError, r"tokens: got 25; accepted is up to the context, 24", lambda: make()(tokens(1, 25))),
        (ValueError, r"targets: got shape \(1, 4\)", lambda: make().loss(tokens(1, 3), tokens(1, 4))),
        (ValueError, r"targets: got id 99", lambda: make().loss(tokens(1, 2), torch.tensor([[99, -100]]))),
        (ValueError, r"n_head: got 3; accepted are divisors of width, 32", lambda: make(n_head=3)),
        (ValueError, r"n_head: got 1, heads of 512", lambda: GPTConfig(width=512, n_head=1)),
        (ValueError, r"n_layer: got 0", lambda: make(n_layer=0)),
        (ValueError, r"dropout: got 1\.0", lambda: make(dropout=1.0)),
        (ValueError, r"eps: got 0", lambda: make(eps=0.0)),
        (ValueError, r"kernels: got 'cuda'; accepted are 'auto'", lambda: make(kernels="cuda")),
        (ValueError, r"attention_impl: got 'flash'", lambda: make(attention_impl="flash")),
        (ValueError, r"preset: got 'gpt5'; accepted are tiny, mini", lambda: GPTConfig.preset("gpt5")),
        (ValueError, r"n_heads: is no field of GPTConfig", lambda: GPTConfig.preset("tiny", n_heads=2)),
        (WeightsError, r"/no/such/folder: there is no such folder", lambda: GPT.from_pretrained("/no/such/folder")),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, call):
    with pytest.raises(error, match=match):
        call()


def damage(folder, kind: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "garbage":
        weights.write_bytes(b"\xff" * 50)
    if kind == "missing":
        weights.unlink()
    if kind == "not json":
        config.write_text("{")
    if kind in ("deeper", "wider", "unknown"):
        change = {"deeper": {"n_layer": 3}, "wider": {"width": 64}, "unknown": {"colour": 1}}[kind]
        config.write_text(json.dumps(json.loads(config.read_text()) | change))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("truncated", r"model\.safetensors: is damaged"),
        ("garbage", r"model\.safetensors: is damaged"),
        ("missing", r"model\.safetensors: there is no such file"),
        ("not json", r"config\.json: describes no model"),
        ("unknown", r"config\.json: describes no model.*colour"),
        ("deeper", r"h\.2\.attn\.c_attn\.bias is missing"),
        ("wider", r"has shape .*; accepted is"),
    ],
)
def test_damaged_folders_are_named(tmp_path, kind: str, match: str):
    make().save_pretrained(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(WeightsError, match=match):
        GPT.from_pretrained(tmp_path)


def test_foreign_configurations_that_compute_otherwise(gpt2, tmp_path):
    _, folder = gpt2
    values = json.loads((folder / "config.json").read_text())
    for name, value in (("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True)):
        (tmp_path / "config.json").write_text(json.dumps(values | {name: value}))
        with pytest.raises(WeightsError, match=f"{name}: got"):
            GPT.from_pretrained(tmp_path)
