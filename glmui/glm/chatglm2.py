"""ChatGLM2-6B and ChatGLM3-6B, one network: a causal decoder of 28 blocks.

Little of ChatGLM-6B is left in it: positions are places, every token sees what came before it, residuals
are plain, norms are RMSNorms before each half of a block. What is its own, all visible below:

* 32 query heads share 2 heads of keys and values, so the KV cache is a sixteenth: 28 KiB a token in float16;
* the first half of each head is turned, in neighbouring pairs (rotary.py);
* the MLP's gate and its values lie in one projection;
* the output head has a weight of its own.

Modules carry the names of the published checkpoint, so its tensors fit as they are. Shapes at line
ends: b batch, n new tokens, t all tokens so far, h query heads, g heads of keys and values, d head size,
H hidden size, F inner size of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmui.glm.attention import Attention
from glmui.glm.cache import KVCache
from glmui.glm.config import GLM2Config
from glmui.glm.layout import Causal, fill_left, mask
from glmui.glm.parts import Head, Network, Rotary, beside, look_up, pieces, ticker, word_embeddings
from glmui.glm.rotary import pair_table, rotate_pairs
from glmui.types import PIECE


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a weight, computed in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] → [..., H] in x's dtype; only the end is rounded to it."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: GLM2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        keys = config.kv_heads * config.head_size
        self.widths = (config.query_width, keys, keys)
        self.query_key_value = nn.Linear(config.hidden_size, config.qkv_width, bias=config.add_qkv_bias)
        self.core = Attention()
        self.dense = nn.Linear(config.query_width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: Rotary, cache: KVCache, start: int, visible: Tensor | None
    ) -> Tensor:
        """What x [b, n, H], coming after `start` tokens, finds among all up to its end → [b, n, H].

        visible: [b, 1, n, t], None where each sees all. Writes the keys and values of x to the cache.
        """
        parts = self.query_key_value(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in parts)  # b n h d, b n g d twice
        cache.write(self.layer, start, rotate_pairs(k, rotary), v)
        keys, values = cache.read(self.layer, start + x.shape[1])  # b g t d
        found = self.core(rotate_pairs(q, rotary), keys, values, visible)  # b n h d
        out: Tensor = self.dense(found.flatten(-2))  # b n H
        return out


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): silu of the first half times the second."""

    def __init__(self, config: GLM2Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.dense_h_to_4h(x).chunk(2, dim=-1)  # b n F each
        out: Tensor = self.dense_4h_to_h(F.silu(gate) * values)  # b n H
        return out


class GLM2Block(nn.Module):
    def __init__(self, config: GLM2Config, layer: int) -> None:
        super().__init__()
        norm = (config.hidden_size, config.layernorm_epsilon)
        self.input_layernorm = RMSNorm(*norm)
        self.self_attention = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = GatedMLP(config)

    def forward(self, hidden: Tensor, rotary: Rotary, layout: Causal, cache: KVCache, start: int) -> Tensor:
        """hidden [b, n, H] of the tokens after `start` → [b, n, H]."""
        hidden, cos, sin = (beside(self.input_layernorm.weight, x) for x in (hidden, *rotary))
        end = start + hidden.shape[1]
        visible = mask(layout, start, end, end, hidden.device, cache.front)
        x = self.input_layernorm(hidden)
        hidden = hidden + self.self_attention(x, (cos, sin), cache, start, visible)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Embedding(nn.Module):
    """Nothing but the published name of its table."""

    def __init__(self, config: GLM2Config) -> None:
        super().__init__()
        self.word_embeddings = word_embeddings(config.vocab_size, config.hidden_size)


class Encoder(nn.Module):
    def __init__(self, config: GLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLM2Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class GLM2Transformer(nn.Module):
    config: GLM2Config

    def __init__(self, config: GLM2Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.output_layer: nn.Module = Head(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        layout: Causal,
        cache: KVCache,
        on_piece: Callable[[float], None] | None = None,
        piece: int = PIECE,
    ) -> Tensor:
        """ids [b, n] int64, coming after the cache's tokens → normed hidden states [b, n, H].

        A long prompt goes through in pieces, each through all blocks: what comes later changes nothing about
        it. on_piece is told the part done, 0..1, and may raise to stop: whole pieces then stay in the cache.
        """
        cuts = pieces(ids.shape[1], piece)
        tick = ticker(len(self.encoder.layers) * len(cuts), on_piece)
        done = [self._piece(ids[:, first:last], layout, cache, tick) for first, last in cuts]
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)

    def _piece(self, ids: Tensor, layout: Causal, cache: KVCache, tick: Callable[[], None]) -> Tensor:
        start, norm = cache.length, self.encoder.final_layernorm
        end = start + ids.shape[1]
        rotary = pair_table(layout.positions(start, end), self.config, norm.weight.dtype)
        hidden = look_up(self.embedding.word_embeddings, ids)  # b n H
        for layer in self.encoder.layers:
            hidden = layer(hidden, rotary, layout, cache, start)
            tick()
        cache.length = end
        out: Tensor = norm(beside(norm.weight, hidden))
        return out


class ChatGLM2Model(Network):
    """The whole network. Weights are random until checkpoint.load_model fills them."""

    EMBEDDING = "transformer.embedding.word_embeddings"
    BLOCKS = "transformer.encoder.layers"
    NORM = "transformer.encoder.final_layernorm"
    HEAD = "transformer.output_layer"

    config: GLM2Config

    def __init__(self, config: GLM2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GLM2Transformer(config)

    def pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Prompts as ids [batch, n] and pads [batch]; see layout.fill_left."""
        return fill_left(prompts, self.config.pad_token_id)

    def layout(self, ids: Tensor, pads: Tensor | None = None) -> Causal:
        """The layout of prompts [batch, n]."""
        return Causal.of(ids, pads)

    def forward(
        self,
        ids: Tensor,
        layout: Causal | None = None,
        cache: KVCache | None = None,
        on_piece: Callable[[float], None] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [b, n, V] for ids [b, n] int64, or [b, 1, V] of the last position.

        layout: of the prompt, needed once the cache holds it; None makes it from `ids`. cache: None for none.
        """
        layout = self.layout(ids) if layout is None else layout
        cache = self.new_cache(ids.shape[1]) if cache is None else cache
        hidden = self.transformer(ids, layout, cache, on_piece, self.piece)
        logits: Tensor = self.transformer.output_layer(hidden[:, -1:] if last_only else hidden)
        return logits
