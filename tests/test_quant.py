"""Packing, quantised layers and quantize(model)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from glmui.errors import InvalidInput
from glmui.glm.checkpoint import load_model
from glmui.quant import QuantizedEmbedding, QuantizedLinear, matmul, packing, quantize
from tests.chatglm_fixture import DATA, tensors

KINDS = {"qkv": "attention.query_key_value", "h_to_4h": "mlp.dense_h_to_4h", "4h_to_h": "mlp.dense_4h_to_h"}


@pytest.mark.parametrize("bits", [4, 8])
def test_published_weights_come_back_exactly(bits: int) -> None:
    stored = tensors(f"int{bits}")
    golden = load_file(DATA / "dequantised_layer1.safetensors")
    for short, name in KINDS.items():
        weight = stored[f"transformer.layers.1.{name}.weight"]
        scale = stored[f"transformer.layers.1.{name}.weight_scale"]
        wide = golden[f"int{bits}.layer1.{short}"]
        assert torch.equal(packing.dequantize_weight(weight, scale, bits, wide.shape[1], torch.float32), wide)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_again_gives_the_published_bytes(bits: int) -> None:
    floats, stored = tensors("fp16"), tensors(f"int{bits}")
    scales = [name for name in stored if name.endswith("weight_scale")]
    assert len(scales) == 16
    for name in scales:
        weight = name.removesuffix("_scale")
        again, scale = packing.quantize_weight(floats[weight], bits)
        assert torch.equal(again, stored[weight])
        assert torch.equal(scale, stored[name])


int4_rows = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-8, 7), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@settings(deadline=None)
@given(int4_rows)
def test_packing_comes_back(rows: list[list[int]]) -> None:
    q = torch.tensor(rows, dtype=torch.int8)
    packed = packing.pack_int4(q)
    assert packed.shape == (len(rows), -(-len(rows[0]) // 2))
    assert torch.equal(packing.unpack_int4(packed)[:, : q.shape[1]], q)


def test_the_even_column_is_the_high_nibble() -> None:
    assert packing.pack_int4(torch.tensor([[1, -1]], dtype=torch.int8)).tolist() == [[0x1F]]


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([4, 8]),
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([None, 2]),
)
def test_quantised_is_within_half_a_step(
    seed: int, bits: int, rows: int, columns: int, group_size: int | None
) -> None:
    columns = columns * 2 if group_size else columns
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    stored, scale = packing.quantize_weight(weight, bits, group_size)
    wide = packing.dequantize_weight(stored, scale, bits, columns, torch.float32)
    step = scale[:, None] if scale.dim() == 1 else scale.repeat_interleave(2, dim=1)
    assert ((wide - weight).abs() <= step * 0.5001).all()


def test_ties_go_to_even() -> None:
    stored, _ = packing.quantize_weight(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5]]), 8)
    assert stored.tolist() == [[127, 0, 2, 2, 0]]


def test_a_row_of_zeros_stays_zeros() -> None:
    stored, scale = packing.quantize_weight(torch.zeros(2, 4), 4)
    assert not stored.any()
    assert not scale.any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(12, None), (7, None), (12, 4)])
def test_matmul_is_that_of_the_wide_matrix(
    monkeypatch: pytest.MonkeyPatch, bits: int, columns: int, group_size: int | None
) -> None:
    if columns % 2 and group_size:
        pytest.skip("groups are whole bytes")
    weight, x = torch.randn(10, columns), torch.randn(2, 3, columns)
    stored, scale = packing.quantize_weight(weight, bits, group_size)
    wide = packing.dequantize_weight(stored, scale, bits, columns, torch.float32)
    expected = x @ wide.T
    assert torch.allclose(matmul(x, stored, scale, bits), expected, atol=1e-5)
    monkeypatch.setattr(packing, "BLOCK", 3 * columns)  # three rows at a time
    assert torch.allclose(matmul(x, stored, scale, bits), expected, atol=1e-5)


def test_no_whole_matrix_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 64 * 4)
    widest: list[int] = []
    scaled = packing.scaled
    monkeypatch.setattr(
        "glmui.quant.linear.scaled", lambda q, s, d: (widest.append(q.numel()), scaled(q, s, d))[1]
    )
    matmul(torch.randn(1, 64), *packing.quantize_weight(torch.randn(100, 64), 4), 4)
    assert max(widest) <= 64 * 4


class Net(nn.Module):
    """An embedding, two linears of which one hangs in two places, and a tied head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.first = nn.Sequential(nn.Linear(8, 16), nn.GELU())
        self.second = nn.Linear(16, 8, bias=False)
        self.again = self.second
        self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.again(self.first(self.table(ids))))
        return out


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_any_model(bits: int) -> None:
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    before = model(IDS)
    assert quantize(model, bits) is model
    assert isinstance(model.first[0], QuantizedLinear)
    assert model.second is model.again
    assert isinstance(model.second, QuantizedLinear)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.table.weight
    assert (model(IDS) - before).abs().max() < (0.5 if bits == 4 else 0.03)
    after = model(IDS)
    assert torch.equal(quantize(model, bits)(IDS), after)  # a second time changes nothing


@pytest.mark.parametrize("tied", [True, False])
def test_quantize_embeddings_too(tied: bool) -> None:
    torch.manual_seed(0)
    model = Net(tied).requires_grad_(False)
    before = model(IDS)
    quantize(model, 8, use_quantization_cache=True, quantization_embeddings=True)
    assert isinstance(model.table, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert (model.lm_head.weight is model.table.weight) == tied
    assert (model(IDS) - before).abs().max() < 0.05


def test_finer_groups_are_nearer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * torch.logspace(-2, 0, 256)
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    x = torch.randn(8, 256)
    errors = [float((QuantizedLinear.of(linear, 4, size)(x) - linear(x)).norm()) for size in (None, 64, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_wishes_that_cannot_be_are_refused() -> None:
    for bits, group_size, code in (
        (3, None, "bits_unknown"),
        (4, 7, "group_size_does_not_fit"),
        (4, 1, "group_size_does_not_fit"),
    ):
        with pytest.raises(InvalidInput) as caught:
            quantize(Net(), bits, group_size=group_size)
        assert caught.value.code == code


def test_half_and_float_leave_the_bytes_alone() -> None:
    layer = QuantizedLinear.of(nn.Linear(8, 8), 4)
    bytes_before = layer.weight.clone()
    half = layer.half()
    assert half.weight_scale.dtype == torch.float16
    assert torch.equal(half.weight, bytes_before)
    assert half(torch.randn(1, 8).half()).dtype == torch.float16
    assert "weight_bit_width=4" in repr(layer)


def test_quantize_a_loaded_chatglm(tiny_chatglm: Callable[[str], Path]) -> None:
    prompt = torch.tensor([[5, 20, 130001, 130004]])
    with torch.inference_mode():
        model = quantize(load_model(tiny_chatglm("fp16")), 8)
        near = load_model(tiny_chatglm("int8"))
        assert (model(prompt) - near(prompt)).abs().max() < 0.5  # scales of float32, not of float16
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 16
