"""Any transformers chat model: the same numbers with and without a kept cache, only safetensors."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM

from glmui.engine.causal_lm import CausalDecoder, open_causal_lm, piece_length
from glmui.engine.generate import Cancelled
from glmui.engine.loaded import LoadedEngine
from glmui.engine.precision import Precision
from glmui.errors import InvalidInput, ModelError
from glmui.quant import QuantizedLinear
from glmui.text.chat_template import ChatTokenizer
from glmui.types import Chunk, EngineSpec, GenerationParams, Message, Progress
from tests.tiny_llama import TEMPLATE, make_tiny_llama, write_tokenizer

CPU = torch.device("cpu")
GREEDY = GenerationParams(temperature=0, max_new_tokens=12)
QUESTION = [Message("user", "Hello, how are you?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return loaded


@pytest.fixture
def engine(folder: Path) -> LoadedEngine:
    return open_causal_lm(spec_of(folder), lambda progress: None)


def spec_of(folder: Path, **values: object) -> EngineSpec:
    return EngineSpec("tiny", str(folder), **({"device": "cpu", "threads": 1} | values))  # type: ignore[arg-type]


def last_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


def reply(
    engine: LoadedEngine, messages: list[Message], params: GenerationParams = GREEDY
) -> tuple[str, Chunk]:
    chunks = list(engine.stream_chat(messages, params, "request"))
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def test_prefill_in_pieces_and_steps_equal_one_pass(model: torch.nn.Module) -> None:
    ids = [int(i) for i in torch.randint(3, 290, (70,), generator=torch.Generator().manual_seed(1))]
    decoder, parts = CausalDecoder(model, CPU), []
    decoder._piece = 16
    with torch.inference_mode():
        assert torch.allclose(decoder.prefill(ids, parts.append), last_logits(model, ids), atol=1e-4)
        assert parts == [16 / 70, 32 / 70, 48 / 70, 64 / 70, 1.0]
        for token in (5, 9, 200):
            ids.append(token)
            assert torch.allclose(decoder.step(token), last_logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("shared", [0, 1, 17, 40])
@pytest.mark.parametrize("rest", [0, 1, 30])
def test_a_kept_prefix_gives_the_logits_of_a_fresh_prefill(
    model: torch.nn.Module, shared: int, rest: int
) -> None:
    before = list(range(10, 50))
    after = before[:shared] + [250 - i for i in range(rest)] or [7]
    decoder = CausalDecoder(model, CPU)
    with torch.inference_mode():
        decoder.prefill(before, lambda part: None)
        decoder.step(3)
        read: list[float] = []
        logits = decoder.prefill(after, read.append)
    assert torch.allclose(logits, last_logits(model, after), atol=1e-4)


def test_the_next_round_reads_only_what_is_new(model: torch.nn.Module) -> None:
    decoder, sizes = CausalDecoder(model, CPU), []
    forward = decoder._forward
    decoder._forward = lambda ids: sizes.append(len(ids)) or forward(ids)  # type: ignore[method-assign, func-returns-value]
    with torch.inference_mode():
        decoder.prefill(list(range(40)), lambda part: None)
        decoder.prefill(list(range(45)), lambda part: None)
        decoder.prefill(list(range(45)), lambda part: None)  # regenerate: the last id alone is read again
    assert sizes == [40, 5, 1]


@pytest.mark.parametrize("name", ["Glm", "Glm4", "Qwen2"])
def test_other_families_of_transformers(name: str) -> None:
    """GLM-4, GLM-Edge and their like: pieces, steps and a kept prefix give what one pass gives."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    decoder, ids = CausalDecoder(model, CPU), list(range(30, 70))
    decoder._piece = 16
    with torch.inference_mode():
        decoder.prefill([*ids[:20], 5, 6, 7], lambda part: None)
        assert torch.allclose(decoder.prefill(ids, lambda part: None), last_logits(model, ids), atol=1e-3)
        assert torch.allclose(decoder.step(9), last_logits(model, [*ids, 9]), atol=1e-3)


def test_a_sliding_window_model_is_right_too() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.5,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    decoder, ids = CausalDecoder(model, CPU), list(range(30, 60))
    with torch.inference_mode():
        decoder.prefill([*ids, 5, 6, 7], lambda part: None)
        assert torch.allclose(decoder.prefill(ids, lambda part: None), last_logits(model, ids), atol=1e-4)


def test_a_stopped_prefill_leaves_the_next_one_right(model: torch.nn.Module) -> None:
    decoder, ids = CausalDecoder(model, CPU), list(range(3, 83))
    decoder._piece = 16

    def stop(part: float) -> None:
        if part > 0.5:
            raise Cancelled

    with torch.inference_mode():
        with pytest.raises(Cancelled):
            decoder.prefill(ids, stop)
        assert torch.allclose(decoder.prefill(ids, lambda part: None), last_logits(model, ids), atol=1e-4)


def test_same_reply_as_transformers(engine: LoadedEngine, folder: Path, model: torch.nn.Module) -> None:
    tokenizer = ChatTokenizer.from_folder(folder)
    ids = tokenizer.encode_chat(QUESTION)
    theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)  # type: ignore[operator]
    text, last = reply(engine, QUESTION)
    assert text == tokenizer.decode(theirs[0, len(ids) :].tolist())
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(ids)
    assert reply(engine, QUESTION)[0] == text  # from the kept cache


def test_a_prompt_too_long_is_refused_and_harms_nothing(engine: LoadedEngine) -> None:
    text, _ = reply(engine, QUESTION)
    with pytest.raises(InvalidInput):
        reply(engine, [Message("user", "x" * 5000)])
    assert reply(engine, QUESTION)[0] == text


def test_cancel_before_the_first_token(engine: LoadedEngine) -> None:
    engine.cancel("request")
    assert reply(engine, QUESTION)[1].finish_reason == "cancelled"


def test_what_the_engine_tells_of_itself(folder: Path) -> None:
    seen: list[Progress] = []
    info = open_causal_lm(spec_of(folder), seen.append).info()
    assert (info.state, info.family, info.device, info.dtype) == ("ready", "causal_lm", "cpu", "float32")
    assert (info.context_length, info.threads, info.reason) == (512, 1, "reasons.cpu_float32")
    assert seen[0].stage == "loading"


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_causal_lm(spec_of(folder), lambda progress: None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_while_loading(folder: Path, quantize: str) -> None:
    engine = open_causal_lm(spec_of(folder, quantize=quantize), lambda progress: None)
    assert engine.info().dtype == quantize
    assert reply(engine, QUESTION)[1].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("device", "code"), [("cuda:7", "device_missing"), ("mixed", "device_mixed"), ("mps", "device_missing")]
)
def test_a_device_that_is_not_there(folder: Path, device: str, code: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        open_causal_lm(spec_of(folder, device=device), lambda progress: None)
    assert raised.value.code == code


def test_a_models_own_code_never_runs(tmp_path: Path) -> None:
    from tests.tiny_llama import write_json

    folder = make_tiny_llama(tmp_path / "model")
    trap = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\n", encoding="utf-8")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    write_json(
        folder / "config.json",
        {"model_type": "evil", "auto_map": names, "architectures": ["EvilForCausalLM"]},
    )
    with pytest.raises(ModelError) as raised:
        open_causal_lm(spec_of(folder), lambda progress: None)
    assert raised.value.code == "model_not_loadable"
    assert not trap.exists()


def test_pieces_are_smaller_where_the_model_is_large() -> None:
    assert piece_length(135_000_000, CPU) == 128
    assert piece_length(1_000_000, CPU) == 256
    assert piece_length(9_000_000_000, CPU) == 16
    assert piece_length(9_000_000_000, torch.device("cuda:0")) == 512


# On a card, which another name of this computer's memory stands in for


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Precision("cpu:0", "float32", "reasons.card_float16")
    monkeypatch.setattr("glmui.engine.causal_lm.precision_of", lambda *_: where)


def test_a_card_is_warm_before_anybody_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    inner = CausalDecoder._forward

    def forward(self: CausalDecoder, ids: list[int]) -> torch.Tensor:
        taken.append(len(ids))
        return inner(self, ids)

    monkeypatch.setattr(CausalDecoder, "_forward", forward)
    cold = open_causal_lm(spec_of(folder), lambda progress: None)
    assert taken == []
    on_a_card(monkeypatch)
    warm = open_causal_lm(spec_of(folder), lambda progress: None)
    assert taken[0] > 8  # a prompt, then tokens one by one
    assert taken[1:] == [1, 1]
    assert reply(warm, QUESTION)[0] == reply(cold, QUESTION)[0]


def test_a_warm_up_prevents_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may want a system text first, which the warm-up does not have."""
    folder = make_tiny_llama(tmp_path / "model")
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    write_tokenizer(folder, wants + TEMPLATE)
    on_a_card(monkeypatch)
    engine = open_causal_lm(spec_of(folder), lambda progress: None)
    with pytest.raises(InvalidInput):
        reply(engine, QUESTION)
    assert reply(engine, [Message("system", "Be brief."), *QUESTION])[1].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("error", "loads"), [(torch.OutOfMemoryError("CUDA out of memory"), False), (RuntimeError("odd"), True)]
)
def test_memory_that_runs_out_in_a_warm_up_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, loads: bool
) -> None:
    forward = CausalDecoder._forward

    def fails(self: CausalDecoder, ids: list[int]) -> NoReturn:
        raise error

    on_a_card(monkeypatch)
    monkeypatch.setattr(CausalDecoder, "_forward", fails)
    with nullcontext() if loads else pytest.raises(torch.OutOfMemoryError):
        engine = open_causal_lm(spec_of(folder), lambda progress: None)
    if loads:
        monkeypatch.setattr(CausalDecoder, "_forward", forward)
        assert reply(engine, QUESTION)[1].finish_reason in ("stop", "length")


def test_what_goes_to_a_card_is_small_already(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fits only once it is quantised."""
    inner, moved = torch.nn.Module.to, []

    def to(self: torch.nn.Module, *where: Any, **more: Any) -> torch.nn.Module:
        if where == ("cpu:0",):
            moved.append(sum(isinstance(module, QuantizedLinear) for module in self.modules()))
        return inner(self, *where, **more)

    on_a_card(monkeypatch)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    open_causal_lm(spec_of(folder, quantize="int4"), lambda progress: None)
    assert moved == [14]
