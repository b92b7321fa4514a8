"""Tiny ChatGLM-6B folders in the published layouts, put together from tests/data/chatglm once a session.

The three checkpoints (FP16, INT8, INT4) share their embedding, which is stored once. The goldens beside
them were made by the published code; where they came from stands in docs/model.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.reference import reference
from tests.small_vocabulary import small_vocabulary

DATA = Path(__file__).parent / "data" / "chatglm"
KINDS = ("fp16", "int8", "int4")
EMBEDDING = "transformer.word_embeddings.weight"


@pytest.fixture(scope="session")
def tiny_chatglm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint by its kind, with a small vocabulary. Read only: copy it to damage it."""

    @cache
    def folder(kind: str) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(f"tiny-{kind}"), kind, small_vocabulary())

    return folder


@pytest.fixture(scope="session")
def published_chatglm(
    tmp_path_factory: pytest.TempPathFactory, tiny_chatglm: Callable[[str], Path]
) -> Callable[[str], Path]:
    """The same with the published vocabulary; skips where that is not at hand."""

    @cache
    def folder(kind: str) -> Path:
        vocabulary = reference("ice_text.model")
        made = tmp_path_factory.mktemp(f"published-{kind}")
        copy_checkpoint(tiny_chatglm(kind), made)
        (made / "ice_text.model").unlink()
        shutil.copyfile(vocabulary, made / "ice_text.model")
        return made

    return folder


def write_checkpoint(folder: Path, kind: str, vocabulary: bytes) -> Path:
    """Write a published folder: two shards and an index for fp16, one file for the others, all .bin."""
    import torch

    state = tensors(kind)
    head = state[EMBEDDING]
    if kind == "fp16":
        shards = {"pytorch_model-00001-of-00002.bin": state}
        shards["pytorch_model-00002-of-00002.bin"] = {"lm_head.weight": head}
        names = {name: file for file, shard in shards.items() for name in shard}
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": names})
        )
    else:
        shards = {"pytorch_model.bin": {**state, "lm_head.weight": head}}
    for file, shard in shards.items():
        torch.save(shard, folder / file)
    (folder / "config.json").write_text(json.dumps(config(kind)))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "ice_text.model").write_bytes(vocabulary)
    return folder


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A copy of a folder to change: files are linked, so replace them, never write into them."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)
    return target


def tensors(kind: str) -> dict[str, Any]:
    """A checkpoint's tensors by their published names, lm_head left out."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(DATA / "layers.safetensors", framework="pt") as layers:
        mine = [name for name in layers.keys() if name.startswith(f"{kind}/")]  # noqa: SIM118
        state = {name.removeprefix(f"{kind}/"): layers.get_tensor(name) for name in mine}
    return load_file(DATA / "embedding.safetensors") | state


def config(kind: str) -> dict[str, Any]:
    """A checkpoint's config.json."""
    values: dict[str, Any] = json.loads((DATA / "configs.json").read_text(encoding="utf-8"))[kind]
    return values


def goldens() -> dict[str, Any]:
    """What the published code answered: per kind, 13 prompts and a batch."""
    values: dict[str, Any] = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))
    return values


# As published: it names Python code in the folder, which must not be needed.
TOKENIZER_CONFIG = {
    "name_or_path": "THUDM/chatglm-6b",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
