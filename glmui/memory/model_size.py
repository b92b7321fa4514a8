"""How many bytes the parts of a ChatGLM take: weights, KV cache, and what reading a prompt needs beside.

Arithmetic alone: no torch. Everything here follows the code of glm/ and quant/, and tests/test_model_size.py
holds it against what torch's allocator really gave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from glmui.glm.config import AnyConfig, GLMConfig

CPU = "cpu"

# What a card's matrix products take beside their operands: cuBLAS's own workspace (32 MiB on the newest
# cards, 8 on others), and what quantised rows are widened into for a long prompt (quant/on_card.py).
_CUBLAS = 2**25
_WIDENING = 2**26
# The same on a CPU: blocks of a quantised matrix, and of the head, are widened one at a time (BLOCK, three
# at most live at once, in float32), and what the C kernels take for each thread.
_WIDENING_CPU = 2**24

# Bytes of a number in the KV cache. "auto" and "fp32" are not here: nothing is rounded, what a layer computes
# in is kept, which is float32 on a CPU and float16 on a card.
_CACHE_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
_SCALE = 2  # bytes of an int8 cache's scale, which each head has for each token


@dataclass(frozen=True, slots=True)
class Forms:
    """How a folder of glmui's own keeps its layers, where that is not as published.

    group: columns that share a scale, 0 for whole rows. bits: of those matrices that have others than most,
    by layer and part.
    """

    group: int = 0
    bits: Mapping[tuple[int, str], int] = field(default_factory=dict)


AS_PUBLISHED = Forms()


def matrices(config: AnyConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers of a block, by their published names."""
    width = config.hidden_size
    if isinstance(config, GLMConfig):
        queries, attended = 3 * width, width
        inner = narrow = config.inner_hidden_size
    else:
        queries, attended = config.qkv_width, config.query_width
        inner, narrow = 2 * config.ffn_hidden_size, config.ffn_hidden_size  # its half gates the other
    return {
        "query_key_value": (queries, width),
        "dense": (width, attended),
        "dense_h_to_4h": (inner, width),
        "dense_4h_to_h": (width, narrow),
    }


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model in numbers.

    stored: bytes of each layer's quantised weights. floats: numbers in each layer that are floats: biases,
    norms, scales, an adapter, and weights that are not quantised. bits: of most weights, 4, 8 or 16.
    kv_width: numbers in a token's keys; its values are as many. table_weights: numbers in embedding and
    output head, of table_bits each, with table_scales; tied: whether these two are one table. whole: whether
    a prompt goes through each layer as a whole (ChatGLM-6B) or piece by piece through all of them. positions:
    tokens that the model was trained for. card_float: bytes of a number that a card computes with. front:
    entries of a prefix, which stand in the cache before all tokens. adapted: whether there is an adapter.
    in_files: whether the quantised weights lie so in the folder, and are not made while it is loaded.
    """

    stored: tuple[int, ...]
    floats: tuple[int, ...]
    bits: int
    kv_width: int
    kv_heads: int
    heads: int
    table_weights: int
    table_bits: int
    table_scales: int
    tied: bool
    width: int
    inner: int
    vocab: int
    whole: bool
    positions: int
    card_float: int = 2
    front: int = 0
    adapted: bool = False
    in_files: bool = True

    @classmethod
    def of(
        cls, config: AnyConfig, bits: int = 0, card_float: int = 2, forms: Forms = AS_PUBLISHED
    ) -> ModelSize:
        """bits: what FP16 weights are quantised to while loading, 0 for nothing. forms: of quantised ones."""
        usual, width = config.quantization_bit or bits or 16, config.hidden_size
        shapes = matrices(config)
        inner = shapes["dense_h_to_4h"][0]
        if isinstance(config, GLMConfig):
            beside = sum(rows for rows, _ in shapes.values()) + 4 * width
            quantized_table = config.quantization_embeddings
        else:
            beside = config.qkv_width * config.add_qkv_bias + 2 * width
            quantized_table = False
        layers = [_layer(shapes, usual, forms, layer) for layer in range(config.num_layers)]
        return cls(
            stored=tuple(stored for stored, _ in layers),
            floats=tuple(floats + beside for _, floats in layers),
            bits=usual,
            kv_width=config.kv_heads * config.head_size,
            kv_heads=config.kv_heads,
            heads=config.num_attention_heads,
            table_weights=config.table_weights,
            table_bits=usual if quantized_table else 16,
            table_scales=config.vocab_size * _groups(width, forms) if quantized_table else 0,
            tied=isinstance(config, GLMConfig),
            width=width,
            inner=inner,
            vocab=config.vocab_size,
            whole=isinstance(config, GLMConfig),
            positions=config.context_length,
            card_float=card_float,
            in_files=config.quantization_bit > 0,
        )

    @property
    def layers(self) -> int:
        return len(self.stored)

    def with_extras(self, front: int, adapter: int) -> ModelSize:
        """The same beside a prefix of `front` entries and an adapter of so many numbers in each layer."""
        floats = tuple(count + adapter for count in self.floats)
        return replace(self, floats=floats, front=front, adapted=adapter > 0)

    def float_bytes(self, device: str) -> int:
        """Of the numbers that are computed with: a card takes float16 where nothing else is asked for."""
        return 4 if device == CPU else self.card_float

    def layer_bytes(self, device: str, layer: int = 0) -> int:
        """One layer's weights. Those that are not quantised are widened to float32 on a CPU."""
        return self.stored[layer] + self.floats[layer] * self.float_bytes(device)

    def layers_bytes(self, device: str, layers: range) -> int:
        """The weights of neighbouring layers."""
        part = slice(layers.start, layers.stop)
        return sum(self.stored[part]) + sum(self.floats[part]) * self.float_bytes(device)

    def cache_bytes(self, device: str, context: int, kv_cache: str) -> int:
        """Keys and values of a prefix and `context` tokens in one layer. kv_cache: as PlanRequest has it."""
        scales = _SCALE * self.kv_heads if kv_cache == "int8" else 0
        size = _CACHE_BYTES.get(kv_cache) or self.float_bytes(device)
        return 2 * (self.front + context) * (self.kv_width * size + scales)

    def head_bytes(self, device: str, head_bits: int) -> int:
        """The last norm and the output head, with the embedding where that is the same table or beside it."""
        norm = 2 * self.width * self.float_bytes(device)
        if self.embedding_apart(head_bits):
            return norm + self.vocab * (self.width + self.float_bytes(device))
        scales = self.table_scales * self.float_bytes(device)
        return norm + self.table_weights * self.table_bits // 8 + scales

    def embedding_apart(self, head_bits: int) -> bool:
        """Whether the embedding stays in its file in RAM, for the few rows that are looked up: beside a head
        that is quantised by itself."""
        return head_bits == 8 and self.table_bits == 16

    def mapped_bytes(self, layers: int, with_head: bool, head_bits: int, packed: bool = True) -> int:
        """What of the last layers, so many, is pages of files on a CPU: quantised weights and the tables.

        packed: whether the CPU kernels' copies of them are kept in files; else they are memory of their own,
        as are weights that are quantised while they are loaded. A float16 table is read as it lies.
        """
        weights = sum(self.stored[self.layers - layers :]) if packed and self.in_files else 0
        as_it_lies = self.table_bits == 16 and head_bits != 8
        return weights + (self.head_bytes(CPU, head_bits) if with_head and (packed or as_it_lies) else 0)

    def scratch_bytes(self, device: str, context: int, kv_cache: str, piece: int) -> int:
        """The most that a prompt of `context` tokens, read in pieces, takes beside weights and cache."""
        size = self.float_bytes(device)
        rows = min(piece, context)
        whole = context * self.width * size
        block = self._block_bytes(device, self.front + context, kv_cache, rows)
        # ChatGLM-6B: hidden states before a layer, its queries and what comes out of it, and at its end that
        # once more, put together. ChatGLM2: what came out of all pieces, and that put together.
        body = 3 * whole + max(whole, block) if self.whole else whole + max(whole, block)
        angles = context * self.kv_width // self.kv_heads * size
        logits = self.vocab * (size + 8 * 4)  # in float32 for the sampler, which sorts them
        return body + angles + logits + self._workspace(device)

    def _block_bytes(self, device: str, seen: int, kv_cache: str, rows: int) -> int:
        """What one layer takes for `rows` tokens that see so many entries of the cache."""
        size = self.float_bytes(device)
        # which tokens each row sees, as bools; a card that computes the heads of a group as one repeats them
        mask = rows * seen * (1 if device == CPU else self.heads // self.kv_heads)
        kept = _CACHE_BYTES.get(kv_cache) or size
        widened = 2 * seen * self.kv_width * size if kept != size else 0  # what was kept
        # the bools as numbers, to be added; a card's kernel wants rows of a multiple of 8, so a copy of them
        masks = mask if device == CPU else 2 * mask
        attention = widened + size * (masks + 5 * rows * self.width)
        # torch's way with quantised weights puts the columns in order; an adapter's product is one more
        inner = 3 if self.bits < 16 or self.adapted else 2
        mlp = size * rows * (inner * self.inner + 4 * self.width)
        return mask + max(attention, mlp)

    def _workspace(self, device: str) -> int:
        if device == CPU:
            return _WIDENING_CPU
        return _CUBLAS + (_WIDENING if self.bits < 16 else 0)


def _layer(shapes: Mapping[str, tuple[int, int]], usual: int, forms: Forms, layer: int) -> tuple[int, int]:
    """Bytes of a layer's quantised weights, and numbers in those that are not and in the scales."""
    stored = floats = 0
    for part, (rows, columns) in shapes.items():
        bits = forms.bits.get((layer, part), usual)
        if bits == 16:
            floats += rows * columns
        else:
            stored += rows * (columns if bits == 8 else -(-columns // 2))
            floats += rows * _groups(columns, forms)
    return stored, floats


def _groups(columns: int, forms: Forms) -> int:
    """Scales of a row."""
    return columns // forms.group if forms.group else 1
