"""A quantised ChatGLM with the C kernels in its layers: packed once, from then on mapped as it was packed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from glmui import __version__
from glmui.engine import packed
from glmui.engine.loaded import kernels_for
from glmui.glm.checkpoint import AnyModel, Place
from glmui.quant.fast import KernelLinear, is_computable, is_half_head, pack_head, pack_layer, use_kernels
from glmui.quant.kernels.cpu import Kernels, Loaded
from glmui.quant.linear import QuantizedLinear
from glmui.quant.packed_file import NotUsable, PackedLayer, read, room_for, write
from glmui.types import EngineSpec, Progress

OnProgress = Callable[[Progress], None]
OnPart = Callable[[float], None]  # told the part done, 0..1
Layers = Iterable[tuple[str, PackedLayer]]

_HEAD = "head8"
_log = logging.getLogger(__name__)


class Load(Protocol):
    """checkpoint.load_model, all but these settled."""

    def __call__(self, *, on_progress: OnPart, ready: Mapping[str, nn.Module] | None = None) -> AnyModel: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model, its kernels where it has any, and a key of the locales' "reasons" where packed weights could
    not be kept."""

    model: AnyModel
    kernels: Loaded | None = None
    reason: str = ""


def open_prepared(
    load: Load,
    spec: EngineSpec,
    device: str,
    place: Place,
    bits: int,
    threads: int,
    on_progress: OnProgress,
) -> Prepared:
    """The spec's model.

    device, place: where it goes, as a Placement has it. bits: of its weights once loaded, 0 for floats, which
    need no kernels. Raises what `load` raises.
    """

    def loading(part: float) -> None:
        on_progress(Progress("loading", part))

    loaded = kernels_for(device, threads, spec.kernel_dir) if bits else None
    if loaded is None or loaded.kernels is None:
        return Prepared(load(on_progress=loading), loaded)
    reason = ""
    model: AnyModel | None = None
    if spec.packed_dir:
        try:
            model = _Shelf(spec, loaded.kernels, place, on_progress).open(load, f"int{bits}")
        except OSError as error:
            _log.warning("packed weights are not kept: %s", error)
            reason = "reasons.packed_not_kept"
    model = model or load(on_progress=loading)  # packed in memory alone
    use_kernels(model, loaded.kernels, spec.cpu_precision, spec.head_bits)
    return Prepared(model, loaded, reason)


class _Shelf:
    """The packed files of one checkpoint. Whatever cannot be read or written there is an OSError."""

    def __init__(self, spec: EngineSpec, kernels: Kernels, place: Place, on_progress: OnProgress) -> None:
        self._spec, self._kernels, self._place, self._on_progress = spec, kernels, place, on_progress
        self._folder = packed.folder_for(Path(spec.packed_dir), Path(spec.folder))
        self._made_of = f"{__version__} {self._folder.name} {order_of(kernels)}"

    def open(self, load: Load, form: str) -> AnyModel | None:
        """The model, its layers on the CPU out of the file of that form; made first where there is none, or
        one of fewer layers. Where somebody waits it is not: writing takes longer than everything else
        together. None where there is nothing to open then."""
        model = self._from_file(load, form)
        if model is None and self._spec.hasty:
            return None
        model = model or self._made(load, form)
        head = model.get_submodule(model.HEAD)
        if self._spec.head_bits == 8 and is_half_head(head, model.HEAD):
            heads = self._read(_HEAD)
            if heads is None and not self._spec.hasty:
                heads = self._make_head(model.HEAD, head)
            if heads is not None:
                model.set_submodule(model.HEAD, heads[model.HEAD])
        return model

    def _from_file(self, load: Load, form: str) -> AnyModel | None:
        """None where there is no such file, or more layers were on cards when it was made."""
        if (layers := self._read(form, self._loading)) is None:
            return None
        model = load(on_progress=lambda part: None, ready=layers)
        return model if self._spec.hasty or not _unpacked(model) else None

    def _made(self, load: Load, form: str) -> AnyModel:
        """Make the file; an OSError midway leaves a model of no use: its layers are let go in turn."""
        model = load(on_progress=self._loading)
        if not (wanted := _unpacked(model)):
            return model  # all is on cards
        names = {*wanted}
        need = sum(map(_room_of, wanted.values()))

        def pack() -> Layers:
            total, done = len(wanted), 0
            while wanted:
                name = next(iter(wanted))
                layer = wanted.pop(name)
                model.set_submodule(name, nn.Identity())
                yield name, pack_layer(layer, self._kernels)
                done += 1
                self._packing(done / total)

        kept = self._keep(form, need, pack())
        if names - kept.keys():
            raise OSError("another process keeps fewer layers there")
        for name in names:
            model.set_submodule(name, kept[name])
        return model

    def _make_head(self, name: str, head: nn.Linear) -> dict[str, KernelLinear]:
        need = room_for(head.out_features, head.in_features, 8)
        return self._keep(_HEAD, need, ((name, pack_head(each, self._kernels)) for each in (head,)))

    def _keep(self, form: str, need: int, layers: Layers) -> dict[str, KernelLinear]:
        packed.tidy(self._folder.parent)
        packed.check_room(self._folder, need)
        file = self._file(form)
        self._packing(0.0)
        try:
            write(file, f"{self._made_of} {form}", layers)
        except PermissionError:  # on Windows while another process, which made the same, has it open
            _log.info("packed weights are in use and not replaced: %s", file)
        if (kept := self._read(form)) is None:
            raise OSError(f"{file} cannot be read back")
        return kept

    def _read(self, form: str, on_part: OnPart = lambda part: None) -> dict[str, KernelLinear] | None:
        """The layers of a file that go to the CPU, or None where it is not there or not to be trusted."""
        file, made_of = self._file(form), f"{self._made_of} {form}"
        try:
            layers = read(file, made_of, self._kernels.threads, on_part, self._is_here)
        except NotUsable as error:
            _log.info("no packed weights: %s", error)
            return None
        numerics = self._spec.cpu_precision
        return {name: KernelLinear.of(layer, self._kernels, numerics) for name, layer in layers.items()}

    def _is_here(self, name: str) -> bool:
        """Whether the kernels may compute the layer where it goes."""
        return self._place(f"{name}.weight") == (torch.device("cpu"), torch.float32)

    def _file(self, form: str) -> Path:
        return self._folder / f"{form}.packed"

    def _loading(self, part: float) -> None:
        self._on_progress(Progress("loading", part))

    def _packing(self, part: float) -> None:
        self._on_progress(Progress("packing", part))


def _unpacked(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers that the kernels compute and have not in their order yet, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear) and is_computable(layer)
    }


def _room_of(layer: QuantizedLinear) -> int:
    groups = layer.weight_scale.shape[1] if layer.weight_scale.dim() == 2 else 1
    return room_for(layer.out_features, layer.in_features, layer.weight_bit_width, groups)


def order_of(kernels: Kernels) -> str:
    """A name for the order these kernels pack in: what they make of two small matrices."""
    made = hashlib.sha256()
    for bits in (4, 8):
        stored = (torch.arange(72 * 544) % 251 - 125).to(torch.int8).view(72, 544)[:, : 544 * bits // 8]
        layer = kernels.pack(stored.contiguous(), torch.arange(72 * 17.0).view(72, 17), bits, 544)
        made.update(layer.weight.numpy().tobytes())
        made.update(layer.scale.numpy().tobytes())
    return made.hexdigest()[:16]
