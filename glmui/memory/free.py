"""What memory is free, or would be if our own engine process were gone."""

from __future__ import annotations

from glmui.meter import Card, Reading

# What a Windows desktop holds of a card, where the driver does not tell whose memory is whose.
_DESKTOP = 1_000_000_000


def free_ram(reading: Reading, held: bool) -> int | None:
    """Bytes of RAM; None where they cannot be read.

    held: whether what the engine of the reading holds counts. That is its own memory alone: pages of files
    that it has mapped count as free already.
    """
    if reading.ram_total is None or reading.ram_used is None:
        return None
    free = reading.ram_total - reading.ram_used + (reading.engine_private or 0) * held
    return min(free, reading.ram_total)


def free_on(card: Card, held: bool) -> int:
    """Bytes of a card, 0 where they cannot be read."""
    if card.total is None or card.used is None:
        return 0
    own = card.own if card.own is not None else max(0, card.used - _DESKTOP)
    return min(card.total, card.total - card.used + own * held)
