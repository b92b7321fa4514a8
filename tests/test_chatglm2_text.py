"""ChatGLM2's and 3's text: tokenizer, prompts, replies. Without the published vocabulary most is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmui.bench.random_model import chatglm2_pieces, vocabulary
from glmui.prompts import chatglm2_prompt
from glmui.text.chatglm2 import ChatGLM2Tokenizer, process_response
from glmui.text.chatglm2 import prompt_ids as chatglm2_ids
from glmui.text.chatglm3 import (
    ASSISTANT,
    ChatGLM3Tokenizer,
    ToolCall,
    Turn,
    chat_ids,
    prompt_ids,
    read_reply,
    tool_parameters,
)
from glmui.text.chatglms import AnyTokenizer, detokeniser
from glmui.types import Message
from tests.chatglm2_fixture import FAMILIES, goldens
from tests.reference import reference

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM3Tokenizer:
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    file.write_bytes(vocabulary(chatglm2_pieces()))
    return ChatGLM3Tokenizer(file)


def published(family: str) -> AnyTokenizer:
    kind = {"chatglm2": ChatGLM2Tokenizer, "chatglm3": ChatGLM3Tokenizer}[family]
    return kind(reference("chatglm2-chatglm3.tokenizer.model"))


def golden(family: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(
        reference(f"{family}/goldens/tokenizer.json").read_text(encoding="utf-8")
    )
    return values


def streamed(tokenizer: AnyTokenizer, ids: list[int]) -> str:
    stream = detokeniser(tokenizer)
    return "".join(stream.add(i) for i in ids) + stream.finish()


@each_family
def test_published_strings(family: str) -> None:
    tokenizer = published(family)
    values = golden(family)
    assert len(tokenizer) == values["meta"]["vocab_size"]
    for case in values["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.encode(case["text"], special=False) == case["ids_no_special"]
        assert [tokenizer.name(i) for i in case["ids_no_special"]] == case["tokens"]
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(case["ids_no_special"], skip_special_tokens=True) == case["decode_body"]
        assert streamed(tokenizer, case["ids_no_special"]) == process_response(case["decode_body"])
    for case in values["pairs"]:
        assert tokenizer.encode(case["a"], case["b"]) == case["ids"]
    for case in values["truncation"]:
        assert tokenizer.encode(case["text"], max_length=case["max_length"]) == case["ids"]


@each_family
def test_published_decoding(family: str) -> None:
    """Where the published code raises IndexError, an id without a meaning gives nothing."""
    tokenizer = published(family)
    for case in golden(family)["decode_ids"]:
        expected = "" if isinstance(case["decode"], dict) else case["decode"]
        assert tokenizer.decode(case["ids"]) == expected


def test_published_prompts_of_chatglm2() -> None:
    for case in golden("chatglm2")["build_prompt"]:
        assert chatglm2_prompt(case["history"], case["query"]) == case["prompt"]


def test_published_messages_of_chatglm3() -> None:
    tokenizer, values = published("chatglm3"), golden("chatglm3")
    assert isinstance(tokenizer, ChatGLM3Tokenizer)
    for case in values["build_chat_input"]:
        turns = [*map(Turn.of, case["history"]), Turn(case["role"], case["query"])]
        assert chat_ids(tokenizer, turns) == case["ids"]
    for case in values["build_single_message"]:
        assert tokenizer.message_ids(case["role"], case["message"], case["metadata"]) == case["ids"]
    for case in values["encode_special_tokens_true"]:
        assert tokenizer.text_ids(case["text"], roles=True) == case["ids"][2:]


def test_chatglm2_has_no_system_text(small: ChatGLM2Tokenizer) -> None:
    said = [Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r")]
    prompt = "[Round 1]\n\n问：s\n\nq\n\n答：a\n\n[Round 2]\n\n问：r\n\n答："
    assert chatglm2_ids(small, said) == small.encode(prompt)
    begun = chatglm2_ids(small, [Message("user", "q"), Message("assistant", "a b")])
    assert begun == small.encode("[Round 1]\n\n问：q\n\n答：a b")


def test_chatglm3_goes_on_with_a_begun_reply(small: ChatGLM3Tokenizer) -> None:
    asked = [Message("system", "s"), Message("user", "q")]
    assert prompt_ids(small, asked)[-1] == ASSISTANT
    begun = prompt_ids(small, [*asked, Message("assistant", "a b")])
    assert begun == [*prompt_ids(small, asked), *small.text_ids("\n"), *small.text_ids("a b")]


def test_a_role_that_is_none(small: ChatGLM3Tokenizer) -> None:
    with pytest.raises(ValueError, match="observation"):
        small.message_ids("tool", "x")


@settings(max_examples=60)
@given(text=st.text(max_size=30), begun=st.booleans())
def test_a_stream_never_loses_a_character(small: ChatGLM3Tokenizer, text: str, begun: bool) -> None:
    ids = small.encode(text, special=False)
    whole = small.decode(ids)
    if not begun:
        assert streamed(small, ids) == process_response(whole)
        return
    stream = detokeniser(small, "before")
    assert ("".join(map(stream.add, ids)) + stream.finish()).strip() == process_response(whole)


def test_typed_special_names_are_text(small: ChatGLM3Tokenizer) -> None:
    assert not set(small.special) & set(small.text_ids("<|user|>[gMASK]sop</s><|assistant|>"))


def test_counting_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(vocabulary(chatglm2_pieces()))
    config = {"model_type": "chatglm", "padded_vocab_size": 65024, "seq_length": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys; from pathlib import Path; from glmui.text import open_counter; "
        "from glmui.types import Message; count = open_counter(Path(sys.argv[1])); "
        "assert count([Message('user', 'hi')]) > 4; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# Replies


def test_published_replies() -> None:
    for case in goldens()["chatglm2"]["process_response"]:
        assert process_response(case["input"]) == case["output"]
    for case in goldens()["chatglm3"]["process_response"]:
        first = case["history"][0]
        tools = first["role"] == "system" and "tools" in first
        if "error" in case:
            with pytest.raises(SyntaxError):
                read_reply(case["output"], tools, strict=True)
            assert isinstance(read_reply(case["output"], tools)[0], ToolCall)
            continue
        response, turns = read_reply(case["output"], tools, strict=True)
        assert (response if isinstance(response, str) else response.to_dict()) == case["content"]
        said = [{"role": t.role, "metadata": t.metadata, "content": t.content} for t in turns]
        assert said == case["appended"]


def test_parameters_are_literals() -> None:
    call = "tool_call(city='北京', days=3, at=[1, -2.5], deep={'a': None, 'b': (True,)})"
    assert tool_parameters(call) == {
        "city": "北京",
        "days": 3,
        "at": [1, -2.5],
        "deep": {"a": None, "b": (True,)},
    }
    assert tool_parameters("  tool_call()\n") == {}
    assert tool_parameters(r"tool_call(path='a\d')") == {"path": r"a\d"}


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(x=__import__('os').system('echo must not run'))",
        "tool_call(x=open('/etc/passwd').read())",
        "tool_call(**{'a': 1})",
        "tool_call('a')",
        "tool_call(x=1).y",
        "other(x=1)",
        "[tool_call(x=1) for _ in range(9)]",
        "tool_call(x=1)\nprint(1)",
        "tool_call(x=9**9**9)",
        "tool_call(x=f'{1}')",
        "tool_call(x=lambda: 1)",
        "import os",
        "",
        "\0",
        "(" * 5000,
        "tool_call(x=" + "-" * 3000 + "1)",
        "tool_call(x=" + "9" * 5000 + ")",
        "tool_call(x={[]: 1})",
    ],
)
def test_nothing_is_evaluated(code: str) -> None:
    with pytest.raises(SyntaxError):
        tool_parameters(code)


def test_a_second_message_begins_a_line(small: ChatGLM3Tokenizer) -> None:
    line, one, two = (small.text_ids(text) for text in ("\n", "one", "two"))
    ids = [*line, *one, ASSISTANT, *line, *two]
    assert streamed(small, ids).split() == ["one", "two"]
    assert "\n" in streamed(small, ids)
    assert "<|assistant|>" not in streamed(small, ids)
