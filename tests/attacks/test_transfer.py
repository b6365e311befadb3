from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mea_ray.attacks.transfer import TransferSet
from mea_ray.core.errors import ArtifactError, DataError


def answers(count: int, classes: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), count).astype(np.float32)


def test_prefixes_are_nested_and_survive_the_process(tmp_path: Path) -> None:
    words = answers(5)
    first = TransferSet(tmp_path / "t")
    first.append(np.array([7, 2, 9]), words[:3])
    first.append(np.array([4, 1]), words[3:])
    for transfer in (first, TransferSet(tmp_path / "t")):
        assert len(transfer) == 5
        indices, remaining = transfer.prefix(4)
        assert indices.tolist() == [7, 2, 9, 4] and indices.dtype == np.int64
        np.testing.assert_array_equal(remaining, words[:4])
        np.testing.assert_array_equal(transfer.prefix(2)[0], indices[:2])


def test_goes_on_after_what_a_killed_writer_left(tmp_path: Path) -> None:
    TransferSet(tmp_path).append(np.array([0]), answers(1))
    (tmp_path / ".chunk-000000000001.npz.4242").write_bytes(b"half a chu")
    again = TransferSet(tmp_path)
    again.append(np.array([5]), answers(1))
    assert TransferSet(tmp_path).indices.tolist() == [0, 5]


def test_the_callers_arrays_are_copied() -> None:
    words, transfer = answers(2), TransferSet()
    transfer.append(np.array([0, 1]), words)
    before = words.copy()
    words[:] = 0
    np.testing.assert_array_equal(transfer.answers, before)


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_damaged_chunk_is_refused(tmp_path: Path, keep: int) -> None:
    TransferSet(tmp_path).append(np.arange(50), answers(50))
    (chunk,) = tmp_path.glob("chunk-*")
    chunk.write_bytes(chunk.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="delete"):
        TransferSet(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    TransferSet(tmp_path).append(np.arange(50), answers(50))
    (chunk,) = tmp_path.glob("chunk-*")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="damaged"):
        TransferSet(tmp_path)


def test_a_lost_chunk_is_noticed(tmp_path: Path) -> None:
    transfer = TransferSet(tmp_path)
    for position in range(3):
        transfer.append(np.array([position]), answers(1))
    sorted(tmp_path.glob("chunk-*"))[1].unlink()
    with pytest.raises(ArtifactError, match="lacks the chunk at 1"):
        TransferSet(tmp_path)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (np.array([0, 1]), answers(3)),
        (np.array([], np.int64), answers(0)),
        (np.array([0]), np.array([[np.nan, 1, 0]])),
        (np.array([0]), answers(1, classes=4)),
    ],
)
def test_a_bad_chunk_keeps_nothing(tmp_path: Path, indices: np.ndarray, words: np.ndarray) -> None:
    transfer = TransferSet(tmp_path)
    transfer.append(np.array([3]), answers(1))
    with pytest.raises(DataError):
        transfer.append(indices, words)
    assert len(transfer) == len(TransferSet(tmp_path)) == 1


def test_a_prefix_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="holds 0"):
        TransferSet().prefix(1)


def test_a_damaged_chunk_is_set_aside_where_somebody_listens(tmp_path: Path) -> None:
    transfer = TransferSet(tmp_path)
    for start in (0, 4, 8):
        transfer.append(np.arange(start, start + 4), np.full((4, 3), start, np.float32))
    (tmp_path / "chunk-000000000004.npz").write_bytes(b"damaged")
    messages: list[str] = []
    again = TransferSet(tmp_path, on_damage=messages.append)
    assert again.indices.tolist() == [0, 1, 2, 3]
    assert len(messages) == 1 and "000000000004" in messages[0] and "after 4 answers" in messages[0]
    again.append(np.arange(4, 8), np.full((4, 3), 4, np.float32))
    assert TransferSet(tmp_path).indices.tolist() == list(range(8))
    remaining = sorted(path.name for path in tmp_path.glob("damaged-*"))
    assert remaining == ["damaged-chunk-000000000004.npz", "damaged-chunk-000000000008.npz"]
