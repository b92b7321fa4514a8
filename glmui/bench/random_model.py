"""ChatGLM checkpoints of random weights, real in shape and format: speed can be measured without a download.

It does not depend on what the weights say. Written without torch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from glmui.errors import FetchError
from glmui.glm.config import AnyConfig, GLM2Config, GLMConfig
from glmui.memory.published import SHAPES
from glmui.quantizing.tensor_header import Form, beginning, bytes_of
from glmui.text.vocabulary import CHATGLM2_PIECES, NAMES

SIZES: dict[str, AnyConfig] = {
    "chatglm-6b-int4": SHAPES["chatglm-6b-int4"],
    "chatglm3-6b-int4": SHAPES["chatglm3-6b-int4"],
    "tiny": GLMConfig(130528, 32, 128, 2, 2, quantization_bit=4),
}

_POOL = 1 << 20  # random values that all tensors are cut from
_SPARE = 200_000_000  # bytes of the disk to leave free
_SCALE = 0.005  # makes weights of about 0.02, with which nothing overflows
_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>")  # ids 130000 to 130005
_FIRST_CONTROL = 130000

Shape = tuple[int, ...]
Piece = tuple[str, int]  # name and kind
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def write(folder: Path, size: str) -> None:
    """Write a model of SIZES[size] into the existing `folder`. Raises FetchError("disk_too_full")."""
    config = SIZES[size]
    tensors = {name: (dtype, shape) for name, dtype, shape in tensors_of(config)}
    need, free = sum(map(bytes_of, tensors.values())) + _SPARE, shutil.disk_usage(folder).free
    if free < need:
        raise FetchError("disk_too_full", folder=folder, free=free // 10**6, need=need // 10**6)
    values = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], **asdict(config)}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    pieces = chatglm_pieces() if isinstance(config, GLMConfig) else chatglm2_pieces()
    (folder / NAMES[config.family]).write_bytes(vocabulary(pieces))
    with (folder / "model.safetensors").open("wb") as file:
        _write_tensors(file, tensors)


def tensors_of(config: AnyConfig) -> Iterator[tuple[str, str, Shape]]:
    """Name, safetensors dtype and shape of every tensor, in the published names."""
    if isinstance(config, GLMConfig):
        yield from _chatglm_tensors(config)
    else:
        yield from _chatglm2_tensors(config)


def _chatglm_tensors(config: GLMConfig) -> Iterator[tuple[str, str, Shape]]:
    width, inner = config.hidden_size, config.inner_hidden_size
    yield "transformer.word_embeddings.weight", "F16", (config.vocab_size, width)
    for layer in range(config.num_layers):
        block = f"transformer.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield from _vectors(f"{block}.{norm}", width, "weight", "bias")
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", inner, width),
            ("mlp.dense_4h_to_h", width, inner),
        ):
            yield f"{block}.{name}.weight", "I8", (rows, columns * config.quantization_bit // 8)
            yield from _vectors(f"{block}.{name}", rows, "weight_scale", "bias")
    yield from _vectors("transformer.final_layernorm", width, "weight", "bias")


def _chatglm2_tensors(config: GLM2Config) -> Iterator[tuple[str, str, Shape]]:
    width, inner = config.hidden_size, config.ffn_hidden_size
    yield "transformer.embedding.word_embeddings.weight", "F16", (config.vocab_size, width)
    for layer in range(config.num_layers):
        block = f"transformer.encoder.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield from _vectors(f"{block}.{norm}", width, "weight")
        yield from _vectors(f"{block}.self_attention.query_key_value", config.qkv_width, "bias")
        for name, rows, columns in (
            ("self_attention.query_key_value", config.qkv_width, width),
            ("self_attention.dense", width, config.query_width),
            ("mlp.dense_h_to_4h", 2 * inner, width),
            ("mlp.dense_4h_to_h", width, inner),
        ):
            yield f"{block}.{name}.weight", "I8", (rows, columns * config.quantization_bit // 8)
            yield from _vectors(f"{block}.{name}", rows, "weight_scale")
    yield from _vectors("transformer.encoder.final_layernorm", width, "weight")
    yield "transformer.output_layer.weight", "F16", (config.vocab_size, width)


def _vectors(module: str, length: int, *names: str) -> Iterator[tuple[str, str, Shape]]:
    yield from ((f"{module}.{name}", "F16", (length,)) for name in names)


def _write_tensors(file: IO[bytes], tensors: dict[str, Form]) -> None:
    first, places = beginning(tensors)
    file.write(first)
    halves, whole = _halves(), os.urandom(_POOL)
    for name in places:
        pool = _values(name, halves) if tensors[name][0] == "F16" else whole
        _repeat(file, pool, bytes_of(tensors[name]))


def _values(name: str, halves: bytes) -> bytes:
    if name.endswith("weight_scale"):
        return struct.pack("<e", _SCALE)
    return struct.pack("<e", 1.0) if "layernorm.weight" in name else halves


def _halves() -> bytes:
    """Normal values in float16, as small as those of an embedding."""
    source = random.Random(6)
    count = _POOL // 16
    return struct.pack(f"<{count}e", *(source.gauss(0, 0.02) for _ in range(count)))


def _repeat(file: IO[bytes], pool: bytes, count: int) -> None:
    pool *= max(1, _POOL // len(pool))
    for _ in range(count // len(pool)):
        file.write(pool)
    file.write(pool[: count % len(pool)])


def chatglm_pieces() -> list[Piece]:
    """ChatGLM-6B's special pieces at their published ids, made-up ones elsewhere."""
    pieces = [("<unk>", UNKNOWN), *((name, CONTROL) for name in ("<s>", "</s>", "<pad>"))]
    pieces += [(f"▁{number}", NORMAL) for number in range(len(pieces), _FIRST_CONTROL)]
    return [*pieces, *((name, CONTROL) for name in _CONTROL)]


def chatglm2_pieces() -> list[Piece]:
    """The same of ChatGLM2 and 3, with the pieces of single bytes."""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [*((f"<0x{byte:02X}>", BYTE) for byte in range(256)), ("▁", NORMAL)]
    return [*pieces, *((f"▁{number}", NORMAL) for number in range(len(pieces), CHATGLM2_PIECES))]


def vocabulary(pieces: Sequence[Piece]) -> bytes:
    """A sentencepiece model, a protobuf message: field 1 is a piece of name (1), score (2) and kind (3);
    field 2 holds byte_fallback (35), which must say whether there are bytes among them."""
    said = b"".join(_piece(name.encode(), kind) for name, kind in pieces)
    return said + (b"\x12\x03\x98\x02\x01" if any(kind == BYTE for _, kind in pieces) else b"")


def _piece(name: bytes, kind: int) -> bytes:
    inside = bytes([0x0A, len(name)]) + name + b"\x15" + struct.pack("<f", -1.0) + bytes([0x18, kind])
    return bytes([0x0A, len(inside)]) + inside
