"""Streamed text is the whole text, in whole characters, at a linear cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from glmui.text.detokenise import StreamingDetokeniser
from tests.tiny_llama import make_tokenizer

TOKENIZER = make_tokenizer()
ORDINARY = [i for i in range(TOKENIZER.get_vocab_size()) if i > 2]


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


def stream(ids: list[int]) -> list[str]:
    detokeniser = StreamingDetokeniser(decode)
    return [*(detokeniser.add(i) for i in ids), detokeniser.finish()]


@given(st.text(alphabet=st.sampled_from("ab ,\n你好世界吗😀👩‍👩‍👧é\u0301𠀀"), max_size=60))
def test_any_text_comes_whole(text: str) -> None:
    pieces = stream(TOKENIZER.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(ORDINARY), max_size=80))
def test_any_ids_give_what_decode_gives(ids: list[int]) -> None:
    assert "".join(stream(ids)) == decode(ids)


def test_a_character_of_four_ids_comes_at_its_last() -> None:
    ids = TOKENIZER.encode("😀", add_special_tokens=False).ids
    assert len(ids) == 4
    assert stream(ids) == ["", "", "", "😀", ""]


def test_a_broken_end_is_shown_at_the_end() -> None:
    ids = TOKENIZER.encode("ok😀", add_special_tokens=False).ids[:-1]
    assert "".join(stream(ids)) == decode(ids) == "ok\ufffd"


@pytest.mark.parametrize("endless", ["word ", "😀", "broken"])
def test_the_cost_of_an_id_does_not_grow(endless: str) -> None:
    continuation = TOKENIZER.encode("😀", add_special_tokens=False).ids[-1]
    one = [continuation] if endless == "broken" else TOKENIZER.encode(endless, add_special_tokens=False).ids
    longest = 0

    def watched(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    detokeniser = StreamingDetokeniser(watched)
    for token in one * 500:
        detokeniser.add(token)
    assert longest <= 24


def test_blanks_of_a_sentencepiece_vocabulary_stay() -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁Hello": 0, "▁big": 1, "▁world": 2, "s": 3}, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    detokeniser = StreamingDetokeniser(lambda ids: str(tokenizer.decode(list(ids))))
    assert "".join([*(detokeniser.add(i) for i in [0, 1, 2, 3]), detokeniser.finish()]) == "Hello big worlds"
