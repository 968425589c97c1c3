"""A pretrained model from end to end. `pytest -m network` downloads SmolLM2-135M-Instruct (93 MB) once."""

from __future__ import annotations

import pytest
import torch
from gptkernels import available_backends
from gptkernels.testing import assert_within_budget

from gptcore import GPT
from gptcore.assets import fetch
from gptcore.generate import generate_text
from gptcore.text.tokenizer import get_tokenizer
from gptcore.weights import config_to_huggingface, locate, to_huggingface

NAME = "smollm2-135m-instruct"
FUSED = "triton" if torch.cuda.is_available() else "native"


@pytest.mark.network
def test_the_capital_of_france():
    from transformers import LlamaConfig, LlamaForCausalLM

    fetch(NAME, progress=False)
    assert FUSED in available_backends()
    model = GPT.from_pretrained(NAME, kernels=FUSED).eval()
    tokenizer = get_tokenizer(locate(NAME))
    (text,) = generate_text(model, tokenizer, ["The capital of France is"], 4, temperature=0.0)
    assert text.startswith(" Paris")
    narrow = GPT.from_pretrained(NAME, kernels=FUSED, dtype=torch.bfloat16).eval()
    assert generate_text(narrow, tokenizer, ["The capital of France is"], 4, temperature=0.0) == [text]

    plain = LlamaForCausalLM(LlamaConfig(**config_to_huggingface(model.config))).eval()
    plain.load_state_dict(to_huggingface(model.state_dict(), model.config), strict=False)
    plain.tie_weights()
    tokens = torch.tensor([tokenizer.encode("The capital of France is Paris, and that of Italy is Rome. " * 4)])
    with torch.no_grad():
        ours, theirs = model(tokens), plain(tokens).logits
        assert_within_budget("logits", ours, theirs, plain.double()(tokens).logits)
