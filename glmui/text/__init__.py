"""Text to ids and back, without torch: the app process counts tokens while the engine sleeps."""

from __future__ import annotations

from pathlib import Path

from glmui.text.model_files import read_config
from glmui.types import TokenCounter


def open_counter(folder: Path, family: str = "") -> TokenCounter:
    """Counts a prompt's tokens as the model in `folder` does ("echo": as the scripted engine).

    family: "chatglm2" or "chatglm3" for a folder whose files leave that open. Raises ModelError.
    """
    if str(folder) == "echo":
        from glmui.text import pieces

        return pieces.count
    if read_config(folder).get("model_type") == "chatglm":
        from glmui.text import chatglms

        return chatglms.open_counter(folder, family)
    from glmui.text.chat_template import ChatTokenizer

    return ChatTokenizer.from_folder(folder).count
