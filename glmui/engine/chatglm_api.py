"""The Python API: ChatGLM.from_pretrained(folder).chat(...). See docs/api.md."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from glmui import i18n, prompts
from glmui.engine.chatglm import ChatGLMDecoder, device_map, open_tokenizer, placement
from glmui.engine.generate import generate_ids
from glmui.engine.loaded import with_kernels
from glmui.engine.sampling import Sampler, blank_where_broken, make_generator, refuse_broken
from glmui.errors import InvalidInput
from glmui.glm.cache import SPARE
from glmui.glm.checkpoint import load_model
from glmui.glm.config import GLMConfig
from glmui.glm.layout import Layout, pad_left
from glmui.glm.model import ChatGLMModel
from glmui.text.chatglm import ChatGLMTokenizer
from glmui.text.chatglm_reply import ChatGLMDetokeniser, reply_text
from glmui.types import GenerationParams, Message

History = list[tuple[str, str]]
_BLANK = 5  # the id of "▁", what the published code answers with where logits are broken


@dataclass(frozen=True, slots=True)
class Wish:
    """How chat() and stream_chat() are to answer; their keyword arguments by the same names.

    max_length: tokens of prompt and reply together. do_sample False or temperature 0: greedy. top_k: 50 is
    what the published code does without saying so; 0 is off. seed: None draws from torch's own generator.
    published: do exactly what the published code does, its oddities included.
    """

    max_length: int = 2048
    do_sample: bool = True
    top_p: float = 0.7
    temperature: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None
    published: bool = False

    def sampler(self, device: torch.device) -> Sampler:
        """Raises InvalidInput for values out of bounds (ValueError for the published temperature rule)."""
        if self.published and self.do_sample:
            _check_published_temperature(self.temperature)
        params = GenerationParams(
            temperature=self.temperature if self.do_sample else 0,
            top_p=min(self.top_p, 1.0),
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
        )
        generator = None if self.seed is None else make_generator(self.seed, device)
        check = partial(blank_where_broken, blank_id=_BLANK) if self.published else refuse_broken
        return Sampler(params, generator, check)


def _check_published_temperature(value: float) -> None:
    if value != 1 and (not isinstance(value, float) or value <= 0):
        raise ValueError(f"temperature must be a float above 0, not {value!r}")


class Chatting:
    """chat() and stream_chat() of anything that has a ChatGLMModel."""

    def _glm(self) -> ChatGLMModel:
        raise NotImplementedError

    @overload
    def chat(self, tokenizer: Any, query: str, history: Any = None, **wish: Any) -> tuple[str, History]: ...
    @overload
    def chat(
        self, tokenizer: Any, query: list[str], history: Any = None, **wish: Any
    ) -> list[tuple[str, History]]: ...
    def chat(
        self, tokenizer: Any, query: str | list[str], history: Any = None, **wish: Any
    ) -> tuple[str, History] | list[tuple[str, History]]:
        """Answer `query` and return (response, history with this round), or a list of these for a list of
        queries, whose history is a list of histories. Keyword arguments: see Wish.

        A history too long for max_length loses its oldest rounds, with a warning.
        Raises InvalidInput when the query alone is too long, EngineError("nan_logits").
        """
        chosen, vocabulary = Wish(**wish), _vocabulary(tokenizer)
        queries = [query] if isinstance(query, str) else query
        histories = [history] if isinstance(query, str) else history or [None] * len(queries)
        rounds = [_rounds(one) for one in histories]
        if len(rounds) != len(queries):
            raise InvalidInput("batch_lengths_differ", queries=len(queries), histories=len(rounds))
        asked = [_prompt(vocabulary, q, h, chosen) for q, h in zip(queries, rounds, strict=True)]
        replies = generate_batch(self._glm(), asked, chosen) if asked else []
        texts = [reply_text(vocabulary, ids) for ids in replies]
        answers = [(t, [*h, (q, t)]) for q, h, t in zip(queries, rounds, texts, strict=True)]
        return answers[0] if isinstance(query, str) else answers

    def stream_chat(
        self, tokenizer: Any, query: str, history: Any = None, **wish: Any
    ) -> Iterator[tuple[str, History]]:
        """Like chat(), but yield (response so far, history) while it grows.

        Each response begins with the one before, and the last is what chat() returns; not so with
        published=True, where text may change and the last token of a full max_length is missing.
        """
        chosen, vocabulary, rounds = Wish(**wish), _vocabulary(tokenizer), _rounds(history)
        ids = _prompt(vocabulary, query, rounds, chosen)
        stream = _published_stream if chosen.published else _stable_stream
        for response in stream(self._glm(), vocabulary, ids, chosen):
            yield response, [*rounds, (query, response)]


class ChatGLM(Chatting):
    """A ChatGLM-6B model and its tokenizer.

    tokenizer: ChatGLMTokenizer. model: the torch module. device_map: where each part of it lives.
    """

    def __init__(self, model: ChatGLMModel, tokenizer: ChatGLMTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        bits: int | None = None,
    ) -> ChatGLM:
        """Open a published folder (FP16, INT8, INT4).

        device: "auto", "cpu", "cuda", "cuda:N", "mps", or "mixed" (card and CPU share the layers).
        dtype: what is computed in; None is float32 on a CPU, float16 on a card. On a CPU float32 is exact.
        bits: 4 or 8 quantises a float16 folder while loading. Raises ModelError, InvalidInput.
        """
        config = GLMConfig.from_folder(folder)
        tokenizer = open_tokenizer(Path(folder), config)
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        where = placement(device, config, wanted, bits or config.quantization_bit)
        model = load_model(folder, where.place, bits or 0)
        if where.dtype == torch.float32 and (bits or config.quantization_bit):
            with_kernels(model, where.device, torch.get_num_threads(), "exact")
        return cls(model, tokenizer)

    @property
    def device_map(self) -> Mapping[str, str]:
        return device_map(self.model)

    def _glm(self) -> ChatGLMModel:
        return self.model

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [vocab], float32 on the CPU, of the id that follows `ids` (with [gMASK] and <sop>)."""
        return ChatGLMDecoder(self.model).prefill(list(ids), lambda part: None).float().cpu()

    def generate(
        self, ids: Sequence[int], max_new_tokens: int = 32, do_sample: bool = False, **wish: Any
    ) -> list[int]:
        """At most max_new_tokens new ids after `ids`; <eop> is the last where the reply ends itself."""
        chosen = Wish(do_sample=do_sample, **wish)
        return list(_new_ids(self.model, list(ids), chosen, max_new_tokens))


def _vocabulary(tokenizer: Any) -> ChatGLMTokenizer:
    """The ChatGLMTokenizer itself, or the one inside transformers' tokenizer."""
    found = getattr(tokenizer, "chatglm", tokenizer)
    assert isinstance(found, ChatGLMTokenizer), "pass this model's own tokenizer"
    return found


def _rounds(history: Any) -> History:
    return [(str(question), str(answer)) for question, answer in history or []]


def _prompt(tokenizer: ChatGLMTokenizer, query: str, history: History, wish: Wish) -> list[int]:
    """The prompt's ids; unless published, of the rounds that fit, and with typed special tokens as text."""
    if wish.published:
        return tokenizer.encode(prompts.chatglm_prompt(history, query))

    def encode(messages: Sequence[Message]) -> list[int]:
        return tokenizer.encode(prompts.chatglm_prompt(*prompts.chatglm_rounds(messages)), literal=True)

    said = [m for q, a in history for m in (Message("user", q), Message("assistant", a))]
    budget = max(1, int(wish.max_length * (1 - prompts.REPLY_SHARE)))
    fitting = prompts.fit(
        [*said, Message("user", query)], lambda m: len(encode(m)), budget, hard_limit=wish.max_length - 1
    )
    if fitting.left_out:
        warnings.warn(i18n.text("en", "notes.left_out", rounds=fitting.left_out), stacklevel=4)
    return encode(fitting.messages)


def _new_ids(model: ChatGLMModel, ids: list[int], wish: Wish, limit: int) -> Iterator[int]:
    decoder = ChatGLMDecoder(model)
    sampler = wish.sampler(decoder.device)
    return generate_ids(decoder, ids, sampler, limit, {model.config.eos_token_id}, cancelled=lambda: False)


def _stable_stream(
    model: ChatGLMModel, tokenizer: ChatGLMTokenizer, ids: list[int], wish: Wish
) -> Iterator[str]:
    """The reply so far, each time it has grown, and once more when it is complete."""
    detokeniser, response = ChatGLMDetokeniser(tokenizer), ""
    for token in _new_ids(model, ids, wish, wish.max_length - len(ids)):
        if more := detokeniser.add(token):
            response += more
            yield response
    yield response + detokeniser.finish()


def _published_stream(
    model: ChatGLMModel, tokenizer: ChatGLMTokenizer, ids: list[int], wish: Wish
) -> Iterator[str]:
    """After each id but the last, whatever that is: everything decoded anew."""
    new: list[int] = []
    for token in _new_ids(model, ids, wish, wish.max_length - len(ids)):
        if new:
            yield reply_text(tokenizer, new)
        new.append(token)


@torch.inference_mode()
def generate_batch(model: ChatGLMModel, asked: Sequence[list[int]], wish: Wish) -> list[list[int]]:
    """New ids for each prompt, all rows at once, padded on the left; a row ends at <eop> or max_length.

    A prompt of max_length or more still gets one id, as the published code gives it.
    """
    rows, pads = pad_left(asked, model.config)
    device = model.transformer.word_embeddings.weight.device
    rows = rows.to(device)
    layout = Layout.of(rows, model.config, pads)
    sampler = wish.sampler(device)
    limits = [max(wish.max_length - len(prompt), 1) for prompt in asked]
    cache = model.new_cache(rows.shape[1] + SPARE)
    new: list[list[int]] = [[] for _ in asked]
    going = set(range(len(asked)))
    while going:
        cache.make_room(rows.shape[1])
        logits = model(rows, layout, cache, last_only=True)[:, -1]
        drawn = sampler(logits, [[*p, *n] for p, n in zip(asked, new, strict=True)])
        for row in sorted(going):
            new[row].append(drawn[row])
            if drawn[row] == model.config.eos_token_id or len(new[row]) == limits[row]:
                going.discard(row)
        following = [t if row in going else model.config.pad_token_id for row, t in enumerate(drawn)]
        rows = torch.tensor(following, device=device)[:, None]
    return new
