"""`glmui bench --suite appendix`: the table of a model's performance for this computer; see docs/bench.md."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmui.bench import measure, suite
from glmui.engine.families import family_of
from glmui.engine.own_process import messages
from glmui.engine.wire import info_from
from glmui.errors import EngineError, InvalidInput, StoreError
from glmui.glm.config import read_config
from glmui.hub import installed
from glmui.settings import Settings, make_data_folder, spec_of
from glmui.tools.chat import Terminal, find_model
from glmui.tools.measuring import Show
from glmui.tools.suite_page import page
from glmui.tools.suite_results import Column, as_json, table
from glmui.types import EngineSpec


@dataclass(frozen=True)
class Wish:
    """What the command line asked for, or "". baseline: a model to compare with. html: a file to write."""

    model: str
    baseline: str = ""
    html: str = ""
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str) -> int:
    """Measure, then print a table or one JSON object, and write a page where one is wished for."""
    make_data_folder(settings.data_dir)
    terminal = Terminal(language)
    folder = find_model(wish.model, settings.data_dir, terminal.show)
    if family_of(folder) == "echo":
        raise InvalidInput("bench_no_model")
    baseline = str(installed.resolve(wish.baseline, settings.data_dir)) if wish.baseline else ""
    columns = take(spec_of(settings, wish.model, folder), baseline, settings.data_dir, terminal.note)
    if wish.html:
        _write(Path(wish.html).expanduser(), page(columns, terminal.words, language))
    lines = [json.dumps(as_json(columns))] if wish.as_json else table(columns, terminal.words)
    terminal.write("\n".join(lines) + "\n")
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError("report_unwritable", file=file, detail=error.strerror or error) from error


def take(spec: EngineSpec, baseline: str, data_dir: Path, show: Show) -> list[Column]:
    """A column for the model, and where it is a float ChatGLM, for it in 8 and in 4 bits; such a model is its
    own baseline. Raises GlmuiError when no column could be measured."""
    is_float = family_of(spec.folder) == "chatglm" and not _bits(spec)
    forms = ["none", "int8", "int4"] if is_float and spec.quantize == "none" else [spec.quantize]
    baseline = baseline or (spec.folder if is_float else "")
    columns = [_column(replace(spec, quantize=form), baseline, data_dir, show) for form in forms]
    if not any(column.values for column in columns) and (error := columns[0].error):
        raise error
    return columns


def _bits(spec: EngineSpec) -> int:
    return read_config(spec.folder, spec.chatglm_family).quantization_bit


def _column(spec: EngineSpec, baseline: str, data_dir: Path, show: Show) -> Column:
    """Two processes: the first only loads, so that the second finds what a first load leaves behind."""
    column = Column(spec.quantize)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=data_dir) as packed_dir:
            spec = replace(spec, packed_dir=packed_dir)
            _listen(column, "load_s", show, measure.run, spec, False)
            _listen(column, "load_again_s", show, suite.run, spec, baseline)
    except EngineError as error:  # no room in memory for this form, or the system ended it
        return Column(spec.quantize, column.info, error=error)
    return column


def _listen(column: Column, load: str, show: Show, entry: Callable[..., None], *arguments: Any) -> None:
    show("bench.loading")
    for _, message in messages(entry, *arguments, died="bench_died"):
        if message["kind"] == "loaded":
            column.info = info_from(message["info"])
            column.values[load] = message["seconds"]
        elif message["kind"] == "doing":
            show(f"bench.suite.doing.{message['name']}")
        elif message["kind"] == "value":
            column.values |= message["values"]
        elif message["kind"] == "done":
            column.values["peak_rss"] = message["peak_rss"]
