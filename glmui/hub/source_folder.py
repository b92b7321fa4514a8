"""A model folder from elsewhere, before anything in it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmui.engine import model_folder
from glmui.engine.families import family_of
from glmui.engine.model_folder import Family
from glmui.errors import ModelError
from glmui.glm import files
from glmui.hub.weight_forms import check_beginning, check_weight_file

# What is taken besides the weights; programs (.py) and all else are left where they are.
_BESIDES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "ice_text.model",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "MODEL_LICENSE",
)
_WEIGHTS = (".bin", ".safetensors")
_LONGEST = {
    ".bin.index.json": 16 << 20,
    "config.json": 2 << 20,
    "tokenizer.json": 64 << 20,
    ".model": 16 << 20,
}
_LONGEST_OTHER = 16 << 20


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """weights: in the order of their names. besides: the small files to be copied as they are."""

    folder: Path
    family: Family
    weights: tuple[Path, ...]
    besides: tuple[Path, ...]


def open_source(folder: Path) -> SourceFolder:
    """Look at every name and every small file; the weights stay closed. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError("model_no_folder", folder=folder)
    for path in sorted(folder.iterdir()):
        _check_kind(path, folder)
        if path.suffix in _WEIGHTS and path.is_file():
            check_beginning(path)
    try:
        family = family_of(folder)
        chatglm = family == "chatglm"
        weights = files.weight_files(folder) if chatglm else model_folder.weight_files(folder)
    except RecursionError as error:  # JSON in JSON in JSON
        raise ModelError("model_file_broken", folder=folder, file="config.json") from error
    besides = tuple(folder / name for name in _BESIDES if (folder / name).is_file())
    return SourceFolder(folder, family, tuple(sorted(weights)), besides)


def weight_names(folder: Path) -> list[str]:
    """The weight files that lie in a folder, by what they are called."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)


def _check_kind(path: Path, folder: Path) -> None:
    """Files only, of this folder only (or of the cache that a hub's own program keeps), and none too long."""
    if path.is_dir() and not path.is_symlink():
        return
    if not path.is_file() or not any(path.resolve().is_relative_to(root) for root in _roots(folder)):
        raise ModelError("import_not_a_file", folder=folder, file=path.name)
    if path.suffix not in _WEIGHTS and path.stat().st_size > _longest(path.name):
        raise ModelError(
            "import_file_too_long", folder=folder, file=path.name, size=path.stat().st_size >> 20
        )


def _roots(folder: Path) -> list[Path]:
    real = folder.resolve()
    # In a cache, REPOSITORY/snapshots/REVISION/FILE is a link to REPOSITORY/blobs/HASH.
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def _longest(name: str) -> int:
    return next((most for end, most in _LONGEST.items() if name.endswith(end)), _LONGEST_OTHER)


def check_sizes(source: SourceFolder, sizes: Mapping[str, int]) -> None:
    """Raises ModelError("import_wrong_size") for a file that is not as long as the catalogue says."""
    for name, size in sizes.items():
        file = source.folder / name
        if file.is_file() and (found := file.stat().st_size) != size:
            raise ModelError("import_wrong_size", folder=source.folder, file=name, size=found, expected=size)


def check_forms(source: SourceFolder) -> None:
    """Raises ModelError for a weight file that is something else."""
    for file in source.weights:
        check_weight_file(file)
