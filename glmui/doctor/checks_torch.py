"""torch, the graphics card it may use, and the kernels that compute on the CPU and on a card."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmui.doctor.ask import Report
from glmui.doctor.finding import Finding, Mend, gb, ok, problem, warning
from glmui.doctor.world import World

_NVIDIA, _DISPLAY = "0x10de", "0x03"  # the maker, and the class of devices, in PCI's words
_NO_DRIVER = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")
# What may come out otherwise where a card's kernels are compiled and tried once more.
_MADE_ANEW = tuple(f"card_kernels_{how}" for how in ("part", "not_compiled", "wrong"))


def torch(world: World) -> Iterator[Finding]:
    report = world.torch()
    version, build = report.facts.get("version"), report.facts.get("build")
    if report.facts.get("missing"):
        yield problem("torch", "torch_missing")
    elif "error" in report.facts:
        yield problem("torch", "torch_broken", error=report.facts["error"])
    elif not version:
        how = "torch_hangs" if report.ending == "time" else "torch_crashes"
        yield problem("torch", how, ending=report.ending)
    else:
        yield ok("torch", "torch_cuda" if build else "torch_cpu", version=version, cuda=build)


@dataclass(frozen=True, slots=True)
class Nvml:
    """What the driver tells. error: the exception's name where it tells nothing, "" where all is well."""

    error: str = ""
    words: str = ""
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # the newest that this driver runs
    cards: tuple[str, ...] = ()


def read_nvml(nvml: Any) -> Nvml:
    """nvml: a module with pynvml's functions, or None for pynvml itself."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:
        return Nvml(type(error).__name__, str(error))
    try:
        newest = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        handles = [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
        names = tuple(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles)
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return Nvml("", "", driver, (newest // 1000, newest % 1000 // 10), names)
    except Exception as error:  # a driver that was updated while it ran answers half of the questions
        return Nvml(type(error).__name__, str(error))
    finally:
        with suppress(Exception):
            nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def driver(world: World) -> Iterator[Finding]:
    found = read_nvml(world.nvml)
    if found.error in ("ImportError", "ModuleNotFoundError"):
        yield warning("driver", "nvml_missing")
    elif found.error in _NO_DRIVER:
        there = has_nvidia_card(world.pci)
        yield (warning if there else ok)("driver", "driver_missing" if there else "driver_none")
    elif found.error:
        yield warning("driver", "driver_refuses", error=found.words)
    else:
        yield ok("driver", "driver_fine", driver=found.driver, cuda=_dotted(found.cuda))


def has_nvidia_card(devices: Path) -> bool:
    """Whether Linux lists a card, with or without a driver."""
    for device in devices.iterdir() if devices.is_dir() else ():
        with suppress(OSError):
            if (device / "vendor").read_text().strip() == _NVIDIA:
                kind = (device / "class").read_text()
                if kind.startswith(_DISPLAY):
                    return True
    return False


def cuda(world: World) -> Iterator[Finding]:
    """Whether torch can use the card, and if not, why not."""
    report, card = world.torch(), read_nvml(world.nvml)
    if "version" not in report.facts:
        return
    if report.doing == "cuda":
        how = "cuda_hangs" if report.ending == "time" else "cuda_crashes"
        yield problem("cuda", how, ending=report.ending)
    elif report.facts.get("visible"):
        yield from _cards(report)
    elif not card.cards:
        yield from _without_card(world)
    elif not report.facts.get("build"):
        yield warning("cuda", "cuda_cpu_build", card=card.cards[0], version=report.facts["version"])
    elif world.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        yield warning("cuda", "cuda_hidden", card=card.cards[0])
    elif card.cuda < _numbers(report.facts["build"]):
        versions = {"driver": card.driver, "runs": _dotted(card.cuda), "needs": report.facts["build"]}
        yield problem("cuda", "cuda_driver_old", card=card.cards[0], **versions)
    else:
        yield problem("cuda", "cuda_fails", card=card.cards[0], words=report.facts.get("words") or "?")


def _without_card(world: World) -> Iterator[Finding]:
    wish = world.settings.device
    if wish.startswith("cuda") or wish == "mixed":
        yield problem("cuda", "cuda_wished", device=wish)
    else:
        yield ok("cuda", "cuda_none")


def _cards(report: Report) -> Iterator[Finding]:
    for number, card in enumerate(report.facts.get("cards", [])):
        capability = _dotted(card["capability"])
        about: dict[str, Any] = {"card": card["name"], "number": number, "capability": capability}
        if not runs_on(card["capability"], report.facts["architectures"]):
            yield problem("cuda", "cuda_architecture", version=report.facts["version"], **about)
        elif "error" in card:
            yield problem("cuda", "cuda_fails", card=card["name"], words=card["error"])
        else:
            yield ok("cuda", "cuda_fine", free=gb(card["free"]), total=gb(card["total"]), **about)


def runs_on(capability: Sequence[int], architectures: Sequence[str]) -> bool:
    """Whether a torch made for these ("sm_86", "compute_90") runs on a card of that compute capability.

    Machine code runs on cards of the same major version and at least the same minor one; PTX ("compute_") on
    every later card. Nothing known counts as yes.
    """
    major, minor = capability
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = "".join(filter(str.isdigit, number))
        built = int(digits[:-1] or 0), int(digits[-1:] or 0)
        if kind == "compute" and built <= (major, minor):
            return True
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
    return not architectures


def cpu(world: World) -> Iterator[Finding]:
    facts = world.torch().facts
    if "features" not in facts:
        return
    from glmui.engine.device import count_physical_cores

    features = ", ".join(facts["features"]) or facts["machine"]
    values: dict[str, Any] = {"cpu": facts["cpu"] or "CPU", "cores": count_physical_cores()}
    if facts["machine"] in ("x86_64", "AMD64") and "avx2" not in facts["features"]:
        yield warning("cpu", "cpu_old", **values)
    else:
        yield ok("cpu", "cpu_fine", features=features, **values)


def compiler(world: World) -> Iterator[Finding]:
    """What the kernels would be built with. gcc is not used on Windows: see quant/kernels/cpu/build.py."""
    names = ("clang",) if world.platform == "win32" else ("cc", "gcc", "clang")
    path = world.environ.get("PATH", "")
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if found is None and importlib.util.find_spec("ziglang"):
        found = "ziglang"
    yield ok("compiler", "compiler_fine", path=found) if found else warning("compiler", "compiler_missing")


def kernels(world: World) -> Iterator[Finding]:
    """Which kernels compute quantised layers on the CPU, and why none do."""
    report = world.torch()
    facts = report.facts
    if report.doing == "kernels":
        how = "kernels_slow" if report.ending == "time" else "kernels_crash"
        yield warning("kernels", how, ending=report.ending)
    elif "kernel" not in facts:
        return
    elif facts["kernel"] != "torch":
        yield ok("kernels", "kernels_fine", kernel=facts["kernel"])
    else:
        folder, said = Path(facts["folder"]), facts["said"].strip()
        key = str(facts["reason"]).removeprefix("reasons.")
        broken = folder.is_dir() and key in ("kernels_wrong", "kernels_not_built")
        mend = _removal(folder) if broken else None  # they are built again when needed
        yield warning("kernels", key, mend, said=f"\n{said}" if said else "", folder=folder)


def card_kernels(world: World) -> Iterator[Finding]:
    """Which kernels compute on each card, and why none do, or not all."""
    report = world.torch()
    if report.doing == "card_kernels":
        how = "card_kernels_slow" if report.ending == "time" else "card_kernels_crash"
        yield warning("card_kernels", how, ending=report.ending)
    for found in report.facts.get("card_kernels", ()):
        folder, said = Path(found["folder"]), found["said"].strip()
        key = str(found["reason"]).removeprefix("reasons.")
        about = {"card": found["card"], "kernel": found["kernel"], "folder": folder}
        if key == "card_kernels":
            yield ok("card_kernels", "card_kernels_fine", **about)
        else:
            mend = _removal(folder) if key in _MADE_ANEW and folder.is_dir() else None
            yield warning("card_kernels", key, mend, said=f"\n{said}" if said else "", **about)


def _removal(folder: Path) -> Mend:
    return lambda: shutil.rmtree(folder)


def _numbers(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor or 0)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
