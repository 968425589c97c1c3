"""What is only shown never ends a run: closed pipes, full disks, poor encodings, closing terminals, pictures, samples."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore.train import train
from gptcore.train.checkpoint import newest
from gptcore.train.guard import Guard, GuardedStream
from gptcore.train.metrics import MetricsLog, read_records
from gptcore.train.state import TrainState
from tests.gptcore.runs import config, main, records

OPTIONS = (
    "--preset tiny --context 16 --batch-size 2 --steps 8 --warmup 2 --eval-interval 8 --eval-windows 2 --sample-tokens 3"
    " --dtype fp32 --kernels reference"
)


pytestmark = pytest.mark.usefixtures("no_peak")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory) -> Path:
    """The runs of `run_them`, each with what it said and its status."""
    folder = tmp_path_factory.mktemp("shown")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gptcore.test_train_shown", str(corpus), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def run_them(corpus: Path, folder: Path) -> None:
    """Every run is a fork of this process, which has imported everything and computed nothing with torch."""
    import matplotlib.figure
    import torch
    import torch._dynamo  # the optimizer does

    from gptcore.train import loop, step

    figure = matplotlib.figure.Figure()
    figure.add_subplot(title="fonts are found once, not in each fork")
    figure.savefig(io.BytesIO())
    loop.peak_flops = lambda *_: (1e12, "not measured")  # as in `_no_peak`

    def hang_up() -> None:
        """As a terminal that closes: the signal comes twice."""
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)

    def command(name: str, *options: str, stdout: int | None = None, stderr: int | None = None, **changes) -> None:
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
            (folder / f"{name}.status").write_text(str(os.waitstatus_to_exitcode(status)))
            return
        outputs = [os.open(folder / f"{name}.{kind}", os.O_CREAT | os.O_WRONLY) for kind in ("stdout", "stderr")]
        os.dup2(outputs[0] if stdout is None else stdout, 1)
        os.dup2(outputs[1] if stderr is None else stderr, 2)
        sys.stdout.reconfigure(encoding=changes.get("encoding", "utf-8"), errors="strict")
        torch.set_num_threads(1)
        signal.signal(signal.SIGHUP, changes.get("hangup", signal.SIG_DFL))
        if "at_step_6" in changes:
            gradients, calls = step.gradients, 0

            def instead(*arguments):
                nonlocal calls
                calls += 1
                if calls == 6:
                    changes["at_step_6"]()
                return gradients(*arguments)

            step.gradients = instead
        out = folder / name.removesuffix("-resumed")
        main(["train", "--data", str(corpus), "--out", str(out), *OPTIONS.split(), *options])

    full, nobody = os.open("/dev/full", os.O_WRONLY), os.pipe()
    os.close(nobody[0])
    odd = ("--sample-prompt", "\u2192 \u2603")
    command("whole")
    command("utf-8", *odd)
    command("ascii", *odd, encoding="ascii")
    command("cp1252", *odd, encoding="cp1252")
    command("full", stdout=full)
    command("pipe", stdout=nobody[1])
    command("all-in-pipe", stdout=nobody[1], stderr=nobody[1])
    command("hangup", at_step_6=hang_up)
    command("hangup-resumed", "--resume", "always")
    command("nohup", at_step_6=hang_up, hangup=signal.SIG_IGN)


def said(runs: Path, name: str, kind: str = "stdout") -> str:
    return (runs / f"{name}.{kind}").read_text(errors="replace")


def ended_as_the_whole(runs: Path, name: str) -> None:
    for file in ("metrics.jsonl", "model.safetensors", "checkpoints/step-00000008/random.safetensors"):
        assert (runs / name / file).read_bytes() == (runs / "whole" / file).read_bytes()


@pytest.mark.parametrize("name", ["ascii", "cp1252", "full", "pipe", "all-in-pipe", "nohup"])
def test_a_run_goes_on_whatever_it_prints_to(runs: Path, name: str):
    assert said(runs, name, "status") == "0"
    ended_as_the_whole(runs, name)


@pytest.mark.parametrize(("name", "reason"), [("full", "No space left on device"), ("pipe", "Broken pipe")])
def test_what_cannot_be_shown_is_said_once(runs: Path, name: str, reason: str):
    (line,) = said(runs, name, "stderr").splitlines()
    assert line.startswith("gptcore: warning: printing failed (")
    assert reason in line


@pytest.mark.parametrize(("name", "sample"), [("utf-8", "\u2192 \u2603"), ("ascii", "? ?"), ("cp1252", "? ?")])
def test_characters_that_an_encoding_lacks(runs: Path, name: str, sample: str):
    assert said(runs, name).count(f"\n  {sample}") == 1
    assert said(runs, name, "stderr") == ""


def test_a_console_of_a_poor_encoding():
    written = io.BytesIO()
    stream = GuardedStream(io.TextIOWrapper(written, "ascii"), Guard())
    stream.write("a \u2192 b")
    stream.flush()
    assert written.getvalue() == b"a ? b"


def test_a_closing_terminal_saves(runs: Path):
    assert said(runs, "hangup", "status") == "130"
    assert "interrupted: step 6 is saved" in said(runs, "hangup")
    assert said(runs, "hangup-resumed", "status") == "0"
    ended_as_the_whole(runs, "hangup")


def test_pictures_and_samples_that_fail(corpus: Path, tmp_path: Path, monkeypatch, capfd):
    def fails(*_: object) -> None:
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(TrainState, "sample", fails)
    monkeypatch.setattr(MetricsLog, "plot", fails)
    assert train(config(corpus, tmp_path / "run"), progress=False).steps == 8
    assert newest(tmp_path / "run", fall_back=False).progress.step == 8
    what = "failed (RuntimeError: no memory at all); the run goes on without it\n"
    assert capfd.readouterr().err == f"gptcore: warning: the sample {what}gptcore: warning: loss.png {what}"


def test_tensorboard_that_fails(corpus: Path, tmp_path: Path, monkeypatch, capfd):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def fails(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(writer, "add_scalar", fails)
    train(config(corpus, tmp_path / "run", tensorboard=True), progress=False)
    assert len(records(tmp_path / "run", "loss")) == 8
    assert capfd.readouterr().err.count("gptcore: warning: TensorBoard failed (OSError: gone)") == 1


def test_a_guard_lets_a_second_ctrl_c_through():
    with pytest.raises(KeyboardInterrupt), Guard()("the sample"):
        raise KeyboardInterrupt


def test_lines_wait_until_the_disk_has_room(tmp_path: Path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = MetricsLog(tmp_path, 0, evaluated=True, tensorboard=False, guard=Guard())
    run.metrics(1, loss=1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))  # in the middle of the second line
    try:
        run.metrics(2, loss=2.0)
        run.metrics(3, loss=3.0)
        with pytest.raises(OSError, match=r"metrics\.jsonl could not be written .*File too large"):
            run.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.metrics(4, loss=4.0)
    run.close()
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": step, "loss": float(step)} for step in range(1, 5)]


if __name__ == "__main__":
    run_them(Path(sys.argv[1]), Path(sys.argv[2]))
