"""What a bench found, as JSON and as a table. docs/bench.md tells what each figure means."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glmui.bench.figures import (
    ABOVE,
    BATCHES,
    CONTEXTS,
    PEAKS,
    PREFILL_PEAK,
    PROMPTS,
    PUBLISHED,
    has_limit,
)
from glmui.tools.aligned import columns_of, padded
from glmui.types import EngineInfo

KEYS = {"prefill_tok_s": PROMPTS, "decode_tok_s": CONTEXTS, "batch_tok_s": BATCHES}
VRAM = {"peak_vram_gb": PEAKS, ABOVE: (PREFILL_PEAK,)}
BESIDE = {"published_tok_s": tuple(PUBLISHED)}

Say = Callable[..., str]  # a text by its key, without "cli.", its values by name


@dataclass
class Results:
    """What came of a bench. rows: {"decode_tok_s": {"128": 2.5, …}, …}, None where not measured.

    cuda_context: bytes that CUDA itself takes of the cards, None where that is unknown. vram_weights,
    vram_cache: bytes of the weights, and of the whole KV cache, that are on cards. layers_ignored: a wish for
    so many layers on a card that had no meaning, None without one.
    """

    info: EngineInfo = field(default_factory=EngineInfo)
    load_s: list[float] = field(default_factory=list)
    rows: dict[str, dict[str, float | None]] = field(
        default_factory=lambda: {name: {} for name in (*KEYS, *VRAM, *BESIDE)}
    )
    missing: list[tuple[str, str, str]] = field(default_factory=list)  # (name, key, why)
    weight_bytes: int = 0
    cache_bytes: int = 0
    limits: list[float] = field(default_factory=list)  # GB/s, each the best of several reads
    peak_rss: int = 0
    cuda_context: int | None = None
    vram_weights: int = 0
    vram_cache: int = 0
    layers_ignored: int | None = None

    @property
    def keys(self) -> dict[str, tuple[Any, ...]]:
        """The figures that there are on such a device, and what each is taken for."""
        return {**KEYS, **(VRAM if self.info.cards else {}), **(BESIDE if self.on_card else {})}

    @property
    def on_card(self) -> bool:
        """Whether all of it is on one card."""
        return self.info.device.startswith("cuda")

    @property
    def bytes_per_token(self) -> int:
        """What decoding one token reads."""
        return self.weight_bytes + self.cache_bytes

    @property
    def read_limit(self) -> float | None:
        """GB/s: the median of what was found between the runs."""
        return statistics.median(self.limits) if self.limits else None

    def as_json(self) -> dict[str, Any]:
        """The figures under the names docs/bench.md tells."""
        decode = self.rows["decode_tok_s"].get(str(CONTEXTS[0]))
        return {
            "load_s": _rounded(self.load_s[0]),
            "load_again_s": _rounded(self.load_s[1]),
            **{name: {n: _rounded(value) for n, value in self.rows[name].items()} for name in self.keys},
            "peak_rss_gb": _rounded(self.peak_rss / 1e9),
            **(self._of_vram() if self.info.cards else {}),
            "copy_gb_s" if self.on_card else "read_limit_gb_s": _rounded(self.read_limit),
            "decode_of_limit": _rounded(of_limit(self.bytes_per_token, decode, self.read_limit)),
            "cpu_precision": self.info.cpu_precision or "exact",
            "kernel": self.info.kernel or "torch",
            "threads": self.info.threads,
        }

    def _of_vram(self) -> dict[str, float | None]:
        context = None if self.cuda_context is None else self.cuda_context / 1e9
        kept = {"weights_vram_gb": self.vram_weights / 1e9, "cache_vram_gb": self.vram_cache / 1e9}
        return {name: _rounded(value) for name, value in {**kept, "cuda_context_gb": context}.items()}


def of_limit(bytes_per_token: int, tokens_per_second: float | None, limit: float | None) -> float | None:
    """The part of the read limit (GB/s) that decoding reaches: 1.0 reads as fast as the memory delivers."""
    if tokens_per_second is None or limit is None:
        return None
    return bytes_per_token * tokens_per_second / 1e9 / limit


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def table(results: Results, say: Say) -> list[str]:
    """The figures for a reader: what, how much, in which unit, and what the last of them means."""
    figures, info = results.as_json(), results.info
    about = {"model": info.model, "dtype": info.dtype, "device": info.device, "threads": info.threads}
    title = say("bench.title", precision=figures["cpu_precision"], kernel=figures["kernel"], **about)
    rows = [(say(f"bench.rows.{name}"), figures[f"{name}_s"], "s") for name in ("load", "load_again")]
    for name in results.keys:
        unit = "GB" if name in VRAM else "tok/s"
        rows += [(_label(name, n, say), value, unit) for n, value in figures[name].items()]
    rows.append((say("bench.rows.peak_rss"), figures["peak_rss_gb"], "GB"))
    if results.info.cards:
        named = ("weights_vram", "cache_vram", "cuda_context")
        rows += [(say(f"bench.rows.{name}"), figures[f"{name}_gb"], "GB") for name in named]
    if results.on_card:
        rows.append((say("bench.rows.copy"), figures["copy_gb_s"], "GB/s"))
    else:
        rows.append((say("bench.rows.read_limit"), figures["read_limit_gb_s"], "GB/s"))
    rows.append((say("bench.rows.of_limit"), figures["decode_of_limit"], "%"))
    width = 2 + max(columns_of(label) for label, _, _ in rows)
    lines = [padded(label, width) + _shown(value, unit) for label, value, unit in rows]
    if figures["decode_of_limit"] is not None:
        meaning = "bench.meaning_card" if results.on_card else "bench.meaning"
        lines += ["", say(meaning, read=f"{results.bytes_per_token / 1e9:.2f}")]
    return [title, "", *lines, *missing_lines(results, say)]


def missing_lines(results: Results, say: Say) -> list[str]:
    """Which figures were not taken, and why; and a wish that counted for nothing."""
    missing = [(_label(name, key, say), why) for name, key, why in results.missing]
    if not has_limit(results.info.device):
        missing.append((say("bench.rows.of_limit"), "card"))
    lines = [say("bench.missing", what=what, why=say(f"bench.why.{why}")) for what, why in missing]
    if results.layers_ignored is not None:
        lines.append(say("bench.layers_ignored", layers=results.layers_ignored))
    return lines


def label(name: str, key: Any) -> tuple[str, dict[str, Any]]:
    """A figure's name for readers: the text's key and its values."""
    if name == "published_tok_s":
        return f"bench.rows.published_{key}", {"n": PUBLISHED[key]}
    return f"bench.rows.{name}", {"n": key}


def _label(name: str, key: Any, say: Say) -> str:
    text, values = label(name, key)
    return say(text, **values)


def _shown(value: float | None, unit: str) -> str:
    """A number of about three digits, its unit behind it."""
    if value is None:
        return f"{'-':>8}"
    if unit == "%":
        return f"{value:>8.0%}"
    return f"{value:>8.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
