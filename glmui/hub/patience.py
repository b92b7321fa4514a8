"""How a download behaves: plain numbers, so that tests need not wait."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds and bytes.

    tries, give_up_seconds: so many tries in a row, or so long, without a new byte: a source is given up.
    stall_seconds: without an answer, or with less than stall_bytes in all, a connection is given up.
    piece_bytes: the most that one request asks for.
    save_bytes, save_seconds: what is written to the disk for good at a time; a kill costs that, and what the
    system had received and not handed over yet.
    """

    connections: int = 4
    tries: int = 8
    give_up_seconds: float = 90.0
    first_wait: float = 0.5
    longest_wait: float = 30.0
    stall_seconds: float = 30.0
    stall_bytes: int = 16_384
    piece_bytes: int = 32 << 20
    save_bytes: int = 3 << 19
    save_seconds: float = 5.0

    def pause(self, vain: int) -> float:
        """Seconds to wait after so many vain tries: doubling, and uneven, lest all come back at once."""
        longest = min(self.first_wait * 2.0 ** (vain - 1), self.longest_wait)
        return longest * random.uniform(0.5, 1.0)


PATIENT = Patience()
