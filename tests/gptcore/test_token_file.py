"""Token files and shards: their bytes, windows and batches, errors for damaged files, and what an interruption leaves."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcore.data.token_file import ShardWriter, TokenFile, TokenWriter

FINGERPRINT = "00112233445566778899aabbccddeeff"
HEADER = 40


def write_tokens(path: Path, tokens: list[int], vocab_size: int = 1000) -> TokenFile:
    with TokenWriter(path, vocab_size=vocab_size, fingerprint=FINGERPRINT) as writer:
        writer.write(tokens)
    return TokenFile.open(path)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vocab_size=st.sampled_from([1, 300, 65536, 65537, 2**32 - 1]),
    chunks=st.lists(st.lists(st.integers(0, 2**32)), max_size=5),
)
def test_token_file_round_trip(tmp_path: Path, vocab_size: int, chunks: list[list[int]]) -> None:
    chunks = [[token % vocab_size for token in chunk] for chunk in chunks]
    path = tmp_path / "tokens.bin"
    with TokenWriter(path, vocab_size=vocab_size, fingerprint=FINGERPRINT) as writer:
        for chunk in chunks:
            writer.write(chunk)
    file = TokenFile.open(path)
    expected = [token for chunk in chunks for token in chunk]
    assert file.tokens.tolist() == expected
    assert len(file) == writer.count == len(expected)
    assert (file.vocab_size, file.fingerprint) == (vocab_size, FINGERPRINT)
    assert file.tokens.dtype == ("<u2" if vocab_size <= 65536 else "<u4")


def test_the_bytes_of_a_token_file(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t.bin", [1, 258], vocab_size=300)
    expected = struct.pack("<8sHHIQ16sHH", b"gpttoken", 1, 2, 300, 2, bytes.fromhex(FINGERPRINT), 1, 258)
    assert (tmp_path / "t.bin").read_bytes() == expected


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, [1, 2, 3])

    def interrupted() -> None:
        with TokenWriter(path, vocab_size=9, fingerprint=FINGERPRINT) as writer:
            writer.write([4, 5])
            assert len(names_in(tmp_path)) == 2  # the temporary file is beside it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == ["t.bin"]
    assert TokenFile.open(path).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0, 9], ValueError, r"token id 9 is not in the vocabulary \(0 to 8\)"),
        ([-1], ValueError, "token id -1 is not"),
        ([0.5], TypeError, "must be integers; got float64"),
        ([[1, 2]], ValueError, r"must be 1-D; got the shape \(1, 2\)"),
    ],
)
def test_bad_tokens_are_refused_and_no_file_is_left(
    tmp_path: Path, tokens: list[int], error: type[Exception], message: str
) -> None:
    with (
        pytest.raises(error, match=message),
        TokenWriter(tmp_path / "t.bin", vocab_size=9, fingerprint=FINGERPRINT) as writer,
    ):
        writer.write(tokens)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("vocab_size", [0, -1, 2**32])
def test_the_writer_refuses_a_bad_vocab_size(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must be in 1 to .*got {vocab_size}"):
        TokenWriter(tmp_path / "t.bin", vocab_size=vocab_size, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("fingerprint", ["", "abcd", "z" * 32])
def test_the_writer_refuses_a_bad_fingerprint(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(ValueError, match="fingerprint must be 32 hexadecimal digits"):
        TokenWriter(tmp_path / "t.bin", vocab_size=9, fingerprint=fingerprint)


def patch(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + data + old[offset + len(data) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda old: old[:-1], "is truncated: 3 tokens make 46 bytes, but it has 45"),
        (lambda old: old[:HEADER], "is truncated: 3 tokens make 46 bytes, but it has 40"),
        (lambda old: old + b"\0\0", "is damaged: 3 tokens make 46 bytes, but it has 48"),
        (lambda old: old[:20], "is truncated: its header has 20 bytes of 40"),
        (lambda old: b"", "is not a token file"),
        (patch(0, b"\x93NUMPY"), "is not a token file: it begins with b'.x93NUMPYen'"),
        (patch(8, b"\x02"), "has format version 2; this gptcore reads 1"),
        (patch(10, b"\x03"), "is damaged: it says 3 bytes per token"),
        (patch(10, b"\x04"), "is truncated: 3 tokens make 52 bytes"),
        (patch(16, b"\xff" * 8), "is truncated: 18446744073709551615 tokens"),
    ],
)
def test_opening_a_damaged_token_file(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        TokenFile.open(path)
    assert str(path) in str(caught.value)


def test_opening_a_missing_token_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no token file at .*t\.bin"):
        TokenFile.open(tmp_path / "t.bin")


def test_batches_are_windows_and_their_next_tokens(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", [7 * i for i in range(12)])
    x, y = file.batch(400, 9, torch.Generator().manual_seed(1))
    assert x.dtype == y.dtype == torch.int64
    starts = x[:, :1] // 7
    assert torch.equal(x, 7 * (starts + torch.arange(9)))
    assert torch.equal(y, x + 7)
    assert set(starts.flatten().tolist()) == {0, 1, 2}  # each possible start, the last one included


def test_batches_repeat_with_the_generator(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(500)))
    first, again, other = (file.batch(8, 16, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_windows_cover_the_file_once(tmp_path: Path, batch_size: int) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(23)))
    batches = list(file.windows(4, batch_size))
    x, y = (torch.cat(part) for part in zip(*batches))
    assert torch.equal(x, torch.arange(20).reshape(5, 4))
    assert torch.equal(y, torch.arange(1, 21).reshape(5, 4))
    assert all(len(part) == batch_size for part, _ in batches[:-1])


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize(("count", "starts"), [(1, [8]), (2, [4, 12]), (3, [0, 8, 16]), (4, [0, 4, 12, 16]), (9, None)])
def test_some_windows_are_spread_over_the_file(tmp_path: Path, batch_size: int, count: int, starts: list[int]) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(23)))
    x = torch.cat([part for part, _ in file.windows(4, batch_size, count)])
    assert x[:, 0].tolist() == (starts or [0, 4, 8, 12, 16])


def test_the_digest_depends_on_the_ids_and_not_on_the_shards(tmp_path: Path) -> None:
    ids = list(range(100))
    whole = write_tokens(tmp_path / "t.bin", ids)
    shards = TokenFile.open_shards(tmp_path, "t", write_shards(tmp_path, [100], 30).shards)
    assert shards.digest() == whole.digest()
    others = [ids[:-1], ids[1:], [*ids, 0], [*ids[:50], 0, *ids[51:]], [*ids[50:], *ids[:50]]]
    digests = [write_tokens(tmp_path / f"{i}.bin", other).digest() for i, other in enumerate(others)]
    assert len({whole.digest(), *digests}) == 6


@pytest.mark.parametrize("use", [lambda file: file.batch(1, 8), lambda file: file.windows(8)])
def test_a_file_shorter_than_a_window(tmp_path: Path, use: Callable[[TokenFile], object]) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(8)))
    with pytest.raises(ValueError, match="has 8 tokens; context=8 needs at least 9"):
        use(file)
    longer = write_tokens(tmp_path / "u.bin", list(range(9)))
    assert longer.batch(1, 8)[0].tolist() == [list(range(8))]
    assert [x.tolist() for x, _ in longer.windows(8)] == [[list(range(8))]]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda file: file.batch(0, 2), "batch_size must be at least 1; got 0"),
        (lambda file: file.batch(1, 0), "context must be at least 1; got 0"),
        (lambda file: file.windows(0), "context must be at least 1; got 0"),
        (lambda file: file.windows(2, -1), "batch_size must be at least 1; got -1"),
    ],
)
def test_sizes_below_one_are_refused(tmp_path: Path, use: Callable[[TokenFile], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(write_tokens(tmp_path / "t.bin", [1, 2, 3]))


def test_a_token_past_the_vocabulary_is_found_when_used(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, [1, 2, 3], vocab_size=10)
    path.write_bytes(patch(HEADER + 4, b"\x0a")(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged: it holds token id 10; its vocabulary has 10"):
        TokenFile.open(path).batch(4, 2)


def write_shards(folder: Path, counts: list[int], shard_tokens: int, name: str = "t") -> ShardWriter:
    """Write the ids 0, 1, 2, ... into shards, `counts` at a time."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, name, shard_tokens, vocab_size=1000, fingerprint=FINGERPRINT) as writer:
        start = 0
        for count in counts:
            writer.write(np.arange(start, start + count))
            start += count
    return writer


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 30), max_size=6), shard_tokens=st.integers(1, 40))
def test_shards_read_as_one_text_wherever_they_end(counts: list[int], shard_tokens: int) -> None:
    total = sum(counts)
    with tempfile.TemporaryDirectory() as name:
        shards = write_shards(Path(name), counts, shard_tokens).shards
        full, rest = divmod(total, shard_tokens)
        assert shards == tuple([shard_tokens] * full + [rest] * (rest > 0 or total == 0))
        assert names_in(Path(name)) == [f"t-{i:05}.bin" for i in range(len(shards))]
        file = TokenFile.open_shards(name, "t", shards)
        assert len(file) == total
        assert file.tokens.tolist() == list(range(total))
        for start in range(0, total, 7):
            for stop in (start, start + 1, (start + total) // 2, total):
                assert file.read(start, stop).tolist() == list(range(start, stop))


@pytest.mark.parametrize("shard_tokens", [1, 4, 5, 22, 23, 24])
def test_windows_and_batches_cross_shards(tmp_path: Path, shard_tokens: int) -> None:
    whole = write_tokens(tmp_path / "t.bin", list(range(23)))
    file = TokenFile.open_shards(tmp_path, "t", write_shards(tmp_path, [23], shard_tokens).shards)
    for batch_size in (1, 3):
        for (x, y), (want_x, want_y) in zip(file.windows(4, batch_size), whole.windows(4, batch_size), strict=True):
            assert torch.equal(x, want_x)
            assert torch.equal(y, want_y)
    for rows in (slice(None), slice(2, 5)):
        drawn, wanted = (f.batch(64, 6, torch.Generator().manual_seed(5), rows) for f in (file, whole))
        assert torch.equal(drawn[0], wanted[0])
        assert torch.equal(drawn[1], wanted[1])
    with pytest.raises(ValueError, match="has 23 tokens; context=23 needs at least 24"):
        file.batch(1, 23)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, r"there is no token file at .*t-00001\.bin"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), ValueError, r"t-00001\.bin is truncated: 4 tokens"),
        (lambda path: write_tokens(path, [1, 2, 3]), ValueError, r"t-00001\.bin has 3 tokens; it must have 4"),
        (
            lambda path: write_tokens(path, [1] * 4, 999),
            ValueError,
            r"t-00001\.bin was .* another tokenizer than .*00000",
        ),
    ],
)
def test_a_bad_shard_is_named(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    shards = write_shards(tmp_path, [10], 4).shards
    spoil(tmp_path / "t-00001.bin")
    with pytest.raises(error, match=message):
        TokenFile.open_shards(tmp_path, "t", shards)


def test_an_exception_keeps_only_complete_shards(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "t", 4, vocab_size=9, fingerprint=FINGERPRINT) as writer:
            writer.write(np.arange(6))
            writer.write(np.array([9]))

    with pytest.raises(ValueError, match="token id 9 is not in the vocabulary"):
        interrupted()
    assert names_in(tmp_path) == ["t-00000.bin"]
    assert TokenFile.open(tmp_path / "t-00000.bin").tokens.tolist() == [0, 1, 2, 3]
