"""`glmui bench` on a card: its figures, taken of a small model on the CPU, a card's part stood in for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmui import cli, i18n
from glmui.bench import card_subject, figures, measure, random_model
from glmui.bench.card_subject import CardSubject, CausalCardSubject, PublishedLinear, published_way
from glmui.bench.figures import ABOVE, PEAKS, Figures, NotMeasured
from glmui.engine.causal_lm import open_causal_lm
from glmui.engine.decoders import ChatGLMDecoder, Held, decoder_of
from glmui.engine.wire import error_from
from glmui.errors import InvalidInput
from glmui.glm.checkpoint import load_model
from glmui.quant import QuantizedLinear
from glmui.quant.on_card import head_in_int8
from glmui.tools.bench_results import Results, table
from glmui.tools.measuring import check
from glmui.types import EngineInfo, EngineSpec
from tests.tiny_llama import make_tiny_llama

CARD = EngineInfo(model="m", dtype="int4", device="cuda:0", context_length=2048)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ChatGLMDecoder:
    folder = tmp_path_factory.mktemp("random")
    random_model.write(folder, "tiny")
    model = load_model(folder)
    assert isinstance(model, card_subject.AnyModel)
    return ChatGLMDecoder(model)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two cards that hold what `held` says, once their peaks are begun anew."""
    card = SimpleNamespace(held=[3_000_000_000, 2_000_000_000], begun=[])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", card.begun.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda n: card.held[n])
    return card


def lines(results: Results, language: str) -> list[str]:
    return table(results, lambda key, **values: i18n.text(language, f"cli.{key}", **values))


def filled() -> Results:
    results = Results(info=CARD, load_s=[4.25, 1.5], limits=[600.0], weight_bytes=3_900_000_000)
    results.rows |= {
        "prefill_tok_s": {"512": 900.0},
        "decode_tok_s": {"128": 92.3},
        "peak_vram_gb": {"512": 5.1, "1024": None, "2048": 5.2},
        "published_tok_s": {"prefill": 850.0, "decode": 11.0},
    }
    return results


@pytest.mark.parametrize(
    ("language", "peak", "published", "copied"),
    [
        ("en", "VRAM at its peak, 2048 tokens", "the published way: decode after 128", "memory is copied at"),
        ("zh", "显存峰值（2048 个 token）", "官方做法：在 128 个 token", "显存复制速度"),
    ],
)
def test_the_table_has_what_only_a_card_has(language: str, peak: str, published: str, copied: str) -> None:
    shown = lines(filled(), language)
    text = "\n".join(shown)
    assert "cli." not in text
    assert "{" not in text
    assert next(line for line in shown if peak in line).endswith("5.20 GB")
    assert next(line for line in shown if published in line).endswith("11.0 tok/s")
    assert next(line for line in shown if copied in line).endswith("600 GB/s")
    assert "60%" in text


def test_the_json_has_the_cards_figures_only_on_a_card() -> None:
    found = filled().as_json()
    assert found["copy_gb_s"] == 600.0
    assert found["decode_of_limit"] == 0.6
    assert found["cuda_context_gb"] is None
    assert found["peak_vram_gb"] == {"512": 5.1, "1024": None, "2048": 5.2}
    assert "read_limit_gb_s" not in found
    on_cpu = Results(info=EngineInfo(device="cpu"), load_s=[1, 1]).as_json()
    assert "copy_gb_s" not in on_cpu
    assert "peak_vram_gb" not in on_cpu


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure is taken once, in a few steps."""
    monkeypatch.setattr(figures, "_RUN_SECONDS", 0.01)
    for module in (figures, card_subject):
        monkeypatch.setattr(module, "median_of", lambda once, seconds: once())


@pytest.mark.usefixtures("hurried")
def test_all_figures_of_a_card_are_taken(decoder: ChatGLMDecoder, card: SimpleNamespace) -> None:
    told: dict[str, dict[str, Any]] = {}
    limits = []

    def tell(kind: str, **values: Any) -> None:
        if kind == "figure":
            told.setdefault(values["name"], {})[values["key"]] = values["value"]

    Figures(CardSubject(decoder), CARD, tell, lambda: limits.append(1)).take()
    assert told["peak_vram_gb"] == {str(tokens): 5.0 for tokens in PEAKS}
    assert told[ABOVE] == {"512": 5.0}
    assert card.begun == [0, 1] * (1 + len(PEAKS))
    assert all(value > 0 for row in told.values() for value in row.values())
    assert set(told["published_tok_s"]) == {"prefill", "decode"}
    assert limits  # the copy bandwidth is taken between the runs of decoding


def test_one_conversation_is_decoded_by_the_engines_own_decoder(decoder: ChatGLMDecoder) -> None:
    subject = CardSubject(decoder)
    row = subject.at(40, 1)
    row.reset()
    row.step()
    row.step()
    assert decoder.cache is not None
    assert decoder.cache.length == 42
    row.reset()
    assert decoder.cache.length == 40
    heads = decoder.model.config.kv_heads * decoder.model.config.head_size
    assert row.cache_bytes() == 40 * 2 * heads * 4 * decoder.model.config.num_layers


def test_no_room_for_a_batch_is_a_figure_not_taken(
    decoder: ChatGLMDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(card_subject, "GLMRows", full)
    with pytest.raises(NotMeasured, match="card_memory"):
        CardSubject(decoder).at(16, 4)


def test_no_room_for_the_published_way_is_a_figure_not_taken(
    decoder: ChatGLMDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PublishedLinear, "forward", full)
    for what in figures.PUBLISHED:
        with pytest.raises(NotMeasured, match="card_memory"):
            CardSubject(decoder).published(what)  # type: ignore[arg-type]


def test_a_card_that_is_full_copies_less(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def empty(size: int, **wishes: Any) -> torch.Tensor:
        taken.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(1024, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", empty)
    room = 40 << 20
    assert card_subject.copy_gb_s("cuda:0", copies=1) > 0
    assert taken == [128 << 20, 32 << 20]
    room = 0
    with pytest.raises(NotMeasured, match="card_memory"):
        card_subject.copy_gb_s("cuda:0")


def test_a_table_that_is_not_the_head_is_not_read(tmp_path: Path) -> None:
    random_model.write(tmp_path, "tiny")
    model = load_model(tmp_path)
    before = CardSubject(ChatGLMDecoder(model)).weight_bytes  # type: ignore[arg-type]
    head = model.get_submodule(model.HEAD)
    assert isinstance(head, torch.nn.Linear)
    model.set_submodule(model.HEAD, head_in_int8(head, torch.device("cpu")))
    after = CardSubject(ChatGLMDecoder(model)).weight_bytes  # type: ignore[arg-type]
    assert after == before - head.weight.nbytes // 2 + 2 * len(head.weight)


def test_the_published_way_computes_the_same_and_is_put_back(decoder: ChatGLMDecoder) -> None:
    model, prompt = decoder.model, [5, 6, 7, 130001, 130004]
    before = model(torch.tensor([prompt]))
    with published_way(model):
        assert sum(isinstance(m, PublishedLinear) for m in model.modules()) == 8
        within = model(torch.tensor([prompt]))
    assert not any(isinstance(m, PublishedLinear) for m in model.modules())
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 8
    assert torch.allclose(within, before, atol=1e-4)


@pytest.mark.parametrize("cap", ["0", "-1", "nan", "70000"])
def test_a_cap_that_no_card_has_is_refused(
    cap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "--random", "tiny", f"--vram-cap={cap}", "--data-dir", str(tmp_path)]
    assert cli.main(asked) == 2
    assert "--vram-cap" in capsys.readouterr().err


# Above weights and cache


@pytest.fixture
def everything_on_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_subject, "on_cards", lambda tensors: card_subject.bytes_of(*_once(tensors)))


def _once(tensors: Any) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


@pytest.mark.usefixtures("everything_on_cards")
def test_what_a_prompt_takes_is_told_beside_weights_and_the_whole_cache(
    decoder: ChatGLMDecoder, card: SimpleNamespace
) -> None:
    planned = decoder_of(decoder.model, Held(1024, 1024))
    subject = CardSubject(planned)
    card.held = [3_000_000_000, 0]
    above = subject.prefill_peak(64)
    weights, cache = subject.vram_kept()
    assert card.begun == [0, 1]
    assert weights == sum(tensor.nbytes for tensor in decoder.model.parameters())
    assert cache == 1024 * 2 * 32 * 4 * 2  # keys and values of two layers in float32, not 64 tokens of them
    assert above == 3_000_000_000 - weights - cache


@pytest.mark.usefixtures("everything_on_cards")
def test_a_transformers_model_has_these_figures_too(tmp_path: Path, card: SimpleNamespace) -> None:
    engine = open_causal_lm(EngineSpec("llama", str(make_tiny_llama(tmp_path)), "cpu", 1), lambda _: None)
    assert engine.speaker is not None
    subject = CausalCardSubject(engine.speaker.decoder)  # type: ignore[arg-type]
    card.held = [1_000_000_000, 0]
    above, (weights, cache) = subject.prefill_peak(20), subject.vram_kept()
    assert weights > 0
    assert cache > 0
    assert above == 1_000_000_000 - weights - cache
    assert subject.peak(60) == 1_000_000_000


@pytest.mark.usefixtures("hurried")
def test_where_a_card_took_part_its_memory_is_told(decoder: ChatGLMDecoder, card: SimpleNamespace) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    info = EngineInfo(family="chatglm", device="mixed", layers=("cuda:0", "cpu"), context_length=2048)
    engine = SimpleNamespace(info=lambda: info, speaker=SimpleNamespace(decoder=decoder))
    wire = SimpleNamespace(send=lambda kind, **values: told.append((kind, values)), receive=dict)
    measure._measure(engine, wire)  # type: ignore[arg-type]
    names = {values["name"] for kind, values in told if kind == "figure"}
    assert {"peak_vram_gb", ABOVE} < names
    assert "published_tok_s" not in names  # half of the layers would not be computed that way
    assert told[-1][0] == "vram"


def test_the_json_tells_weights_and_cache_of_every_card_that_took_part() -> None:
    mixed = EngineInfo(device="mixed", layers=("cuda:0", "cpu"))
    results = Results(info=mixed, load_s=[1, 1], vram_weights=2_500_000_000, vram_cache=940_000_000)
    results.rows["peak_vram_gb"]["512"], results.rows[ABOVE]["512"] = 3.8, 0.31
    found = results.as_json()
    assert (found["weights_vram_gb"], found["cache_vram_gb"]) == (2.5, 0.94)
    assert found["peak_above_weights_and_cache_gb"] == {"512": 0.31}
    assert "published_tok_s" not in found
    for language in ("en", "zh"):
        text = "\n".join(lines(results, language))
        assert "0.31 GB" in text
        assert "cli." not in text


# What has no meaning here


def test_a_cap_without_a_card_is_refused() -> None:
    capped = EngineSpec("m", "f", vram_cap=6 << 30)
    with pytest.raises(InvalidInput, match="--vram-cap") as caught:
        check(capped, Results(info=EngineInfo(family="chatglm", device="cpu", layers=("cpu",))))
    assert caught.value.code == "bench_cap_without_card"
    with pytest.raises(InvalidInput, match="--vram-cap"):  # no plan is made for it
        check(capped, Results(info=EngineInfo(family="causal_lm", device="cuda:0")))
    check(capped, Results(info=EngineInfo(family="chatglm", device="mixed", layers=("cuda:0", "cpu"))))


def test_layers_that_count_for_nothing_are_told() -> None:
    results = Results(info=EngineInfo(family="chatglm", device="cpu"), load_s=[1, 1])
    check(EngineSpec("m", "f", "cpu", layers_on_gpu=14), results)
    assert "--layers-on-gpu 14 has no effect" in lines(results, "en")[-1]
    heard = Results(info=EngineInfo(family="chatglm", device="mixed"), load_s=[1, 1])
    check(EngineSpec("m", "f", "mixed", layers_on_gpu=14), heard)
    assert not any("--layers-on-gpu" in line for line in lines(heard, "en"))


def test_memory_that_runs_out_while_measuring_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    wire = SimpleNamespace(send=lambda kind, **values: told.append(values["error"]))
    monkeypatch.setattr(measure, "begin", lambda: None)
    monkeypatch.setattr(measure, "Wire", lambda connection: wire)
    monkeypatch.setattr(measure, "load", lambda spec, wire: SimpleNamespace())

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    measure.serve(None, EngineSpec("m", "f"), full)  # type: ignore[arg-type]
    monkeypatch.setattr(measure, "load", full)
    measure.serve(None, EngineSpec("m", "f"), full)  # type: ignore[arg-type]
    errors = [error_from(values) for values in told]
    assert [error.code for error in errors] == ["bench_ran_out", "out_of_memory"]
    words = errors[0].message("en")
    assert "text so far" not in words
    assert "cuda:0" in words
