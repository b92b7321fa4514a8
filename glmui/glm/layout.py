"""Where each token stands and whom it sees: ChatGLM's two kinds of position and its mask, from the ids.

    ids         今  天  如  何  [gMASK]  <sop>  很   好
    position     0   1   2   3     4        4    4    4      the place in the text that is being filled
    block        0   0   0   0     0        1    2    3      how far inside the fill

Everything before <sop> is context and sees all of itself, later tokens too; <sop> and the answer are
causal. So an answer's keys and values can be kept, but a prompt's change with every token added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glmui.errors import InvalidInput
from glmui.glm.config import GLMConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions and visibility for a batch of sequences of any length, padded on the left.

    pads:    [batch, 1] int64, how many columns of padding each row begins with
    context: [batch, 1] int64, how many tokens after the padding come before <sop>
    gap:     [batch, 1] int64, the position (padding not counted) of the [gMASK] or [MASK] to be filled
    padded:  whether any row has padding
    """

    pads: Tensor
    context: Tensor
    gap: Tensor
    padded: bool

    @classmethod
    def of(cls, ids: Tensor, config: GLMConfig, pads: Tensor | None = None) -> Layout:
        """The layout of prompts [batch, n], each with [gMASK] and <sop>. pads: [batch], None for none."""
        before = ids.new_zeros(len(ids), 1) if pads is None else pads.to(ids).view(-1, 1)
        real = torch.arange(ids.shape[1], device=ids.device) >= before
        start = _first((ids == config.bos_token_id) & real)
        gmask = (ids == config.gmask_token_id) & real
        mask = (ids == config.mask_token_id) & real
        gap = torch.where(gmask.any(-1, keepdim=True), _first(gmask), _first(mask))
        return cls(before, start - before, gap - before, pads is not None)

    def positions(self, start: int, end: int) -> Tensor:
        """[batch, 2, end - start] int64: position and block of columns start..end-1; 0 and 0 for pads."""
        place = torch.arange(start, end, device=self.pads.device) - self.pads
        inside = place >= self.context
        position = torch.where(inside, self.gap, place)
        block = torch.where(inside, place - self.context + 1, 0)
        return torch.stack((position, block), dim=1).clamp_(min=0)

    def visible(self, start: int, end: int, columns: int) -> Tensor:
        """[batch, 1, end - start, columns] bool: which columns the rows start..end-1 see.

        Pads see nothing and are seen by nobody.
        """
        row = torch.arange(start, end, device=self.pads.device)[:, None]  # [rows, 1]
        column = torch.arange(columns, device=self.pads.device)  # [columns]
        pads, context = self.pads[..., None], self.context[..., None]  # [batch, 1, 1]
        allowed = (column <= row) | (column < pads + context)
        return (allowed & (column >= pads) & (row >= pads))[:, None]


def _first(found: Tensor) -> Tensor:
    """[batch, 1]: the first True of each row."""
    return found.int().argmax(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Causal:
    """The same for ChatGLM2 and 3, where a token's position is its place, and each sees what came before it.

    pads: [batch, 1] int64, how many columns of padding each row begins with
    """

    pads: Tensor
    padded: bool

    @classmethod
    def of(cls, ids: Tensor, pads: Tensor | None = None) -> Causal:
        """The layout of prompts [batch, n]. pads: [batch], None for none."""
        before = ids.new_zeros(len(ids), 1) if pads is None else pads.to(ids).view(-1, 1)
        return cls(before, pads is not None)

    def positions(self, start: int, end: int) -> Tensor:
        """[batch, end - start] int64: the position of columns start..end-1; 0 for pads."""
        return (torch.arange(start, end, device=self.pads.device) - self.pads).clamp_(min=0)

    def visible(self, start: int, end: int, columns: int) -> Tensor:
        """[batch, 1, end - start, columns] bool; see Layout.visible."""
        row = torch.arange(start, end, device=self.pads.device)[:, None]  # [rows, 1]
        column = torch.arange(columns, device=self.pads.device)  # [columns]
        pads = self.pads[..., None]  # [batch, 1, 1]
        return ((column <= row) & (column >= pads) & (row >= pads))[:, None]


def mask(
    layout: Layout | Causal, start: int, end: int, columns: int, device: torch.device, front: int = 0
) -> Tensor | None:
    """Which columns the rows start..end-1 see, [b, 1, rows, front + columns] bool; None where they see all.

    front: columns of a prefix, before those of the tokens, which every row sees.
    """
    if not layout.padded and end - start == 1 and end == columns:  # the newest token
        return None
    visible = layout.visible(start, end, columns).to(device)
    if front:
        visible = F.pad(visible, (front, 0), value=True)
    if not layout.padded:
        return visible
    # Rows of padding see nothing; a softmax over nothing is NaN, so let them see all: nobody reads them.
    return visible | ~visible.any(-1, keepdim=True)


def pad_left(prompts: Sequence[Sequence[int]], config: GLMConfig) -> tuple[Tensor, Tensor | None]:
    """Prompts as ids [batch, n] int64 and pads [batch] (None when all are of one length).

    Raises InvalidInput("prompt_without_gap") where a prompt lacks <sop>, or both [gMASK] and [MASK].
    """
    for prompt in prompts:
        has_gap = config.gmask_token_id in prompt or config.mask_token_id in prompt
        if config.bos_token_id not in prompt or not has_gap:
            raise InvalidInput("prompt_without_gap")
    return fill_left(prompts, config.pad_token_id)


def fill_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor | None]:
    """Prompts as ids [batch, n] int64, filled up with `pad` on the left, and pads [batch] (None for none)."""
    length = max(map(len, prompts))
    pads = [length - len(prompt) for prompt in prompts]
    rows = [[pad] * count + list(prompt) for count, prompt in zip(pads, prompts, strict=True)]
    return torch.tensor(rows), torch.tensor(pads) if any(pads) else None
