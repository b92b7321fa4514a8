"""What `glmui quantize` did, as JSON and as tables. docs/quantize.md tells what each figure means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glmui.quantizing.job import QuantizeJob
from glmui.tools.aligned import aligned

Say = Callable[..., str]  # a text by its key, without "cli.", its values by name


@dataclass
class Results:
    """What came of the job. Sizes are in bytes.

    chosen: {"name", "bits", "size", "error"} of each layer whose bits were chosen. compared: {"name", "size"}
    and the fields of compare.Agreement, of the result and of what it could have been.
    """

    job: QuantizeJob
    size: int = 0
    source_size: int = 0
    seconds: float = 0.0
    chosen: list[dict[str, Any]] = field(default_factory=list)
    compared: list[dict[str, Any]] = field(default_factory=list)

    def take(self, kind: str, **values: Any) -> None:
        """Keep what the working process says; see quantizing.run."""
        if kind == "chosen":
            self.chosen.append(values)
        elif kind == "written":
            self.size, self.source_size = values["size"], values["source_size"]
        elif kind == "compared":
            self.compared.append(values)

    def as_json(self) -> dict[str, Any]:
        """The figures under the names docs/quantize.md tells."""
        job = self.job
        values: dict[str, Any] = {
            "source": job.source,
            "target": job.target,
            "bits": None if self.chosen else job.bits,
            "group_size": job.group_size,
            "quantization_embeddings": job.embeddings,
            "source_gb": self.source_size / 1e9,
            "size_gb": self.size / 1e9,
            "seconds": round(self.seconds, 1),
        }
        if self.chosen:
            values["layers"] = [
                {"name": c["name"], "bits": c["bits"], "mb": c["size"] / 1e6, "error": c["error"]}
                for c in self.chosen
            ]
        if self.compared:
            values["report"] = self._report()
        return values

    def _report(self) -> dict[str, Any]:
        first = self.compared[0]
        rows = [
            {
                "name": row["name"],
                "size_gb": row["size"] / 1e9,
                "kl": row["kl"],
                "top1": row["top1"],
                "perplexity": row["result_perplexity"],
            }
            for row in self.compared
        ]
        return {"tokens": first["tokens"], "source_perplexity": first["source_perplexity"], "rows": rows}


def table(results: Results, say: Say) -> list[str]:
    """What was written, and where it was asked for: the bits of each layer, and the comparison."""
    job = results.job
    sizes = {"size": _gb(results.size), "source_size": _gb(results.source_size)}
    lines = [say("quantize.written", target=job.target, seconds=f"{results.seconds:.0f}", **sizes)]
    if results.chosen:
        lines += ["", say("quantize.chosen", target=f"{job.target_gb:g}"), "", *_chosen(results, say)]
    if results.compared:
        tokens = results.compared[0]["tokens"]
        lines += [
            "",
            say("quantize.compared", tokens=tokens),
            "",
            *_compared(results, say),
            "",
            say("quantize.meaning"),
        ]
    return lines


def _chosen(results: Results, say: Say) -> list[str]:
    rows = [
        (c["name"], str(c["bits"]), f"{c['size'] / 1e6:.3g}", f"{c['error']:.2%}") for c in results.chosen
    ]
    return aligned([(say("quantize.layer"), say("quantize.bits"), "MB", say("quantize.error")), *rows])


def _compared(results: Results, say: Say) -> list[str]:
    head = ("", "GB", say("quantize.kl"), say("quantize.top1"), say("quantize.perplexity"))
    first = results.compared[0]
    source = (
        say("quantize.rows.source"),
        _gb(results.source_size),
        "",
        "",
        f"{first['source_perplexity']:.3g}",
    )
    rows = [
        (
            _label(row["name"], say),
            _gb(row["size"]),
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['result_perplexity']:.3g}",
        )
        for row in results.compared
    ]
    return aligned([head, source, *rows])


def _label(name: str, say: Say) -> str:
    kind, _, group_size = name.partition("-")
    return say("quantize.rows.groups", size=group_size) if group_size else say(f"quantize.rows.{kind}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.4f}"
