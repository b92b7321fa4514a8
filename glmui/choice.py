"""Which model answers, on what: read from the settings, changed by the page, checked before it is kept."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from glmui import settings as settings_module
from glmui.engine.families import family_of
from glmui.hub import installed
from glmui.settings import Settings, spec_of
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

    def check(self) -> None:
        """Raise what is wrong with the chosen model's folder, if anything."""
        if spec := self.spec():
            family_of(Path(spec.folder))

    def change(self, **changes: Any) -> Settings:
        """Check and save settings. A model is opened far enough to tell that it is one."""
        if model := changes.get("model"):
            folder = installed.resolve(model, self.settings.data_dir)
            family_of(folder)
            if Path(model).is_dir():
                changes["model"] = str(folder)
        with self._lock:
            self.settings = settings_module.save(self.settings, **changes)
            return self.settings
