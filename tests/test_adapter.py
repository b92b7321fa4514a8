"""LoRA adapters: against W + scale B A computed here, and what is said of one that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from glmui.engine.chatglm_api import ChatGLM
from glmui.engine.loaded import with_kernels
from glmui.errors import GlmuiError, InvalidInput, ModelError
from glmui.glm import adapter as adapter_module
from glmui.glm.adapter import attach, read_adapter
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.quant import QuantizedLinear
from glmui.quant.fast import KernelLinear
from glmui.quant.packing import dequantize_weight
from tests.chatglm2_fixture import Folder

MODELS = [(family, kind) for family in ("chatglm", "chatglm2", "chatglm3") for kind in ("fp16", "int4")]
each = pytest.mark.parametrize(("family", "kind"), MODELS)

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "r": 4,
    "target_modules": ["query_key_value"],
    "use_dora": False,
    "use_rslora": False,
}
INSIDE = {
    "chatglm": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "chatglm2": (
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ),
}
IDS = [[5, 74874, 130001, 130004]]

Where = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def where(tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Folder) -> Where:
    return lambda family, kind: tiny_chatglm(kind) if family == "chatglm" else tiny_chatglm2(family, kind)


@pytest.fixture(scope="module")
def opened(where: Where) -> Callable[[str, str], AnyModel]:
    return cache(lambda family, kind: load_model(where(family, kind)))


def layers_of(model: AnyModel, parts: int = 4) -> list[str]:
    inside = INSIDE["chatglm" if model.config.family == "chatglm" else "chatglm2"][:parts]
    return [f"{model.BLOCKS}.{n}.{part}" for n in range(model.config.num_layers) for part in inside]


def halves(model: AnyModel, layers: list[str], rank: int = 4) -> dict[str, Tensor]:
    """Random A and B for these layers by PEFT's names, large enough to change every answer."""
    made = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        base: Any = model.get_submodule(layer)
        name = f"base_model.model.{layer}.lora"
        tensors[f"{name}_A.weight"] = torch.randn(rank, base.in_features, generator=made) / 8
        tensors[f"{name}_B.weight"] = torch.randn(base.out_features, rank, generator=made) / 8
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **values: Any) -> Path:
    """An adapter's folder as PEFT saves it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | values))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def changed(model: AnyModel, tensors: dict[str, Tensor], scale: float) -> AnyModel:
    """The model with every weight W + scale B A, all in float32 and none quantised."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = dequantize_weight(
                layer.weight, layer.weight_scale, layer.weight_bit_width, layer.in_features, torch.float32
            )
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            plain.register_parameter("bias", layer.bias)
            model.set_submodule(name, plain)
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        whole: Any = model.get_submodule(name.removeprefix("base_model.model."))
        added = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] * scale
        whole.weight = torch.nn.Parameter(whole.weight + added, requires_grad=False)
    return model


def logits(model: AnyModel) -> Tensor:
    ids = IDS if model.config.family == "chatglm" else [[64790, 64792, 790, 30951]]
    with torch.inference_mode():
        found: Tensor = model(torch.tensor(ids))
        return found


@each
def test_the_answer_is_that_of_the_changed_weights(
    opened: Callable[[str, str], AnyModel], where: Where, tmp_path: Path, family: str, kind: str
) -> None:
    model = opened(family, kind)
    before, tensors = logits(model), halves(model, layers_of(model))
    handles = attach(model, read_adapter(write(tmp_path, tensors), model))
    after = logits(model)
    for handle in handles:
        handle.remove()
    reference = logits(changed(load_model(where(family, kind)), tensors, scale=8))
    assert (after - reference).abs().max() < 1e-3
    assert (after - before).abs().max() > 0.1
    assert torch.equal(logits(model), before)


def test_rslora_has_another_scale(
    opened: Callable[[str, str], AnyModel], where: Where, tmp_path: Path
) -> None:
    model = opened("chatglm", "fp16")
    tensors = halves(model, layers_of(model, 1))
    handles = attach(model, read_adapter(write(tmp_path, tensors, use_rslora=True), model))
    after = logits(model)
    for handle in handles:
        handle.remove()
    reference = logits(changed(load_model(where("chatglm", "fp16")), tensors, scale=16))
    assert (after - reference).abs().max() < 1e-3


def test_beside_the_kernels(where: Where, tmp_path: Path) -> None:
    plain, fast = (load_model(where("chatglm3", "int4")) for _ in range(2))
    loaded = with_kernels(fast, "cpu", 1, "exact")
    if loaded is None or loaded.kernels is None:
        pytest.skip("no kernels can be built here")
    assert isinstance(fast.get_submodule(layers_of(fast)[0]), KernelLinear)
    folder = write(tmp_path, halves(plain, layers_of(plain)))
    for model in (plain, fast):
        attach(model, read_adapter(folder, model))
    assert (logits(plain) - logits(fast)).abs().max() < 1e-3


def test_half_precision_computes_in_its_own(where: Where, tmp_path: Path) -> None:
    wide = load_model(where("chatglm2", "fp16"))
    half = load_model(where("chatglm2", "fp16"), everything_on("cpu", torch.float16))
    folder = write(tmp_path, halves(wide, layers_of(wide), rank=2), r=2, lora_alpha=1)
    for model in (wide, half):
        attach(model, read_adapter(folder, model))
    assert logits(half).dtype == torch.float16
    assert (logits(wide) - logits(half)).abs().max() < 0.5


def test_a_bin_and_peft_s_older_names(where: Where, tmp_path: Path) -> None:
    model = load_model(where("chatglm2", "int4"))
    tensors = halves(model, layers_of(model, 1))
    folder = write(tmp_path / "new", tensors)
    older = write(tmp_path / "old", tensors)
    (older / "adapter_model.safetensors").unlink()
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    torch.save(named, older / "adapter_model.bin")
    pairs = [read_adapter(each, model).pairs for each in (folder, older)]
    for layer in pairs[0]:
        assert all(torch.equal(a, b) for a, b in zip(pairs[0][layer], pairs[1][layer], strict=True))


# The Python API


@pytest.mark.parametrize("family", ["chatglm", "chatglm3"])
def test_switching(where: Where, tmp_path: Path, family: str) -> None:
    """Any number of adapters over one base, which stays as it is; what is kept of a conversation does not."""
    lm = ChatGLM.from_pretrained(where(family, "int4"), device="cpu")
    folders = []
    for number in (1, 2):
        tensors = halves(lm.model, layers_of(lm.model, number))
        folders.append(write(tmp_path / str(number), tensors))
    ids = IDS[0] if family == "chatglm" else [64790, 64792, 790, 30951]
    base = lm.next_logits(ids)
    seen = []
    for folder in (*folders, folders[0]):
        lm.use_adapter(folder)
        seen.append(lm.next_logits(ids))
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1], atol=0.01)
    at_once = ChatGLM.from_pretrained(where(family, "int4"), device="cpu", adapter=folders[1])
    assert torch.equal(at_once.next_logits(ids), seen[1])
    lm.use_adapter(None)
    assert torch.equal(lm.next_logits(ids), base)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_merged_before_quantising(where: Where, tmp_path: Path, family: str) -> None:
    folder = where(family, "fp16")
    whole = load_model(folder)
    tensors = halves(whole, layers_of(whole))
    adapter = write(tmp_path, tensors)
    lm = ChatGLM.from_pretrained(folder, device="cpu", bits=8, adapter=adapter)
    near = logits(changed(whole, tensors, scale=8))
    assert (logits(lm.model) - near).abs().max() < 1
    assert not any(module._forward_hooks for module in lm.model.modules())
    lm.use_adapter(adapter)
    with pytest.raises(InvalidInput, match="cannot be taken out"):
        lm.use_adapter(None)


def test_merging_is_exact(where: Where, tmp_path: Path) -> None:
    """In float32, then rounded to the file's float16, then quantised: the bytes of just that."""
    from glmui.quant.packing import quantize_weight

    folder, layer = where("chatglm2", "fp16"), "transformer.encoder.layers.1.mlp.dense_h_to_4h"
    half = load_model(folder, everything_on("cpu", None))
    tensors = halves(half, [layer])
    lm = ChatGLM.from_pretrained(folder, device="cpu", bits=4, adapter=write(tmp_path, tensors))
    base: Any = half.get_submodule(layer)
    a, b = (
        tensors[f"base_model.model.{layer}.lora_A.weight"],
        tensors[f"base_model.model.{layer}.lora_B.weight"],
    )
    stored, _ = quantize_weight((base.weight.float() + 8 * b @ a).half(), 4, wide=False)
    merged = lm.model.get_submodule(layer)
    if isinstance(merged, QuantizedLinear):  # no kernels here, which keep another order
        assert torch.equal(merged.weight, stored)


# What does not fit


def code_of(folder: Path, model: AnyModel) -> str:
    with pytest.raises(ModelError) as caught:
        read_adapter(folder, model)
    assert str(folder) in caught.value.message("en")
    assert str(folder) in caught.value.message("zh")
    return caught.value.code


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"peft_type": "IA3"}, "adapter_kind"),
        ({"use_dora": True}, "adapter_setting"),
        ({"bias": "all"}, "adapter_setting"),
        ({"fan_in_fan_out": True}, "adapter_setting"),
        ({"modules_to_save": ["lm_head"]}, "adapter_setting"),
        ({"init_lora_weights": "pissa"}, "adapter_setting"),
        ({"alpha_pattern": {"dense": 8}}, "adapter_setting"),
        ({"r": 0}, "adapter_setting"),
        ({"lora_alpha": None}, "adapter_setting"),
        ({"r": 8}, "adapter_shape"),
        ({"base_model_name_or_path": "THUDM/chatglm2-6b"}, "adapter_other_model"),
    ],
)
def test_settings_that_are_not_computed(
    opened: Callable[[str, str], AnyModel], tmp_path: Path, values: dict[str, Any], code: str
) -> None:
    model = opened("chatglm3", "int4")
    assert code_of(write(tmp_path, halves(model, layers_of(model, 1)), **values), model) == code


def test_settings_that_change_nothing(opened: Callable[[str, str], AnyModel], tmp_path: Path) -> None:
    model = opened("chatglm3", "int4")
    values = {
        "init_lora_weights": "gaussian",
        "rank_pattern": {},
        "base_model_name_or_path": "/x/chatglm3-6b",
    }
    assert read_adapter(write(tmp_path, halves(model, layers_of(model, 1)), **values), model).pairs


def test_of_another_model(opened: Callable[[str, str], AnyModel], tmp_path: Path) -> None:
    one, two = opened("chatglm", "int4"), opened("chatglm2", "int4")
    for theirs, mine in ((one, two), (two, one)):
        folder = write(tmp_path / mine.config.family, halves(theirs, layers_of(theirs)))
        assert code_of(folder, mine) == "adapter_other_model"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (".layers.2.", ".layers.30.", "adapter_other_layers"),
        ("query_key_value", "dense", "adapter_shape"),
        ("lora_B", "lora_magnitude_vector", "adapter_tensor"),
        ("self_attention.query_key_value", "input_layernorm", "adapter_tensor"),
        (
            "transformer.encoder.layers.2.self_attention.query_key_value",
            "transformer.output_layer",
            "adapter_tensor",
        ),
        (
            ".layers.2.self_attention.query_key_value.lora_A",
            ".layers.2.mlp.dense_4h_to_h.lora_A",
            "adapter_shape",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    opened: Callable[[str, str], AnyModel], tmp_path: Path, old: str, new: str, code: str
) -> None:
    model = opened("chatglm2", "int4")
    tensors = {name.replace(old, new): tensor for name, tensor in halves(model, layers_of(model, 1)).items()}
    assert code_of(write(tmp_path, tensors), model) == code


def test_not_an_adapter(opened: Callable[[str, str], AnyModel], where: Where, tmp_path: Path) -> None:
    model = opened("chatglm", "int4")
    assert code_of(tmp_path / "nowhere", model) == "model_no_folder"
    assert code_of(where("chatglm", "fp16"), model) == "adapter_not_one"
    folder = write(tmp_path, {})
    assert code_of(folder, model) == "adapter_not_one"
    (folder / "adapter_model.safetensors").unlink()
    assert code_of(folder, model) == "adapter_not_one"
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02evil")
    assert code_of(folder, model) == "model_file_old"
    (folder / "adapter_config.json").write_text("[]")
    assert code_of(folder, model) == "model_file_broken"


def test_broken_numbers(opened: Callable[[str, str], AnyModel], tmp_path: Path) -> None:
    model = opened("chatglm", "int4")
    tensors = halves(model, layers_of(model, 1))
    next(iter(tensors.values()))[0, 0] = float("nan")
    assert code_of(write(tmp_path, tensors), model) == "model_not_finite"


def test_a_refused_adapter_changes_nothing(where: Where, tmp_path: Path) -> None:
    lm = ChatGLM.from_pretrained(where("chatglm2", "fp16"), device="cpu")
    lm.use_adapter(write(tmp_path / "good", halves(lm.model, layers_of(lm.model, 1))))
    ids = [64790, 64792, 790, 30951]
    before = lm.next_logits(ids)
    with pytest.raises(GlmuiError):
        lm.use_adapter(write(tmp_path / "bad", {}, peft_type="LOHA"))
    assert (lm.next_logits(ids) - before).abs().max() < 1e-4


def test_no_room_for_the_last_of_it_leaves_the_old_one_whole(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of an adapter must never answer."""
    lm = ChatGLM.from_pretrained(where("chatglm", "int4"), device="cpu")
    lm.use_adapter(write(tmp_path / "old", halves(lm.model, layers_of(lm.model, 1))))
    ids = [5, 20, 130001, 130004]
    before = lm.next_logits(ids)
    names = layers_of(lm.model)
    inner, new = adapter_module._norm_of, write(tmp_path / "new", halves(lm.model, names))

    def full(model: AnyModel, layer: str) -> Tensor:
        if layer == names[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(model, layer)

    monkeypatch.setattr(adapter_module, "_norm_of", full)
    with pytest.raises(torch.OutOfMemoryError):
        lm.use_adapter(new)
    assert torch.equal(lm.next_logits(ids), before)
    monkeypatch.undo()
    lm.use_adapter(new)  # and it is not taken for the one in use
    assert not torch.equal(lm.next_logits(ids), before)
    lm.use_adapter(None)
    assert all(not layer._forward_hooks for layer in lm.model.modules())
