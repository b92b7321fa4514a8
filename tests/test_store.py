"""Conversations and messages: what is stored comes back, nothing saved is lost, errors are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmui.errors import EngineError, InvalidInput, NotFound, to_values
from glmui.store import Store
from glmui.types import Usage


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "data")
    yield store
    store.close()


def say(store: Store, conversation: str, text: str, answer: str = "answer") -> tuple[int, int]:
    question, reply = store.begin_round(conversation, text, "model")
    store.finish_reply(reply.id, answer, "done", "stop")
    return question.id, reply.id


def texts(store: Store, conversation: str) -> list[str]:
    return [message.content for message in store.thread(conversation)]


def test_a_round_is_stored_in_order_with_all_it_carries(store: Store):
    conversation = store.create_conversation({"temperature": 0.5})
    question, reply = store.begin_round(conversation.id, "你好\n", "starter")
    assert (question.role, question.content, question.state) == ("user", "你好\n", "done")
    assert (reply.role, reply.content, reply.state, reply.model) == ("assistant", "", "streaming", "starter")
    assert reply.parent_id == question.id
    store.grow_reply(reply.id, "Hel")
    assert store.get_message(reply.id).content == "Hel"
    usage = Usage(10, 20, 3.5, 0.5, 2.5)
    error = to_values(EngineError("internal", detail="x"))
    store.finish_reply(reply.id, "Hello", "error", "error", usage, "repetition", error, left_out=3)
    _, stored = store.thread(conversation.id)
    assert (stored.content, stored.state, stored.finish_reason) == ("Hello", "error", "error")
    assert (stored.usage, stored.note, stored.error, stored.left_out) == (usage, "repetition", error, 3)
    assert store.get_conversation(conversation.id).settings == {"temperature": 0.5}


def test_everything_is_there_after_opening_again(tmp_path: Path):
    store = Store.open(tmp_path)
    conversation = store.create_conversation({"a": [1, None]})
    say(store, conversation.id, "one")
    say(store, conversation.id, "two")
    before = store.conversations(), store.thread(conversation.id)
    store.close()
    store = Store.open(tmp_path)
    assert (store.conversations(), store.thread(conversation.id)) == before
    assert store.notice is None
    assert not store.read_only
    store.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a\0b",
        "😀👨‍👩‍👧",
        "e\u0301",
        "'; DROP TABLE messages; --",
        "<script>",
        "\r\n\t",
        "x" * 1_000_000,
        "字" * 400_000,
    ],
)
def test_any_text_comes_back_as_it_was(store: Store, text: str):
    conversation = store.create_conversation()
    say(store, conversation.id, text, text)
    assert texts(store, conversation.id) == [text, text]


def test_half_surrogates_are_mended_not_refused(store: Store):
    conversation = store.create_conversation({"wish": "\ud800"}, title="t\ud800")
    _, reply = store.begin_round(conversation.id, "a\ud83d\ude00b\ud800", "m\ud800")
    store.grow_reply(reply.id, "\udc00")
    store.finish_reply(reply.id, "c\udc00", "done", "stop")
    assert texts(store, conversation.id) == ["a😀b\ufffd", "c\ufffd"]
    store.rename(conversation.id, "\ud800x")
    store.conversations("\ud800")
    with pytest.raises(NotFound):
        store.get_conversation("\ud800")


def test_a_paste_of_one_megabyte_is_stored_within_a_second(store: Store):
    conversation = store.create_conversation()
    begun = time.monotonic()
    store.begin_round(conversation.id, "清华大学在北京" * 50_000, "model")
    assert time.monotonic() - begun < 1


def test_the_newest_conversation_stands_first(store: Store):
    first, second = store.create_conversation(), store.create_conversation()
    assert [c.id for c in store.conversations()] == [second.id, first.id]
    say(store, first.id, "hello")
    assert [c.id for c in store.conversations()] == [first.id, second.id]
    store.rename(second.id, "renaming is no writing")
    assert [c.id for c in store.conversations()] == [first.id, second.id]
    assert len(store.conversations(limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("hello", "hello"),
        ("\n\n  first line \nsecond", "first line"),
        ("   ", ""),
        ("请介绍一下北京" * 10, ("请介绍一下北京" * 10)[:40]),
        ("the quick brown fox jumps over the lazy dog again", "the quick brown fox jumps over the lazy"),
        ("x" * 50, "x" * 40),
        ("字" * 38 + " international", "字" * 38),
        ("字" * 37 + "abcdefgh", "字" * 37),
        ("字" * 39 + "👨‍👩‍👧", "字" * 39),
        ("字" * 39 + "e\u0301e\u0301", "字" * 39),
        ("a\x00b\u202ec\td", "a b c d"),
        ("## What is `x` in **this**?\n\nx = 1", "What is x in this?"),
        ("看**这个**吧", "看这个吧"),
        ("2 * 3 ** 4 `", "2 * 3 ** 4 `"),
        ("2**3**4, f(**kw): g(**kw)", "2**3**4, f(**kw): g(**kw)"),
    ],
)
def test_titles_are_made_of_whole_words_of_the_first_line(store: Store, text: str, title: str):
    conversation = store.create_conversation()
    assert (conversation.title, conversation.auto_title) == ("", True)
    say(store, conversation.id, text)
    assert store.get_conversation(conversation.id).title == title


def test_only_the_first_message_makes_the_title_and_a_given_one_stays(store: Store):
    conversation = store.create_conversation()
    say(store, conversation.id, "first")
    say(store, conversation.id, "second")
    assert store.get_conversation(conversation.id).title == "first"
    store.rename(conversation.id, "  my\nown title ")
    renamed = store.get_conversation(conversation.id)
    assert (renamed.title, renamed.auto_title) == ("my own title", False)
    named = store.create_conversation(title="named")
    say(store, named.id, "hello")
    assert store.get_conversation(named.id).title == "named"


@pytest.mark.parametrize("title", ["", "  ", "\n\t", "\x00", "\u202e"])
def test_an_empty_title_is_refused(store: Store, title: str):
    conversation = store.create_conversation(title="old")
    with pytest.raises(InvalidInput) as caught:
        store.rename(conversation.id, title)
    assert caught.value.code == "empty_title"
    assert store.get_conversation(conversation.id).title == "old"


def test_delete_restore_and_purge(store: Store):
    kept, gone = store.create_conversation(title="kept"), store.create_conversation(title="gone")
    for conversation in (kept, gone):
        say(store, conversation.id, "清华大学")
    store.delete(gone.id)
    assert [c.id for c in store.conversations()] == [kept.id]
    assert [c.id for c in store.conversations(deleted=True)] == [gone.id]
    assert [c.id for c in store.conversations("清华", deleted=True)] == [gone.id]
    store.restore(gone.id)
    assert len(store.conversations("清华")) == 2
    assert texts(store, gone.id) == ["清华大学", "answer"]
    store.delete(gone.id)
    assert store.purge(time.time() - 60) == 0
    assert store.purge(time.time() + 60) == 1
    assert store.conversations(deleted=True) == []
    assert [c.id for c in store.conversations("清华")] == [kept.id]
    with pytest.raises(NotFound):
        store.thread(gone.id)


def test_a_conversation_in_the_trash_takes_no_new_message_but_its_reply_grows_on(store: Store):
    conversation = store.create_conversation(title="trash")
    question, reply = store.begin_round(conversation.id, "hello", "m")
    store.delete(conversation.id)
    with pytest.raises(NotFound) as caught:
        store.begin_round(conversation.id, "more", "m")
    assert "trash" in caught.value.message("en")
    with pytest.raises(NotFound):
        store.begin_reply(conversation.id, question.id, "m")
    store.finish_reply(reply.id, "still here", "done", "stop")
    store.restore(conversation.id)
    assert texts(store, conversation.id) == ["hello", "still here"]


def test_regenerating_keeps_every_version(store: Store):
    conversation = store.create_conversation()
    question, first = say(store, conversation.id, "question", "first")
    second = store.begin_reply(conversation.id, question, "model")
    assert (second.version, second.versions, second.parent_id) == (2, 2, question)
    store.finish_reply(second.id, "second", "done", "stop")
    assert texts(store, conversation.id) == ["question", "second"]
    shown = store.thread(conversation.id)
    assert [(m.version, m.versions) for m in shown] == [(1, 1), (2, 2)]
    assert store.versions(first) == store.versions(second.id) == [first, second.id]
    assert store.versions(question) == [question]
    store.select_version(conversation.id, first)
    assert [(m.content, m.version, m.versions) for m in store.thread(conversation.id)][1] == ("first", 1, 2)


def test_going_back_to_a_version_shows_what_followed_it(store: Store):
    conversation = store.create_conversation()
    question, first = say(store, conversation.id, "question", "first")
    say(store, conversation.id, "follow-up", "more")
    second = store.begin_reply(conversation.id, question, "model")
    store.finish_reply(second.id, "second", "done", "stop")
    assert texts(store, conversation.id) == ["question", "second"]
    store.select_version(conversation.id, first)
    assert texts(store, conversation.id) == ["question", "first", "follow-up", "more"]
    store.select_version(conversation.id, second.id)
    say(store, conversation.id, "other follow-up")
    assert texts(store, conversation.id) == ["question", "second", "other follow-up", "answer"]


def test_a_stopped_reply_is_continued(store: Store):
    conversation = store.create_conversation()
    _, reply = store.begin_round(conversation.id, "count", "m")
    store.finish_reply(reply.id, "one two", "stopped", "cancelled")
    resumed = store.resume_reply(reply.id)
    assert (resumed.content, resumed.state, resumed.finish_reason) == ("one two", "streaming", None)
    with pytest.raises(InvalidInput):
        store.resume_reply(reply.id)
    store.grow_reply(reply.id, "one two three")
    store.finish_reply(reply.id, "one two three four", "done", "stop")
    assert texts(store, conversation.id)[1] == "one two three four"
    assert len(store.conversations("four")) == 1


def test_a_reply_that_ended_stays_as_it_ended(store: Store):
    conversation = store.create_conversation()
    _, reply = store.begin_round(conversation.id, "q", "m")
    store.finish_reply(reply.id, "the end", "done", "stop")
    store.grow_reply(reply.id, "late")
    store.finish_reply(reply.id, "later", "error", "error")
    stored = store.get_message(reply.id)
    assert (stored.content, stored.state) == ("the end", "done")
    assert store.conversations("later") == []


def test_replies_left_by_a_crash_are_interrupted_and_can_be_found(tmp_path: Path):
    store = Store.open(tmp_path)
    conversation = store.create_conversation()
    _, reply = store.begin_round(conversation.id, "q", "m")
    store.grow_reply(reply.id, "half an answer")
    store.close()
    store = Store.open(tmp_path)
    stored = store.get_message(reply.id)
    assert (stored.state, stored.finish_reason, stored.content) == (
        "interrupted",
        "interrupted",
        "half an answer",
    )
    assert len(store.conversations("half")) == 1
    assert store.resume_reply(reply.id).content == "half an answer"
    store.close()


def test_settings_are_kept_per_conversation(store: Store):
    conversation = store.create_conversation()
    assert conversation.settings == {}
    store.set_settings(conversation.id, {"top_p": 0.5, "名": "值"})
    assert store.get_conversation(conversation.id).settings == {"top_p": 0.5, "名": "值"}


@pytest.mark.parametrize("unknown", ["", "x", "' OR 1=1 --", "../../etc", "0" * 32])
def test_unknown_conversations_are_not_found(store: Store, unknown: str):
    calls = [
        lambda: store.get_conversation(unknown),
        lambda: store.thread(unknown),
        lambda: store.rename(unknown, "t"),
        lambda: store.set_settings(unknown, {}),
        lambda: store.delete(unknown),
        lambda: store.restore(unknown),
        lambda: store.begin_round(unknown, "text", "m"),
        lambda: store.begin_reply(unknown, 1, "m"),
        lambda: store.select_version(unknown, 1),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()


@pytest.mark.parametrize("unknown", [0, -1, 99, 2**63, 10**30])
def test_unknown_messages_are_not_found(store: Store, unknown: int):
    conversation = store.create_conversation()
    calls = [
        lambda: store.get_message(unknown),
        lambda: store.versions(unknown),
        lambda: store.grow_reply(unknown, "x"),
        lambda: store.finish_reply(unknown, "x", "done", "stop"),
        lambda: store.resume_reply(unknown),
        lambda: store.begin_reply(conversation.id, unknown, "m"),
        lambda: store.select_version(conversation.id, unknown),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()


def test_messages_of_another_conversation_are_not_touched(store: Store):
    mine, other = store.create_conversation(), store.create_conversation()
    question, reply = say(store, other.id, "q")
    with pytest.raises(NotFound):
        store.begin_reply(mine.id, question, "m")
    with pytest.raises(NotFound):
        store.begin_reply(other.id, reply, "m")
    with pytest.raises(NotFound):
        store.resume_reply(question)
    with pytest.raises(NotFound):
        store.select_version(mine.id, reply)
    assert store.thread(mine.id) == []


def test_ten_thousand_messages_open_within_a_second(store: Store):
    conversation = store.create_conversation()
    with store._database.writing() as connection:
        connection.executemany(
            "INSERT INTO messages (id, conversation_id, parent_id, role, content, state, model, created_at,"
            " note, left_out) VALUES (?, ?, ?, ?, 'some text', 'done', '', 0, '', 0)",
            [(n, conversation.id, n - 1 or None, "user" if n % 2 else "assistant") for n in range(1, 10_001)],
        )
        connection.execute("UPDATE conversations SET head_id = 10000")
    begun = time.monotonic()
    assert [m.id for m in store.thread(conversation.id)] == list(range(1, 10_001))
    assert time.monotonic() - begun < 1
    store.begin_round(conversation.id, "more", "m")
    assert len(store.thread(conversation.id)) == 10_002
    store.delete(conversation.id)
    assert store.purge(time.time() + 1) == 1


def test_many_threads_write_and_read_at_once(store: Store):
    conversations = [store.create_conversation() for _ in range(6)]
    errors: list[BaseException] = []

    def work(conversation: str) -> None:
        try:
            for number in range(10):
                say(store, conversation, f"question {number}", "清华大学")
                store.conversations("清华")
                assert len(store.thread(conversation)) == 2 * number + 2
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(c.id,)) for c in conversations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(len(store.thread(c.id)) == 20 for c in conversations)


def test_a_long_thread_can_be_read_from_its_end(store: Store) -> None:
    conversation = store.create_conversation().id
    for number in range(5):
        _, reply = store.begin_round(conversation, f"question {number}", "m")
        store.finish_reply(reply.id, f"answer {number}", "done", "stop")
    whole = store.thread(conversation)
    assert store.thread(conversation, newest=3) == whole[-3:]
    assert store.thread(conversation, newest=99) == whole
