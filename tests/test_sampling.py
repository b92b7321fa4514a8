"""The one sampler: transformers' rules, in transformers' order, and the published goldens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmui.engine.sampling import Sampler, blank_where_broken, draw, make_generator, penalise_repetition
from glmui.errors import EngineError
from glmui.types import GenerationParams

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "reference" / "goldens"


def random_logits(seed: int = 0, rows: int = 1, vocab: int = 500) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.7, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_keeps_what_transformers_keeps(temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    theirs = LogitsProcessorList()
    if penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1:
        theirs.append(TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    logits, seen = random_logits(rows=2), [[3, 9, 9, 77], [400, 0, 3, 3]]
    params = GenerationParams(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=1
    )
    expected = theirs(torch.tensor(seen), logits.clone())
    punished = penalise_repetition(logits, seen, penalty) if penalty != 1 else logits
    assert torch.equal(Sampler(params).warp(punished), expected)
    drawn = torch.multinomial(expected.softmax(-1), 1, generator=torch.Generator().manual_seed(1)).flatten()
    assert Sampler(params, make_generator(1, "cpu"))(logits, seen) == drawn.tolist()


def test_temperature_zero_takes_the_best_and_draws_nothing() -> None:
    generator = make_generator(7, "cpu")
    before = generator.get_state()
    logits = random_logits(rows=3)
    ids = Sampler(GenerationParams(temperature=0), generator)(logits, [[], [], []])
    assert ids == logits.argmax(-1).tolist()
    assert torch.equal(generator.get_state(), before)


def test_greedy_still_punishes_repetition() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.9]])
    sampler = Sampler(GenerationParams(temperature=0, repetition_penalty=1.2))
    assert sampler(logits, [[1]]) == [2]
    assert sampler(logits, [[]]) == [1]


def test_same_seed_same_ids_and_no_seed_other_ids() -> None:
    params = GenerationParams(temperature=1.0, top_k=0, top_p=1.0)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(params, make_generator(seed, "cpu"))
        return [sampler(torch.zeros(1, 1000), [[]])[0] for _ in range(8)]

    assert draw(5) == draw(5)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0, 0.95])
def test_broken_logits_are_an_error_not_a_guess(broken: float, temperature: float) -> None:
    logits = random_logits()
    logits[0, 17] = broken
    with pytest.raises(EngineError) as raised:
        Sampler(GenerationParams(temperature=temperature), make_generator(0, "cpu"))(logits, [[]])
    assert raised.value.code == "nan_logits"


def test_half_precision_logits_are_taken() -> None:
    logits = random_logits().half()
    assert Sampler(GenerationParams(temperature=0))(logits, [[]]) == logits.argmax(-1).tolist()


# What ChatGLM-6B's published code keeps and draws (made with its own transformers)


def golden_logits(inputs: dict[str, Any], name: str) -> Tensor:
    if name == "dense":
        from safetensors.torch import load_file

        return load_file(GOLDENS / "sampling.safetensors")["logits.dense"][None]
    recipe = inputs[name]
    logits = torch.full((1, 130528), recipe["background"])
    logits[0, recipe["ids"]] = torch.tensor([float(v) for v in recipe["values"]])
    return logits


@pytest.mark.skipif(not GOLDENS.parent.is_dir(), reason="the reference data is not beside the repository")
def test_published_goldens() -> None:
    golden = json.loads((GOLDENS / "sampling.json").read_text(encoding="utf-8"))
    for case in golden["results"]:
        if case["top_p"] < 0.01:  # below what the page allows
            continue
        params = GenerationParams(temperature=case["temperature"], top_p=case["top_p"], top_k=50)
        logits = golden_logits(golden["inputs"], case["logits"])

        def blanks(logits: Tensor) -> Tensor:
            return blank_where_broken(logits, 5)

        sampler = Sampler(params, make_generator(42, "cpu"), mend=blanks)
        warped = sampler.warp(blanks(logits))[0]
        probabilities, kept = warped.softmax(-1), warped > float("-inf")
        assert int(kept.sum()) == case["n_kept"]
        assert kept[case["kept"]].all()
        wanted = torch.tensor(case["probs"])
        assert torch.allclose(probabilities[case["kept"]], wanted, atol=1e-6)
        drawn = [sampler(logits, [[]])[0] for _ in case["draws_seed42_multinomial"]]
        assert drawn == case["draws_seed42_multinomial"], case["order"]


@pytest.mark.parametrize("vocab", [7, 500, 65024])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_draw_is_that_of_torch(vocab: int, rows: int) -> None:
    """The same id and the same generator afterwards, so that a seed gives what it gave."""
    for seed in range(20):
        ours, theirs = make_generator(seed, "cpu"), make_generator(seed, "cpu")
        logits = random_logits(seed, rows, vocab)
        probabilities = logits.masked_fill(logits < (seed % 3) - 1, float("-inf")).softmax(-1)
        wanted = torch.multinomial(probabilities, 1, generator=theirs).flatten()
        assert torch.equal(draw(probabilities, ours), wanted)
        assert torch.equal(ours.get_state(), theirs.get_state())


class Looks(TorchDispatchMode):
    """Counts how often Python looks at a number, for which a card is waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.multinomial.default, "it looks three times"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("temperature", "looks"), [(0.95, 1), (0, 0)])
def test_a_card_is_waited_for_as_seldom_as_can_be(temperature: float, looks: int) -> None:
    sampler = Sampler(GenerationParams(temperature=temperature), make_generator(1, "cpu"))
    with Looks() as counted:
        sampler(random_logits(), [[]])
    assert counted.count == looks  # and once for the ids
