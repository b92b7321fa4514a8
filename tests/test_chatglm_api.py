"""from glmui import ChatGLM: what docs/api.md promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import glmui
from glmui import ChatGLM
from glmui.engine.chatglm_api import generate_batch
from glmui.engine.talks import Wish
from glmui.errors import EngineError, InvalidInput
from glmui.quant import QuantizedLinear
from tests.chatglm_fixture import DATA, KINDS, goldens

Folder = Callable[[str], Path]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def small(tiny_chatglm: Folder) -> Callable[[str], ChatGLM]:
    return cache(lambda kind: ChatGLM.from_pretrained(tiny_chatglm(kind), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def published(published_chatglm: Folder) -> Callable[[str], ChatGLM]:
    return cache(lambda kind: ChatGLM.from_pretrained(published_chatglm(kind), device="cpu", dtype="float32"))


Small = Callable[[str], ChatGLM]


# published=True: to the letter


@pytest.mark.parametrize("most", [5, pytest.param(None, marks=pytest.mark.slow)])
@each_kind
def test_published_chat(published: Small, kind: str, most: int | None) -> None:
    lm = published(kind)
    for case in goldens()["models"][kind]["prompts"][:most]:
        how = {"max_length": case["chat_max_length"], "do_sample": False, "published": True}
        response, history = lm.chat(lm.tokenizer, case["query"], case["history"], **how)
        assert response == case["chat_response"], case["name"]
        assert history == [*map(tuple, case["history"]), (case["query"], response)]


@pytest.mark.parametrize("most", [5, pytest.param(None, marks=pytest.mark.slow)])
@each_kind
def test_published_stream(published: Small, kind: str, most: int | None) -> None:
    lm = published(kind)
    for case in goldens()["models"][kind]["prompts"][:most]:
        how = {"max_length": case["chat_max_length"], "do_sample": False, "published": True}
        stream = lm.stream_chat(lm.tokenizer, case["query"], case["history"], **how)
        assert [response for response, _ in stream] == case["stream_responses"], case["name"]


def test_published_greedy_ids(small: Small) -> None:
    lm = small("int8")
    for case in goldens()["models"]["int8"]["prompts"]:
        assert lm.generate(case["input_ids"], max_new_tokens=32) == case["greedy_ids"], case["name"]


def test_the_quantisation_cache_is_asked_for(tiny_chatglm: Folder) -> None:
    for asked in (False, True):
        lm = ChatGLM.from_pretrained(tiny_chatglm("int4"), "cpu", "float16", use_quantization_cache=asked)
        layers = [module for module in lm.model.modules() if isinstance(module, QuantizedLinear)]
        assert len(layers) == 16
        assert all(layer.whole == asked for layer in layers)


def test_no_new_tokens_are_none(small: Small) -> None:
    lm = small("int4")
    assert lm.generate(goldens()["models"]["int4"]["prompts"][0]["input_ids"], max_new_tokens=0) == []


def test_published_sampling(small: Small) -> None:
    for case in json.loads((DATA / "chat.json").read_text(encoding="utf-8"))["sampled"]:
        prompt = case["generate_ids"][: case["generate_ids"].index(130004) + 1]
        torch.manual_seed(case["seed"])
        new = small("fp16").generate(
            prompt,
            case["max_length"] - len(prompt),
            True,
            top_p=case["top_p"],
            temperature=case["temperature"],
        )
        assert prompt + new == case["generate_ids"]


def test_published_batch(published: Small) -> None:
    lm, case = published("fp16"), goldens()["models"]["fp16"]["batch"]
    answers = lm.chat(lm.tokenizer, case["prompts"], max_length=200, do_sample=False, published=True)
    for (answer, history), decoded, prompt in zip(answers, case["decoded"], case["prompts"], strict=True):
        assert answer.startswith(decoded[:20].strip()[:5])
        assert history == [(prompt, answer)]


def test_published_oddities(small: Small) -> None:
    lm = small("int4")
    long = "今" * 30
    how = {"max_length": 20, "do_sample": False, "published": True}
    assert len(generate_batch(lm.model, [lm.tokenizer.encode(long)], Wish(**how))[0]) == 1
    assert list(lm.stream_chat(lm.tokenizer, long, **how)) == []
    for temperature in (0, 2, 0.0):
        with pytest.raises(ValueError, match="temperature"):
            lm.chat(lm.tokenizer, "你好", temperature=temperature, published=True)
    typed = lm.tokenizer.encode("a<sop>")
    assert typed.count(130004) == 2


def test_published_blanks_on_nan_and_the_default_says_so(tiny_chatglm: Folder) -> None:
    lm = ChatGLM.from_pretrained(tiny_chatglm("int4"), device="cpu", dtype="float32")
    lm.model.transformer.final_layernorm.bias.data = torch.full((32,), float("nan"))
    torch.manual_seed(0)
    assert lm.chat(lm.tokenizer, "你好", max_length=16, published=True)[0] == ""  # all blanks, stripped
    with pytest.raises(EngineError) as caught:
        lm.chat(lm.tokenizer, "你好", max_length=16)
    assert caught.value.code == "nan_logits"


# The default


def test_stream_never_changes_what_it_said(small: Small) -> None:
    lm = small("fp16")
    for seed in range(2):
        how = {"max_length": 40, "seed": seed, "temperature": 1.5, "top_k": 0, "top_p": 0.99}
        texts = [response for response, _ in lm.stream_chat(lm.tokenizer, "你好", **how)]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert texts[-1] == lm.chat(lm.tokenizer, "你好", **how)[0]


def test_every_token_of_a_full_length_is_there(small: Small) -> None:
    lm = small("fp16")
    prompt = lm.tokenizer.encode("你好")
    new = lm.generate(prompt, 10)
    *_, (response, _) = lm.stream_chat(lm.tokenizer, "你好", max_length=len(prompt) + 10, do_sample=False)
    assert response == lm.tokenizer.decode(new).strip()


def test_typed_special_tokens_are_text(small: Small) -> None:
    lm = small("fp16")
    assert lm.chat(lm.tokenizer, "<eop>[MASK]", max_length=64, do_sample=False)[0]


def test_batch_answers_like_one_by_one(small: Small) -> None:
    lm = small("int4")
    queries, histories = ["你好", "Hello, how are you?"], [[("a", "b")], []]
    how = {"max_length": 60, "do_sample": False}
    together = lm.chat(lm.tokenizer, queries, history=histories, **how)
    assert together == [lm.chat(lm.tokenizer, q, h, **how) for q, h in zip(queries, histories, strict=True)]
    assert lm.chat(lm.tokenizer, [], history=[]) == []
    with pytest.raises(InvalidInput) as caught:
        lm.chat(lm.tokenizer, queries, history=[[]])
    assert caught.value.code == "batch_lengths_differ"


def test_history_that_does_not_fit_is_left_out_and_said(small: Small) -> None:
    lm = small("int4")
    history = [("今天" * 10, "天气" * 10)] * 3
    with pytest.warns(UserWarning, match="earlier rounds"):
        response, after = lm.chat(lm.tokenizer, "你好", history, max_length=80, do_sample=False)
    assert after == [*history, ("你好", response)]
    with pytest.raises(InvalidInput) as caught:
        lm.chat(lm.tokenizer, "今" * 100, max_length=80)
    assert caught.value.code == "prompt_too_long"


def test_seeds_repeat(small: Small) -> None:
    lm = small("fp16")
    ids = lm.tokenizer.encode("你好")
    draws = [lm.generate(ids, 8, do_sample=True, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(7)
    free = lm.generate(ids, 8, do_sample=True, top_p=1.0)
    torch.manual_seed(7)
    assert lm.generate(ids, 8, do_sample=True, top_p=1.0) == free


def test_temperature_zero_is_greedy(small: Small) -> None:
    lm = small("fp16")
    ids = lm.tokenizer.encode("你好")
    assert lm.generate(ids, 8, do_sample=True, temperature=0) == lm.generate(ids, 8)


def test_next_logits(small: Small) -> None:
    lm = small("int8")
    case = goldens()["models"]["int8"]["prompts"][0]
    logits = lm.next_logits(case["input_ids"])
    assert logits.shape == (130528,)
    assert logits.dtype == torch.float32
    assert logits.topk(20).indices.tolist() == case["top20_ids"]
    with pytest.raises(InvalidInput):
        lm.next_logits([5])


def test_quantising_and_dtypes(tiny_chatglm: Folder) -> None:
    lm = ChatGLM.from_pretrained(tiny_chatglm("fp16"), device="cpu", bits=4)
    case = goldens()["models"]["int4"]["prompts"][0]
    assert lm.next_logits(case["input_ids"]).argmax() == case["greedy_ids"][0]
    half = ChatGLM.from_pretrained(tiny_chatglm("int4"), device="cpu", dtype="bfloat16")
    assert half.model.transformer.layers[0].attention.dense.bias.dtype == torch.bfloat16
    assert half.device_map["lm_head"] == "cpu"
    assert len(half.generate(case["input_ids"], 3)) == 3


def test_importing_glmui_is_light() -> None:
    code = (
        "import sys, glmui; assert not {'torch', 'transformers', 'gradio'} & set(sys.modules); "
        "glmui.ChatGLM; assert 'torch' in sys.modules; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        glmui.nothing_like_this  # noqa: B018
