"""Which family a model folder belongs to, and the one place that opens each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glmui.engine.model_folder import Family, check_causal_lm, describe
from glmui.errors import InvalidInput
from glmui.glm.config import read_config
from glmui.glm.extra_folders import check_adapter, check_prefix
from glmui.glm.files import check_folder
from glmui.types import ChatEngine, EngineSpec, Progress


def family_of(folder: Path | str, chatglm_family: str = "chatglm3") -> Family:
    """The folder's family, once everything that can be checked without opening the weights is right.

    chatglm_family: what a folder is whose files fit both ChatGLM2 and 3; with "" that is an error too.
    Raises ModelError naming the folder and the file: no folder, config.json, tokenizer or chat template; no
    safetensors (only .bin), a missing or empty shard, a Git LFS pointer, or weights in a foreign format.
    """
    found = describe(folder)
    if found.family == "causal_lm":
        check_causal_lm(Path(folder))
    elif found.family == "chatglm":
        check_folder(folder, chatglm_family)
    return found.family


def check_extras(spec: EngineSpec) -> None:
    """Raise what is wrong with the spec's prefix and adapter, as far as its small files tell."""
    if not any(spec.extras):
        return
    if describe(spec.folder).family != "chatglm":
        raise InvalidInput("extras_only_chatglm")
    config = read_config(spec.folder, spec.chatglm_family)
    if spec.prefix:
        check_prefix(Path(spec.prefix), config)
    if spec.adapter:
        check_adapter(Path(spec.adapter), config)


def open_family(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> ChatEngine:
    """Load the model that `spec` names; imports torch for all but the scripted engine.

    on_progress: told how far loading and every later prefill are. Raises GlmuiError.
    """
    family = family_of(spec.folder)
    if family == "echo":
        from glmui.engine.echo import open_echo

        return open_echo(spec, on_progress)
    if family == "chatglm":
        from glmui.engine.chatglm import open_chatglm

        return open_chatglm(spec, on_progress)
    from glmui.engine.causal_lm import open_causal_lm

    return open_causal_lm(spec, on_progress)
