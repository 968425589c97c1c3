"""Log-likelihoods of candidates: the same as those of a plain forward pass, whatever is shared and batched."""

from __future__ import annotations

import random

import pytest
import torch

import gptcore.generate.score as module
from gptcore import GPT, GPTConfig
from gptcore.generate import Request, encode_pair, log_likelihoods
from gptcore.nn import KeyValueCache
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import Tokenizer
from tests.gptcore.small_tokenizers import byte_level, with_bos

VOCAB = 97


def make(preset: str = "llama-tiny", **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, vocab_size=VOCAB, **{"kernels": "reference", "context": 64, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform: a wrong token shows
    return model


def some(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]


def plain(model: GPT, context: list[int], candidate: list[int]) -> tuple[float, bool]:
    """The definition: one forward pass over context and candidate."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([context + candidate[:-1]]))[0].double()  # (T, vocab)
    at = range(len(context) - 1, len(context) + len(candidate) - 1)
    values = logits.log_softmax(-1)
    total = sum(float(values[i, token]) for i, token in zip(at, candidate))
    return total, all(int(values[i].argmax()) == token for i, token in zip(at, candidate))


def check(model: GPT, requests: list[Request], **options) -> None:
    for request, scores in zip(requests, log_likelihoods(model, requests, **options)):
        assert len(scores) == len(request.candidates)
        for candidate, found in zip(request.candidates, scores):
            expected, greedy = plain(model, list(request.context), list(candidate))
            assert found.log_likelihood == pytest.approx(expected, abs=2e-5)
            assert (found.tokens, found.greedy) == (len(candidate), greedy)


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("preset", ["tiny", "llama-tiny"])
def test_scores_equal_a_plain_forward_pass(preset: str, kernels: str, monkeypatch):
    """Contexts with a long common beginning and without, of odd lengths; candidates of one token and of several."""
    rng = random.Random(0)
    model = make(preset, kernels=kernels)
    examples = some(rng, 21, 21)
    requests = [
        Request((examples if i % 4 else []) + some(rng, 1, 9), [some(rng, 1, 5) for _ in range(rng.randint(1, 5))])
        for i in range(17)
    ]
    best = int(model.eval()(torch.tensor([examples]))[0, -1].argmax())
    requests.append(Request(examples, [[best], [3], [best, 5]]))  # one candidate is what greedy decoding gives
    for batch_tokens in (40, 1024):
        check(model, requests, batch_tokens=batch_tokens)
    monkeypatch.setattr(module, "_LOGIT_ROWS", 3)
    check(model, requests)


def test_one_context_and_candidates_up_to_the_end_of_the_context():
    rng = random.Random(1)
    model = make()
    context = some(rng, 60, 60)
    check(model, [Request(context, [some(rng, 5, 5), some(rng, 1, 1), some(rng, 3, 3), some(rng, 5, 5)])])
    check(model, [Request([7], [some(rng, 64, 64)])])
    # Together, the first's padded context and the second's candidate would not fit.
    check(model, [Request(some(rng, 60, 60), [[1]]), Request(some(rng, 30, 30), [some(rng, 30, 30)])])
    with pytest.raises(ValueError, match="got one of 65 tokens; accepted are up to the context, 64"):
        log_likelihoods(model, [Request(context, [some(rng, 6, 6)])])


def test_the_common_beginning_is_computed_once(monkeypatch):
    rng = random.Random(2)
    model = make()
    examples = some(rng, 30, 30)
    requests = [Request([*examples, i, *some(rng, 1, 3)], [[1], [2]]) for i in range(20)]
    read = []
    features = GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, t, *a, **k: read.append(t.numel()) or features(self, t, *a, **k))
    log_likelihoods(model, requests)
    assert read[0] == 30
    assert sum(read[1:]) <= 20 * 4


def test_the_mode_is_restored_and_dropout_is_off():
    model = make(dropout=0.5).train()
    requests = [Request([1, 2, 3], [[4, 5], [6]])]
    assert log_likelihoods(model, requests) == log_likelihoods(model, requests)
    assert model.training
    check(model, requests)


def test_progress_counts_every_request():
    counts: list[int] = []
    log_likelihoods(make(), [Request([i, 1], [[2]]) for i in range(7)], batch_tokens=4, advance=counts.append)
    assert len(counts) > 1
    assert sum(counts) == 7


@pytest.mark.parametrize("request_", [Request([], [[1]]), Request([1], []), Request([1], [[2], []])])
def test_empty_requests_are_refused(request_: Request):
    with pytest.raises(ValueError, match="accepted are contexts and candidates of one token or more"):
        log_likelihoods(make(), [Request([1], [[2]]), request_])


def test_logits_of_bfloat16_weights_are_float32():
    """Rounded to bfloat16, log-probabilities around -10 would differ by up to 0.03."""
    model = make().bfloat16()
    requests = [Request([5, 6, 7], [[i] for i in range(VOCAB)])]
    found = torch.tensor([s.log_likelihood for s in log_likelihoods(model, requests)[0]])
    with torch.no_grad():
        x = model.features(torch.tensor([[5, 6, 7]]))[0, -1]
        expected = (model.output_weight.float() @ x.float()).log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_pair_is_encoded_together_and_split_where_the_context_ends():
    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 30], 260)
    context, candidate = encode_pair(tokenizer, "the cat", " sat on")
    assert context == tokenizer.encode("the cat")
    assert context + candidate == tokenizer.encode("the cat sat on")
    # A space at the end of the context goes to the candidate: tokens begin with a space.
    assert encode_pair(tokenizer, "the cat ", "sat on") == (context, candidate)
    assert encode_pair(tokenizer, "the cat \n", "sat")[0] == context
    for context_text, text in (("the cat", ""), ("", "sat"), (" ", "sat")):
        with pytest.raises(ValueError, match="accepted is"):
            encode_pair(tokenizer, context_text, text)


def test_a_tokenizer_with_bos_puts_it_before_the_context_alone():
    made = with_bos(byte_level("<|endoftext|>", "<s>"), "<s>")
    tokenizer = PretrainedTokenizer(made, "bos", special_tokens_map={"eos_token": "<|endoftext|>", "bos_token": "<s>"})
    bos = tokenizer.special_id("bos_token")
    assert encode_pair(tokenizer, "ab", " c") == ([bos, *tokenizer.encode("ab")], tokenizer.encode(" c"))
    assert encode_pair(tokenizer, "", "c") == ([bos], tokenizer.encode("c"))


def test_an_expanded_cache_continues_its_rows_and_leaves_the_old_one_as_it_was():
    model = make()
    model.eval()
    with torch.no_grad():
        cache = model.new_cache(3)
        model.next_logits(torch.tensor([[5, 6, 7], [8, 9, 10]]), cache)
        grown = cache.expand([1, 0, 1], 6)
        logits = model.next_logits(torch.tensor([[1], [1], [2]]), grown)
        again = model.next_logits(torch.tensor([[1], [1]]), cache.expand([0, 1], 4))
        expected = [model(torch.tensor([row]))[0, -1] for row in ([8, 9, 10, 1], [5, 6, 7, 1], [8, 9, 10, 2])]
    assert torch.allclose(logits, torch.stack(expected), atol=1e-4)
    assert torch.allclose(again, torch.stack([expected[1], expected[0]]), atol=1e-4)
    assert (cache.length, grown.length) == (3, 4)


def test_a_cache_refuses_what_it_cannot_expand_to():
    cache = KeyValueCache(1, 4, torch.tensor([1, 0]))
    cache.append(0, torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    cache.length = 3
    with pytest.raises(ValueError, match="capacity: got 2; accepted are 3"):
        cache.expand([0], 2)
    with pytest.raises(ValueError, match="padding: got it for a cache that has padding"):
        cache.expand([0], 5, torch.tensor([1]))
