"""What the suite found, as JSON and as a table: a column for each form of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glmui.errors import EngineError
from glmui.tools.aligned import columns_of, padded
from glmui.types import EngineInfo

Say = Callable[..., str]  # a text by its key, without "cli.", its values by name

_FLAT_FROM = 5  # rounds until a cache has the size that it keeps
_FLAT = 0.03, 64e6  # memory is flat when it grows by less than this part, or by fewer bytes

# (name, unit): s and GB with two digits, % of one, "" as it is
ROWS = (
    ("load", "s"),
    ("load_again", "s"),
    ("memory", "GB"),
    ("own_memory", "GB"),
    ("short_first", "s"),
    ("short", "s"),
    ("long", "s"),
    ("long_speed", "tok/s"),
    ("rounds", ""),
    ("top1", "%"),
    ("kl", "nat"),
)


@dataclass
class Column:
    """One form of the model. quantize: as EngineSpec has it. error: why it could not be measured."""

    quantize: str
    info: EngineInfo = field(default_factory=EngineInfo)
    values: dict[str, Any] = field(default_factory=dict)
    error: EngineError | None = None

    @property
    def name(self) -> str:
        """How the weights are kept: int4, int8, float32 …"""
        return self.info.dtype or ("float16" if self.quantize == "none" else self.quantize)

    @property
    def memory_is_flat(self) -> bool | None:
        """Whether the process's own memory stayed as it was over the rounds."""
        own = self.values.get("round_private")
        if not own:
            return None
        before, after = max(own[:_FLAT_FROM]), own[-1]
        return bool(after - before < max(_FLAT[0] * before, _FLAT[1]))

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of ROWS that are numbers, by name, in the rows' units."""
        v = self.values
        return {
            "load": v.get("load_s"),
            "load_again": v.get("load_again_s"),
            "memory": _gb(v.get("rss")),
            "own_memory": _gb(v.get("private")),
            "short_first": v.get("short_first_s"),
            "short": v.get("short_s"),
            "long": v.get("long_s"),
            "long_speed": v.get("long_tok_s"),
            "top1": v.get("top1"),
            "kl": v.get("kl"),
        }


def _gb(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def as_json(columns: list[Column]) -> dict[str, Any]:
    """{"columns": [...]}: seconds, GB and parts; docs/bench.md tells each key."""
    return {"columns": [_column_json(column) for column in columns]}


def _column_json(column: Column) -> dict[str, Any]:
    v, info = column.values, column.info
    figures = {name: None if value is None else round(value, 4) for name, value in column.figures.items()}
    return {
        "model": info.model,
        "dtype": column.name,
        "device": info.device,
        "threads": info.threads,
        "kernel": info.kernel or "torch",
        "cpu_precision": info.cpu_precision or "exact",
        "error": column.error.code if column.error else None,
        **figures,
        "peak_rss_gb": _gb(v.get("peak_rss")),
        "short_tokens": v.get("short_tokens"),
        "long_tokens": v.get("long_tokens"),
        "rounds": v.get("rounds"),
        "failures": v.get("failures"),
        "memory_is_flat": column.memory_is_flat,
        "round_private_gb": [round(own / 1e9, 4) for own in v.get("round_private", [])],
        "compared_tokens": v.get("tokens"),
    }


def table(columns: list[Column], say: Say) -> list[str]:
    """The figures for a reader, a row for each."""
    head = ["", *(column.name for column in columns)]
    body = [
        [say(f"bench.suite.rows.{name}"), *(shown(column, name, unit, say) for column in columns)]
        for name, unit in ROWS
    ]
    rows = [head, *body]
    widths = [2 + max(columns_of(cell) for cell in cells) for cells in zip(*rows, strict=True)]
    lines = ["".join(padded(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [title(columns, say), "", *(line.rstrip() for line in lines), *notes(columns, say)]


def title(columns: list[Column], say: Say) -> str:
    """Which model, and on what."""
    info = next((column.info for column in columns if column.values), columns[0].info)
    return say("bench.suite.title", model=info.model, device=info.device, threads=info.threads)


def notes(columns: list[Column], say: Say) -> list[str]:
    """What the figures mean, and what is missing, and why."""
    lines = ["", say("bench.suite.meaning")]
    if not any(column.values.get("top1") is not None for column in columns):
        lines.append(say("bench.suite.no_baseline"))
    language = say("bench.suite.language")
    return lines + [f"{column.name}: {column.error.message(language)}" for column in columns if column.error]


def shown(column: Column, name: str, unit: str, say: Say) -> str:
    """A cell."""
    if name == "rounds":
        return _conversation(column, say)
    value = column.figures[name]
    if value is None:
        return "-"
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:.4f}" if name == "kl" else f"{value:.2f} {unit}"


def _conversation(column: Column, say: Say) -> str:
    v = column.values
    if "rounds" not in v:
        return "-"
    if v["failures"]:
        return say("bench.suite.failed", failures=v["failures"], rounds=v["rounds"])
    return say("bench.suite.steady" if column.memory_is_flat else "bench.suite.grows", rounds=v["rounds"])
