"""The network, against the published code's numbers and against itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glmui.glm.checkpoint import everything_on, load_model
from glmui.glm.config import GLMConfig
from glmui.glm.layout import Layout, pad_left
from glmui.glm.model import ChatGLMModel
from glmui.glm.parts import Head
from glmui.glm.rotary import rotary_table, rotate
from tests.chatglm_fixture import DATA, KINDS, goldens

GOLDEN = goldens()
TOLERANCE = 1e-4
CLOSE_CALL = 1e-3  # a step whose two best logits are nearer may go the other way

each_kind = pytest.mark.parametrize("kind", KINDS)
Open = Callable[[str], ChatGLMModel]


@pytest.fixture(scope="module")
def opened(tiny_chatglm: Callable[[str], Path]) -> Open:
    return cache(lambda kind: load_model(tiny_chatglm(kind)))


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return load_file(DATA / "goldens.safetensors")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def prompts(kind: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = GOLDEN["models"][kind]["prompts"]
    return cases


@each_kind
def test_published_logits(opened: Open, numbers: dict[str, Tensor], kind: str) -> None:
    model = opened(kind)
    assert len(prompts(kind)) == 13
    for case in prompts(kind):
        logits = model(torch.tensor([case["input_ids"]]), last_only=True)[0, 0]
        golden = numbers[f"{kind}.{case['name']}.logits_slice"]
        assert (logits[GOLDEN["slice_ids"]] - golden).abs().max() < TOLERANCE, case["name"]
        assert logits.topk(20).values.tolist() == pytest.approx(case["top20_logits"], abs=TOLERANCE)
        assert float(logits.mean()) == pytest.approx(case["logits_mean"], abs=1e-5)


@each_kind
def test_published_greedy_ids_with_a_cache(opened: Open, kind: str) -> None:
    model = opened(kind)
    for case in prompts(kind):
        ids = torch.tensor([case["input_ids"]])
        layout = Layout.of(ids, model.config)
        cache = model.new_cache(ids.shape[1] + len(case["greedy_ids"]))
        for golden, gap in zip(case["greedy_ids"], case["greedy_gaps"], strict=True):
            best = int(model(ids, layout, cache, last_only=True).argmax())
            assert best == golden or gap < CLOSE_CALL, case["name"]
            ids = torch.tensor([[golden]])


@each_kind
def test_published_hidden_states(opened: Open, numbers: dict[str, Tensor], kind: str) -> None:
    model, seen = opened(kind), []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
        for layer in model.transformer.layers
    ]
    ids = torch.tensor([prompts(kind)[0]["input_ids"]])
    layout, cache = Layout.of(ids, model.config), model.new_cache(8)
    seen.append(model.transformer(ids, layout, cache))
    for hook in hooks:
        hook.remove()
    for place, hidden in enumerate(seen):
        golden = numbers[f"{kind}.zh_short.hidden_{place}"]
        assert (hidden[0] - golden).abs().max() < TOLERANCE, place  # of values up to 40
    keys, values = cache.read(0, 4)
    assert (keys[0].transpose(0, 1) - numbers[f"{kind}.zh_short.layer0_key_after_rope"]).abs().max() < 1e-5
    assert (values[0].transpose(0, 1) - numbers[f"{kind}.zh_short.layer0_value"]).abs().max() < 1e-5


@each_kind
def test_published_batch_padded_on_the_left(opened: Open, numbers: dict[str, Tensor], kind: str) -> None:
    model, case = opened(kind), GOLDEN["models"][kind]["batch"]
    prompts = [[i for i in row if i != 3] for row in case["input_ids"]]
    ids, pads = pad_left(prompts, model.config)
    layout, cache = Layout.of(ids, model.config, pads), model.new_cache(ids.shape[1] + 24)
    logits = model(ids, layout, cache, last_only=True)[:, 0]
    for row in range(3):
        golden = numbers[f"{kind}.batch.{row}.logits_slice"]
        assert (logits[row, GOLDEN["slice_ids"]] - golden).abs().max() < TOLERANCE
        alone = model(torch.tensor([prompts[row]]), last_only=True)[0, 0]
        assert (logits[row] - alone).abs().max() < TOLERANCE
    for step in range(24):
        golden_ids = [row[step] if step < len(row) else 3 for row in case["single"]]
        going = [row for row in range(3) if step < len(case["single"][row])]
        assert [int(logits[row].argmax()) for row in going] == [golden_ids[row] for row in going]
        logits = model(torch.tensor(golden_ids)[:, None], layout, cache, last_only=True)[:, 0]


@each_kind
def test_a_cached_step_is_an_uncached_one(opened: Open, kind: str) -> None:
    model, case = opened(kind), prompts(kind)[-1]
    ids = torch.tensor([[*case["input_ids"], *case["greedy_ids"][:6]]])
    layout, cache = Layout.of(ids, model.config), model.new_cache(ids.shape[1])
    prompt = len(case["input_ids"])
    model(ids[:, :prompt], layout, cache)
    model(ids[:, prompt : prompt + 3], layout, cache)  # several at once, too
    cached = model(ids[:, prompt + 3 :], layout, cache)[0, -1]
    assert (cached - model(ids)[0, -1]).abs().max() < TOLERANCE


def test_a_prompt_in_pieces_gives_the_same(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("int4")
    case = max(prompts("int4"), key=lambda case: len(case["input_ids"]))
    ids = torch.tensor([case["input_ids"]])
    whole = model(ids)
    monkeypatch.setattr(model, "piece", 7)
    parts: list[float] = []
    assert (model(ids, on_piece=parts.append) - whole).abs().max() < TOLERANCE
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert len(parts) == 2 * 4 * -(-ids.shape[1] // 7)


def test_stopping_inside_a_prompt_leaves_the_cache_as_it_was(opened: Open) -> None:
    model = opened("int4")
    ids = torch.tensor([prompts("int4")[0]["input_ids"]])
    layout, cache = Layout.of(ids, model.config), model.new_cache(8)

    def stop(part: float) -> None:
        if part > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model(ids, layout, cache, stop)
    assert cache.length == 0
    assert torch.equal(model(ids, layout, cache), model(ids))


def test_the_cache_grows_and_trims(opened: Open) -> None:
    model, case = opened("fp16"), prompts("fp16")[0]
    ids = torch.tensor([case["input_ids"]])
    layout, cache = Layout.of(ids, model.config), model.new_cache(4)
    first = model(ids, layout, cache, last_only=True)
    token = torch.tensor([case["greedy_ids"][:1]])
    with pytest.raises(ValueError, match="holds 4 tokens, not 5"):
        model(token, layout, cache)
    cache.make_room(1)
    second = model(token, layout, cache)
    cache.trim(4)
    assert torch.equal(model(token, layout, cache), second)
    assert int(first.argmax()) == case["greedy_ids"][0]
    assert int(second.argmax()) == case["greedy_ids"][1]


def test_half_precision_stays_near(opened: Open, tiny_chatglm: Callable[[str], Path]) -> None:
    ids = torch.tensor([prompts("int4")[0]["input_ids"]])
    exact = opened("int4")(ids)[0, -1]
    for dtype, tolerance in ((torch.float16, 0.1), (torch.bfloat16, 1.0)):
        model = load_model(tiny_chatglm("int4"), everything_on("cpu", dtype))
        logits = model(ids)[0, -1]
        assert logits.dtype == dtype
        assert (logits.float() - exact).abs().max() < tolerance


def test_the_head_widens_in_blocks_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(8, 100, bias=False)
    head.weight = torch.nn.Parameter(torch.randn(100, 8).half(), requires_grad=False)
    x = torch.randn(2, 8)
    whole = x @ head.weight.float().T
    monkeypatch.setattr(Head, "BLOCK", 8 * 7)
    assert torch.allclose(head(x), whole, atol=1e-6)


def test_frequencies_are_rounded_to_half() -> None:
    """At position 1000 exact frequencies would give another cosine."""
    positions = torch.full((1, 2, 1), 1000)
    cos, _ = rotary_table(positions, 128, torch.float32)
    exact = torch.cos(1000 * 10000 ** -(torch.arange(0, 64, 2) / 64))
    rounded = torch.cos(1000 * (1 / 10000 ** (torch.arange(0, 64, 2) / 64)).half().float())
    assert torch.allclose(cos[0, 0, 0, 0], rounded, atol=1e-6)
    assert (cos[0, 0, 0, 0] - exact).abs().max() > 0.01


def test_each_half_of_a_head_turns_by_its_own_position() -> None:
    x = torch.randn(1, 1, 1, 16)
    still = rotate(x, rotary_table(torch.tensor([[[0], [0]]]), 16, torch.float32))
    turned = rotate(x, rotary_table(torch.tensor([[[5], [0]]]), 16, torch.float32))
    assert torch.equal(still, x)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.allclose(turned[..., :8], x[..., :8])
    assert turned.norm() == pytest.approx(float(x.norm()), rel=1e-6)


@pytest.mark.slow
def test_compiles_into_one_graph(opened: Open) -> None:
    model = opened("int4")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for case in prompts("int4")[:2]:
        ids = torch.tensor([case["input_ids"]])
        assert torch.equal(compiled(ids), model(ids))


def test_random_weights_before_loading() -> None:
    config = GLMConfig(64, 16, 32, 1, 2, bos_token_id=60, gmask_token_id=61, mask_token_id=62)
    model = ChatGLMModel(config)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model(torch.tensor([[5, 61, 60]])).shape == (1, 3, 64)
