"""Notes under a reply: stored as text, said in the reader's language."""

from __future__ import annotations

import pytest

from glmui import notes


def test_several_notes_in_both_languages() -> None:
    kept = notes.join("repetition", "", notes.note("memory_context", tokens=512))
    english = notes.words(kept, "en")
    assert len(english) == len(notes.words(kept, "zh")) == 2
    assert "512" in english[1]
    assert notes.words("", "en") == []


def test_values_may_be_anything_a_program_is_called() -> None:
    name = 'a "b"\n{c} 游戏.exe'
    (said,) = notes.words(notes.note("spill_users", users=name), "en")
    assert name in said


@pytest.mark.parametrize("damaged", ["spill_users {", "spill_users []", 'spill_users "x"', "no_such_note 7"])
def test_a_damaged_note_is_still_said(damaged: str) -> None:
    assert notes.words(damaged, "en")
