"""The well-known snippets of the deployment guide, minus trust_remote_code, run in a model's folder.

What differs here: max_length is short, and where there is no card `.cuda()` falls away.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glmui import register_auto_classes
from glmui.quant import QuantizedLinear

Folder = Callable[[str], Path]

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")

LOAD = """
    from transformers import AutoTokenizer, AutoModel

    tokenizer = AutoTokenizer.from_pretrained(".")
    model = AutoModel.from_pretrained(".").float()
    model = model.eval()
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tiny_chatglm: Folder) -> Iterator[None]:
    monkeypatch.chdir(tiny_chatglm("int4"))
    threads = torch.get_num_threads()
    register_auto_classes()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def run(*snippets: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(textwrap.dedent(snippet), names)
    return names


@needs_card
def test_3_1_on_a_card() -> None:
    names = run("""
        from transformers import AutoTokenizer, AutoModel

        tokenizer = AutoTokenizer.from_pretrained(".")
        model = AutoModel.from_pretrained(".").half().cuda()
        model = model.eval()

        response, history = model.chat(tokenizer, "你好,介绍一下你自己", history=[], max_length=48)
        print(response)
    """)
    assert names["history"] == [("你好,介绍一下你自己", names["response"])]


def test_3_1_in_half_without_a_card() -> None:
    names = run("""
        from transformers import AutoTokenizer, AutoModel

        tokenizer = AutoTokenizer.from_pretrained(".")
        model = AutoModel.from_pretrained(".").half()
        model = model.eval()

        response, history = model.chat(tokenizer, "你好,介绍一下你自己", history=[], max_length=26)
    """)
    assert names["model"].dtype == torch.float16
    assert names["history"] == [("你好,介绍一下你自己", names["response"])]


def test_3_2_on_a_cpu() -> None:
    names = run(
        LOAD,
        """
        import torch

        model = model.to('cpu')
        torch.set_num_threads(2)

        response, history = model.chat(tokenizer, "你好", history=[], max_length=32)
        print(response)
        """,
    )
    assert names["history"][0][0] == "你好"


def test_3_3_device_map(monkeypatch: pytest.MonkeyPatch, tiny_chatglm: Folder) -> None:
    monkeypatch.chdir(tiny_chatglm("fp16"))
    names = run("""
        from transformers import AutoModel

        model = AutoModel.from_pretrained(
            ".",
            device_map="auto",
            load_in_4bit=True
        )

        for name, param in model.named_parameters():
            print(f"{name}: {param.device}")
    """)
    assert sum(isinstance(m, QuantizedLinear) for m in names["model"].modules()) == 16


def test_4_1_speed() -> None:
    names = run(
        LOAD,
        """
        import torch

        model = AutoModel.from_pretrained(".", use_quantization_cache=True).float()
        batch_inputs, batch_history = ["你好", "今天天气真不错"], [[], [("a", "b")]]
        answers = model.chat(tokenizer, batch_inputs, batch_history, max_length=80)
        torch.set_num_threads(2)
        """,
    )
    assert [history[-1] for _, history in names["answers"]] == [
        ("你好", names["answers"][0][0]),
        ("今天天气真不错", names["answers"][1][0]),
    ]


@pytest.mark.slow
def test_4_1_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend needs a C++ compiler and half a minute; the graph is the same with this one."""
    from functools import partial

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    names = run(
        LOAD,
        """
        import torch

        plain = model
        model = torch.compile(model)
        inputs = tokenizer(["你好"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            same = torch.equal(model(inputs).logits, plain(inputs).logits)
        response, history = model.chat(tokenizer, "你好", history=[], max_length=32)
        """,
    )
    assert names["same"]
    assert names["history"]


def test_4_2_memory() -> None:
    names = run(
        LOAD,
        """
        model.gradient_checkpointing_enable()

        response, history = model.chat(
            tokenizer,
            "长文本输入",
            history=[],
            max_length=32
        )
        """,
    )
    assert names["history"]


def test_4_2_accelerate(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    names = run("""
        from accelerate import init_empty_weights, load_checkpoint_and_dispatch
        from transformers import AutoTokenizer, AutoModel

        tokenizer = AutoTokenizer.from_pretrained(".")
        with init_empty_weights():
            model = AutoModel.from_pretrained(".")
        empty = {parameter.device.type for parameter in model.parameters()}
        model = load_checkpoint_and_dispatch(
            model,
            ".",
            device_map="auto",
            no_split_module_classes=["GLMBlock"]
        )
        response, history = model.chat(tokenizer, "你好", history=[], max_length=9, do_sample=False)
    """)
    assert names["empty"] == {"meta"}
    assert not any(parameter.is_meta for parameter in names["model"].parameters())
    plain = run(LOAD)
    assert (
        names["response"]
        == plain["model"].half().chat(plain["tokenizer"], "你好", max_length=9, do_sample=False)[0]
    )


def test_4_2_accelerate_with_layers_on_disk(tmp_path: Path) -> None:
    """What device_map="auto" comes to where memory is short: weights are lent to each layer as it runs."""
    accelerate = pytest.importorskip("accelerate")
    names = run(LOAD)
    parts = {"transformer.word_embeddings": "cpu", "transformer.final_layernorm": "cpu", "lm_head": "cpu"}
    layers = {f"transformer.layers.{n}": "disk" if n in (1, 2) else "cpu" for n in range(4)}
    with accelerate.init_empty_weights():
        empty = names["AutoModel"].from_pretrained(".")
    model = accelerate.load_checkpoint_and_dispatch(
        empty, ".", {**parts, **layers}, ["GLMBlock"], offload_folder=str(tmp_path), dtype=torch.float32
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    how = {"max_length": 12, "do_sample": False}
    assert model.chat(names["tokenizer"], "你好", **how) == names["model"].chat(
        names["tokenizer"], "你好", **how
    )


def test_4_3_quantisation(monkeypatch: pytest.MonkeyPatch, tiny_chatglm: Folder) -> None:
    monkeypatch.chdir(tiny_chatglm("fp16"))
    names = run(
        LOAD,
        """
        from glmui import quantize

        model = quantize(
            model,
            weight_bit_width=4,
            use_quantization_cache=True,
            quantization_embeddings=False
        )
        response, history = model.chat(tokenizer, "你好", max_length=24)
        """,
    )
    assert sum(isinstance(m, QuantizedLinear) for m in names["model"].modules()) == 16


def test_5_1_questions_with_a_context() -> None:
    names = run(
        LOAD,
        '''
        def qa_system(question, context, history=[]):
            prompt = f"基于以下上下文回答问题:\\n{context}\\n问题:{question}\\n回答:"
            response, history = model.chat(tokenizer, prompt, history=history, max_length=180)
            return response, history

        context = """
        ChatGLM-6B是一个开源的对话语言模型，基于GLM架构，具有62亿参数。
        """
        response, _ = qa_system("ChatGLM-6B需要多少显存?", context)
        ''',
    )
    assert isinstance(names["response"], str)


def test_5_2_text_generation() -> None:
    names = run(
        LOAD,
        """
        def text_generator(prompt, max_length=64, temperature=0.7):
            inputs = tokenizer([prompt], return_tensors="pt").to("cpu")
            outputs = model.generate(
                **inputs,
                max_length=max_length,
                temperature=temperature,
                do_sample=True,
                top_p=0.85,
                repetition_penalty=1.1
            )
            return tokenizer.decode(outputs[0], skip_special_tokens=True)

        product_prompt = "为以下产品写一段描述:\\n产品:智能手表\\n描述:"
        text = text_generator(product_prompt, max_length=120)
        """,
    )
    assert names["text"].startswith("为以下产品写一段描述:\n产品:智能手表\n描述:")
