"""The validation split has the wanted share, by whole documents where they meet it; otherwise one is cut and reported."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from gptcore.data import corpus as corpus_module
from gptcore.data import encode
from gptcore.data import split as split_module
from gptcore.data.corpus import Document
from gptcore.data.prepare import open_split, prepare
from gptcore.data.report import PrepareReport, read_report
from gptcore.data.split import CUT, TOLERANCE, VAL, plan_split
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.gptcore.runs import main

WHOLE = pytest.mark.filterwarnings("error::UserWarning")  # of a document that is cut
CUT_IN_TWO = r"the largest document was cut in two"
FEW_PAIRS = pytest.mark.filterwarnings("ignore:the corpus has too few pairs")


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return folder


def run(source: Path, out: Path, **options: object) -> PrepareReport:
    return prepare(source, out, **({"vocab_size": 300, "progress": False} | options))  # type: ignore[arg-type]


def read(out: Path) -> list[list[str]]:
    """The documents of the training and of the validation split; each ends with an end-of-text token."""
    tokenizer, found = Tokenizer.load(out), []
    for name in ("train", "val"):
        *documents, rest = tokenizer.decode(open_split(out, name).tokens).split(END_OF_TEXT)
        assert rest == ""
        found.append(documents)
    return found


def lines(count: int, what: str = "a book") -> str:
    return "".join(f"line {i} of {what}, naïve 🙂\n" for i in range(count))


@pytest.mark.parametrize("val_fraction", [0.1, 0.01, 0.5, 0.9])
def test_a_book_and_a_note_are_split_by_the_wanted_share(tmp_path: Path, val_fraction: float) -> None:
    book = lines(2000)
    for i in range(4):  # whichever of the two has the smaller hash
        note = f"note {i}"
        source = write(tmp_path / f"texts{i}", [book, note])
        with pytest.warns(UserWarning, match=CUT_IN_TWO):
            report = run(source, tmp_path / f"out{i}", val_fraction=val_fraction)
        whole = len((book + note).encode())
        assert report.val.bytes + report.train.bytes == whole
        smaller = min(val_fraction, 1 - val_fraction)
        assert abs(report.val.bytes / whole - val_fraction) <= TOLERANCE * smaller + 1e-3
        train, val = read(tmp_path / f"out{i}")
        [head] = set(train) - {note}
        [tail] = set(val) - {note}
        assert (head + tail, (note in train) + (note in val)) == (book, 1)
        assert head.endswith("\n")
        assert report.cut_documents == 1
        assert report.train.documents + report.val.documents == 3


@WHOLE
def test_many_documents_stay_whole(tmp_path: Path) -> None:
    texts = [f"document {i:03}, all of one size" for i in range(100)]
    report = run(write(tmp_path / "texts", texts), tmp_path / "out", val_fraction=0.13)
    train, val = read(tmp_path / "out")
    assert (sorted(train + val), len(val)) == (texts, 13)
    assert report.cut_documents == 0
    assert "cut" not in str(report)
    assert f"{report.val.bytes:,} bytes, 13.0%" in str(report)


@WHOLE
def test_a_document_too_large_for_validation_is_passed_over(tmp_path: Path) -> None:
    notes = [f"note {i:04}, one of many" for i in range(200)]
    book = lines(300)
    run(write(tmp_path / "texts", [book, *notes]), tmp_path / "out")
    train, val = read(tmp_path / "out")
    assert book in train
    assert sorted(train + val) == sorted([book, *notes])
    assert sum(len(text.encode()) for text in val) == pytest.approx(
        0.1 * len((book + "".join(notes)).encode()), rel=0.1
    )


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 20) | st.integers(0, 100_000), min_size=1, max_size=30),
    copies=st.integers(1, 3),
    val_fraction=st.floats(1e-3, 1 - 1e-3),
    seed=st.integers(0, 99),
)
def test_the_share_is_met_for_any_sizes_of_documents(
    sizes: list[int], copies: int, val_fraction: float, seed: int
) -> None:
    texts = [f"{i} ".ljust(size, "x")[:size] for i, size in enumerate(sizes)]
    texts += texts[:1] * (copies - 1)
    random.Random(seed).shuffle(texts)
    whole = sum(map(len, texts))
    assume(whole > 1)
    split = plan_split(
        [Document(text, lambda text=text: iter([text] if text else [])) for text in texts], val_fraction, id
    )
    sides = dict(zip(texts, split.sides.tolist()))
    assert [sides[text] for text in texts] == split.sides.tolist()  # copies are together
    of_cut = [len(text) - split.cut for text in texts if sides[text] == CUT]
    assert all(end >= 0 for end in of_cut)
    val = sum(len(text) for text in texts if sides[text] == VAL) + sum(of_cut)
    wanted = min(max(round(whole * val_fraction), 1), whole - 1)
    rounding = len(of_cut)
    assert abs(val - wanted) <= TOLERANCE * min(wanted, whole - wanted) + rounding
    assert split.slack * len(of_cut) <= TOLERANCE * min(wanted, whole - wanted)
    assert split.empty == texts.count("")
    if of_cut:
        assert max(len(text) for text in texts if sides[text] != VAL) == of_cut[0] + split.cut


def test_the_split_depends_on_the_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [lines(400 + i, f"book {i}") for i in range(5)]
    for i, order in enumerate((texts, texts[::-1]), 1):
        source = write(tmp_path / f"texts{i}", order)
        with pytest.warns(UserWarning, match=CUT_IN_TWO):
            run(source, tmp_path / f"out{i}", shard_tokens=500)
    assert [sorted(split) for split in read(tmp_path / "out1")] == [sorted(split) for split in read(tmp_path / "out2")]
    for name in ("train", "val"):
        assert len(list((tmp_path / "out1").glob(f"{name}-*.bin"))) > 1
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 999)
    with pytest.warns(UserWarning, match=CUT_IN_TWO):
        run(tmp_path / "texts1", tmp_path / "out3", shard_tokens=500)
    for path in (tmp_path / "out1").iterdir():
        assert path.read_bytes() == (tmp_path / "out3" / path.name).read_bytes()


@pytest.mark.parametrize(("copies", "said"), [(1, CUT_IN_TWO), (3, "document, which comes 3 times, was cut in two")])
def test_a_single_document_is_cut_at_a_line(tmp_path: Path, copies: int, said: str) -> None:
    text = lines(20_000)  # several pieces
    with pytest.warns(UserWarning, match=said):
        report = run(write(tmp_path / "texts", [text] * copies), tmp_path / "out", val_fraction=0.25)
    train, val = read(tmp_path / "out")
    assert (len(set(train)), len(set(val)), len(train), len(val)) == (1, 1, copies, copies)
    assert train[0] + val[0] == text
    assert val[0].startswith("line ")
    assert len(val[0].encode()) == pytest.approx(0.25 * len(text.encode()), abs=60)  # a line
    assert report.cut_documents == copies
    assert said in str(report)
    assert report.train.bytes + report.val.bytes == copies * len(text.encode())


@pytest.mark.parametrize(
    ("text", "wanted", "slack", "head"),
    [
        ("one\n\ntwo\nthree four", 14, 12, "one\n\n"),
        ("one\n\ntwo\nthree four", 14, 8, "one\n\ntwo\n"),
        ("one\n\ntwo\nthree four", 17, 4, "one\n\ntwo\nthree"),
        ("one\n\ntwo\nthree four", 12, 2, "one\n\ntwo\nthr"),
        ("one\n\ntwo\nthree four", 5, 0, "one\n\n"[:5]),
        ("日本語", 4, 0, "日"),
        ("日本語", 5, 0, "日本"),
        ("日本語", 1, 0, "日"),
        ("日本語", 8, 9, "日本"),
        (" 日", 3, 9, " "),
        ("日", 2, 9, "日"),
    ],
)
def test_where_a_text_is_cut(text: str, wanted: int, slack: int, head: str) -> None:
    assert text.encode()[: split_module._cut_position(text.encode(), wanted, slack)].decode() == head


@FEW_PAIRS
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(
    text=st.text(alphabet="ab \n\r\té日🙂", min_size=2, max_size=60),
    size=st.integers(5, 30),
    share=st.floats(0.01, 0.99),
)
@example(text="a🙂", size=5, share=0.5)  # the last piece is one character, and the cut inside it
def test_a_cut_loses_nothing_and_leaves_something_on_both_sides(
    tmp_path: Path, text: str, size: int, share: float
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus_module, "_PIECE_BYTES", size)
        documents = list(corpus_module.documents(tmp_path / "a.txt"))
        split = plan_split(documents, share, id)
        pieces = list(split.pieces(documents, id))
    train, val = (["".join(p.text for p in pieces if p.in_val is side)] for side in (False, True))
    assert train[0] + val[0] == text
    assert train[0]
    assert val[0]
    assert [p.is_last for p in pieces].count(True) == 2
    assert pieces[-1].is_last
    assert [p.in_val for p in pieces] == sorted(p.in_val for p in pieces)


@FEW_PAIRS
@pytest.mark.filterwarnings("ignore:the largest document")
@pytest.mark.parametrize(("texts", "train", "val"), [(["ab"], ["a"], ["b"]), (["é", "è", "a"], ["é", "è"], ["a"])])
def test_the_shortest_corpora(tmp_path: Path, texts: list[str], train: list[str], val: list[str]) -> None:
    run(write(tmp_path / "texts", texts), tmp_path / "out", val_fraction=0.2)
    assert read(tmp_path / "out") == [train, val]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "the corpus is empty"),
        (["é"], "too short to split: it has 1 character, and 2 are needed"),
        (["é"] * 3, "too short to split: a document of one character cannot be cut in two"),
    ],
)
@FEW_PAIRS
def test_a_corpus_too_short_to_split(tmp_path: Path, texts: list[str], message: str) -> None:
    source = write(tmp_path / "texts", texts)
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_the_command_reports_a_cut_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "texts", [lines(500)])
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", str(source), "--out", str(tmp_path / "out"), "--vocab-size", "300"])
    shown = capsys.readouterr()
    said = f"{CUT_IN_TWO}, and its end is for validation: whole documents alone do not meet val_fraction"
    assert f"gptcore: warning: {said}\n" in shown.err
    assert f"  {said}\n" in shown.out
    assert read_report(tmp_path / "out").cut_documents == 1


@pytest.mark.filterwarnings("ignore:the largest document")
def test_a_corpus_of_an_earlier_version_is_read_but_not_reused(tmp_path: Path) -> None:
    source = write(tmp_path / "texts", [lines(500)])
    new = run(source, tmp_path / "out")
    path = tmp_path / "out/corpus.json"
    state = json.loads(path.read_text())
    del state["cut_documents"], state["settings"]["split"]
    path.write_text(json.dumps(state))
    old = read_report(tmp_path / "out")
    assert (old.train, old.cut_documents) == (new.train, 0)
    assert len(open_split(tmp_path / "out", "train")) == new.train.tokens
    with pytest.raises(FileExistsError, match="prepared with an earlier version's split; pass overwrite=True"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", overwrite=True) == new


def test_planning_needs_little_memory() -> None:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 1 << 64, 200_000, dtype=np.uint64)
    sizes = generator.integers(0, 10_000, 200_000, dtype=np.uint64)
    tracemalloc.start()
    split = split_module._plan(keys, sizes, 0.1, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert split.cut_documents == 0
    assert sizes[split.sides == VAL].sum() == pytest.approx(0.1 * sizes.sum(), rel=TOLERANCE)
    assert peak < 8 * len(keys)
