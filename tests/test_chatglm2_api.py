"""ChatGLM2 and 3 through the Python API, transformers' Auto classes and the engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from glmui import ChatGLM, quantize, register_auto_classes
from glmui.bench.measure import subject_of
from glmui.engine.families import open_family
from glmui.engine.placement import device_map
from glmui.errors import InvalidInput
from glmui.quant import QuantizedLinear
from glmui.text import open_counter
from glmui.types import EngineSpec, GenerationParams, Message
from tests.chatglm2_fixture import FAMILIES, KINDS, Folder, goldens
from tests.reference import reference

each = pytest.mark.parametrize(("family", "kind"), [(f, k) for f in FAMILIES for k in KINDS])
each_family = pytest.mark.parametrize("family", FAMILIES)
Open = Callable[[str, str], ChatGLM]
TOOLS = [{"role": "system", "content": "Use these:", "tools": [{"name": "get_weather"}]}]


@pytest.fixture(scope="module")
def published(published_chatglm2: Folder) -> Open:
    return cache(
        lambda family, kind: ChatGLM.from_pretrained(
            published_chatglm2(family, kind), device="cpu", dtype="float32"
        )
    )


@pytest.fixture(scope="module")
def small(tiny_chatglm2: Folder) -> Open:
    return cache(lambda family, kind: ChatGLM.from_pretrained(tiny_chatglm2(family, kind), device="cpu"))


def cases(family: str, kind: str) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = copy.deepcopy(goldens()[family]["models"][kind]["prompts"])
    return values


def how(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    role = {"role": case["role"]} if case["role"] else {}
    return {"max_length": case["chat_max_length"], "do_sample": False, **role, **more}


# published=True: to the letter


@each
@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_published_chat_and_stream(published: Open, family: str, kind: str, most: int | None) -> None:
    lm = published(family, kind)
    assert lm.family == family
    for case in cases(family, kind)[:most]:
        history = copy.deepcopy(case["history"])
        response, after = lm.chat(lm.tokenizer, case["query"], history, **how(case, published=True))
        assert response == case["chat_response"], case["name"]
        if family == "chatglm2":
            assert after == [*map(tuple, case["history"]), (case["query"], response)]
        else:
            asked = [*case["history"], {"role": case["role"], "content": case["query"]}]
            assert history == asked  # the caller's own list
            assert after == [*asked, {"role": "assistant", "metadata": "", "content": response}]
        stream = lm.stream_chat(lm.tokenizer, case["query"], case["history"], **how(case, published=True))
        assert [text for text, _ in stream] == case["stream_responses"], case["name"]


@each_family
def test_published_sampling(published: Open, family: str) -> None:
    lm = published(family, "fp16")
    for case in goldens()[family]["sampled"]:
        asked = {"max_length": case["max_length"], "published": True}
        torch.manual_seed(case["seed"])
        assert lm.chat(lm.tokenizer, case["query"], **asked)[0] == case["chat"]
        torch.manual_seed(case["seed"])
        *_, (last, _) = lm.stream_chat(lm.tokenizer, case["query"], **asked)
        assert last == case["stream_last"]


# The default


@each
def test_a_stream_grows_to_what_chat_returns(published: Open, family: str, kind: str) -> None:
    lm = published(family, kind)
    for case in cases(family, kind)[:4]:
        answers = list(lm.stream_chat(lm.tokenizer, case["query"], case["history"], **how(case)))
        before = copy.deepcopy(case["history"])
        assert answers[-1] == lm.chat(lm.tokenizer, case["query"], case["history"], **how(case))
        assert case["history"] == before
        texts = [text for text, _ in answers if isinstance(text, str)]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@each_family
def test_a_batch_answers_like_one_by_one(small: Open, family: str) -> None:
    lm = small(family, "int4")
    queries = ["hi", "a longer question", "x"]
    asked = {"max_length": 80, "do_sample": False}
    together = lm.chat(lm.tokenizer, queries, **asked)
    assert together == [lm.chat(lm.tokenizer, query, **asked) for query in queries]


@each_family
def test_history_that_does_not_fit_is_left_out_and_said(small: Open, family: str) -> None:
    lm, history = small(family, "int4"), []
    for n in range(4):
        question = f"{n} what is it? " * 3
        if family == "chatglm2":
            history.append((question, "that"))
        else:
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": "that"}]
    with pytest.warns(UserWarning, match="earlier rounds"):
        _, after = lm.chat(lm.tokenizer, "hi", history, max_length=200, do_sample=False)
    assert after[: len(history)] == history
    with pytest.raises(InvalidInput) as caught:
        lm.chat(lm.tokenizer, "x" * 300, max_length=200)
    assert caught.value.code == "prompt_too_long"


def test_rounds_read_only_what_is_new(small: Open) -> None:
    lm = small("chatglm3", "int4")
    asked = {"max_length": 600, "do_sample": False}
    _, history = lm.chat(lm.tokenizer, "hello " * 20, max_length=180, do_sample=False)
    again = lm.chat(lm.tokenizer, "and?", history, **asked)
    lm.forget()
    assert lm.chat(lm.tokenizer, "and?", history, **asked) == again


def answering(lm: ChatGLM, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model say `text` and hand over to a tool."""
    ids = [*lm.tokenizer.encode(text, special=False), 64797]
    monkeypatch.setattr("glmui.engine.chatglm_api.generate_ids", lambda *args, **more: iter(ids))


def test_a_tool_is_called_and_its_result_handed_back(small: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small("chatglm3", "fp16")
    call = "get_weather\n ```python\ntool_call(city='Paris')\n```"
    with monkeypatch.context() as patched:
        answering(lm, call, patched)
        response, history = lm.chat(lm.tokenizer, "Weather?", TOOLS)
        *_, (last, same) = lm.stream_chat(lm.tokenizer, "Weather?", TOOLS)
    assert response == last == {"name": "get_weather", "parameters": {"city": "Paris"}}
    assert history == same
    assert history[-1]["metadata"].strip() == "get_weather"
    assert len(TOOLS) == 1
    _, after = lm.chat(
        lm.tokenizer, '{"sky": "blue"}', history, role="observation", max_length=500, do_sample=False
    )
    assert [item["role"] for item in after[:4]] == ["system", "user", "assistant", "observation"]


def test_a_call_that_cannot_be_read_is_given_as_it_is(small: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small("chatglm3", "fp16")
    answering(lm, "get_weather\n```python\ntool_call(x=exit())\n```", monkeypatch)
    response, _ = lm.chat(lm.tokenizer, "Weather?", TOOLS)
    assert response["name"] == "get_weather"
    assert "exit()" in response["content"]
    with pytest.raises(SyntaxError):
        lm.chat(lm.tokenizer, "Weather?", copy.deepcopy(TOOLS), published=True)


def test_the_other_model_s_tokenizer_is_refused(small: Open) -> None:
    with pytest.raises(AssertionError, match="own tokenizer"):
        small("chatglm2", "fp16").chat(small("chatglm3", "fp16").tokenizer, "hi")


# transformers


@pytest.fixture
def auto() -> None:
    register_auto_classes()


@pytest.mark.usefixtures("auto")
@each
def test_auto_model_generates_published_ids(tiny_chatglm2: Folder, family: str, kind: str) -> None:
    model = AutoModel.from_pretrained(tiny_chatglm2(family, kind)).float()
    ends = [2] if family == "chatglm2" else [2, 64795, 64797]
    for case in cases(family, kind)[:4]:
        ids = torch.tensor([case["input_ids"]])
        out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=ends)
        assert out[0, ids.shape[1] :].tolist() == case["greedy_ids"]


@pytest.mark.usefixtures("auto")
@each_family
def test_auto_tokenizer_is_the_published_one(published_chatglm2: Folder, family: str, tmp_path: Path) -> None:
    values = json.loads(reference(f"{family}/goldens/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(published_chatglm2(family, "int4"))
    for case in values["strings"][::3]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decode"]
    for name, wish in (
        ("batch", {"padding": True}),
        ("batch_maxlen12", {"padding": "max_length", "max_length": 12}),
        ("batch_multiple8", {"padding": True, "pad_to_multiple_of": 8}),
    ):
        padded = tokenizer(values[name]["texts"], **wish)
        for key in ("input_ids", "attention_mask", "position_ids"):
            assert padded[key] == values[name][key], (name, key)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (2, 0, len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").is_file()
    if family == "chatglm3":
        for case in values["build_chat_input"]:
            built = tokenizer.build_chat_input(case["query"], case["history"], case["role"])
            assert built["input_ids"].tolist() == [case["ids"]]


@pytest.mark.usefixtures("auto")
@each_family
def test_auto_model_chats_pads_and_beams(tiny_chatglm2: Folder, family: str) -> None:
    folder = tiny_chatglm2(family, "int4")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float()
    response, _ = model.chat(tokenizer, "hi", max_length=40, do_sample=False)
    *_, (streamed, _) = model.stream_chat(tokenizer, "hi", max_length=40, do_sample=False)
    assert streamed == response
    inputs = tokenizer(["hi", "a longer one"], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    alone = model.generate(**tokenizer(["hi"], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert out[0, -6:].tolist() == alone[0, -6:].tolist()
    wish = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **wish), model.generate(**inputs, **wish, use_cache=False))


@pytest.mark.usefixtures("auto")
def test_auto_model_quantises_and_starts_afresh(tiny_chatglm2: Folder) -> None:
    def layers(model: Any) -> int:
        return sum(isinstance(module, QuantizedLinear) for module in model.modules())

    folder = tiny_chatglm2("chatglm3", "fp16")
    assert layers(AutoModel.from_pretrained(folder).quantize(4)) == 12
    assert layers(AutoModel.from_pretrained(folder, load_in_8bit=True)) == 12
    assert layers(quantize(AutoModel.from_pretrained(folder).float(), 8, quantization_embeddings=True)) == 13
    config = AutoConfig.from_pretrained(folder)
    assert (config.chatglm_family, config.num_hidden_layers) == ("chatglm3", 3)
    fresh = AutoModelForCausalLM.from_config(config)
    assert type(fresh) is type(AutoModel.from_pretrained(folder))
    assert fresh.get_output_embeddings().weight is not fresh.get_input_embeddings().weight


# The engine


def spec(folder: Path, **more: Any) -> EngineSpec:
    exact: dict[str, Any] = {"cpu_precision": "exact", "stop_repetition": False}
    return EngineSpec("tiny", str(folder), device="cpu", **exact, **more)


@each
def test_published_answers_in_the_page(published_chatglm2: Folder, family: str, kind: str) -> None:
    engine = open_family(spec(published_chatglm2(family, kind)), lambda progress: None)
    assert engine.info().context_length == (32768 if family == "chatglm2" else 8192)
    limit = 24 if family == "chatglm2" else 23  # chat() drops the last
    for case in cases(family, kind):
        if case["role"] == "observation" or any("tools" in item for item in case["history"]):
            continue  # the page offers no tools
        turns = [(h["role"], h["content"]) if family == "chatglm3" else h for h in case["history"]]
        said = (
            [Message(role, text) for role, text in turns]
            if family == "chatglm3"
            else [Message(r, t) for pair in turns for r, t in zip(("user", "assistant"), pair, strict=True)]
        )
        params = GenerationParams(
            max_length=max(64, case["chat_max_length"]), max_new_tokens=limit, temperature=0
        )
        *_, last = chunks = list(engine.stream_chat([*said, Message("user", case["query"])], params, "r"))
        assert "".join(chunk.text for chunk in chunks) == case["chat_response"]
        assert last.usage is not None
        assert last.usage.prompt_tokens == len(case["input_ids"])
        assert open_counter(published_chatglm2(family, kind))([*said, Message("user", case["query"])]) == len(
            case["input_ids"]
        )


@each_family
def test_quantising_while_loading(tiny_chatglm2: Folder, family: str) -> None:
    engine = open_family(spec(tiny_chatglm2(family, "fp16"), quantize="int4"), lambda progress: None)
    assert engine.info().dtype == "int4"
    params = GenerationParams(max_length=64, max_new_tokens=6, temperature=0)
    *_, last = engine.stream_chat([Message("user", "hi")], params, "r")
    assert last.tokens == 6


def test_what_the_bench_measures(tiny_chatglm2: Folder) -> None:
    engine = open_family(spec(tiny_chatglm2("chatglm3", "int4")), lambda progress: None)
    subject = subject_of(engine)
    head = 65024 * 32 * 2
    assert head < subject.weight_bytes < 1.1 * head + 200_000  # the embedding is looked up, not read
    rows = subject.at(64, 2)
    rows.step()
    rows.reset()
    assert rows.cache_bytes() % (2 * 3 * 2 * 64 * 2 * 16) == 0
    subject.prefill(20)


def test_where_the_parts_go(tiny_chatglm2: Folder) -> None:
    engine = open_family(spec(tiny_chatglm2("chatglm2", "fp16")), lambda progress: None)
    assert len(device_map(engine.speaker.decoder.model)) == 3 + 3  # type: ignore[attr-defined]
