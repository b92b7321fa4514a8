"""Tiny ChatGLM2-6B and ChatGLM3-6B folders in the published layouts, put together from tests/data/chatglm2.

Both have the same weights, as the reference data has them; of the embedding only the rows that the goldens
need are kept. The goldens were made by the published code; where they came from stands in docs/model.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from glmui.bench.random_model import chatglm2_pieces, vocabulary
from tests.chatglm_fixture import copy_checkpoint
from tests.reference import reference

DATA = Path(__file__).parent / "data" / "chatglm2"
FAMILIES = ("chatglm2", "chatglm3")
KINDS = ("fp16", "int4")
EMBEDDING = "transformer.embedding.word_embeddings.weight"
HEAD = "transformer.output_layer.weight"

Folder = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def tiny_chatglm2(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folder of a tiny checkpoint by family and kind, with a made-up vocabulary. Read only: copy it to
    damage it."""

    @cache
    def folder(family: str, kind: str) -> Path:
        made = tmp_path_factory.mktemp(f"tiny-{family}-{kind}")
        return write_checkpoint(made, family, kind, vocabulary(chatglm2_pieces()))

    return folder


@pytest.fixture(scope="session")
def published_chatglm2(tmp_path_factory: pytest.TempPathFactory, tiny_chatglm2: Folder) -> Folder:
    """The same with the published vocabulary; skips where that is not at hand."""

    @cache
    def folder(family: str, kind: str) -> Path:
        pieces = reference("chatglm2-chatglm3.tokenizer.model")
        made = copy_checkpoint(
            tiny_chatglm2(family, kind), tmp_path_factory.mktemp(f"published-{family}-{kind}")
        )
        (made / "tokenizer.model").unlink()
        shutil.copyfile(pieces, made / "tokenizer.model")
        return made

    return folder


def write_checkpoint(folder: Path, family: str, kind: str, pieces: bytes) -> Path:
    """Write a published folder: three shards and an index for fp16, one file for int4, all .bin."""
    import torch

    state = tensors(kind)
    state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4, dtype=torch.float16)
    if kind == "fp16":
        files = [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
        shard_of = dict.fromkeys(state, files[1]) | {EMBEDDING: files[0], HEAD: files[2]}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    else:
        shard_of = dict.fromkeys(state, "pytorch_model.bin")
    for file in set(shard_of.values()):
        torch.save({name: tensor for name, tensor in state.items() if shard_of[name] == file}, folder / file)
    for name in ("config", "tokenizer_config"):
        (folder / f"{name}.json").write_text(json.dumps(configs(family, kind)[name]))
    (folder / "tokenizer.model").write_bytes(pieces)
    return folder


def tensors(kind: str) -> dict[str, Any]:
    """A checkpoint's tensors by their published names."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(DATA / "layers.safetensors", framework="pt") as layers:
        mine = [name for name in layers.keys() if name.startswith(f"{kind}/")]  # noqa: SIM118
        state = {name.removeprefix(f"{kind}/"): layers.get_tensor(name) for name in mine}
    tables = load_file(DATA / "tables.safetensors")
    embedding = torch.zeros_like(tables["head"])
    embedding[tables["embedding_ids"].long()] = tables["embedding_rows"]
    return {EMBEDDING: embedding, **state, HEAD: tables["head"]}


def configs(family: str, kind: str = "fp16") -> dict[str, dict[str, Any]]:
    """{"config": …, "tokenizer_config": …} as published."""
    values: dict[str, Any] = json.loads((DATA / "configs.json").read_text(encoding="utf-8"))[family]
    if kind == "int4":
        values["config"]["quantization_bit"] = 4
    return values


@cache
def goldens() -> dict[str, Any]:
    """What the published code answered, by family."""
    values: dict[str, Any] = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
    return values
