"""What the checks look at. A fact that cannot be brought about is a field, so that a test can say it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmui.doctor.ask import HOME, Report, ask
from glmui.errors import GlmuiError, InvalidInput
from glmui.settings import Settings, load
from glmui.types import EngineInfo

if TYPE_CHECKING:
    from glmui.meter import Reading

# The module of each distribution, where the names differ. cpm_kernels may fail to import and be of use (its
# parts are taken one by one), and torch has a process of its own.
_MODULES = {"nvidia-ml-py": "pynvml", "pydantic-settings": "pydantic_settings"}
_NOT_IMPORTED = ("torch", "cpm_kernels")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    total: int
    available: int
    swap_free: int


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> Memory:
    import psutil

    now, swap = psutil.virtual_memory(), psutil.swap_memory()
    return Memory(now.total, now.available, swap.free)


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder, which may be still to be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def filesystem_of(folder: Path) -> str:
    """The type of the file system a folder is on ("ext4", "nfs4", "remote" on Windows), "" where unknown."""
    import psutil

    best, kind = -1, ""
    for part in psutil.disk_partitions(all=True):
        with contextlib.suppress(ValueError):
            folder.relative_to(part.mountpoint)
            if len(part.mountpoint) >= best:
                best, kind = len(part.mountpoint), "remote" if "remote" in part.opts else part.fstype
    return kind


def terminal_encoding() -> str:
    return (getattr(sys.stdout, "encoding", "") or "") if sys.stdout is not None else ""


def is_separate() -> bool:
    """Whether this Python's packages are glmui's own: a virtual environment, or one of conda's."""
    return sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ


@dataclass(frozen=True)
class World:
    """Everything is as it is on this machine, unless it is said.

    settings_error: why the settings could not be read; `settings` are the defaults then. verify: read the
    model's files through. home: the folder of requirements.txt. torch, packages: what the processes found
    that import them. engine: what a meter read of our own engine process, which ends before another model is
    loaded; None where there is none. loaded: what that process says of itself.
    nvml: a module with pynvml's functions; pynvml itself when None. pci: where Linux lists devices.
    """

    settings: Settings
    settings_error: GlmuiError | None = None
    verify: bool = False
    home: Path = HOME
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    platform: str = sys.platform
    python: tuple[int, int, int] = sys.version_info[:3]
    bits: int = 64 if sys.maxsize > 2**32 else 32
    separate: bool = field(default_factory=is_separate)
    now: float = field(default_factory=time.time)
    encoding: str = field(default_factory=terminal_encoding)
    version_of: Callable[[str], str | None] = version_of
    torch: Callable[[], Report] = lambda: ask("glmui.engine.torch_facts")
    packages: Callable[[], Report] = lambda: ask("glmui.doctor.imports")
    engine: Reading | None = None
    loaded: EngineInfo = field(default_factory=EngineInfo)
    nvml: Any = None
    pci: Path = Path("/sys/bus/pci/devices")
    memory: Callable[[], Memory] = memory
    free_bytes: Callable[[Path], int] = free_bytes
    filesystem_of: Callable[[Path], str] = filesystem_of

    @property
    def data_dir(self) -> Path:
        return self.settings.data_dir

    @property
    def pins(self) -> dict[str, str]:
        """{distribution: version} of requirements.txt; {} where glmui came without it."""
        try:
            lines = (self.home / "requirements.txt").read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        pairs = [line.split("#")[0].strip().partition("==") for line in lines]
        return {name: version for name, found, version in pairs if found}


def this_machine(
    settings: Settings,
    error: GlmuiError | None = None,
    verify: bool = False,
    encoding: str | None = None,
    engine: Reading | None = None,
    loaded: EngineInfo | None = None,
) -> World:
    """The world as it is. Both processes are started now, and waited for by who asks first.

    encoding: of the terminal, where it is another than this program's; "" where nobody looks at one.
    engine, loaded: see World.
    """
    pool = ThreadPoolExecutor(2, thread_name_prefix="doctor")
    world = World(settings, error, verify, encoding=terminal_encoding() if encoding is None else encoding)
    here = [name for name in world.pins if name not in _NOT_IMPORTED and world.version_of(name)]
    modules = [_MODULES.get(name, name) for name in here]
    torch = pool.submit(ask, "glmui.engine.torch_facts")
    packages = pool.submit(ask, "glmui.doctor.imports", *modules)
    pool.shutdown(wait=False)
    return replace(
        world, engine=engine, loaded=loaded or EngineInfo(), torch=torch.result, packages=packages.result
    )


def read_settings(flags: Mapping[str, Any]) -> tuple[Settings, GlmuiError | None]:
    """The settings, or the defaults and why they could not be read."""
    try:
        return load(**flags), None
    except InvalidInput as error:
        given = {name: value for name, value in flags.items() if value is not None}
        folder = given.get("data_dir") or os.environ.get("GLMUI_DATA_DIR")
        default: Path = Settings.model_fields["data_dir"].default
        data_dir = Path(folder).expanduser().absolute() if folder else default
        return Settings.model_construct(**{**given, "data_dir": data_dir}), error
