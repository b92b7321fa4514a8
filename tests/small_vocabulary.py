"""A small sentencepiece vocabulary laid out like ChatGLM-6B's: the same special pieces at the same ids.

The published vocabulary is not ours to ship. A few hundred pieces are trained, the ids between them and
130000 are filled with pieces that no text becomes, and the whole is written in sentencepiece's own format
(a protobuf message; only the few fields needed are known here).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from functools import cache

import sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_TEXTS = [
    "今天天气真不错，我们去公园散步吧。",
    "你好，请问今天是星期几？介绍一下你自己。",
    "Hello, how are you today? I'm fine, thanks; it's what we've said.",
    "ChatGLM-6B 是一个开源的、支持中英双语的对话语言模型。",
    "The quick brown fox jumps over the lazy dog: 0123456789 <div> [x] (y) _z_ | a & b",
    "[Round 0] 问：你好 答：你好！",
] * 4


@cache
def small_vocabulary() -> bytes:
    """The contents of an ice_text.model with 130344 pieces, of which about 350 are used."""
    trained, normalizer = _train()
    pieces = [("<unk>", 0.0, UNKNOWN), *((name, 0.0, CONTROL) for name in ("<s>", "</s>", "<pad>"))]
    pieces += [("<n>", 0.0, USER_DEFINED), *trained]
    pieces += [(_filler(i), 0.0, UNUSED) for i in range(len(pieces), 130000)]
    control = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    pieces += [(name, 0.0, CONTROL) for name in control]
    blanks = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81)))
    pieces += [(name, 0.0, USER_DEFINED) for name in blanks]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    trainer = _field(35, 1) + _field(43, 3)  # byte_fallback, pad_id
    return b"".join(_field(1, _piece(*p)) for p in pieces) + _field(2, trainer) + _field(3, normalizer)


def _train() -> tuple[list[tuple[str, float, int]], bytes]:
    """Some pieces, "▁" first as in the published vocabulary, and the normaliser's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    fields = list(_fields(model.getvalue()))
    pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    kept = [
        (p[1].decode(), struct.unpack("<f", p[2])[0], NORMAL) for p in pieces if p.get(3, NORMAL) == NORMAL
    ]
    kept.sort(key=lambda piece: piece[0] != "▁")
    return kept, next(value for number, value in fields if number == 3)


def _filler(place: int) -> str:
    """Three rare Chinese characters, different for each id."""
    return "".join(chr(0x3400 + digit) for digit in (place // 6400, place // 80 % 80, place % 80))


def _piece(name: str, score: float, kind: int) -> bytes:
    return _field(1, name.encode()) + _number(2 << 3 | 5) + struct.pack("<f", score) + _field(3, kind)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    return _number(number << 3 | 2) + _number(len(value)) + value


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = number() if key & 7 == 2 else 4 if key & 7 == 5 else 8
        yield key >> 3, data[place : place + size]
        place += size
