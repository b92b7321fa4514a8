"""A folder is told for what it is before anything of it is opened; what is wrong with it is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glmui.engine.device import count_physical_cores, resolve_device
from glmui.engine.families import family_of
from glmui.engine.model_folder import describe
from glmui.engine.precision import precision_of
from glmui.errors import GlmuiError, InvalidInput, ModelError, NotFound
from glmui.hub import installed
from tests.tiny_llama import make_tiny_llama, write_json

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_whole_model(whole: Path) -> None:
    assert family_of(whole) == "causal_lm"
    found = describe(whole)
    assert (found.context_length, found.dtype, found.model_type) == (512, "float32", "llama")


def test_chatglm_by_its_type_not_its_name(tiny_chatglm: Callable[[str], Path]) -> None:
    assert family_of(tiny_chatglm("int4")) == "chatglm"
    assert describe(tiny_chatglm("int4")).context_length == 2048


def test_the_scripted_engine() -> None:
    assert family_of("echo") == "echo"


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": shards})


def shard_elsewhere(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../other.safetensors"}})


DAMAGE: list[tuple[str, str, Callable[[Path], object]]] = [
    ("model_no_folder", "model", shutil.rmtree),
    ("model_file_missing", "config.json", lambda f: (f / "config.json").unlink()),
    ("model_file_broken", "config.json", lambda f: (f / "config.json").write_text("<html>")),
    ("model_file_broken", "config.json", lambda f: (f / "config.json").write_text("[]")),
    ("model_lfs_pointer", "config.json", lambda f: (f / "config.json").write_text(LFS)),
    ("model_file_missing", "tokenizer.json", lambda f: (f / "tokenizer.json").unlink()),
    ("model_lfs_pointer", "tokenizer.json", lambda f: (f / "tokenizer.json").write_text(LFS)),
    ("model_file_missing", "model.safetensors", lambda f: (f / "model.safetensors").unlink()),
    ("model_file_missing", "model.safetensors", lambda f: (f / "model.safetensors").write_bytes(b"")),
    ("model_lfs_pointer", "model.safetensors", lambda f: (f / "model.safetensors").write_text(LFS)),
    ("model_only_bin", ".bin", only_bin),
    ("model_file_missing", "model-00002-of-00002.safetensors", missing_shard),
    ("model_file_broken", "model.safetensors.index.json", shard_elsewhere),
    ("model_no_chat_template", "template", lambda f: write_json(f / "tokenizer_config.json", {})),
    ("model_not_chat", "bert", lambda f: write_json(f / "config.json", {"model_type": "bert"})),
    (
        "model_foreign_format",
        "gptq",
        lambda f: write_json(
            f / "config.json",
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "quantization_config": {"quant_method": "gptq"},
            },
        ),
    ),
]


@pytest.mark.parametrize(("code", "named", "damage"), DAMAGE)
def test_what_is_wrong_is_named(
    folder: Path, code: str, named: str, damage: Callable[[Path], object]
) -> None:
    damage(folder)
    with pytest.raises(ModelError) as raised:
        family_of(folder)
    assert raised.value.code == code
    for language in ("en", "zh"):
        message = raised.value.message(language)
        assert str(folder) in message
        assert named in message or language == "zh"
        assert "{" not in message


# Where models are found


def test_models_by_name_by_path_and_not_at_all(whole: Path, tmp_path: Path) -> None:
    inside = Path(shutil.copytree(whole, tmp_path / "models" / "mine"))
    assert installed.resolve("mine", tmp_path) == inside
    assert installed.resolve(str(whole), tmp_path) == whole.resolve()
    assert installed.resolve("echo", tmp_path) == Path("echo")
    for name, code in [("starter", "starter_missing"), ("other", "model_missing"), ("", "model_missing")]:
        with pytest.raises(NotFound) as raised:
            installed.resolve(name, tmp_path)
        assert raised.value.code == code


@pytest.mark.parametrize("name", ["../secret", ".hidden", "a\0b", "~nobody-here/x"])
def test_a_name_does_not_leave_the_models_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "models" / ".hidden").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    with pytest.raises(GlmuiError):
        installed.resolve(name, tmp_path)


def test_only_whole_models_are_listed(whole: Path, tmp_path: Path) -> None:
    models = installed.models_folder(tmp_path)
    for name in ("starter", "whole", ".starter-1", "damaged"):
        shutil.copytree(whole, models / name)
    (models / "damaged" / "model.safetensors").unlink()
    found = installed.models(tmp_path)
    assert [(m.name, m.family, m.label) for m in found] == [
        ("starter", "causal_lm", "models.starter"),
        ("whole", "causal_lm", ""),
    ]
    assert installed.models(tmp_path / "nothing") == []


# Where models run


def test_devices() -> None:
    assert resolve_device("auto", ["cuda:0", "cpu"]) == "cuda:0"
    assert resolve_device("cuda", ["cuda:0", "cpu"]) == "cuda:0"
    assert resolve_device("cpu", ["cuda:0", "cpu"]) == "cpu"
    with pytest.raises(InvalidInput, match="cpu"):
        resolve_device("cuda:1", ["cpu"])


def test_precision_is_that_of_the_very_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cards the first may be too old for bfloat16 and the second not."""
    current = ["cuda:0"]

    @contextmanager
    def on(device: str) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr("glmui.engine.device.available_devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr("torch.cuda.device", on)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda emulated: current[-1] == "cuda:1")
    assert precision_of("cuda:1", "bfloat16", 1).dtype == "bfloat16"
    assert precision_of("cuda", "bfloat16", 1).dtype == "float16"
    assert precision_of("cuda:1", "float16", 1).dtype == "float16"


def test_precision_on_a_cpu() -> None:
    assert precision_of("cpu", "float32", 10_000).dtype == "float32"
    assert precision_of("cpu", "bfloat16", 300_000_000).dtype == "float32"
    too_much = precision_of("cpu", "bfloat16", 10**15)
    assert (too_much.dtype, too_much.reason) == ("bfloat16", "reasons.cpu_bfloat16_memory")


def test_cores() -> None:
    assert count_physical_cores() >= 1
