"""Figures out of measuring processes: each holds one model, and gives all of its memory back by ending.

Needs no settings, so that `benchmarks/card.py` can use it where little is installed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from glmui.bench import measure
from glmui.bench.probe import ReadProbe
from glmui.engine.wire import Wire, error_from, info_from
from glmui.errors import EngineError
from glmui.tools.bench_results import Results, label
from glmui.types import EngineSpec

Show = Callable[..., None]  # (key without "cli.", **values)


def take(spec: EngineSpec, show: Show) -> Results:
    """All figures. The first process only loads, so that the second finds what a first load leaves behind.

    show: told what happens, (key without "cli.", **values). Raises GlmuiError.
    """
    results = Results()
    for everything in (False, True):
        show("bench.loading")
        _listen(spec, everything, results, show)
    return results


def _listen(spec: EngineSpec, everything: bool, results: Results, show: Show) -> None:
    with closing(_Side(results, show)) as side:
        for wire, message in messages(measure.run, spec, everything):
            side.take(wire, message)


def messages(entry: Callable[..., None], *arguments: Any) -> Iterator[tuple[Wire, dict[str, Any]]]:
    """Start a measuring process, and give what it says until it is done, with the pipe for an answer.

    Raises EngineError("bench_died"), or what the process failed with.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=entry, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    wire = Wire(ours)
    try:
        message: dict[str, Any] = {"kind": ""}
        while message["kind"] != "done":
            message = wire.receive()
            if message["kind"] == "failed":
                raise error_from(message["error"])
            yield wire, message
    except (EOFError, OSError) as error:
        process.join(1)
        raise EngineError("bench_died", detail=process.exitcode) from error
    finally:
        wire.close()
        process.kill()
        process.join()


class _Side:
    """Keeps what one measuring process says. The probe's buffer is here, outside of that process's memory."""

    def __init__(self, results: Results, show: Show) -> None:
        self._results, self._show = results, show
        self._probe: ReadProbe | None = None

    def take(self, wire: Wire, message: dict[str, Any]) -> None:
        """Keep one message, and answer it where it is a question."""
        kind, results = message["kind"], self._results
        if kind == "loaded":
            results.info = info_from(message["info"])
            results.load_s.append(message["seconds"])
        elif kind == "doing":
            key, values = label(message["name"], message["key"])
            self._show(key, **values)
        elif kind == "figure":
            self._keep(message["name"], message["key"], message["value"], message.get("why", ""))
        elif kind == "bytes":
            results.weight_bytes, results.cache_bytes = message["weights"], message["cache"]
        elif kind == "limit":
            results.limits.append(message["gb_s"])
        elif kind == "vram":
            results.cuda_context = message["cuda_context"]
        elif kind == "probe":
            self._probe = self._probe or ReadProbe(message["threads"])
            results.limits.append(self._probe.measure())
            wire.send("probed")
        else:
            results.peak_rss = max(results.peak_rss, message["peak_rss"])

    def _keep(self, name: str, key: str, value: float | None, why: str) -> None:
        self._results.rows[name][key] = value
        if why:
            self._results.missing.append((name, key, why))

    def close(self) -> None:
        if self._probe:
            self._probe.close()
