"""`glmui models` as one types it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmui import cli
from glmui.errors import FetchError
from glmui.hub import get, installed, manifest
from glmui.tools import models
from glmui.tools.models import progress_line
from glmui.types import Progress
from tests.chatglm_fixture import copy_checkpoint

Folder = Callable[[str], Path]


@pytest.fixture
def data_dir(tiny_chatglm: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the model "tiny", of which `glmui` is told by the environment."""
    folder = installed.models_folder(tmp_path) / "tiny"
    folder.mkdir(parents=True)
    copy_checkpoint(tiny_chatglm("int4"), folder)
    manifest.write(folder, manifest.Manifest("tiny", "x", "L", files=manifest.stored_in(folder)))
    monkeypatch.setenv("GLMUI_DATA_DIR", str(tmp_path))
    return tmp_path


def answers(monkeypatch: pytest.MonkeyPatch, *typed: str) -> list[str]:
    """Somebody sits there and types; what they were asked."""
    asked: list[str] = []
    left = list(typed)

    def ask(question: str) -> str:
        asked.append(question)
        return left.pop(0)

    monkeypatch.setattr(models, "ask_here", lambda: ask)
    return asked


def never_fetched(*_: Any) -> None:
    pytest.fail("nothing was to be fetched")


def fetches(folder: Path) -> Callable[..., Path]:
    return lambda *_: folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_list(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    text = said(capsys)
    assert "tiny" in text
    assert "chatglm-6b-int4" in text
    assert "3.9 GB" in text
    assert str(data_dir / "models") in text


def test_list_as_json(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = installed.models_folder(data_dir) / "broken"
    broken.mkdir()
    (data_dir / "downloads" / "chatglm-6b-int4").mkdir(parents=True)
    (data_dir / "downloads" / "chatglm-6b-int4" / "config.json").write_text("12345")
    get.remove("tiny", data_dir)
    assert cli.main(["models", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(said(capsys))}
    assert rows["broken"]["state"] == "damaged"
    assert rows["broken"]["problem"]["code"] == "model_file_missing"
    assert rows["tiny"]["state"] == "removed"
    assert (rows["chatglm-6b-int4"]["state"], rows["chatglm-6b-int4"]["bytes"]) == ("begun", 5)
    assert (rows["chatglm-6b"]["state"], rows["chatglm-6b"]["licence"]) == (
        "offered",
        "ChatGLM-6B Model License",
    )


def test_verify(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "verify", "tiny"]) == 0
    assert "whole" in said(capsys)
    (installed.resolve("tiny", data_dir) / "config.json").unlink()
    assert cli.main(["models", "verify", "tiny"]) == 1
    assert "config.json" in said(capsys)
    assert cli.main(["models", "verify", "tiny", "--json"]) == 1
    (problem,) = json.loads(said(capsys))["problems"]
    assert problem["code"] == "verify_missing"


def test_remove_and_restore(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "remove", "tiny"]) == 0
    assert "restore tiny" in said(capsys)
    assert cli.main(["models", "restore", "tiny"]) == 0
    assert cli.main(["models", "remove", "tiny", "--now"]) == 0
    assert cli.main(["models", "restore", "tiny"]) == 1
    assert cli.main(["models", "remove"]) == 2


def test_remove_what_was_half_fetched(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = data_dir / "downloads" / "chatglm-6b-int4"
    half.mkdir(parents=True)
    (half / "config.json").write_text("12345")
    assert cli.main(["models", "remove", "chatglm-6b-int4"]) == 0
    assert "deleted" in said(capsys)
    assert not half.exists()
    assert cli.main(["models", "remove", "chatglm-6b-int4"]) == 1


def test_the_licence_is_asked_for(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers(monkeypatch, "n", "y")
    monkeypatch.setattr(get, "get", never_fetched)
    assert cli.main(["models", "get", "chatglm-6b-int4"]) == 2
    assert "ChatGLM-6B Model License" in asked[0]
    monkeypatch.setattr(get, "get", fetches(data_dir))
    assert cli.main(["models", "get", "chatglm-6b-int4"]) == 0
    assert cli.main(["models", "get", "chatglm-6b-int4", "--accept-licence"]) == 0
    assert cli.main(["models", "get", "starter"]) == 0
    assert len(asked) == 2


def test_nobody_there_to_accept(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "ask_here", lambda: None)
    monkeypatch.setattr(get, "get", never_fetched)
    assert cli.main(["models", "get", "chatglm-6b-int4"]) == 2
    assert "--accept-licence" in capsys.readouterr().err


def test_ctrl_c_pauses(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, settings: Any, show: Any, control: Any) -> Path:
        signal.raise_signal(signal.SIGINT)
        assert control.cancelled
        raise FetchError("fetch_cancelled")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(get, "get", interrupted)
    assert cli.main(["models", "get", "chatglm-6b-int4", "--accept-licence"]) == 130
    assert "goes on where it stopped" in said(capsys)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_is_imported_once_its_name_is_typed(
    data_dir: Path, tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported: list[tuple[Path, Path]] = []

    def import_model(source: Path, made: Path, *_: Any) -> None:
        made.mkdir()
        imported.append((source, made))

    monkeypatch.setattr(get, "import_model", import_model)
    source = str(tiny_chatglm("int8"))
    answers(monkeypatch, "yes", "mine")
    assert cli.main(["models", "import", source, "--name", "mine"]) == 2
    assert imported == []
    assert cli.main(["models", "import", source, "--name", "mine"]) == 0
    assert cli.main(["models", "import", source, "--name", "yours", "--trust", "--json"]) == 0
    assert [made.name for _, made in imported] == ["mine", "yours"]
    assert json.loads(said(capsys).splitlines()[-1])["name"] == "yours"
    monkeypatch.setattr(models, "ask_here", lambda: None)
    assert cli.main(["models", "import", source, "--name", "theirs"]) == 2
    assert "--trust" in capsys.readouterr().err


def test_progress_in_one_line() -> None:
    fetching = Progress("fetching", 0.41, "x.bin", 1_600_000_000, 3_900_000_000, 12_300_000)
    assert progress_line(fetching, "en") == "fetching 41%, 1.60 of 3.90 GB, 12.3 MB/s, 3:07 left"
    assert progress_line(Progress("checking"), "en") == "checking"
    assert "41%" in progress_line(fetching, "zh")
