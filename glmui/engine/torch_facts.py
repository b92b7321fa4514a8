"""What torch finds on this machine, told in a process of its own: `python -m glmui.engine.torch_facts`.

A torch that cannot be loaded may take its process with it, so every step is announced before it is made.
"""

from __future__ import annotations

import json
import logging
import platform
import warnings
from typing import Any

from glmui.engine.own_process import set_environment

_LOG_TAIL = 600  # characters of what the compiler said
_FEATURES = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "i8mm")


def run() -> None:
    """Print the facts, one JSON object a line; "doing" names the step at hand, "" when all is told."""
    set_environment()
    for step in (_import, _cuda, _kernels, _card_kernels):
        _tell(doing=step.__name__.removeprefix("_"))
        if not step():
            return
    _tell(doing="")


def _tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _import() -> bool:
    try:
        import torch
    except Exception as error:
        _tell(error=f"{type(error).__name__}: {error}"[:300], missing=isinstance(error, ModuleNotFoundError))
        return False
    found = torch.cpu.get_capabilities()
    _tell(
        version=torch.__version__,
        build=torch.version.cuda,
        features=[name for name in _FEATURES if found.get(name)],
        cpu=str(found.get("cpu_name", "")),
        machine=platform.machine(),
    )
    return True


def _cuda() -> bool:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        visible = torch.cuda.is_available()
    words = str(said[-1].message).splitlines()[0] if said else ""
    _tell(visible=visible, words=words, architectures=torch.cuda.get_arch_list() if visible else [])
    cards = [_card(number) for number in range(torch.cuda.device_count())] if visible else []
    _tell(cards=cards)
    return True


def _card(number: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(number)
    card = {"name": about.name, "capability": [about.major, about.minor], "total": about.total_memory}
    try:
        card["free"] = torch.cuda.mem_get_info(number)[0]
    except RuntimeError as error:  # the card is there and cannot be used
        card["error"] = str(error).splitlines()[0]
    return card


def _kernels() -> bool:
    from glmui.engine.loaded import kernel_folder
    from glmui.quant.kernels import cpu as kernels

    said = _Said(kernels.__name__)
    loaded = kernels.load(kernel_folder())
    _tell(
        kernel=loaded.name,
        reason=loaded.reason,
        folder=str(kernel_folder()),
        said="" if loaded.kernels else said.text[-_LOG_TAIL:],
    )
    return True


def _card_kernels() -> bool:
    import torch

    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    _tell(card_kernels=[_on_card(number) for number in cards])
    return True


def _on_card(number: int) -> dict[str, Any]:
    import torch

    from glmui.engine.loaded import kernel_folder
    from glmui.quant.kernels import cuda as kernels

    said = _Said(kernels.__name__)
    loaded = kernels.load(f"cuda:{number}", kernel_folder())
    return {
        "card": torch.cuda.get_device_name(number),
        "kernel": loaded.name,
        "reason": loaded.reason,
        "folder": str(kernels.folder(kernel_folder())),
        "said": said.text[-_LOG_TAIL:],
    }


class _Said(logging.Handler):
    """Keeps what a package of kernels writes to the debug log: the compiler's own words."""

    def __init__(self, package: str) -> None:
        super().__init__()
        self.text = ""
        logging.getLogger(package).addHandler(self)
        logging.getLogger(package).setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


if __name__ == "__main__":
    run()
