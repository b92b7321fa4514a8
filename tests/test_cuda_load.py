"""Which kernels of a card are used: only those that are right, and if none, why; on an emulated card."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from glmui.quant.kernels import cuda
from glmui.quant.kernels.cuda import BlockKernels, CardKernels, Loaded, driver, load, load_on
from glmui.quant.kernels.cuda.check import block_is_right, linear_is_right
from glmui.quant.kernels.cuda.compile import Compiler, NotCompiled
from glmui.quant.kernels.cuda.driver import DriverError
from tests.emulated_card import SOURCES, EmulatedModule, _library
from tests.fake_card import FakeCard
from tests.scripted_nvrtc import Scripted


class Tampered:
    """The emulated card's kernels, but for those named in `instead`. It remembers what it was asked for."""

    def __init__(self, instead: dict[str, Callable[..., None]] | None = None) -> None:
        self._module, self._instead = EmulatedModule(), instead or {}
        self.asked: list[str] = []

    def function(self, name: str) -> driver.Function:
        self.asked.append(name)
        return self._instead.get(name) or self._module.function(name)


def nothing(*_: object) -> None:
    """A kernel that writes nothing."""


def names() -> list[str]:
    """All kernels there are, as the emulated card's libraries have them."""
    found: set[str] = set()
    for source in sorted(SOURCES.glob("*.cu")):
        for dtype in ("half", "bf16"):
            content = Path(_library(source, dtype)._name).read_bytes()
            found |= set(re.findall(rb"\0launch_(\w+_(?:half|bf16))(?=\0)", content))
    return sorted(name.decode() for name in found)


def is_right(module: driver.Module, *dtypes: torch.dtype) -> bool:
    kernels, block = CardKernels(module, "emulated"), BlockKernels(module, "emulated")
    return block_is_right(block, dtypes, "cpu") and linear_is_right(kernels, dtypes, "cpu")


def test_the_check_starts_every_kernel_there_is() -> None:
    module = Tampered()
    assert is_right(module, torch.float16, torch.bfloat16)
    assert sorted(set(module.asked)) == names()


@pytest.fixture
def filled() -> Iterator[None]:
    """New memory is no number: it may be where an earlier check's right results have been."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.usefixtures("filled")
def test_the_check_refuses_each_kernel_that_writes_nothing() -> None:
    for name in names():
        dtype = torch.float16 if name.endswith("half") else torch.bfloat16
        assert not is_right(Tampered({name: nothing}), dtype), name


@pytest.fixture
def on_card(tmp_path: Path) -> Callable[..., Loaded]:
    """Load the kernels on an emulated card; with keys: what is otherwise."""

    def loaded(
        module: Any = None,
        card: FakeCard | None = None,
        compiler: Compiler | Exception | None = None,
        cache: Path = tmp_path,
    ) -> Loaded:
        def make() -> Compiler:
            if isinstance(compiler, Exception):
                raise compiler
            return compiler or Scripted()

        def open_module(images: Sequence[bytes], card: object) -> Any:
            if isinstance(module, Exception):
                raise module
            return module or Tampered()

        return load_on(card or FakeCard(), cache, make, open_module)

    return loaded


def outcome(loaded: Loaded) -> tuple[bool, bool, str]:
    why = loaded.reason.removeprefix("reasons.card_kernels")
    return loaded.kernels is not None, loaded.block is not None, why


def diaries(folder: Path) -> list[Path]:
    return list(cuda.folder(folder).glob("*.trying"))


def test_right_kernels_are_used_and_named_after_the_card(on_card: Any, tmp_path: Path) -> None:
    loaded = on_card()
    assert outcome(loaded) == (True, True, "")
    assert loaded.name == loaded.kernels.name == loaded.block.name == "sm_86"
    assert not diaries(tmp_path)


def test_a_card_without_bfloat16_gets_the_others_alone(on_card: Any) -> None:
    compiler, module = Scripted(), Tampered()
    assert outcome(on_card(module, FakeCard((7, 5)), compiler)) == (True, True, "")
    assert all(name.endswith("_half") for name in module.asked)
    assert len(compiler.asked) == len(list(SOURCES.glob("*.cu")))


@pytest.mark.parametrize("dtype", ["half", "bf16"])
def test_a_wrong_kernel_takes_its_own_kind_along(on_card: Any, tmp_path: Path, dtype: str) -> None:
    assert outcome(on_card(Tampered({f"widen_8_{dtype}": nothing}))) == (False, False, "_wrong")
    assert outcome(on_card(Tampered({f"gelu_{dtype}": nothing}))) == (True, False, "_part")
    assert not diaries(tmp_path), "nothing keeps it from being tried again"
    assert torch.get_deterministic_debug_mode() == 0


def test_after_a_fault_no_kernel_is_started_until_they_are_removed(on_card: Any, tmp_path: Path) -> None:
    def fault(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    assert outcome(on_card(Tampered({"linear_4_1_half": fault}))) == (False, False, "_wrong")
    module = Tampered()
    assert outcome(on_card(module)) == (False, False, "_wrong")
    assert not module.asked
    for file in diaries(tmp_path):  # as doctor --fix does, and a new version of a source
        file.unlink()
    assert outcome(on_card(module)) == (True, True, "")


def test_after_two_checks_that_never_came_back_there_is_no_third(on_card: Any, tmp_path: Path) -> None:
    class Killed(BaseException):
        """What ends the process; nobody catches it."""

    def kill(*_: object) -> None:
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            on_card(Tampered({"linear_4_1_half": kill}))
    assert outcome(on_card()) == (False, False, "_wrong")


@pytest.mark.parametrize("trouble", [KeyError("linear_4_1_half"), DriverError("invalid value", 1)])
def test_kernels_that_cannot_be_started_are_not_used(on_card: Any, trouble: Exception) -> None:
    def refuse(*_: object) -> None:
        raise trouble

    assert outcome(on_card(Tampered({"linear_4_1_half": refuse}))) == (False, False, "_wrong")


FULL = [
    torch.OutOfMemoryError("CUDA out of memory"),
    DriverError("out of memory", 2),  # the driver's own, for a kernel's first start
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory"),
    MemoryError(),
]


@pytest.mark.parametrize("trouble", FULL, ids=lambda error: type(error).__name__)
def test_a_card_that_is_full_now_may_be_asked_again(on_card: Any, tmp_path: Path, trouble: Exception) -> None:
    def full(*_: object) -> None:
        raise trouble

    for kernel in ("widen_4_half",) if trouble is not FULL[0] else ("widen_4_half", "norm_half"):
        assert outcome(on_card(Tampered({kernel: full}))) == (False, False, "_not_loaded")
    assert not diaries(tmp_path)


def test_what_is_missing_is_told(on_card: Any, tmp_path: Path) -> None:
    assert outcome(on_card(card=FakeCard((7, 0)))) == (False, False, "_old_card")
    assert outcome(on_card(card=FakeCard((6, 1)))) == (False, False, "_old_card")
    for why in ("_no_nvrtc", "_not_compiled"):
        told = on_card(compiler=NotCompiled(f"reasons.card_kernels{why}"))
        assert outcome(told) == (False, False, why)
        assert told.name == "torch"
    assert outcome(on_card(compiler=Scripted(fails="linear.cu"))) == (False, False, "_not_compiled")
    for trouble in (DriverError("no way to the driver"), RuntimeError("CUDA error: device is busy")):
        assert outcome(on_card(trouble)) == (False, False, "_not_loaded")
    assert not diaries(tmp_path)
    (tmp_path / "taken").write_text("a file where the folder should be")
    assert outcome(on_card(cache=tmp_path / "taken")) == (False, False, "_no_room")


def test_other_cards_and_none_at_all_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("mps", "cpu"):
        assert outcome(load(device, tmp_path)) == (False, False, "_other_card")
    if not torch.cuda.is_available():
        assert outcome(load("cuda:1", tmp_path)) == (False, False, "_not_loaded")
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert outcome(load("cuda", tmp_path)) == (False, False, "_other_card")
    assert not list(tmp_path.iterdir())
