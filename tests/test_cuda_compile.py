"""Compiling the card's kernels: by NVRTC itself where it is installed, and the cache around it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from glmui.i18n import LANGUAGES, table
from glmui.quant.kernels.cuda import compile as compiling
from glmui.quant.kernels.cuda.compile import TYPES, NotCompiled, Nvrtc, find, images, target
from tests.scripted_nvrtc import Scripted

SOURCES = Path(compiling.__file__).parent
FILES = sorted(SOURCES.glob("*.cu"))
HEADERS = {file.name: file.read_text("utf-8") for file in SOURCES.glob("*.cuh")}


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    try:
        return find(None)
    except NotCompiled:
        pytest.skip("no NVRTC on this machine: pip install -r requirements-dev.txt brings it")


def compiled(nvrtc: Nvrtc, architecture: int, types: Sequence[str]) -> list[bytes]:
    """Every source for a card; the log has a warning for what does not fit its registers."""
    options = [f"--gpu-architecture=sm_{architecture}", "--ptxas-options=--warn-on-spills"]
    units = [(file, [*options, *compiling._OPTIONS, *TYPES[name]]) for file in FILES for name in types]
    with ThreadPoolExecutor(2) as pool:
        make = partial(pool.submit, nvrtc.compile)
        started = [make(file.name, file.read_text("utf-8"), HEADERS, more) for file, more in units]
        return [each.result() for each in started]


# The oldest card, which has no bfloat16, on every run; the others take half a minute.
@pytest.mark.parametrize(
    ("architecture", "types"),
    [
        (75, ["half"]),
        *(pytest.param(number, list(TYPES), marks=pytest.mark.slow) for number in (75, 80, 86, 89, 90, 120)),
    ],
)
def test_all_kernels_compile_for_the_card_and_fit_its_registers(
    nvrtc: Nvrtc, architecture: int, types: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    if architecture not in nvrtc.architectures:
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    with caplog.at_level(logging.DEBUG, compiling.__name__):
        made = compiled(nvrtc, architecture, types)
    assert len(made) == len(types) * len(FILES)
    assert all(image.startswith(b"\x7fELF") for image in made)
    assert architecture > 90 or not caplog.text  # on newer ones, which need more, a few numbers are spilled


def test_a_card_newer_than_the_compiler_gets_ptx(nvrtc: Nvrtc) -> None:
    source = 'extern "C" __global__ void nothing() {}'
    text = nvrtc.compile(
        "nothing.cu", source, {}, [f"--gpu-architecture={target((99, 9), nvrtc.architectures)}"]
    )
    assert b".visible .entry nothing" in text
    assert text.endswith(b"\0")


def test_what_nvrtc_says_is_kept_for_the_doctor(nvrtc: Nvrtc, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "glmui.quant.kernels.cuda"), pytest.raises(NotCompiled) as caught:
        nvrtc.compile("own.cu", '#include "own.cuh"\nint x = y;', {"own.cuh": "// here"}, [])
    assert caught.value.reason == "reasons.card_kernels_not_compiled"
    assert 'own.cu(2): error: identifier "y" is undefined' in caplog.text


def test_the_compilers_own_cards_get_machine_code_and_others_the_nearest_older_ones_ptx() -> None:
    known = (75, 80, 86, 90, 120)
    assert target((8, 6), known) == "sm_86"
    assert target((12, 0), known) == "sm_120"
    assert target((8, 9), known) == "compute_86"
    assert target((12, 1), known) == "compute_120"
    with pytest.raises(NotCompiled):
        target((7, 5), (80, 86))


def test_images_are_compiled_once_for_each_card_compiler_and_type(tmp_path: Path) -> None:
    sources = len(FILES)
    first = images(tmp_path, (8, 6), compiler := Scripted(), ["half", "bf16"])
    assert len(set(first)) == len(compiler.asked) == 2 * sources
    compiler = Scripted()
    assert images(tmp_path, (8, 6), compiler, ["half", "bf16"]) == first
    assert all(b"BF16" not in image for image in images(tmp_path, (8, 6), compiler, ["half"]))
    assert not compiler.asked
    for again in (Scripted((13, 1)), compiler):
        assert images(tmp_path, (7, 5), again, ["half"])[0].endswith(b"sm_75 --std=c++17")
        assert len(again.asked) == sources
    assert not list(tmp_path.glob("*.part"))


def test_a_changed_source_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(compiling, "_SOURCES", sources)
    for name in ("a.cu", "b.cu", "all.cuh"):
        (sources / name).write_text("// first")
    before = compiling.digest()
    for change, anew in ((None, ["a.cu", "b.cu"]), ("a.cu", ["a.cu"]), ("all.cuh", ["a.cu", "b.cu"])):
        if change:
            (sources / change).write_text("// second")
        images(tmp_path, (8, 6), compiler := Scripted(), ["half"])
        assert sorted(compiler.asked) == anew
    assert compiling.digest() != before


@pytest.mark.parametrize("damage", [b"", b"half of it", None])
def test_a_damaged_image_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    whole = images(tmp_path, (8, 6), Scripted(), ["half"])
    file = next(tmp_path.glob("linear-half-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?" if damage is None else damage)
    assert sorted(images(tmp_path, (8, 6), compiler := Scripted(), ["half"])) == sorted(whole)
    assert compiler.asked == ["linear.cu"]
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    for _ in range(2):
        assert images(tmp_path / "taken", (8, 6), compiler := Scripted(), ["half"])
        assert compiler.asked


def test_one_source_that_does_not_compile_refuses_all(tmp_path: Path) -> None:
    with pytest.raises(NotCompiled) as caught:
        images(tmp_path, (8, 6), Scripted(fails="block.cu"), ["half"])
    assert caught.value.reason == "reasons.card_kernels_not_compiled"


@pytest.mark.parametrize("fault", [OSError("access violation reading 0x0"), AttributeError("nvrtcGetCUBIN")])
def test_a_fault_of_the_compiler_is_a_refusal_too(tmp_path: Path, fault: Exception) -> None:
    def compile(*_: object) -> bytes:
        raise fault

    (broken := Scripted()).compile = compile  # type: ignore[method-assign]
    with pytest.raises(NotCompiled):
        images(tmp_path, (8, 6), broken, ["half"])


def test_a_compiler_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    end = threading.Event()
    endless = Scripted()
    endless.compile = lambda *_: bytes(end.wait(60))  # type: ignore[method-assign]
    try:
        with pytest.raises(NotCompiled):
            images(tmp_path, (8, 6), endless, ["half"], seconds=0.05)
        assert all(each.daemon for each in threading.enumerate() if each.name == "nvrtc")
    finally:
        end.set()


def test_torchs_own_version_of_nvrtc_is_taken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Absent:
        def __init__(self, path: str) -> None:
            tried.append(path)
            raise OSError("no such file")

    there = {
        "libnvrtc.so.[0-9]*": [
            Path("/b/libnvrtc.so.13"),
            Path("/a/libnvrtc.so.12"),
            Path("/c/libnvrtc.so.14"),
        ]
    }
    monkeypatch.setattr(compiling, "_NVRTC", "libnvrtc.so.{}")
    monkeypatch.setattr(compiling, "_files", lambda pattern: there[pattern])
    monkeypatch.setattr(compiling, "Nvrtc", Absent)
    with pytest.raises(NotCompiled) as caught:
        find("12.6")
    assert caught.value.reason == "reasons.card_kernels_no_nvrtc"
    names = ["libnvrtc.so.12", "/a/libnvrtc.so.12", "/c/libnvrtc.so.14", "/b/libnvrtc.so.13", "libnvrtc.so"]
    assert tried == names


def test_every_outcome_is_a_sentence_in_both_languages() -> None:
    told = {"", "_part", "_old_card", "_other_card", "_no_nvrtc", "_not_compiled", "_not_loaded", "_no_room"}
    told |= {"_wrong"}
    for language in LANGUAGES:
        assert all(table(language)[f"reasons.card_kernels{ending}"] for ending in told)
