"""Random models of ChatGLM-6B's size in the formats of its neighbours, all weights in q4_0.

q4_0 (of ggml): 32 weights of a row make a block of 18 bytes, a float16 scale and 16 bytes of two weights.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

import numpy as np

from glmui.bench.random_model import chatglm_pieces, tensors_of, vocabulary
from glmui.glm.config import GLMConfig

F32, Q4_0 = 0, 2  # ggml's numbers of the types
BLOCK, BLOCK_BYTES = 32, 18


def q4_0(rows: int, columns: int) -> np.ndarray[Any, Any]:
    """A matrix as bytes [rows, columns / 32 * 18], its values about as large as real weights are."""
    source = np.random.default_rng(6)
    pool = np.empty(1 << 14, dtype=[("scale", "<f2"), ("weights", "u1", 16)])
    pool["scale"] = 0.005
    pool["weights"] = source.integers(0, 256, (len(pool), 16))
    blocks = np.resize(pool, rows * columns // BLOCK)
    return blocks.view(np.uint8).reshape(rows, columns // BLOCK * BLOCK_BYTES)


def write_ggml(file: Path, config: GLMConfig) -> int:
    """ChatGLM-6B for chatglm.cpp 0.4 (its convert.py tells the layout). Bytes that decoding a token reads."""
    words = vocabulary(chatglm_pieces())
    shape = (config.vocab_size, config.hidden_size, config.num_attention_heads, config.num_attention_heads)
    header = (2, Q4_0, *shape, config.num_layers, config.inner_hidden_size, config.layernorm_epsilon, 0, 1e4)
    ends = config.max_sequence_length, config.eos_token_id, config.pad_token_id
    read = 0
    with file.open("wb") as out:
        out.write(b"ggml" + struct.pack("<i", 1) + struct.pack("<iiiiiiiififiii", *header, *ends))
        out.write(struct.pack("<i", len(words)) + words)
        for name, dtype, wanted in tensors_of(config):
            if dtype == "I8":
                wanted = wanted[0], wanted[1] * 8 // config.quantization_bit
            if not name.endswith("weight_scale"):
                read += _write_tensor(out, name, wanted)
    return read


def _write_tensor(out: IO[bytes], name: str, shape: tuple[int, ...]) -> int:
    matrix = len(shape) == 2
    data = q4_0(*shape) if matrix else np.full(shape, float(name.endswith("layernorm.weight")), "<f4")
    out.write(struct.pack("<i", len(name)) + name.encode())
    out.write(struct.pack(f"<{len(shape) + 2}i", len(shape), *shape, Q4_0 if matrix else F32))
    out.write(b"\0" * (-out.tell() % 16))
    out.write(data.tobytes())
    return data.nbytes


def write_gguf(file: Path, config: GLMConfig) -> int:
    """A Llama of equal size for llama.cpp. Bytes that decoding a token reads.

    A Llama's MLP has three matrices where ChatGLM's has two, so its inner size is two thirds.
    """
    from gguf import GGUFWriter

    inner = config.inner_hidden_size * 2 // 3 // BLOCK * BLOCK
    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_vocab_size(config.vocab_size)
    _add_words(writer, config.vocab_size)
    read = _add_tensors(writer, config, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _add_words(writer: Any, count: int) -> None:
    """A vocabulary that opens: <unk>, <s>, </s>, the 256 bytes, then made-up words."""
    normal, unknown, control, byte = 1, 2, 3, 6
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    kinds = [unknown, control, control, *[byte] * 256]
    words += [f"w{n}" for n in range(len(words), count)]
    kinds += [normal] * (count - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * count)
    writer.add_token_types(kinds)


def _add_tensors(writer: Any, config: GLMConfig, inner: int) -> int:
    """The output head is the embedding, as in ChatGLM."""
    from gguf import GGMLQuantizationType

    width, read = config.hidden_size, 0
    shapes = {f"attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    made = {shape: q4_0(*shape) for shape in {*shapes.values(), (config.vocab_size, width)}}
    norm = np.ones(width, np.float32)
    matrices = {"token_embd": (config.vocab_size, width)}
    norms = ["output_norm"]
    for layer in range(config.num_layers):
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    for name, shape in matrices.items():
        writer.add_tensor(f"{name}.weight", made[shape], raw_dtype=GGMLQuantizationType.Q4_0)
        read += made[shape].nbytes
    for name in norms:
        writer.add_tensor(f"{name}.weight", norm)
        read += norm.nbytes
    return read
