"""The way to a card's driver without a card: a driver in C that writes down what it is asked."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmui.quant.kernels.cpu.build import compilers
from glmui.quant.kernels.cuda import driver
from glmui.quant.kernels.cuda.driver import Card, Driver, DriverError, LoadedModule
from tests.fake_card import FakeCard

# The driver's functions as cuda.h declares them. `started` is what the last start of a kernel brought: its
# numbers, and its arguments read as those of a kernel (T *, int, float).
DRIVER = """
#include <string.h>
typedef void *handle;
struct {
    int grid[3], block[3], shared, integer, calls;
    float real;
    handle function, stream, pointer;
} started;
int failing[4]; /* statuses of load, function and launch, and how often a launch fails */
int loaded;
char image[8];
void reset(void) {
    memset(&started, 0, sizeof started), memset(failing, 0, sizeof failing), loaded = 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleLoadData(handle *module, const void *data) {
    memcpy(image, data, sizeof image);
    *module = (handle)(size_t)(100 + loaded++);
    return failing[0];
}
int cuModuleUnload(handle module) { return 0; }
int cuModuleGetFunction(handle *function, handle module, const char *name) {
    const int at_home = (size_t)module == 100 ? !strcmp(name, "first") : !strcmp(name, "second");
    *function = (handle)((size_t)module + 1000);
    return failing[1] ? failing[1] : at_home ? 0 : 500;
}
int cuLaunchKernel(handle f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, handle stream, void **parameters, void **extra) {
    const int all[] = {x, y, z, bx, by, bz};
    memcpy(started.grid, all, sizeof all);
    started.shared = shared, started.function = f, started.stream = stream, started.calls++;
    memcpy(&started.pointer, parameters[0], sizeof(handle));
    memcpy(&started.integer, parameters[1], sizeof(int));
    memcpy(&started.real, parameters[2], sizeof(float));
    if (extra) return 1;
    return failing[3] && failing[3]-- ? failing[2] : 0;
}
int cuGetErrorString(int error, const char **words) {
    *words = error == 500 ? "named symbol not found" : error == 999 ? 0 : "invalid device context";
    return error == 999;
}
int cuGetErrorName(int error, const char **words) { return cuGetErrorString(error, words); }
int cuCtxGetCurrent(handle *context) { *context = 0; return 0; }
"""


class Started(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int * 3), ("block", ctypes.c_int * 3), ("shared", ctypes.c_int),
        ("integer", ctypes.c_int), ("calls", ctypes.c_int), ("real", ctypes.c_float),
        ("function", ctypes.c_void_p), ("stream", ctypes.c_void_p), ("pointer", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver as CUDA_PATH/lib64/libcuda.so."""
    if sys.platform != "linux":
        pytest.skip("the fake driver is a library for Linux")
    folder = tmp_path_factory.mktemp("cuda") / "lib64"
    folder.mkdir()
    (folder / "driver.c").write_text(DRIVER)
    for compiler in compilers():
        command = [*compiler.command, "-shared", "-fPIC", "-w", "-o", "libcuda.so", "driver.c"]
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0:
            return folder.parent
    pytest.skip("no C compiler on this machine")


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The fake driver, as it was before anything was asked of it, where cpm_kernels looks first."""
    monkeypatch.setenv("CUDA_PATH", str(built))
    for name in ("", ".cuda", ".base"):
        monkeypatch.delitem(sys.modules, f"{driver._BINDINGS}{name}", raising=False)
    opened = ctypes.CDLL(str(built / "lib64" / "libcuda.so"))
    opened.reset()
    return opened


def fail(library: ctypes.CDLL, load: int = 0, function: int = 0, launch: int = 0, times: int = 99) -> None:
    (ctypes.c_int * 4).in_dll(library, "failing")[:] = [load, function, launch, times]


def start(function: driver.Function, tensor: torch.Tensor) -> None:
    arguments = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int(-7), ctypes.c_float(0.25)
    function((70000, 2, 3), (128, 4, 1), 4096, arguments)


WAYS = {"cpm_kernels": driver.cpm_kernels_library, "torch": driver.torch_library}


@pytest.fixture(params=list(WAYS))
def module(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two images, loaded by either way."""
    opened = ctypes.CDLL(library._name)  # another object: cpm_kernels declares its own functions only
    monkeypatch.setattr("torch.cuda._utils._get_gpu_runtime_library", lambda: opened)
    return driver.load([b"\x7fELF\0\0\0\1", b"//PTX\0\0\2"], FakeCard(), {request.param: WAYS[request.param]})


def test_a_launch_reaches_the_driver_as_it_was_meant(module: LoadedModule, library: ctypes.CDLL) -> None:
    x, card = torch.zeros(3), module._card
    assert isinstance(card, FakeCard)
    before = card.entered
    start(module.function("second"), x)
    assert card.entered == before + 1
    got = Started.in_dll(library, "started")
    assert (*got.grid, *got.block, got.shared) == (70000, 2, 3, 128, 4, 1, 4096)
    assert (got.function, got.stream) == (1101, 0x7FFF_0000_1234)
    assert (got.pointer, got.integer, got.real, got.calls) == (x.data_ptr(), -7, 0.25, 1)


def test_each_image_is_loaded_whole_and_each_function_is_found_in_its_own(
    module: LoadedModule, library: ctypes.CDLL
) -> None:
    assert bytes((ctypes.c_char * 8).in_dll(library, "image")) == b"//PTX\0\0\2"
    for name, handle in (("first", 1100), ("second", 1101)):
        start(module.function(name), torch.zeros(3))
        assert Started.in_dll(library, "started").function == handle
    with pytest.raises(KeyError, match="third"):
        module.function("third")


def test_a_refusal_is_told_in_the_drivers_words(module: LoadedModule, library: ctypes.CDLL) -> None:
    function = module.function("first")
    for status, words in ((701, "invalid device context"), (999, "unknown")):
        fail(library, launch=status)
        with pytest.raises(DriverError, match=words) as caught:
            start(function, torch.zeros(3))
        assert caught.value.status == status
    fail(library, function=201)
    with pytest.raises(DriverError, match="invalid device context"):
        module.function("first")


def test_a_thread_that_never_used_the_card_is_brought_to_it(
    module: LoadedModule, library: ctypes.CDLL
) -> None:
    function, card = module.function("first"), module._card
    assert isinstance(card, FakeCard)
    before = card.awoken
    fail(library, launch=201, times=1)
    start(function, torch.zeros(3))
    assert (card.awoken - before, Started.in_dll(library, "started").calls) == (1, 2)
    fail(library, launch=201)
    with pytest.raises(DriverError):
        start(function, torch.zeros(3))


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch tells of two cards; the list's last one is torch's current card."""
    used = [0]

    @contextmanager
    def device(number: int) -> Iterator[None]:
        used.append(number)
        yield
        used.pop()

    monkeypatch.setattr("torch.cuda.current_device", lambda: used[-1])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda number: ((7, 5), (8, 6))[number])
    monkeypatch.setattr(
        "torch.cuda.current_stream", lambda number: SimpleNamespace(cuda_stream=1000 + number)
    )
    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr(driver, "_raw_stream", driver._public_stream)
    return used


def test_another_card_is_made_current_for_as_long_as_it_is_used(two_cards: list[int]) -> None:
    first, second = Card("cuda"), Card("cuda:1")
    assert [(card.device, card.name) for card in (first, second)] == [
        ("cuda:0", "sm_75"),
        ("cuda:1", "sm_86"),
    ]
    assert (first.stream(), second.stream()) == (1000, 1001)
    with first.current():
        assert two_cards == [0]
    with second.current():
        assert two_cards == [0, 1]
    assert two_cards == [0]


def test_cpm_kernels_goes_first_and_is_not_run_as_a_whole(library: ctypes.CDLL) -> None:
    loaded = driver.load([b"image..."], FakeCard())
    assert loaded.driver == "cpm_kernels"
    assert "cpm_kernels" not in sys.modules
    assert loaded._driver._library.cuLaunchKernel.argtypes  # those that cpm_kernels declares


@pytest.mark.parametrize(
    "trouble",
    ["raise RuntimeError('Unknown platform: darwin')", "import pkg_resources_of_old", "cuda = None", "1/0"],
)
def test_where_cpm_kernels_fails_torch_finds_the_driver(
    library: ctypes.CDLL, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cpm_kernels" / "library"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('this is not to be run')")
    (folder / "cuda.py").write_text(trouble + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda._utils._get_gpu_runtime_library", lambda: library)
    assert driver.load([b"image..."], FakeCard()).driver == "torch"


def test_where_the_first_way_cannot_load_the_second_is_gone(library: ctypes.CDLL) -> None:
    broken = Driver(library)
    fail(library, load=209)
    with pytest.raises(DriverError, match="a: invalid device context; b: no cuLaunchKernel"):
        driver.load([b"image..."], FakeCard(), {"a": lambda: library, "b": object})
    with pytest.raises(DriverError) as caught:
        broken.load(b"image...")
    assert caught.value.status == 209


def test_a_torch_without_a_way_to_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_get_gpu_runtime_library", "_get_cuda_library"):
        monkeypatch.delattr(f"torch.cuda._utils.{name}", raising=False)
    with pytest.raises(DriverError, match="shows no way"):
        driver.torch_library()


def test_without_any_driver_both_ways_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_library() -> ctypes.CDLL:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("torch.cuda._utils._get_gpu_runtime_library", no_library)
    monkeypatch.setitem(sys.modules, "cpm_kernels", None)
    with pytest.raises(DriverError, match=r"cpm_kernels: .*torch: OSError: libcuda"):
        driver.load([b"image..."], FakeCard())
