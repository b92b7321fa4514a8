"""A folder from elsewhere becomes a model folder of ours, or nothing at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmui import confined
from glmui.confined import Ended, Reason
from glmui.errors import FetchError, ModelError
from glmui.glm.checkpoint import published_name
from glmui.hub import expected, importer, manifest
from glmui.hub.catalogue import Licence, Offer, RemoteFile
from glmui.hub.importer import ImportJob, Quantize
from glmui.hub.importing import import_model
from glmui.types import Progress, Stage
from tests.chatglm_fixture import EMBEDDING, copy_checkpoint, tensors
from tests.hostile_models import CASES, os_system

Folder = Callable[[str], Path]


def never() -> bool:
    return False


def quiet(*_: Any) -> None:
    """Nobody watches."""


@pytest.fixture
def source(tiny_chatglm: Folder, tmp_path: Path) -> Path:
    """A published INT4 folder to change."""
    return copy_checkpoint(tiny_chatglm("int4"), tmp_path / "source")


@pytest.fixture
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What binds a process is left out: this one has more tests to run."""
    monkeypatch.setattr(importer, "stop_making_threads", quiet)
    monkeypatch.setattr(importer, "ENVIRONMENT", {})
    monkeypatch.setattr(expected, "warm_up", quiet)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Programs started, connections made and files opened for writing meanwhile, by the interpreter's own
    account. A hook stays for good, so it minds only its own time."""
    seen: list[str] = []
    active = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not active:
            return
        if event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.")):
            seen.append(event)
        elif (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            seen.append(f"open {args[0]}")

    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        active = False


def published(kind: str) -> dict[str, torch.Tensor]:
    """What of a published checkpoint is needed."""
    return {name: tensor for name, tensor in tensors(kind).items() if published_name(name)}


def import_unbound(source: Path, made: Path, quantize: Quantize = "none", **stated: Any) -> None:
    importer.import_here(quiet, ImportJob(source, made, quantize, **stated))


def assert_same(made: Path, wanted: dict[str, torch.Tensor]) -> None:
    weights = load_file(made / "model.safetensors")
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())


# What hostile files come to


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_become_nothing(
    source: Path, unbound: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    damage, code = CASES[name]
    damage(source)
    if "vocabulary" not in name:  # which takes a moment to open, and is right
        monkeypatch.setattr(expected, "open_tokenizer", quiet)
    made = tmp_path / "shop" / "made"
    made.parent.mkdir()
    began = time.process_time()
    with watched() as seen, pytest.raises(ModelError) as caught:
        import_unbound(source, made)
    assert caught.value.code == code
    assert time.process_time() - began < 5
    assert [event for event in seen if not event.startswith("open /dev/null")] == []
    assert not (tmp_path / "RAN").exists()
    assert not made.exists()
    for language in ("en", "zh"):
        sentence = caught.value.message(language)
        assert "{" not in sentence
        assert "\x1b" not in sentence
        assert sentence[-1] in ".。"


def test_there_are_more_than_forty() -> None:
    assert len(CASES) > 40


# In the limited process


def test_a_folder_imported(tiny_chatglm: Folder, tmp_path: Path) -> None:
    """The real way: published .bin in, one safetensors file, vocabulary and manifest out."""
    folder, made = tiny_chatglm("int4"), tmp_path / "shop" / "tiny"
    seen: list[Progress] = []
    made.parent.mkdir()
    import_model(folder, made, None, "none", {}, seen.append, never)
    files = ["config.json", "glmui.json", "ice_text.model", "model.safetensors", "tokenizer_config.json"]
    assert sorted(path.name for path in made.iterdir()) == files
    assert_same(made, published("int4"))
    told = manifest.read(made)
    assert told is not None
    assert told.files == manifest.stored_in(made)
    assert told.made_from == {"pytorch_model.bin": manifest.stored(folder / "pytorch_model.bin")}
    stages = [progress.stage for progress in seen]
    assert stages == sorted(stages)
    assert set(stages) == {"checking", "converting"}
    assert seen[-1].fraction == 1.0


def test_a_program_in_the_real_process(source: Path, tmp_path: Path) -> None:
    os_system(source)
    made = tmp_path / "shop" / "made"
    made.parent.mkdir()
    with pytest.raises(ModelError) as caught:
        import_model(source, made, None, "none", {}, quiet, never)
    assert caught.value.code == "model_file_program"
    assert "system" in caught.value.message()
    assert list(made.parent.iterdir()) == []
    assert not (tmp_path / "RAN").exists()


def test_cancelled(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        import_model(source, tmp_path / "made", None, "none", {}, quiet, lambda: True)
    assert caught.value.code == "fetch_cancelled"


@pytest.mark.parametrize("reason", ["memory", "time", "died"])
def test_how_the_process_ended_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    def ends(*_: Any) -> None:
        raise Ended(reason, "exit code -11")

    monkeypatch.setattr(confined, "run", ends)
    with pytest.raises(ModelError) as caught:
        import_model(source, tmp_path / "made", None, "none", {}, quiet, never)
    assert caught.value.code == f"import_{reason}"
    assert str(source) in caught.value.message()


def test_a_link_that_was_made_is_not_followed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.safetensors").symlink_to("/etc/passwd")
    monkeypatch.setattr(confined, "run", quiet)
    with pytest.raises(ModelError) as caught:
        import_model(source, made, None, "none", {}, quiet, never)
    assert caught.value.code == "import_died"


# Steps, in this process


def made_of(source: Path, tmp_path: Path, quantize: Quantize = "none", **stated: Any) -> Path:
    made = tmp_path / "shop" / "made"
    made.parent.mkdir(exist_ok=True)
    import_unbound(source, made, quantize, **stated)
    return made


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_other_published_forms(tiny_chatglm: Folder, unbound: None, tmp_path: Path, kind: str) -> None:
    made = made_of(tiny_chatglm(kind), tmp_path)
    assert_same(made, published(kind))


def test_safetensors_with_code_beside(source: Path, unbound: None, tmp_path: Path) -> None:
    (source / "pytorch_model.bin").unlink()
    save_file(tensors("int4"), source / "model.safetensors")
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    made = made_of(source, tmp_path)
    assert not list(made.glob("*.py"))
    assert_same(made, published("int4"))


def test_quantised_while_imported(tiny_chatglm: Folder, unbound: None, tmp_path: Path) -> None:
    made = made_of(tiny_chatglm("fp16"), tmp_path, "int4")
    weights = load_file(made / "model.safetensors")
    assert all(torch.equal(weights[n], tensor) for n, tensor in published("int4").items() if "dense" in n)
    told = manifest.read(made)
    assert told is not None
    assert told.quantize == "int4"
    assert (made / "ice_text.model").is_file()
    assert json.loads((made / "config.json").read_text())["quantization_bit"] == 4


def test_turned_weights_are_written_straight(source: Path, unbound: None, tmp_path: Path) -> None:
    table = tensors("int4")[EMBEDDING]
    (source / "pytorch_model.bin").unlink()
    torch.save({**tensors("int4"), EMBEDDING: table.t().contiguous().t()}, source / "pytorch_model.bin")
    assert torch.equal(load_file(made_of(source, tmp_path) / "model.safetensors")[EMBEDDING], table)


def test_a_hubs_cache_is_a_folder_of_links(source: Path, unbound: None, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    source.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert (made_of(snapshot, tmp_path) / "model.safetensors").is_file()


def test_size_and_hash_come_first(source: Path, unbound: None, tmp_path: Path) -> None:
    """Weights that are not as stated are not even looked at."""
    os_system(source)
    with pytest.raises(ModelError) as caught:
        made_of(source, tmp_path, sizes={"pytorch_model.bin": 5})
    assert caught.value.code == "import_wrong_size"
    with pytest.raises(ModelError) as caught:
        made_of(source, tmp_path, hashes={"pytorch_model.bin": "0" * 64})
    assert caught.value.code == "import_wrong_hash"


def test_what_the_catalogue_states_is_asked_for(source: Path, tmp_path: Path) -> None:
    files = (RemoteFile("pytorch_model.bin", 3893080607),)
    offer = Offer("x", "hub", {"hub": "a/b"}, files, Licence("L", "", True), 1, 1, 1, 1)
    (tmp_path / "shop").mkdir()
    with pytest.raises(ModelError) as caught:
        import_model(source, tmp_path / "shop" / "made", offer, "none", {}, quiet, never)
    assert caught.value.code == "import_wrong_size"


def test_an_older_torch_opens_no_bin(
    source: Path, unbound: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ModelError) as caught:
        made_of(source, tmp_path)
    assert caught.value.code == "import_old_torch"


def test_a_disk_that_is_full(
    source: Path, unbound: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importer, "_copy", full)
    with pytest.raises(FetchError) as caught:
        made_of(source, tmp_path)
    assert caught.value.code == "import_unwritable"
    assert "No space left" in caught.value.message()


def write_llama(folder: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_llama import TEMPLATE, make_tokenizer

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_model(unbound: None, tmp_path: Path, tied: bool) -> None:
    source = tmp_path / "llama"
    write_llama(source, tied)
    weights = load_file(source / "model.safetensors")
    made = made_of(source, tmp_path)
    assert load_file(made / "model.safetensors").keys() == weights.keys()
    with pytest.raises(ModelError) as caught:
        importer.import_here(quiet, ImportJob(source, tmp_path / "shop" / "again", "int4"))
    assert caught.value.code == "import_not_quantisable"
    save_file({**weights, "evil": torch.zeros(2)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        importer.import_here(quiet, ImportJob(source, tmp_path / "shop" / "third", "none"))
    assert caught.value.code == "model_tensors"


def test_the_manifests_hash_is_the_files(source: Path, unbound: None, tmp_path: Path) -> None:
    made = made_of(source, tmp_path)
    told = manifest.read(made)
    assert told is not None
    content = (made / "model.safetensors").read_bytes()
    assert told.files["model.safetensors"].sha256 == hashlib.sha256(content).hexdigest()


def test_progress_is_told_in_bytes(source: Path, unbound: None, tmp_path: Path) -> None:
    told: list[Progress] = []
    (tmp_path / "shop").mkdir()
    job = ImportJob(source, tmp_path / "shop" / "made", "none")

    def tell(stage: Stage, done: int, total: int, what: str) -> None:
        told.append(Progress(stage, done / total))

    importer.import_here(tell, job)
    assert [progress.fraction for progress in told if progress.stage == "converting"][-1] == 1.0
    assert [progress.fraction for progress in told if progress.stage == "checking"][-1] == 1.0
