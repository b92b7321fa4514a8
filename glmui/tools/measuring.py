"""Figures out of measuring processes: each holds one model, and gives all of its memory back by ending.

Needs no settings, so that `benchmarks/card.py` can use it where little is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from glmui.bench import measure
from glmui.bench.probe import ReadProbe
from glmui.engine.own_process import messages
from glmui.engine.wire import Wire, info_from
from glmui.errors import InvalidInput
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
        if not everything:
            check(spec, results)
    return results


def check(spec: EngineSpec, results: Results) -> None:
    """Notice what was wished for and has no meaning here.

    Raises InvalidInput("bench_cap_without_card"): figures under a cap that nothing keeps to would mislead.
    """
    info = results.info
    if spec.vram_cap and not (info.cards and info.family == "chatglm"):
        raise InvalidInput("bench_cap_without_card", device=info.device)
    if spec.layers_on_gpu is not None and (spec.device != "mixed" or info.family != "chatglm"):
        results.layers_ignored = spec.layers_on_gpu


def _listen(spec: EngineSpec, everything: bool, results: Results, show: Show) -> None:
    with closing(_Side(results, show)) as side:
        for wire, message in messages(measure.run, spec, everything, died="bench_died"):
            side.take(wire, message)


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
            results.vram_weights, results.vram_cache = message["weights"], message["cache"]
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
