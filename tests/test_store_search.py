"""Search finds what is typed wherever it stands, Chinese too, and takes nothing for an operator."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmui.store import Store, search

ALPHABET = "清华大学北京的abcXYé019"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "data")
    yield store
    store.close()


def hold(store: Store, *messages: str, title: str = "untitled") -> str:
    conversation = store.create_conversation(title=title)
    for message in messages:
        _, reply = store.begin_round(conversation.id, message, "m")
        store.finish_reply(reply.id, "", "done", "stop")
    return conversation.id


@pytest.mark.parametrize(
    "query",
    ["学", "清华", "清华大学", "大学", "在北京", "京。", "GLM", "glm-6b", "chat", "ＣＨＡＴ", "ChatGLM模型",
     "模型 清华", "6b", "g", "M模", "café", "cafe\u0301", "量化 chat 北京", "😀", "c++", "50%",
     "%", "_", "图灵", "图"],
)  # fmt: skip
def test_what_stands_there_is_found(store: Store, query: str):
    wanted = hold(
        store, "清华大学在北京。ChatGLM-6B 😀", "ChatGLM模型的量化，C++ 50% a_b café", title="图灵测试"
    )
    hold(store, "无关的话 unrelated words", title="别的")
    assert [c.id for c in store.conversations(query)] == [wanted]


@pytest.mark.parametrize(
    "query",
    ["华清", "清大", "京北", "catglm", "清华 缺", "学北", "测图", "modell", "x", '"', "'", "*", "(",
     "AND NOT", "NEAR(清华)", "清华*缺", "terms:清华", "-清华", "\0", "^清", "清华 OR 缺", "--", "\\"],
)  # fmt: skip
def test_what_does_not_stand_there_is_not_found_and_no_sign_is_an_operator(store: Store, query: str):
    hold(store, "大学 model chatglm", title="图灵测试")
    assert store.conversations(query) == []


@pytest.mark.parametrize(
    "query", ['"清华"', "(清华)", "清华*", "^清华", "terms:清华", "NEAR(清华", "-清华", "清华'"]
)
def test_signs_around_a_word_are_plain_text(store: Store, query: str):
    wanted = hold(store, "他说：terms:清华 NEAR(清华 很好")
    assert [c.id for c in store.conversations(query)] == [wanted]


def test_an_empty_query_finds_everything(store: Store):
    hold(store, "a")
    assert len(store.conversations("")) == len(store.conversations("  \n")) == 1


def test_a_very_long_query_is_answered(store: Store):
    wanted = hold(store, "清华大学" * 1000)
    assert [c.id for c in store.conversations("清华大学" * 900)] == [wanted]
    assert [c.id for c in store.conversations("清华 " * 20_000)] == [wanted]


def test_titles_are_found_by_their_present_name_only(store: Store):
    conversation = hold(store, "text", title="图灵测试")
    store.rename(conversation, "冯诺依曼")
    assert store.conversations("图灵") == []
    assert [c.id for c in store.conversations("诺依")] == [conversation]


def test_a_growing_reply_is_found_when_it_has_ended(store: Store):
    conversation = store.create_conversation(title="t")
    _, reply = store.begin_round(conversation.id, "q", "m")
    store.grow_reply(reply.id, "增长😀")
    assert store.conversations("增长") == store.conversations("😀") == []
    store.finish_reply(reply.id, "增长😀", "stopped", "cancelled")
    assert len(store.conversations("增长")) == len(store.conversations("😀")) == 1
    store.resume_reply(reply.id)
    store.finish_reply(reply.id, "完全不同", "done", "stop")
    assert store.conversations("增长") == []


def index_of(*texts: str) -> sqlite3.Connection:
    """A search index alone, one row per text."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE VIRTUAL TABLE t USING fts5(terms, content='', columnsize=0, tokenize='ascii')")
    for number, text in enumerate(texts):
        connection.execute("INSERT INTO t(rowid, terms) VALUES (?, ?)", (number, search.terms(text)))
    return connection


def matches(connection: sqlite3.Connection, piece: str) -> set[int]:
    phrase = search.phrase(piece)
    assert phrase is not None
    return {row[0] for row in connection.execute("SELECT rowid FROM t WHERE t MATCH ?", (phrase,))}


@given(
    texts=st.lists(st.text(ALPHABET, max_size=12), max_size=6),
    piece=st.text(ALPHABET, min_size=1, max_size=5),
)
def test_search_is_exactly_substring_search(texts: list[str], piece: str):
    texts, piece = [search.normal(text) for text in texts], search.normal(piece)
    with closing(index_of(*texts)) as connection:
        assert matches(connection, piece) == {n for n, text in enumerate(texts) if piece in text}


@given(text=st.text(ALPHABET + " ，.!-_", max_size=40), data=st.data())
def test_every_piece_of_a_text_is_found(text: str, data: st.DataObject):
    start = data.draw(st.integers(0, len(text)))
    pieces = text[start : data.draw(st.integers(start, len(text)))].split()
    with closing(index_of(text)) as connection:
        assert all(matches(connection, piece) == {0} for piece in pieces if search.phrase(piece))


@settings(max_examples=300)
@given(text=st.text(max_size=60), piece=st.text(min_size=1, max_size=20))
def test_no_text_and_no_query_breaks_the_index(text: str, piece: str):
    text, piece = (s.encode("utf-8", "replace").decode() for s in (text, piece))
    with closing(index_of(text)) as connection:
        for part in piece.split():
            if search.phrase(part):
                matches(connection, part)
        connection.execute("INSERT INTO t(t, rowid, terms) VALUES ('delete', 0, ?)", (search.terms(text),))
        connection.execute("INSERT INTO t(t) VALUES ('integrity-check')")
