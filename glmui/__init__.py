"""glmui: a personal chat app for ChatGLM-6B-INT4 on an ordinary computer.

Importing this package is cheap: the Python API below loads torch only when it is first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmui.engine.auto_classes import register_auto_classes
    from glmui.engine.chatglm_api import ChatGLM
    from glmui.quant import quantize

__version__ = "0.1.0"
__all__ = ["ChatGLM", "__version__", "quantize", "register_auto_classes"]

_HOMES = {
    "ChatGLM": "glmui.engine.chatglm_api",
    "quantize": "glmui.quant",
    "register_auto_classes": "glmui.engine.auto_classes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'glmui' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
