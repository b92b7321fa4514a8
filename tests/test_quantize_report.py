"""compare and sensitivity: the figures of `glmui quantize --report` and `--target-gb`."""

from __future__ import annotations

import gc
import json
import math
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glmui.errors import InvalidInput, ModelError
from glmui.glm.checkpoint import empty_model, load_model
from glmui.glm.config import GLMConfig
from glmui.quant import packing
from glmui.quantizing import compare, sensitivity
from glmui.quantizing.compare import Sample
from glmui.quantizing.folder import Source, folder_bytes, open_source, quantize_folder
from glmui.quantizing.streamed import Weights, blocks_of, stream
from tests.chatglm_fixture import copy_checkpoint
from tests.reference import reference
from tests.test_quantize_folder import chatglm2

Tiny = Callable[[str], Path]
TEXTS = Path(compare.__file__).parents[2] / "assets" / "comparison.json"


def sample(question: int, answer: int, seed: int) -> Sample:
    """Made-up ids: a question, the gap, an answer and its end."""
    draw = random.Random(seed)
    asked = [*draw.choices(range(5, 60000), k=question), 130001, 130004]
    return Sample((*asked, *draw.choices(range(5, 60000), k=answer), 130005), answer + 1)


SAMPLES = [sample(3, 6, 1), sample(9, 4, 2), sample(5, 9, 3)]


def direct(source: nn.Module, result: nn.Module) -> tuple[float, float, float, float]:
    """The figures by the definition: one text and one token after the other."""
    found: list[tuple[float, float, float, float]] = []
    for one in SAMPLES:
        ids = torch.tensor([one.ids])
        with torch.inference_mode():
            p, q = (torch.softmax(model(ids)[0].double(), -1) for model in (source, result))
        for place in range(len(one.ids) - one.scored, len(one.ids)):
            a, b, token = p[place - 1], q[place - 1], one.ids[place]
            kl = float((a * (a / b).log()).sum())
            found.append((kl, float(a.argmax() == b.argmax()), -math.log(a[token]), -math.log(b[token])))
    kl, same, before, after = (sum(column) / len(found) for column in zip(*found, strict=True))
    return kl, same, math.exp(before), math.exp(after)


def figures(found: compare.Agreement) -> tuple[float, float, float, float]:
    return found.kl, found.top1, found.source_perplexity, found.result_perplexity


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_figures_are_those_of_a_direct_computation(tiny_chatglm: Tiny, kind: str) -> None:
    folders = tiny_chatglm("fp16"), tiny_chatglm(kind)
    found = compare.agreement(SAMPLES, *(compare.see_folder(folder, SAMPLES) for folder in folders))
    models = [load_model(folder) for folder in folders]
    assert found.tokens == 22
    assert figures(found) == pytest.approx(direct(*models), rel=1e-4)
    in_memory = compare.agreement(SAMPLES, *(compare.see_model(model, SAMPLES) for model in models))
    assert figures(in_memory) == pytest.approx(figures(found), rel=1e-4)


def test_a_model_beside_itself(tiny_chatglm: Tiny) -> None:
    told: list[float] = []
    seen = [compare.see_folder(tiny_chatglm("int8"), SAMPLES, on_part=told.append) for _ in range(2)]
    found = compare.agreement(SAMPLES, *seen)
    assert (found.kl, found.top1) == (0, 1)
    assert found.source_perplexity == found.result_perplexity
    assert told == [part / 4 for part in range(1, 5)] * 2


@pytest.mark.parametrize(("bits", "group_size", "table"), [(4, None, False), (4, 8, False), (8, None, True)])
def test_what_would_be_is_what_becomes(
    tiny_chatglm: Tiny, tmp_path: Path, bits: int, group_size: int | None, table: bool
) -> None:
    source, made = tiny_chatglm("fp16"), tmp_path / "made"
    quantize_folder(source, made, bits, group_size, quantization_embeddings=table)
    plan = open_source(source).uniform(bits, table)
    foreseen = compare.see_folder(source, SAMPLES, bits=plan, group_size=group_size)
    for a, b in zip(foreseen.hidden, compare.see_folder(made, SAMPLES).hidden, strict=True):
        assert torch.equal(a, b)


def test_finer_scales_cost_less(tiny_chatglm: Tiny) -> None:
    source = tiny_chatglm("fp16")
    whole, plan = compare.see_folder(source, SAMPLES), open_source(source).uniform(4)
    seen = [compare.see_folder(source, SAMPLES, bits=plan, group_size=size) for size in (None, 8)]
    row, groups = (compare.agreement(SAMPLES, whole, one).kl for one in seen)
    assert groups < row


def test_no_block_stays_in_memory(tiny_chatglm: Tiny) -> None:
    model = stream(Weights(tiny_chatglm("fp16")))
    widest = 0

    def count(*_: Any) -> None:
        nonlocal widest
        filled = [b for b in blocks_of(model) if not next(b.parameters()).is_meta]
        widest = max(widest, len(filled))

    for block in blocks_of(model):
        block.register_forward_hook(count, prepend=True)
    compare.run(model, SAMPLES, model.new_cache(20))
    assert widest == 1
    count()
    assert all(parameter.is_meta for block in blocks_of(model) for parameter in block.parameters())


def test_what_was_seen_keeps_no_blocks_and_no_files(tiny_chatglm: Tiny) -> None:
    weights = Weights(tiny_chatglm("fp16"))
    model, gone = stream(weights), weakref.ref(weights)
    head = model.lm_head
    gc.disable()
    try:
        compare.run(model, SAMPLES, model.new_cache(20))
        del model, weights
        assert gone() is None
    finally:
        gc.enable()
    assert head.weight.numel()


def test_broken_numbers_are_named(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm("fp16"), tmp_path / "broken")
    shard = folder / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard, weights_only=True)
    state["transformer.layers.2.mlp.dense_4h_to_h.bias"][3] = float("inf")
    shard.unlink()
    torch.save(state, shard)
    with pytest.raises(ModelError, match=r"layers\.2"):
        compare.see_folder(folder, SAMPLES)


def test_the_texts_are_varied_and_of_a_length() -> None:
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))
    assert len({text["name"] for text in texts}) == len(texts) == 12
    chinese = [text for text in texts if any("一" <= c <= "鿿" for c in text["answer"][:20])]
    assert len(chinese) == 6


def test_the_texts_in_the_published_vocabulary(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    vocabulary = reference("ice_text.model")
    folder = copy_checkpoint(tiny_chatglm("fp16"), tmp_path / "published")
    (folder / "ice_text.model").unlink()
    (folder / "ice_text.model").write_bytes(vocabulary.read_bytes())
    samples = compare.samples_for(folder)
    assert all(60 <= one.scored <= 150 for one in samples)
    assert all(one.ids[-1] == 130005 and one.ids[-one.scored - 1] == 130004 for one in samples)
    assert samples[0].targets.tolist() == list(samples[0].ids[-samples[0].scored :])


def test_a_layers_error_is_what_its_block_hands_on(tiny_chatglm: Tiny) -> None:
    source, name = tiny_chatglm("fp16"), "transformer.layers.2.mlp.dense_h_to_4h"
    told: list[float] = []
    errors = sensitivity.measure(source, SAMPLES, on_part=told.append)
    assert list(errors) == open_source(source).linears
    assert all(by[16] == 0 < by[8] < by[4] < 1 for by in errors.values())
    assert told == [0.25, 0.5, 0.75, 1.0]

    def handed_on(model: nn.Module) -> list[Tensor]:
        """The third block's output for each sample, without padding."""
        found: list[Tensor] = []
        hook = model.get_submodule("transformer.layers.2").register_forward_hook(
            lambda block, given, out: found.append(out[0])
        )
        with torch.inference_mode():
            for one in SAMPLES:
                model(torch.tensor([one.ids]))
        hook.remove()
        return found

    model = load_model(source)
    before = torch.cat(handed_on(model))
    weight = model.get_parameter(f"{name}.weight")
    stored, scale = packing.quantize_weight(weight.half(), 4)
    weight.data = packing.dequantize_weight(stored, scale, 4, weight.shape[1], torch.float32)
    after = torch.cat(handed_on(model))
    off = ((after - before).square().sum(-1) / before.square().sum(-1)).mean().sqrt()
    assert errors[name][4] == pytest.approx(float(off), rel=1e-4)


def full_size(folder: Path) -> Source:
    """ChatGLM-6B's shapes and no values."""
    config = GLMConfig(130528, 4096, 16384, 28, 32)
    model = empty_model(config)
    tensors = {name: t.half() for name, t in model.state_dict().items() if not name.startswith("lm_head.")}
    return Source(folder, {"model_type": "chatglm"}, tensors, model)


def made_up_errors(source: Source) -> dict[str, dict[int, float]]:
    draw = random.Random(7)
    return {name: {4: (e := draw.uniform(0.01, 0.3)), 8: e / 18, 16: 0.0} for name in source.linears}


def test_the_budget_is_kept_and_used(tmp_path: Path) -> None:
    source = full_size(tmp_path)
    errors = made_up_errors(source)
    total = []
    for gb in (3.9, 4.5, 6, 8, 10, 12):
        choices = sensitivity.choose(source, errors, int(gb * 1e9))
        size = folder_bytes(source, {choice.name: choice.bits for choice in choices})
        assert 0.99 * gb * 1e9 <= size <= gb * 1e9
        total.append(sum(choice.error**2 for choice in choices))
    assert total == sorted(total, reverse=True)
    everything = sensitivity.choose(source, errors, 14 * 10**9)
    assert {choice.bits for choice in everything} == {16}


def test_what_matters_more_gets_more(tmp_path: Path) -> None:
    source = full_size(tmp_path)
    errors = made_up_errors(source)
    errors["transformer.layers.3.attention.dense"] = {4: 0.9, 8: 0.05, 16: 0.0}
    errors["transformer.layers.4.attention.dense"] = {4: 1e-4, 8: 1e-5, 16: 0.0}
    bits = {c.name: c.bits for c in sensitivity.choose(source, errors, 4 * 10**9)}
    assert bits["transformer.layers.3.attention.dense"] > bits["transformer.layers.4.attention.dense"] == 4


def test_too_small_a_budget_says_what_would_do(tmp_path: Path) -> None:
    source = full_size(tmp_path)
    with pytest.raises(InvalidInput, match=r"it takes 3\.\d{3} GB") as caught:
        sensitivity.choose(source, {}, 3 * 10**9)
    enough = float(caught.value.values["smallest"])
    choices = sensitivity.choose(source, made_up_errors(source), int(enough * 1e9))
    assert {choice.bits for choice in choices} == {4}
    smaller = sensitivity.smallest_bytes(source, None, source.table(4))
    assert smaller < 0.9 * sensitivity.smallest_bytes(source, None)


def test_chatglm2_is_compared_and_measured(tmp_path: Path) -> None:
    source = chatglm2("fp16", tmp_path / "fp16")
    samples = [Sample((64790, 64792, 5, 900, 77, 31, 2), 3), Sample((64790, 64792, 9, 40, 2), 2)]
    model = load_model(source)
    seen = compare.see_folder(source, samples)
    for one, two in zip(seen.hidden, compare.see_model(model, samples).hidden, strict=True):
        assert torch.allclose(one, two, atol=1e-4)
    plan = open_source(source).uniform(4)
    found = compare.agreement(samples, seen, compare.see_folder(source, samples, bits=plan))
    assert found.tokens == 5
    assert found.kl > 0
    errors = sensitivity.measure(source, samples)
    assert all(by[16] == 0 < by[8] < by[4] for by in errors.values())
    assert len(errors) == 12
