"""The log file: private, bounded, quiet about what libraries say."""

from __future__ import annotations

import logging
import stat
import sys
import warnings
from pathlib import Path

import pytest

from glmui import logs
from glmui.errors import StoreError


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX")
def test_every_log_file_is_for_this_account_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_BYTES", 500)
    handler = logs.start(tmp_path, "info")
    for number in range(50):
        logging.getLogger("glmui.test").info("line %s", number)
    logs.stop(handler)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["glmui.log", "glmui.log.1", "glmui.log.2", "glmui.log.3"]
    assert {mode(file) for file in files} == {0o600}
    assert mode(tmp_path / "logs") == 0o700


def test_levels(tmp_path: Path) -> None:
    handler = logs.start(tmp_path, "info")
    logging.getLogger("glmui.test").info("ours")
    logging.getLogger("glmui.test").debug("too much")
    logging.getLogger("library").info("somebody's message")
    logging.getLogger("library").warning("trouble")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old way", stacklevel=1)
    logs.stop(handler)
    text = (tmp_path / "logs" / "glmui.log").read_text(encoding="utf-8")
    assert "ours" in text
    assert "trouble" in text
    assert "too much" not in text
    assert "somebody's message" not in text


def test_debug_speaks_on_the_terminal_and_info_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for level, heard in (("info", False), ("debug", True)):
        handler = logs.start(tmp_path, level)
        logging.getLogger("glmui.test").debug("detail")
        logs.stop(handler)
        assert ("detail" in capsys.readouterr().err) is heard


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        logs.start(tmp_path, "info")
