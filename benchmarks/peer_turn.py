"""One turn of one engine, in a process of its own: prefill, decode, and the read limit between its runs.

    python peer_turn.py ENGINE MODEL THREADS PROMPTS…        (peers.py starts it)

Prints one JSON object: prefill_N and decode (at context 128) in tokens a second, cache (bytes of it that a
token reads), limit (GB/s).
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from glmui.bench.figures import Subject, decode_rate, median_of, prefill_rate
from glmui.bench.probe import ReadProbe

CONTEXT = 128
ROOM = 1024  # tokens of context that the peers prepare for


def main() -> None:
    engine, model, threads, *prompts = sys.argv[1:]
    subject = ENGINES[engine](model, int(threads))
    probe, limits = ReadProbe(int(threads)), list[float]()
    rows = subject.at(CONTEXT, 1)
    subject.prefill(32)  # brings the weights into memory
    decode = decode_rate(rows, lambda: limits.append(probe.measure()))
    rate = partial(prefill_rate, subject)
    prefill = {f"prefill_{n}": median_of(partial(rate, int(n)), seconds=20) for n in prompts}
    found = {"decode": decode, "cache": rows.cache_bytes(), "limit": statistics.median(limits)}
    print(json.dumps({**prefill, **found}))


def random_ids(count: int, below: int = 100_000) -> list[int]:
    return random.choices(range(300, below), k=count)


class Peer:
    """An engine that keeps one sequence: `advance` takes ids that come after the first `kept` ones."""

    weight_bytes = 0  # peers.py knows it from the file
    reads_context = True

    def __init__(self, model: str, threads: int) -> None:
        self.newest = 1000

    def advance(self, ids: list[int], kept: int) -> None:
        raise NotImplementedError

    def prefill(self, tokens: int) -> None:
        self.advance(random_ids(tokens), 0)

    def at(self, context: int, rows: int) -> PeerRow:
        return PeerRow(self, context)

    def cache_bytes(self, context: int) -> int:
        """Both peers keep keys and values in float16: 28 layers, 4096 wide."""
        return context * 28 * 2 * 4096 * 2


class PeerRow:
    def __init__(self, peer: Peer, context: int) -> None:
        self._peer, self._prompt = peer, random_ids(context)
        self._ids: list[int] = []

    def reset(self) -> None:
        if not self._ids:
            self._peer.advance(self._prompt, 0)
        self._ids = list(self._prompt)

    def step(self) -> None:
        self._ids.append(self._peer.newest)
        self._peer.advance(self._ids, len(self._ids) - 1)

    def cache_bytes(self) -> int:
        return self._peer.cache_bytes(len(self._prompt))


class ChatglmCpp(Peer):
    """chatglm.cpp. It takes its threads by itself: the physical cores."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__(model, threads)
        import chatglm_cpp
        from chatglm_cpp._C import GenerationConfig

        self._pipeline = chatglm_cpp.Pipeline(model, max_length=ROOM)
        self._config = GenerationConfig(max_length=ROOM, max_context_length=ROOM, do_sample=False)
        self._context = 0

    def advance(self, ids: list[int], kept: int) -> None:
        if not kept:
            self._context = len(ids)
        take = self._pipeline.model.generate_next_token
        self.newest = take(ids, None, self._config, kept, self._context)


class LlamaCpp(Peer):
    def __init__(self, model: str, threads: int) -> None:
        super().__init__(model, threads)
        from llama_cpp import Llama

        both = {"n_threads": threads, "n_threads_batch": threads}
        self._llama = Llama(model, n_ctx=ROOM, n_batch=512, verbose=False, **both)

    def advance(self, ids: list[int], kept: int) -> None:
        self._llama.n_tokens = kept  # what lies behind is forgotten
        self._llama.eval(ids[kept:])


def open_glmui(model: str, threads: int, **settings: Any) -> Subject:
    """Ourselves, opened as the app opens a model. settings: others than the app's own."""
    from glmui.bench.measure import subject_of
    from glmui.engine.families import open_family
    from glmui.types import EngineSpec

    spec = EngineSpec("glmui", model, "cpu", threads, **settings)
    return subject_of(open_family(spec, lambda progress: None))


def open_published(model: str, threads: int) -> Subject:
    """The published way: each matrix is widened to float32 in C, then multiplied."""
    from published_way import open_model

    return open_model(model, threads)


ENGINES: dict[str, Callable[[str, int], Any]] = {
    "glmui": open_glmui,
    "glmui, fast": partial(open_glmui, cpu_precision="fast"),
    "glmui, INT8 head": partial(open_glmui, head_bits=8),
    "llama.cpp": LlamaCpp,
    "chatglm.cpp": ChatglmCpp,
    "published": open_published,
}

if __name__ == "__main__":
    main()
