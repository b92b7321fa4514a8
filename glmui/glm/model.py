"""ChatGLM-6B: a GLM of 28 blocks that fills in the gap [gMASK] of its prompt, token after token.

A GLM (Du et al., 2022) differs from other decoders in four ways, all visible below:

* the prompt sees all of itself, only the answer is causal, and positions are of two kinds (layout.py);
* the residual is the *normed* input times sqrt(2 * 28), so that 28 blocks stay in float16's range;
* a head's query, key and value lie side by side in one projection;
* the output head is the embedding.

Modules carry the names of the published checkpoint, so its tensors fit as they are. Shapes at line
ends: b batch, n new tokens, t all tokens so far, h heads, d head size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from glmui.glm.attention import Attention, Gelu, Rotate
from glmui.glm.cache import KVCache
from glmui.glm.config import GLMConfig
from glmui.glm.layout import Layout, mask, pad_left
from glmui.glm.parts import Head, Network, Rotary, beside, look_up, pieces, ticker, word_embeddings
from glmui.glm.rotary import rotary_table
from glmui.types import PIECE

# The published code always takes 28 here, whatever the number of layers.
RESIDUAL = math.sqrt(2 * 28)


class SelfAttention(nn.Module):
    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.rotate, self.core = Rotate(), Attention()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor, rotary: Rotary, cache: KVCache, start: int) -> Tensor:
        """Write the keys and values of x [b, n, H] to the cache from `start` on; return the queries."""
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)  # b n h d
        cache.write(self.layer, start, self.rotate(k, rotary), v)
        queries: Tensor = self.rotate(q, rotary)  # b n h d
        return queries

    def attend(self, queries: Tensor, cache: KVCache, end: int, visible: Tensor | None) -> Tensor:
        """What queries [b, n, h, d] find among the first `end` tokens. visible: [b, 1, n, t], None: all."""
        keys, values = cache.read(self.layer, end)  # b h t d
        found = self.core(queries, keys, values, visible)  # b n h d
        out: Tensor = self.dense(found.flatten(-2))  # b n H
        return out


class GLU(nn.Module):
    """Two layers with a GELU (tanh form) between; the published name promises a gate there is none of."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.gelu = Gelu()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gelu(self.dense_h_to_4h(x))  # b n 4H
        out: Tensor = self.dense_4h_to_h(inner)  # b n H
        return out


class GLMBlock(nn.Module):
    """Attention and MLP. A long prompt goes through in pieces: first the keys and values of all pieces,
    since every row of the context looks at all of them, then attention and MLP piece by piece."""

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        norm = (config.hidden_size, config.layernorm_epsilon)
        self.input_layernorm = nn.LayerNorm(*norm)
        self.attention = SelfAttention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(*norm)
        self.mlp = GLU(config)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary,
        layout: Layout,
        cache: KVCache,
        on_piece: Callable[[], None],
        piece: int = PIECE,
    ) -> Tensor:
        """hidden [b, n, H] of the tokens after cache.length → [b, n, H]."""
        hidden, cos, sin = (beside(self.attention.dense.bias, x) for x in (hidden, *rotary))
        start, end = cache.length, cache.length + hidden.shape[1]
        cuts = pieces(hidden.shape[1], piece)
        queries = []
        for first, last in cuts:
            x = self.input_layernorm(hidden[:, first:last])
            table = cos[:, first:last], sin[:, first:last]
            queries.append(self.attention.project(x, table, cache, start + first))
            on_piece()
        done = []
        for query, (first, last) in zip(queries, cuts, strict=True):
            visible = mask(layout, start + first, start + last, end, hidden.device, cache.front)
            x = self.input_layernorm(hidden[:, first:last])
            x = self.attention.attend(query, cache, end, visible).add(x, alpha=RESIDUAL)
            x = self.post_attention_layernorm(x)
            done.append(self.mlp(x).add(x, alpha=RESIDUAL))
            on_piece()
        return done[0] if len(done) == 1 else torch.cat(done, dim=1)


class GLMTransformer(nn.Module):
    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.word_embeddings = word_embeddings(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)

    @property
    def first(self) -> GLMBlock:
        block = self.layers[0]
        assert isinstance(block, GLMBlock)
        return block

    def forward(
        self,
        ids: Tensor,
        layout: Layout,
        cache: KVCache,
        on_piece: Callable[[float], None] | None = None,
        piece: int = PIECE,
    ) -> Tensor:
        """ids [b, n] int64, coming after the cache's tokens → normed hidden states [b, n, H].

        Each block computes in the dtype of its biases. on_piece is told the part done, 0..1, and may
        raise to stop: the cache then still has its old length.
        """
        hidden = look_up(self.word_embeddings, ids)  # b n H
        end = cache.length + ids.shape[1]
        dtype = self.first.attention.dense.bias.dtype
        rotary = rotary_table(layout.positions(cache.length, end), self.head_size, dtype)
        tick = ticker(2 * len(self.layers) * len(pieces(ids.shape[1], piece)), on_piece)
        for layer in self.layers:
            hidden = layer(hidden, rotary, layout, cache, tick, piece)
        cache.length = end
        out: Tensor = self.final_layernorm(beside(self.final_layernorm.weight, hidden))
        return out


class ChatGLMModel(Network):
    """The whole network. Weights are random until checkpoint.load_model fills them."""

    EMBEDDING = "transformer.word_embeddings"
    BLOCKS = "transformer.layers"
    NORM = "transformer.final_layernorm"
    HEAD = "lm_head"
    tied = True

    config: GLMConfig

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = GLMTransformer(config)
        self.lm_head: nn.Module = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Prompts as ids [batch, n] and pads [batch]; see layout.pad_left."""
        return pad_left(prompts, self.config)

    def layout(self, ids: Tensor, pads: Tensor | None = None) -> Layout:
        """The layout of prompts [batch, n]."""
        return Layout.of(ids, self.config, pads)

    def forward(
        self,
        ids: Tensor,
        layout: Layout | None = None,
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
        logits: Tensor = self.lm_head(hidden[:, -1:] if last_only else hidden)
        return logits
