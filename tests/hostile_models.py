"""Model folders that nobody should have to fear: what is wrong with each, and by which code it is told.

Each begins as a whole tiny ChatGLM-6B in the published layout (a link to every file, so files are replaced
and never written into). Programs in them, were they ever run, would leave a file RAN beside the folder.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.chatglm_fixture import EMBEDDING, tensors

NORM = "transformer.layers.0.input_layernorm.weight"
LINEAR = "transformer.layers.0.mlp.dense_h_to_4h.weight"

CASES: dict[str, tuple[Callable[[Path], None], str]] = {}


def case(code: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(damage: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[damage.__name__] = (damage, code)
        return damage

    return add


# Tools


def put(folder: Path, name: str, content: bytes | str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def save(folder: Path, value: object) -> None:
    (folder / "pytorch_model.bin").unlink()
    torch.save(value, folder / "pytorch_model.bin")


def changed(folder: Path, **changes: torch.Tensor | None) -> None:
    state = {**tensors("int4"), **changes}
    save(folder, {name: tensor for name, tensor in state.items() if tensor is not None})


def box(folder: Path, entries: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> None:
    (folder / "pytorch_model.bin").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", how) as made:
        for name, content in entries:
            made.writestr(name, content)


def box_of(folder: Path, text: bytes, how: int = zipfile.ZIP_STORED) -> None:
    box(folder, [("m/data.pkl", text), ("m/version", b"3\n"), ("m/data/0", bytes(64))], how)


def pickled(folder: Path, text: bytes) -> None:
    """A pickle put together by hand: protocol 2, the operations given, STOP."""
    box_of(folder, b"\x80\x02" + text + b".")


def patched(folder: Path, place_in_entry: int, value: bytes) -> None:
    """Write into the last entry of the ZIP's table of contents."""
    file = folder / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    place = content.rfind(b"PK\x01\x02") + place_in_entry
    content[place : place + len(value)] = value
    file.write_bytes(content)


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 16) -> bytes:
    """{NORM: a float32 tensor of that form in a storage of `count` elements}, as torch.save writes it."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def several(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    name = NORM.encode()
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    arguments = b"(" + storage + number(offset) + several(shape) + several(stride) + b"\x89}t"
    return (
        b"}X"
        + struct.pack("<I", len(name))
        + name
        + b"ctorch._utils\n_rebuild_tensor_v2\n"
        + arguments
        + b"Rs"
    )


class Program:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def ran(folder: Path) -> str:
    return str(folder.parent / "RAN")


def header(folder: Path, text: bytes, data: bytes = b"", length: int | None = None) -> None:
    """Replace the weights by a safetensors file put together by hand."""
    (folder / "pytorch_model.bin").unlink()
    start = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(start + text + data)


def entries(folder: Path, **places: tuple[str, list[int], list[int]]) -> None:
    form = ("dtype", "shape", "data_offsets")
    named = {name: dict(zip(form, place, strict=True)) for name, place in places.items()}
    header(folder, json.dumps(named).encode(), bytes(64))


# Pickles that would run something


@case("model_file_program")
def os_system(folder: Path) -> None:
    save(folder, {NORM: Program(os.system, f"touch {ran(folder)}")})


@case("model_file_program")
def builtins_eval(folder: Path) -> None:
    save(folder, {NORM: Program(eval, f"open({ran(folder)!r}, 'w')")})


@case("model_file_program")
def builtins_exec(folder: Path) -> None:
    save(folder, {NORM: Program(exec, f"open({ran(folder)!r}, 'w')")})


@case("model_file_program")
def opens_a_file(folder: Path) -> None:
    save(folder, {NORM: Program(open, ran(folder), "w")})


@case("model_file_program")
def a_shell(folder: Path) -> None:
    pickled(folder, b"csubprocess\nPopen\n(]X\x02\0\0\0idatR")


@case("model_file_program")
def getattr_to_reach_anything(folder: Path) -> None:
    save(folder, {NORM: Program(getattr, Program(__import__, "os"), "system")})


@case("model_file_program")
def deep_inside(folder: Path) -> None:
    save(folder, {NORM: [[({"x": [Program(os.system, f"touch {ran(folder)}")]},)]]})


@case("model_file_program")
def behind_the_tensors(folder: Path) -> None:
    save(folder, {**tensors("int4"), "extra": Program(os.system, f"touch {ran(folder)}")})


@case("model_file_program")
def torchs_own_loader(folder: Path) -> None:
    pickled(folder, b"ctorch.serialization\nload\nX\x05\0\0\0/dev/\x85R")


@case("model_file_program")
def a_tensor_subclass(folder: Path) -> None:
    pickled(folder, b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nexec\nNNNtR")


@case("model_file_program")
def numpys_rebuilder(folder: Path) -> None:
    pickled(folder, b"cnumpy.core.multiarray\n_reconstruct\n)R")


@case("model_file_program")
def a_name_with_tricks(folder: Path) -> None:
    pickled(folder, b"cos;\x1b[2J<b>\nsystem\n)R")


@case("model_file_refused")
def a_name_put_together(folder: Path) -> None:
    box_of(folder, pickle.dumps({NORM: Program(os.system, f"touch {ran(folder)}")}, protocol=4))


@case("model_file_refused")
def an_instance(folder: Path) -> None:
    pickled(folder, b"(X\x02\0\0\0idios\nsystem\n")


@case("model_file_refused")
def an_extension_code(folder: Path) -> None:
    pickled(folder, b"\x82\x01)R")


# Pickles of something else


@case("model_file_refused")
def no_tensors(folder: Path) -> None:
    save(folder, {NORM: "text"})


@case("model_file_refused")
def a_list(folder: Path) -> None:
    save(folder, [torch.zeros(2)])


@case("model_file_program")
def sparse(folder: Path) -> None:
    save(folder, {NORM: torch.zeros(32).to_sparse()})


@case("model_file_program")
def on_no_device(folder: Path) -> None:
    save(folder, {NORM: torch.zeros(32, device="meta")})


@case("model_file_program")
def quantised_by_torch(folder: Path) -> None:
    pickled(folder, b"ctorch._utils\n_rebuild_qtensor\n)R")


@case("model_file_cut")
def a_huge_shape(folder: Path) -> None:
    pickled(folder, tensor_pickle((1 << 20, 1 << 20), (1 << 20, 1)))


@case("model_file_cut")
def a_shape_beyond_64_bits(folder: Path) -> None:
    pickled(folder, tensor_pickle((1 << 62, 1 << 62), (1, 1)))


@case("model_file_cut")
def a_negative_stride(folder: Path) -> None:
    pickled(folder, tensor_pickle((4,), (-1,), offset=8))


@case("model_file_cut")
def outside_its_storage(folder: Path) -> None:
    pickled(folder, tensor_pickle((4,), (1,), offset=1 << 40))


@case("model_file_cut")
def a_storage_larger_than_the_file(folder: Path) -> None:
    pickled(folder, tensor_pickle((1 << 30,), (1,), count=1 << 30))


@case("model_file_strange")
def one_row_for_all(folder: Path) -> None:
    changed(folder, **{EMBEDDING: torch.zeros(1, 32, dtype=torch.float16).expand(130528, 32)})


@case("model_file_strange")
def one_storage_for_all(folder: Path) -> None:
    pool = torch.zeros(130528 * 32, dtype=torch.float16)
    same = {f"{EMBEDDING}.{number}": pool.view(130528, 32) for number in range(200)}
    save(folder, same)


@case("model_file_cut")
def noise_for_a_pickle(folder: Path) -> None:
    box_of(folder, bytes(range(256)))


@case("model_file_cut")
def half_a_pickle(folder: Path) -> None:
    box_of(folder, pickle.dumps({NORM: [1, 2, 3]}, protocol=2)[:-4])


@case("model_file_strange")
def an_endless_pickle(folder: Path) -> None:
    box_of(folder, b"\x80\x02" + b"]" * (3 << 20) + b".")


# Tensors that no such model has


@case("model_not_finite")
def not_a_number(folder: Path) -> None:
    norm = tensors("int4")[NORM].clone()
    norm[-1] = float("nan")
    changed(folder, **{NORM: norm})


@case("model_not_finite")
def infinite(folder: Path) -> None:
    table = tensors("int4")[EMBEDDING].clone()
    table[-1, -1] = float("-inf")
    changed(folder, **{EMBEDDING: table})


@case("model_tensors")
def another_dtype(folder: Path) -> None:
    changed(folder, **{LINEAR: tensors("int4")[LINEAR].to(torch.int64)})


@case("model_tensors")
def complex_numbers(folder: Path) -> None:
    changed(folder, **{NORM: tensors("int4")[NORM].double()})


@case("model_tensors")
def another_shape(folder: Path) -> None:
    changed(folder, **{NORM: torch.zeros(33, dtype=torch.float16)})


@case("model_tensors")
def one_missing(folder: Path) -> None:
    changed(folder, **{NORM: None})


@case("model_tensors")
def one_too_many(folder: Path) -> None:
    changed(folder, **{"transformer.layers.0.evil": torch.zeros(3)})


# ZIPs


@case("model_file_strange")
def a_bomb(folder: Path) -> None:
    box_of(folder, bytes(64 << 20), zipfile.ZIP_DEFLATED)


@case("model_file_strange")
def an_entry_above_the_folder(folder: Path) -> None:
    box(folder, [("m/data.pkl", b"\x80\x02}."), ("m/../../RAN", b"x")])


@case("model_file_strange")
def an_entry_at_the_root(folder: Path) -> None:
    box(folder, [("/data.pkl", b"\x80\x02}."), ("/version", b"3")])


@case("model_file_strange")
def two_pickles(folder: Path) -> None:
    box(folder, [("m/data.pkl", b"\x80\x02}."), ("n/data.pkl", b"\x80\x02}.")])


@case("model_file_strange")
def a_program_beside(folder: Path) -> None:
    box(folder, [("m/data.pkl", b"\x80\x02}."), ("m/code/__torch__.py", b"import os")])


@case("model_file_strange")
def a_hundred_thousand_entries(folder: Path) -> None:
    box(folder, [("m/data.pkl", b"\x80\x02}.")])
    file = folder / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    place = content.rfind(b"PK\x05\x06") + 12
    content[place : place + 4] = struct.pack("<I", 1 << 30)
    file.write_bytes(content)


@case("model_file_strange")
def an_entry_larger_than_the_file(folder: Path) -> None:
    box_of(folder, b"\x80\x02}.")
    patched(folder, 20, struct.pack("<II", 1 << 31, 1 << 31))


@case("model_file_strange")
def an_encrypted_entry(folder: Path) -> None:
    box_of(folder, b"\x80\x02}.")
    patched(folder, 8, b"\x01")


@case("model_file_strange")
def an_empty_box(folder: Path) -> None:
    box(folder, [])


# Something else in a weight file's place


@case("model_lfs_pointer")
def a_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3893080607\n"
    put(folder, "pytorch_model.bin", text)


@case("model_file_page")
def a_web_page(folder: Path) -> None:
    put(folder, "pytorch_model.bin", "<!DOCTYPE html><html><title>Sign in</title></html>")


@case("model_file_answer")
def an_error_message(folder: Path) -> None:
    put(folder, "pytorch_model.bin", '{"error":"Repository not found"}')


@case("model_file_old")
def an_old_pickle(folder: Path) -> None:
    content = io.BytesIO()
    torch.save({NORM: torch.zeros(2)}, content, _use_new_zipfile_serialization=False)
    put(folder, "pytorch_model.bin", content.getvalue())


@case("model_file_old")
def a_bare_pickle(folder: Path) -> None:
    put(folder, "pytorch_model.bin", pickle.dumps(Program(os.system, f"touch {ran(folder)}")))


@case("model_file_archive")
def a_tar(folder: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as made:
        made.addfile(tarfile.TarInfo("../../RAN"))
    put(folder, "pytorch_model.bin", content.getvalue())


@case("model_file_archive")
def gzipped(folder: Path) -> None:
    put(folder, "pytorch_model.bin", gzip.compress((folder / "config.json").read_bytes()))


@case("model_file_cut")
def empty(folder: Path) -> None:
    put(folder, "pytorch_model.bin", b"")


@case("model_file_cut")
def cut(folder: Path) -> None:
    put(folder, "pytorch_model.bin", (folder / "pytorch_model.bin").read_bytes()[:-100_000])


@case("model_file_cut")
def zeros(folder: Path) -> None:
    put(folder, "pytorch_model.bin", bytes(100_000))


# Names that lead elsewhere


@case("import_not_a_file")
def a_link_out_of_the_folder(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/passwd")


@case("import_not_a_file")
def weights_without_end(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin").symlink_to("/dev/zero")


@case("import_not_a_file")
def a_pipe(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    os.mkfifo(folder / "pytorch_model.bin")


@case("import_not_a_file")
def a_circle_of_links(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin").symlink_to("pytorch_model.bin")


@case("model_file_broken")
def an_index_out_of_the_folder(folder: Path) -> None:
    put(folder, "pytorch_model.bin.index.json", json.dumps({"weight_map": {NORM: "../../etc/passwd"}}))


@case("model_file_missing")
def an_index_of_nothing(folder: Path) -> None:
    put(folder, "pytorch_model.bin.index.json", json.dumps({"weight_map": {NORM: "model-7-of-9.bin"}}))


@case("model_file_broken")
def an_index_that_is_a_list(folder: Path) -> None:
    put(folder, "pytorch_model.bin.index.json", "[1, 2]")


# Small files


@case("model_file_broken")
def a_config_in_a_config(folder: Path) -> None:
    put(folder, "config.json", '{"a":' * 100_000 + "1" + "}" * 100_000)


@case("model_file_broken")
def a_number_of_a_million_digits(folder: Path) -> None:
    put(folder, "config.json", '{"model_type": "chatglm", "hidden_size": ' + "9" * 1_000_000 + "}")


@case("import_file_too_long")
def a_config_of_many_megabytes(folder: Path) -> None:
    put(folder, "config.json", b'{"x": "' + bytes(4 << 20) + b'"}')


@case("model_config_bad")
def sizes_beyond_reason(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    put(folder, "config.json", json.dumps({**values, "num_layers": 10**9}))


@case("model_config_bad")
def an_infinite_size(folder: Path) -> None:
    text = (folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 1e999')
    put(folder, "config.json", text)


@case("model_wrong_vocabulary")
def no_vocabulary(folder: Path) -> None:
    put(folder, "ice_text.model", os.urandom(5000))


@case("model_wrong_vocabulary")
def half_a_vocabulary(folder: Path) -> None:
    put(folder, "ice_text.model", (folder / "ice_text.model").read_bytes()[:100_000])


@case("model_not_loadable")
def a_model_with_code_of_its_own(folder: Path) -> None:
    from tests.tiny_llama import TEMPLATE, make_tokenizer

    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    put(folder, "config.json", json.dumps({
        "model_type": "evil", "architectures": ["EvilForCausalLM"], "auto_map": own,
    }))  # fmt: skip
    put(folder, "evil.py", f"open({ran(folder)!r}, 'w')\n")
    put(folder, "tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    entries(folder, a=("F32", [16], [0, 64]))


# Safetensors


@case("model_file_cut")
def a_header_longer_than_the_file(folder: Path) -> None:
    header(folder, b"{}", length=1 << 63)


@case("model_file_cut")
def a_header_of_no_length(folder: Path) -> None:
    header(folder, b"", length=0)


@case("model_file_strange")
def a_header_of_a_hundred_megabytes(folder: Path) -> None:
    header(folder, b"{}", length=100 << 20)
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(101 << 20)


@case("model_file_strange")
def a_header_that_is_no_json(folder: Path) -> None:
    header(folder, b"import os; os.system('id')")


@case("model_file_strange")
def a_header_in_a_header(folder: Path) -> None:
    header(folder, b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


@case("model_file_strange")
def a_name_twice(folder: Path) -> None:
    one = b'"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}'
    header(folder, b"{" + one + b"," + one + b"}", bytes(32))


@case("model_file_cut")
def tensors_that_overlap(folder: Path) -> None:
    entries(folder, a=("F32", [8], [0, 32]), b=("F32", [12], [16, 64]))


@case("model_file_cut")
def tensors_beyond_the_end(folder: Path) -> None:
    entries(folder, a=("F32", [1 << 40], [0, 1 << 42]))


@case("model_file_cut")
def a_hole_between_tensors(folder: Path) -> None:
    entries(folder, a=("F32", [4], [0, 16]), b=("F32", [4], [48, 64]))


@case("model_file_cut")
def offsets_that_run_backwards(folder: Path) -> None:
    entries(folder, a=("F32", [16], [64, 0]))


@case("model_file_cut")
def a_negative_shape(folder: Path) -> None:
    entries(folder, a=("F32", [-4, -4], [0, 64]))


@case("model_file_cut")
def a_shape_that_overflows(folder: Path) -> None:
    entries(folder, a=("F32", [1 << 62, 4, 1 << 62], [0, 64]))


@case("model_file_cut")
def a_dtype_of_its_own(folder: Path) -> None:
    entries(folder, a=("EVIL", [16], [0, 64]))


@case("model_file_cut")
def a_zip_for_safetensors(folder: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
