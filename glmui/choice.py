"""Which model answers, on what: read from the settings, changed by the page, checked before it is kept."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmui import settings as settings_module
from glmui.engine.families import check_extras, family_of
from glmui.engine.model_folder import ECHO
from glmui.errors import GlmuiError
from glmui.hub import installed
from glmui.settings import Settings, spec_of
from glmui.text.model_files import is_in_doubt
from glmui.types import EngineSpec


class Choice:
    """Holds the settings of this run. `change` checks and saves; `spec` says what the engine should hold."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()

    def spec(self) -> EngineSpec | None:
        """The chosen model, or None. Raises NotFound or ModelError when its folder is gone or damaged."""
        chosen = self.settings
        if not chosen.model:
            return None
        return spec_of(chosen, chosen.model, installed.resolve(chosen.model, chosen.data_dir))

    def in_doubt(self) -> bool:
        """Whether it must be said which of ChatGLM2 and 3 the chosen folder holds."""
        spec = None
        with suppress(GlmuiError):
            spec = self.spec()
        return spec is not None and spec.folder != ECHO and is_in_doubt(Path(spec.folder))

    def check(self) -> None:
        """Raise what is wrong with the chosen model's folder, if anything."""
        if spec := self.spec():
            family_of(Path(spec.folder), spec.chatglm_family)
            check_extras(spec)

    def change(self, **changes: Any) -> Settings:
        """Check and save settings. A model is opened far enough to tell that it is one."""
        if model := changes.get("model"):
            folder = installed.resolve(model, self.settings.data_dir)
            family_of(folder)
            if Path(model).is_dir():
                changes["model"] = str(folder)
            if changes["model"] != self.settings.model:
                changes = {**settings_module.NO_EXTRAS, **changes}
        if settings_module.NO_EXTRAS.keys() & changes.keys():
            changes = self._checked_extras(changes)
        with self._lock:
            self.settings = settings_module.save(self.settings, **changes)
            return self.settings

    def _checked_extras(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The changes, with the model that the extras are for. Raises what is wrong with these."""
        wished = settings_module.check(self.settings, **changes)
        if wished.model:
            folder = installed.resolve(wished.model, wished.data_dir)
            check_extras(spec_of(wished, wished.model, folder))
        return {name: getattr(wished, name) for name in (*changes, "model")}

    def take_up(self, name: str, wanted: bool) -> None:
        """A model has come to the data folder: choose it where that is wanted, or where none is chosen."""
        can_chat = name in [model.name for model in installed.models(self.settings.data_dir)]
        if wanted or (can_chat and not self.settings.model):
            self.change(model=name)
