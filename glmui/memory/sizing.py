"""The size of the model that a spec asks for, with its extras: what the small files of their folders say.

No weights are opened and nothing is refused here: what cannot be read counts as none; opening tells of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmui.errors import ModelError
from glmui.glm.config import AnyConfig
from glmui.glm.extra_folders import check_adapter, check_prefix
from glmui.memory.model_size import AS_PUBLISHED, Forms, ModelSize, matrices
from glmui.text.model_files import read_json
from glmui.types import BITS, EngineSpec

_USUAL_PREFIX = 128  # entries of the published ones, for a folder that does not tell
_MATRIX = re.compile(r"\.layers\.(\d+)\.(?:\w+\.)*(\w+)$")  # its name tells its layer and its part


def size_of(spec: EngineSpec, config: AnyConfig, card_float: int = 2) -> ModelSize:
    """The size of the model that `config` tells of, as `spec` wants it held.

    card_float: bytes of a number that a card computes with.
    """
    values = _values(spec.folder)
    forms = forms_of(values) if config.quantization_bit else AS_PUBLISHED
    size = ModelSize.of(config, BITS[spec.quantize], card_float, forms)
    own = _count(values.get("pre_seq_len"))  # of a fine-tune that saved the whole model
    front = prefix_entries(Path(spec.prefix).expanduser(), config) if spec.prefix else own
    beside = adapter_numbers(Path(spec.adapter).expanduser(), config) if spec.adapter else 0
    return size.with_extras(front, beside)


def _values(folder: str) -> Mapping[str, Any]:
    """config.json as it stands."""
    with suppress(ModelError, OSError):
        return read_json(Path(folder) / "config.json") if folder else {}
    return {}


def forms_of(values: Mapping[str, Any]) -> Forms:
    """What glmui's own keys in a config.json say (quantizing/folder.py writes them)."""
    told = values.get("quantization_bits")
    named = told.items() if isinstance(told, dict) else ()
    bits = {
        (int(found[1]), found[2]): width
        for name, width in named
        if (found := _MATRIX.search(name)) and width in (4, 8, 16)
    }
    return Forms(_count(values.get("quantization_group_size")), bits)


def prefix_entries(folder: Path, config: AnyConfig) -> int:
    """How many entries a prefix has: as its config.json says, else as many as its file can hold, up to the
    usual number."""
    with suppress(ModelError, OSError):
        files = check_prefix(folder, config)
        if told := _count(_values(str(folder)).get("pre_seq_len")):
            return told
        each = 2 * 2 * config.num_layers * config.kv_heads * config.head_size  # bytes in float16
        return min(_USUAL_PREFIX, sum(file.stat().st_size for file in files) // each)
    return 0


def adapter_numbers(folder: Path, config: AnyConfig) -> int:
    """Numbers that an adapter puts beside each layer; where only some layers have it, what these have, spread
    over all."""
    with suppress(ModelError, OSError):
        lora = check_adapter(folder, config)
        shapes, named = matrices(config), read_json(folder / "adapter_config.json").get("target_modules")
        parts = {str(name).rpartition(".")[2] for name in named} if isinstance(named, list) else set(shapes)
        told = sum(lora.rank * sum(shape) for part, shape in shapes.items() if part in parts)
        return min(told, lora.file.stat().st_size // 2 // config.num_layers)  # two bytes each, or four
    return 0


def _count(value: object) -> int:
    """A number of things as JSON has it; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
