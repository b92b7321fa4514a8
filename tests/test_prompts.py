from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmui.errors import InvalidInput
from glmui.prompts import Limits, compose, fit, split_rounds, token_budget
from glmui.types import ChatSettings, GenerationParams, Message


def count(messages: Sequence[Message]) -> int:
    return sum(len(m.content) for m in messages)


def rounds(number: int, length: int = 10) -> list[Message]:
    """`number` answered rounds of 2 x `length` tokens, and one question more."""
    both = [Message("user", "q" * length), Message("assistant", "a" * length)]
    return both * number + [Message("user", "new")]


def test_everything_stays_while_it_fits() -> None:
    prompt = fit(rounds(3), count, budget=1000, hard_limit=1000)
    assert (len(prompt.messages), prompt.left_out, prompt.tokens) == (7, 0, 63)


def test_the_oldest_rounds_go_first_and_whole() -> None:
    prompt = fit(rounds(3), count, budget=50, hard_limit=1000)
    assert (len(prompt.messages), prompt.left_out) == (5, 1)
    assert prompt.messages[0].role == "user"


def test_the_system_text_stays() -> None:
    prompt = fit([Message("system", "be brief"), *rounds(5)], count, budget=35, hard_limit=1000)
    assert [m.role for m in prompt.messages] == ["system", "user", "assistant", "user"]


def test_a_number_of_rounds_can_be_asked_for() -> None:
    assert fit(rounds(5), count, budget=1000, hard_limit=1000, max_rounds=2).left_out == 3
    assert fit(rounds(5), count, budget=1000, hard_limit=1000, max_rounds=0).left_out == 5


def test_the_newest_message_is_never_cut_but_may_be_too_long() -> None:
    assert fit([Message("user", "x" * 90)], count, budget=10, hard_limit=100).tokens == 90
    with pytest.raises(InvalidInput, match="90"):
        fit([Message("user", "x" * 90)], count, budget=10, hard_limit=80)


@given(
    lengths=st.lists(st.integers(1, 30), max_size=12),
    budget=st.integers(1, 300),
    most=st.none() | st.integers(0, 12),
)
def test_as_many_rounds_as_possible_and_no_more(lengths: list[int], budget: int, most: int | None) -> None:
    messages = [m for n in lengths for m in (Message("user", "q" * n), Message("assistant", "a"))]
    messages.append(Message("user", "new"))
    prompt = fit(messages, count, budget, hard_limit=10_000, max_rounds=most)
    kept = len(split_rounds(prompt.messages))
    assert kept + prompt.left_out == len(lengths) + 1
    assert prompt.tokens == count(prompt.messages)
    assert prompt.tokens <= budget or kept == 1
    allowed = len(lengths) + 1 if most is None else min(most, len(lengths)) + 1
    if kept < allowed:
        one_more = split_rounds(messages)[-kept - 1 :]
        assert count([m for r in one_more for m in r]) > budget


def test_counting_is_sparing_however_long_the_history() -> None:
    calls = 0

    def counting(messages: Sequence[Message]) -> int:
        nonlocal calls
        calls += 1
        return count(messages)

    fit(rounds(5000), counting, budget=20_000, hard_limit=100_000)
    assert calls < 30


def test_the_budget_leaves_room_for_a_reply() -> None:
    assert token_budget(GenerationParams(max_length=2048)) == 1536
    assert token_budget(GenerationParams(max_length=2048, max_new_tokens=100)) == 1948
    assert token_budget(GenerationParams(max_length=2048), most=500) == 500
    assert token_budget(GenerationParams(max_length=2048), Limits(trained=1024)) == 768


def test_the_budget_keeps_within_what_memory_has_room_for() -> None:
    usual = GenerationParams(max_length=2048)
    assert token_budget(usual, Limits(room=1000)) == 1000 - 256
    assert token_budget(usual, Limits(room=300)) == 150, "half of little is for the reply"
    assert token_budget(usual, Limits(room=4096)) == token_budget(usual)
    assert token_budget(GenerationParams(max_new_tokens=40), Limits(room=1000)) == 960


def test_what_is_asked_for_is_never_more_than_memory_has_room_for() -> None:
    assert Limits(room=1000).bounded(GenerationParams(max_length=2048)).max_length == 1000
    assert Limits(room=4096).bounded(GenerationParams(max_length=2048)).max_length == 2048
    assert Limits().bounded(GenerationParams(max_length=2048)).max_length == 2048


def test_the_oldest_rounds_go_where_memory_is_short_and_a_message_alone_may_be_too_much() -> None:
    said = rounds(20, 20)
    assert compose(said, ChatSettings(), count).left_out == 0
    cut = compose(said, ChatSettings(), count, Limits(room=700))
    assert (cut.left_out, cut.tokens) == (9, 443)
    with pytest.raises(InvalidInput, match="room for only 100"):
        compose([Message("user", "x" * 100)], ChatSettings(), count, Limits(room=100))


def test_the_system_text_comes_first() -> None:
    prompt = compose([Message("user", "hi")], ChatSettings(system="  Be brief. "), count)
    assert prompt.messages[0] == Message("system", "Be brief.")


def long_reply(characters: int) -> list[Message]:
    return [
        Message("user", "go on"),
        Message("assistant", "".join(chr(97 + n % 26) for n in range(characters))),
    ]


def test_a_reply_that_fills_the_room_alone_goes_on_from_its_end() -> None:
    for settings, limits in (
        (ChatSettings(GenerationParams(max_length=1000)), Limits()),
        (ChatSettings(), Limits(room=1000)),
    ):
        said = long_reply(1000)
        cut = compose(said, settings, count, limits)
        assert cut.cut
        assert cut.tokens == token_budget(settings.params, limits), "there is room for as much again"
        assert cut.messages[0] == said[0]
        assert said[1].content.endswith(cut.messages[1].content)


def test_a_reply_with_room_to_go_on_keeps_its_beginning_and_old_rounds_go_first() -> None:
    whole = compose(long_reply(600), ChatSettings(), count, Limits(room=1000))
    assert (whole.cut, whole.left_out) == (False, 0)
    later = compose([*rounds(20, 20), *long_reply(700)], ChatSettings(), count, Limits(room=1000))
    assert later.left_out > 0
    assert not later.cut


def test_a_long_question_is_not_given_for_a_short_end_of_its_reply() -> None:
    said = [Message("user", "x" * 700), Message("assistant", "y" * 100)]
    assert compose(said, ChatSettings(), count, Limits(room=1000)).messages == tuple(said)


def test_a_question_that_fills_the_room_leaves_its_reply_none_to_go_on() -> None:
    said = [Message("user", "x" * 900), Message("assistant", "y" * 90)]
    with pytest.raises(InvalidInput, match="room for 1000 tokens"):
        compose(said, ChatSettings(), count, Limits(room=1000))
