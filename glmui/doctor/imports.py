"""Whether packages can be imported, tried in a process of its own: `python -m glmui.doctor.imports NAME`."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence


def run(modules: Sequence[str]) -> None:
    """Import one after the other; prints which one it is at, and "failed": {module: error}."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    failed: dict[str, str] = {}
    for name in modules:
        print(json.dumps({"doing": name}), flush=True)
        try:
            importlib.import_module(name)
        except Exception as error:  # a package may raise anything
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"doing": "", "failed": failed}), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
