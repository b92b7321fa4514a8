"""A compiler of card kernels that compiles nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glmui.quant.kernels.cuda.compile import NotCompiled


class Scripted:
    """See compile.Compiler. It compiles a source to its name and options, and remembers that it was asked."""

    architectures = (75, 86, 90)

    def __init__(self, version: tuple[int, int] = (13, 0), fails: str = "") -> None:
        self.version, self.fails = version, fails
        self.asked: list[str] = []

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        self.asked.append(name)
        if name == self.fails:
            raise NotCompiled("reasons.card_kernels_not_compiled")
        return f"{name} {' '.join(options)}".encode()
