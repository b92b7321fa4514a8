"""What `glmui quantize` is asked to do. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """source, target: folders. bits: 4 or 8 for every layer, unless target_gb (10^9 bytes) chooses them.

    group_size: columns that share a scale, None for whole rows. embeddings: quantise the word embeddings too.
    report: compare the result with its source. device: what computes that; threads: None for all cores.
    """

    source: str
    target: str
    bits: int = 4
    group_size: int | None = None
    embeddings: bool = False
    target_gb: float | None = None
    report: bool = False
    device: str = "auto"
    threads: int | None = None
