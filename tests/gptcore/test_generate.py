"""Sampling: top-k and top-p by their definition, the cache, the window, seeds, and errors for bad options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import GPT, GPTConfig
from gptcore.generate import generate_stream, keep_likely


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=37, context=16, n_layer=2, n_head=2, width=32, kernels="reference"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform: a wrong token shows
    return model


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-20, 20), min_size=1, max_size=12, unique=True),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_keep_likely_follows_its_definition(logits: list[int], top_k, top_p):
    values = torch.tensor([logits], dtype=torch.float64) / 4
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [float(values[0, i].exp()) for i in order]
    kept, held = [], 0.0
    for i, weight in zip(order, weights):
        if top_p is not None and top_p < 1.0 and kept and held >= top_p - 1e-12:
            break
        kept.append(i)
        held += weight / sum(weights)
    actual = keep_likely(values, top_k, top_p)
    assert sorted(kept) == actual[0].isfinite().nonzero().flatten().tolist()
    assert torch.equal(actual[0, kept], values[0, kept])


@pytest.mark.parametrize("new", [5, 40], ids=["inside the context", "past it"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "top_k": 5, "top_p": 0.9}], ids=str)
def test_the_cache_changes_nothing(model: GPT, new: int, options: dict):
    assert torch.equal(model.generate(PROMPT, new, **options), model.generate(PROMPT, new, **options, use_cache=False))


def test_greedy_takes_the_likeliest_and_keeps_the_newer_half(model: GPT):
    out = model.generate(PROMPT, 30, temperature=0.0)
    assert torch.equal(out[:, :3], PROMPT)
    window = PROMPT
    for t in range(3, 33):
        if window.shape[1] > 16:
            window = window[:, -8:]
        assert torch.equal(out[:, t], model(window)[:, -1].argmax(-1))
        window = torch.cat([window, out[:, t : t + 1]], dim=1)
    assert torch.equal(out, model.generate(PROMPT, 30, top_k=1, seed=0))


def test_the_same_seed_gives_the_same_sample(model: GPT):
    state = torch.get_rng_state()
    a, b, c = (model.generate(PROMPT, 12, seed=seed, temperature=2.0) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not used
    d, e = (model.generate(PROMPT, 12, temperature=2.0) for _ in range(2))
    assert not torch.equal(d, e)


def test_samples_follow_the_distribution(model: GPT):
    prompt = PROMPT[:1].repeat(4000, 1)
    first = model.generate(prompt, 1, seed=0, temperature=3.0)[:, -1]
    expected = (model(PROMPT[:1])[0, -1] / 3.0).softmax(-1)
    observed = first.bincount(minlength=37) / 4000
    assert float((observed - expected).abs().max()) < 5 * float((expected * (1 - expected) / 4000).sqrt().max())


def test_finished_rows_repeat_the_stop_token(model: GPT):
    free = model.generate(PROMPT, 12, temperature=0.0)
    stop = int(free[0, 4])  # row 0 samples it as its second token
    out = model.generate(PROMPT, 12, temperature=0.0, stop=stop)
    assert (out[0, 4:] == stop).all()
    assert torch.equal(out[0, :5], free[0, :5])
    alone = model.generate(PROMPT[:1], 12, temperature=0.0, stop=stop)
    assert alone.shape == (1, 5)


def test_the_training_mode_is_restored(model: GPT):
    model.train()
    stream = generate_stream(model, PROMPT, 5)
    next(stream)
    stream.close()
    assert model.training
    assert not model.generate(PROMPT, 1).requires_grad
    model.eval()
    model.generate(PROMPT, 1)
    assert not model.training


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1e-6}, {"temperature": 1e38}, {"temperature": 1e300}, {"seed": 2**64 - 1}, {"seed": -(2**63)},
     {"top_k": 10**30}, {"top_p": 1e-300}, {"repetition_penalty": 1e9, "temperature": 1e-6},
     {"repetition_penalty": 1e-6, "temperature": 1e-6}],
    ids=str,
)  # fmt: skip
def test_options_at_the_ends_of_their_ranges(model: GPT, options: dict):
    out = model.generate(PROMPT, 12, **({"seed": 0} | options))
    assert out.shape == (2, 15)
    if options == {"temperature": 1e-6}:
        assert torch.equal(out, model.generate(PROMPT, 12, temperature=0.0))


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"temperature: got -1", {"temperature": -1}),
        (r"temperature: got nan", {"temperature": float("nan")}),
        (r"temperature: got 1e-40; accepted are 0 .* and numbers from 1e-6 on", {"temperature": 1e-40}),
        (r"seed: got 18446744073709551616; accepted are integers from -2\*\*63 to 2\*\*64 - 1", {"seed": 2**64}),
        (r"seed: got -9223372036854775809", {"seed": -(2**63) - 1}),
        (r"seed: got 0\.5", {"seed": 0.5}),
        (r"top_k: got 2\.5", {"top_k": 2.5}),
        (r"repetition_penalty: got 1e\+39; accepted are numbers from 1e-6 to 1e9", {"repetition_penalty": 1e39}),
        (r"tokens: got id -1; accepted are 0 to 36", {"tokens": torch.tensor([[1, -1]])}),
        (r"top_k: got 0; accepted are positive integers", {"top_k": 0}),
        (r"top_p: got 0; accepted is 0 < top_p <= 1", {"top_p": 0}),
        (r"top_p: got 1\.5", {"top_p": 1.5}),
        (r"max_new_tokens: got -1", {"max_new_tokens": -1}),
        (r"tokens: got shape \(1, 0\)", {"tokens": torch.empty(1, 0, dtype=torch.long)}),
        (r"tokens: got shape \(3,\)", {"tokens": torch.tensor([1, 2, 3])}),
        (
            r"tokens: got a prompt of 17; accepted is up to the model's context, 16",
            {"tokens": torch.ones(1, 17).long()},
        ),
        (r"repetition_penalty: got 0", {"repetition_penalty": 0.0}),
        (r"padding: got \[3, 0\]; accepted are 2 numbers from 0 to 2", {"padding": torch.tensor([3, 0])}),
        (r"tokens: got id 37; accepted are 0 to 36", {"tokens": torch.tensor([[37]])}),
    ],
)
def test_bad_input(model: GPT, match: str, change: dict):
    with pytest.raises(ValueError, match=match):
        model.generate(**({"tokens": PROMPT, "max_new_tokens": 1} | change))
