"""The CPU kernels of every target this processor runs against float64, and what becomes of a bad library."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmui.engine.loaded import kernel_folder
from glmui.i18n import LANGUAGES, table
from glmui.quant.kernels.cpu import Kernels, Loaded, Packed, fits, load
from glmui.quant.kernels.cpu.build import Compiler, compilers
from glmui.quant.kernels.cpu.check import TOLERANCE, error
from glmui.quant.kernels.cpu.native import Library
from glmui.quant.packing import dequantize_weight, pack_int4

SOURCES = Path(__file__).parent.parent / "glmui" / "quant" / "kernels" / "cpu"
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 130)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this module's own with the library that the run has built."""
    if not compilers():
        pytest.skip("no C compiler on this machine")
    assert load(kernel_folder()).kernels, "the compiler of this machine did not build the kernels"
    return shutil.copytree(kernel_folder(), tmp_path_factory.mktemp("kernels") / "copy")


@pytest.fixture(scope="module")
def targets(cache: Path) -> list[Kernels]:
    """The kernels of every target this processor runs."""
    names = Library(next(cache.glob("kernels-*"))).targets()
    loaded = [load(cache, threads=2, target=name).kernels for name in names]
    return [kernels for kernels in loaded if kernels]


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels(cache: Path) -> Kernels:
    found = load(cache, threads=2).kernels
    assert found
    return found


class Layer:
    """A random quantised layer: as published, as float64, and what float64 makes of an input."""

    def __init__(
        self, rows: int, columns: int, bits: int, group_size: int | None = None, seed: int = 0
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        limit = 2 ** (bits - 1)
        q = torch.randint(-limit, limit, (rows, columns), generator=random, dtype=torch.int8)
        scale = torch.rand(rows, columns // (group_size or columns), generator=random) + 0.1
        self.bits, self.columns = bits, columns
        self.stored = pack_int4(q) if bits == 4 else q
        self.scale = scale if group_size else scale[:, 0]
        self.bias = torch.randn(rows, generator=random)
        self.matrix = dequantize_weight(self.stored, scale, bits, columns, torch.float64)

    def packed(self, kernels: Kernels) -> Packed:
        return kernels.pack(self.stored, self.scale, self.bits, self.columns)

    def of(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.double(), self.matrix, self.bias.double())


def test_every_target_agrees_with_float64(targets: list[Kernels]) -> None:
    assert targets[-1].name == "portable"
    for bits in (4, 8):
        for shape in ((64, 512, None), (37, 1, None), (5, 299, None), (70, 768, 96), (33, 1024, 512)):
            layer = Layer(*shape[:2], bits, shape[2])
            for kernels in targets:
                packed = layer.packed(kernels)
                for rows in ROWS:
                    x = torch.randn(rows, layer.columns)
                    for numerics, tolerance in TOLERANCE.items():
                        got = kernels.linear(x, packed, layer.bias, numerics)
                        far = error(got, layer.of(x))
                        assert far < tolerance, (kernels.name, bits, shape, rows, numerics)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 700),
    inputs=st.integers(1, 12),
    bits=st.sampled_from((4, 8)),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_right(
    targets: list[Kernels], rows: int, columns: int, inputs: int, bits: int, seed: int
) -> None:
    layer = Layer(rows, columns, bits, seed=seed)
    x = torch.randn(inputs, columns, generator=torch.Generator().manual_seed(seed))
    # Relative to what is added up, for a random sum may come out near zero.
    size = x.double().norm(dim=1, keepdim=True) * layer.matrix.norm(dim=1) + layer.bias.abs()
    for kernels in targets:
        for numerics, tolerance in TOLERANCE.items():
            got = kernels.linear(x, layer.packed(kernels), layer.bias, numerics)
            assert ((got.double() - layer.of(x)).abs() / size).max() < tolerance + 1e-6, (
                kernels.name,
                numerics,
            )


def test_the_half_precision_head_agrees_with_float64(targets: list[Kernels]) -> None:
    for rows, columns in ((1, 1), (40, 64), (33, 257), (100, 1000)):
        weight = torch.randn(rows, columns).half()
        weight[0, 0] = 6e-8  # the smallest there is
        for count in (1, 3, 4, 9):
            x = torch.randn(count, columns)
            for kernels in targets:
                assert error(kernels.half(x, weight), x.double() @ weight.double().T) < TOLERANCE["exact"], (
                    kernels.name
                )


def test_the_lowest_weights_count_in_full(targets: list[Kernels]) -> None:
    """-8 and -128 are never published, but a file may hold them."""
    for kernels in targets:
        for bits, lowest in ((4, -8), (8, -128)):
            q = torch.full((33, 300), lowest, dtype=torch.int8)
            packed = kernels.pack(pack_int4(q) if bits == 4 else q, torch.ones(33), bits, 300)
            for numerics in TOLERANCE:
                for sign in (1, -1):
                    got = kernels.linear(torch.full((3, 300), float(sign)), packed, None, numerics)
                    torch.testing.assert_close(got, torch.full((3, 33), 300.0 * lowest * sign))


def test_awkward_inputs(targets: list[Kernels]) -> None:
    layer = Layer(40, 600, 4)
    for kernels, (numerics, tolerance) in product(targets, TOLERANCE.items()):
        linear = partial(kernels.linear, w=layer.packed(kernels), bias=layer.bias, numerics=numerics)
        assert linear(torch.empty(0, 600)).shape == (0, 40)
        assert linear(torch.empty(2, 0, 600)).shape == (2, 0, 40)
        assert torch.equal(linear(torch.zeros(3, 600)), layer.bias.expand(3, 40))
        tiny = torch.full((1, 600), 1e-38)
        assert torch.allclose(linear(tiny), layer.bias)
        x = torch.randn(3, 600)
        for bad in (float("nan"), float("inf"), float("-inf")):
            x[1, 7] = bad
            assert not linear(x)[1].isfinite().any()
            assert error(linear(x)[::2], layer.of(x[::2])) < tolerance
        spread = torch.randn(4, 1200)[:, ::2]  # not in one piece
        assert error(linear(spread.view(2, 2, 600)).view(4, 40), layer.of(spread)) < tolerance


def test_an_outlier_spoils_only_its_own_block(kernels: Kernels) -> None:
    """Per-row INT8 would lose all but the outlier; here the other columns keep their precision."""
    layer = Layer(64, 4096, 4)
    x = torch.randn(1, 4096)
    x[0, 100] = 1000.0
    others = x.clone()
    others[0, 100] = 0.0
    size = (layer.of(others) - layer.bias).norm()
    packed = layer.packed(kernels)
    for numerics, tolerance in {"exact": 1e-4, "balanced": 1e-2, "fast": 0.4}.items():
        distance = (kernels.linear(x, packed, layer.bias, numerics).double() - layer.of(x)).norm()
        assert distance / size < tolerance, numerics


def test_rows_do_not_depend_on_their_neighbours(kernels: Kernels) -> None:
    layer = Layer(70, 512, 4)
    packed, x = layer.packed(kernels), torch.randn(21, 512)
    for numerics in ("balanced", "fast"):
        together = kernels.linear(x, packed, layer.bias, numerics)
        alone = torch.cat([kernels.linear(row[None], packed, layer.bias, numerics) for row in x])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_numbers(cache: Path, threads: int) -> None:
    layer, x = Layer(2000, 512, 4), torch.randn(20, 512)
    one, many = load(cache, threads=1).kernels, load(cache, threads=threads).kernels
    assert one
    assert many
    assert many.threads == threads
    for rows in (1, 20):
        for numerics in TOLERANCE:
            results = [k.linear(x[:rows], layer.packed(k), None, numerics) for k in (one, many)]
            assert torch.equal(*results)


def test_threads_can_be_changed(kernels: Kernels) -> None:
    layer, x = Layer(900, 256, 8), torch.randn(1, 256)
    packed = layer.packed(kernels)
    first = kernels.linear(x, packed)
    for count in (3, 1, 2):
        kernels.threads = count
        assert kernels.threads == count
        assert torch.equal(kernels.linear(x, packed), first)


def test_several_python_threads_may_call(kernels: Kernels) -> None:
    layer = Layer(300, 512, 4)
    packed, start = layer.packed(kernels), threading.Barrier(4)

    def work(seed: int) -> float:
        random = torch.Generator().manual_seed(seed)
        start.wait()
        inputs = [torch.randn(1 + seed, 512, generator=random) for _ in range(50)]
        return max(error(kernels.linear(x, packed, layer.bias), layer.of(x)) for x in inputs)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < TOLERANCE["exact"]


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    assert all((fits(4096, 1, 4), fits(4096, 32, 4), fits(192, 2, 8)))
    assert not any((fits(4096, 256, 4), fits(100, 3, 4), fits(64, 1, 2)))
    layer = Layer(8, 64, 4)
    packed = layer.packed(kernels)
    with pytest.raises(ValueError, match="cannot pack"):
        kernels.pack(layer.stored, torch.ones(8, 4), 4, 64)
    with pytest.raises(ValueError, match="cannot pack"):
        kernels.pack(layer.stored, layer.scale, 8, 64)
    with pytest.raises(ValueError, match="columns"):
        kernels.linear(torch.randn(1, 32), packed)
    with pytest.raises(ValueError, match="float32"):
        kernels.linear(torch.randn(1, 64).half(), packed)
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(torch.randn(1, 64), packed, torch.randn(9))
    with pytest.raises(ValueError, match="whole"):
        kernels.linear(torch.randn(1, 64), Packed(packed.weight[:-1], packed.scale, 4, 8, 64))


def test_reading_touches_every_page(kernels: Kernels) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert kernels.read(memory) == 0
    memory[-1] = 1
    assert kernels.read(memory) != 0


def has_words(reason: str) -> bool:
    return all(reason in table(language) for language in LANGUAGES)


def assert_refused(loaded: Loaded, reason: str) -> None:
    assert loaded.kernels is None
    assert loaded.reason == reason
    assert has_words(reason)


def test_the_library_is_built_once(cache: Path) -> None:
    [file] = cache.glob("kernels-*")
    before = file.stat().st_mtime_ns
    loaded = load(cache)
    assert loaded.kernels
    assert loaded.name == loaded.kernels.name
    assert has_words(loaded.reason)
    assert file.stat().st_mtime_ns == before
    assert [entry for entry in cache.iterdir() if entry != file] == []  # nothing is left of the building
    without = load(cache, using=[])  # a compiler that has gone away takes nothing with it
    assert without.kernels


def script(tmp_path: Path, text: str) -> Compiler:
    """A compiler that is this Python program; it finds the output's name in sys.argv."""
    file = tmp_path / "compiler.py"
    file.write_text("import sys\nout = sys.argv[sys.argv.index('-o') + 1]\n" + text)
    return Compiler([sys.executable, str(file)], text)


def test_without_a_compiler_the_reason_is_told(tmp_path: Path) -> None:
    loaded = load(tmp_path / "cache", using=[])
    assert_refused(loaded, "reasons.kernels_no_compiler")
    assert loaded.name == "torch"


def test_a_failing_compiler_stays_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failing = script(tmp_path, "print('error: expected'); print('oh', file=sys.stderr); sys.exit(1)")
    silent = script(tmp_path, "pass")
    missing = Compiler([str(tmp_path / "no such compiler")], "missing")
    loaded = load(tmp_path / "cache", using=[failing, silent, missing])
    assert_refused(loaded, "reasons.kernels_not_built")
    assert capfd.readouterr() == ("", "")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_next_compiler_is_tried(tmp_path: Path, cache: Path) -> None:
    failing = script(tmp_path, "sys.exit(1)")
    [library] = cache.glob("kernels-*")
    copying = Compiler([sys.executable, "-c", _COPY, str(library)], "copying")
    assert load(tmp_path / "cache", using=[failing, copying]).kernels


_COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[sys.argv.index('-o') + 1])"


def test_garbage_is_refused(tmp_path: Path) -> None:
    garbage = script(tmp_path, "open(out, 'wb').write(b'no library')")
    loaded = load(tmp_path / "cache", using=[garbage])
    assert_refused(loaded, "reasons.kernels_not_built")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    loaded = load(tmp_path / "file" / "cache", using=[script(tmp_path, "pass")])
    assert_refused(loaded, "reasons.kernels_no_room")


_WRONG = """
import pathlib, subprocess, sys
source = pathlib.Path("template.h")  # in the folder it is called in, where the sources have been copied to
text = source.read_text("utf-8")
right = "sum += out[plane][i]"
assert right in text
source.write_text(text.replace(right, "sum -= out[plane][i]"), "utf-8")
sys.exit(subprocess.call(["-O1" if word == "-O3" else word for word in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_kernels_that_compute_wrongly_are_refused(tmp_path: Path, cache: Path) -> None:
    real = compilers()[0]
    wrong = Compiler([sys.executable, "-c", _WRONG, *real.command], "wrong", real.environment)
    loaded = load(tmp_path / "cache", using=[wrong])
    assert_refused(loaded, "reasons.kernels_wrong")


def test_a_wrong_target_is_passed_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(Library(next(cache.glob("kernels-*"))).targets())
    monkeypatch.setattr("glmui.quant.kernels.cpu.is_right", lambda kernels: kernels.name != names[0])
    loaded = load(cache)
    if len(names) > 1:
        assert (loaded.name, loaded.reason) == (names[1], "reasons.kernels_second")
        assert has_words(loaded.reason)
    only = load(cache, target=names[0])
    assert_refused(only, "reasons.kernels_wrong")
    unknown = load(cache, target="itanium")
    assert_refused(unknown, "reasons.kernels_not_here")


def test_kernels_that_ended_the_program_are_not_tried_again(tmp_path: Path, cache: Path) -> None:
    """As a fault in C would: the process is gone in the middle of the check."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    names = list(Library(next(folder.glob("kernels-*"))).targets())
    fatal = (
        "import os, pathlib, sys, glmui.quant.kernels.cpu as k\n"
        "k.is_right = lambda kernels: os._exit(3)\n"
        "k.load(pathlib.Path(sys.argv[1]))\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", fatal, str(folder)], cwd=SOURCES.parents[3], check=False)
        assert done.returncode == 3
    loaded = load(folder)
    assert loaded.name == (names[1] if len(names) > 1 else "torch")


def test_two_processes_may_build_at_once(tmp_path: Path, cache: Path) -> None:
    [library] = cache.glob("kernels-*")
    copying = Compiler([sys.executable, "-c", _COPY, str(library)], "copying")
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load(tmp_path / "cache", using=[copying]), range(4)))
    assert all(one.kernels for one in loaded)
    assert len(list((tmp_path / "cache").glob("kernels-*"))) == 1


@pytest.mark.slow
def test_sanitisers_find_nothing(tmp_path: Path) -> None:
    """A C program runs every target over awkward shapes under AddressSanitizer and UBSan."""
    command = next((c.command for c in compilers() if len(c.command) == 1), None)
    if command is None:
        pytest.skip("no C compiler with sanitisers on this machine")
    program = tmp_path / "program"
    flags = [
        "-g",
        "-O0",
        "-std=gnu11",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    main = Path(__file__).with_name("kernels_main.c")
    built = subprocess.run(
        [*command, *flags, f"-I{SOURCES}", "-o", str(program), str(main), "-lm"],
        capture_output=True,
        check=False,
    )
    if built.returncode:
        pytest.skip("this C compiler has no sanitisers")
    done = subprocess.run([str(program)], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
