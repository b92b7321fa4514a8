"""One token through a network on a card, launch by launch: what model.py and chatglm2.py of glm/ compute.

A block is eight launches: norm (with the residual before it), query_key_value, attention (which turns, keeps
and looks), dense, norm, the MLP's first layer, its activation, its second layer. Linear layers are the
model's own modules, so that whatever computes them (kernels, torch) and is hooked to them (an adapter) does
so here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from glmui.glm.chatglm2 import ChatGLM2Model, GLM2Block, RMSNorm
from glmui.glm.checkpoint import AnyModel
from glmui.glm.layout import Causal, Layout
from glmui.glm.model import RESIDUAL, ChatGLMModel, GLMBlock
from glmui.glm.rotary import pair_table, rotary_table
from glmui.quant.kernels.cuda.block import BlockKernels

# A layer's number, and what its query_key_value gave for the token [1, 1, width] → what the token finds
# among all so far [1, 1, heads * head_size].
Look = Callable[[int, Tensor], Tensor]


class CardNetwork(Protocol):
    """side_by_side: see block.Turns. embedding: the table, wherever it is."""

    side_by_side: bool
    embedding: nn.Module

    def angles(self, layout: Layout | Causal, places: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `places` columns, [places, angles] each, in the dtype of the norms."""

    def logits(self, row: Tensor, look: Look) -> Tensor:
        """row [1, 1, H], the token's embedding → [1, 1, V]."""


class GLMNetwork:
    """ChatGLM-6B. What a norm gave is the next residual, times RESIDUAL."""

    side_by_side = True

    def __init__(self, model: ChatGLMModel, kernels: BlockKernels) -> None:
        self._model, self._kernels = model, kernels
        self.embedding: nn.Module = model.transformer.word_embeddings

    def angles(self, layout: Layout | Causal, places: int) -> tuple[Tensor, Tensor]:
        """See CardNetwork."""
        body = self._model.transformer
        positions = layout.positions(0, places)
        return _flat(rotary_table(positions, body.head_size, body.final_layernorm.weight.dtype))

    def logits(self, row: Tensor, look: Look) -> Tensor:
        """See CardNetwork."""
        body = self._model.transformer
        x, residual = row, None
        for layer, block in enumerate(body.layers):
            assert isinstance(block, GLMBlock)
            residual = self._norm(block.input_layernorm, x, residual)
            x = block.attention.dense(look(layer, block.attention.query_key_value(residual)))
            residual = self._norm(block.post_attention_layernorm, x, residual)
            x = block.mlp.dense_4h_to_h(self._kernels.gelu(block.mlp.dense_h_to_4h(residual)))
        logits: Tensor = self._model.lm_head(self._norm(body.final_layernorm, x, residual))
        return logits

    def _norm(self, norm: nn.LayerNorm, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, residual, RESIDUAL)


class GLM2Network:
    """ChatGLM2 and 3. What went into a norm is the next residual."""

    side_by_side = False

    def __init__(self, model: ChatGLM2Model, kernels: BlockKernels) -> None:
        self._model, self._kernels = model, kernels
        self.embedding: nn.Module = model.transformer.embedding.word_embeddings

    def angles(self, layout: Layout | Causal, places: int) -> tuple[Tensor, Tensor]:
        """See CardNetwork."""
        dtype = self._model.transformer.encoder.final_layernorm.weight.dtype
        return _flat(pair_table(layout.positions(0, places), self._model.config, dtype))

    def logits(self, row: Tensor, look: Look) -> Tensor:
        """See CardNetwork."""
        body = self._model.transformer
        x, residual = row, None
        for layer, block in enumerate(body.encoder.layers):
            assert isinstance(block, GLM2Block)
            normed, residual = self._norm(block.input_layernorm, x, residual)
            x = block.self_attention.dense(look(layer, block.self_attention.query_key_value(normed)))
            normed, residual = self._norm(block.post_attention_layernorm, x, residual)
            x = block.mlp.dense_4h_to_h(self._kernels.swiglu(block.mlp.dense_h_to_4h(normed)))
        normed, _ = self._norm(body.encoder.final_layernorm, x, residual)
        logits: Tensor = body.output_layer(normed)
        return logits

    def _norm(self, norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._kernels.rms_norm(x, norm.weight, norm.eps, residual)


def network_of(model: AnyModel, kernels: BlockKernels) -> CardNetwork:
    """The model's network, computed by these kernels between its linear layers."""
    return GLMNetwork(model, kernels) if isinstance(model, ChatGLMModel) else GLM2Network(model, kernels)


def _flat(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A rotary table [1, n, 1, …] as [n, angles]."""
    cosine, sine = (part.flatten(0, 2).flatten(1).contiguous() for part in table)
    return cosine, sine
