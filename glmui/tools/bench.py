"""Measuring how fast a model runs on this computer. docs/bench.md tells what each figure means."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from glmui.bench import random_model
from glmui.errors import InvalidInput
from glmui.memory.plan_request import GIB
from glmui.settings import Settings, make_data_folder, spec_of
from glmui.tools.bench_results import missing_lines, table
from glmui.tools.chat import Terminal, find_model
from glmui.tools.measuring import take

_LEAST_GIB, _MOST_GIB = 0.1, 65536
_PREFIX = "bench-"  # of folders in the data folder that are gone in the end


@dataclass(frozen=True)
class Wish:
    """What the command line asked for.

    random: a size of random_model.SIZES in place of a model, or "". vram_cap: GiB of a card to go by, as if
    it had no more; None for what it has.
    """

    model: str
    random: str = ""
    vram_cap: float | None = None
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str) -> int:
    """Measure, then print a table or one JSON object; the exit code."""
    cap = _bytes(wish.vram_cap)
    make_data_folder(settings.data_dir)
    terminal = Terminal(language)
    with (
        _model(wish, settings.data_dir, terminal) as folder,
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=settings.data_dir) as packed_dir,
    ):
        # In a folder of its own, so that the first load is a first one and the second finds what it left.
        spec = spec_of(settings, wish.random or wish.model, folder)
        spec = replace(spec, packed_dir=packed_dir, vram_cap=cap)
        results = take(spec, terminal.note)
    if wish.as_json:
        terminal.write(json.dumps(results.as_json()) + "\n")
        for line in missing_lines(results, terminal.words):
            print(line, file=sys.stderr)
    else:
        terminal.write("\n".join(table(results, terminal.words)) + "\n")
    return 0


def _bytes(cap: float | None) -> int:
    if cap is not None and not _LEAST_GIB <= cap <= _MOST_GIB:  # NaN is neither
        raise InvalidInput("out_of_bounds", name="--vram-cap", value=cap, low=_LEAST_GIB, high=_MOST_GIB)
    return int((cap or 0) * GIB)


@contextmanager
def _model(wish: Wish, data_dir: Path, terminal: Terminal) -> Iterator[Path]:
    """The model's folder; one of random weights is removed in the end."""
    if not wish.random:
        yield find_model(wish.model, data_dir, terminal.show)
        return
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=data_dir) as folder:
        terminal.note("bench.writing")
        random_model.write(Path(folder), wish.random)
        yield Path(folder)
