"""Settings: defaults < settings file < environment (GLMUI_PORT …) < command-line flags.

The file is settings.toml in the data folder. What the page changes is written back there, everything else in
the file left as the user wrote it.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from glmui import i18n
from glmui.errors import InvalidInput, StoreError
from glmui.types import EngineSpec

PACKED = "packed"  # in the data folder: weights in the CPU kernels' order, see engine/packed.py
NO_EXTRAS = {"prefix": "", "adapter": ""}  # what belongs to one model, and goes with it
DEVICE_PATTERN = re.compile(r"auto|cpu|cuda(:\d+)?|mps|mixed")


class Settings(BaseSettings):
    """Everything that can be set. Units stand in the names; docs/settings.md tells each."""

    model_config = SettingsConfigDict(env_prefix="GLMUI_", extra="ignore", validate_assignment=True)

    host: str = "127.0.0.1"
    port: int | None = Field(None, ge=1, le=65535)  # None: 7860, or the next free one
    browser: bool = True
    data_dir: Path = Path(platformdirs.user_data_dir("glmui", appauthor=False))
    model: str = ""  # "" until one is chosen; else "starter", a name in the data folder, or a folder
    device: str = "auto"
    threads: int | None = Field(None, ge=1, le=1024)  # None: the physical cores
    quantize: Literal["none", "int8", "int4"] = "none"  # weights of a transformers model, once loaded
    cpu_precision: Literal["exact", "balanced", "fast"] = "balanced"  # see docs/kernels.md
    head_bits: Literal[16, 8] = 16  # of ChatGLM's output head
    kv_cache: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"  # of ChatGLM
    layers_on_gpu: int | None = Field(None, ge=0, le=1000)  # of ChatGLM with "mixed"; None: as many as fit
    context: int = Field(2048, ge=64, le=32768)  # tokens that memory is planned for
    vram_reserve_gb: float = Field(1.0 if sys.platform == "win32" else 0.5, ge=0, le=1000)  # left to others
    chatglm_family: Literal["", "chatglm2", "chatglm3"] = ""  # of a folder whose files fit both
    prefix: str = ""  # folder of a P-Tuning v2 prefix for ChatGLM
    adapter: str = ""  # folder of a LoRA adapter for ChatGLM
    starter: bool = False  # fetch the starter model at start if it is not there
    idle_minutes: float = Field(30, ge=0, le=525_600)  # 0: never end an idle engine
    language: Literal["", "en", "zh"] = ""  # "": the browser's
    stop_repetition: bool = True  # end a reply that says the same thing over and over
    model_sources: str = "huggingface, modelscope"  # where models are fetched from, in this order
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not DEVICE_PATTERN.fullmatch(value):
            raise ValueError(value)
        return value

    @field_validator("prefix", "adapter")
    @classmethod
    def _folder(cls, value: str) -> str:
        value = value.strip().strip('"')
        return str(Path(value).expanduser().absolute()) if value else ""

    @field_validator("model_sources")
    @classmethod
    def _known_sources(cls, value: str) -> str:
        entries = [entry.strip() for entry in value.split(",") if entry.strip()]
        if not entries or not all(_is_source(entry) for entry in entries):
            raise ValueError(value)
        return value

    @field_validator("idle_minutes", mode="before")
    @classmethod
    def _never(cls, value: Any) -> Any:
        return 0 if value is None else value

    @field_validator("head_bits", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and the file both come through `load`; only the environment is a source of its own."""
        return init_settings, env_settings


def _is_source(entry: str) -> bool:
    """A hub's name, a mirror's address, or a folder."""
    if "://" in entry:
        return re.fullmatch(r"https?://[^/@\s]+(/\S*)?", entry) is not None
    return entry in ("huggingface", "modelscope") or Path(entry).expanduser().is_absolute()


def spec_of(settings: Settings, model: str, folder: Path | str) -> EngineSpec:
    """What an engine is to hold, for a model that was found in `folder`."""
    return EngineSpec(
        model=model,
        folder=str(folder),
        device=settings.device,
        threads=settings.threads,
        quantize=settings.quantize,
        cpu_precision=settings.cpu_precision,
        head_bits=settings.head_bits,
        kv_cache=settings.kv_cache,
        layers_on_gpu=settings.layers_on_gpu,
        context=settings.context,
        vram_reserve=int(settings.vram_reserve_gb * 1e9),
        chatglm_family=settings.chatglm_family,
        packed_dir=str(settings.data_dir / PACKED),
        stop_repetition=settings.stop_repetition,
        prefix=settings.prefix,
        adapter=settings.adapter,
    )


def load(**flags: Any) -> Settings:
    """Settings from all four places. `flags` that are None were not given.

    Raises InvalidInput naming the setting, what it may be and where it was given.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    folder = _checked(lambda: Settings(**_only(given, "data_dir")), given).data_dir
    from_file = _read_file(folder / "settings.toml")
    if (model := given.get("model") or os.environ.get("GLMUI_MODEL")) and not _is_same(model, from_file):
        from_file = {k: v for k, v in from_file.items() if k not in NO_EXTRAS}  # they belong to its model
    below_environment = {k: v for k, v in from_file.items() if f"GLMUI_{k.upper()}" not in os.environ}
    return _checked(lambda: Settings(**{**below_environment, **given}), given)


def _is_same(model: str, values: dict[str, Any]) -> bool:
    """Whether these settings name that model."""
    return values.get("model") in (model, str(Path(model).expanduser().absolute()))


def _only(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: values[name]} if name in values else {}


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput("bad_settings_file", file=file, detail=error) from error
    if unknown := sorted(set(values) - set(Settings.model_fields)):
        raise InvalidInput("bad_settings_file", file=file, detail=f"unknown setting {', '.join(unknown)}")
    return values


def _checked(build: Callable[[], Settings], flags: Iterable[str] = (), page: Iterable[str] = ()) -> Settings:
    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        where: str | Callable[[str], str]
        if name in page:
            where = partial(i18n.text, key="settings.sidebar")
        elif name in flags:
            where = f"--{name.replace('_', '-')}"
        elif f"GLMUI_{name.upper()}" in os.environ:
            where = f"GLMUI_{name.upper()}"
        else:
            where = "settings.toml"
        raise InvalidInput(f"bad_setting.{name}", value=first["input"], where=where) from error


def check(settings: Settings, **changes: Any) -> Settings:
    """The settings with `changes` of the page. Raises InvalidInput."""
    return _checked(lambda: Settings(**{**settings.model_dump(), **changes}), page=changes)


def save(settings: Settings, **changes: Any) -> Settings:
    """Check `changes`, write them into the settings file and return the new settings.

    Comments and other entries of the file stay. Raises InvalidInput or StoreError.
    """
    import tomlkit  # lazily: most commands never write
    from tomlkit.exceptions import ParseError

    changed = check(settings, **changes)
    file = settings.data_dir / "settings.toml"
    try:
        document = tomlkit.parse(file.read_text(encoding="utf-8-sig") if file.exists() else "")
        for name, value in changes.items():
            if value is None:
                document.pop(name, None)
            else:
                document[name] = str(value) if isinstance(value, Path) else value
        draft = file.with_suffix(".toml.new")
        draft.write_text(tomlkit.dumps(document), encoding="utf-8")
        draft.replace(file)
    except (ParseError, UnicodeDecodeError) as error:
        raise InvalidInput("bad_settings_file", file=file, detail=error) from error
    except OSError as error:
        raise StoreError("data_folder_unwritable", folder=settings.data_dir, detail=error) from error
    return changed


def make_data_folder(folder: Path) -> None:
    """Create the data folder for this account alone (0700). Raises StoreError when it cannot be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError("data_folder_unwritable", folder=folder, detail=error.strerror or error) from error
