"""P-Tuning v2 prefixes: the published code's numbers, and what is said of a folder that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmui.engine.chatglm_api import ChatGLM
from glmui.engine.decoders import ChatGLM2Decoder
from glmui.errors import ModelError
from glmui.glm.cache import KVCache
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import AnyModel, load_model
from glmui.glm.layout import mask
from glmui.glm.prefix import read_prefix
from tests import chatglm2_fixture
from tests.chatglm2_fixture import Folder
from tests.chatglm_fixture import copy_checkpoint

DATA = Path(__file__).parent / "data" / "ptuning"
TOLERANCE = 1e-4
VARIANTS = ("plain", "projection")
TRANS = "transformer.prefix_encoder.trans"
TABLE = "transformer.prefix_encoder.embedding.weight"

each = pytest.mark.parametrize(("variant", "kind"), [(v, k) for v in VARIANTS for k in ("fp16", "int4")])
Open = Callable[[str], AnyModel]


@pytest.fixture(scope="module")
def opened(tiny_chatglm: Callable[[str], Path]) -> Open:
    """A ChatGLM-6B by its kind, or "chatglm2", "chatglm3"."""

    def open_(kind: str) -> AnyModel:
        return load_model(tiny_chatglm(kind))

    return cache(open_)


@pytest.fixture(scope="module")
def opened2(tiny_chatglm2: Folder) -> Open:
    """A ChatGLM2 or 3 in float16 by its family, with the embedding of all ids that the goldens need."""

    def open_(family: str) -> AnyModel:
        model = load_model(tiny_chatglm2(family, "fp16"))
        more = load_file(DATA / "goldens" / "chatglm2_rows.safetensors")
        table: Any = model.get_submodule(model.EMBEDDING)
        table.weight.data[more["embedding_ids"].long()] = more["embedding_rows"].to(table.weight)
        return model

    return cache(open_)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def folder_of(variant: str, family: str = "chatglm") -> Path:
    return DATA / (f"prefix-{variant}" if family == "chatglm" else f"chatglm2-prefix-{variant}")


@cache
def goldens(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((DATA / "goldens" / f"{name}.json").read_text(encoding="utf-8"))
    return values


@cache
def numbers(name: str) -> dict[str, Tensor]:
    return load_file(DATA / "goldens" / f"{name}.safetensors")


def with_prefix(model: AnyModel, variant: str) -> AnyModel:
    model.prefix = read_prefix(folder_of(variant, model.config.family), model.config)
    return model


def hidden_columns(model: AnyModel, ids: Tensor, front: int) -> list[list[int]]:
    columns = ids.shape[1]
    seen = mask(model.layout(ids), 0, columns, columns, ids.device, front)
    assert seen is not None
    rows: list[list[int]] = (~seen[0, 0]).int().tolist()
    return rows


def check(model: AnyModel, case: dict[str, Any], slice_ids: list[int], logits_slice: Tensor) -> None:
    """Mask, cache, logits and greedy ids of one golden prompt."""
    assert model.prefix is not None
    ids = torch.tensor([case["input_ids"]])
    layout, kept = model.layout(ids), model.new_cache(ids.shape[1] - 2)
    rows = hidden_columns(model, ids, model.prefix.length)
    assert [1, 1, len(rows), len(rows[0])] == case["mask_shape"]
    assert case["mask_rows"] in (rows, None)  # the long ones are not written out
    kept.make_room(ids.shape[1])
    logits, best = model(ids, layout, kept, last_only=True)[0, 0], []
    assert (logits[slice_ids] - logits_slice).abs().max() < TOLERANCE
    assert logits[case["top20_ids"]].tolist() == pytest.approx(case["top20_logits"], abs=TOLERANCE)
    assert kept.length == len(case["input_ids"])
    for token in case["greedy_ids"]:
        best.append(int(logits.argmax()))
        kept.make_room(1)
        logits = model(torch.tensor([[token]]), layout, kept, last_only=True)[0, 0]
    assert best == case["greedy_ids"], case["name"]


@each
def test_published_numbers(opened: Open, variant: str, kind: str) -> None:
    model, golden = with_prefix(opened(kind), variant), goldens("model")
    cases = golden["variants"][variant]["models"][kind]["prompts"]
    assert len(cases) == 3
    for case in cases:
        check(
            model,
            case,
            golden["slice_ids"],
            numbers("model")[f"{variant}.{kind}.{case['name']}.logits_slice"],
        )
        positions = model.layout(torch.tensor([case["input_ids"]])).positions(0, len(case["input_ids"]))
        assert positions.tolist() == [case["position_ids"]]


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_numbers_of_chatglm2(opened2: Open, variant: str, family: str) -> None:
    """The published ChatGLM3 code gives the same with the same prefix."""
    model = opened2(family)
    model.prefix = read_prefix(folder_of(variant, "chatglm2"), opened2("chatglm2").config)
    slice_ids = chatglm2_fixture.goldens()["chatglm2"]["slice_ids"]
    cases = goldens("chatglm2")["variants"][variant]["prompts"]
    assert len(cases) == 3
    for case in cases:
        check(model, case, slice_ids, numbers("chatglm2")[f"{variant}.{case['name']}.logits_slice"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_keys_and_values(opened: Open, variant: str) -> None:
    prefix = read_prefix(folder_of(variant), opened("fp16").config)
    for part, entries in zip(("key", "value"), prefix.of(1), strict=True):
        published = numbers("model")[f"{variant}.layer1_prefix_{part}"]
        assert (entries.transpose(0, 1) - published).abs().max() < 1e-6


@each
def test_published_batch_padded_on_the_left(opened: Open, variant: str, kind: str) -> None:
    model, golden = with_prefix(opened(kind), variant), goldens("model")["variants"][variant]["models"][kind]
    by_name = {case["name"]: case["input_ids"] for case in golden["prompts"]}
    ids, pads = model.pad_left([by_name[name] for name in golden["batch"]["names"]])
    layout, kept = model.layout(ids, pads), model.new_cache(ids.shape[1] + 24)
    logits = model(ids, layout, kept, last_only=True)[:, 0]
    for step in range(len(golden["batch"]["generated"][0])):
        given = [row[step] for row in golden["batch"]["generated"]]
        assert logits.argmax(-1).tolist() == given
        logits = model(torch.tensor(given)[:, None], layout, kept, last_only=True)[:, 0]


# The Python API


@each
def test_published_chat(published_chatglm: Callable[[str], Path], variant: str, kind: str) -> None:
    lm = ChatGLM.from_pretrained(published_chatglm(kind), device="cpu", prefix=folder_of(variant))
    for case in goldens("model")["variants"][variant]["models"][kind]["prompts"]:
        history = [tuple(pair) for pair in case["history"]]
        how = {"max_length": case["chat_max_length"], "do_sample": False}
        response, _ = lm.chat(lm.tokenizer, case["query"], history, **how)
        assert response == case["chat_response"]


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_switching(tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Folder, family: str) -> None:
    """Any number of prefixes over one base, which stays as it is; what is kept of a conversation does not."""
    first = family == "chatglm"
    lm = ChatGLM.from_pretrained(
        tiny_chatglm("int4") if first else tiny_chatglm2(family, "int4"), device="cpu"
    )
    ids = [5, 74874, 130001, 130004] if first else [64790, 64792, 790, 30951]
    plain = lm.next_logits(ids)
    seen = []
    for variant in ("plain", "projection", "plain"):
        lm.use_prefix(folder_of(variant, family))
        seen.append(lm.next_logits(ids))
    assert torch.equal(seen[0], seen[2])
    assert (seen[0] - seen[1]).abs().max() > 0.01
    assert (seen[0] - plain).abs().max() > 0.01
    with pytest.raises(ModelError):
        lm.use_prefix(DATA)
    assert (lm.next_logits(ids) - seen[2]).abs().max() < TOLERANCE
    lm.use_prefix(None)
    assert torch.equal(lm.next_logits(ids), plain)


def test_the_kernels_attend_to_it(tiny_chatglm: Callable[[str], Path], opened: Open) -> None:
    """Prefill and steps of the engine's model, with and without the C kernels."""
    lm = ChatGLM.from_pretrained(tiny_chatglm("int4"), device="cpu", prefix=folder_of("plain"))
    plain = ChatGLM(with_prefix(opened("int4"), "plain"), lm.tokenizer)
    case = goldens("model")["variants"]["plain"]["models"]["int4"]["prompts"][2]
    assert lm.generate(case["input_ids"], 24) == plain.generate(case["input_ids"], 24) == case["greedy_ids"]


@pytest.mark.parametrize("kept", [None, torch.float16])
def test_a_cache_grows_and_is_cut_behind_it(opened: Open, kept: torch.dtype | None) -> None:
    model = with_prefix(opened("fp16"), "plain")
    prefix = model.prefix
    assert prefix is not None
    cache_ = KVCache(4, 3, kept, prefix)
    keys = torch.randn(2, 3, 2, 16)
    for layer in range(4):
        cache_.write(layer, 0, keys, keys)
    cache_.length = 3
    cache_.make_room(1000)
    cache_.trim(2)
    cache_.reorder(torch.tensor([1, 1]))
    for layer in range(4):
        for part, entries in zip(cache_.read(layer, 2), prefix.of(layer), strict=True):
            assert torch.equal(part[:, :, :8], entries.expand(2, -1, -1, -1).to(part))
            assert torch.equal(part[0, :, 8:], keys[1, :2].transpose(0, 1).to(part))
    assert (cache_.length, cache_.front, cache_.read(0, 2)[0].shape[2]) == (2, 8, 10)


def test_a_long_prompt_in_pieces(opened: Open, opened2: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, ids in ((opened("fp16"), [*[5] * 40, 130001, 130004]), (opened2("chatglm2"), [790] * 40)):
        with_prefix(model, "plain")
        whole = model(torch.tensor([ids]))
        with monkeypatch.context() as patch:
            patch.setattr(model, "piece", 7)
            assert (model(torch.tensor([ids])) - whole).abs().max() < TOLERANCE


def test_rounds_keep_what_was_read_after_it(opened2: Open) -> None:
    """ChatGLM2's cache between rounds: the prefix stays in front of what is kept."""
    model = with_prefix(opened2("chatglm2"), "plain")
    assert isinstance(model, ChatGLM2Model)
    kept = ChatGLM2Decoder(model)
    ids = [64790, 64792, 790, 30951, 517, 30910, 30939]
    for prompt in (ids[:4], ids, ids[:5]):
        fresh = ChatGLM2Decoder(model).prefill(prompt, lambda part: None)
        assert (kept.prefill(prompt, lambda part: None) - fresh).abs().max() < TOLERANCE


# Folders


def test_a_whole_model_with_a_prefix_of_its_own(tiny_chatglm: Callable[[str], Path], tmp_path: Path) -> None:
    """A fine-tune that saved all: its prefix is used, another one may be tried, and none brings it back."""
    folder = copy_checkpoint(tiny_chatglm("fp16"), tmp_path / "whole")
    shard = folder / "pytorch_model-00002-of-00002.bin"
    more = torch.load(shard, weights_only=True) | torch.load(
        folder_of("plain") / "pytorch_model.bin", weights_only=True
    )
    shard.unlink()
    torch.save(more, shard)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"][TABLE] = shard.name
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    values = json.loads((folder / "config.json").read_text()) | {"pre_seq_len": 8, "prefix_projection": False}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(values))
    lm = ChatGLM.from_pretrained(folder, device="cpu")
    base = ChatGLM.from_pretrained(tiny_chatglm("fp16"), device="cpu")
    ids = [5, 74874, 130001, 130004]
    without = base.next_logits(ids)
    base.use_prefix(folder)  # other weights in a prefix's folder are passed over
    assert torch.equal(lm.next_logits(ids), base.next_logits(ids))
    lm.use_prefix(folder_of("projection"))
    assert not torch.equal(lm.next_logits(ids), base.next_logits(ids))
    lm.use_prefix(None)
    assert torch.equal(lm.next_logits(ids), base.next_logits(ids))
    assert not torch.equal(lm.next_logits(ids), without)


def write(folder: Path, values: dict[str, Tensor], **config: Any) -> Path:
    """A prefix's folder, in safetensors."""
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    save_file(values, folder / "model.safetensors")
    return folder


def code_of(folder: Path, model: AnyModel) -> str:
    with pytest.raises(ModelError) as caught:
        read_prefix(folder, model.config)
    assert all(str(folder) in caught.value.message(language) for language in ("en", "zh"))
    return caught.value.code


def test_safetensors_without_a_config(opened: Open, tmp_path: Path) -> None:
    values = torch.load(folder_of("projection") / "pytorch_model.bin", weights_only=True)
    prefix = read_prefix(write(tmp_path, values), opened("fp16").config)
    assert torch.equal(prefix.entries, read_prefix(folder_of("projection"), opened("fp16").config).entries)


def test_of_another_model(opened: Open, opened2: Open, tmp_path: Path) -> None:
    assert code_of(folder_of("plain", "chatglm2"), opened("fp16")) == "prefix_other_model"
    assert code_of(folder_of("projection"), opened2("chatglm2")) == "prefix_other_model"
    assert code_of(folder_of("plain", "chatglm2"), opened2("chatglm3")) == "prefix_other_model"
    for variant in VARIANTS:  # without the config that tells
        mine = torch.load(folder_of(variant, "chatglm2") / "pytorch_model.bin", weights_only=True)
        assert code_of(write(tmp_path, mine), opened("fp16")) == "prefix_shape"


def test_of_other_layers(opened: Open, tmp_path: Path) -> None:
    values = json.loads((folder_of("plain") / "config.json").read_text()) | {"num_layers": 6}
    folder = write(tmp_path, {TABLE: torch.zeros(8, 6 * 64)}, **values)
    assert code_of(folder, opened("fp16")) == "prefix_other_layers"
    (folder / "config.json").unlink()
    assert code_of(folder, opened("fp16")) == "prefix_shape"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({}, "prefix_not_one"),
        ({"transformer.final_layernorm.weight": torch.ones(32)}, "prefix_not_one"),
        ({TABLE: torch.zeros(0, 256)}, "prefix_shape"),
        ({TABLE: torch.zeros(256)}, "prefix_shape"),
        ({TABLE: torch.zeros(8, 256), f"{TRANS}.0.bias": torch.zeros(32)}, "prefix_shape"),
        ({f"{TRANS}.0.bias": torch.zeros(32)}, "prefix_shape"),
        ({TABLE: torch.zeros(8, 256, dtype=torch.int8)}, "model_not_finite"),
        ({TABLE: torch.full((8, 256), float("nan"))}, "model_not_finite"),
    ],
)
def test_tensors_that_do_not_fit(opened: Open, tmp_path: Path, values: dict[str, Tensor], code: str) -> None:
    assert code_of(write(tmp_path, values), opened("int4")) == code


def test_not_a_prefix(opened: Open, tmp_path: Path) -> None:
    model = opened("fp16")
    assert code_of(tmp_path / "nowhere", model) == "model_no_folder"
    assert code_of(tmp_path, model) == "prefix_not_one"
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02evil")
    assert code_of(tmp_path, model) == "model_file_old"
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert code_of(tmp_path, model) == "model_lfs_pointer"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert code_of(tmp_path, model) == "prefix_is_adapter"
