"""Models of the data folder: fetched and imported, verified, removed, brought back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmui.errors import FetchError, GlmuiError, InvalidInput, ModelError, NotFound, StoreError
from glmui.hub import catalogue, expected, get, importer, installed, manifest, trash
from glmui.hub.catalogue import Licence, Offer, RemoteFile
from glmui.hub.download import Control
from glmui.hub.importing import _job
from glmui.settings import Settings, load
from glmui.types import Progress
from tests.chatglm_fixture import copy_checkpoint
from tests.hub_server import StandInHub

Folder = Callable[[str], Path]
REPO = "somebody/tiny"


def quiet(progress: Progress) -> None:
    """Nobody watches."""


def never() -> bool:
    return False


def no_import(*_: Any) -> None:
    pytest.fail("nothing was to be imported")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing happens in this process (test_importing has the other one), which must not be bound."""

    def import_here(source: Path, made: Path, *rest: Any) -> None:
        offer, quantize, known = rest[:3]
        importer.import_here(lambda *_: None, _job(source, made, offer, quantize, known))

    monkeypatch.setattr(importer, "stop_making_threads", lambda: None)
    monkeypatch.setattr(importer, "ENVIRONMENT", {})
    monkeypatch.setattr(expected, "warm_up", lambda: None)
    monkeypatch.setattr(get, "import_model", import_here)


def offer_of(folder: Path, **changes: Any) -> Offer:
    files = tuple(RemoteFile(file.name) for file in sorted(folder.iterdir()))
    values = {
        "name": "tiny", "kind": "hub", "repos": {"huggingface": REPO}, "files": files, "download_gb": 0.01,
        "licence": Licence("Tiny Licence", "", True), "disk_gb": 0.01, "ram_gb": 1, "vram_gb": 1,
    }  # fmt: skip
    return Offer(**{**values, **changes})


@pytest.fixture
def published(tiny_chatglm: Folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, offered by the catalogue."""
    folder = tiny_chatglm("int4")
    offered = offer_of(folder)
    monkeypatch.setattr(catalogue, "offers", lambda: (offered,))
    monkeypatch.setattr(catalogue, "offer", lambda name: offered)
    return folder


def settings_for(hub: StandInHub, data_dir: Path) -> Settings:
    return load(data_dir=data_dir, model_sources=hub.address)


def models_in(data_dir: Path) -> list[str]:
    folder = installed.models_folder(data_dir)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def data_dir(tiny_chatglm: Folder, tmp_path: Path) -> Path:
    """A data folder with the model "tiny"."""
    folder = installed.models_folder(tmp_path / "data") / "tiny"
    folder.mkdir(parents=True)
    copy_checkpoint(tiny_chatglm("int4"), folder)
    told = manifest.Manifest("tiny", "somewhere", "L", manifest.now(), files=manifest.stored_in(folder))
    manifest.write(folder, told)
    return tmp_path / "data"


# Fetched


def test_from_the_hub_to_the_models(published: Path, here: None, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with StandInHub({REPO: published}) as hub:
        folder = get.get("tiny", settings_for(hub, tmp_path), seen.append, Control())
    assert folder == installed.resolve("tiny", tmp_path)
    assert models_in(tmp_path) == ["tiny"]
    assert not list((tmp_path / "downloads").iterdir())
    told = manifest.read(folder)
    assert told is not None
    assert (told.source, told.licence) == (REPO, "Tiny Licence")
    (model,) = installed.models(tmp_path)
    assert (model.name, model.family, model.licence) == ("tiny", "chatglm", "Tiny Licence")
    assert model.size == sum(file.stat().st_size for file in folder.iterdir())
    assert get.verify("tiny", tmp_path, quiet) == []
    assert seen[0].stage == "fetching"


def test_what_is_here_is_not_fetched(
    published: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get, "import_model", no_import)
    with StandInHub({REPO: published}) as hub:
        get.get("tiny", settings_for(hub, data_dir), quiet, Control())
    assert hub.requests == []


def test_broken_off_and_gone_on_with(published: Path, here: None, tmp_path: Path) -> None:
    control = Control()

    def stop_midway(progress: Progress) -> None:
        if progress.done > 2_000_000:
            control.cancel()

    with StandInHub({REPO: published}) as hub:
        hub.rate = 8_000_000
        with pytest.raises(FetchError) as caught:
            get.get("tiny", settings_for(hub, tmp_path), stop_midway, control)
        assert caught.value.code == "fetch_cancelled"
        assert models_in(tmp_path) == []
        had = get.half_fetched("tiny", tmp_path)
        assert had > 1_000_000
        hub.rate = 0
        get.get("tiny", settings_for(hub, tmp_path), quiet, Control())
    assert models_in(tmp_path) == ["tiny"]
    assert get.half_fetched("tiny", tmp_path) == 0


def test_what_was_half_fetched_can_be_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "downloads" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(bytes(10))
    (folder / "pytorch_model.bin.part").write_bytes(bytes(1000))
    (folder / "pytorch_model.bin.part.json").write_text('{"done": [[0, 100], [200, 250]]}')
    assert get.half_fetched("tiny", tmp_path) == 160
    get.forget_half_fetched("../tiny", tmp_path)
    get.forget_half_fetched("tiny", tmp_path)
    assert not folder.exists()
    assert get.half_fetched("tiny", tmp_path) == 0


def test_files_that_do_not_import_leave_no_model(published: Path, here: None, tmp_path: Path) -> None:
    broken = copy_checkpoint(published, tmp_path / "broken")
    (broken / "ice_text.model").unlink()
    (broken / "ice_text.model").write_bytes(b"nonsense")
    with StandInHub({REPO: broken}) as hub, pytest.raises(ModelError) as caught:
        get.get("tiny", settings_for(hub, tmp_path), quiet, Control())
    assert caught.value.code == "model_wrong_vocabulary"
    assert models_in(tmp_path) == []


# Imported


def refused(data_dir: Path, source: Path, name: str = "mine", **how: Any) -> GlmuiError:
    before = models_in(data_dir)
    with pytest.raises(GlmuiError) as caught:
        get.import_folder(source, name, data_dir, quiet, never, **how)
    assert models_in(data_dir) == before
    return caught.value


def test_a_folder_from_elsewhere_asks_for_trust(tiny_chatglm: Folder, here: None, tmp_path: Path) -> None:
    source = tiny_chatglm("int4")
    assert refused(tmp_path, source).code == "import_untrusted"
    folder = get.import_folder(source, "mine", tmp_path, quiet, never, trusted=True)
    assert folder == installed.resolve("mine", tmp_path)
    assert (source / "pytorch_model.bin").is_file()
    assert get.verify("mine", tmp_path, quiet) == []


def test_a_known_hash_needs_no_trust(
    tiny_chatglm: Folder, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_chatglm("int4")
    stored = manifest.stored(source / "pytorch_model.bin")
    listed = RemoteFile("pytorch_model.bin", stored.size, stored.sha256)
    monkeypatch.setattr(catalogue, "offers", lambda: (offer_of(source, files=(listed,)),))
    told = manifest.read(get.import_folder(source, "mine", tmp_path, quiet, never))
    assert told is not None
    assert told.licence == "Tiny Licence"
    other = RemoteFile("pytorch_model.bin", stored.size, "0" * 64)
    monkeypatch.setattr(catalogue, "offers", lambda: (offer_of(source, files=(other,)),))
    assert refused(tmp_path, source, "second").code == "import_untrusted"


@pytest.mark.parametrize(
    "name",
    ["", ".hidden", "..", "a/b", "a\\b", "starter", "Echo", "con", "NUL.txt", "x.", "a" * 65, "模型", "a b"],
)
def test_names_that_no_model_may_have(tiny_chatglm: Folder, tmp_path: Path, name: str) -> None:
    assert refused(tmp_path, tiny_chatglm("int4"), name, trusted=True).code == "model_name_bad"


def test_a_name_is_not_taken_twice(tiny_chatglm: Folder, data_dir: Path) -> None:
    assert refused(data_dir, tiny_chatglm("int4"), "tiny", trusted=True).code == "model_name_taken"


def test_no_folder_to_import(tmp_path: Path) -> None:
    assert refused(tmp_path, tmp_path / "nowhere", trusted=True).code == "model_no_folder"


def test_no_room(tiny_chatglm: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5_000_000))
    error = refused(tmp_path, tiny_chatglm("int4"), trusted=True)
    assert error.code == "disk_too_full"
    assert error.values["free"] == 5


def test_what_a_killed_import_left_is_swept(here: None, tiny_chatglm: Folder, tmp_path: Path) -> None:
    left = installed.models_folder(tmp_path) / ".importing-999999999-abc" / "half"
    left.mkdir(parents=True)
    get.import_folder(tiny_chatglm("int4"), "mine", tmp_path, quiet, never, trusted=True)
    assert models_in(tmp_path) == ["mine"]


# Verified


def test_damage_is_named(data_dir: Path) -> None:
    folder = installed.resolve("tiny", data_dir)
    weights = folder / "pytorch_model.bin"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    (folder / "ice_text.model").unlink()
    seen: list[Progress] = []
    problems = get.verify("tiny", data_dir, seen.append)
    found = {(problem.values["file"], problem.code) for problem in problems}
    assert found == {("pytorch_model.bin", "verify_damaged"), ("ice_text.model", "verify_missing")}
    assert {progress.stage for progress in seen} == {"checking"}


def test_nothing_to_compare_with(data_dir: Path) -> None:
    (installed.resolve("tiny", data_dir) / manifest.FILE).unlink()
    with pytest.raises(ModelError) as caught:
        get.verify("tiny", data_dir, quiet)
    assert caught.value.code == "model_no_manifest"
    with pytest.raises(FetchError):
        get.verify("tiny", with_manifest(data_dir), quiet, lambda: True)


def with_manifest(data_dir: Path) -> Path:
    folder = installed.resolve("tiny", data_dir)
    manifest.write(folder, manifest.Manifest("tiny", "x", files=manifest.stored_in(folder)))
    return data_dir


@pytest.mark.parametrize(
    "content", ['{"name": 1, "evil": 2}', '{"files": 3}', '{"name": "a", "files": {"../x": {}}}', "[]", "{"]
)
def test_a_manifest_that_is_none(data_dir: Path, content: str) -> None:
    (installed.resolve("tiny", data_dir) / manifest.FILE).write_text(content)
    with pytest.raises(ModelError) as caught:
        get.verify("tiny", data_dir, quiet)
    assert caught.value.code == "model_file_broken"
    (model,) = installed.everything(data_dir)
    assert model.problem is not None
    assert installed.models(data_dir) == []


# Removed


def test_removed_and_brought_back(data_dir: Path) -> None:
    size = sum(file.stat().st_size for file in installed.resolve("tiny", data_dir).iterdir())
    get.remove("tiny", data_dir)
    assert installed.everything(data_dir) == []
    (entry,) = get.removed(data_dir)
    assert (entry.name, entry.size) == ("tiny", size)
    assert time.time() - entry.when < 60
    assert get.restore("tiny", data_dir) == installed.resolve("tiny", data_dir)
    assert get.removed(data_dir) == []
    assert get.verify("tiny", data_dir, quiet) == []


def test_the_last_one_of_that_name_comes_back(data_dir: Path) -> None:
    folder = installed.resolve("tiny", data_dir)
    get.remove("tiny", data_dir)
    folder.mkdir()
    (folder / "second").touch()
    get.remove("tiny", data_dir)
    assert (get.restore("tiny", data_dir) / "second").exists()
    with pytest.raises(InvalidInput) as caught:
        get.restore("tiny", data_dir)
    assert caught.value.code == "model_name_taken"


def test_removed_for_good(data_dir: Path) -> None:
    get.remove("tiny", data_dir, now=True)
    assert get.removed(data_dir) == []
    with pytest.raises(NotFound) as caught:
        get.restore("tiny", data_dir)
    assert caught.value.code == "model_not_removed"


def test_the_trash_is_emptied_after_a_week(data_dir: Path) -> None:
    get.remove("tiny", data_dir)
    (entry,) = get.removed(data_dir)
    week_ago = time.time_ns() - int((trash.KEPT_SECONDS + 10) * 1e9)
    entry.folder.rename(entry.folder.with_name(f"{week_ago}-tiny"))
    assert get.removed(data_dir) == []
    assert list((installed.models_folder(data_dir) / trash.TRASH).iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../data", ".trash", "other"])
def test_only_models_of_the_data_folder_are_removed(data_dir: Path, name: str) -> None:
    with pytest.raises(NotFound):
        get.remove(name, data_dir)
    assert models_in(data_dir) == ["tiny"]


def test_files_that_somebody_holds(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows has it."""

    def held(self: Path, target: Path) -> Path:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "rename", held)
    with pytest.raises(StoreError) as caught:
        get.remove("tiny", data_dir)
    assert caught.value.code == "model_in_use"
    assert models_in(data_dir) == [".trash", "tiny"]
