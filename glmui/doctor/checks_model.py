"""The chosen model: its folder, its vocabulary, its weights; and its files against their manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from glmui.doctor.finding import Finding, ok, problem, warning
from glmui.doctor.world import World
from glmui.errors import GlmuiError, ModelError

_PIECES = {"chatglm": 130344, "chatglm2": 64789, "chatglm3": 64789}  # of the published vocabularies
_MOST_HEADER = 100 * 2**20  # bytes: no safetensors file tells more of itself
_VOCABULARIES = ("ice_text.model", "tokenizer.model", "tokenizer.json")
_NO_WEIGHTS = ("model_no_weights", "model_only_bin")


def model(world: World) -> Iterator[Finding]:
    """The folder, then the vocabulary, then the weights; a wrong folder ends it."""
    from glmui.engine.families import family_of
    from glmui.engine.model_folder import ECHO
    from glmui.hub.installed import resolve

    chosen = world.settings.model
    if not chosen:
        yield warning("model", "model_none")
        return
    try:
        folder = resolve(chosen, world.data_dir)
        family = family_of(folder)
    except GlmuiError as error:
        yield problem(_about(error), "model_wrong", model=chosen, error=error)
        return
    yield ok("model", "model_fine", model=chosen, family=family)
    if family != ECHO:
        yield from _vocabulary(folder, family)
        yield from _weights(folder, world.verify)


def _about(error: GlmuiError) -> str:
    """What an error is about, by the file it names."""
    file = Path(str(error.values.get("file", ""))).name
    if file in _VOCABULARIES:
        return "vocabulary"
    if error.code in _NO_WEIGHTS or file.endswith((".bin", ".safetensors", ".index.json")):
        return "weights"
    return "model"


def _vocabulary(folder: Path, family: str) -> Iterator[Finding]:
    """Whether it loads, and is as large as it should be."""
    try:
        count, wanted = _count_ids(folder, family)
    except ModelError as error:
        yield problem("vocabulary", "vocabulary_wrong", error=error)
        return
    if wanted and count != wanted:
        yield problem("vocabulary", "vocabulary_size", count=count, wanted=wanted)
    else:
        yield ok("vocabulary", "vocabulary_fine", count=count)


def _count_ids(folder: Path, family: str) -> tuple[int, int]:
    """Tokens of the vocabulary, and how many there should be (0: unknown). Raises ModelError."""
    if family.startswith("chatglm"):
        from glmui.glm.config import read_config
        from glmui.text.vocabulary import open_vocabulary, vocabulary_file

        which = read_config(folder).family
        return open_vocabulary(vocabulary_file(folder, which), which).get_piece_size(), _PIECES[which]
    from glmui.text.chat_template import ChatTokenizer

    return len(ChatTokenizer.from_folder(folder)), 0


def _weights(folder: Path, verify: bool) -> Iterator[Finding]:
    """Whole, and as their manifest has them: by size, or with `verify` by hash."""
    from glmui.glm.files import look_at, weight_files
    from glmui.hub import manifest

    try:
        files = weight_files(folder)
        for file in files:
            look_at(file)
        told = manifest.read(folder)
    except ModelError as error:
        yield problem("weights", "weights_wrong", error=error)
        return
    if cut := [file.name for file in files if file.suffix == ".safetensors" and is_cut(file)]:
        yield problem("weights", "weights_cut", files=", ".join(cut))
        return
    size = f"{sum(file.stat().st_size for file in files) / 1e9:.2f}"
    if told is None:
        yield ok("weights", "weights_unknown", size=size)
        return
    changed = [name for name, stored in told.files.items() if _differs(folder / name, stored, verify)]
    if changed:
        yield problem("weights", "weights_changed", files=", ".join(changed), date=told.date)
    else:
        yield ok("weights", "weights_verified" if verify else "weights_fine", size=size, date=told.date)


def _differs(file: Path, stored: object, verify: bool) -> bool:
    from glmui.hub import manifest

    if not file.is_file():
        return True
    return manifest.stored(file) != stored if verify else file.stat().st_size != getattr(stored, "size", None)


def is_cut(file: Path) -> bool:
    """Whether a safetensors file is shorter or longer than the table at its start says (or has none)."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(_MOST_HEADER, size):
            return True
        try:
            table = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return True
    return bool(size != 8 + length + max(ends, default=0))
