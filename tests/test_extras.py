"""A prefix or an adapter beside the chosen model: in settings, in the engine process, in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from glmui import cli, settings
from glmui.choice import Choice
from glmui.engine.client import EngineClient
from glmui.engine.families import open_family
from glmui.errors import GlmuiError, InvalidInput, ModelError
from glmui.settings import Settings, spec_of
from glmui.types import ChatEngine, EngineSpec, GenerationParams, Message, TakesExtras
from tests.chatglm2_fixture import Folder

PREFIXES = Path(__file__).parent / "data" / "ptuning"
PLAIN, PROJECTION = (str(PREFIXES / f"prefix-{variant}") for variant in ("plain", "projection"))
OF_CHATGLM2 = str(PREFIXES / "chatglm2-prefix-plain")
GREEDY = GenerationParams(temperature=0, max_new_tokens=8)


def reply(engine: ChatEngine, request_id: str = "1") -> str:
    chunks = engine.stream_chat([Message("user", "Hello")], GREEDY, request_id)
    return "".join(chunk.text for chunk in chunks)


# The engine


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_a_loaded_engine_switches(
    tiny_chatglm: Callable[[str], Path], tiny_chatglm2: Folder, family: str
) -> None:
    folder = tiny_chatglm("int4") if family == "chatglm" else tiny_chatglm2(family, "int4")
    engine = open_family(EngineSpec("tiny", str(folder), "cpu", stop_repetition=False), lambda progress: None)
    assert isinstance(engine, TakesExtras)
    mine, other = (PLAIN, OF_CHATGLM2) if family == "chatglm" else (OF_CHATGLM2, PLAIN)
    plain = reply(engine)
    engine.use_extras(mine, "")
    changed = reply(engine)
    assert changed != plain
    with pytest.raises(ModelError):
        engine.use_extras(other, "")
    assert reply(engine) == changed
    engine.use_extras("", "")
    assert reply(engine) == plain


def test_the_process_keeps_its_model(tiny_chatglm: Callable[[str], Path]) -> None:
    """Another prefix, or one that does not fit, and none again: one process, loaded once."""
    spec = EngineSpec("tiny", str(tiny_chatglm("fp16")), "cpu", threads=1, stop_repetition=False)
    client = EngineClient(spec)
    try:
        plain, pid = reply(client), client.info().pid
        client.configure(replace(spec, prefix=PLAIN))
        changed = reply(client, "2")
        client.configure(replace(spec, prefix=OF_CHATGLM2))
        with pytest.raises(ModelError) as caught:
            reply(client, "3")
        client.configure(spec)
        assert reply(client, "4") == plain != changed
        assert caught.value.code == "prefix_other_model"
        assert client.info().pid == pid
    finally:
        client.close()


def test_other_models_take_none() -> None:
    client = EngineClient(EngineSpec("echo", "echo", prefix=PLAIN))
    try:
        with pytest.raises(InvalidInput) as caught:
            reply(client)
        assert caught.value.code == "extras_only_chatglm"
        pid = client.info().pid
        client.configure(EngineSpec("echo", "echo"))
        assert reply(client, "2")
        assert client.info().pid == pid
    finally:
        client.close()


# Settings


@pytest.fixture
def choice(tiny_chatglm: Callable[[str], Path], tmp_path: Path) -> Choice:
    made = Choice(Settings(data_dir=tmp_path))
    made.change(model=str(tiny_chatglm("int4")))
    return made


def test_the_page_chooses_a_folder(choice: Choice) -> None:
    choice.change(prefix=f' "{PLAIN}" ')
    spec = choice.spec()
    assert spec is not None
    assert spec.extras == (PLAIN, "")
    again = settings.load(data_dir=choice.settings.data_dir)
    assert (again.prefix, again.model) == (PLAIN, choice.settings.model)
    choice.change(prefix="")
    assert settings.load(data_dir=choice.settings.data_dir).prefix == ""


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prefix": OF_CHATGLM2}, "prefix_other_model"),
        ({"prefix": str(PREFIXES)}, "prefix_not_one"),
        ({"prefix": "/no/such/folder"}, "model_no_folder"),
        ({"adapter": PLAIN}, "adapter_not_one"),
    ],
)
def test_what_cannot_fit_is_not_kept(choice: Choice, changes: dict[str, str], code: str) -> None:
    choice.change(prefix=PROJECTION)
    with pytest.raises(GlmuiError) as caught:
        choice.change(**changes)
    assert caught.value.code == code
    assert (choice.settings.prefix, choice.settings.adapter) == (PROJECTION, "")


def test_another_model_begins_without(choice: Choice, tiny_chatglm2: Folder) -> None:
    choice.change(prefix=PLAIN)
    choice.change(model=choice.settings.model)
    assert choice.settings.prefix == PLAIN
    choice.change(model=str(tiny_chatglm2("chatglm2", "int4")))
    assert choice.settings.prefix == ""
    choice.change(model="echo")
    with pytest.raises(InvalidInput):
        choice.change(prefix=PLAIN)


def test_a_folder_that_went_is_told(choice: Choice, tmp_path: Path) -> None:
    gone = tmp_path / "prefix"
    gone.symlink_to(PLAIN)
    choice.change(prefix=str(gone))
    choice.check()
    gone.unlink()
    with pytest.raises(ModelError, match="no folder"):
        choice.check()


def test_a_model_by_flag_leaves_the_file_s_extras(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    choice.change(prefix=PLAIN)
    data_dir, model = choice.settings.data_dir, choice.settings.model
    assert settings.load(data_dir=data_dir, model="starter").prefix == ""
    assert settings.load(data_dir=data_dir, model=model).prefix == PLAIN
    assert settings.load(data_dir=data_dir, model="starter", prefix="x").prefix == str(Path("x").absolute())
    monkeypatch.setenv("GLMUI_PREFIX", PROJECTION)
    assert settings.load(data_dir=data_dir, model="starter").prefix == PROJECTION


def test_a_spec_takes_them_up(tmp_path: Path) -> None:
    chosen = Settings(data_dir=tmp_path, prefix="~/p", adapter=PLAIN)
    spec = spec_of(chosen, "m", "f")
    assert spec.extras == (str(Path.home() / "p"), PLAIN)
    assert spec.base == spec_of(Settings(data_dir=tmp_path), "m", "f")


# The terminal


def test_chat_refuses_before_loading(
    tiny_chatglm: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_chatglm("int4"))
    flags = ["--data-dir", str(tmp_path), "--model", model, "--prefix", OF_CHATGLM2, "--prompt", "Hello"]
    assert cli.main(["chat", *flags]) == 1
    assert "another model than ChatGLM-6B" in capsys.readouterr().err
