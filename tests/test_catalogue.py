"""What can be had: the catalogue's data hold together, and stand in one file."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from glmui import i18n
from glmui.errors import NotFound
from glmui.hub import catalogue
from glmui.hub.catalogue import Offer, offer, offers
from glmui.settings import Settings

GLMUI = Path(catalogue.__file__).parents[1]
NAMES = [each.name for each in offers()]


def test_the_models_are_there_in_order() -> None:
    assert NAMES[:2] == ["starter", "chatglm-6b-int4"]
    assert {"chatglm-6b-int8", "chatglm-6b", "chatglm-6b-int4-qe", "chatglm2-6b", "chatglm2-6b-int4"} < set(
        NAMES
    )
    assert {"chatglm3-6b", "glm-4-9b-chat", "glm-edge-1.5b-chat"} < set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("each", offers(), ids=NAMES)
def test_every_entry_is_sound(each: Offer) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+", each.name)  # it becomes a folder
    assert (each.kind == "hub") == bool(each.repos) == bool(each.files)
    assert set(each.repos) <= set(catalogue.hubs())
    assert each.licence.name
    assert each.licence.link.startswith("https://")
    assert 0 < each.download_gb <= 20
    assert min(each.disk_gb, each.ram_gb, each.vram_gb) > 0
    for file in each.files:
        assert PurePosixPath(file.path).parts == (file.path,)
        assert file.sha256 == "" or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    known = sum(file.size or 0 for file in each.files)
    assert known <= each.download_gb * 1.01e9


@pytest.mark.parametrize("each", offers(), ids=NAMES)
def test_split_weights_are_all_there(each: Offer) -> None:
    parts = [match for file in each.files if (match := re.search(r"-(\d{5})-of-(\d{5})\.", file.path))]
    if parts:
        assert [int(match[1]) for match in parts] == list(range(1, int(parts[0][2]) + 1))
        assert any(file.path.endswith(".index.json") for file in each.files)
    assert all(file.path.endswith((".json", ".model", ".bin", ".safetensors")) for file in each.files)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_people_are_told_what_each_is(language: str) -> None:
    for name in NAMES:
        for key in (f"models.{name}", f"models_about.{name}"):
            assert i18n.text(language, key) != key, key


def test_hugging_face_weights_of_the_guide_are_checked_by_published_hashes() -> None:
    files = {file.path: file for file in offer("chatglm-6b").files}
    assert files["pytorch_model-00008-of-00008.bin"].size == 1_069_286_123
    assert all(file.sha256 for file in files.values() if not file.path.endswith(".json"))


def test_an_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(NotFound) as raised:
        offer("chatglm-7b")
    assert raised.value.code == "model_not_offered"
    assert "chatglm-6b-int4" in raised.value.message("zh")


def test_addresses_of_hubs_stand_in_the_catalogue_alone() -> None:
    hosts = [address.partition("://")[2] for address in catalogue.hubs().values()]
    named = [
        file.name
        for file in GLMUI.rglob("*.py")
        if any(host in file.read_text(encoding="utf-8") for host in hosts)
    ]
    assert not named


def test_the_setting_knows_the_same_hubs() -> None:
    assert Settings().model_sources == ", ".join(catalogue.hubs())
