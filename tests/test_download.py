"""Downloads end with the right files or with a sentence, and go on where they were broken off."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from glmui.errors import FetchError
from glmui.hub import web
from glmui.hub.catalogue import Licence, Offer, RemoteFile
from glmui.hub.checked import Checked
from glmui.hub.download import Control, download
from glmui.hub.part import PartFile
from glmui.hub.patience import Patience
from glmui.hub.sources import Source, from_folder
from glmui.types import Progress
from tests.hub_server import API, StandInHub

ROOT = Path(__file__).resolve().parent.parent
REPO = "maker/model"
CONTENTS = {
    "config.json": b'{"model_type": "chatglm"}',
    "tokenizer.json": os.urandom(150_000),
    "pytorch_model.bin": os.urandom(2_000_000),
}
SIZE = sum(map(len, CONTENTS.values()))
WEIGHTS = "pytorch_model.bin"
QUICK = Patience(
    tries=4, first_wait=0.01, longest_wait=0.02, stall_seconds=10, piece_bytes=200_000, save_bytes=300_000
)
HASTY = replace(QUICK, stall_seconds=0.3, tries=3)  # for servers that stall
OFFER = Offer(
    "model",
    "hub",
    {"huggingface": REPO, "modelscope": REPO},
    tuple(RemoteFile(path) for path in CONTENTS),
    Licence("", "", False),
    *(1, 1, 1, 1),
)
HASHES = {path: hashlib.sha256(content).hexdigest() for path, content in CONTENTS.items()}


def quiet(progress: Progress) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for path, content in CONTENTS.items():
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def hubs(model: Path) -> Iterator[tuple[StandInHub, StandInHub]]:
    with StandInHub({REPO: model}) as first, StandInHub({REPO: model}) as second:
        yield first, second


@pytest.fixture
def hub(hubs: tuple[StandInHub, StandInHub]) -> StandInHub:
    hubs[0].reset()
    return hubs[0]


@pytest.fixture
def second(hubs: tuple[StandInHub, StandInHub]) -> StandInHub:
    hubs[1].reset()
    return hubs[1]


def at(hub: StandInHub, speaks: Any = "huggingface", name: str = "hub") -> Source:
    return Source(name, speaks, hub.address)


def fetch(target: Path, *sources: Source, offer: Offer = OFFER, patience: Patience = QUICK) -> dict[str, str]:
    return dict(download(offer, target, sources, quiet, Control(), patience))


def fails(target: Path, *sources: Source, offer: Offer = OFFER) -> FetchError:
    with pytest.raises(FetchError) as raised:
        fetch(target, *sources, offer=offer)
    assert "{" not in raised.value.message("zh")
    return raised.value


def assert_whole(target: Path) -> None:
    assert {p: (target / p).read_bytes() for p in CONTENTS} == CONTENTS
    assert not list(target.glob("*.part*"))


# Where it may come from


@pytest.mark.parametrize("speaks", ["huggingface", "modelscope"])
def test_every_file_comes_with_the_hash_the_hub_states(hub: StandInHub, tmp_path: Path, speaks: str) -> None:
    assert fetch(tmp_path / "t", at(hub, speaks)) == HASHES
    assert_whole(tmp_path / "t")
    assert hub.sent == SIZE


def test_what_is_there_is_not_asked_for_again(hub: StandInHub, tmp_path: Path) -> None:
    fetch(tmp_path, at(hub))
    hub.requests.clear()
    assert fetch(tmp_path, at(hub)) == HASHES
    assert not hub.requests


def test_a_file_touched_since_is_read_again_and_replaced_when_wrong(hub: StandInHub, tmp_path: Path) -> None:
    fetch(tmp_path, at(hub))
    sent = hub.sent
    os.utime(tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "evil!!!"}')
    assert fetch(tmp_path, at(hub)) == HASHES
    assert_whole(tmp_path)
    assert hub.sent - sent == len(CONTENTS["config.json"])


def test_what_was_right_once_is_held_against_todays_catalogue(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"an earlier version")
    Checked(tmp_path).add(WEIGHTS, hashlib.sha256(b"an earlier version").hexdigest(), confirmed=True)
    known = replace(OFFER, files=(RemoteFile(WEIGHTS, None, HASHES[WEIGHTS]),))
    assert fetch(tmp_path, at(hub), offer=known) == {WEIGHTS: HASHES[WEIGHTS]}
    assert (tmp_path / WEIGHTS).read_bytes() == CONTENTS[WEIGHTS]


def test_a_folder_serves_too_but_confirms_only_what_the_catalogue_knows(model: Path, tmp_path: Path) -> None:
    known = replace(
        OFFER, files=(*OFFER.files[:2], RemoteFile(WEIGHTS, len(CONTENTS[WEIGHTS]), HASHES[WEIGHTS]))
    )
    assert fetch(tmp_path / "t", from_folder(model)) == {}
    assert_whole(tmp_path / "t")
    assert fetch(tmp_path / "u", from_folder(model), offer=known) == {WEIGHTS: HASHES[WEIGHTS]}


def test_a_pointer_in_a_folder_is_named(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    error = fails(tmp_path / "t", from_folder(folder))
    assert "Git LFS pointer" in error.message()
    assert not (tmp_path / "t" / WEIGHTS).exists()


def test_a_renamed_repository_is_followed(model: Path, tmp_path: Path) -> None:
    with StandInHub({"new/name": model}, aliases={REPO: "new/name"}) as hub:
        assert fetch(tmp_path, at(hub)) == HASHES


def test_no_source_has_the_model(hub: StandInHub, tmp_path: Path) -> None:
    error = fails(tmp_path, at(hub, "modelscope"), offer=replace(OFFER, repos={"huggingface": REPO}))
    assert error.code == "source_none"


# When a source fails


def test_the_next_source_goes_on_where_the_first_broke_off(
    hub: StandInHub, second: StandInHub, tmp_path: Path
) -> None:
    hub.fault("cut", WEIGHTS, times=4, after=100_000)
    hub.fault("403", WEIGHTS, times=0)
    assert fetch(tmp_path, at(hub), at(second, "modelscope", "second")) == HASHES
    assert_whole(tmp_path)
    assert hub.sent + second.sent == SIZE
    assert second.sent < SIZE - 300_000


def test_away_is_told_with_every_source_tried(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = fails(tmp_path, Source("one", "huggingface", nobody), Source("two", "modelscope", nobody))
    assert error.code == "sources_away"
    assert "one (no connection), two (no connection)" in error.message()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("403", "HTTP 403"), ("404", "HTTP 404"), ("416", "HTTP 416"), ("500", "HTTP 500"),
        ("page", "HTML page"), ("pointer", "Git LFS pointer"), ("loop", "too many redirects"),
        ("content_range", "wrong Content-Range"),
    ],
)  # fmt: skip
def test_what_a_source_does_for_ever_is_told(hub: StandInHub, tmp_path: Path, kind: str, reason: str) -> None:
    hub.fault(kind, WEIGHTS, times=0)
    error = fails(tmp_path, at(hub))
    assert error.code == "sources_failed"
    assert f"hub ({reason})" in error.message()
    assert not (tmp_path / WEIGHTS).exists()
    hub.heal()
    assert fetch(tmp_path, at(hub)) == HASHES


@pytest.mark.parametrize("kind", ["cut", "reset", "short", "empty", "416", "429", "500", "hop"])
def test_what_passes_costs_nothing_that_came(hub: StandInHub, tmp_path: Path, kind: str) -> None:
    hub.fault(kind, WEIGHTS, times=3, after=70_000)
    assert fetch(tmp_path, at(hub)) == HASHES
    assert_whole(tmp_path)
    assert hub.sent <= SIZE + 4 * 65_536  # a spoilt answer may still have sent its first block


@pytest.mark.parametrize("path", ["config.json", WEIGHTS])
def test_a_flipped_byte_is_noticed_and_fetched_anew(hub: StandInHub, tmp_path: Path, path: str) -> None:
    hub.fault("flip", path)
    assert fetch(tmp_path, at(hub)) == HASHES
    assert_whole(tmp_path)


def test_a_source_that_spoils_every_time_gives_way_to_the_next(
    hub: StandInHub, second: StandInHub, tmp_path: Path
) -> None:
    hub.fault("flip", WEIGHTS, times=0)
    assert fails(tmp_path, at(hub)).code == "sources_wrong_hash"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "config.json",
        "tokenizer.json",
    ]
    assert fetch(tmp_path, at(hub), at(second)) == HASHES


def test_a_hub_that_contradicts_the_catalogue_is_not_believed(hub: StandInHub, tmp_path: Path) -> None:
    for known in (RemoteFile(WEIGHTS, None, "0" * 64), RemoteFile(WEIGHTS, 5)):
        error = fails(tmp_path, at(hub), offer=replace(OFFER, files=(known,)))
        assert "differs from the catalogue" in error.message()
    assert hub.sent == 0


def test_a_content_that_changes_meanwhile_starts_over(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "copy")
    new = os.urandom(1_500_000)
    with StandInHub({REPO: folder}) as hub:
        fault = hub.fault("cut", WEIGHTS, times=0, after=50_000)
        changer = threading.Thread(
            target=change_when, args=(lambda: fault.used > 3, folder / WEIGHTS, new, hub)
        )
        changer.start()
        confirmed = fetch(tmp_path / "t", at(hub), patience=replace(QUICK, tries=100))
        changer.join()
    assert (tmp_path / "t" / WEIGHTS).read_bytes() == new
    assert confirmed[WEIGHTS] == hashlib.sha256(new).hexdigest()


def change_when(ready: Callable[[], bool], file: Path, content: bytes, hub: StandInHub) -> None:
    while not ready():
        time.sleep(0.001)
    draft = file.with_name("draft")
    draft.write_bytes(content)
    draft.replace(file)
    hub.heal()


def test_servers_with_tags_of_their_own_do_not_stop_a_known_file(hub: StandInHub, tmp_path: Path) -> None:
    for _ in range(20):
        hub.fault("etag", WEIGHTS)
        hub.fault("short", WEIGHTS)
    assert fetch(tmp_path, at(hub)) == HASHES


@pytest.mark.parametrize("speaks", ["huggingface", "modelscope"])
def test_a_server_without_ranges_serves_the_whole_file(hub: StandInHub, tmp_path: Path, speaks: str) -> None:
    hub.fault("whole", times=0)
    assert fetch(tmp_path, at(hub, speaks)) == HASHES


def test_the_list_of_files_may_fail_once_too(hub: StandInHub, tmp_path: Path) -> None:
    hub.fault("503", API)
    hub.fault("page", API)
    assert fetch(tmp_path, at(hub)) == HASHES


def test_a_stall_is_seen_and_the_line_opened_anew(hub: StandInHub, tmp_path: Path) -> None:
    hub.fault("stall", WEIGHTS, times=3, after=70_000)
    assert fetch(tmp_path, at(hub), patience=replace(HASTY, tries=20)) == HASHES
    assert_whole(tmp_path)


def test_a_source_that_always_stalls_is_given_up(hub: StandInHub, tmp_path: Path) -> None:
    fault = hub.fault("stall", WEIGHTS, times=0, after=0)
    with pytest.raises(FetchError, match="timeout"):
        fetch(tmp_path, at(hub), patience=HASTY)
    assert HASTY.tries <= fault.used <= HASTY.tries * HASTY.connections


def test_a_source_is_given_up_after_a_while_however_many_tries_are_left(
    hub: StandInHub, tmp_path: Path
) -> None:
    hub.fault("500", WEIGHTS, times=0)
    with pytest.raises(FetchError, match="HTTP 500"):
        fetch(tmp_path, at(hub), patience=replace(QUICK, tries=10**6, give_up_seconds=0.2))


def test_a_trickle_is_a_stall_too(hub: StandInHub, tmp_path: Path) -> None:
    hub.rate = 65_536 * 8  # a block, then an eighth of a second of nothing
    trickle = replace(QUICK, stall_seconds=0.3, stall_bytes=10**9, piece_bytes=10**6, tries=1)
    with pytest.raises(FetchError, match="timeout"):
        fetch(tmp_path, at(hub), patience=trickle)


# What goes out


def test_a_token_goes_to_its_hub_and_no_further(hub: StandInHub, tmp_path: Path) -> None:
    hub.gated = True
    assert "HTTP 401" in fails(tmp_path, at(hub)).message()
    hub.requests.clear()
    fetch(tmp_path, replace(at(hub), token="secret"))
    by_port: dict[int, set[str | None]] = {}
    for request in hub.requests:
        by_port.setdefault(request.port, set()).add(request.headers.get("Authorization"))
    assert by_port == {hub.port: {"Bearer secret"}, hub.cdn_port: {None}}


@pytest.mark.parametrize("location", ["http://cdn.test/x", "ftp://cdn.test/x", "file:///etc/passwd", ""])
def test_redirects_that_leave_https_are_refused(location: str) -> None:
    with pytest.raises(web.Trouble) as raised:
        web.next_address(httpx.URL("https://hub.test/a"), location)
    assert not raised.value.again


def test_a_redirect_may_be_relative_and_go_to_another_host() -> None:
    assert web.next_address(httpx.URL("https://hub.test/a/b"), "../c") == "https://hub.test/c"
    assert web.next_address(httpx.URL("https://hub.test/a"), "https://cdn.test/c") == "https://cdn.test/c"


def test_only_https_and_this_computer_confirm_a_hash() -> None:
    safe = ["https://hub.test", "http://127.0.0.1:99", "http://localhost/x", "http://[::1]:80"]
    assert [web.is_safe(address) for address in [*safe, "http://hub.test", "http://10.0.0.7"]] == [
        True
    ] * 4 + [False] * 2


def clean(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_the_environments_proxy_is_used_and_never_for_this_computer(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean(monkeypatch, HTTP_PROXY=hub.address, NO_PROXY="inside.test")
    confirmed = fetch(tmp_path / "t", Source("far", "huggingface", "http://far.test"))
    assert_whole(tmp_path / "t")
    assert confirmed == {}  # plain HTTP: anybody on the way could have said so
    assert any(request.path.startswith("http://far.test/") for request in hub.requests)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert fetch(tmp_path / "u", at(hub)) == HASHES
    assert web.proxy_of(httpx.URL("http://far.test")) == "http://127.0.0.1:9"
    assert web.proxy_of(httpx.URL("http://inside.test")) is None


def test_a_proxy_of_an_unknown_kind_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean(monkeypatch, ALL_PROXY="socks9://me:secret@127.0.0.1:7890")
    error = fails(tmp_path, Source("far", "huggingface", "https://far.test"))
    assert error.code == "proxy_unusable"
    assert "127.0.0.1:7890" in error.message()
    assert "secret" not in error.message()


# The disk

Usage = namedtuple("Usage", "total used free")


def test_room_for_twice_the_size_is_asked_first(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2 * SIZE + 10**9 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, free))
    assert fails(tmp_path, at(hub)).code == "disk_too_full"
    assert hub.sent == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, free + 1))
    assert fetch(tmp_path, at(hub)) == HASHES


def test_a_disk_that_fills_up_meanwhile_can_be_gone_on_from(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PartFile.write

    def write_some(part: PartFile, place: int, data: bytes) -> None:
        if part.have > 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(part, place, data)

    monkeypatch.setattr(PartFile, "write", write_some)
    assert fails(tmp_path, at(hub)).code == "disk_full_fetching"
    monkeypatch.undo()
    hub.reset()
    assert fetch(tmp_path, at(hub)) == HASHES
    assert hub.sent <= SIZE - 1_000_000


def test_a_target_that_cannot_be_written_is_told(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert fails(tmp_path / "file" / "target", at(hub)).code == "fetch_unwritable"


def test_two_programs_do_not_write_the_same_files(hub: StandInHub, tmp_path: Path) -> None:
    hub.rate = 1_000_000
    with Running(tmp_path, at(hub)) as running:
        running.wait_until(lambda: running.came > 0)
        assert fails(tmp_path, at(hub)).code == "download_running"


# Being asked to wait


class Running:
    """A download in a thread of its own."""

    def __init__(self, target: Path, *sources: Source) -> None:
        self.control = Control()
        self.told: list[tuple[float, Progress]] = []
        self.result: dict[str, str] | FetchError | None = None
        self._thread = threading.Thread(target=self._run, args=(target, sources))

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.control.cancel()
        self.join()

    def _run(self, target: Path, sources: tuple[Source, ...]) -> None:
        def note(progress: Progress) -> None:
            self.told.append((time.monotonic(), progress))

        try:
            self.result = dict(download(OFFER, target, sources, note, self.control, QUICK))
        except FetchError as error:
            self.result = error

    @property
    def came(self) -> int:
        return self.told[-1][1].done if self.told else 0

    def join(self) -> None:
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + 10
        while not ready():
            assert time.monotonic() < until
            time.sleep(0.005)


def test_cancel_works_at_once_and_keeps_what_came(hub: StandInHub, tmp_path: Path) -> None:
    hub.rate = 600_000
    with Running(tmp_path, at(hub)) as running:
        running.wait_until(lambda: running.came > 500_000)
        began = time.monotonic()
        running.control.cancel()
        running.join()
        assert time.monotonic() - began < 1  # half a second, and as much again for a busy machine
    assert isinstance(running.result, FetchError)
    assert running.result.code == "fetch_cancelled"
    hub.reset()
    assert fetch(tmp_path, at(hub)) == HASHES
    assert hub.sent < SIZE - 500_000


def test_cancel_works_while_a_server_is_silent(hub: StandInHub, tmp_path: Path) -> None:
    fault = hub.fault("stall", "config.json", times=0)
    with Running(tmp_path, at(hub)) as running:
        running.wait_until(lambda: fault.used > 0)
        began = time.monotonic()
        running.control.cancel()
        running.join()
        assert time.monotonic() - began < 1  # half a second, and as much again for a busy machine


def test_pause_stops_the_traffic_and_resume_goes_on(hub: StandInHub, tmp_path: Path) -> None:
    hub.rate = 600_000
    with Running(tmp_path, at(hub)) as running:
        running.wait_until(lambda: running.came > 500_000)
        running.control.pause()
        running.wait_until(lambda: running.told[-1][1].per_second == 0)
        wait_for_silence(hub)
        assert running.result is None
        assert running.came < SIZE
        came = running.came
        hub.reset()
        running.control.resume()
        running.join()
    assert running.result == HASHES
    assert_whole(tmp_path)
    assert hub.sent <= SIZE - came


def wait_for_silence(hub: StandInHub) -> None:
    """Until nothing more is sent: what was under way may still come to its end."""
    sent = -1
    while sent != hub.sent:
        sent = hub.sent
        time.sleep(0.25)


def test_progress_tells_bytes_and_speed_and_not_too_often(hub: StandInHub, tmp_path: Path) -> None:
    hub.rate = 1_200_000
    with Running(tmp_path, at(hub)) as running:
        running.join()
    seconds = running.told[-1][0] - running.told[0][0]
    assert 3 <= len(running.told) <= 5 * seconds + 4
    done = [progress.done for _, progress in running.told if progress.stage == "fetching"]
    assert done == sorted(done)
    last = running.told[-1][1]
    assert (last.done, last.total, last.fraction) == (SIZE, SIZE, 1.0)
    assert any(500_000 < progress.per_second < 10_000_000 for _, progress in running.told)


@pytest.mark.slow
def test_the_campaigns_sample(tmp_path: Path) -> None:
    """20 spoilt downloads and one that is killed; docs/models.md tells of 200 and 20."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "download_faults.py"),
        "--downloads",
        "20",
        "--kills",
        "1",
    ]
    done = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
