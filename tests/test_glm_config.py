"""config.json as values."""

from __future__ import annotations

from typing import Any

import pytest

from glmui.errors import ModelError
from glmui.glm.config import GLMConfig
from tests.chatglm_fixture import config


def test_published_values() -> None:
    found = GLMConfig.from_values(config("int4"))
    assert (found.hidden_size, found.num_layers, found.head_size, found.quantization_bit) == (32, 4, 16, 4)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (130004, 130005, 3)
    assert GLMConfig.from_values(config("fp16")).quantization_bit == 0


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_layers": 10**6},
        {"hidden_size": "32"},
        {"hidden_size": 32.0},
        {"hidden_size": 30},
        {"num_attention_heads": True},
        {"layernorm_epsilon": "1e-5"},
        {"layernorm_epsilon": float("nan")},
        {"bos_token_id": [1]},
        {"quantization_bit": 3},
        {"position_encoding_2d": False},
        {"vocab_size": None},
    ],
)
def test_values_no_model_has_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        GLMConfig.from_values({**config("int4"), **change})
    assert caught.value.code == "model_config_bad"
    assert next(iter(change)) in caught.value.message()


@pytest.mark.parametrize("key", ["multi_query_attention", "padded_vocab_size", "ffn_hidden_size"])
def test_chatglm2_and_3_are_told_apart(key: str) -> None:
    with pytest.raises(ModelError) as caught:
        GLMConfig.from_values({"model_type": "chatglm", key: 1}, "somewhere")
    assert caught.value.code == "model_is_chatglm2"
    assert "somewhere" in caught.value.message("zh")
