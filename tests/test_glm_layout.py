"""Positions and masks, against the published ones and by what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glmui.errors import InvalidInput
from glmui.glm.config import GLMConfig
from glmui.glm.layout import Layout, pad_left
from tests.chatglm_fixture import config, goldens

CONFIG = GLMConfig.from_values(config("fp16"))
GOLDEN = goldens()["models"]["fp16"]


@pytest.mark.parametrize("case", GOLDEN["prompts"], ids=lambda case: case["name"])
def test_published_prompts(case: dict[str, Any]) -> None:
    ids = torch.tensor([case["input_ids"]])
    layout, length = Layout.of(ids, CONFIG), ids.shape[1]
    masked = ~layout.visible(0, length, length)
    assert layout.positions(0, length)[0].tolist() == case["position_ids"]
    assert list(masked.shape) == case["attention_mask_shape"]
    assert int(masked.sum()) == case["attention_mask_true_count"]
    if case.get("attention_mask_rows"):
        assert masked[0, 0].int().tolist() == case["attention_mask_rows"]


def test_published_batch() -> None:
    case = GOLDEN["batch"]
    ids = torch.tensor(case["input_ids"])
    pads = (ids == CONFIG.pad_token_id).sum(-1)
    layout, length = Layout.of(ids, CONFIG, pads), ids.shape[1]
    assert layout.positions(0, length).tolist() == case["position_ids"]
    assert (~layout.visible(0, length, length)).int().tolist() == case["attention_mask"]


def test_decoding_goes_on_inside_the_gap() -> None:
    layout = Layout.of(torch.tensor([[5, 6, 130001, 130004]]), CONFIG)
    assert layout.positions(4, 7)[0].tolist() == [[2, 2, 2], [2, 3, 4]]
    assert layout.visible(6, 7, 7).all()


def test_a_piece_of_the_mask_is_the_mask_s_piece() -> None:
    layout = Layout.of(torch.tensor([[3, 3, 5, 6, 130001, 130004, 7]]), CONFIG, torch.tensor([2]))
    whole = layout.visible(0, 7, 7)
    assert torch.equal(whole[:, :, 2:5], layout.visible(2, 5, 7))
    assert not whole[..., :2].any()


def test_a_typed_sop_cuts_the_context_short() -> None:
    """a<sop>b as the published tokenizer encodes it; the app keeps such text literal instead."""
    layout = Layout.of(torch.tensor([[104, 130004, 178, 130001, 130004]]), CONFIG)
    assert layout.positions(0, 5)[0].tolist() == [[0, 3, 3, 3, 3], [0, 1, 2, 3, 4]]


def test_mask_is_the_gap_where_there_is_no_gmask() -> None:
    layout = Layout.of(torch.tensor([[5, 130000, 6, 130004]]), CONFIG)
    assert layout.positions(0, 4)[0].tolist() == [[0, 1, 2, 1], [0, 0, 0, 1]]


def test_pad_left() -> None:
    ids, pads = pad_left([[5, 130001, 130004], [130001, 130004]], CONFIG)
    assert ids.tolist() == [[5, 130001, 130004], [3, 130001, 130004]]
    assert pads is not None
    assert pads.tolist() == [0, 1]
    assert pad_left([[130001, 130004]], CONFIG)[1] is None


@pytest.mark.parametrize("ids", [[5, 6], [5, 130004], [5, 130001], []])
def test_ids_without_a_gap_are_refused(ids: list[int]) -> None:
    with pytest.raises(InvalidInput) as caught:
        pad_left([ids], CONFIG)
    assert caught.value.code == "prompt_without_gap"
