"""The C kernels inside a model: the same numbers, chosen by themselves, told of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glmui.engine import loaded
from glmui.engine.causal_lm import open_causal_lm
from glmui.engine.chatglm import open_chatglm
from glmui.engine.chatglm_api import ChatGLM
from glmui.engine.loaded import kernel_folder
from glmui.glm.checkpoint import load_model
from glmui.quant import QuantizedLinear, fast
from glmui.quant.fast import KernelHead, KernelLinear, use_kernels
from glmui.quant.kernels.cpu import Kernels, Loaded, load
from glmui.quant.mapped import release
from glmui.types import EngineSpec, GenerationParams, Message
from tests.tiny_llama import make_tiny_llama

IDS = [5, 300, 301, 302, 303, 304]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load(kernel_folder(), threads=2)
    if found.kernels is None:
        pytest.skip(f"no kernels on this machine: {found.reason}")
    return found.kernels


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize(("numerics", "error"), [("exact", 1e-4), ("balanced", 5e-3), ("fast", 0.5)])
def test_a_model_with_kernels_says_the_same(
    tiny_chatglm: Callable[[str], Path], kernels: Kernels, name: str, numerics: str, error: float
) -> None:
    model = load_model(tiny_chatglm(name))
    ids = torch.tensor([[*IDS, model.config.gmask_token_id, model.config.bos_token_id]])
    with torch.inference_mode():
        before = model(ids)
        use_kernels(model, kernels, numerics)  # type: ignore[arg-type]
        after = model(ids)
    swapped = [m for m in model.modules() if isinstance(m, KernelLinear)]
    assert len(swapped) == 4 * model.config.num_layers
    assert isinstance(model.lm_head, KernelHead)
    assert (before - after).abs().max() < error


def test_the_head_can_be_eight_bits(tiny_chatglm: Callable[[str], Path], kernels: Kernels) -> None:
    model = load_model(tiny_chatglm("int4"))
    ids = torch.tensor([[*IDS, model.config.gmask_token_id, model.config.bos_token_id]])
    with torch.inference_mode():
        before = model(ids, last_only=True)
        use_kernels(model, kernels, "exact", head_bits=8)
        after = model(ids, last_only=True)
    assert isinstance(model.lm_head, KernelLinear)
    assert 0 < (before - after).abs().max() < 0.05 * before.abs().max()
    table = model.transformer.word_embeddings.weight
    assert torch.equal(table, load_model(tiny_chatglm("int4")).transformer.word_embeddings.weight)


def test_the_engine_uses_kernels_and_tells_which(
    tiny_chatglm: Callable[[str], Path], kernels: Kernels
) -> None:
    spec = EngineSpec("tiny", str(tiny_chatglm("int4")), device="cpu", cpu_precision="exact")
    engine = open_chatglm(spec, lambda progress: None)
    assert (engine.info().kernel, engine.info().cpu_precision) == (kernels.name, "exact")
    chunks = list(engine.stream_chat([Message("user", "hello")], GenerationParams(max_new_tokens=4), "1"))
    assert chunks[-1].usage is not None


def test_without_kernels_torch_answers_and_the_reason_is_told(
    tiny_chatglm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "load_kernels", lambda *_: Loaded(None, "reasons.kernels_not_built"))
    engine = open_chatglm(EngineSpec("tiny", str(tiny_chatglm("int4")), device="cpu"), lambda progress: None)
    assert (engine.info().kernel, engine.info().reason) == ("", "reasons.kernels_not_built")
    chunks = list(engine.stream_chat([Message("user", "hello")], GenerationParams(max_new_tokens=4), "1"))
    assert chunks[-1].finish_reason is not None


def test_the_python_api_stays_exact_in_float32(tiny_chatglm: Callable[[str], Path], kernels: Kernels) -> None:
    folder: Path = tiny_chatglm("int4")
    reference = load_model(folder)
    lm = ChatGLM.from_pretrained(folder, device="cpu", dtype="float32")
    ids = [*IDS, reference.config.gmask_token_id, reference.config.bos_token_id]
    with torch.inference_mode():
        expected = reference(torch.tensor([ids]))[0, -1]
    assert (lm.next_logits(ids) - expected).abs().max() < 1e-4


def test_released_pages_come_back_from_the_file_and_others_keep_their_values(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1 << 20, dtype=torch.int32)}, tmp_path / "w.bin")
    mapped = torch.load(tmp_path / "w.bin", mmap=True, weights_only=True)["w"]
    ordinary = torch.arange(1 << 20, dtype=torch.int32)
    for tensor in (mapped, ordinary):
        total = int(tensor.sum())
        release(tensor)
        assert int(tensor.sum()) == total


def test_a_packed_model_does_not_stay_in_memory_twice(
    tiny_chatglm: Callable[[str], Path], kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    monkeypatch.setattr(fast, "release", lambda tensor: released.append(tensor.nbytes))
    model = load_model(tiny_chatglm("int4"))
    stored = sum(m.weight.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    use_kernels(model, kernels, "exact")
    assert sum(released) == stored
    assert not [m for m in model.modules() if isinstance(m, QuantizedLinear)]


def test_a_quantised_transformers_model_uses_them_too(tmp_path: Path, kernels: Kernels) -> None:
    folder = make_tiny_llama(tmp_path / "tiny")
    spec = EngineSpec("tiny", str(folder), device="cpu", quantize="int8")
    engine = open_causal_lm(spec, lambda progress: None)
    assert engine.info().kernel == kernels.name
    chunks = list(engine.stream_chat([Message("user", "hello")], GenerationParams(max_new_tokens=4), "1"))
    assert chunks[-1].usage is not None
