"""ChatGLM-6B's tokenizer and its streaming detokeniser, against the published strings and by property."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmui.errors import InvalidInput, ModelError
from glmui.text.chatglm import ChatGLMTokenizer, prompt_ids
from glmui.text.chatglm_reply import ChatGLMDetokeniser, process_response, reply_text
from glmui.text.chatglms import open_counter
from glmui.text.vocabulary import EOP, GMASK, MASK, SOP, UNK
from glmui.types import Message
from tests.chatglm_fixture import DATA
from tests.reference import reference
from tests.small_vocabulary import small_vocabulary

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    file = tmp_path_factory.mktemp("vocabulary") / "ice_text.model"
    file.write_bytes(small_vocabulary())
    return ChatGLMTokenizer(file)


@cache
def published() -> tuple[ChatGLMTokenizer, dict[str, Any]]:
    golden = json.loads(reference("goldens/tokenizer.json").read_text(encoding="utf-8"))
    return ChatGLMTokenizer(reference("ice_text.model")), golden


# The published vocabulary


def test_published_strings() -> None:
    tokenizer, golden = published()
    assert len(golden["strings"]) == 123
    for case in golden["strings"]:
        text = case["text"]
        assert tokenizer.encode(text) == case["ids"], text
        assert tokenizer.encode(text, special=False) == case["ids_no_special"], text
        assert tokenizer.decode(case["ids"]) == case["decode"], text
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"], text
        assert tokenizer.decode(case["ids_no_special"]) == case["decode_body"], text


def test_published_decodes_step_by_step() -> None:
    tokenizer, golden = published()
    cases = [case for case in golden["strings"] if case["incremental"]]
    assert len(cases) > 50
    for case in cases:
        ids = case["ids_no_special"]
        assert [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))] == case["incremental"]


def test_published_id_lists() -> None:
    tokenizer, golden = published()
    for case in golden["decode_ids"]:
        if "error" in case:
            tokenizer.decode(case["ids"])  # the published code breaks here; an id without a piece is ""
            continue
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]


def test_published_pairs_and_truncation() -> None:
    tokenizer, golden = published()
    for case in golden["pairs"]:
        assert tokenizer.encode(case["a"], case["b"]) == case["ids"]
    for case in golden["truncation"]:
        assert tokenizer.encode(case["text"], max_length=case["max_length"]) == case["ids"]


def test_published_stream_equals_whole() -> None:
    tokenizer, golden = published()
    for case in golden["strings"]:
        assert streamed(tokenizer, case["ids"]) == reply_text(tokenizer, case["ids"])


# Any vocabulary of this kind


def test_a_text_ends_with_the_gap(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.encode("") == [GMASK, SOP]
    assert tokenizer.encode("你好")[-2:] == [GMASK, SOP]
    assert tokenizer.encode("你好", special=False) == tokenizer.encode("你好")[:-2]


def test_typed_special_tokens_count_only_where_published(tokenizer: ChatGLMTokenizer) -> None:
    text = "a<sop>b [MASK] <eop><unk>"
    assert {SOP, MASK, EOP, UNK} <= set(tokenizer.encode(text, special=False))
    literal = tokenizer.encode(text, literal=True, special=False)
    assert not {SOP, MASK, EOP, UNK} & set(literal)
    assert tokenizer.decode(literal) == text


def test_blanks_tabs_and_newlines_survive(tokenizer: ChatGLMTokenizer) -> None:
    code = "if a:\n\tb\n    c" + " " * 200 + "d"
    assert tokenizer.decode(tokenizer.encode(code)) == code


def test_half_a_surrogate_pair_is_no_accident(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a?b"


def test_ids_without_a_piece_give_nothing(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.encode("你好", special=False)
    assert tokenizer.decode([130344, *ids, 130527, -1]) == "你好"


@FAST
@given(text=st.text(st.sampled_from("今天气真不错 你好，请aehlost, .!?'\n\t😀👨‍👩‍👧𠮷é"), max_size=40))
def test_texts_come_back(tokenizer: ChatGLMTokenizer, text: str) -> None:
    """All but what is lost by design: normalised characters, and a blank at the ends or before marks."""
    back = tokenizer.decode(tokenizer.encode(text, literal=True, special=False))
    assert squeezed(back) == squeezed(text)
    if not set(".,!?'") & set(back):
        assert tokenizer.decode(tokenizer.encode(back, literal=True, special=False)).split() == back.split()


def squeezed(text: str) -> str:
    wide = dict(zip("，！：；？", ",!:;?", strict=True))
    return "".join(wide.get(c, c) for c in text if not c.isspace() and c != "\u200d")


_PIECES = [
    " ",
    ".",
    "!",
    ",",
    "?",
    "'",
    "n",
    "t",
    "s",
    "m",
    "v",
    "r",
    "e",
    "<",
    "n",
    ">",
    "|",
    "a",
    "中",
    "国",
    "[[",
    "训练时间]]",
]


@st.composite
def id_lists(draw: st.DrawFn, tokenizer: ChatGLMTokenizer) -> list[int]:
    texts = [i for piece in _PIECES for i in tokenizer.encode(piece, special=False, literal=True)]
    characters = [130088 + byte for byte in "😀é中𠮷".encode()]
    special = [0, 1, 3, 4, 5, 130001, 130005, 130008, 130009, 130344]
    any_id = st.integers(0, 130343) | st.sampled_from([*texts, *texts, *characters, *special])
    return draw(st.lists(any_id, max_size=30))


@FAST
@given(data=st.data())
def test_stream_equals_whole(tokenizer: ChatGLMTokenizer, data: st.DataObject) -> None:
    ids = data.draw(id_lists(tokenizer))
    assert streamed(tokenizer, ids) == reply_text(tokenizer, ids)


@FAST
@given(text=st.text(max_size=40))
def test_stream_of_a_text_equals_whole(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, literal=True)
    assert streamed(tokenizer, ids) == reply_text(tokenizer, ids)


def streamed(tokenizer: ChatGLMTokenizer, ids: list[int]) -> str:
    detokeniser = ChatGLMDetokeniser(tokenizer)
    return "".join(map(detokeniser.add, ids)) + detokeniser.finish()


def test_a_stream_lets_text_out_at_once(tokenizer: ChatGLMTokenizer) -> None:
    detokeniser = ChatGLMDetokeniser(tokenizer)
    ids = tokenizer.encode("今天天气真不错", special=False)
    assert "".join(map(detokeniser.add, ids)) == "今天天气真不错"


def test_a_stream_costs_the_same_for_each_id(tokenizer: ChatGLMTokenizer) -> None:
    """Counted, not timed: how much text the stages look at must grow with the ids, not with their square."""
    ids = tokenizer.encode("今天 don't ", special=False) * 300
    detokeniser = ChatGLMDetokeniser(tokenizer)
    looked_at = 0
    for token in ids:
        detokeniser.add(token)
        looked_at += sum(len(getattr(stage, "_held", "")) for stage in detokeniser._stages)
    assert looked_at < 10 * len(ids)


@pytest.mark.parametrize(("before", "more", "text"), [("你好", ", how", "， how"), ("I", "how", " how")])
def test_a_continued_reply_fits_what_stands_before(
    tokenizer: ChatGLMTokenizer, before: str, more: str, text: str
) -> None:
    detokeniser = ChatGLMDetokeniser(tokenizer, before)
    ids = tokenizer.encode(more, special=False)
    assert "".join(map(detokeniser.add, ids)) + detokeniser.finish() == text


# Answers and prompts


def test_published_answers() -> None:
    pairs = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))["process_response"]
    for case in pairs:
        assert process_response(case["input"]) == case["output"]


def test_counter_counts_what_the_model_sees(tokenizer: ChatGLMTokenizer) -> None:
    said = [
        Message("system", "简短"),
        Message("user", "你好"),
        Message("assistant", "你好！"),
        Message("user", "<sop>"),
    ]
    count = open_counter(tokenizer.file)
    ids = prompt_ids(tokenizer, said)
    assert count(said) == len(ids)
    assert ids.count(SOP) == 1
    assert tokenizer.decode(ids) == "[Round 0]\n问:简短\n\n你好\n答:你好!\n[Round 1]\n问:<sop>\n答:"


def test_a_begun_reply_stands_after_the_gap(tokenizer: ChatGLMTokenizer) -> None:
    said = [Message("user", "你好"), Message("assistant", "今天")]
    ids = prompt_ids(tokenizer, said)
    assert ids == tokenizer.encode("你好") + tokenizer.encode("今天", special=False)


def test_nothing_asked_is_refused(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(InvalidInput):
        prompt_ids(tokenizer, [Message("system", "x")])


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "model_no_vocabulary"), (b"version https://git-lfs", "model_wrong_vocabulary")],
)
def test_wrong_vocabulary_is_said(tmp_path: Path, content: bytes | None, code: str) -> None:
    if content is not None:
        (tmp_path / "ice_text.model").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        ChatGLMTokenizer(tmp_path)
    assert caught.value.code == code
    assert "ice_text.model" in caught.value.message("zh")


def test_counting_for_a_chatglm2_or_3_asks_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", "padded_vocab_size": 65024}))
    with pytest.raises(ModelError) as caught:
        open_counter(tmp_path)
    assert caught.value.code == "model_family_in_doubt"


def test_another_models_vocabulary_is_said(tmp_path: Path) -> None:
    (tmp_path / "ice_text.model").write_bytes(small_vocabulary().replace(b"[gMASK]", b"[hMASK]"))
    with pytest.raises(ModelError) as caught:
        ChatGLMTokenizer(tmp_path)
    assert caught.value.code == "model_wrong_vocabulary"


def test_counting_needs_no_torch(tokenizer: ChatGLMTokenizer) -> None:
    code = (
        "import sys; from glmui.text import open_counter; from glmui.types import Message; "
        "import glmui.text.chatglms as c; count = c.open_counter(sys.argv[1]); "
        "assert count([Message('user', '你好')]) > 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tokenizer.file)], check=True)
