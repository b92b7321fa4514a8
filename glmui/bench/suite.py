"""The suite "appendix", in a process of its own: what one notices of a model, and how near it is to another.

Says through the pipe, after measure's "loaded": doing, value, and measure's "done" or "failed".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from glmui.bench.measure import memory, serve
from glmui.engine.wire import Wire
from glmui.errors import GlmuiError
from glmui.types import ChatEngine, EngineSpec, GenerationParams, Message, Usage

ROUNDS = 30
SHORT_TOKENS, LONG_TOKENS, ROUND_TOKENS = 24, 256, 24  # most tokens of a reply
KEPT_ROUNDS = 3  # of a conversation, so that each round costs the same and memory has no cause to grow

_SHORT = "用一句话介绍你自己。"
_LONG = "请写一篇文章，详细介绍秋天的景色、天气、食物和人们的活动。"
_ASKED = ("给我讲一件有趣的事。", "为什么？", "Can you say that in English?", "请再说得简单一些。")


def run(connection: Connection, spec: EngineSpec, baseline: str) -> None:
    """Entry of the process. baseline: a ChatGLM folder to compare with, or ""."""
    serve(connection, spec, partial(_take, spec=spec, baseline=baseline))


def _take(engine: ChatEngine, wire: Wire, spec: EngineSpec, baseline: str) -> None:
    def figure(name: str, take: Callable[[], dict[str, Any]]) -> None:
        wire.send("doing", name=name)
        wire.send("value", values=take())

    params = partial(GenerationParams, temperature=0, seed=0)
    # Brings all pages into memory; another question, for one that was read already is not read again.
    answer(engine, [Message("user", _ASKED[0])], params(max_new_tokens=2))
    figure("memory", lambda: dict(zip(("rss", "private"), memory(), strict=True)))
    for name, asked, tokens in (("short", _SHORT, SHORT_TOKENS), ("long", _LONG, LONG_TOKENS)):
        figure(name, lambda n=name, a=asked, t=tokens: _answered(n, engine, a, params(max_new_tokens=t)))  # type: ignore[misc]
    figure("rounds", lambda: converse(engine, params(max_new_tokens=ROUND_TOKENS)))
    if baseline and engine.info().family == "chatglm":
        figure("agreement", lambda: _agreement(engine, spec, Path(baseline)))


def answer(engine: ChatEngine, messages: Sequence[Message], params: GenerationParams) -> tuple[str, Usage]:
    """One reply and what it took. Raises GlmuiError."""
    text, usage = "", None
    for chunk in engine.stream_chat(messages, params, str(time.monotonic_ns())):
        text, usage = text + chunk.text, chunk.usage or usage
    assert usage is not None
    return text, usage


def _answered(name: str, engine: ChatEngine, asked: str, params: GenerationParams) -> dict[str, Any]:
    _, usage = answer(engine, [Message("user", asked)], params)
    return {
        f"{name}_first_s": usage.first_token_seconds,
        f"{name}_s": usage.seconds,
        f"{name}_tokens": usage.completion_tokens,
        f"{name}_tok_s": usage.tokens_per_second,
    }


def converse(engine: ChatEngine, params: GenerationParams) -> dict[str, Any]:
    """ROUNDS rounds one after the other: how many failed, and the bytes of own memory after each."""
    said: list[Message] = []
    own, failures = [], 0
    for number in range(ROUNDS):
        said.append(Message("user", _ASKED[number % len(_ASKED)]))
        try:
            text, _ = answer(engine, said, params)
            said.append(Message("assistant", text))
        except GlmuiError:
            failures += 1
            said.pop()
        said = said[-2 * KEPT_ROUNDS :]
        own.append(memory()[1])
    return {"rounds": ROUNDS, "failures": failures, "round_private": own}


def _agreement(engine: Any, spec: EngineSpec, baseline: Path) -> dict[str, Any]:
    """Beside the baseline: nothing where their vocabularies are not the same."""
    from glmui.glm.config import read_config
    from glmui.quantizing import compare

    with contextlib.suppress(GlmuiError):
        if read_config(baseline).vocab_size != read_config(spec.folder, spec.chatglm_family).vocab_size:
            return {}
    samples = compare.samples_for(baseline)
    source = compare.see_folder(baseline, samples)
    result = compare.see_model(engine.speaker.decoder.model, samples)
    return asdict(compare.agreement(samples, source, result))
