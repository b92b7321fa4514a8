"""Measuring a model, in a process of its own: loads it as the engine process does, then times it.

Says through the pipe: loaded, doing, figure, bytes, probe, limit, vram, done, failed. Hears an answer to each
probe: the read limit of a CPU's memory is taken by the other side meanwhile, for its buffer must not count as
the model's memory.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from glmui.bench.figures import Figures, NotMeasured, Subject
from glmui.engine.device import resolve_device
from glmui.engine.families import family_of, open_family
from glmui.engine.own_process import begin
from glmui.engine.wire import Wire
from glmui.engine.worker import explain
from glmui.errors import EngineError, GlmuiError, InvalidInput, to_values
from glmui.glm.config import read_config
from glmui.types import ChatEngine, EngineSpec

_BESIDES = 1_500_000_000  # bytes for the cache, the read probe and torch itself


def run(connection: Connection, spec: EngineSpec, everything: bool) -> None:
    """Entry of the process: load the model, and with `everything` measure it too."""
    serve(connection, spec, _measure if everything else None)


def serve(
    connection: Connection, spec: EngineSpec, work: Callable[[ChatEngine, Wire], None] | None = None
) -> None:
    """Load the model, do `work` with it, and tell of both or of what went wrong."""
    begin()
    wire, engine = Wire(connection), None
    try:
        engine = load(spec, wire)
        if work:
            work(engine, wire)
        wire.send("done", peak_rss=peak_rss())
    except (BrokenPipeError, EOFError):
        return  # nobody listens any more
    except BaseException as error:
        wire.send("failed", error=to_values(_told(error, engine)))


def _told(error: BaseException, engine: ChatEngine | None) -> GlmuiError:
    """The error in words for one who measures, and waits for no reply. engine: None while it still loaded."""
    told = explain(error)
    if engine is None or told.code != "out_of_memory":
        return told
    return EngineError("bench_ran_out", device=told.values["device"])


def load(spec: EngineSpec, wire: Wire) -> ChatEngine:
    """The model, once it is known to fit into memory. Importing torch is not counted as loading.

    Raises InvalidInput("bench_no_model"), EngineError("bench_memory"), and whatever opening raises.
    """
    family = family_of(spec.folder)
    if family == "echo":
        raise InvalidInput("bench_no_model")
    importlib.import_module(f"glmui.engine.{family}")  # torch too, before the clock starts
    check_memory(spec, psutil.virtual_memory().available)
    began = time.perf_counter()
    engine = open_family(spec, lambda progress: None)
    wire.send("loaded", seconds=time.perf_counter() - began, info=asdict(engine.info()))
    return engine


def check_memory(spec: EngineSpec, free: int) -> None:
    """Raises EngineError("bench_memory") where a CPU's weights will not fit into `free` bytes."""
    if spec.device == "mixed" or resolve_device(spec.device) != "cpu":
        return
    files = [file for file in Path(spec.folder).iterdir() if file.suffix in (".safetensors", ".bin")]
    need = sum(file.stat().st_size for file in files) * _growth(spec) + _BESIDES
    if need > free:
        values = {"need": f"{need / 1e9:.1f}", "free": f"{free / 1e9:.1f}"}
        raise EngineError("bench_memory", model=spec.model, **values)


def _growth(spec: EngineSpec) -> int:
    """How many times its files a model takes: float16 ChatGLM is computed in float32, others adapt."""
    if family_of(spec.folder) != "chatglm" or spec.quantize != "none":
        return 1
    return 1 if read_config(spec.folder, spec.chatglm_family).quantization_bit else 2


def _measure(engine: ChatEngine, wire: Wire) -> None:
    subject, info = subject_of(engine), engine.info()

    def probe() -> None:
        wire.send("probe", threads=info.threads)
        wire.receive()

    on_card = info.device.startswith("cuda")
    Figures(subject, info, wire.send, partial(_copy, info.device, wire) if on_card else probe).take()
    if cards := info.cards:
        _tell_of_vram(subject, cards, wire)


def _copy(device: str, wire: Wire) -> None:
    from glmui.bench.card_subject import copy_gb_s

    with contextlib.suppress(NotMeasured):
        wire.send("limit", gb_s=copy_gb_s(device))


def _tell_of_vram(subject: Any, cards: Sequence[str], wire: Wire) -> None:
    from glmui.bench.card_subject import cuda_context

    contexts = [cuda_context(card) for card in cards]
    known = [nbytes for nbytes in contexts if nbytes is not None]
    weights, cache = subject.vram_kept()
    context = sum(known) if len(known) == len(contexts) else None
    wire.send("vram", cuda_context=context, weights=weights, cache=cache)


def subject_of(engine: Any) -> Subject:
    """What is inside a loaded engine of the families chatglm and causal_lm."""
    from glmui.bench.card_subject import CardSubject, CausalCardSubject
    from glmui.bench.subjects import CausalSubject, GLMSubject

    decoder, info = engine.speaker.decoder, engine.info()
    if info.family != "chatglm":
        return CausalCardSubject(decoder) if info.cards else CausalSubject(decoder)
    return CardSubject(decoder) if info.cards else GLMSubject(decoder)


def memory() -> tuple[int, int]:
    """Bytes this process has in memory now: all, and what is its own (no mapped files)."""
    process = psutil.Process()
    if sys.platform == "linux":
        found = process.memory_info()
        return found.rss, found.rss - found.shared
    found = process.memory_full_info()
    return found.rss, found.uss


def peak_rss() -> int:
    """The most memory this process ever had, in bytes; mapped files count as far as they were read."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
