"""Opening published folders, whole and damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glmui.engine.families import family_of
from glmui.errors import ModelError
from glmui.glm.checkpoint import everything_on, is_finite, load_model, published_name, read_folder
from glmui.glm.files import look_at
from glmui.quant import QuantizedEmbedding, QuantizedLinear
from glmui.quant.packing import quantize_weight
from tests.chatglm_fixture import EMBEDDING as TABLE
from tests.chatglm_fixture import KINDS, copy_checkpoint, tensors

IDS = torch.tensor([[5, 20, 130001, 130004]])
NORM = "transformer.layers.0.input_layernorm.weight"

Folder = Callable[[str], Path]


@pytest.fixture
def copied(tiny_chatglm: Folder, tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own to damage."""
    return cache(lambda kind: copy_checkpoint(tiny_chatglm(kind), tmp_path / kind))


def logits(folder: Path, **how: Any) -> Tensor:
    with torch.inference_mode():
        answer: Tensor = load_model(folder, **how)(IDS)
        return answer


def replace(file: Path, content: bytes | str) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def rewrite(folder: Path, kind: str, **changes: Tensor | None) -> Path:
    """The folder again as one .bin, some tensors changed, dropped (None) or added."""
    state = {**tensors(kind), **{name: value for name, value in changes.items() if value is not None}}
    state = {name: value for name, value in state.items() if name not in changes or changes[name] is not None}
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


# What may differ between folders


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_are_the_same_model(tiny_chatglm: Folder, copied: Folder, kind: str) -> None:
    folder = copied(kind)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    save_file(tensors(kind), folder / "model.safetensors")
    assert torch.equal(logits(folder), logits(tiny_chatglm(kind)))


def test_sharded_safetensors(tiny_chatglm: Folder, copied: Folder) -> None:
    folder, state = copied("int8"), tensors("int8")
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, mine in parts.items():
        save_file({name: state[name] for name in mine}, folder / file)
    index = {"weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(folder), logits(tiny_chatglm("int8")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float_dtype_is_taken(tiny_chatglm: Folder, copied: Folder, dtype: torch.dtype) -> None:
    floats = {name: t.to(dtype) for name, t in tensors("int4").items() if t.is_floating_point()}
    other = logits(rewrite(copied("int4"), "int4", **floats))
    tolerance = 1e-5 if dtype == torch.float32 else 1.0
    assert (other - logits(tiny_chatglm("int4"))).abs().max() < tolerance


def test_the_embedding_wins_over_the_files_head(tiny_chatglm: Folder, copied: Folder) -> None:
    other = {"lm_head.weight": torch.zeros(130528, 32, dtype=torch.float16)}
    assert torch.equal(logits(rewrite(copied("int4"), "int4", **other)), logits(tiny_chatglm("int4")))


def test_unknown_config_keys_are_ignored(tiny_chatglm: Folder, copied: Folder) -> None:
    folder = copied("int4")
    values = json.loads((folder / "config.json").read_text())
    replace(folder / "config.json", json.dumps({**values, "brand_new": {"x": 1}}))
    assert torch.equal(logits(folder), logits(tiny_chatglm("int4")))


def test_a_quantised_embedding_is_the_head_too(copied: Folder) -> None:
    """As the release int4-qe has it, with or without lm_head in the file."""
    stored, scale = quantize_weight(tensors("int4")[TABLE], 4)
    extra = {
        TABLE: stored,
        f"{TABLE}_scale": scale,
        "lm_head.weight": stored,
        "lm_head.weight_scale": scale,
    }
    folder = rewrite(copied("int4"), "int4", **extra)
    model = load_model(folder)
    assert isinstance(model.transformer.word_embeddings, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    with_head = logits(folder)
    del extra["lm_head.weight"], extra["lm_head.weight_scale"]
    assert torch.equal(logits(rewrite(folder, "int4", **extra)), with_head)


# Memory


def test_weights_that_fit_are_the_mapped_file(tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: dict[str, Tensor] = {}

    def remember(folder: Path) -> dict[str, Tensor]:
        mapped.update(read_folder(folder))
        return dict(mapped)

    monkeypatch.setattr("glmui.glm.checkpoint.read_folder", remember)
    values = load_model(tiny_chatglm("int4")).state_dict()
    as_stored = [
        name for name in values if name in mapped and values[name].data_ptr() == mapped[name].data_ptr()
    ]
    assert len(as_stored) == 1 + 16  # the embedding in float16, and the packed weights
    assert values[TABLE].dtype == torch.float16
    assert values["transformer.layers.0.mlp.dense_h_to_4h.weight_scale"].dtype == torch.float32


@pytest.mark.parametrize(("bits", "kind"), [(4, "int4"), (8, "int8")])
def test_quantising_while_loading_is_the_published_checkpoint(
    tiny_chatglm: Folder, bits: int, kind: str
) -> None:
    parts: list[float] = []
    model = load_model(tiny_chatglm("fp16"), bits=bits, on_progress=parts.append)
    published = read_folder(tiny_chatglm(kind))
    mine = model.state_dict()
    for name in [n for n in published if n.endswith("weight_scale")]:
        weight = name.replace("weight_scale", "weight")
        assert torch.equal(mine[weight], published[weight]), name
        assert torch.equal(mine[name], published[name].float()), name
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_dtype_and_place_are_asked_for_each_tensor(tiny_chatglm: Folder) -> None:
    def place(name: str) -> tuple[torch.device, torch.dtype]:
        return torch.device("cpu"), torch.bfloat16 if "layers.3" in name else torch.float32

    model = load_model(tiny_chatglm("fp16"), place)
    assert model.transformer.layers[3].mlp.dense_h_to_4h.weight.dtype == torch.bfloat16
    assert model.transformer.layers[2].mlp.dense_h_to_4h.weight.dtype == torch.float32
    with torch.inference_mode():
        assert (model(IDS) - logits(tiny_chatglm("fp16"))).abs().max() < 1.0


def test_as_stored(tiny_chatglm: Folder) -> None:
    model = load_model(tiny_chatglm("fp16"), everything_on("cpu", None))
    assert model.transformer.layers[0].mlp.dense_h_to_4h.weight.dtype == torch.float16
    assert model.transformer.layers[0].input_layernorm.weight.dtype == torch.float32


# Damage: one clear sentence each


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    for language in ("en", "zh"):
        sentence = caught.value.message(language)
        assert "{" not in sentence
        assert sentence[-1] in ".。"
        assert "\n" not in sentence
    return caught.value


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _wrong_type(folder: Path) -> None:
    replace(folder / "config.json", json.dumps({"model_type": "llama"}))


def _not_json(folder: Path) -> None:
    replace(folder / "config.json", "{")


def _no_sizes(folder: Path) -> None:
    replace(folder / "config.json", json.dumps({"model_type": "chatglm"}))


def _mad_sizes(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    replace(folder / "config.json", json.dumps({**values, "num_layers": -1}))


def _chatglm2(folder: Path) -> None:
    values = {"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "multi_query_attention": True}
    values["_name_or_path"] = "THUDM/chatglm2-6b"
    replace(folder / "config.json", json.dumps(values))


def _missing_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def _cut_shard(folder: Path) -> None:
    file = folder / "pytorch_model-00001-of-00002.bin"
    content = file.read_bytes()
    replace(file, content[: len(content) // 2])


def _pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    replace(folder / "pytorch_model-00001-of-00002.bin", pointer)


def _web_page(folder: Path) -> None:
    replace(folder / "pytorch_model-00001-of-00002.bin", "\n<!DOCTYPE html><title>404</title>")


def _empty_file(folder: Path) -> None:
    replace(folder / "pytorch_model-00001-of-00002.bin", b"")


def _old_pickle(folder: Path) -> None:
    torch.save({}, folder / "x", _use_new_zipfile_serialization=False)
    replace(folder / "pytorch_model-00001-of-00002.bin", (folder / "x").read_bytes())


def _program(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    torch.save({"weight": _Program()}, folder / "pytorch_model-00001-of-00002.bin")


def _not_tensors(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    torch.save({"weight": "text"}, folder / "pytorch_model-00001-of-00002.bin")


def _index_out_of_the_folder(folder: Path) -> None:
    replace(folder / "pytorch_model.bin.index.json", json.dumps({"weight_map": {"x": "../secret.bin"}}))


def _no_weights(folder: Path) -> None:
    for file in folder.glob("pytorch_model*"):
        file.unlink()


class _Program:
    def __reduce__(self) -> Any:
        return os.system, ("echo must not run > ran",)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_no_config, "model_file_missing"),
        (_wrong_type, "model_type_unknown"),
        (_not_json, "model_file_broken"),
        (_no_sizes, "model_config_bad"),
        (_mad_sizes, "model_config_bad"),
        (_chatglm2, "model_config_bad"),
        (_missing_shard, "model_file_missing"),
        (_cut_shard, "model_file_cut"),
        (_pointer, "model_lfs_pointer"),
        (_web_page, "model_file_page"),
        (_empty_file, "model_file_cut"),
        (_old_pickle, "model_file_old"),
        (_program, "model_file_refused"),
        (_not_tensors, "model_file_refused"),
        (_index_out_of_the_folder, "model_file_broken"),
        (_no_weights, "model_no_weights"),
    ],
)
def test_damaged_folders(
    copied: Folder, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], code: str
) -> None:
    folder = copied("fp16")
    monkeypatch.chdir(folder)
    damage(folder)
    assert refused(folder).code == code
    assert not (folder / "ran").exists()
    if damage not in (_wrong_type, _program, _not_tensors):  # the last two show once opened
        with pytest.raises(ModelError) as caught:
            family_of(folder)
        assert caught.value.code == code


def test_a_folder_is_looked_at_without_torch(tiny_chatglm: Folder) -> None:
    code = (
        "import sys; from glmui.engine.families import family_of; "
        "assert family_of(sys.argv[1]) == 'chatglm'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_chatglm("fp16"))], check=True)


def test_a_safetensors_header_may_look_like_markup(copied: Folder) -> None:
    """Its first byte is the low one of a length: any value."""
    (copied("int4") / "model.safetensors").write_bytes(b"<" + bytes(7) + b"{}")
    look_at(copied("int4") / "model.safetensors")


def test_no_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").code == "model_no_folder"


def test_cut_safetensors(copied: Folder) -> None:
    folder = copied("int4")
    (folder / "pytorch_model.bin").unlink()
    save_file(tensors("int4"), folder / "whole")
    content = (folder / "whole").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])
    assert refused(folder).code == "model_file_cut"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({NORM: None}, f"missing {NORM}"),
        ({"transformer.extra": torch.zeros(1)}, "unexpected transformer.extra"),
        ({NORM: torch.zeros(33)}, f"{NORM} is [33], not [32]"),
        ({NORM: torch.zeros(32, dtype=torch.int8)}, f"{NORM} is torch.int8"),
        ({"transformer.layers.0.mlp.dense_h_to_4h.weight_scale": None}, "missing"),
        (
            {"transformer.layers.0.mlp.dense_h_to_4h.weight": torch.zeros(128, 7, dtype=torch.int8)},
            "[128, 7]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    copied: Folder, change: dict[str, Tensor | None], problem: str
) -> None:
    error = refused(rewrite(copied("int4"), "int4", **change))
    if "weight_scale" in next(iter(change)):  # then the weight looks like a float layer's, of a wrong dtype
        problem = "weight is"
    assert error.code == "model_tensors"
    assert problem in error.message()


@pytest.mark.parametrize("name", [NORM, TABLE, "transformer.layers.2.mlp.dense_4h_to_h.weight_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copied: Folder, name: str, value: float) -> None:
    broken = tensors("int4")[name].clone()
    broken.view(-1)[-1] = value
    error = refused(rewrite(copied("int4"), "int4", **{name: broken}))
    assert error.code == "model_not_finite"
    assert name in error.message()


def test_is_finite_does_not_overflow() -> None:
    assert is_finite(torch.full((4, 4), 60000.0, dtype=torch.float16))
    assert is_finite(torch.tensor(1.0))


def test_names() -> None:
    assert published_name("lm_head.weight") is None
    assert published_name("transformer.layers.0.attention.rotary_emb.inv_freq") is None
    assert published_name(NORM) == NORM


def test_what_was_copied_leaves_the_files_pages(
    tiny_chatglm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[Tensor] = []
    monkeypatch.setattr("glmui.glm.checkpoint.release", released.append)
    monkeypatch.setattr("glmui.glm.checkpoint._WORTH_RELEASING", 0)
    load_model(tiny_chatglm("int4"), everything_on("cpu", None))
    assert released == []
    model = load_model(tiny_chatglm("fp16"), everything_on("cpu", torch.float32))
    kept = {parameter.data_ptr() for parameter in model.parameters()}
    blocks = model.get_submodule(model.BLOCKS)
    matrices = [parameter.shape for parameter in blocks.parameters() if parameter.dim() == 2]
    assert [tensor.shape for tensor in released if tensor.dim() == 2] == matrices
    assert all(tensor.data_ptr() not in kept for tensor in released)


def test_scales_are_not_rounded_to_bfloat16(tiny_chatglm: Callable[[str], Path]) -> None:
    model = load_model(tiny_chatglm("int4"), everything_on("cpu", torch.bfloat16))
    stored = load_model(tiny_chatglm("int4"), everything_on("cpu", None))
    for (name, mine), theirs in zip(model.named_parameters(), stored.parameters(), strict=True):
        if name.endswith("weight_scale"):
            assert torch.equal(mine, theirs)
        elif theirs.is_floating_point():
            assert mine.dtype == torch.bfloat16
