"""Which model a folder holds, told from its files; and wrong folders, said in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmui.bench.random_model import chatglm2_pieces, vocabulary
from glmui.choice import Choice
from glmui.engine.families import family_of
from glmui.errors import ModelError
from glmui.glm.config import GLM2Config, GLMConfig, read_config
from glmui.settings import Settings
from glmui.text import open_counter
from glmui.types import Message
from tests.chatglm2_fixture import Folder, configs
from tests.chatglm_fixture import copy_checkpoint
from tests.small_vocabulary import small_vocabulary


def write(folder: Path, change: dict[str, Any], template: bool = False) -> Path:
    """config.json of ChatGLM2's shape that says no more than `change` of which of the two it is."""
    values = {**configs("chatglm2")["config"], "_name_or_path": "", "seq_length": 4096, **change}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    template_values = {"chat_template": "{{ x }}"} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(template_values))
    return folder


@pytest.mark.parametrize(
    ("change", "template", "family"),
    [
        ({}, True, "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm2-6b", "seq_length": 32768}, True, "chatglm3"),
        ({"_name_or_path": "x/chatglm3-6b-32k", "seq_length": 32768, "rope_ratio": 50}, False, "chatglm3"),
        ({"_name_or_path": "x/chatglm2-6b-32k", "seq_length": 32768, "rope_ratio": 16}, False, "chatglm2"),
        ({"seq_length": 8192}, False, "chatglm3"),
        ({"seq_length": 32768}, False, "chatglm2"),
    ],
)
def test_told_from_the_files(tmp_path: Path, change: dict[str, Any], template: bool, family: str) -> None:
    folder = tmp_path / "chatglm-6b"  # a name tells nothing
    folder.mkdir()
    config = read_config(write(folder, change, template))
    assert isinstance(config, GLM2Config)
    assert config.family == family
    assert config.rope_ratio == change.get("rope_ratio", 1)


@pytest.mark.parametrize("change", [{}, {"seq_length": 32768, "rope_ratio": 50}])
def test_a_doubt_is_asked(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path, change)
    with pytest.raises(ModelError) as caught:
        read_config(folder)
    assert caught.value.code == "model_family_in_doubt"
    for family in ("chatglm2", "chatglm3"):
        assert read_config(folder, family).family == family


def test_a_doubtful_folder_can_be_chosen_and_then_explained(tiny_chatglm2: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm2("chatglm3", "int4"), tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    write(folder, {"quantization_bit": 4})
    assert family_of(folder) == "chatglm"
    choice = Choice(Settings(data_dir=tmp_path))
    assert not choice.in_doubt()
    choice.change(model=str(folder))
    assert choice.in_doubt()
    with pytest.raises(ModelError) as caught:
        choice.check()
    assert caught.value.code == "model_family_in_doubt"
    choice.change(chatglm_family="chatglm3")
    choice.check()
    assert choice.in_doubt(), "the question stays, for another answer"
    counts = [open_counter(folder, family)([Message("user", "hi")]) for family in ("chatglm2", "chatglm3")]
    assert counts[0] > counts[1]  # its prompt has words of its own


def test_the_first_chatglm_stays_itself(tiny_chatglm: Callable[[str], Path]) -> None:
    assert isinstance(read_config(tiny_chatglm("int4")), GLMConfig)


@pytest.mark.parametrize(
    "change",
    [
        {"multi_query_attention": False},
        {"add_bias_linear": True},
        {"tie_word_embeddings": True},
        {"multi_query_group_num": 3},
        {"multi_query_group_num": None},
        {"kv_channels": 6},
        {"kv_channels": 0},
        {"padded_vocab_size": "65024"},
        {"rope_ratio": -1},
        {"rope_ratio": "50"},
        {"quantization_bit": 3},
    ],
)
def test_values_no_model_has_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(write(tmp_path, change, template=True))
    assert caught.value.code == "model_config_bad"
    assert next(iter(change)) in caught.value.message()


def test_another_vocabulary_in_a_chatglm_folder(tiny_chatglm: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm("int4"), tmp_path / "model")
    (folder / "ice_text.model").unlink()
    (folder / "ice_text.model").write_bytes(vocabulary(chatglm2_pieces()))
    said = said_by(folder)
    assert "ChatGLM2-6B" in said
    assert "ChatGLM-6B" in said
    assert "ice_text.model" in said


def test_a_chatglm_vocabulary_in_a_chatglm3_folder(tiny_chatglm2: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm2("chatglm3", "int4"), tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").write_bytes(small_vocabulary())
    said = said_by(folder)
    assert "ChatGLM-6B" in said
    assert "ChatGLM3-6B" in said


def said_by(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_counter(folder)
    assert caught.value.code == "model_other_vocabulary"
    assert str(folder) in caught.value.message("zh")
    return caught.value.message("en")


def test_no_vocabulary_and_a_damaged_one(tiny_chatglm2: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm2("chatglm2", "int4"), tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ModelError) as caught:
        family_of(folder)
    assert caught.value.code == "model_no_vocabulary"
    assert "tokenizer.model" in caught.value.message()
    shutil.copyfile(folder / "config.json", folder / "tokenizer.model")
    with pytest.raises(ModelError) as caught:
        open_counter(folder)
    assert caught.value.code == "model_wrong_vocabulary"


def test_weights_of_the_other_model_are_listed(
    tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Folder, tmp_path: Path
) -> None:
    from glmui.glm.checkpoint import load_model

    folder = copy_checkpoint(tiny_chatglm2("chatglm2", "int4"), tmp_path / "model")
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin").hardlink_to(tiny_chatglm("int4") / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert caught.value.code == "model_tensors"
