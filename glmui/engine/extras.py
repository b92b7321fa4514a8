"""What stands beside a loaded base model and is changed without loading it again: a prefix, an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch.utils.hooks import RemovableHandle

from glmui.engine.generate import Speaker
from glmui.engine.loaded import Ask, LoadedEngine
from glmui.errors import InvalidInput
from glmui.glm.adapter import attach, read_adapter
from glmui.glm.cache import Prefix
from glmui.glm.checkpoint import AnyModel
from glmui.glm.extra_folders import check_prefix, may_hold_prefix
from glmui.glm.files import weight_files
from glmui.glm.prefix import prefix_of, read_prefix
from glmui.types import EngineInfo

Folder = Path | str | None

_Key = tuple[tuple[Path, int], ...]  # files, and when each was written


class Extras:
    """The prefix and the adapter that a model answers with. Prefixes once read are kept, for switching.

    folder: the model's own, whose weights may hold a prefix: that one is used where no other is. merged: an
    adapter that went into the weights before they were quantised, and which nothing can take out again.
    Whoever changes either must renew the decoder: what a KV cache holds was computed with the old ones.
    """

    def __init__(self, model: AnyModel, folder: Path | None = None, merged: Folder = None) -> None:
        self._model = model
        self._merged = merged
        self._kept: dict[_Key, Prefix] = {}
        self._handles: list[RemovableHandle] = []
        self._using = "", _name(merged)
        self._own: Prefix | None = None
        if folder and may_hold_prefix(folder):
            self._own = prefix_of(weight_files(folder), model.config, folder)
            model.prefix = self._own

    def use(self, prefix: Folder, adapter: Folder) -> bool:
        """Answer with these from now on, None or "" for none; whether that is a change.

        Raises ModelError where one does not fit the model, InvalidInput for a merged adapter, and whatever a
        card raises that has no room: then nothing has changed.
        """
        wanted = _name(prefix), _name(adapter)
        if wanted == self._using:
            return False
        entries = self._read(Path(wanted[0])) if wanted[0] else self._own
        if wanted[1] != self._using[1]:
            self._attach(wanted[1])
        self._model.prefix = entries
        self._using = wanted
        return True

    def use_prefix(self, folder: Folder) -> bool:
        """See `use`; the adapter stays."""
        return self.use(folder, self._using[1])

    def use_adapter(self, folder: Folder) -> bool:
        """See `use`; the prefix stays."""
        return self.use(self._using[0], folder)

    def _attach(self, folder: str) -> None:
        if self._merged is not None:
            raise InvalidInput("adapter_merged", folder=self._merged)
        adapter = read_adapter(Path(folder), self._model) if folder else None
        attached = attach(self._model, adapter) if adapter else []  # raises where memory lacks room
        before, self._handles = self._handles, attached
        for handle in before:
            handle.remove()

    def _read(self, folder: Path) -> Prefix:
        key = _key(check_prefix(folder, self._model.config))
        if key not in self._kept:
            self._kept[key] = read_prefix(folder, self._model.config)
        return self._kept[key]


class ChatGLMEngine(LoadedEngine):
    """A loaded ChatGLM with its extras."""

    def __init__(self, speaker: Speaker, ask: Ask, info: EngineInfo, extras: Extras) -> None:
        super().__init__(speaker, ask, info)
        self._extras = extras

    def use_extras(self, prefix: str, adapter: str) -> None:
        """See types.TakesExtras."""
        if self._extras.use(prefix, adapter) and self.speaker is not None:
            self.speaker.decoder.renew()


def _name(folder: Folder) -> str:
    return str(Path(folder).expanduser().absolute()) if folder else ""


def _key(files: Iterable[Path]) -> _Key:
    return tuple((file, file.stat().st_mtime_ns) for file in files)
