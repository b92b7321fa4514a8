"""quantize_folder: the published bytes, and never half a result."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glmui
from glmui.errors import InvalidInput, ModelError
from glmui.glm.checkpoint import load_model
from glmui.quant import QuantizedEmbedding, QuantizedLinear, packing
from glmui.quantizing import new_folder
from glmui.quantizing.folder import folder_bytes, open_source, quantize_folder
from glmui.quantizing.tensor_file import TensorFile, form_of
from glmui.quantizing.tensor_header import file_bytes
from glmui.types import Progress
from tests.chatglm_fixture import config, copy_checkpoint, goldens, tensors
from tests.reference import reference

Tiny = Callable[[str], Path]
DENSE = "transformer.layers.1.attention.dense"
EMBEDDING = "transformer.word_embeddings"


@pytest.fixture(scope="module")
def int4(tiny_chatglm: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quantised") / "int4"
    quantize_folder(tiny_chatglm("fp16"), made, 4)
    return made


@pytest.fixture
def writable(tiny_chatglm: Tiny, tmp_path: Path) -> Path:
    return copy_checkpoint(tiny_chatglm("fp16"), tmp_path / "source")


def as_safetensors(folder: Path, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Make the folder's checkpoint one .safetensors file."""
    for old in [*folder.glob("*.bin"), *folder.glob("*.index.json")]:
        old.unlink()
    state = {name: change(tensor).contiguous() for name, tensor in tensors("fp16").items()}
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_published_bytes_and_config(tiny_chatglm: Tiny, tmp_path: Path, bits: int) -> None:
    made, told = tmp_path / "made", list[Progress]()
    quantize_folder(tiny_chatglm("fp16"), made, bits, on_progress=told.append)
    found, published = load_file(made / "model.safetensors"), tensors(f"int{bits}")
    assert found.keys() == published.keys()
    for name, tensor in published.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert json.loads((made / "config.json").read_text()) == config(f"int{bits}")
    assert sorted(f.name for f in made.iterdir()) == [
        "config.json", "ice_text.model", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    with safe_open(made / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [p.fraction for p in told] == sorted(p.fraction or 0 for p in told)
    assert (told[-1].fraction, told[-1].done) == (1.0, told[-1].total)


def test_it_answers_as_the_published_one(int4: Path) -> None:
    lm = glmui.ChatGLM.from_pretrained(int4, device="cpu")
    for case in goldens()["models"]["int4"]["prompts"][:4]:
        assert lm.generate(case["input_ids"], max_new_tokens=16) == case["greedy_ids"][:16], case["name"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_single_safetensors_of_either_precision(writable: Path, int4: Path, dtype: torch.dtype) -> None:
    as_safetensors(writable, lambda tensor: tensor.to(dtype))
    quantize_folder(writable, writable.parent / "made", 4)
    found = load_file(writable.parent / "made" / "model.safetensors")
    assert all(
        torch.equal(found[name], tensor) for name, tensor in load_file(int4 / "model.safetensors").items()
    )


def test_bfloat16_becomes_what_others_open(writable: Path) -> None:
    as_safetensors(writable, lambda tensor: tensor.bfloat16())
    quantize_folder(writable, writable.parent / "made", 8)
    found = load_file(writable.parent / "made" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.int8, torch.float16}


def weight(folder: Path, name: str = DENSE) -> Tensor:
    """What a quantised layer of the folder stands for."""
    layer = load_model(folder).get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    values = layer.weight, layer.weight_scale, layer.weight_bit_width
    return packing.dequantize_weight(*values, layer.in_features, torch.float32)


def test_finer_groups_are_nearer_and_say_so(tiny_chatglm: Tiny, tmp_path: Path, int4: Path) -> None:
    whole = tensors("fp16")[f"{DENSE}.weight"].float()
    errors = [(weight(int4) - whole).norm()]
    for size in (16, 8):
        made = tmp_path / f"g{size}"
        quantize_folder(tiny_chatglm("fp16"), made, 4, group_size=size)
        assert json.loads((made / "config.json").read_text())["quantization_group_size"] == size
        errors.append((weight(made) - whole).norm())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_embeddings_too(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    made = tmp_path / "qe"
    quantize_folder(tiny_chatglm("fp16"), made, 4, quantization_embeddings=True)
    found = load_file(made / "model.safetensors")
    stored, scale = packing.quantize_weight(tensors("fp16")[f"{EMBEDDING}.weight"], 4)
    assert torch.equal(found[f"{EMBEDDING}.weight"], stored)
    assert torch.equal(found[f"{EMBEDDING}.weight_scale"], scale)
    assert json.loads((made / "config.json").read_text())["quantization_embeddings"] is True
    model = load_model(made)
    assert isinstance(model.transformer.word_embeddings, QuantizedEmbedding)
    assert model(torch.tensor([[5, 20, 130001, 130004]])).isfinite().all()


def test_each_layer_may_have_its_own_bits(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    source, made = tiny_chatglm("fp16"), tmp_path / "mixed"
    opened = open_source(source)
    bits = opened.uniform(4) | {DENSE: 16, "transformer.layers.0.mlp.dense_4h_to_h": 8}
    quantize_folder(source, made, bits)
    values = json.loads((made / "config.json").read_text())
    assert values["quantization_bit"] == 4
    assert values["quantization_bits"] == {DENSE: 16, "transformer.layers.0.mlp.dense_4h_to_h": 8}
    model = glmui.ChatGLM.from_pretrained(made, device="cpu").model
    assert isinstance(model.get_submodule(DENSE), nn.Linear)
    assert torch.equal(model.get_parameter(f"{DENSE}.weight"), tensors("fp16")[f"{DENSE}.weight"].float())
    assert sum(file.stat().st_size for file in made.iterdir()) == folder_bytes(opened, bits)


def refusal(source: Path, target: Path, bits: int = 4, **wish: Any) -> str:
    before = sorted(target.parent.iterdir()) if target.parent.is_dir() else None
    with pytest.raises((InvalidInput, ModelError)) as caught:
        quantize_folder(source, target, bits, **wish)
    assert (sorted(target.parent.iterdir()) if target.parent.is_dir() else None) == before
    message = caught.value.message()
    assert "{" not in message
    return caught.value.code


def test_what_cannot_be_is_refused_and_nothing_left(
    writable: Path, tiny_chatglm: Tiny, tmp_path: Path
) -> None:
    target = tmp_path / "made"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert refusal(tiny_chatglm("int4"), target) == "model_quantised_already"
    assert refusal(tmp_path / "nowhere", target) == "model_no_folder"
    assert refusal(tmp_path / "full", target) == "model_file_missing"
    assert refusal(writable, target, 3) == "bits_unknown"
    assert refusal(writable, target, group_size=7) == "group_size_does_not_fit"
    assert refusal(writable, target, group_size=0) == "group_size_does_not_fit"
    assert refusal(writable, writable / "made") == "target_in_source"
    assert refusal(writable, writable) == "target_in_source"
    assert refusal(writable, tmp_path / "full") == "target_not_empty"
    assert refusal(writable, tmp_path / "full" / "thesis.txt") == "target_not_empty"
    assert refusal(writable, tmp_path / "no" / "made") == "target_no_parent"
    (writable / "pytorch_model-00002-of-00002.bin").unlink()
    assert refusal(writable, target) == "model_file_missing"


def test_an_empty_folder_may_be_filled(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    quantize_folder(tiny_chatglm("fp16"), tmp_path / "made", 8)
    assert (tmp_path / "made" / "model.safetensors").is_file()
    assert [f.name for f in tmp_path.iterdir()] == ["made"]


def test_broken_numbers_are_noticed_on_the_way(writable: Path) -> None:
    def damage(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if tensor.shape == (128, 32):
            tensor[5, 7] = float("nan")
        return tensor

    as_safetensors(writable, damage)
    assert refusal(writable, writable.parent / "made") == "model_not_finite"


def test_a_full_disk_is_noticed_before_and_while_writing(
    tiny_chatglm: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorFile, name: str, tensor: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TensorFile, "write", full)
        assert refusal(tiny_chatglm("fp16"), tmp_path / "made") == "target_unwritable"
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda folder: type("U", (), {"free": 10**6}))
    assert refusal(tiny_chatglm("fp16"), tmp_path / "made") == "target_no_space"


def test_stopping_leaves_nothing(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if (progress.fraction or 0) > 0.999:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(tiny_chatglm("fp16"), tmp_path / "made", 4, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def stuck(source: Path, target: Path, there: Connection) -> None:
    """Quantises in a process of its own, and stops halfway for ever."""

    def wait(progress: Progress) -> None:
        there.send("halfway")
        there.recv()

    quantize_folder(source, target, 4, on_progress=wait)


def test_a_kill_leaves_no_result_and_the_next_run_tidies_up(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    target = tmp_path / "made[1]"
    process = spawn.Process(target=stuck, args=(tiny_chatglm("fp16"), target, there), daemon=True)
    process.start()
    assert here.recv() == "halfway"
    [half] = tmp_path.iterdir()
    assert half.name.startswith(".")
    new_folder.sweep(target)
    assert half.is_dir()  # its process lives
    process.kill()
    process.join()
    assert not target.exists()
    quantize_folder(tiny_chatglm("fp16"), target, 4)
    assert list(tmp_path.iterdir()) == [target]


def test_only_whole_folders_get_the_name(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not written"),
        new_folder.new_folder(tmp_path / "made", 0) as made,
        TensorFile(made / "model.safetensors", {"a": ("I8", (2, 2))}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_written_as_told_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    state = {
        "bytes": torch.arange(3, dtype=torch.int8),
        "turned": torch.arange(6).half().view(3, 2).T,
        "wide": torch.randn(5),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "one": torch.tensor(7),
    }
    forms = {name: form_of(tensor) for name, tensor in state.items()}
    with TensorFile(file, forms) as opened:
        for name, tensor in reversed(state.items()):
            opened.write(name, tensor)
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert file.stat().st_size == file_bytes(forms)
    for name, tensor in (("one", torch.zeros(4)), ("two", torch.tensor(7))):
        told = pytest.raises(ValueError, match="was told as")
        with told, TensorFile(file, {"one": forms["one"]}) as opened:
            opened.write(name, tensor)


def chatglm2(kind: str, folder: Path) -> Path:
    """A tiny published ChatGLM2; skips where that is not at hand."""
    found = reference(f"chatglm2/tiny-{kind}/config.json").parent
    shutil.copytree(found, folder, copy_function=shutil.copyfile)
    shutil.copyfile(reference("chatglm2-chatglm3.tokenizer.model"), folder / "tokenizer.model")
    return folder


def test_chatglm2_gets_its_published_bytes_too(tmp_path: Path) -> None:
    source, published = chatglm2("fp16", tmp_path / "fp16"), reference("chatglm2/tiny-int4/pytorch_model.bin")
    quantize_folder(source, tmp_path / "made", 4)
    found = load_file(tmp_path / "made" / "model.safetensors")
    expected = torch.load(published, weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made == json.loads((published.parent / "config.json").read_text())
    assert refusal(source, tmp_path / "qe", quantization_embeddings=True) == "embeddings_stay"
