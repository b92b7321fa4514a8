"""The second load: packed weights kept in a file, mapped, and not trusted when they are not as they were."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glmui.engine import packed, prepare
from glmui.engine.chatglm import open_chatglm
from glmui.engine.loaded import LoadedEngine, kernel_folder
from glmui.glm.checkpoint import AnyModel, load_model
from glmui.hub import manifest
from glmui.quant import packed_file
from glmui.quant.fast import KernelLinear
from glmui.quant.kernels.cpu import Kernels, Packed, load
from glmui.quant.kernels.cpu.native import packed_bytes
from glmui.quant.packed_file import NotUsable, PackedLayer, read, room_for, write
from glmui.types import EngineSpec, GenerationParams, Message, Progress
from tests.chatglm_fixture import copy_checkpoint

ASKED = [Message("user", "你好")]
GREEDY = GenerationParams(max_length=64, max_new_tokens=6, temperature=0)

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load(kernel_folder(), threads=2)
    if found.kernels is None:
        pytest.skip(f"no kernels on this machine: {found.reason}")
    return found.kernels


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_chatglm: Folder, tmp_path: Path) -> Path:
    return copy_checkpoint(tiny_chatglm("int4"), tmp_path / "model")


class World:
    """Opens a model with its packed weights in one folder, and counts how often anything is packed."""

    def __init__(self, packed_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed_dir = packed_dir
        self.packs = 0
        for name in ("pack_layer", "pack_head"):
            monkeypatch.setattr(prepare, name, self._counting(getattr(prepare, name)))

    def _counting(self, inner: Callable[..., PackedLayer]) -> Callable[..., PackedLayer]:
        def pack(*args: object) -> PackedLayer:
            self.packs += 1
            return inner(*args)

        return pack

    def open(self, folder: Path, **more: object) -> tuple[LoadedEngine, list[Progress]]:
        self.packs, told = 0, []
        spec = EngineSpec("tiny", str(folder), device="cpu", packed_dir=str(self.packed_dir), **more)  # type: ignore[arg-type]
        return open_chatglm(spec, told.append), told

    def files(self) -> list[Path]:
        return sorted(self.packed_dir.glob("*/*.packed"))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> World:
    return World(tmp_path / "packed", monkeypatch)


def answer(engine: LoadedEngine) -> str:
    return "".join(chunk.text for chunk in engine.stream_chat(ASKED, GREEDY, "r"))


def layers_of(engine: LoadedEngine) -> dict[str, KernelLinear]:
    assert engine.speaker is not None
    decoder = engine.speaker.decoder
    return {n: m for n, m in decoder.model.named_modules() if isinstance(m, KernelLinear)}  # type: ignore[attr-defined]


def test_the_second_load_packs_nothing_and_says_the_same(world: World, model: Path) -> None:
    plain = open_chatglm(EngineSpec("tiny", str(model), device="cpu"), lambda progress: None)
    first, told = world.open(model)
    assert world.packs == len(layers_of(plain)) > 0
    parts = [p.fraction for p in told if p.stage == "packing"]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    second, told = world.open(model)
    assert world.packs == 0
    assert {p.stage for p in told} == {"loading"}
    assert told[-1].fraction == 1.0
    assert answer(plain) == answer(first) == answer(second)
    for name, layer in layers_of(plain).items():
        kept = layers_of(second)[name]
        assert torch.equal(kept.packed.weight, layer.packed.weight)
        assert torch.equal(kept.packed.scale, layer.packed.scale)


@pytest.mark.parametrize(
    ("kind", "more", "forms"),
    [
        ("int8", {}, ["int8"]),
        ("fp16", {"quantize": "int4"}, ["int4"]),
        ("int4", {"head_bits": 8}, ["head8", "int4"]),
    ],
)
def test_every_form_is_kept(
    world: World, tiny_chatglm: Folder, kind: str, more: dict[str, object], forms: list[str]
) -> None:
    first = answer(world.open(tiny_chatglm(kind), **more)[0])
    second, _ = world.open(tiny_chatglm(kind), **more)
    assert world.packs == 0
    assert answer(second) == first
    assert [file.stem for file in world.files()] == forms


def test_a_checked_checkpoint_is_not_read_again(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.open(model)
    monkeypatch.setattr("glmui.glm.checkpoint.is_finite", lambda tensor: pytest.fail("read again"))
    world.open(model)


def test_the_weights_lie_in_the_file(world: World, model: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    engine, _ = world.open(model)
    (file,) = world.files()
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(file) in line]
    for layer in layers_of(engine).values():
        place = layer.packed.weight.data_ptr()
        assert place % packed_file.PAGE == 0
        assert any(int(first, 16) <= place < int(last, 16) for first, last in ranges)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(100)
        byte = opened.read(1)[0]
        opened.seek(100)
        opened.write(bytes([byte ^ 1]))


def flip_table(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": cut,
    "one bit": flip,
    "one bit of the table": flip_table,
    "empty": lambda file: os.truncate(file, 0),
    "something else": lambda file: file.write_bytes(b"<html>" * 1000),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "a folder"])
def test_a_damaged_file_is_noticed_and_made_anew(world: World, model: Path, name: str) -> None:
    whole = answer(world.open(model)[0])
    (file,) = world.files()
    DAMAGE[name](file)
    engine, _ = world.open(model)
    assert world.packs > 0
    assert answer(engine) == whole
    world.open(model)
    assert world.packs == 0


def test_what_cannot_be_written_is_packed_at_every_load_and_told(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer(world.open(model)[0])
    (file,) = world.files()
    DAMAGE["a folder"](file)
    engine, _ = world.open(model)
    assert answer(engine) == whole
    world.packed_dir = world.packed_dir.with_name("a file")
    world.packed_dir.write_text("in the way")
    engine, _ = world.open(model)
    assert answer(engine) == whole
    assert engine.info().reason == "reasons.packed_not_kept"


def test_nothing_is_written_where_the_disk_would_be_full(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SPARE", 1 << 60)
    engine, _ = world.open(model)
    assert engine.info().reason == "reasons.packed_not_kept"
    assert engine.info().kernel
    assert answer(engine)
    assert world.files() == []


@pytest.mark.parametrize("head_bits", [16, 8])
def test_in_haste_nothing_is_written_and_what_is_there_is_used(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch, head_bits: int
) -> None:
    """After memory ran out somebody waits; writing the file is most of a first load."""
    first, _ = world.open(model, hasty=True, head_bits=head_bits)
    assert world.files() == []
    assert first.info().kernel
    assert first.info().reason != "reasons.packed_not_kept"
    said = answer(first)
    assert answer(world.open(model, head_bits=head_bits)[0]) == said
    monkeypatch.setattr("glmui.quant.fast.pack_layer", lambda *_: pytest.fail("packed again"))
    again, _ = world.open(model, hasty=True, head_bits=head_bits)
    assert world.packs == 0
    assert answer(again) == said


def test_in_haste_what_ram_cannot_hold_is_written_all_the_same(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed in memory it would take all of it for good; as pages of a file nobody is ended for it."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=300_000_000))
    world.open(model, hasty=True)
    assert len(world.files()) == 1


class Beside(World):
    """Opens a model of which only the last layers are on the CPU; what is in float16 stands for a card."""

    def open_part(self, folder: Path, first: int, **more: object) -> AnyModel:
        self.packs = 0
        here = re.compile(r"\.layers\.(\d+)\.")

        def place(name: str) -> tuple[torch.device, torch.dtype]:
            layer = here.search(name)
            is_here = layer is not None and int(layer[1]) >= first
            return torch.device("cpu"), torch.float32 if is_here else torch.float16

        spec = EngineSpec("tiny", str(folder), packed_dir=str(self.packed_dir), **more)  # type: ignore[arg-type]
        load = partial(load_model, folder, place, 0)
        return prepare.open_prepared(load, spec, "mixed", place, 4, 2, lambda progress: None).model  # type: ignore[arg-type]


def by_layer(model: AnyModel) -> Counter[str]:
    """How many matrices of each block the kernels compute."""
    return Counter(n.split(".layers.")[1][0] for n, m in model.named_modules() if isinstance(m, KernelLinear))


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Beside:
    return Beside(tmp_path / "packed", monkeypatch)


def test_beside_a_card_the_layers_on_the_cpu_lie_in_a_file_too(beside: Beside, model: Path) -> None:
    assert by_layer(beside.open_part(model, 2)) == {"2": 4, "3": 4}
    assert beside.packs == 8
    (file,) = beside.files()
    small = file.stat().st_size
    found = beside.open_part(model, 2)
    assert beside.packs == 0
    assert by_layer(found) == {"2": 4, "3": 4}
    assert len(by_layer(beside.open_part(model, 1, hasty=True))) == 3, "what is missing is packed in memory"
    assert file.stat().st_size == small, "in haste nothing is written"
    assert len(by_layer(beside.open_part(model, 1))) == 3
    assert file.stat().st_size > small, "more layers are on the CPU than when it was made"
    for first, count in ((1, 3), (2, 2), (3, 1)):
        assert len(by_layer(beside.open_part(model, first))) == count, "a file of more serves for fewer"
        assert beside.packs == 0


def test_a_file_of_fewer_layers_that_cannot_be_replaced(
    beside: Beside, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows while another process computes with it."""
    beside.open_part(model, 3)

    def write_in_vain(file: Path, made_of: str, layers: Iterator[tuple[str, PackedLayer]]) -> None:
        assert len(list(layers)) == 8
        raise PermissionError(13, "in use")

    monkeypatch.setattr(prepare, "write", write_in_vain)
    assert len(by_layer(beside.open_part(model, 2))) == 2


def test_where_all_is_on_cards_nothing_is_kept(beside: Beside, model: Path) -> None:
    assert not by_layer(beside.open_part(model, 4))
    assert beside.files() == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, written = packed_file._append, []

    def append(out: object, tensor: torch.Tensor) -> tuple[int, int, int]:
        written.append(tensor)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        return inner(out, tensor)  # type: ignore[arg-type]

    monkeypatch.setattr(packed_file, "_append", append)
    engine, _ = world.open(model)
    assert answer(engine)
    assert engine.info().reason == "reasons.packed_not_kept"
    assert [file.name for file in world.packed_dir.glob("*/*")] == ["checkpoint.json"]


def test_changed_weights_are_packed_anew_and_the_old_ones_go(world: World, model: Path) -> None:
    world.open(model)
    before = world.files()
    weights = model / "pytorch_model.bin"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    world.open(model)
    assert world.packs > 0
    assert len(world.files()) == 1
    assert world.files() != before


def test_another_order_or_version_is_packed_anew(
    world: World, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.open(model)
    monkeypatch.setattr(prepare, "order_of", lambda kernels: "another")
    world.open(model)
    assert world.packs > 0
    monkeypatch.setattr(prepare, "__version__", "9.9")
    world.open(model)
    assert world.packs > 0
    assert len(world.files()) == 1


def test_the_order_has_one_name_on_every_target(kernels: Kernels) -> None:
    portable = load(kernel_folder(), 1, "portable").kernels
    assert portable is not None
    assert prepare.order_of(portable) == prepare.order_of(kernels)


# Whose they are, and when they go


def written(folder: Path, **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": b"{}", "model.safetensors": b"weights"}.items():
        (folder / name).write_bytes(files.get(name.partition(".")[0], content))
    return folder


def test_a_manifest_vouches_for_a_copy(tmp_path: Path) -> None:
    names = []
    for name in ("a", "b"):
        folder = written(tmp_path / name)
        stored = manifest.Stored(len(b"weights"), "0" * 64)
        manifest.write(folder, manifest.Manifest(name, "here", files={"model.safetensors": stored}))
        names.append(packed.identity(folder))
    assert names[0] == names[1]
    younger = time.time_ns() + 10**10
    os.utime(tmp_path / "b" / "model.safetensors", ns=(younger, younger))
    assert packed.identity(tmp_path / "b") != names[0]
    (tmp_path / "a" / "glmui.json").write_text("{broken")
    assert packed.identity(tmp_path / "a") != names[0]


def test_a_changed_config_is_another_checkpoint(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    before = packed.identity(folder)
    written(folder, config=b'{"num_layers": 2}', model=b"weights")
    assert packed.identity(folder) != before


def test_tidying_keeps_what_is_in_use(tmp_path: Path) -> None:
    stay, gone = written(tmp_path / "stay"), written(tmp_path / "gone")
    kept, lost = (packed.folder_for(tmp_path / "packed", folder) for folder in (stay, gone))
    old, young = kept / "int4.packed.x.unfinished", kept / "int4.packed.y.unfinished"
    for file in (old, young, kept / "int4.packed", lost / "int4.packed"):
        file.write_bytes(b"x" * 10)
    os.utime(old, (0, 0))
    nameless = tmp_path / "packed" / "nameless"
    nameless.mkdir()
    (gone / "model.safetensors").unlink()
    packed.tidy(tmp_path / "packed")
    assert not lost.exists()
    assert nameless.exists()
    assert {file.name for file in kept.iterdir()} == {"checkpoint.json", "int4.packed", young.name}
    assert (kept / "int4.packed").stat().st_size == 10
    os.utime(nameless, (0, 0))
    packed.tidy(tmp_path / "packed")
    assert not nameless.exists()


def test_packed_weights_go_with_their_model(tmp_path: Path) -> None:
    mine, other = written(tmp_path / "mine"), written(tmp_path / "other")
    for folder in (mine, other):
        (packed.folder_for(tmp_path / "packed", folder) / "int4.packed").write_bytes(b"x")
    packed.remove_packed(tmp_path / "packed", mine)
    assert [file.parent.name for file in (tmp_path / "packed").glob("*/*.packed")] == [packed.identity(other)]
    (other / "config.json").unlink()  # the model may be gone already
    packed.remove_packed(tmp_path / "packed", other)
    assert list((tmp_path / "packed").iterdir()) == []
    packed.remove_packed(tmp_path / "nowhere", mine)


# The file


def small_layer(rows: int = 40, columns: int = 64, fill: int = 1) -> PackedLayer:
    weight = torch.full((packed_bytes(rows, columns, 8),), fill, dtype=torch.uint8)
    return PackedLayer(Packed(weight, torch.ones(-(-rows // 32), 1, 32), 8, rows, columns), torch.ones(rows))


def test_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write(file, "me", [("a", small_layer(fill=3)), ("b", small_layer(fill=5))])
    found = read(file, "me", threads=2)
    assert list(found) == ["a", "b"]
    assert found["b"].packed.weight.unique().tolist() == [5]
    assert found["b"].bias is not None
    assert found["b"].bias.tolist() == [1.0] * 40
    assert file.stat().st_size <= 2 * room_for(40, 64, 8)
    with pytest.raises(NotUsable):
        read(file, "another")


def test_a_table_that_lies_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "f"
    layer = small_layer()
    larger = PackedLayer(Packed(layer.packed.weight, layer.packed.scale, 8, 4000, 64), None)
    write(file, "me", [("a", larger)])
    with pytest.raises(NotUsable):
        read(file, "me")
    strange = json.dumps({"made_of": "me", "layers": {"a": {"weight": [0, 1 << 60, 0]}}}).encode()
    file.write_bytes(
        strange + packed_file._END.pack(len(strange), packed_file.zlib.crc32(strange), packed_file._MARK)
    )
    with pytest.raises(NotUsable):
        read(file, "me")


_WRITING = """
import sys
from pathlib import Path
from tests.test_packed import small_layer
from glmui.quant.packed_file import write

big = small_layer(2048, 2048)
while True:
    print(flush=True)
    write(Path(sys.argv[1]), "me", [("a", big), ("b", big)])
"""


def test_killed_at_any_time_leaves_nothing_that_is_trusted_wrongly(tmp_path: Path) -> None:
    file = tmp_path / "f"
    command = [sys.executable, "-c", _WRITING, str(file)]
    root = Path(__file__).resolve().parent.parent
    writers = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in "12"]
    for turns, writer in zip((1, 3), writers, strict=True):
        assert writer.stdout is not None
        for _ in range(turns):
            assert writer.stdout.readline()
        writer.kill()
        writer.communicate()
    if file.exists():
        assert read(file, "me")["b"].packed.weight.unique().tolist() == [1]
    write(file, "me", [("a", small_layer())])
    assert list(read(file, "me")) == ["a"]
