"""Decoding one token by a card's kernels, on an emulated card, beside what the model itself computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from glmui.engine.card_step import CardStep, Graph, can_step
from glmui.engine.decoders import GLMDecoder, Held, decoder_of
from glmui.glm.adapter import Adapter, attach
from glmui.glm.cache import KVCache, Prefix, Room
from glmui.glm.checkpoint import AnyModel, everything_on, load_model
from glmui.glm.parts import Head
from glmui.quant.kernels.cuda.block import BlockKernels
from glmui.quant.kernels.cuda.native import CardKernels
from glmui.quant.on_card import use_card_kernels
from tests.emulated_card import EmulatedModule
from tests.emulated_graph import EmulatedGraphs

Load = Callable[..., AnyModel]

FAMILIES = ("chatglm", "chatglm2", "chatglm3")
GAP = [130001, 130004]  # [gMASK] <sop>
VOCABULARY = 3000


@pytest.fixture
def load(tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Callable[[str, str], Path]) -> Load:
    """A tiny INT4 model by family, in float16 on the CPU, with the head's first rows only: that is faster."""

    def model(family: str, dtype: torch.dtype = torch.float16) -> AnyModel:
        folder = tiny_chatglm("int4") if family == "chatglm" else tiny_chatglm2(family, "int4")
        loaded = load_model(folder, everything_on("cpu", dtype))
        head = Head(loaded.config.hidden_size, VOCABULARY, bias=False)
        rows = loaded.get_submodule(loaded.HEAD).get_parameter("weight")[:VOCABULARY].clone()
        head.weight = nn.Parameter(rows, requires_grad=False)
        loaded.set_submodule(loaded.HEAD, head)
        return loaded

    return model


class Card:
    """An emulated card, and the graphs that were made there."""

    def __init__(self) -> None:
        self.graphs = EmulatedGraphs()
        self.block = BlockKernels(self.graphs.watch(EmulatedModule()), "emulated")

    def decoder(self, model: AnyModel, most: int = 0) -> GLMDecoder:
        """Its cache never has spare room for more than `most` tokens, if that is not 0."""
        return decoder_of(model, Held(most=most), CardStep(model, self.block, self.graphs))


@pytest.fixture
def card() -> Card:
    return Card()


def prompt(family: str, length: int) -> list[int]:
    ids = [(7 * place) % 90 + 5 for place in range(length)]
    return ids[: length - 2] + GAP if family == "chatglm" else ids


def reply(decoder: GLMDecoder, ids: list[int], tokens: list[int]) -> Tensor:
    """Logits [n + 1, vocab] after a prompt and after each of the tokens that follow."""
    with torch.inference_mode():
        return torch.stack([decoder.prefill(ids, lambda part: None), *map(decoder.step, tokens)]).float()


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest error of any token's logits, relative to the spread of that token's."""
    return ((found - wanted).abs().amax(-1) / wanted.std(-1)).max().item()


@pytest.mark.parametrize(
    ("family", "length"), [("chatglm", 9), ("chatglm", 200), ("chatglm2", 200), ("chatglm3", 70)]
)
def test_logits_are_as_exact_as_the_models_own(load: Load, card: Card, family: str, length: int) -> None:
    model, ids, tokens = load(family), prompt(family, length), list(range(20, 44))
    found = reply(card.decoder(model), ids, tokens)
    own = reply(decoder_of(model), ids, tokens)
    exact = reply(decoder_of(load(family, torch.float32)), ids, tokens)
    assert distance(found, exact) < 1.2 * distance(own, exact) + 1e-3
    assert [graph.replays for graph in card.graphs.made] == [24]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_ids_are_chosen_where_one_is_clearly_best(load: Load, card: Card, family: str) -> None:
    model, ids, chosen = load(family), prompt(family, 30), list[int]()
    own, mine = decoder_of(model), card.decoder(model)
    with torch.inference_mode():
        theirs, found = (decoder.prefill(ids, lambda part: None) for decoder in (own, mine))
        for _ in range(24):
            best, second = theirs.float().topk(2).values
            if best - second > 0.1 * theirs.float().std():
                chosen.append(int(theirs.argmax()))
                assert found.argmax() == chosen[-1]
            token = int(theirs.argmax())
            theirs, found = own.step(token), mine.step(token)
    assert len(chosen) >= 12


def test_a_block_is_eight_launches(load: Load, card: Card) -> None:
    module = card.graphs.watch(EmulatedModule())
    for family, norm, activation in (("chatglm", "norm", "gelu"), ("chatglm3", "norm", "swiglu")):
        model = load(family)
        use_card_kernels(model, {torch.device("cpu"): CardKernels(module, "emulated")})
        found = reply(card.decoder(model), prompt(family, 20), [3, 4, 5])
        assert distance(found, reply(decoder_of(load(family)), prompt(family, 20), [3, 4, 5])) < 0.1
        launches = [name.removesuffix("_half") for name in card.graphs.made[-1].launches]
        linear = "linear_4_1"
        attend = "attend" if family == "chatglm" else "attend_shared"
        block = [norm, linear, attend, linear, norm, linear, activation, linear]
        assert launches == block * model.config.num_layers + [norm]


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_a_cache_that_grows_is_recorded_anew(load: Load, card: Card, family: str) -> None:
    model, ids, tokens = load(family), prompt(family, 20), list(range(40, 46))
    found = reply(card.decoder(model, most=24), ids, tokens)  # beyond, room is made for one at a time
    assert distance(found, reply(decoder_of(model), ids, tokens)) < 0.1
    assert [(graph.replays, graph.live) for graph in card.graphs.made] == [(4, False), (1, False), (1, True)]


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_a_cache_in_int8(load: Load, card: Card, family: str) -> None:
    model, ids, tokens = load(family), prompt(family, 80), list(range(30, 42))
    model.cache_dtype = torch.int8
    found, own = reply(card.decoder(model), ids, tokens), reply(decoder_of(model), ids, tokens)
    assert distance(found, own) < 0.15
    model.cache_dtype = None
    assert distance(found, reply(decoder_of(model), ids, tokens)) < 0.5


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_a_prefix_stands_before_all_tokens(load: Load, card: Card, family: str) -> None:
    model, ids, tokens = load(family), prompt(family, 70), [5, 6, 7]
    without = reply(card.decoder(model), ids, tokens)
    shape = 2 * model.config.num_layers, model.config.kv_heads, 67, model.config.head_size
    model.prefix = Prefix(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    found = reply(card.decoder(model), ids, tokens)
    assert distance(found, reply(decoder_of(model), ids, tokens)) < 0.1
    assert distance(found, without) > 0.5


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_prompt_after_prompt_is_served_by_one_graph(load: Load, card: Card, family: str) -> None:
    """A graph holds nothing of a prompt: not its length, not where ChatGLM-6B's gap is."""
    model, mine = load(family), card.decoder(load(family))
    for length in (60, 12, 33, 12):
        ids, tokens = prompt(family, length), [length, 9, 8]
        assert distance(reply(mine, ids, tokens), reply(decoder_of(model), ids, tokens)) < 0.1
    assert [(graph.replays, graph.live) for graph in card.graphs.made] == [(12, True)]


def test_an_adapter_takes_part(load: Load, card: Card) -> None:
    model, ids = load("chatglm"), prompt("chatglm", 20)
    mine = card.decoder(model)
    before = reply(mine, ids, [4, 5])
    pair = torch.randn(2, 32, generator=torch.Generator().manual_seed(2)), torch.ones(96, 2)
    handles = attach(model, Adapter({"transformer.layers.1.attention.query_key_value": pair}))
    mine.renew()
    found = reply(mine, ids, [4, 5])
    assert distance(found, reply(decoder_of(model), ids, [4, 5])) < 0.1
    assert distance(found, before) > 0.5
    for handle in handles:
        handle.remove()
    mine.renew()
    assert torch.equal(reply(mine, ids, [4, 5]), before)
    assert [graph.live for graph in card.graphs.made] == [False, False, True]


class Elsewhere(nn.Module):
    """An embedding that is not where the rest of the model is."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, device="meta"))
        self.look_up = table.forward

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_an_embedding_that_stays_in_ram(load: Load, card: Card, family: str) -> None:
    model, ids, tokens = load(family), prompt(family, 20), list(range(10))
    wanted = reply(decoder_of(model), ids, tokens)
    model.set_submodule(model.EMBEDDING, Elsewhere(model.get_submodule(model.EMBEDDING)))
    assert can_step(model, card.block)
    assert distance(reply(card.decoder(model), ids, tokens), wanted) < 0.1
    assert card.graphs.made[0].replays == 10


def test_without_graphs_launches_are_started_one_by_one(load: Load, card: Card) -> None:
    model, ids, tokens = load("chatglm"), prompt("chatglm", 20), list(range(10))
    tried = []

    def refused(run: Callable[[], Tensor], device: torch.device) -> NoReturn:
        tried.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    step = CardStep(model, card.block, refused)
    found = reply(decoder_of(model, step=step), ids, tokens)
    assert torch.equal(found, reply(card.decoder(model), ids, tokens))
    assert len(tried) == 1
    assert step.reason == "reasons.card_no_graph"
    alone = CardStep(model, card.block, None)
    assert torch.equal(found, reply(decoder_of(model, step=alone), ids, tokens))
    assert alone.reason == ""


def test_a_card_that_is_full_is_not_hidden(load: Load, card: Card) -> None:
    model, full = load("chatglm"), [True]

    def full_at_first(run: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
        if full.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return card.graphs(run, device)

    decoder = decoder_of(model, step=CardStep(model, card.block, full_at_first))
    ids = prompt("chatglm", 20)
    with pytest.raises(torch.OutOfMemoryError):
        reply(decoder, ids, [7])
    full.append(False)
    found = reply(decoder, ids, [7])  # room was made; nothing of the failed step is left
    assert distance(found, reply(decoder_of(model), ids, [7])) < 0.1
    assert len(card.graphs.made) == 1


def test_an_old_cache_is_not_kept_alive(load: Load, card: Card) -> None:
    model, ids = load("chatglm2"), prompt("chatglm2", 10)
    step = CardStep(model, card.block, None)
    rows = torch.tensor([ids])
    with torch.inference_mode():
        layout, cache = model.layout(rows), model.new_cache(20)
        model(rows, layout, cache)
        step.logits(3, layout, cache)
    watch = weakref.ref(cache)
    del cache
    gc.collect()
    assert watch() is None


def test_which_models_it_is_made_for(load: Load, card: Card) -> None:
    assert all(can_step(load(family), card.block) for family in FAMILIES)
    assert can_step(load("chatglm", torch.bfloat16), card.block)
    assert not can_step(load("chatglm", torch.float32), card.block)
    model = load("chatglm2")
    model.cache_dtype = torch.bfloat16
    assert not can_step(model, card.block)
    model.cache_dtype = torch.int8
    assert can_step(model, card.block)
    model.get_submodule(f"{model.BLOCKS}.1").to("meta")
    assert not can_step(model, card.block)


def test_memory_at_an_old_address_is_other_memory(
    load: Load, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growth that fails twice may bring the first layer back to where it was, with rows further apart."""
    model, ids = load("chatglm2"), prompt("chatglm2", 20)
    step = CardStep(model, card.block, card.graphs)
    with torch.inference_mode():
        layout, cache = model.layout(torch.tensor([ids])), model.new_cache(24)
        model(torch.tensor([ids]), layout, cache)
        first = move(cache, 0, torch.zeros(1 << 16).half())
        step.logits(3, layout, cache)
        grown = [torch.zeros(1 << 16).half(), first]

        def fails_later(self: KVCache, change: object) -> NoReturn:
            move(self, 0, grown.pop(0), self.capacity)
            raise torch.OutOfMemoryError

        monkeypatch.setattr(KVCache, "_replace", fails_later)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                cache.make_room(100)
        cache.trim(len(ids))
        found = step.logits(3, layout, cache)
        plain = model.new_cache(24)
        model(torch.tensor([ids]), layout, plain)
        wanted = model(torch.tensor([[3]]), layout, plain)[0, -1]
    assert cache.room(0).keys.data_ptr() == first.data_ptr()
    assert distance(found[None].float(), wanted[None].float()) < 0.1


def move(cache: KVCache, layer: int, memory: Tensor, capacity: int = 0) -> Tensor:
    """Have a layer's keys lie at the beginning of this memory, with room for so many tokens; the memory."""
    room = cache.room(layer)
    _, groups, entries, size = room.keys.shape
    shape = 1, groups, capacity or entries, size
    keys = memory[: torch.Size(shape).numel()].view(shape)
    keys[:, :, : cache.length] = room.keys[:, :, : cache.length].clone()
    values = room.values.new_zeros(shape)
    values[:, :, : cache.length] = room.values[:, :, : cache.length]
    cache._put(layer, Room(keys, values, None, None, room.dtype))
    return memory


def test_a_card_is_made_the_current_one_once_a_token(
    load: Load, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of some hundred launches would do it, on every card but the first."""
    done: list[str] = []

    @contextmanager
    def within(tensor: Tensor) -> Iterator[None]:
        done.append("there")
        yield
        done.append("back")

    def run_here(run: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
        done.append("record")
        return card.graphs(run, device)

    model, ids = load("chatglm2"), prompt("chatglm2", 10)
    monkeypatch.setattr(torch.cuda, "device_of", within)
    reply(decoder_of(model, step=CardStep(model, card.block, run_here)), ids, [3, 4])
    assert done == ["there", "record", "back", "there", "back"]
