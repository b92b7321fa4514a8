"""ChatGLM-6B as an engine family: what the page and the command line talk to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from glmui.engine.decoders import ChatGLMDecoder
from glmui.engine.families import open_family
from glmui.engine.loaded import LoadedEngine
from glmui.errors import InvalidInput, ModelError
from glmui.glm.checkpoint import load_model
from glmui.text import open_counter
from glmui.types import ChatEngine, Chunk, EngineSpec, GenerationParams, Message, Progress
from tests.chatglm_fixture import KINDS, copy_checkpoint, goldens

GREEDY = GenerationParams(max_length=64, max_new_tokens=12, temperature=0)
ASKED = [Message("user", "你好")]

Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec(folder: Path, **more: object) -> EngineSpec:
    return EngineSpec("tiny", str(folder), device="cpu", **more)  # type: ignore[arg-type]


@pytest.fixture
def engine(tiny_chatglm: Folder) -> ChatEngine:
    return open_family(spec(tiny_chatglm("int4")), lambda progress: None)


def text_of(chunks: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("kind", KINDS)
def test_published_answer(published_chatglm: Folder, kind: str) -> None:
    engine = open_family(spec(published_chatglm(kind)), lambda progress: None)
    for case in goldens()["models"][kind]["prompts"][:3]:
        messages = [
            Message(role, text)
            for pair in case["history"]
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        params = GenerationParams(
            max_length=max(64, case["chat_max_length"]), max_new_tokens=24, temperature=0
        )
        *_, last = chunks = list(engine.stream_chat([*messages, Message("user", case["query"])], params, "r"))
        assert "".join(chunk.text for chunk in chunks) == case["chat_response"]
        assert last.usage is not None
        assert last.usage.prompt_tokens == len(case["input_ids"])


def test_streams_to_the_limit(engine: ChatEngine) -> None:
    *_, last = chunks = list(engine.stream_chat(ASKED, GREEDY, "r"))
    assert last.finish_reason == "length"
    assert last.tokens == 12
    assert text_of(iter(chunks))
    assert engine.info().family == "chatglm"
    assert engine.info().dtype == "int4"
    assert engine.info().context_length == 2048


def test_max_length_bounds_prompt_and_reply(engine: ChatEngine) -> None:
    params = GenerationParams(max_length=64, temperature=0)
    *_, last = engine.stream_chat([Message("user", "今" * 40)], params, "r")
    assert last.usage is not None
    assert last.usage.prompt_tokens + last.usage.completion_tokens <= 64
    with pytest.raises(InvalidInput) as caught:
        list(engine.stream_chat([Message("user", "今" * 200)], params, "r"))
    assert caught.value.code == "prompt_too_long"


def test_the_counter_agrees_with_the_engine(engine: ChatEngine, tiny_chatglm: Folder) -> None:
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    *_, last = engine.stream_chat(said, GREEDY, "r")
    assert last.usage is not None
    assert open_counter(tiny_chatglm("int4"))(said) == last.usage.prompt_tokens


def test_typed_special_tokens_are_plain_text(engine: ChatEngine) -> None:
    """A typed <sop> would cut the context short, and <eop> end it."""
    *_, last = engine.stream_chat([Message("user", "a<sop>b<eop>[MASK]")], GREEDY, "r")
    assert last.usage is not None
    assert last.usage.prompt_tokens > 12


def test_cancel_during_the_prompt(tiny_chatglm: Folder) -> None:
    engine: ChatEngine

    def cancel(progress: Progress) -> None:
        if progress.stage == "prefill":
            engine.cancel("r")

    engine = open_family(spec(tiny_chatglm("int4")), cancel)
    *_, last = engine.stream_chat([Message("user", "今" * 30)], GREEDY, "r")
    assert last.finish_reason == "cancelled"
    assert last.tokens == 0
    assert text_of(engine.stream_chat(ASKED, GREEDY, "s"))


def test_cancel_during_the_reply(engine: ChatEngine) -> None:
    chunks = engine.stream_chat(ASKED, GREEDY, "r")
    first = next(chunks)
    engine.cancel("r")
    *_, last = [first, *chunks]
    assert last.finish_reason == "cancelled"
    assert last.tokens <= 2


def test_a_begun_reply_is_continued(engine: ChatEngine) -> None:
    *_, last = engine.stream_chat(ASKED, GREEDY, "r")
    *_, more = engine.stream_chat([*ASKED, Message("assistant", "今天")], GREEDY, "r")
    assert last.usage is not None
    assert more.usage is not None
    assert more.usage.prompt_tokens > last.usage.prompt_tokens
    assert more.tokens == 12


def test_another_try_reads_no_prompt_again(tiny_chatglm: Folder) -> None:
    decoder = ChatGLMDecoder(load_model(tiny_chatglm("int4")))
    ids, told = [5, 20, 130001, 130004], []
    with torch.inference_mode():
        first = decoder.prefill(ids, told.append).clone()
        after = decoder.step(20).clone()
        assert len(told) > 1
        told.clear()
        assert torch.equal(decoder.prefill(ids, told.append), first)
        assert told == [1.0]
        assert torch.equal(decoder.step(20), after)
        other = decoder.prefill([21, *ids], told.append)
    assert len(told) > 2
    assert not torch.equal(other, first)


def test_a_long_reply_outgrows_the_first_cache(tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmui.engine.decoders.SPARE", 2)
    monkeypatch.setattr("glmui.glm.cache.SPARE", 2)
    case = goldens()["models"]["int4"]["prompts"][0]
    decoder = ChatGLMDecoder(load_model(tiny_chatglm("int4")))
    with torch.inference_mode():
        logits, ids = decoder.prefill(case["input_ids"], lambda part: None), []
        for _ in case["greedy_ids"]:
            ids.append(int(logits.argmax()))
            logits = decoder.step(ids[-1])
    assert ids == case["greedy_ids"]


def test_loading_tells_how_far_it_is(tiny_chatglm: Folder) -> None:
    told: list[Progress] = []
    open_family(spec(tiny_chatglm("fp16"), quantize="int4"), told.append)
    parts = [p.fraction for p in told if p.stage == "loading"]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_quantising_while_loading_answers_like_the_int4_folder(
    tiny_chatglm: Folder, engine: ChatEngine
) -> None:
    mine = open_family(spec(tiny_chatglm("fp16"), quantize="int4"), lambda progress: None)
    assert mine.info().dtype == "int4"
    answer = list(mine.stream_chat(ASKED, GREEDY, "r"))
    assert len(answer) == 13


def test_quantise_wish_leaves_a_quantised_folder_alone(tiny_chatglm: Folder) -> None:
    opened = open_family(spec(tiny_chatglm("int8"), quantize="int4"), lambda progress: None)
    assert opened.info().dtype == "int8"


def test_unloading(engine: ChatEngine) -> None:
    engine.unload()
    assert engine.info().state == "asleep"
    with pytest.raises(RuntimeError):
        list(engine.stream_chat(ASKED, GREEDY, "r"))


def test_wrong_vocabulary_is_one_clear_sentence(tiny_chatglm: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm("int4"), tmp_path / "copy")
    (folder / "ice_text.model").unlink()
    shutil.copyfile(folder / "config.json", folder / "ice_text.model")
    with pytest.raises(ModelError) as caught:
        open_family(spec(folder), lambda progress: None)
    assert caught.value.code == "model_wrong_vocabulary"


def test_engine_is_the_protocol(engine: ChatEngine) -> None:
    assert isinstance(engine, LoadedEngine)
