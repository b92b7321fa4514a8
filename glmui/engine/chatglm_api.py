"""The Python API: ChatGLM.from_pretrained(folder).chat(...). See docs/api.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from glmui.engine import cards
from glmui.engine.decoders import Step, decoder_of
from glmui.engine.extras import Extras, Folder
from glmui.engine.generate import Decoder, generate_ids
from glmui.engine.loaded import kernel_folder, with_kernels
from glmui.engine.placement import device_map, placement
from glmui.engine.talks import Answer, Talk, Wish, talk_of
from glmui.errors import InvalidInput
from glmui.glm.adapter import merge, read_adapter
from glmui.glm.cache import SPARE
from glmui.glm.checkpoint import AnyModel, empty_model, load_model
from glmui.glm.config import AnyConfig, read_config
from glmui.glm.model import ChatGLMModel
from glmui.quant.swap import widen_whole
from glmui.text.chatglms import AnyTokenizer, detokeniser, open_tokenizer, stops
from glmui.types import EngineSpec, Role


class Chatting:
    """chat() and stream_chat() of anything that has one of the three models."""

    def _glm(self) -> AnyModel:
        raise NotImplementedError

    def _decoder(self) -> Decoder:
        return decoder_of(self._glm())

    @overload
    def chat(
        self, tokenizer: Any, query: str, history: Any = None, role: Role = "user", **wish: Any
    ) -> Answer: ...
    @overload
    def chat(
        self, tokenizer: Any, query: list[str], history: Any = None, role: Role = "user", **wish: Any
    ) -> list[Answer]: ...
    def chat(
        self,
        tokenizer: Any,
        query: str | list[str],
        history: Any = None,
        role: Role = "user",
        **wish: Any,
    ) -> Answer | list[Answer]:
        """Answer `query` and return (response, history with this round), or a list of these for a list of
        queries, whose history is a list of histories. Keyword arguments: see Wish.

        history: (question, answer) pairs, or with ChatGLM3 messages {"role", "content", …}, whose next one
        has the given role. A history too long for max_length loses its oldest rounds, with a warning.
        Raises InvalidInput when the query alone is too long, EngineError("nan_logits").
        """
        vocabulary, talk, chosen = self._way(tokenizer, wish)
        if isinstance(query, str):
            asked = talk.ask(vocabulary, query, history, role, chosen)
            return talk.answer(vocabulary, asked, list(self._new_ids(asked.ids, chosen)), chosen)
        histories = history or [None] * len(query)
        if len(histories) != len(query):
            raise InvalidInput("batch_lengths_differ", queries=len(query), histories=len(histories))
        all_asked = [talk.ask(vocabulary, q, h, role, chosen) for q, h in zip(query, histories, strict=True)]
        replies = generate_batch(self._glm(), [a.ids for a in all_asked], chosen) if all_asked else []
        return [talk.answer(vocabulary, a, ids, chosen) for a, ids in zip(all_asked, replies, strict=True)]

    def stream_chat(
        self, tokenizer: Any, query: str, history: Any = None, role: Role = "user", **wish: Any
    ) -> Iterator[Answer]:
        """Like chat(), but yield (response so far, history) while it grows.

        The last is what chat() returns, and each response begins with the one before (but for a last one
        that is the call of a tool). Not so with published=True, where text may change and more.
        """
        vocabulary, talk, chosen = self._way(tokenizer, wish)
        asked = talk.ask(vocabulary, query, history, role, chosen)
        ids = self._new_ids(asked.ids, chosen)
        if chosen.published:
            yield from talk.published_stream(vocabulary, asked, ids)
            return
        text, response, new = detokeniser(vocabulary), "", []
        for token in ids:
            new.append(token)
            if token not in stops(vocabulary.family) and (more := text.add(token)):
                response += more
                yield response, talk.so_far(asked, response)
        yield talk.answer(vocabulary, asked, new, chosen)

    def _way(self, tokenizer: Any, wish: dict[str, Any]) -> tuple[AnyTokenizer, Talk, Wish]:
        """The tokenizer itself (also out of transformers'), its model's way, and the wish."""
        found = getattr(tokenizer, "chatglm", tokenizer)
        config = self._glm().config
        assert getattr(found, "family", "") == config.family, "pass this model's own tokenizer"
        talk = talk_of(found, config.context_length)
        return found, talk, Wish(**{**talk.defaults, **wish})

    def _new_ids(self, ids: list[int], wish: Wish, limit: int | None = None) -> Iterator[int]:
        """At most `limit` ids after `ids`, as many as max_length leaves room for where that is None."""
        decoder, ends = self._decoder(), ends_of(self._glm().config)
        room = max(wish.max_length - len(ids), 1)  # one, as the published code gives it
        sampler = wish.sampler(decoder.device)
        most = room if limit is None else limit
        return generate_ids(decoder, ids, sampler, most, ends, cancelled=lambda: False)


class ChatGLM(Chatting):
    """A ChatGLM-6B, ChatGLM2-6B or ChatGLM3-6B and its tokenizer.

    tokenizer: text.chatglms.AnyTokenizer. model: the torch module. family: "chatglm", "chatglm2", "chatglm3".
    device_map: where each part of it lives. ChatGLM2 and 3 keep the keys of one conversation, so that the
    next round reads only what is new: call forget() after changing weights, or to give that memory back.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: AnyTokenizer,
        extras: Extras | None = None,
        step: Step | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._extras = extras or Extras(model)
        self._step = step
        self._kept: Decoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        bits: int | None = None,
        family: str = "",
        prefix: Folder = None,
        adapter: Folder = None,
        use_quantization_cache: bool = False,
    ) -> ChatGLM:
        """Open a published folder (FP16, INT8, INT4) of any of the three; `.family` tells which it is.

        device: "auto", "cpu", "cuda", "cuda:N", "mps", or "mixed" (card and CPU share the layers).
        dtype: what is computed in; None is float32 on a CPU, float16 on a card. On a CPU float32 is exact.
        bits: 4 or 8 quantises a float16 folder while loading. family: "chatglm2" or "chatglm3" where the
        folder's files fit both. prefix, adapter: see use_prefix and use_adapter; with `bits` an adapter is
        added to the weights before they are quantised, and stays in them. use_quantization_cache: see
        glmui.quantize. Raises ModelError, InvalidInput.
        """
        config = read_config(folder, family)
        tokenizer = open_tokenizer(Path(folder), config.family, config.vocab_size)
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        merged = adapter if bits and not config.quantization_bit else None
        spec = EngineSpec(
            "",
            str(folder),
            device,
            quantize=f"int{bits}" if bits else "none",
            cpu_precision="exact",
            prefix=str(prefix or ""),
            adapter=str(adapter or "") if merged is None else "",
        )
        where = placement(spec, config, wanted)
        change = _merging(merged, config) if merged else None
        model = load_model(folder, where.place, bits or 0, family=family, change=change)
        if use_quantization_cache:
            widen_whole(model)
        found = cards.open_cards(() if where.dtype == torch.float32 else where.layers, kernel_folder())
        cards.settle(model, found)
        if (where.dtype == torch.float32 or where.device == "mixed") and (bits or config.quantization_bit):
            with_kernels(model, where.device, torch.get_num_threads(), "exact")
        lm = cls(model, tokenizer, Extras(model, Path(folder), merged), cards.step_of(model, found))
        lm._extras.use(prefix, adapter)
        return lm

    @property
    def device_map(self) -> Mapping[str, str]:
        return device_map(self.model)

    @property
    def family(self) -> str:
        return self.model.config.family

    def use_prefix(self, folder: Folder) -> None:
        """Answer with the P-Tuning v2 prefix in `folder` from now on, None for none. The base stays loaded,
        and prefixes once read are kept. Raises ModelError."""
        if self._extras.use_prefix(folder):
            self.forget()

    def use_adapter(self, folder: Folder) -> None:
        """Answer with the LoRA adapter in `folder` (as PEFT saves it) from now on, None for none. The base
        stays loaded. Raises ModelError; InvalidInput where one is in the quantised weights for good."""
        if self._extras.use_adapter(folder):
            self.forget()

    def forget(self) -> None:
        """Let go of what is kept between rounds."""
        self._kept = None

    def _glm(self) -> AnyModel:
        return self.model

    def _decoder(self) -> Decoder:
        if isinstance(self.model, ChatGLMModel):  # reads every prompt anew
            return decoder_of(self.model, step=self._step)
        self._kept = self._kept or decoder_of(self.model, step=self._step)
        return self._kept

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [vocab], float32 on the CPU, of the id that follows `ids` (with [gMASK] and <sop>)."""
        return self._decoder().prefill(list(ids), lambda part: None).float().cpu()

    def generate(
        self, ids: Sequence[int], max_new_tokens: int = 32, do_sample: bool = False, **wish: Any
    ) -> list[int]:
        """At most max_new_tokens new ids after `ids`; an id that ends replies is the last."""
        chosen = Wish(do_sample=do_sample, **wish)
        return list(self._new_ids(list(ids), chosen, max_new_tokens))


def _merging(adapter: Path | str, config: AnyConfig) -> Callable[[str, nn.Module], None]:
    """See load_model's `change`. Raises ModelError."""
    return partial(merge, read_adapter(Path(adapter).expanduser(), empty_model(config)))


def ends_of(config: AnyConfig) -> frozenset[int]:
    """Ids that end a reply."""
    return stops(config.family) | {config.eos_token_id}


@torch.inference_mode()
def generate_batch(model: AnyModel, asked: Sequence[list[int]], wish: Wish) -> list[list[int]]:
    """New ids for each prompt, all rows at once, padded on the left; a row ends at max_length or before, at
    an id that ends replies.

    A prompt of max_length or more still gets one id, as the published code gives it.
    """
    rows, pads = model.pad_left(asked)
    device, ends = model.device, ends_of(model.config)
    rows = rows.to(device)
    layout = model.layout(rows, pads)
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
            if drawn[row] in ends or len(new[row]) == limits[row]:
                going.discard(row)
        following = [t if row in going else model.config.pad_token_id for row, t in enumerate(drawn)]
        rows = torch.tensor(following, device=device)[:, None]
    return new
