from __future__ import annotations

import re

import pytest

from glmui.i18n import Words
from glmui.outlook import Outlook, RoomLeft
from glmui.ui import present_outlook

SHORT_OF_ROOM = Outlook(
    900, 1156, 1000, fits=False, rounds_to_leave_out=3, reply_room=100, layers_to_move=4, layers_left=24,
    fits_on_cpu=True,
)  # fmt: skip


def test_numbers_are_said_as_people_say_them_and_promise_nothing_too_much() -> None:
    assert [present_outlook.about(n) for n in (0, 93, 487, 1199, 30_049)] == [
        "0",
        "93",
        "480",
        "1,150",
        "30,000",
    ]


def test_the_line_tells_the_room_and_what_goes_next() -> None:
    calm = present_outlook.room(RoomLeft(1170, rounds=3), Words("en"))
    assert "about 1,150 more tokens" in calm
    assert "little" not in calm
    assert "little" in present_outlook.room(RoomLeft(300, rounds=9, little=True), Words("en"))
    assert "oldest 2 rounds" in present_outlook.room(RoomLeft(600, 9, 2, 2, little=True), Words("en"))
    assert "最早的一轮" in present_outlook.room(RoomLeft(600, 9, 1, 1, little=True), Words("zh"))
    assert present_outlook.room(None, Words("en")) == ""


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_offer_says_what_it_does_and_what_it_costs(language: str) -> None:
    panel = present_outlook.offers(SHORT_OF_ROOM, Words(language))
    assert re.findall('data-act="(.*?)"', panel) == [
        "leave_out",
        "shorter",
        "move_layers",
        "on_cpu",
        "cancel",
    ]
    assert "offers." not in panel, "every text is there"
    for number in ("1,156", "1,000", "100", "24", "3", "4"):
        assert number in panel


def test_only_what_helps_is_offered() -> None:
    panel = present_outlook.offers(Outlook(900, 1156, 1000, fits=False, fits_on_cpu=True), Words("en"))
    assert re.findall('data-act="(.*?)"', panel) == ["on_cpu", "cancel"]
    assert not Outlook(900, 1156, 1000, fits=False).can_be_helped


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_reply_made_anew_or_gone_on_with_has_words_of_its_own(language: str) -> None:
    asked, again = (
        present_outlook.offers(SHORT_OF_ROOM, Words(language), wish) for wish in (None, "regenerate")
    )
    assert 'data-wish=""' in asked
    assert 'data-wish="regenerate"' in again
    for place in (r"<h2.*?</h2>", r"<p.*?</p>", r'data-act="cancel".*?</button>'):
        assert re.search(place, asked).group() != re.search(place, again).group()  # type: ignore[union-attr]
    assert "offers." not in again, "every text is there"


def test_going_on_from_the_end_of_a_reply_is_offered_as_such() -> None:
    cut = Outlook(900, 1156, 1000, fits=False, rounds_to_leave_out=2, cuts_reply=True, fits_on_cpu=True)
    panel = present_outlook.offers(cut, Words("en"), "resume")
    assert re.findall('data-act="(.*?)"', panel) == ["leave_out", "on_cpu", "cancel"]
    assert "Read only the end of the reply" in panel
