from __future__ import annotations

import stat
from pathlib import Path

import pytest

from glmui import i18n, settings
from glmui.errors import InvalidInput


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"GLMUI_{name.upper()}", raising=False)


def test_flags_beat_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def port(**flags: int) -> int | None:
        return settings.load(data_dir=tmp_path, **flags).port

    assert port() is None
    (tmp_path / "settings.toml").write_text("port = 1001")
    assert port() == 1001
    monkeypatch.setenv("GLMUI_PORT", "1002")
    assert port() == 1002
    assert port(port=1003) == 1003


@pytest.mark.parametrize(
    ("source", "where"), [("flag", "--port"), ("environment", "GLMUI_PORT"), ("file", "settings.toml")]
)
def test_a_wrong_value_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, where: str
) -> None:
    flags = {"data_dir": tmp_path}
    if source == "flag":
        flags["port"] = 70000  # type: ignore[assignment]
    elif source == "environment":
        monkeypatch.setenv("GLMUI_PORT", "seventy")
    else:
        (tmp_path / "settings.toml").write_text("port = -1")
    with pytest.raises(InvalidInput) as caught:
        settings.load(**flags)
    assert "port" in str(caught.value)
    assert where in str(caught.value)


@pytest.mark.parametrize("text", ["port = ", "colour = 'red'"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(InvalidInput, match=r"settings\.toml"):
        settings.load(data_dir=tmp_path)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps", "mixed"])
def test_devices_are_known(tmp_path: Path, device: str) -> None:
    assert settings.load(data_dir=tmp_path, device=device).device == device


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cuda:N"):
        settings.load(data_dir=tmp_path, device="gpu")


def test_saving_keeps_what_the_user_wrote(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("# mine\nport = 8000\n")
    before = settings.load(data_dir=tmp_path)
    after = settings.save(before, model="starter", threads=3)
    assert (after.model, after.threads, after.port) == ("starter", 3, 8000)
    assert "# mine\nport = 8000\n" in file.read_text()
    assert settings.load(data_dir=tmp_path).model == "starter"
    settings.save(after, threads=None)
    assert settings.load(data_dir=tmp_path).threads is None


def test_what_is_wrong_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        settings.save(settings.load(data_dir=tmp_path), threads=0)
    assert not (tmp_path / "settings.toml").exists()


def test_the_data_folder_is_for_this_account_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    settings.make_data_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []


def test_every_setting_has_its_sentence() -> None:
    for language in i18n.LANGUAGES:
        for name in settings.Settings.model_fields:
            assert f"errors.bad_setting.{name}" in i18n.table(language)
