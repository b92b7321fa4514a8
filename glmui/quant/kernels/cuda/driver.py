"""Loading compiled kernels on a card and starting them there, by the CUDA driver's own interface.

Two ways lead to the driver's library: cpm_kernels' bindings, and the copy that torch opens for itself. Both
have the driver's functions as attributes, so all that follows is the same for both.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Protocol

import torch

_log = logging.getLogger(__name__)
_BINDINGS = "_glmui_cpm_kernels_library"  # the name under which a part of cpm_kernels is imported
_NOT_FOUND, _NO_CONTEXT = 500, 201  # the driver's words: no such function; this thread never used the card

Size = tuple[int, int, int]
# A kernel's arguments in its order: c_void_p for a tensor, c_int, c_float …
Arguments = Sequence["ctypes._SimpleCData[Any]"]


class Function(Protocol):
    """One kernel on one card."""

    def __call__(self, grid: Size, block: Size, shared: int, arguments: Arguments) -> None:
        """Start it on torch's current stream of its card.

        shared: bytes of dynamic shared memory, at most 48 KB. The arguments are read before this returns.
        Raises DriverError where the driver refuses; a fault in the kernel itself shows later, in torch.
        """


class Module(Protocol):
    """The kernels of some images, loaded on one card."""

    def function(self, name: str) -> Function:
        """Raises KeyError where no image has one of this name."""


class DriverError(Exception):
    """The driver refused, or there is no way to it. status: the driver's number, 0 where it was not asked."""

    def __init__(self, words: str, status: int = 0) -> None:
        super().__init__(words)
        self.status = status


class Card:
    """What is needed of torch to be on one card. capability: its compute capability; name: that as "sm_86".

    Raises RuntimeError or AssertionError where torch has no such card.
    """

    def __init__(self, device: str) -> None:
        index = torch.device(device).index
        self.number = torch.cuda.current_device() if index is None else index
        self.device = f"cuda:{self.number}"
        self.capability: tuple[int, int] = torch.cuda.get_device_capability(self.number)

    @property
    def name(self) -> str:
        return "sm_{}{}".format(*self.capability)

    def stream(self) -> int:
        """torch's current stream there, by the short way where there is one: every start of a kernel asks."""
        return _raw_stream(self.number)

    def current(self) -> AbstractContextManager[object]:
        """Within it, what is started runs on this card."""
        if torch.cuda.current_device() == self.number:
            return nullcontext()
        return torch.cuda.device(self.number)

    def wake(self) -> None:
        """Have torch open the card's context for the calling thread, as its first work there does."""
        torch.zeros(1, device=self.device)


def _public_stream(number: int) -> int:
    return int(torch.cuda.current_stream(number).cuda_stream)


_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


def cpm_kernels_library() -> Any:
    """The driver as bound by cpm_kernels.library. Raises DriverError.

    The package itself cannot be imported everywhere, for it looks for libraries nobody here needs; so its
    folder `library` stands in as a package of our own, of which only cuda.py and base.py are run.
    """
    try:
        if _BINDINGS not in sys.modules:
            spec = importlib.util.find_spec("cpm_kernels")
            part = ModuleSpec(_BINDINGS, None, is_package=True)
            places = (spec and spec.submodule_search_locations) or ()
            part.submodule_search_locations = [str(Path(place) / "library") for place in places]
            sys.modules[_BINDINGS] = importlib.util.module_from_spec(part)
        return importlib.import_module(f"{_BINDINGS}.cuda").cuda
    except Exception as error:  # it does much at import, and was made in 2022
        raise DriverError(f"{type(error).__name__}: {error}") from error


def torch_library() -> Any:
    """The driver as torch opens it for its own run-time compilation. Raises DriverError."""
    try:
        utilities = importlib.import_module("torch.cuda._utils")  # not public: any version may do without
        for name in ("_get_gpu_runtime_library", "_get_cuda_library"):
            if opened := getattr(utilities, name, None):
                return opened()
        raise DriverError(f"torch {torch.__version__} shows no way")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise DriverError(f"{type(error).__name__}: {error}") from error


class Driver:
    """The driver's functions. library: has them as attributes, as C functions of ctypes that return a status.

    Every argument is of its C type already, for only cpm_kernels has declared them.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.launch: Callable[..., int] = self._get("cuLaunchKernel")

    def load(self, image: bytes) -> ctypes.c_void_p:
        """A module in the current context. image: a cubin, or PTX that ends with a zero."""
        module = ctypes.c_void_p()
        self.check(self._get("cuModuleLoadData")(ctypes.byref(module), image))
        return module

    def function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p | None:
        """None where the module has none of this name."""
        function = ctypes.c_void_p()
        status = self._get("cuModuleGetFunction")(ctypes.byref(function), module, name.encode("ascii"))
        if status == _NOT_FOUND:
            return None
        self.check(status)
        return function

    def check(self, status: int) -> None:
        """Raises DriverError in the driver's words unless all is well."""
        if status:
            words = ctypes.c_char_p()
            self._get("cuGetErrorString")(status, ctypes.byref(words))
            raise DriverError((words.value or b"unknown").decode("utf-8", "replace"), status)

    def _get(self, name: str) -> Callable[..., int]:
        try:
            function: Callable[..., int] = getattr(self._library, name)
        except AttributeError as error:  # no library was found, or it is none of the driver's
            raise DriverError(f"no {name}") from error
        return function


DRIVERS: Mapping[str, Callable[[], Any]] = {"cpm_kernels": cpm_kernels_library, "torch": torch_library}


def load(
    images: Sequence[bytes], card: Card, drivers: Mapping[str, Callable[[], Any]] = DRIVERS
) -> LoadedModule:
    """The images' kernels on the card, by the first way to the driver that does it. Raises DriverError."""
    told = []
    for name, library in drivers.items():
        try:
            return LoadedModule(name, Driver(library()), card, images)
        except DriverError as error:
            _log.debug("kernels through %s: %s", name, error)
            told.append(f"{name}: {error}")
    raise DriverError("; ".join(told))


class LoadedModule:
    """See Module. driver: the way it was loaded. What was loaded stays on the card until the process ends."""

    def __init__(self, name: str, driver: Driver, card: Card, images: Sequence[bytes]) -> None:
        self.driver = name
        self._driver, self._card = driver, card
        with card.current():
            card.wake()
            self._modules = [driver.load(image) for image in images]

    def function(self, name: str) -> Function:
        """See Module. Raises DriverError where the driver fails otherwise."""
        for module in self._modules:
            if found := self._driver.function(module, name):
                return LoadedFunction(self._driver, self._card, found)
        raise KeyError(name)


class LoadedFunction:
    """See Function. Without a CUDA graph some hundred are started for every token, so this does little."""

    def __init__(self, driver: Driver, card: Card, function: ctypes.c_void_p) -> None:
        self._driver, self._card, self._function = driver, card, function

    def __call__(self, grid: Size, block: Size, shared: int, arguments: Arguments) -> None:
        """See Function."""
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with self._card.current():
            status = self._start(grid, block, shared, addresses)
            if status == _NO_CONTEXT:  # a thread in which torch has not used the card yet
                self._card.wake()
                status = self._start(grid, block, shared, addresses)
        self._driver.check(status)

    def _start(self, grid: Size, block: Size, shared: int, addresses: ctypes.Array[ctypes.c_void_p]) -> int:
        """The arguments are read before this returns; the kernel itself may start later."""
        stream = ctypes.c_void_p(self._card.stream())
        return self._driver.launch(self._function, *grid, *block, shared, stream, addresses, None)
