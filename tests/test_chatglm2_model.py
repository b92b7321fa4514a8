"""ChatGLM2's and 3's network, against the published code's numbers and against itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glmui.engine.decoders import ChatGLM2Decoder
from glmui.glm.chatglm2 import ChatGLM2Model
from glmui.glm.checkpoint import everything_on, load_model, read_folder
from glmui.glm.config import GLM2Config
from glmui.glm.rotary import pair_table, rotate_pairs
from glmui.quant import QuantizedLinear
from glmui.quant.packing import quantize_weight
from tests.chatglm2_fixture import DATA, FAMILIES, KINDS, Folder, goldens

TOLERANCE = 1e-4
FULL = GLM2Config("chatglm3", 65024, 4096, 13696, 128, 28, 32, 2, seq_length=8192)

each = pytest.mark.parametrize(("family", "kind"), [(f, k) for f in FAMILIES for k in KINDS])
Open = Callable[[str, str], ChatGLM2Model]


@pytest.fixture(scope="module")
def opened(tiny_chatglm2: Folder) -> Open:
    def open_(family: str, kind: str) -> ChatGLM2Model:
        model = load_model(tiny_chatglm2(family, kind))
        assert isinstance(model, ChatGLM2Model)
        return model

    return cache(open_)


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return load_file(DATA / "goldens.safetensors")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def golden(family: str, kind: str) -> dict[str, Any]:
    values: dict[str, Any] = goldens()[family]["models"][kind]
    return values


def prompts(family: str, kind: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = golden(family, kind)["prompts"]
    return cases


@each
def test_published_logits_and_greedy_ids(
    opened: Open, numbers: dict[str, Tensor], family: str, kind: str
) -> None:
    model = opened(family, kind)
    assert len(prompts(family, kind)) == 9
    for case in prompts(family, kind):
        ids = torch.tensor([case["input_ids"]])
        layout, cache = model.layout(ids), model.new_cache(ids.shape[1] + 24)
        logits, best = model(ids, layout, cache, last_only=True)[0, 0], []
        found = logits[goldens()[family]["slice_ids"]]
        assert (found - numbers[f"{family}.{kind}.{case['name']}.logits"]).abs().max() < TOLERANCE
        for token in case["greedy_ids"]:
            best.append(int(logits.argmax()))
            logits = model(torch.tensor([[token]]), layout, cache, last_only=True)[0, 0]
        assert best == case["greedy_ids"], case["name"]


@each
def test_published_hidden_states(opened: Open, numbers: dict[str, Tensor], family: str, kind: str) -> None:
    model, seen = opened(family, kind), []
    layers = model.transformer.encoder.layers
    hooks = [layer.register_forward_hook(lambda layer, xs, out: seen.append(xs[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda layer, inputs, output: seen.append(output)))
    ids = torch.tensor([prompts(family, kind)[0]["input_ids"]])
    cache = model.new_cache(ids.shape[1])
    model(ids, cache=cache)
    for hook in hooks:
        hook.remove()
    for place, hidden in enumerate(seen):
        if (expected := numbers.get(f"{family}.{kind}.zh_short.hidden_{place}")) is not None:
            assert (hidden[0] - expected.reshape(hidden[0].shape)).abs().max() < TOLERANCE, place
    keys, values = cache.read(0, ids.shape[1])
    for name, mine in (("key_after_rope", keys), ("value", values)):
        expected = numbers[f"{family}.{kind}.zh_short.layer0_{name}"]  # sequence, batch, groups, size
        there = mine[0].transpose(0, 1)
        assert (there - expected.reshape(there.shape)).abs().max() < 1e-5


@each
def test_published_batch_padded_on_the_left(opened: Open, family: str, kind: str) -> None:
    model, case = opened(family, kind), golden(family, kind)["batch"]
    prompts_ = [
        [i for i, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(case["input_ids"], case["attention_mask"], strict=True)
    ]
    ids, pads = model.pad_left(prompts_)
    assert ids.tolist() == case["input_ids"]
    layout, cache = model.layout(ids, pads), model.new_cache(ids.shape[1] + 24)
    assert layout.positions(0, ids.shape[1]).tolist() == case["position_ids"]
    row, columns = case["full_mask_row"], ids.shape[1]
    hidden = ~(layout.visible(0, columns, columns)[row, 0])
    hidden[: int(pads[row])] = False  # rows of padding see everything, as published
    assert hidden.int().tolist() == case["full_mask_1_is_hidden"]
    logits = model(ids, layout, cache, last_only=True)[:, 0]
    for top, mine in zip(case["top20"], logits, strict=True):
        assert mine[top["ids"]].tolist() == pytest.approx(top["logits"], abs=TOLERANCE)
    for step in range(24):
        given = [row[step] for row in case["generated"]]
        going = [n for n in range(3) if step < len(case["single"][n])]
        assert [int(logits[n].argmax()) for n in going] == [given[n] for n in going]
        logits = model(torch.tensor(given)[:, None], layout, cache, last_only=True)[:, 0]


def test_published_rope_ratio(tiny_chatglm2: Folder) -> None:
    model = load_model(tiny_chatglm2("chatglm3", "fp16"))
    stretched = ChatGLM2Model(replace(model.config, rope_ratio=50.0, seq_length=32768))
    stretched.load_state_dict(model.state_dict())
    by_name = {case["name"]: case["input_ids"] for case in prompts("chatglm3", "fp16")}
    for case in goldens()["rope_ratio_50"]["prompts"]:
        logits = stretched(torch.tensor([by_name[case["name"]]]), last_only=True)[0, 0]
        assert logits[case["top20_ids"]].tolist() == pytest.approx(case["top20_logits"], abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "chatglm3-32k"])
def test_published_half_precision_tables(numbers: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
    """ChatGLM2 rounds angles in float16; in bfloat16 that would leave nothing of them, so it must not."""
    ratio = 50.0 if name.endswith("32k") else 1.0
    config = replace(FULL, family=name.partition("-")[0], rope_ratio=ratio)
    cos, sin = pair_table(numbers["rotary.positions"][None], config, dtype)
    mine = torch.stack((cos, sin), -1)[0, :, 0]
    same = "chatglm3" if (name, dtype) == ("chatglm2", torch.bfloat16) else name
    published = numbers[f"rotary.{same}.{str(dtype).removeprefix('torch.')}"]
    assert torch.equal(mine, published)


def test_families_differ_in_float16_only(opened: Open, tiny_chatglm2: Folder) -> None:
    ids = torch.tensor([prompts("chatglm2", "fp16")[-1]["input_ids"]])
    both = [opened(family, "fp16")(ids, last_only=True) for family in FAMILIES]
    assert torch.equal(*both)
    place = everything_on("cpu", torch.float16)
    halves = [load_model(tiny_chatglm2(family, "fp16"), place)(ids, last_only=True) for family in FAMILIES]
    assert not torch.equal(*halves)
    for half in halves:
        assert (half.float() - both[0]).abs().max() < 0.3


def test_only_the_first_half_of_a_head_turns() -> None:
    x = torch.randn(1, 1, 2, 128)
    turned = rotate_pairs(x, pair_table(torch.tensor([[5]]), FULL, torch.float32))
    assert torch.equal(turned[..., 64:], x[..., 64:])
    assert not torch.allclose(turned[..., :64], x[..., :64])
    assert turned.norm() == pytest.approx(float(x.norm()), rel=1e-6)


def test_published_bytes(tiny_chatglm2: Folder) -> None:
    """Quantising the FP16 checkpoint gives the INT4 one bit for bit, also while loading."""
    whole, packed = (read_folder(tiny_chatglm2("chatglm2", kind)) for kind in KINDS)
    names = [name.removesuffix("_scale") for name in packed if name.endswith("_scale")]
    assert len(names) == 12
    for name in names:
        stored, scale = quantize_weight(whole[name], 4, wide=False)
        assert torch.equal(stored, packed[name])
        assert torch.equal(scale, packed[f"{name}_scale"])
    loaded = load_model(tiny_chatglm2("chatglm2", "fp16"), bits=4)
    layer = loaded.get_submodule("transformer.encoder.layers.1.mlp.dense_h_to_4h")
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.weight, packed["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"])
    assert not isinstance(loaded.get_submodule(loaded.HEAD), QuantizedLinear)


def test_eight_bits_while_loading_stay_near(opened: Open, tiny_chatglm2: Folder) -> None:
    ids = torch.tensor([prompts("chatglm2", "fp16")[0]["input_ids"]])
    eight = load_model(tiny_chatglm2("chatglm2", "fp16"), bits=8)
    assert (eight(ids) - opened("chatglm2", "fp16")(ids)).abs().max() < 1


def test_the_head_is_not_the_embedding(opened: Open) -> None:
    model = opened("chatglm3", "fp16")
    head, table = (model.get_submodule(name).weight for name in (model.HEAD, model.EMBEDDING))
    assert not torch.equal(head, table)


# Prompts in pieces, and a cache that is kept


def test_a_prompt_in_pieces_gives_the_same(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("chatglm2", "int4")
    ids = torch.tensor([max((case["input_ids"] for case in prompts("chatglm2", "int4")), key=len)])
    whole = model(ids)
    monkeypatch.setattr(model, "piece", 7)
    parts: list[float] = []
    assert (model(ids, on_piece=parts.append) - whole).abs().max() < TOLERANCE
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert len(parts) == 3 * -(-ids.shape[1] // 7)


def greedy(decoder: ChatGLM2Decoder, ids: list[int], count: int) -> list[int]:
    logits, new = decoder.prefill(ids, lambda part: None), []
    for place in range(count):
        new.append(int(logits.argmax()))
        if place < count - 1:
            logits = decoder.step(new[-1])
    return new


@each
def test_published_conversation_with_a_kept_cache(opened: Open, family: str, kind: str) -> None:
    case = golden(family, kind)["cached_conversation"]
    decoder, first = ChatGLM2Decoder(opened(family, kind)), prompts(family, kind)[0]
    assert greedy(decoder, first["input_ids"], 24) == first["greedy_ids"]
    assert greedy(decoder, case["ids"], len(case["greedy_ids"])) == case["greedy_ids"]


def test_a_kept_cache_is_a_fresh_prefill(opened: Open) -> None:
    """Rounds that go on, another try, an edited question, and a shorter prompt."""
    model = opened("chatglm3", "int4")
    long = prompts("chatglm3", "int4")[-1]["input_ids"]
    kept = ChatGLM2Decoder(model)
    for ids in (long[:20], long[:50], long[:50], [*long[:30], 5, 6, 7], long[:10], long):
        told: list[float] = []
        logits = kept.prefill(ids, told.append)
        fresh = ChatGLM2Decoder(model).prefill(ids, lambda part: None)
        assert (logits - fresh).abs().max() < TOLERANCE
        assert told[-1] == 1.0
        kept.step(int(logits.argmax()))


def test_only_what_is_new_is_read(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ChatGLM2Decoder(opened("chatglm3", "fp16"))
    ids = prompts("chatglm3", "fp16")[-1]["input_ids"]
    said = greedy(decoder, ids, 5)
    read: list[int] = []
    layer = decoder.model.transformer.encoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0].shape[1]))
    decoder.prefill([*ids, *said, 13, 14], lambda part: None)
    hook.remove()
    assert sum(read) == 3  # the last id said is in no cache yet


def test_stopping_keeps_whole_pieces(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ChatGLM2Decoder(opened("chatglm3", "fp16"))
    monkeypatch.setattr(decoder.model, "piece", 16)
    ids = prompts("chatglm3", "fp16")[-1]["input_ids"][:64]

    def stop(part: float) -> None:
        if part > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.prefill(ids, stop)
    told: list[float] = []
    logits = decoder.prefill(ids, told.append)
    assert told[0] > 0.5
    assert (logits - ChatGLM2Decoder(decoder.model).prefill(ids, lambda part: None)).abs().max() < TOLERANCE


@pytest.mark.slow
def test_compiles_into_one_graph(opened: Open) -> None:
    model = opened("chatglm2", "int4")
    ids = torch.tensor([prompts("chatglm2", "int4")[0]["input_ids"]])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), model(ids))
