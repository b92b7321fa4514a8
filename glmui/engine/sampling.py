"""From logits to the next id: pure functions, composed once by a Sampler.

The order and the rules for ties are those of transformers' generate(), so that a seed gives the same ids:
repetition penalty, temperature, top-k, top-p, softmax, one draw. Logits are float32 [batch, vocab].

Each number that Python wants to see makes a card idle until the next launch reaches it: so there is one look
at how many ids top-k has left, and one at the end for the ids and whether all logits were numbers.
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
    return torch.full_like(logits, _OUT).scatter_(-1, order, ascending.masked_fill(out, _OUT))


def _ascending(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and their ids, the best one last; where top-k has left but a few of them, those alone."""
    left = int((logits > _OUT).sum(dim=-1).max())
    if left > logits.shape[-1] // 16:
        return torch.sort(logits, dim=-1)
    best, order = torch.topk(logits, max(left, 1), dim=-1)
    return best.flip(-1), order.flip(-1)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """An id of each row, [batch]: the one that torch.multinomial draws, by the same arithmetic, without its
    looking at the probabilities first."""
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return (probabilities / noise).argmax(dim=-1)


def all_finite(logits: Tensor) -> Tensor:
    """Whether none is NaN or infinite, [1] of bool: what lies between their least and largest tells."""
    least, largest = logits.aminmax()
    return (largest - least < float("inf")).view(1)


def blank_where_broken(logits: Tensor, blank_id: int) -> Tensor:
    """What ChatGLM-6B's code does: any NaN or infinity leaves `blank_id` as the only choice, in all rows."""
    if all_finite(logits):
        return logits
    blank = torch.zeros_like(logits)
    blank[..., blank_id] = _PUBLISHED_BLANK
    return blank


class Sampler:
    """Picks the next id of each row. `generator` must live on the logits' device; greedy never draws from it.

    mend: what to make of logits before anything is chosen, nothing unless told.
    """

    def __init__(
        self,
        params: GenerationParams,
        generator: torch.Generator | None = None,
        mend: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        self._penalty = params.repetition_penalty
        self._greedy = params.temperature == 0
        self._generator = generator
        self._mend = mend
        self._warpers = _warpers(params)

    def __call__(self, logits: Tensor, seen: Sequence[Sequence[int]]) -> list[int]:
        """Next ids from logits [batch, vocab]; `seen` has each row's ids so far, for the penalty.

        Raises EngineError("nan_logits") where one is NaN or infinite.
        """
        logits = logits.float()
        if self._penalty != 1:
            logits = penalise_repetition(logits, seen, self._penalty)
        logits = self._mend(logits)
        *ids, finite = torch.cat([self._choose(logits), all_finite(logits)]).tolist()
        if not finite:
            raise EngineError("nan_logits")
        return ids

    def _choose(self, logits: Tensor) -> Tensor:
        """The next id of each row, [batch]; any where logits are broken."""
        if self._greedy:
            return logits.argmax(dim=-1)
        return draw(self.warp(logits).softmax(dim=-1), self._generator)

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


def make_generator(seed: int | None, device: str | torch.device) -> torch.Generator:
    """A random generator on `device`: seeded, or freshly drawn where `seed` is None."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
