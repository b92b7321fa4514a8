"""A card for what asks torch about one, where torch has none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from glmui.quant.kernels.cuda.driver import Card


class FakeCard(Card):
    """See driver.Card. Kernels on it take tensors in memory."""

    def __init__(self, capability: tuple[int, int] = (8, 6)) -> None:
        self.number, self.device, self.capability = 1, "cpu", capability
        self.awoken = self.entered = 0

    def stream(self) -> int:
        return 0x7FFF_0000_1234  # more than 32 bits, as on a card

    def current(self) -> AbstractContextManager[object]:
        self.entered += 1
        return nullcontext()

    def wake(self) -> None:
        self.awoken += 1
