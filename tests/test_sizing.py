"""memory/sizing.py: what is foretold of glmui's own folders, prefixes and adapters is what they take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glmui import ChatGLM
from glmui.engine import chatglm_api
from glmui.engine.placement import placement
from glmui.glm.adapter import read_adapter
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.glm.config import AnyConfig, read_config
from glmui.glm.prefix import read_prefix
from glmui.memory.forecast import forecast
from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.sizing import adapter_numbers, forms_of, prefix_entries, size_of
from glmui.meter import Reading
from glmui.quantizing.folder import open_source, quantize_folder
from glmui.types import EngineSpec
from tests.chatglm2_fixture import Folder

GIB = 2**30
FREE = Reading((), 4 * GIB, 16 * GIB, None, "")
PREFIXES = Path(__file__).parent / "data" / "ptuning"

Tiny = Callable[[str], Path]


@pytest.fixture(params=["chatglm", "chatglm2"])
def source(request: pytest.FixtureRequest, tiny_chatglm: Tiny, tiny_chatglm2: Folder) -> Path:
    """A tiny float16 folder."""
    return tiny_chatglm("fp16") if request.param == "chatglm" else tiny_chatglm2("chatglm2", "fp16")


def spec_of(folder: Path, **others: Any) -> EngineSpec:
    return EngineSpec("tiny", str(folder), device=CPU, **others)


def sized(folder: Path, **others: Any) -> ModelSize:
    return size_of(spec_of(folder, **others), read_config(folder, "chatglm2"))


def loaded(folder: Path) -> AnyModel:
    return load_model(folder, everything_on(CPU, torch.float32), family="chatglm2")


def held(model: AnyModel) -> list[int]:
    """Bytes of each block."""
    blocks = model.get_submodule(model.BLOCKS).children()
    return [sum(tensor.nbytes for tensor in block.parameters()) for block in blocks]


def foretold(size: ModelSize) -> list[int]:
    return [size.layer_bytes(CPU, layer) for layer in range(size.layers)]


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_columns_have_scales_of_their_own(source: Path, tmp_path: Path, bits: int) -> None:
    made = tmp_path / "made"
    quantize_folder(source, made, bits, group_size=16)
    assert foretold(sized(made)) == held(loaded(made))
    assert sized(made).layer_bytes(CPU) > ModelSize.of(read_config(made, "chatglm2")).layer_bytes(CPU)


def test_so_has_a_table_that_is_quantised(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    made = tmp_path / "made"
    quantize_folder(tiny_chatglm("fp16"), made, 4, group_size=16, quantization_embeddings=True)
    model, size = loaded(made), sized(made)
    table = sum(tensor.nbytes for tensor in model.get_submodule(model.EMBEDDING).parameters())
    norm = 2 * size.width * 4
    assert table <= size.head_bytes(CPU, 16) - norm <= table + 2 * size.table_scales, "scales may be widened"


@pytest.mark.parametrize("group_size", [None, 16])
def test_layers_that_keep_more_bits_count_as_they_are(
    source: Path, tmp_path: Path, group_size: int | None
) -> None:
    opened, made = open_source(source), tmp_path / "made"
    bits = opened.uniform(4)
    first, *_, last = bits
    quantize_folder(source, made, bits | {first: 8, last: 16}, group_size)
    size = sized(made)
    assert foretold(size) == held(loaded(made))
    assert len(set(foretold(size))) > 1
    stored = sum(
        tensor.nbytes
        for name, tensor in loaded(made).named_parameters()
        if tensor.dtype == torch.int8 and ".layers." in name
    )
    assert size.mapped_bytes(size.layers, False, 16) == stored


def test_strange_words_about_bits_change_nothing() -> None:
    odd = {"quantization_bits": {"x": 8, "transformer.layers.1.mlp.dense": 5}, "quantization_group_size": "8"}
    assert forms_of(odd) == forms_of({}) == forms_of({"quantization_bits": [8]})


def write_adapter(folder: Path, model: AnyModel, parts: tuple[str, ...], rank: int = 4) -> Path:
    """A LoRA of these parts of every layer."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if ".layers." in name and name.rpartition(".")[2] in parts:
            layer: Any = module
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(rank, layer.in_features)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(layer.out_features, rank)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(parts)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("parts", [("query_key_value",), ("dense", "dense_h_to_4h", "dense_4h_to_h")])
def test_an_adapter_takes_what_was_foretold(source: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    model = loaded(source)
    folder = write_adapter(tmp_path / "adapter", model, parts)
    adapter = read_adapter(folder, model)
    took = sum(half.numel() for pair in adapter.pairs.values() for half in pair)
    assert adapter_numbers(folder, model.config) * model.config.num_layers == took
    plain, beside = sized(source), sized(source, adapter=str(folder))
    assert sum(foretold(beside)) - sum(foretold(plain)) == 4 * took
    assert beside.adapted


def prefix_of(config: AnyConfig) -> Path:
    return PREFIXES / ("prefix-plain" if config.family == "chatglm" else "chatglm2-prefix-plain")


def test_a_prefix_takes_what_was_foretold(source: Path) -> None:
    config = read_config(source, "chatglm2")
    folder = prefix_of(config)
    prefix = read_prefix(folder, config)
    assert prefix_entries(folder, config) == prefix.length
    model = loaded(source)
    model.prefix = prefix
    room = model.new_cache(100).take(0, torch.zeros(1), 1, config.kv_heads, config.head_size)
    size = sized(source, prefix=str(folder))
    assert room.keys.nbytes + room.values.nbytes == size.cache_bytes(CPU, 100, "fp32")
    assert size.scratch_bytes(CPU, 100, "fp16", 50) > sized(source).scratch_bytes(CPU, 100, "fp16", 50)


def test_a_prefix_without_a_config_counts_as_its_file_may_hold(source: Path, tmp_path: Path) -> None:
    config = read_config(source, "chatglm2")
    shutil.copy(prefix_of(config) / "pytorch_model.bin", tmp_path)
    assert read_prefix(tmp_path, config).length <= prefix_entries(tmp_path, config) <= 128


def test_a_prefix_in_the_models_own_weights_counts(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_chatglm("int4"), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pre_seq_len": 9}))
    assert sized(folder).front == 9
    assert sized(folder, prefix=str(PREFIXES / "prefix-plain")).front != 9


def test_engine_and_app_foretell_the_same_of_them(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    folder = tiny_chatglm("int4")
    adapter = write_adapter(tmp_path / "adapter", loaded(folder), ("query_key_value",))
    spec = spec_of(folder, prefix=str(PREFIXES / "prefix-plain"), adapter=str(adapter))
    found, plain = forecast(spec, FREE), forecast(spec.base, FREE)
    assert found
    assert plain
    assert found.plan.ram > plain.plan.ram
    made = placement(spec, read_config(folder)).plan
    assert made
    assert made.on == found.plan.on


def test_the_python_api_plans_for_them_too(
    tiny_chatglm: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, planned = tiny_chatglm("fp16"), []
    adapter = write_adapter(tmp_path / "adapter", loaded(folder), ("query_key_value",))
    prefix = PREFIXES / "prefix-plain"
    monkeypatch.setattr(chatglm_api, "placement", lambda *how: planned.append(placement(*how)) or planned[-1])
    wishes: list[dict[str, Any]] = [{}, {"prefix": prefix}, {"adapter": adapter}]
    wishes += [{"bits": 4}, {"bits": 4, "adapter": adapter}]
    for wish in wishes:
        ChatGLM.from_pretrained(folder, device=CPU, **wish)
    plain, in_front, beside, smaller, merged = (found.plan.ram for found in planned)
    assert plain < in_front
    assert plain < beside
    assert smaller == merged, "an adapter in the weights takes nothing"


def test_what_cannot_be_read_counts_as_none(source: Path, tmp_path: Path) -> None:
    config = read_config(source, "chatglm2")
    for folder in (tmp_path, tmp_path / "gone", source):
        assert adapter_numbers(folder, config) == 0
    assert prefix_entries(tmp_path / "gone", config) == 0
    spec = spec_of(source, prefix=str(tmp_path), adapter=str(tmp_path / "gone"))
    assert size_of(spec, config) == size_of(replace(spec, prefix="", adapter=""), config)
