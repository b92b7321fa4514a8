"""ChatGLM-6B through transformers' own Auto classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from glmui import quantize, register_auto_classes
from glmui.engine import auto_loading, auto_models, cards
from glmui.engine.card_step import CardStep
from glmui.engine.placement import placement
from glmui.errors import ModelError
from glmui.quant import QuantizedLinear
from glmui.quant.kernels.cuda import BlockKernels, CardKernels, Loaded
from glmui.quant.on_card import CardLinear
from glmui.quantizing.folder import quantize_folder
from tests.chatglm_fixture import KINDS, copy_checkpoint, goldens
from tests.emulated_card import EmulatedModule
from tests.reference import reference

Folder = Callable[[str], Path]
PROMPTS = ["你好", "Hello, how are you today?", "今天天气真不错"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_auto_classes()
    register_auto_classes()  # a second time is no error


def quantized_layers(model: Any) -> int:
    return sum(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_published_greedy_ids(tiny_chatglm: Folder, kind: str) -> None:
    model = AutoModel.from_pretrained(tiny_chatglm(kind)).float()
    for case in goldens()["models"][kind]["prompts"][:4]:
        ids = torch.tensor([case["input_ids"]])
        out = model.generate(ids, max_new_tokens=32, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == case["greedy_ids"]


def test_published_batch(published_chatglm: Folder) -> None:
    case = goldens()["models"]["fp16"]["batch"]
    tokenizer = AutoTokenizer.from_pretrained(published_chatglm("fp16"))
    model = AutoModel.from_pretrained(published_chatglm("fp16")).float()
    inputs = tokenizer(case["prompts"], return_tensors="pt", padding=True)
    assert inputs["input_ids"].tolist() == case["input_ids"]
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert [
        tokenizer.decode(row, skip_special_tokens=True) for row in out[:, inputs["input_ids"].shape[1] :]
    ] == case["decoded"]


def test_published_tokenizer(published_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published_chatglm("int4"))
    golden = json.loads(reference("goldens/tokenizer.json").read_text(encoding="utf-8"))
    for case in golden["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids_no_special"]
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]
    for pair in golden["pairs"]:
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
    for cut in golden["truncation"]:
        assert (
            tokenizer(cut["text"], truncation=True, max_length=cut["max_length"])["input_ids"] == cut["ids"]
        )
    padded = tokenizer(golden["batch_maxlen16"]["texts"], padding="max_length", max_length=16)
    assert padded["input_ids"] == golden["batch_maxlen16"]["input_ids"]
    assert padded["attention_mask"][0] == [0] * 12 + [1] * 4


def test_tokenizer_s_own_ways(tiny_chatglm: Folder, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int4"))
    assert tokenizer.vocab_size == len(tokenizer) == 130344
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (130005, 3, 130004)
    assert tokenizer.convert_tokens_to_ids("[gMASK]") == 130001
    assert tokenizer.convert_ids_to_tokens([4, 130004]) == ["<n>", "<sop>"]
    assert tokenizer.decode(20) == tokenizer.decode([20])
    assert tokenizer.batch_decode(tokenizer(["你好"])["input_ids"]) == ["你好"]
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "ice_text.model").is_file()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_every_auto_class_opens_it(tiny_chatglm: Folder, auto: Any) -> None:
    model = auto.from_pretrained(tiny_chatglm("int4"))
    assert quantized_layers(model) == 16
    assert not model.training


def test_config(tiny_chatglm: Folder) -> None:
    config = AutoConfig.from_pretrained(tiny_chatglm("int4"))
    assert (config.num_layers, config.num_hidden_layers, config.quantization_bit) == (4, 4, 4)


def test_dtypes(tiny_chatglm: Folder) -> None:
    ids = torch.tensor([[5, 20, 130001, 130004]])
    as_stored = AutoModel.from_pretrained(tiny_chatglm("fp16"))
    assert as_stored.transformer.layers[0].mlp.dense_h_to_4h.weight.dtype == torch.float16
    assert as_stored(ids).logits.isfinite().all()
    assert as_stored.half()(ids).logits.dtype == torch.float16
    assert as_stored.float()(ids).logits.dtype == torch.float32
    wished = AutoModel.from_pretrained(tiny_chatglm("fp16"), dtype=torch.bfloat16)
    assert wished(ids).logits.dtype == torch.bfloat16
    assert (
        AutoModel.from_pretrained(tiny_chatglm("int4"), torch_dtype="float32")(ids).logits.dtype
        == torch.float32
    )


def test_quantize_method_and_loading_flags(tiny_chatglm: Folder) -> None:
    ids = torch.tensor([goldens()["models"]["int4"]["prompts"][0]["input_ids"]])
    published = AutoModel.from_pretrained(tiny_chatglm("int4")).float()(ids).logits
    quantised = AutoModel.from_pretrained(tiny_chatglm("fp16")).quantize(4).float()
    assert quantized_layers(quantised) == 16
    assert torch.allclose(quantised(ids).logits, published, atol=0.1)  # norms of float32, not of float16
    flagged = AutoModel.from_pretrained(tiny_chatglm("fp16"), load_in_4bit=True, use_quantization_cache=True)
    assert quantized_layers(flagged) == 16
    both = quantize(AutoModel.from_pretrained(tiny_chatglm("fp16")).float(), 8, quantization_embeddings=True)
    assert quantized_layers(both) == 17
    assert both(ids).logits.isfinite().all()


def test_chat_and_generate_agree(tiny_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int4"))
    model = AutoModel.from_pretrained(tiny_chatglm("int4")).float()
    inputs = tokenizer(["你好"], return_tensors="pt")
    out = model.generate(**inputs, max_length=24, do_sample=False)
    new = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    response, history = model.chat(tokenizer, "你好", history=[], max_length=24, do_sample=False)
    assert response == new.strip()
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", max_length=24, do_sample=False)
    assert streamed == response
    assert history == [("你好", response)]


def test_a_padded_batch_is_single_runs(tiny_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int8"))
    model = AutoModel.from_pretrained(tiny_chatglm("int8")).float()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=10, do_sample=False)
    for prompt, row in zip(PROMPTS, out, strict=True):
        single = tokenizer([prompt], return_tensors="pt")
        alone = model.generate(**single, max_new_tokens=10, do_sample=False)
        assert row[-10:].tolist() == alone[0, -10:].tolist()


def test_beams_and_no_cache(tiny_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("fp16"))
    model = AutoModel.from_pretrained(tiny_chatglm("fp16")).float()
    inputs = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    how = {"max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(**inputs, **how, num_beams=3)
    assert torch.equal(with_cache, model.generate(**inputs, **how, num_beams=3, use_cache=False))
    assert torch.equal(model.generate(**inputs, **how), model.generate(**inputs, **how, use_cache=False))


def test_a_folder_of_chatglm2_or_3_is_asked_about(tiny_chatglm: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(tiny_chatglm("int4"), tmp_path / "chatglm2")
    (folder / "config.json").unlink()
    values = {"model_type": "chatglm", "multi_query_attention": True, "padded_vocab_size": 65024}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError) as caught:
        AutoModel.from_pretrained(folder)
    assert caught.value.code == "model_family_in_doubt"


def test_a_device_map_of_names(tiny_chatglm: Folder) -> None:
    model = AutoModel.from_pretrained(
        tiny_chatglm("int4"), device_map={"": "cpu", "transformer.layers.1": "meta"}
    )
    assert {p.device.type for p in model.transformer.layers[1].parameters()} == {"meta"}
    assert {p.device.type for p in model.transformer.layers[0].parameters()} == {"cpu"}


def test_a_fresh_model_from_its_config(tiny_chatglm: Folder) -> None:
    config = AutoConfig.from_pretrained(tiny_chatglm("int4"))
    config.vocab_size = 130528
    model = AutoModel.from_config(config)
    assert quantized_layers(model) == 16
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


# On a card, which an emulated one stands in for: its tensors lie in memory


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in float16 lies on a card."""
    loaded = Loaded(CardKernels(EmulatedModule(), "sm_86"), BlockKernels(EmulatedModule(), "sm_86"), "")
    device = torch.device("cpu")
    there = cards.Cards({device: loaded})
    monkeypatch.setattr(
        auto_models,
        "cards_of",
        lambda glm: (
            {"cuda:0"}
            if glm.get_submodule(glm.BLOCKS)[0].input_layernorm.weight.dtype == torch.float16
            else ()
        ),
    )
    monkeypatch.setattr(cards, "open_cards", lambda names, folder: there if names else cards.Cards({}))
    monkeypatch.setattr(cards, "CardStep", partial(CardStep, record=None))


def card_layers(model: Any) -> list[CardLinear]:
    return [module for module in model.modules() if isinstance(module, CardLinear)]


@pytest.mark.usefixtures("card")
def test_layers_on_a_card_are_computed_by_its_kernels_as_long_as_they_are_there(tiny_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int4"))
    model = AutoModel.from_pretrained(tiny_chatglm("int4")).float()
    ids = torch.tensor([goldens()["models"]["int4"]["prompts"][0]["input_ids"]])
    how = {"max_length": 14, "do_sample": False}
    with torch.inference_mode():
        assert card_layers(model) == []
        wanted, (said, _) = model(ids).logits, model.chat(tokenizer, "你好", **how)
        names = [name for name, _ in model.named_parameters()]
        model.half()
        assert len(card_layers(model)) == 16
        assert [name for name, _ in model.named_parameters()] == names
        assert (model(ids).logits - wanted).abs().max() < 6e-2
        assert isinstance(model._decoder()._step, CardStep)
        assert model.chat(tokenizer, "你好", **how)[0][:6] == said[:6]
        model.float()
        assert card_layers(model) == []
        assert model._decoder()._step is None
        assert torch.equal(model(ids).logits.argmax(-1), wanted.argmax(-1))


@pytest.mark.usefixtures("card")
def test_training_through_them_is_torchs(tiny_chatglm: Folder) -> None:
    layer = card_layers(AutoModel.from_pretrained(tiny_chatglm("int4")).half())[0]
    x = torch.randn(20, layer.in_features).half().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.usefixtures("card")
def test_the_quantisation_cache_sizes_the_scratch(
    tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmui.quant.on_card.SCRATCH", 1024)
    plain = AutoModel.from_pretrained(tiny_chatglm("int4")).half()
    whole = AutoModel.from_pretrained(tiny_chatglm("int4"), use_quantization_cache=True).half()
    largest = max(2 * layer.in_features * layer.out_features for layer in card_layers(plain))
    assert (scratch_of(plain), scratch_of(whole)) == (1024, largest)
    assert scratch_of(quantize(plain, 4, use_quantization_cache=True)) == largest
    floats = AutoModel.from_pretrained(tiny_chatglm("fp16")).half()
    assert card_layers(floats) == []
    assert scratch_of(quantize(floats, 4, True, quantization_embeddings=True)) == largest  # not the head's


@pytest.mark.usefixtures("card")
def test_a_copy_is_a_model_of_its_own(tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncopied(self: EmulatedModule, protocol: object) -> Any:
        raise TypeError("a card's kernels cannot be copied")

    monkeypatch.setattr(EmulatedModule, "__reduce_ex__", uncopied)
    model = AutoModel.from_pretrained(tiny_chatglm("int4")).half()
    ids = torch.tensor([goldens()["models"]["int4"]["prompts"][0]["input_ids"]])
    with torch.inference_mode():
        wanted, copied = model(ids).logits, deepcopy(model)
        assert torch.equal(copied(ids).logits, wanted)
        assert isinstance(copied._decoder()._step, CardStep)
        assert copied._glm().transformer is copied.transformer
        for part in copied.transformer.parameters():
            part.zero_()
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.slow
@pytest.mark.usefixtures("card")
def test_threads_share_a_card(tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reply is what it is alone, however tokens of several are computed by turns."""
    monkeypatch.setattr("glmui.quant.on_card.SCRATCH", 1 << 15)  # a matrix is widened in several slices
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int4"))
    model = AutoModel.from_pretrained(tiny_chatglm("int4")).half()

    def ask(question: str) -> str:
        said, _ = model.chat(tokenizer, question, max_length=32, do_sample=False)
        return str(said)

    alone = [ask(question) for question in PROMPTS]
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            assert [*threads.map(ask, PROMPTS)] == alone
    finally:
        sys.setswitchinterval(often)


@pytest.mark.usefixtures("card")
def test_a_hook_is_called_for_each_token(tiny_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int4"))
    model = AutoModel.from_pretrained(tiny_chatglm("int4")).half()
    seen: list[torch.Size] = []
    mlp = model.transformer.layers[0].mlp
    handle = mlp.register_forward_hook(lambda module, given, found: seen.append(found.shape))
    assert model._decoder()._step is None
    list(model.stream_chat(tokenizer, "你好", max_length=14, do_sample=False))
    assert len(seen) > 2
    assert {shape[1] for shape in seen[1:]} == {1}
    handle.remove()
    assert isinstance(model._decoder()._step, CardStep)
    mlp.forward = mlp.forward  # as accelerate's hooks do it
    assert model._decoder()._step is None


@pytest.mark.usefixtures("card")
def test_what_was_put_in_a_part_s_place_answers(tiny_chatglm: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chatglm("int4"))
    model = AutoModel.from_pretrained(tiny_chatglm("int4")).half()
    before, how = model.lm_head, {"max_length": 14, "do_sample": False}
    wanted, _ = model.chat(tokenizer, "你好", **how)
    model.lm_head = torch.nn.Linear(before.in_features, before.out_features, bias=False).half()
    assert model._decoder()._step is None
    assert model.chat(tokenizer, "你好", **how)[0] != wanted
    model.lm_head = before
    assert isinstance(model._decoder()._step, CardStep)
    model.transformer.float()
    assert model._decoder()._step is None


def test_the_folder_s_own_form_is_planned_for(
    tiny_chatglm: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, planned = tmp_path / "made", []
    quantize_folder(tiny_chatglm("fp16"), made, 4, group_size=16)
    monkeypatch.setattr(
        auto_loading, "placement", lambda *how: planned.append(placement(*how)) or planned[-1]
    )
    for folder in (tiny_chatglm("int4"), made):
        AutoModel.from_pretrained(folder, device_map="cpu")
    usual, grouped = (found.plan.ram for found in planned)
    assert grouped > usual  # its groups of columns have scales of their own


def scratch_of(model: Any) -> int:
    """Bytes of the memory that its layers widen weights into."""
    (scratch,) = {layer._scratch for layer in card_layers(model)}
    return int(scratch._memory.nbytes)
