"""How many bytes the parts of a ChatGLM take: weights, KV cache, and what reading a prompt needs beside.

Arithmetic alone: no torch. Everything here follows the code of glm/ and quant/, and tests/test_model_size.py
holds it against what torch's allocator really gave out.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmui.glm.config import AnyConfig, GLMConfig

CPU = "cpu"

# What a card's matrix products take beside their operands: cuBLAS's own workspace (32 MiB on the newest
# cards, 8 on others), and what quantised rows are widened into for a long prompt (quant/on_card.py).
_CUBLAS = 2**25
_WIDENING = 2**26
# The same on a CPU: blocks of a quantised matrix, and of the head, are widened one at a time (BLOCK, three
# at most live at once, in float32), and what the C kernels take for each thread.
_WIDENING_CPU = 2**24

# Bytes of a number in the KV cache. "auto" is not here: it is what a layer computes in.
_CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_SCALE = 2  # bytes of an int8 cache's scale, which each head has for each token


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model in numbers. Counts are of numbers, not bytes; `layer_` ones are of one layer.

    bits: of the weights in a layer, 4, 8 or 16. table_bits: of embedding and output head. tied: whether these
    two are one table. layer_floats: biases, norms and scales. kv_width: of a token's keys; its values are as
    many. whole: whether a prompt goes through each layer as a whole (ChatGLM-6B) or piece by piece through
    all of them. positions: tokens that the model was trained for. card_float: bytes of a number that a card
    computes with.
    """

    layers: int
    bits: int
    layer_weights: int
    layer_floats: int
    kv_width: int
    kv_heads: int
    heads: int
    table_weights: int
    table_bits: int
    tied: bool
    width: int
    inner: int
    vocab: int
    whole: bool
    positions: int
    card_float: int = 2

    @classmethod
    def of(cls, config: AnyConfig, bits: int = 0, card_float: int = 2) -> ModelSize:
        """bits: what FP16 weights are quantised to while loading, 0 for nothing."""
        stored = config.quantization_bit or bits or 16
        width = config.hidden_size
        if isinstance(config, GLMConfig):
            inner = config.inner_hidden_size
            rows = 5 * width + inner
            floats = rows + 4 * width
            quantised_table = config.quantization_embeddings
        else:
            inner = 2 * config.ffn_hidden_size
            rows = config.qkv_width + 2 * width + inner
            floats = config.qkv_width * config.add_qkv_bias + 2 * width
            quantised_table = False
        return cls(
            layers=config.num_layers,
            bits=stored,
            layer_weights=config.block_weights,
            layer_floats=floats + (rows if stored < 16 else 0),
            kv_width=config.kv_heads * config.head_size,
            kv_heads=config.kv_heads,
            heads=config.num_attention_heads,
            table_weights=config.table_weights,
            table_bits=stored if quantised_table else 16,
            tied=isinstance(config, GLMConfig),
            width=width,
            inner=inner,
            vocab=config.vocab_size,
            whole=isinstance(config, GLMConfig),
            positions=config.context_length,
            card_float=card_float,
        )

    def float_bytes(self, device: str) -> int:
        """Of the numbers that are computed with: a card takes float16 where nothing else is asked for."""
        return 4 if device == CPU else self.card_float

    def layer_bytes(self, device: str) -> int:
        """One layer's weights. Those that are not quantised are widened to float32 on a CPU."""
        size = self.float_bytes(device)
        bits = self.bits if self.bits < 16 else 8 * size
        return self.layer_weights * bits // 8 + self.layer_floats * size

    def cache_bytes(self, device: str, context: int, cache: str) -> int:
        """Keys and values of `context` tokens in one layer. cache: as EngineSpec.kv_cache has it."""
        scales = _SCALE * self.kv_heads if cache == "int8" else 0
        size = _CACHE_BYTES.get(cache) or self.float_bytes(device)
        return 2 * context * (self.kv_width * size + scales)

    def head_bytes(self, device: str, head_bits: int) -> int:
        """The last norm and the output head, with the embedding where that is the same table or beside it."""
        norm = 2 * self.width * self.float_bytes(device)
        if self.embedding_apart(head_bits):
            return norm + self.vocab * (self.width + self.float_bytes(device))
        scales = 4 * self.vocab if self.table_bits < 16 else 0
        return norm + self.table_weights * self.table_bits // 8 + scales

    def embedding_apart(self, head_bits: int) -> bool:
        """Whether the embedding stays in its file in RAM, for the few rows that are looked up: beside a head
        that is quantised by itself."""
        return head_bits == 8 and self.table_bits == 16

    def mapped_bytes(self, layers: int, with_head: bool, head_bits: int) -> int:
        """What of so many layers on a CPU is not copied into memory: quantised weights and the tables."""
        weights = layers * self.layer_weights * self.bits // 8 if self.bits < 16 else 0
        return weights + (self.head_bytes(CPU, head_bits) if with_head else 0)

    def scratch_bytes(self, device: str, context: int, cache: str, piece: int) -> int:
        """The most that a prompt of `context` tokens, read in pieces, takes beside weights and cache."""
        size = self.float_bytes(device)
        rows = min(piece, context)
        whole = context * self.width * size
        block = self._block_bytes(device, context, cache, rows)
        # ChatGLM-6B: hidden states before a layer, its queries and what comes out of it, and at its end that
        # once more, put together. ChatGLM2: what came out of all pieces, and that put together.
        body = 3 * whole + max(whole, block) if self.whole else whole + max(whole, block)
        angles = context * self.kv_width // self.kv_heads * size
        logits = self.vocab * (size + 8 * 4)  # in float32 for the sampler, which sorts them
        return body + angles + logits + self._workspace(device)

    def _block_bytes(self, device: str, context: int, cache: str, rows: int) -> int:
        """What one layer takes for `rows` tokens that see `context`."""
        size = self.float_bytes(device)
        # which tokens each row sees, as bools; a card that computes the heads of a group as one repeats them
        mask = rows * context * (1 if device == CPU else self.heads // self.kv_heads)
        kept = _CACHE_BYTES.get(cache) or size
        widened = 2 * context * self.kv_width * size if kept != size else 0  # what was kept
        # the bools as numbers, to be added; a card's kernel wants rows of a multiple of 8, so a copy of them
        masks = mask if device == CPU else 2 * mask
        attention = widened + size * (masks + 5 * rows * self.width)
        inner = 2 if self.bits == 16 else 3  # torch's way with quantised weights puts the columns in order
        mlp = size * rows * (inner * self.inner + 4 * self.width)
        return mask + max(attention, mlp)

    def _workspace(self, device: str) -> int:
        if device == CPU:
            return _WIDENING_CPU
        return _CUBLAS + (_WIDENING if self.bits < 16 else 0)
