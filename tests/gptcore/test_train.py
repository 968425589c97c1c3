"""Training: the same curve whatever the kernels, resuming bit by bit, interruption, and every refusal."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from gptkernels import BackendUnavailableError, available_backends

from gptcore import GPT, GPTConfig
from gptcore.tasks import LanguageModel
from gptcore.text.tokenizer import get_tokenizer
from gptcore.train import step, train
from gptcore.train.optimizers import make_optimizer
from gptcore.weights import WeightsError
from tests.gptcore.runs import config, contents, records


def run(*args, **changes):
    return train(config(*args, **changes), progress=False)


def test_the_same_curve_with_either_kernels(corpus: Path, tmp_path: Path):
    """The promise of the flag, held over 20 steps: forward, backward and optimizer."""
    backends = [name for name in available_backends() if name != "reference"]
    for kernels in ("reference", *backends):
        run(corpus, tmp_path / kernels, kernels=kernels, steps=20, eval_interval=20)
    reference = torch.tensor(records(tmp_path / "reference", "loss"))
    assert len(reference) == 20
    assert float(reference[-1]) < float(reference[0]) - 1  # it did learn: the curves are not equal for being flat
    for kernels in backends:
        torch.testing.assert_close(torch.tensor(records(tmp_path / kernels, "loss")), reference, rtol=1e-4, atol=0)


def test_the_kernels_are_loaded_before_the_first_step(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their compilation is no part of a step's time, nor of the time left that is worked out from it."""
    import gptkernels.backend

    happened: list[str] = []
    start, gradients = gptkernels.backend._start, step.gradients
    monkeypatch.setattr(gptkernels.backend, "_start", lambda backend: happened.append(backend) or start(backend))
    monkeypatch.setattr(step, "gradients", lambda *state: happened.append("step") or gradients(*state))
    kernels = "triton" if torch.cuda.is_available() else "native"
    run(corpus, tmp_path / "run", steps=1, kernels="auto")
    assert happened[:2] == [kernels, "step"]


def test_a_run_learns_and_leaves_a_model_that_loads(corpus: Path, tmp_path: Path):
    result = run(corpus, tmp_path / "run", steps=120, batch_size=8, eval_interval=60, warmup=10)
    assert result.steps == 120
    assert not result.interrupted
    assert result.val_loss_full < result.baseline - 1
    model = GPT.from_pretrained(tmp_path / "run", kernels="reference")
    from gptcore.data.prepare import open_split

    windows = list(open_split(corpus, "val").windows(16))
    with torch.no_grad():
        again = sum(float(model.loss(x, y)) for x, y in windows) / len(windows)
    assert again == pytest.approx(result.val_loss_full, rel=1e-6)
    assert records(tmp_path / "run", "val_loss_full") == [result.val_loss_full]
    assert records(tmp_path / "run", "val_loss")[-1] == result.val_loss
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")] == []


def test_every_evaluation_takes_the_same_windows_of_the_whole_text(corpus: Path, tmp_path: Path):
    from gptcore.data.prepare import open_split

    result = run(corpus, tmp_path / "run", steps=2, eval_interval=2, eval_windows=3)
    model = GPT.from_pretrained(tmp_path / "run", kernels="reference").eval()
    windows = list(open_split(corpus, "val").windows(16))
    with torch.no_grad():
        losses = [float(model.loss(x, y)) for x, y in windows]
    count = len(losses)
    spread = [losses[count // 6], losses[count // 2], losses[count * 5 // 6]]
    assert result.val_loss == pytest.approx(sum(spread) / 3, rel=1e-6)
    assert result.val_loss_full == pytest.approx(sum(losses) / count, rel=1e-6)
    every = run(corpus, tmp_path / "all", steps=2, eval_interval=2, eval_windows=count + 1)
    assert every.val_loss == every.val_loss_full == result.val_loss_full
    with pytest.raises(ValueError, match=rf"eval_windows: got 4; accepted when resuming is the run's, {count + 1}"):
        run(corpus, tmp_path / "all", eval_windows=4, resume="always")


def test_a_signal_is_one_for_a_second_and_then_acts_as_usual(monkeypatch):
    from types import SimpleNamespace

    from gptcore.train.loop import _stops_at_signals

    clock = iter([10.0, 10.9, 11.1])
    monkeypatch.setattr("gptcore.train.loop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _stops_at_signals() as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


class Killed(Exception):
    pass


def test_resuming_is_as_if_it_had_never_stopped(corpus: Path, tmp_path: Path, monkeypatch):
    """Killed between two checkpoints: the steps after the last one are done again, dropout and data included."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(corpus, whole, dropout=0.2)
    calls = 0
    batch = __import__("gptcore.data.token_file", fromlist=["TokenFile"]).TokenFile.batch

    def dies(self, *args):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Killed
        return batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr("gptcore.data.token_file.TokenFile.batch", dies)
        with pytest.raises(Killed):
            run(corpus, parts, dropout=0.2)
    assert len(records(parts, "loss")) == 6
    result = run(corpus, parts, dropout=0.2, resume="always")
    assert result.steps == 8
    assert records(parts, "loss") == records(whole, "loss")
    assert records(parts, "lr") == records(whole, "lr")
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        last = Path("checkpoints", "step-00000008", name)
        assert (parts / last).read_bytes() == (whole / last).read_bytes(), name


def test_ctrl_c_finishes_the_step_and_saves(corpus: Path, tmp_path: Path, monkeypatch):
    batch = __import__("gptcore.data.token_file", fromlist=["TokenFile"]).TokenFile.batch
    calls = 0
    before = signal.getsignal(signal.SIGINT)  # ignored, in a shell's background

    def interrupts(self, *args):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr("gptcore.data.token_file.TokenFile.batch", interrupts)
        result = run(corpus, tmp_path / "run")
    assert result.interrupted
    assert result.steps == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert run(corpus, tmp_path / "run", resume="always").steps == 8
    run(corpus, tmp_path / "whole")
    assert records(tmp_path / "run", "loss") == records(tmp_path / "whole", "loss")


def test_accumulated_batches_are_one_batch(corpus: Path, tmp_path: Path):
    run(corpus, tmp_path / "one", batch_size=4, steps=3)
    run(corpus, tmp_path / "two", batch_size=2, accumulate=2, steps=3)
    one, two = (torch.tensor(records(tmp_path / n, "loss")) for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=0)


def test_decay_acts_on_matrices_only(corpus: Path, tmp_path: Path):
    model = GPT(GPTConfig.preset("tiny", vocab_size=300))
    matrices, vectors = make_optimizer(model, config(corpus, tmp_path), torch.device("cpu")).param_groups
    assert matrices["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0.0
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_the_learning_rate_rises_then_follows_a_cosine(corpus: Path, tmp_path: Path):
    c = config(corpus, tmp_path, steps=101, warmup=10, lr=1.0, min_lr=0.1)
    assert [c.lr_at(0), c.lr_at(4), c.lr_at(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert c.lr_at(10) == pytest.approx(1.0)
    assert c.lr_at(55) == pytest.approx(0.55)
    assert c.lr_at(100) == pytest.approx(0.1)


def test_clipping_limits_the_whole_norm(corpus: Path, tmp_path: Path):
    """SGD-like check through AdamW's first step is blind to scale: look at the gradients themselves."""
    run(corpus, tmp_path / "free", steps=1, clip=0.0)
    (norm,) = records(tmp_path / "free", "grad_norm")
    assert norm > 0.5
    seen = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(corpus, tmp_path / "clipped", steps=1, clip=0.5)
    assert seen == [pytest.approx(0.5, rel=1e-4)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(corpus: Path, tmp_path: Path, monkeypatch):
    loss, calls = LanguageModel.loss, 0

    def diverges(self, model, batch):
        nonlocal calls
        calls += model.training
        total, count = loss(self, model, batch)
        return total * (float("nan") if calls == 6 else 1.0), count

    monkeypatch.setattr(LanguageModel, "loss", diverges)
    with pytest.raises(FloatingPointError, match=r"step 6: the loss is nan.*lr 0\.003 may be too high"):
        run(corpus, tmp_path / "run")
    model = GPT.from_pretrained(tmp_path / "run")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_folder_in_use_is_refused_and_left_alone(corpus: Path, tmp_path: Path):
    run(corpus, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds another run; --resume auto continues it"):
        run(corpus, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    assert run(corpus, tmp_path / "run", overwrite=True, steps=4).steps == 4
    assert len(records(tmp_path / "run", "loss")) == 4
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds 'cat\.jpg' and no run"):
            run(corpus, tmp_path / "photos", overwrite=overwrite)


def test_resuming_what_does_not_fit(corpus: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="nothing to resume"):
        run(corpus, tmp_path / "empty", resume="always")
    run(corpus, tmp_path / "run", steps=4)
    with pytest.raises(ValueError, match=r"batch_size: got 3; accepted when resuming is the run's, 2"):
        run(corpus, tmp_path / "run", batch_size=3, resume="always")
    with pytest.raises(ValueError, match=r"steps: got 4; the run in .* has done 4, accepted are more"):
        run(corpus, tmp_path / "run", steps=4, resume="always")


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (
            BackendUnavailableError,
            r"kernels: got 'native', which cannot run here: there is no C\+\+ compiler",
            {"kernels": "native"},
        ),
        (ValueError, r"device: got 'tpu'", {"device": "tpu"}),
        (ValueError, r"steps: got 0; accepted are positive", {"steps": 0}),
        (ValueError, r"lr: got 0\.0", {"lr": 0.0, "min_lr": 0.0}),
        (ValueError, r"lr: got 0\.0001; accepted are positive numbers not under min_lr", {"lr": 1e-4}),
        (ValueError, r"beta2: got 1\.0", {"beta2": 1.0}),
        (ValueError, r"clip: got -1", {"clip": -1.0}),
        (ValueError, r"preset: got 'huge'", {"preset": "huge"}),
        (ValueError, r"context=100000 needs at least 100001", {"context": 100000}),
        (
            ValueError,
            r"sample_prompt: got ''; accepted is a text of one token",
            {"sample_prompt": "", "sample_tokens": 4},
        ),
        (ValueError, rf"seed: got {10**30}; accepted are integers between -2\*\*63 and 2\*\*63", {"seed": 10**30}),
        (ValueError, r"overwrite: got True with resume always", {"resume": "always", "overwrite": True}),
    ],
)
def test_bad_input_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error, match: str, changes: dict
):
    from gptkernels import _native

    monkeypatch.setattr(_native, "why_not", lambda: "there is no C++ compiler")
    with pytest.raises(error, match=match):
        run(corpus, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer(corpus: Path, tmp_path: Path):
    import shutil

    shutil.copytree(corpus, tmp_path / "data")
    from gptcore.text.tokenizer import Tokenizer

    Tokenizer.train(["something else entirely, " * 50], vocab_size=280).save(tmp_path / "data" / "tokenizer.json")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        run(tmp_path / "data", tmp_path / "run")


def test_only_the_data_that_a_run_began_with_goes_on(corpus: Path, tmp_path: Path):
    import shutil

    from gptcore.data.prepare import prepare

    (tmp_path / "text.txt").write_text("7 plus 9 is 16. " * 400)
    prepare(tmp_path / "text.txt", tmp_path / "other", tokenizer=corpus / "tokenizer.json", progress=False)
    shutil.copytree(corpus, tmp_path / "copy")
    run(corpus, tmp_path / "run", steps=4)
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"data: {tmp_path}/other .* differs from .* trained on, {corpus} \("):
        run(tmp_path / "other", tmp_path / "run", resume="always")
    assert contents(tmp_path / "run") == before
    assert run(tmp_path / "copy", tmp_path / "run", resume="always").steps == 8


@pytest.mark.parametrize("mask", [False, True])
def test_documents_reach_the_model_when_they_are_to_be_masked(corpus: Path, tmp_path: Path, monkeypatch, mask: bool):
    seen = []
    loss = LanguageModel.loss

    def watched(self, model, batch):
        seen.append((batch.tokens, batch.documents))
        return loss(self, model, batch)

    monkeypatch.setattr(LanguageModel, "loss", watched)
    run(corpus, tmp_path / "run", document_mask=mask, steps=2, batch_size=64, eval_interval=1)
    end = get_tokenizer(corpus / "tokenizer.json").eot_token
    assert len(seen) >= 4  # training and evaluation
    for tokens, documents in seen:
        if not mask:
            assert documents is None
            continue
        begins = set(range(0, tokens.numel(), tokens.shape[1]))
        begins |= {i + 1 for i, token in enumerate(tokens.flatten().tolist()) if token == end}
        assert documents.cu_lengths.tolist() == sorted(begins | {tokens.numel()})
