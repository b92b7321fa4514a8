"""A file on its way: what is safely there survives, and nothing else is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmui.hub.checked import Checked
from glmui.hub.part import PartFile


def opened(folder: Path, size: int = 1000, identity: str = "sha256:x") -> PartFile:
    part = PartFile(folder / "w.bin")
    part.open(size, identity)
    return part


def saved(folder: Path) -> PartFile:
    """A part of 1,000 bytes of which 300 came, in two places."""
    part = opened(folder)
    part.write(500, b"b" * 200)
    part.write(0, b"a" * 100)
    part.save(part.state())
    part.close()
    return part


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    saved(tmp_path)
    part = opened(tmp_path)
    assert part.have == 300
    assert list(part.missing()) == [(100, 500), (700, 1000)]
    assert list(part.missing(50, 600)) == [(100, 500)]
    part.close()


def test_what_was_not_saved_is_not_believed(tmp_path: Path) -> None:
    part = saved(tmp_path)
    part = opened(tmp_path)
    part.write(100, b"c" * 400)
    part.close()  # as a kill would: the bytes may be on the disk or not
    part = opened(tmp_path)
    assert list(part.missing()) == [(100, 500), (700, 1000)]
    part.close()


@pytest.mark.parametrize(("size", "identity"), [(1000, "sha256:other"), (1001, "sha256:x"), (1000, "")])
def test_another_content_starts_over(tmp_path: Path, size: int, identity: str) -> None:
    saved(tmp_path)
    part = opened(tmp_path, size, identity)
    assert part.have == 0
    part.close()


@pytest.mark.parametrize(
    "spoilt",
    [b"", b"{", b"[]", b'{"done": 1}', b"\xff\xfe", "unsorted", "outside", "text"],
)
def test_a_damaged_journal_starts_over(tmp_path: Path, spoilt: bytes | str) -> None:
    saved(tmp_path)
    journal = tmp_path / "w.bin.part.json"
    values = json.loads(journal.read_text())
    pieces = {"unsorted": [[500, 700], [0, 100]], "outside": [[0, 1001]], "text": [["a", "b"]]}
    if isinstance(spoilt, str):
        spoilt = json.dumps(values | {"done": pieces[spoilt]}).encode()
    journal.write_bytes(spoilt)
    part = opened(tmp_path)
    assert part.have == 0
    part.close()


def test_a_part_that_is_gone_or_cut_starts_over(tmp_path: Path) -> None:
    part = saved(tmp_path)
    os.truncate(part.path, 900)
    part = opened(tmp_path)
    assert part.have == 0
    part.close()
    part.path.unlink()
    part = opened(tmp_path)
    assert part.have == 0
    part.close()


def test_a_finished_file_has_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    part = opened(tmp_path, 3)
    part.write(0, b"abc")
    part.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["w.bin"]
    assert (tmp_path / "w.bin").read_bytes() == b"abc"


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30)), max_size=20))
def test_pieces_add_up_in_any_order(pieces: list[tuple[int, int]]) -> None:
    part = PartFile(Path("unused"))
    part.size = 130
    for start, length in pieces:
        part._add(start, start + length)
    came = {place for start, length in pieces for place in range(start, start + length)}
    missing = {place for start, end in part.missing() for place in range(start, end)}
    assert missing == set(range(130)) - came
    assert part.have == len(came)


def test_a_checked_file_counts_until_it_is_touched(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"abc")
    Checked(tmp_path).add("w.bin", "aa", confirmed=True)
    mark = Checked(tmp_path).get("w.bin")
    assert mark
    assert (mark.sha256, mark.confirmed) == ("aa", True)
    os.utime(tmp_path / "w.bin", ns=(1, 1))
    assert Checked(tmp_path).get("w.bin") is None
    assert Checked(tmp_path).get("other") is None
    (tmp_path / ".checked.json").write_text('{"w.bin": {"sha256": 1}}')
    assert Checked(tmp_path).get("w.bin") is None
