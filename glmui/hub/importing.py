"""From a folder of files from elsewhere to a model folder of ours, by a process that can do little else.

This side starts it, listens, and says in words how it ended; importer.py is what it does.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from glmui import confined
from glmui.confined import Ended, Limits
from glmui.errors import FetchError, GlmuiError, ModelError
from glmui.hub import importer
from glmui.hub.catalogue import Offer
from glmui.hub.importer import ImportJob, Quantize
from glmui.types import Progress, Stage

_MEMORY = 2_500_000_000  # bytes of its own; a full-size import needs about a fifth
_SECONDS, _SECONDS_PER_GB = 120, 90  # of processor time: ten times what this takes on a slow machine
_SPARE = 200_000_000


def import_model(
    source: Path,
    made: Path,
    offer: Offer | None,
    quantize: Quantize,
    known: Mapping[str, str],
    on_progress: Callable[[Progress], None],
    cancelled: Callable[[], bool],
) -> None:
    """Write the model folder `made`: one model.safetensors, the small files, and a manifest.

    known: sha256 by path, as the download confirmed them; the catalogue's are asked for too. Files whose
    hash nobody states are taken as they are: whoever calls has asked the user. `made.parent` is the one
    folder that the process may write into; what a failure leaves there is the caller's to remove.
    Progress: "checking", then "converting", with a fraction.
    Raises ModelError saying what is wrong with which file, FetchError("fetch_cancelled").
    """
    job = _job(source, made, offer, quantize, known)
    weights = sum(
        f.stat().st_size for f in source.iterdir() if f.suffix in (".bin", ".safetensors") and f.is_file()
    )
    limits = Limits(
        writes=made.parent,
        memory=_MEMORY,
        mapped=weights,
        cpu_seconds=_SECONDS + _SECONDS_PER_GB * weights // 10**9,
        file_size=weights + _SPARE,
    )

    def told(stage: Stage, done: int, total: int, detail: str) -> None:
        on_progress(Progress(stage, done / total if total else None, detail, done, total))

    on_progress(Progress("checking", 0.0))
    try:
        confined.run(importer.import_here, (job,), limits, told, cancelled)
    except Ended as ended:
        raise _said(ended, source) from ended
    _check_result(made, source)


def _job(
    source: Path, made: Path, offer: Offer | None, quantize: Quantize, known: Mapping[str, str]
) -> ImportJob:
    hashes = {Path(path).name: digest for path, digest in known.items()}
    if offer is None:
        return ImportJob(source, made, quantize, hashes, origin=str(source))
    files = {Path(file.path).name: file for file in offer.files}
    return ImportJob(
        source,
        made,
        quantize,
        hashes | {name: file.sha256 for name, file in files.items() if file.sha256},
        {name: file.size for name, file in files.items() if file.size is not None},
        next(iter(offer.repos.values()), offer.name),
        offer.licence.name,
    )


def _said(ended: Ended, source: Path) -> GlmuiError:
    if ended.reason == "cancelled":
        return FetchError("fetch_cancelled")
    return ModelError(f"import_{ended.reason}", folder=source, detail=ended.detail)


def _check_result(made: Path, source: Path) -> None:
    """Plain files and nothing else: whatever that process did, no link of its making is followed."""
    if not all(stat.S_ISREG(path.lstat().st_mode) for path in made.iterdir()):
        raise ModelError("import_died", folder=source, detail="unexpected files")
