"""Measuring how fast a model runs on this computer. docs/bench.md tells what each figure means."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
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

    with _model(wish, settings.data_dir, terminal, lambda: note(say("bench.writing"))) as folder:
        spec = spec_of(settings, wish.random or wish.model, folder)
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
    with tempfile.TemporaryDirectory(prefix="bench-", dir=data_dir) as folder:
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
    """Start the measuring process, and take its messages until it is done."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=measure.run, args=(theirs, spec, everything), daemon=True)
    process.start()
    theirs.close()
    try:
        with closing(_Side(Wire(ours), results, show)) as side:
            while side.take_message():
                pass
    except (EOFError, OSError) as error:
        process.join(1)
        raise EngineError("bench_died", detail=process.exitcode) from error
    finally:
        process.kill()
        process.join()


class _Side:
    """This side of the pipe to one measuring process. The probe's buffer is here, outside of its memory."""

    def __init__(self, wire: Wire, results: Results, show: Callable[..., None]) -> None:
        self._wire, self._results, self._show = wire, results, show
        self._probe: ReadProbe | None = None

    def take_message(self) -> bool:
        """Take the next; False after the last. Raises EOFError, OSError, or what the process failed with."""
        message = self._wire.receive()
        kind, results = message.pop("kind"), self._results
        if kind == "failed":
            raise error_from(message["error"])
        if kind == "loaded":
            results.info = info_from(message["info"])
            results.load_s.append(message["seconds"])
        elif kind == "doing":
            self._show(f"bench.rows.{message['name']}", n=message["key"])
        elif kind == "figure":
            self._keep(**message)
        elif kind == "bytes":
            results.weight_bytes, results.cache_bytes = message["weights"], message["cache"]
        elif kind == "probe":
            self._probe = self._probe or ReadProbe(message["threads"])
            results.limits.append(self._probe.measure())
            self._wire.send("probed")
        else:
            results.peak_rss = max(results.peak_rss, message["peak_rss"])
        return bool(kind != "done")

    def _keep(self, name: str, key: str, value: float | None, why: str = "") -> None:
        self._results.tok_s[name][key] = value
        if why:
            self._results.missing.append((name, key, why))

    def close(self) -> None:
        self._wire.close()
        if self._probe:
            self._probe.close()
