"""The files of a ChatGLM folder, of any of the three models, the weights unopened. No torch."""

from __future__ import annotations

import zipfile
from pathlib import Path

from glmui.errors import ModelError
from glmui.glm.config import AnyConfig, read_config
from glmui.text.model_files import Accident, accident, beginning, listed_files, refusal
from glmui.text.vocabulary import vocabulary_file

_REFUSALS: dict[Accident, str] = {"Git LFS pointer": "model_lfs_pointer", "HTML page": "model_file_page"}


def check_folder(folder: Path | str, family: str = "") -> AnyConfig:
    """The folder's config, once all of its files are there and look like what their names say.

    family: see config.read_config. Raises ModelError: another model, no vocabulary, a weight file that is
    missing, a Git LFS pointer, a web page, or a .bin that is cut short or of the old form.
    """
    folder = Path(folder)
    config = read_config(folder, family)
    vocabulary_file(folder, config.family)
    for file in weight_files(folder):
        look_at(file)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors, or where there are none .bin. Raises ModelError."""
    files = listed_files(folder, "model.safetensors") or listed_files(folder, "pytorch_model.bin")
    if not files:
        raise ModelError("model_no_weights", folder=folder)
    return files


def look_at(file: Path) -> None:
    """Tell the usual accidents of a download from a weight file. Raises ModelError."""
    if not file.is_file():
        raise refusal("model_file_missing", file)
    start = beginning(file)
    if found := accident(start):
        raise refusal(_REFUSALS[found], file)
    if file.suffix == ".bin" and not zipfile.is_zipfile(file):
        raise refusal("model_file_old" if start.startswith(b"\x80") else "model_file_cut", file)
