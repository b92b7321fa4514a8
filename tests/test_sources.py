"""Where models come from: the setting's list, and what hubs and folders say they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmui import settings
from glmui.errors import InvalidInput
from glmui.hub.catalogue import Licence, Offer, RemoteFile, hubs
from glmui.hub.sources import Source, from_folder, from_settings, list_folder, listing_address, read_listing

HUB = Source("huggingface", "huggingface", "https://hub.test")
SCOPE = Source("modelscope", "modelscope", "https://scope.test")
SHA = "a1" * 32
GIT = "b2" * 20
OFFER = Offer(
    "chatglm", "hub", {"huggingface": "maker/ChatGLM"}, (RemoteFile("config.json"), RemoteFile("w.bin")),
    Licence("", "", False), 1, 1, 1, 1,
)  # fmt: skip


def test_the_users_order_is_kept(tmp_path: Path) -> None:
    named = f"modelscope, https://mirror.test/hf/ , {tmp_path},huggingface,modelscope"
    sources = from_settings(named, {})
    assert [source.name for source in sources] == ["modelscope", "mirror.test", str(tmp_path), "huggingface"]
    assert [source.speaks for source in sources] == ["modelscope", "huggingface", "folder", "huggingface"]
    assert sources[1].address == "https://mirror.test/hf"
    assert sources[3].address == hubs()["huggingface"]


def test_hf_endpoint_takes_hugging_faces_place_and_gets_no_token() -> None:
    environment = {"HF_ENDPOINT": "https://mirror.test/", "HF_TOKEN": "hf_secret"}
    (mirror,) = from_settings("huggingface", environment)
    assert (mirror.address, mirror.token) == ("https://mirror.test", "")
    (hub,) = from_settings("huggingface", {"HF_TOKEN": "hf_secret"})
    assert hub.token == "hf_secret"
    assert "hf_secret" not in repr(hub)


@pytest.mark.parametrize("entry", ["", " , ", "hugingface", "ftp://x.test", "relative/folder", "https://"])
def test_what_is_no_source_is_refused(entry: str) -> None:
    with pytest.raises(InvalidInput, match="model_sources"):
        from_settings(entry, {})
    with pytest.raises(InvalidInput) as raised:
        settings.load(model_sources=entry)
    assert raised.value.code == "bad_setting.model_sources"


def test_a_bad_endpoint_is_told_by_its_name() -> None:
    with pytest.raises(InvalidInput, match="HF_ENDPOINT"):
        from_settings("huggingface", {"HF_ENDPOINT": "mirror.test"})


def test_hugging_faces_list_is_pinned_to_its_commit() -> None:
    answer = {
        "sha": "c3" * 20,
        "siblings": [
            {"rfilename": "config.json", "size": 7, "blobId": GIT},
            {"rfilename": "sub dir/w.bin", "size": 134, "blobId": GIT, "lfs": {"sha256": SHA, "size": 9}},
        ],
    }
    entries = read_listing(HUB, "maker/model", answer)
    assert (entries["config.json"].size, entries["config.json"].git) == (7, GIT)
    weights = entries["sub dir/w.bin"]
    assert (weights.size, weights.sha256, weights.git) == (9, SHA, "")
    assert weights.where == f"https://hub.test/maker/model/resolve/{'c3' * 20}/sub%20dir/w.bin"
    assert listing_address(HUB, "maker/model").startswith("https://hub.test/api/models/maker/model/")


def test_modelscopes_list_has_a_hash_for_every_file() -> None:
    files = [
        {"Path": "a b.json", "Type": "blob", "Size": 3, "Sha256": SHA.upper()},
        {"Type": "tree", "Path": "d"},
    ]
    entries = read_listing(SCOPE, "maker/model", {"Code": 200, "Data": {"Files": files}})
    assert list(entries) == ["a b.json"]
    assert entries["a b.json"].sha256 == SHA
    assert entries["a b.json"].where.endswith(
        "/api/v1/models/maker/model/repo?Revision=master&FilePath=a+b.json"
    )


@pytest.mark.parametrize("stated", ["", None, "abc", SHA + "00", "g" * 64])
def test_what_is_no_hash_counts_as_none(stated: str | None) -> None:
    files = [{"Path": "a", "Type": "blob", "Size": 3, "Sha256": stated}]
    (entry,) = read_listing(SCOPE, "m/m", {"Data": {"Files": files}}).values()
    assert (entry.sha256, entry.identity) == ("", "")


@pytest.mark.parametrize("inside", ["", "chatglm", "maker/ChatGLM", "ChatGLM"])
def test_a_folder_may_hold_the_model_or_a_folder_of_its_name(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    (tmp_path / inside / "w.bin").write_bytes(b"weights")
    entries = list_folder(from_folder(tmp_path), OFFER)
    assert list(entries) == ["w.bin"]
    assert Path(entries["w.bin"].where).read_bytes() == b"weights"


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    assert list_folder(from_folder(tmp_path / "nowhere"), OFFER) == {}
