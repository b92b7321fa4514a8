"""From logits to the next id: pure functions, composed once by a Sampler.

The order and the rules for ties are those of transformers' generate(), so that a seed gives the same ids:
repetition penalty, temperature, top-k, top-p, softmax, one draw. Logits are float32 [batch, vocab].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glmui.errors import EngineError
from glmui.types import GenerationParams

_OUT = float("-inf")
_PUBLISHED_BLANK = 5e4  # the score ChatGLM-6B's code gives its blank where logits are broken


def penalise_repetition(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make the ids in `seen` (one list per row) less likely: divide their logit, multiply a negative one."""
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        known = torch.tensor(sorted(set(ids)), dtype=torch.long, device=row.device)
        score = row[known]
        row[known] = torch.where(score < 0, score * penalty, score / penalty)
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Put everything below the k-th best logit out; ties with it stay, so more than k may stay."""
    kth = torch.topk(logits, min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, _OUT)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest ids that reach p together, at least one; ties are cut in sort order."""
    ascending, order = _ascending(logits)
    out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    out[..., -1] = False
    everything = torch.ones_like(logits, dtype=torch.bool)
    return logits.masked_fill(everything.scatter_(-1, order, out), _OUT)


def _ascending(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and their ids, the best one last; where top-k has left but a few of them, those alone."""
    left = int((logits > _OUT).sum(dim=-1).max())
    if left > logits.shape[-1] // 16:
        return torch.sort(logits, dim=-1)
    best, order = torch.topk(logits, max(left, 1), dim=-1)
    return best.flip(-1), order.flip(-1)


def blank_where_broken(logits: Tensor, blank_id: int) -> Tensor:
    """What ChatGLM-6B's code does: any NaN or infinity leaves `blank_id` as the only choice, in all rows."""
    if torch.isfinite(logits).all():
        return logits
    blank = torch.zeros_like(logits)
    blank[..., blank_id] = _PUBLISHED_BLANK
    return blank


def refuse_broken(logits: Tensor) -> Tensor:
    """The logits as they are; EngineError("nan_logits") where one is NaN or infinite."""
    if not torch.isfinite(logits).all():
        raise EngineError("nan_logits")
    return logits


class Sampler:
    """Picks the next id of each row. `generator` must live on the logits' device; greedy never draws from it.

    check: what to do with broken logits, `refuse_broken` unless told otherwise.
    """

    def __init__(
        self,
        params: GenerationParams,
        generator: torch.Generator | None = None,
        check: Callable[[Tensor], Tensor] = refuse_broken,
    ) -> None:
        self._penalty = params.repetition_penalty
        self._greedy = params.temperature == 0
        self._generator = generator
        self._check = check
        self._warpers = _warpers(params)

    def __call__(self, logits: Tensor, seen: Sequence[Sequence[int]]) -> list[int]:
        """Next ids from logits [batch, vocab]; `seen` has each row's ids so far, for the penalty.

        Raises EngineError("nan_logits").
        """
        logits = logits.float()
        if self._penalty != 1:
            logits = penalise_repetition(logits, seen, self._penalty)
        logits = self._check(logits)
        if self._greedy:
            return _plain(logits.argmax(dim=-1))
        return _plain(torch.multinomial(self.warp(logits).softmax(dim=-1), 1, generator=self._generator))

    def warp(self, logits: Tensor) -> Tensor:
        """Logits after temperature, top-k and top-p; what may not be drawn is -inf."""
        for warper in self._warpers:
            logits = warper(logits)
        return logits


def _warpers(params: GenerationParams) -> list[Callable[[Tensor], Tensor]]:
    warpers: list[Callable[[Tensor], Tensor]] = []
    if params.temperature not in (0, 1):
        warpers.append(lambda logits: logits / params.temperature)
    if params.top_k > 0:
        warpers.append(lambda logits: keep_top_k(logits, params.top_k))
    if params.top_p < 1:
        warpers.append(lambda logits: keep_top_p(logits, params.top_p))
    return warpers


def _plain(ids: Tensor) -> list[int]:
    return [int(i) for i in ids.flatten().tolist()]


def make_generator(seed: int | None, device: str | torch.device) -> torch.Generator:
    """A random generator on `device`: seeded, or freshly drawn where `seed` is None."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
