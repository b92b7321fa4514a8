"""What the importing process does: look at names, sizes, hashes and forms, open the weights, write them anew.

Each step trusts what the steps before have made sure of. torch is imported once the files have their form,
and afterwards no thread or process can be made any more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glmui.confinement import stop_making_threads
from glmui.durable import flush
from glmui.engine.own_process import ENVIRONMENT
from glmui.errors import FetchError, ModelError
from glmui.hub import manifest
from glmui.hub.manifest import Manifest, Stored
from glmui.hub.source_folder import SourceFolder, check_forms, check_sizes, open_source
from glmui.types import BITS, Progress, Stage

if TYPE_CHECKING:
    from torch import Tensor

RESULT = "model.safetensors"

Quantize = Literal["none", "int8", "int4"]
Tell = Callable[[Stage, int, int, str], None]  # stage, bytes done, bytes in all, what


@dataclass(frozen=True, slots=True)
class ImportJob:
    """What is to be imported, in values that cross to another process.

    made: the folder to write, not there yet; its parent is the one folder that may be written into.
    hashes, sizes: what each file must be, by its name, as far as anybody stated it.
    """

    source: Path
    made: Path
    quantize: Quantize
    hashes: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    origin: str = ""
    licence: str = ""


def import_here(tell: Tell, job: ImportJob) -> None:
    """Write job.made. Raises ModelError, or FetchError("import_unwritable")."""
    source = open_source(job.source)
    check_sizes(source, job.sizes)
    made_from = _check_hashes(source, job.hashes, tell)
    check_forms(source)
    _check_wish(source, job.quantize)
    try:
        _write(source, job, tell)
        _finish(source, job, made_from)
    except OSError as error:
        detail = error.strerror or str(error)
        raise FetchError("import_unwritable", folder=job.made.parent, detail=detail) from error


def _check_hashes(source: SourceFolder, hashes: Mapping[str, str], tell: Tell) -> dict[str, Stored]:
    """Read every file through. Returns what the weight files are; raises ModelError("import_wrong_hash")."""
    files = [*source.besides, *source.weights]
    total, done = sum(file.stat().st_size for file in files), 0
    found: dict[str, Stored] = {}
    for file in files:

        def read(count: int, name: str = file.name) -> None:
            nonlocal done
            done += count
            tell("checking", done, total, name)

        found[file.name] = manifest.stored(file, read)
        if hashes.get(file.name, found[file.name].sha256) != found[file.name].sha256:
            raise ModelError("import_wrong_hash", folder=source.folder, file=file.name)
    return {file.name: found[file.name] for file in source.weights}


def _check_wish(source: SourceFolder, quantize: str) -> None:
    if quantize != "none" and source.family != "chatglm":
        raise ModelError("import_not_quantisable", folder=source.folder)


def _write(source: SourceFolder, job: ImportJob, tell: Tell) -> None:
    """The weights, as `quantize` wishes; config.json where that changes it."""
    os.environ.update(ENVIRONMENT)  # read by torch when it is imported
    from glmui.hub import expected

    expected.warm_up()
    stop_making_threads()
    tensors = expected.checked_tensors(source)
    if BITS[job.quantize]:
        tensors.clear()
        _quantize(job, tell)
    else:
        job.made.mkdir(mode=0o700)
        _copy(tensors, job.made / RESULT, tell)


def _copy(tensors: dict[str, Tensor], target: Path, tell: Tell) -> None:
    """One tensor after the other, its pages let go again: the memory of its own stays small."""
    from glmui.quant.mapped import release
    from glmui.quantizing.tensor_file import TensorFile, form_of

    forms = {name: form_of(tensor) for name, tensor in tensors.items()}
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    with TensorFile(target, forms) as file:
        for name in list(tensors):
            tensor = tensors.pop(name)
            file.write(name, tensor)
            release(tensor)
            done += tensor.nbytes
            tell("converting", done, total, name)


def _quantize(job: ImportJob, tell: Tell) -> None:
    from glmui.quantizing.folder import quantize_folder

    def told(progress: Progress) -> None:
        tell("converting", progress.done, progress.total, progress.detail)

    quantize_folder(job.source, job.made, BITS[job.quantize], on_progress=told)


def _finish(source: SourceFolder, job: ImportJob, made_from: Mapping[str, Stored]) -> None:
    """The small files beside the weights, all on the disk, and last the manifest that vouches for them."""
    for file in source.besides:
        if not (job.made / file.name).exists():  # quantised: it has a config.json of its own
            shutil.copyfile(file, job.made / file.name)
    for file in job.made.iterdir():
        flush(file)
    manifest.write(
        job.made,
        Manifest(
            name=job.made.name,
            source=job.origin,
            licence=job.licence,
            date=manifest.now(),
            quantize=job.quantize,
            files=manifest.stored_in(job.made),
            made_from=made_from,
        ),
    )
