"""Measuring how fast a model runs on this computer. docs/bench.md tells what each figure means."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmui import i18n
from glmui.engine import measure, random_model
from glmui.engine.probe import ReadProbe
from glmui.engine.wire import Wire, error_from, info_from
from glmui.errors import EngineError
from glmui.settings import Settings, make_data_folder, spec_of
from glmui.tools.bench_results import Results, missing_lines, table
from glmui.tools.chat import Terminal, find_model
from glmui.types import EngineSpec

_PREFIX = "bench-"  # of folders in the data folder that are gone in the end


@dataclass(frozen=True)
class Wish:
    """What the command line asked for. random: a size of random_model.SIZES in place of a model, or ""."""

    model: str
    random: str = ""
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str) -> int:
    """Measure, then print a table or one JSON object; the exit code."""
    make_data_folder(settings.data_dir)
    terminal = Terminal(language)

    def say(key: str, **values: Any) -> str:
        return i18n.text(language, f"cli.{key}", **values)

    def note(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    with (
        _model(wish, settings.data_dir, terminal, lambda: note(say("bench.writing"))) as folder,
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=settings.data_dir) as packed_dir,
    ):
        # In a folder of its own, so that the first load is a first one and the second finds what it left.
        spec = replace(spec_of(settings, wish.random or wish.model, folder), packed_dir=packed_dir)
        results = take(spec, lambda key, **values: note(say(key, **values)))
    if wish.as_json:
        terminal.write(json.dumps(results.as_json()) + "\n")
        for line in missing_lines(results, say):
            print(line, file=sys.stderr)
    else:
        terminal.write("\n".join(table(results, say)) + "\n")
    return 0


@contextmanager
def _model(wish: Wish, data_dir: Path, terminal: Terminal, on_write: Callable[[], None]) -> Iterator[Path]:
    """The model's folder; one of random weights is removed in the end."""
    if not wish.random:
        yield find_model(wish.model, data_dir, terminal.show)
        return
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=data_dir) as folder:
        on_write()
        random_model.write(Path(folder), wish.random)
        yield Path(folder)


def take(spec: EngineSpec, show: Callable[..., None]) -> Results:
    """All figures. The first process only loads, so that the second finds what a first load leaves behind.

    show: told what happens, (key without "cli.", **values). Raises GlmuiError.
    """
    results = Results()
    for everything in (False, True):
        show("bench.loading")
        _listen(spec, everything, results, show)
    return results


def _listen(spec: EngineSpec, everything: bool, results: Results, show: Callable[..., None]) -> None:
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

    def __init__(self, results: Results, show: Callable[..., None]) -> None:
        self._results, self._show = results, show
        self._probe: ReadProbe | None = None

    def take(self, wire: Wire, message: dict[str, Any]) -> None:
        """Keep one message, and answer it where it is a question."""
        kind, results = message["kind"], self._results
        if kind == "loaded":
            results.info = info_from(message["info"])
            results.load_s.append(message["seconds"])
        elif kind == "doing":
            self._show(f"bench.rows.{message['name']}", n=message["key"])
        elif kind == "figure":
            self._keep(message["name"], message["key"], message["value"], message.get("why", ""))
        elif kind == "bytes":
            results.weight_bytes, results.cache_bytes = message["weights"], message["cache"]
        elif kind == "probe":
            self._probe = self._probe or ReadProbe(message["threads"])
            results.limits.append(self._probe.measure())
            wire.send("probed")
        else:
            results.peak_rss = max(results.peak_rss, message["peak_rss"])

    def _keep(self, name: str, key: str, value: float | None, why: str) -> None:
        self._results.tok_s[name][key] = value
        if why:
            self._results.missing.append((name, key, why))

    def close(self) -> None:
        if self._probe:
            self._probe.close()
