from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glmui.downloads import Downloads, Import, local_folder
from glmui.errors import Busy, FetchError, GlmuiError, InvalidInput, ModelError, NotFound
from glmui.hub import get as hub
from glmui.settings import Settings
from glmui.types import Progress
from tests.small_world import wait_for


class Hub:
    """Stands in for glmui.hub.get: a fetch shows half of it and goes on once `go` is set."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.go = threading.Event()
        self.fail: GlmuiError | None = None
        self.fetched: list[str] = []
        self.trusted: list[bool] = []

    def get(self, name: str, settings: Settings, show: Callable[[Progress], None], control: Any) -> Path:
        self.fetched.append(name)
        show(Progress("fetching", 0.5, "weights", 50, 100, 10.0))
        while control.paused or not self.go.wait(0.005):
            if control.cancelled:
                raise FetchError("fetch_cancelled")
        if self.fail:
            raise self.fail
        return self.data_dir / name

    def import_folder(
        self, source: Path, name: str, data_dir: Path, show: Any, cancelled: Any, bits: str, trusted: bool
    ) -> Path:
        self.trusted.append(trusted)
        if not trusted:
            raise InvalidInput("import_untrusted", folder=source)
        return data_dir / name

    def verify(self, name: str, data_dir: Path, show: Any, cancelled: Any) -> list[ModelError]:
        show(Progress("checking", 1.0))
        return [ModelError("verify_damaged", file="model.safetensors", model=name)] if name == "bad" else []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    for name in ("get", "import_folder", "verify"):
        monkeypatch.setattr(hub, name, getattr(made, name))
    return made


@pytest.fixture
def came() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def downloads(fake: Hub, came: list[tuple[str, bool]]) -> Iterator[Downloads]:
    settings = Settings(data_dir=fake.data_dir)
    made = Downloads(lambda: settings, lambda name, choose: came.append((name, choose)))
    yield made
    made.close()


def over(downloads: Downloads) -> bool:
    return downloads.task is not None and not downloads.running


def test_a_fetch_is_told_of_and_ends_in_its_call(
    downloads: Downloads, fake: Hub, came: list[tuple[str, bool]]
) -> None:
    downloads.get("chatglm-6b-int4", choose=True)
    wait_for(lambda: downloads.running and downloads.running.progress.fraction == 0.5)
    assert came == []
    fake.go.set()
    wait_for(lambda: over(downloads))
    assert came == [("chatglm-6b-int4", True)]
    assert downloads.task
    assert downloads.task.error is None


def test_a_failed_fetch_says_why_and_can_be_tried_again(downloads: Downloads, fake: Hub) -> None:
    fake.fail = FetchError("pip_missing")
    fake.go.set()
    for _ in range(2):
        downloads.get("starter")
        wait_for(lambda: over(downloads))
        assert downloads.task
        assert downloads.task.error is fake.fail
    assert fake.fetched == ["starter", "starter"]
    downloads.dismiss()
    assert downloads.task is None


def test_one_thing_at_a_time(downloads: Downloads, fake: Hub) -> None:
    downloads.get("starter")
    for act in (lambda: downloads.get("chatglm-6b"), lambda: downloads.verify("starter")):
        with pytest.raises(Busy, match="starter"):
            act()
    with pytest.raises(Busy):
        downloads.forget("starter")
    downloads.dismiss()
    assert downloads.running, "what runs is not forgotten"


def test_pausing_holds_a_fetch_and_cancelling_ends_it_without_complaint(
    downloads: Downloads, fake: Hub, came: list[tuple[str, bool]]
) -> None:
    downloads.get("starter")
    downloads.pause()
    assert downloads.paused
    downloads.resume()
    assert not downloads.paused
    downloads.cancel()
    wait_for(lambda: over(downloads))
    assert downloads.task
    assert downloads.task.error is None
    assert not downloads.paused
    assert came == []
    downloads.get("starter")
    assert not downloads.paused, "a new task starts afresh"


def test_an_import_nobody_vouches_for_waits_for_the_users_word(
    downloads: Downloads, fake: Hub, came: list[tuple[str, bool]], tmp_path: Path
) -> None:
    wish = Import(str(tmp_path), "mine")
    downloads.bring_in(wish)
    wait_for(lambda: over(downloads))
    assert downloads.task
    assert downloads.task.error
    assert downloads.task.error.code == "import_untrusted"
    assert downloads.task.wish is wish
    downloads.bring_in(Import(str(tmp_path), "mine", trusted=True), choose=True)
    wait_for(lambda: over(downloads))
    assert fake.trusted == [False, True]
    assert came == [("mine", True)]


def test_a_folder_that_is_not_there_is_told_of_by_the_import(downloads: Downloads, fake: Hub) -> None:
    downloads.bring_in(Import("/no/such folder", "mine"))
    wait_for(lambda: over(downloads))
    assert downloads.task
    assert downloads.task.error
    assert downloads.task.error.code == "model_no_folder"
    assert fake.trusted == []


def test_checks_are_kept_beside_the_task(downloads: Downloads) -> None:
    for name in ("bad", "good"):
        downloads.verify(name)
        wait_for(lambda: over(downloads))
    assert [problem.code for problem in downloads.checks["bad"].problems] == ["verify_damaged"]
    assert downloads.checks["good"].problems == ()


def test_what_nobody_foresaw_is_told_too_and_logged(
    downloads: Downloads, fake: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*_: object) -> Path:
        raise ValueError("a surprise")

    monkeypatch.setattr(hub, "get", break_down)
    downloads.get("starter")
    wait_for(lambda: over(downloads))
    assert downloads.task
    assert "a surprise" in str(downloads.task.error)
    assert "a surprise" in caplog.text


def test_closing_ends_what_runs(downloads: Downloads, fake: Hub) -> None:
    downloads.get("starter")
    downloads.close()
    assert over(downloads)


@pytest.mark.parametrize(
    "text", ["https://example.com/m", "file:///m", "\\\\server\\share", "//server/share", "smb://s/x"]
)
def test_only_folders_of_this_computer_are_opened(text: str) -> None:
    with pytest.raises(InvalidInput, match="on this computer"):
        local_folder(text)


def test_a_typed_folder_may_stand_in_quotes(tmp_path: Path) -> None:
    assert local_folder(f' "{tmp_path}" ') == tmp_path.resolve()
    for text in ("", "  ", str(tmp_path / "gone")):
        with pytest.raises(NotFound):
            local_folder(text)
