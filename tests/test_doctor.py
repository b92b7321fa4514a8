"""Every kind of finding, provoked: by real files, sockets and processes where that can be, by a fact of the
world where it cannot."""

from __future__ import annotations

import ast
import http.client
import importlib.util
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from glmui import i18n, listen
from glmui.doctor import (
    checks_data,
    checks_machine,
    checks_model,
    checks_plan,
    checks_python,
    checks_torch,
    report,
)
from glmui.doctor.ask import Report, ask
from glmui.doctor.examine import CHECKS, Check, examine, mend
from glmui.doctor.finding import Finding, ok, problem
from glmui.doctor.world import Memory, World, read_settings
from glmui.meter import Card, Reading
from glmui.settings import Settings
from glmui.store import Store
from glmui.ui import present_doctor
from tests.chatglm_fixture import copy_checkpoint

ROOT = Path(__file__).resolve().parent.parent
GB = 10**9
POSIX = pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")

TORCH = {
    "doing": "", "version": "2.13.0+cpu", "build": None, "features": ["avx2"], "cpu": "Test 9000",
    "machine": "x86_64", "visible": False, "words": "", "architectures": [], "cards": [],
    "kernel": "avx2", "reason": "reasons.kernels", "folder": "/nowhere", "said": "", "card_kernels": [],
}  # fmt: skip
CARD = {"name": "RTX 3060", "capability": [8, 6], "total": 6 * GB, "free": 5 * GB}
ON_CARD = {"build": "12.6", "visible": True, "architectures": ["sm_80", "compute_90"], "cards": [CARD]}


class NVMLError_LibraryNotFound(Exception):
    """Named as pynvml's is."""


def no_driver() -> None:
    raise NVMLError_LibraryNotFound


def nvml(cuda: int = 12080, **others: Any) -> SimpleNamespace:
    """pynvml's functions on a machine with one card."""
    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "570.10",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetName": lambda handle: b"RTX 3060",
    }
    return SimpleNamespace(**{**functions, **others})


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A machine on which all is well."""
    data, home = tmp_path / "data", tmp_path / "home"
    data.mkdir(mode=0o700)
    home.mkdir()
    (home / "requirements.txt").write_text("# what runs it\ntorch==2.13.0\ngradio==6.31.0\n")
    return World(
        settings=Settings(data_dir=data, port=free_port()),
        home=home,
        environ={"PATH": os.environ["PATH"]},
        platform="linux",
        python=(3, 12, 1),
        bits=64,
        separate=True,
        encoding="utf-8",
        version_of={"torch": "2.13.0+cpu", "gradio": "6.31.0"}.get,
        torch=lambda: Report(TORCH),
        packages=lambda: Report({"doing": "", "failed": {}}),
        nvml=SimpleNamespace(nvmlInit=no_driver),
        pci=tmp_path / "pci",
        memory=lambda: Memory(16 * GB, 12 * GB, 4 * GB),
        free_bytes=lambda folder: 100 * GB,
        filesystem_of=lambda folder: "ext4",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_torch(world: World, ending: str = "", **facts: Any) -> World:
    return replace(world, torch=lambda: Report({**TORCH, **facts}, ending))


def with_settings(world: World, **changes: Any) -> World:
    return replace(world, settings=world.settings.model_copy(update=changes))


def found(check: Check, world: World) -> list[str]:
    """The keys of what a check found; each finding says all it has to in both languages."""
    findings = list(check(world))
    for finding in findings:
        assert_told(finding)
    return [finding.key for finding in findings]


def assert_told(finding: Finding) -> None:
    for language in i18n.LANGUAGES:
        said = [finding.title(language), finding.detail(language)]
        said += [finding.cure(language)] if finding.status != "ok" else []
        said += [finding.mended(language)] if finding.mend else []
        for words in said:
            assert words, finding
            assert not re.search(r"\{\w+\}|doctor\.", words), words


# The whole


def test_on_a_sound_machine_all_is_well(world: World) -> None:
    findings = examine(world)
    worse = [(f.name, f.detail("en")) for f in findings if f.status != "ok"]
    assert worse == [("model", "No model is chosen yet.")]
    quiet = {"vocabulary", "weights", "plan", "card_kernels"}  # where there is neither a model nor a card
    assert {f.name for f in findings} | quiet >= {check.__name__ for check in CHECKS}


def keys_in_the_code() -> dict[str, set[str]]:
    """The keys given to ok(), warning() and problem() as they stand in the source."""
    keys: dict[str, set[str]] = {"ok": set(), "warning": set(), "problem": set()}
    for file in (ROOT / "glmui" / "doctor").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in keys:
                parts = [part for argument in node.args[1:2] for part in ast.walk(argument)]
                literal = [part.value for part in parts if isinstance(part, ast.Constant)]
                keys[node.func.id] |= {value for value in literal if isinstance(value, str) and "_" in value}
    return keys


def test_every_key_has_its_words() -> None:
    keys = keys_in_the_code()
    words = {name.removeprefix("doctor.") for name in i18n.table("en")}
    whole = {key for keys in keys.values() for key in keys if not key.endswith("_")}
    assert len(whole) > 60
    assert {key for key in whole if f"found.{key}" not in words} == {"not_mended"}, "said by mended alone"
    bad = {key for key in keys["problem"] if not key.endswith("_")}
    assert {key for key in bad if f"cures.{key}" not in words} == set()
    assert all(name.replace("cures.", "found.") in words for name in words if name.startswith("cures."))


def test_the_document_tells_every_finding_and_its_cure() -> None:
    document = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    words = i18n.table("en")
    for name in words:
        key = name.removeprefix("doctor.cures.")
        if key != name:
            assert f"| {words[f'doctor.found.{key}']} |" in document, key
            assert words[name] == "{error}" or f"| {words[name]} |" in document, key


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(world: World) -> None:
    def disk(world: World) -> Iterator[Finding]:
        yield from ()
        raise PermissionError("no way in")

    def memory(world: World) -> Iterator[Finding]:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401

        yield from ()

    findings = examine(world, (disk, memory, checks_python.python))
    assert [f.key for f in findings] == ["not_looked", "needs_package", "python_fine"]
    assert "no way in" in findings[0].detail("en")
    for finding in findings:
        assert_told(finding)


# Python and packages


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"python": (3, 10, 9)}, "python_version"),
        ({"python": (3, 14, 0)}, "python_version"),
        ({"bits": 32}, "python_32_bits"),
    ],
)
def test_a_python_that_does_not_do(world: World, facts: dict[str, Any], key: str) -> None:
    assert found(checks_python.python, replace(world, **facts)) == [key]


def test_packages_shared_with_other_programs(world: World) -> None:
    assert found(checks_python.environment, replace(world, separate=False)) == ["environment_shared"]


def test_packages_missing_or_other_than_tested(world: World) -> None:
    missing = replace(world, version_of={"torch": "2.12.0+cpu"}.get)
    findings = list(checks_python.packages(missing))
    assert [f.key for f in findings] == ["package_missing", "packages_other"]
    assert "gradio==6.31.0" in findings[0].cure("en")
    assert "torch 2.12.0+cpu (2.13.0)" in findings[1].detail("en")
    (world.home / "requirements.txt").unlink()
    assert found(checks_python.packages, world) == ["packages_unpinned"]


@contextmanager
def stand_ins(folder: Path, **modules: str) -> Iterator[dict[str, str]]:
    """An environment in which these modules are what their source says."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    yield {**os.environ, "PYTHONPATH": str(folder)}


CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "import time; time.sleep(60)"
MISSING = "raise ModuleNotFoundError('No module named ' + __name__, name=__name__)"


@POSIX
def test_imports_that_fail_crash_or_hang(world: World, tmp_path: Path) -> None:
    with stand_ins(tmp_path, breaks="raise OSError('libfoo.so: bad')", dies=CRASHES, hangs=HANGS) as environ:
        look = partial(ask, "glmui.doctor.imports", environ=environ)
        crashed = look("json", "breaks", "dies")
        hung = look("hangs", seconds=0.7)
        broken = look("breaks", "json")
    assert found(checks_python.imports, replace(world, packages=lambda: crashed)) == ["import_crashes"]
    assert (crashed.doing, crashed.ending) == ("dies", "SIGSEGV")
    assert found(checks_python.imports, replace(world, packages=lambda: hung)) == ["import_hangs"]
    findings = list(checks_python.imports(replace(world, packages=lambda: broken)))
    assert [f.key for f in findings] == ["import_fails"]
    assert "libfoo.so" in findings[0].detail("zh")


@pytest.mark.parametrize(
    ("facts", "key"),
    [
        ({"encoding": "gbk"}, "terminal_other"),
        ({"encoding": "cp936", "platform": "win32"}, "terminal_windows"),
        ({"encoding": "ANSI_X3.4-1968"}, "terminal_other"),
        ({"encoding": "UTF8"}, "terminal_fine"),
    ],
)
def test_a_terminal_that_cannot_show_everything(world: World, facts: dict[str, Any], key: str) -> None:
    assert found(checks_python.terminal, replace(world, **facts)) == [key]
    assert list(checks_python.terminal(replace(world, encoding=""))) == []


# torch, card, kernels


@POSIX
@pytest.mark.parametrize(
    ("source", "key"),
    [
        (MISSING, "torch_missing"),
        ("raise ImportError('libcudart.so.12: cannot open')", "torch_broken"),
        (CRASHES, "torch_crashes"),
        (HANGS, "torch_hangs"),
    ],
)
def test_a_torch_that_cannot_be_imported(world: World, tmp_path: Path, source: str, key: str) -> None:
    with stand_ins(tmp_path, torch=source) as environ:
        seconds = 0.7 if source == HANGS else 20
        told = ask("glmui.engine.torch_facts", environ=environ, seconds=seconds)
    broken = replace(world, torch=lambda: told)
    assert found(checks_torch.torch, broken) == [key]
    for check in (checks_torch.cuda, checks_torch.cpu, checks_torch.kernels, checks_torch.card_kernels):
        assert list(check(broken)) == [], "one cause, one finding"


def test_what_torch_really_tells_is_what_the_checks_read(world: World, tmp_path: Path) -> None:
    environ = dict(os.environ)
    if not importlib.util.find_spec("ziglang"):  # nothing is compiled then, which takes a while
        environ |= {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    told = ask("glmui.engine.torch_facts", environ=environ)
    assert (told.ending, told.doing) == ("", "")
    assert set(told.facts) == set(TORCH)
    real = replace(world, torch=lambda: told)
    for check in (checks_torch.torch, checks_torch.cuda, checks_torch.cpu, checks_torch.kernels):
        assert len(found(check, real)) >= 1


def test_what_the_driver_tells(world: World) -> None:
    assert found(checks_torch.driver, world) == ["driver_none"]
    assert found(checks_torch.driver, replace(world, nvml=nvml())) == ["driver_fine"]

    def mismatch() -> None:
        raise RuntimeError("Driver/library version mismatch")

    assert found(checks_torch.driver, replace(world, nvml=nvml(nvmlInit=mismatch))) == ["driver_refuses"]

    def gone() -> None:
        raise ModuleNotFoundError("No module named 'pynvml'")

    assert found(checks_torch.driver, replace(world, nvml=nvml(nvmlInit=gone))) == ["nvml_missing"]


def test_a_card_without_a_driver(world: World) -> None:
    device = world.pci / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x040300\n")  # its sound
    assert found(checks_torch.driver, world) == ["driver_none"]
    (device / "class").write_text("0x030000\n")
    assert found(checks_torch.driver, world) == ["driver_missing"]


@pytest.mark.parametrize(
    ("facts", "others", "key"),
    [
        ({}, {}, "cuda_none"),
        ({}, {"nvml": nvml()}, "cuda_cpu_build"),
        ({"build": "12.6"}, {"nvml": nvml(), "environ": {"CUDA_VISIBLE_DEVICES": ""}}, "cuda_hidden"),
        ({"build": "13.0"}, {"nvml": nvml(12080)}, "cuda_driver_old"),
        ({"build": "12.6", "words": "CUDA unknown error"}, {"nvml": nvml()}, "cuda_fails"),
        (ON_CARD, {"nvml": nvml()}, "cuda_fine"),
        ({**ON_CARD, "cards": [{**CARD, "capability": [3, 5]}]}, {}, "cuda_architecture"),
        ({**ON_CARD, "cards": [{**CARD, "error": "CUDA error: 999"}]}, {}, "cuda_fails"),
    ],
)
def test_why_the_card_is_used_or_not(
    world: World, facts: dict[str, Any], others: dict[str, Any], key: str
) -> None:
    assert found(checks_torch.cuda, replace(with_torch(world, **facts), **others)) == [key]


def test_a_device_that_is_wished_for_and_not_there(world: World) -> None:
    assert found(checks_torch.cuda, with_settings(world, device="cuda:0")) == ["cuda_wished"]


def test_a_card_that_ends_or_holds_the_process_when_asked(world: World) -> None:
    crashed = with_torch(world, "SIGABRT", doing="cuda", kernel=None)
    assert found(checks_torch.cuda, crashed) == ["cuda_crashes"]
    assert found(checks_torch.cuda, with_torch(world, "time", doing="cuda")) == ["cuda_hangs"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ([8, 6], ["sm_80"], True),
        ([8, 0], ["sm_86"], False),
        ([12, 0], ["sm_90", "compute_90"], True),
        ([12, 0], ["sm_90a", "sm_100"], False),
        ([5, 2], ["sm_50", "sm_60"], True),
        ([3, 5], ["sm_50", "compute_50"], False),
        ([9, 0], [], True),
    ],
)
def test_which_cards_a_build_runs_on(capability: list[int], architectures: list[str], runs: bool) -> None:
    assert checks_torch.runs_on(capability, architectures) is runs


def test_an_old_processor(world: World) -> None:
    assert found(checks_torch.cpu, with_torch(world, features=[])) == ["cpu_old"]
    assert found(checks_torch.cpu, with_torch(world, features=[], machine="aarch64")) == ["cpu_fine"]


@pytest.mark.skipif(bool(importlib.util.find_spec("ziglang")), reason="ziglang stands in for a compiler")
def test_no_compiler(world: World, tmp_path: Path) -> None:
    assert found(checks_torch.compiler, replace(world, environ={"PATH": str(tmp_path)})) == [
        "compiler_missing"
    ]


@pytest.mark.parametrize(
    ("facts", "ending", "key"),
    [
        ({"kernel": "torch", "reason": "reasons.kernels_no_compiler"}, "", "kernels_no_compiler"),
        ({"kernel": "torch", "reason": "reasons.kernels_not_here"}, "", "kernels_not_here"),
        ({"kernel": "torch", "reason": "reasons.kernels_no_room"}, "", "kernels_no_room"),
        ({"kernel": "torch", "reason": "reasons.kernels_wrong"}, "", "kernels_wrong"),
        ({"doing": "kernels"}, "time", "kernels_slow"),
        ({"doing": "kernels"}, "SIGILL", "kernels_crash"),
    ],
)
def test_why_no_kernels_run(world: World, facts: dict[str, Any], ending: str, key: str) -> None:
    assert found(checks_torch.kernels, with_torch(world, ending, **facts)) == [key]


def test_kernels_that_cannot_be_built_say_what_the_compiler_said_and_are_built_anew(
    world: World, tmp_path: Path
) -> None:
    cache = tmp_path / "kernels"
    cache.mkdir()
    (cache / "kernels-1.so").write_bytes(b"half of a library")
    said = "kernels.c:1: error: no such header"
    facts = {"kernel": "torch", "reason": "reasons.kernels_not_built", "folder": str(cache), "said": said}
    findings = list(checks_torch.kernels(with_torch(world, **facts)))
    assert said in findings[0].detail("en")
    assert_told(findings[0])
    assert [f.key for f in mend(findings)] == ["kernels_not_built"]
    assert not cache.exists()


def on_card(reason: str, kernel: str = "torch", **others: str) -> dict[str, Any]:
    """What became of a card's kernels, as the process that tries them tells it."""
    about = {"card": "RTX 3060", "kernel": kernel, "reason": f"reasons.{reason}", "folder": "/no", "said": ""}
    return {**ON_CARD, "card_kernels": [{**about, **others}]}


def test_a_cards_kernels_are_told_by_name(world: World) -> None:
    real = with_torch(world, **on_card("card_kernels", "sm_86"))
    assert found(checks_torch.card_kernels, real) == ["card_kernels_fine"]
    [finding] = checks_torch.card_kernels(real)
    assert "RTX 3060 (sm_86)" in finding.detail("en")


@pytest.mark.parametrize(
    ("facts", "ending", "key"),
    [
        (on_card("card_kernels_old_card"), "", "card_kernels_old_card"),
        (on_card("card_kernels_other_card"), "", "card_kernels_other_card"),
        (on_card("card_kernels_no_nvrtc"), "", "card_kernels_no_nvrtc"),
        (on_card("card_kernels_no_room"), "", "card_kernels_no_room"),
        (on_card("card_kernels_not_compiled"), "", "card_kernels_not_compiled"),
        (on_card("card_kernels_not_loaded"), "", "card_kernels_not_loaded"),
        ({**ON_CARD, "doing": "card_kernels"}, "time", "card_kernels_slow"),
        ({**ON_CARD, "doing": "card_kernels"}, "SIGSEGV", "card_kernels_crash"),
    ],
)
def test_why_a_cards_kernels_do_not_run(world: World, facts: dict[str, Any], ending: str, key: str) -> None:
    assert found(checks_torch.card_kernels, with_torch(world, ending, **facts)) == [key]


@pytest.mark.parametrize("key", ["card_kernels_part", "card_kernels_wrong", "card_kernels_not_compiled"])
def test_kernels_that_fail_on_a_card_are_compiled_anew(world: World, tmp_path: Path, key: str) -> None:
    cache = tmp_path / "cuda"
    cache.mkdir()
    (cache / "sm_86.trying").write_text("xx")
    facts = on_card(key, folder=str(cache), said="linear_4_1_half is off by 0.7")
    findings = list(checks_torch.card_kernels(with_torch(world, **facts)))
    assert "off by 0.7" in findings[0].detail("en")
    assert_told(findings[0])
    assert [f.key for f in mend(findings)] == [key]
    assert not cache.exists()


# The machine


def model_folder(world: World, size: int) -> World:
    """A chosen model whose weights are of that size (of a file that takes no room)."""
    folder = world.data_dir / "models" / "some"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
    return with_settings(world, model="some")


@pytest.mark.parametrize(
    ("size", "key"),
    [(4, "memory_enough"), (11, "memory_taken"), (16, "memory_swaps"), (30, "memory_too_small")],
)
def test_memory_against_what_the_model_takes(world: World, size: int, key: str) -> None:
    chosen = model_folder(world, size * GB)
    assert found(checks_machine.memory, chosen) == [key]
    assert found(checks_machine.memory, with_torch(chosen, **ON_CARD)) == ["memory_fine"]


@pytest.mark.parametrize(
    ("free", "changes", "said"),
    [
        (6, {}, ("plan_fine", "ok", "All 28 layers on the card", "about 2,040 tokens")),
        (5.6, {}, ("plan_fine", "ok", "25 of 28 layers", "head_bits = 8")),
        (5, {"head_bits": 8, "kv_cache": "int8"}, ("plan_fine", "ok", "All 28 layers", "2,048 tokens")),
        (5.6, {"device": "cuda"}, ("plan_short", "warning", "As asked", "--context 1")),
        (None, {}, ("plan_fine", "ok", "No card", "about 2,040 tokens")),
    ],
)
def test_where_the_chosen_model_would_go(
    world: World, free: float | None, changes: dict[str, Any], said: tuple[str, str, str, str]
) -> None:
    chosen = with_settings(world, model=str(shape_of_chatglm(world)), **changes)
    if free is not None:
        chosen = with_torch(chosen, **{**ON_CARD, "cards": [{**CARD, "free": int(free * GB)}]})
    assert found(checks_plan.plan, chosen) == [said[0]]
    (finding,) = checks_plan.plan(chosen)
    assert finding.status == said[1]
    for words in said[2:]:
        assert words in finding.detail("en") + finding.cure("en")


def test_the_plan_shows_what_goes_where(world: World) -> None:
    card = {**CARD, "free": int(5.6 * GB)}
    chosen = with_torch(
        with_settings(world, model=str(shape_of_chatglm(world))), **{**ON_CARD, "cards": [card]}
    )
    (finding,) = checks_plan.plan(chosen)
    for language, words in (("en", "layers 0 to 24"), ("zh", "第 0 至 24 层")):
        rows = [row for row in finding.detail(language).splitlines() if words in row]
        assert len(rows) == 1
        assert re.search(r"cuda:0 +[\d,]+ MB$", rows[0])
    told = report.lines([finding], "en")
    (row,) = (line for line in "\n".join(told).splitlines() if "layers 25 to 27" in line)
    assert row.startswith(" " * 10), "below its sentence"
    assert "<br>" in present_doctor.findings([finding], "en")


def test_what_our_own_loaded_model_holds_is_free_for_the_next(world: World) -> None:
    """On the page, beside a loaded model that has filled the card and the RAM."""
    full = replace(world, memory=lambda: Memory(16 * GB, 2 * GB, 0))
    chosen = with_settings(full, model=str(shape_of_chatglm(full)))
    chosen = with_torch(chosen, **{**ON_CARD, "cards": [{**CARD, "free": 1 * GB}]})
    ours = Card(0, "", 5 * GB, 6 * GB, 5 * GB)
    reading = Reading((ours,), 14 * GB, 16 * GB, 9 * GB, "", 4 * GB)
    (short,) = checks_plan.plan(with_settings(chosen, device="cuda"))
    (well,) = checks_plan.plan(with_settings(replace(chosen, engine=reading), device="cuda"))
    assert (short.key, well.key) == ("plan_short", "plan_fine")
    on_cpu = with_settings(chosen, device="cpu")
    assert found(checks_plan.plan, on_cpu) == ["plan_short"]
    assert found(checks_plan.plan, replace(on_cpu, engine=reading)) == ["plan_fine"]
    large = model_folder(full, 4 * GB)
    assert found(checks_machine.memory, large) == ["memory_taken"]
    assert found(checks_machine.memory, replace(large, engine=reading)) == ["memory_loaded"]
    tight = replace(large, engine=replace(reading, engine_private=3 * GB))
    assert found(checks_machine.memory, tight) == ["memory_taken"], "pages of files are free already"


def test_where_no_plan_can_tell_the_others_do(world: World) -> None:
    for model in ("", "gone", "echo"):
        assert found(checks_plan.plan, with_settings(world, model=model)) == []
    chosen = with_settings(world, model=str(shape_of_chatglm(world)), device="cuda:3")
    assert found(checks_plan.plan, chosen) == []


def shape_of_chatglm(world: World) -> Path:
    """A folder that has no more of ChatGLM-6B-INT4 than its config.json."""
    folder = world.data_dir / "models" / "chatglm-6b-int4"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28, "num_attention_heads": 32}
    values = {"model_type": "chatglm", "vocab_size": 130528, "quantization_bit": 4, **sizes}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_room_on_the_disks(world: World) -> None:
    for free, key in ((100 * GB, "disk_fine"), (5 * GB, "disk_tight"), (GB // 10, "disk_full")):
        assert found(checks_machine.disk, replace(world, free_bytes=lambda _, free=free: free)) == [key]
    full = replace(world, free_bytes=lambda _: 1000)
    assert found(checks_machine.temporary, full) == ["temporary_full"]


def test_a_clock_that_stands_wrong(world: World) -> None:
    assert found(checks_machine.clock, replace(world, now=0.0)) == ["clock_wrong"]
    (world.data_dir / "glmui.db").touch()
    assert found(checks_machine.clock, replace(world, now=time.time() - 3 * 86400)) == ["clock_wrong"]


@contextmanager
def serving(answer: Callable[[str], bytes]) -> Iterator[int]:
    """A server on 127.0.0.1 that answers GET of a path; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answer(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()


def test_who_is_at_the_port(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda path: b"somebody else") as port:
        taken = with_settings(world, port=port)
        assert found(checks_machine.port, taken) == ["port_taken"]
        assert f"({os.getpid()})" in next(iter(checks_machine.port(taken))).detail("en")
        monkeypatch.setattr(listen, "FIRST_PORT", port)
        assert found(checks_machine.port, with_settings(world, port=None)) == ["port_next"]
    for folder, key in ((world.data_dir, "port_glmui"), (tmp_path, "port_other_glmui")):
        me = json.dumps(listen.whoami(folder, ready=True)).encode()
        with serving(lambda path, me=me: me) as port:
            assert found(checks_machine.port, with_settings(world, port=port)) == [key]
    assert found(checks_machine.port, with_settings(world, host="192.0.2.1")) == ["port_bad_host"]


def fetch(address: str) -> bytes:
    """What a proxy does."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5)
    connection.request("GET", parts.path)
    body = connection.getresponse().read()
    connection.close()
    return body


def test_a_proxy_between_the_browser_and_this_machine(world: World) -> None:
    dead = f"http://user:secret@127.0.0.1:{free_port()}/"
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "proxy_none"),
        ({"http_proxy": dead}, "proxy_in_between"),
        ({"ALL_PROXY": "socks5://127.0.0.1:1080"}, "proxy_in_between"),
        ({"https_proxy": dead}, "proxy_none"),
        ({"HTTP_PROXY": dead, "NO_PROXY": "localhost"}, "proxy_in_between"),
        ({"HTTP_PROXY": dead, "NO_PROXY": "localhost,127.0.0.1,::1"}, "proxy_bypassed"),
        ({"http_proxy": dead, "no_proxy": "*", "NO_PROXY": ""}, "proxy_bypassed"),
    ]
    for environ, key in cases:
        assert found(checks_machine.proxy, replace(world, environ=environ)) == [key], environ
        told = [f.detail("en") + f.cure("en") for f in checks_machine.proxy(replace(world, environ=environ))]
        assert "secret" not in "".join(told)
    with serving(fetch) as port:
        through = replace(world, environ={"http_proxy": f"http://127.0.0.1:{port}"})
        assert found(checks_machine.proxy, through) == ["proxy_lets_through"]
    with serving(lambda path: b"<html>a proxy's error page</html>") as port:
        through = replace(world, environ={"http_proxy": f"http://127.0.0.1:{port}"})
        assert found(checks_machine.proxy, through) == ["proxy_in_between"]


# The data folder


def mended(check: Check, world: World) -> list[str]:
    """The keys before and after mending."""
    before = list(check(world))
    for finding in before:
        assert_told(finding)
    assert [f.key for f in mend(before)] == [f.key for f in before if f.mend]
    return [f.key for f in (*before, *check(world))]


def test_a_data_folder_that_is_missing_is_made(world: World, tmp_path: Path) -> None:
    away = with_settings(world, data_dir=tmp_path / "new" / "data")
    assert mended(checks_data.data_folder, away) == ["data_missing", "data_fine"]


@POSIX
def test_a_data_folder_open_to_others_is_closed(world: World) -> None:
    world.data_dir.chmod(0o755)
    assert mended(checks_data.data_folder, world) == ["data_open", "data_fine"]
    assert stat.S_IMODE(world.data_dir.stat().st_mode) == 0o700


def test_a_data_folder_that_is_none(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = with_settings(world, data_dir=tmp_path / "file")
    assert found(checks_data.data_folder, file) == ["data_no_folder"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders that Linux has")
def test_a_data_folder_that_is_not_ours_to_write(world: World) -> None:
    if os.getuid() == 0:
        os.chown(world.data_dir, 12345, 12345)
        foreign = world
    else:
        foreign = with_settings(world, data_dir=Path("/usr"))
    assert found(checks_data.data_folder, foreign) == ["data_foreign"]
    nobody_writes = with_settings(world, data_dir=Path("/proc/self/task"))
    findings = list(checks_data.data_folder(nobody_writes))
    assert [f.key for f in findings] == ["data_unwritable"]
    assert_told(findings[0])
    assert [f.key for f in mend(findings)] == ["not_mended"]


@pytest.mark.parametrize(
    ("place", "kind", "key"),
    [
        ("/mnt/share/glmui", "nfs4", "place_remote"),
        ("/mnt/c/Users/x", "9p", "place_remote"),
        ("/home/x/mount", "fuse.sshfs", "place_remote"),
        (r"\\server\share\glmui", "", "place_remote"),
        ("/c/Users/x/OneDrive - Work/glmui", "ntfs", "place_synced"),
        ("/home/x/Nextcloud/glmui", "ext4", "place_synced"),
        ("/" + "x" * 900, "ext4", "place_long"),
        ("/home/x/glmui", "ext4", "place_fine"),
    ],
)
def test_where_the_data_folder_lies(world: World, place: str, kind: str, key: str) -> None:
    there = replace(with_settings(world, data_dir=Path(place)), filesystem_of=lambda folder: kind)
    assert found(checks_data.data_place, there) == [key]


def settings_of(world: World, text: str, **flags: Any) -> World:
    (world.data_dir / "settings.toml").write_text(text, encoding="utf-8")
    settings, error = read_settings({"data_dir": str(world.data_dir), **flags})
    assert settings.data_dir == world.data_dir
    return replace(world, settings=settings, settings_error=error)


def test_a_damaged_settings_file_is_set_aside(world: World) -> None:
    damaged = settings_of(world, 'model = "unfinished')
    findings = list(checks_data.settings_file(damaged))
    assert [f.key for f in findings] == ["settings_wrong"]
    assert_told(findings[0])
    mend(findings)
    kept = world.data_dir / "settings.toml.broken"
    assert kept.read_text() == 'model = "unfinished'
    mend(list(checks_data.settings_file(settings_of(world, "again ="))))
    assert kept.read_text() == 'model = "unfinished', "the first one stays"
    assert (world.data_dir / "settings.toml.broken-2").read_text() == "again ="


@pytest.mark.parametrize("text", ["port = 99999999", "no_such_setting = 1"])
def test_a_wrong_entry_is_named_and_left_to_its_owner(world: World, text: str) -> None:
    findings = list(checks_data.settings_file(settings_of(world, text)))
    assert [(f.key, f.mend) for f in findings] == [("settings_wrong", None)]
    assert text.split()[0] in findings[0].cure("en")
    assert found(checks_data.settings_file, settings_of(world, "port = 7900")) == ["settings_fine"]


def test_conversations_and_their_backups(world: World) -> None:
    assert found(checks_data.database, world) == ["database_none"]
    assert found(checks_data.backups, world) == ["backups_not_yet"]
    store = Store.open(world.data_dir)
    store.create_conversation()
    file = world.data_dir / "glmui.db"
    before = file.read_bytes()
    assert found(checks_data.database, world) == ["database_fine"], "while the app has it open"
    assert found(checks_data.backups, world) == ["backups_none"]
    assert file.read_bytes() == before
    store.close()
    (world.data_dir / "backups").mkdir(exist_ok=True)
    (world.data_dir / "backups" / "glmui-20260901-120000.db").touch()
    assert found(checks_data.backups, world) == ["backups_fine"]
    file.write_bytes(b"SQLite format 3\0" + b"\1" * 5000)
    assert found(checks_data.database, world) == ["database_damaged"]
    file.unlink()
    file.mkdir()
    assert found(checks_data.database, world) == ["database_none"]


def test_old_half_downloads_are_moved_to_the_trash_and_new_ones_stay(world: World) -> None:
    downloads = world.data_dir / "downloads"
    for name, days in (("old", 10), ("new", 1)):
        (downloads / name).mkdir(parents=True)
        (downloads / name / "part").write_text(name)
        then = world.now - days * 86400
        for path in (downloads / name / "part", downloads / name):
            os.utime(path, (then, then))
    assert mended(checks_data.leftovers, world) == ["leftovers_old", "leftovers_none"]
    assert [path.name for path in downloads.iterdir()] == ["new"]
    kept = list((world.data_dir / "trash").rglob("part"))
    assert [file.read_text() for file in kept] == ["old"]


# The model


Folder = Callable[[str], Path]


@pytest.fixture
def chatglm(world: World, tiny_chatglm: Folder) -> World:
    folder = world.data_dir / "models" / "tiny"
    folder.parent.mkdir()
    copy_checkpoint(tiny_chatglm("int4"), folder)
    return with_settings(world, model="tiny")


def put(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, which is linked to the one that all tests share."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def named(world: World) -> list[tuple[str, str]]:
    findings = list(checks_model.model(world))
    for finding in findings:
        assert_told(finding)
    return [(finding.name, finding.key) for finding in findings]


def test_a_sound_model(chatglm: World) -> None:
    assert [key for _, key in named(chatglm)] == ["model_fine", "vocabulary_fine", "weights_unknown"]
    assert found(checks_machine.memory, chatglm) == ["memory_enough"]
    assert named(with_settings(chatglm, model="echo")) == [("model", "model_fine")]


def test_no_model_or_one_that_is_gone(world: World) -> None:
    assert named(world) == [("model", "model_none")]
    assert named(with_settings(world, model="gone")) == [("model", "model_wrong")]


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        (
            "pytorch_model.bin",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "weights",
        ),
        ("pytorch_model.bin", b"<!doctype html><title>404</title>", "weights"),
        ("pytorch_model.bin", b"PK\3\4 cut", "weights"),
        ("pytorch_model.bin.index.json", b'{"weight_map": {"a": "pytorch_model-9.bin"}}', "weights"),
        ("config.json", b'{"model_type": "chatglm"}', "model"),
        ("config.json", b"{", "model"),
        ("config.json", None, "model"),
        ("ice_text.model", None, "vocabulary"),
    ],
)
def test_a_model_with_a_wrong_file(chatglm: World, file: str, content: bytes | None, name: str) -> None:
    folder = chatglm.data_dir / "models" / "tiny"
    if content is None:
        (folder / file).unlink()
    else:
        put(folder, file, content)
    assert named(chatglm) == [(name, "model_wrong")]


def test_a_vocabulary_that_is_another(chatglm: World) -> None:
    folder = chatglm.data_dir / "models" / "tiny"
    whole = (folder / "ice_text.model").read_bytes()
    put(folder, "ice_text.model", b"no vocabulary")
    assert named(chatglm)[1] == ("vocabulary", "vocabulary_wrong")
    one_more = b"\x0a\x05extra\x15" + bytes(4)  # a piece as sentencepiece writes it: its text, its score
    put(folder, "ice_text.model", whole + b"\x0a" + bytes([len(one_more)]) + one_more)
    assert named(chatglm)[1] == ("vocabulary", "vocabulary_size")


def safetensors(folder: Path) -> Path:
    """The folder's weights as one safetensors file of a tensor; they are only looked at, never opened."""
    (folder / "pytorch_model.bin").unlink()
    table = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(table).to_bytes(8, "little") + table + b"whole!!!")
    return file


def test_weights_that_are_cut_short(chatglm: World) -> None:
    file = safetensors(chatglm.data_dir / "models" / "tiny")
    assert named(chatglm)[2] == ("weights", "weights_unknown")
    whole = file.read_bytes()
    for content in (whole[:-1], whole + b"x", whole[:20], b"short"):
        file.write_bytes(content)
        assert named(chatglm)[2:] == [("weights", "weights_cut")], content


def test_weights_against_their_manifest(chatglm: World) -> None:
    from glmui.hub import manifest

    folder = chatglm.data_dir / "models" / "tiny"
    file = safetensors(folder)
    told = manifest.Manifest("tiny", "a test", date=manifest.now(), files=manifest.stored_in(folder))
    manifest.write(folder, told)
    verifying = replace(chatglm, verify=True)
    assert named(chatglm)[2] == ("weights", "weights_fine")
    assert named(verifying)[2] == ("weights", "weights_verified")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert named(chatglm)[2] == ("weights", "weights_fine"), "the size is the same"
    assert named(verifying)[2] == ("weights", "weights_changed")
    put(folder, "config.json", (folder / "config.json").read_bytes() + b" ")
    assert named(chatglm)[2] == ("weights", "weights_changed")
    assert "config.json" in list(checks_model.model(chatglm))[2].detail("en")


# Telling


FINDINGS = [
    problem("model", "model_none"),
    ok("python", "python_fine", version="3.12.1"),
    ok("temporary", "temporary_fine", folder="<b>/home/li/tmp</b>", free="9.0"),
]


def test_the_list_ends_with_the_worst_and_stands_in_columns() -> None:
    assert report.lines(FINDINGS, "zh") == [
        "✓ 正常  Python      3.12.1，64 位",
        "✓ 正常  临时文件夹  <b>/home/li/tmp</b> 有 9.0 GB 空闲",
        "✗ 问题  模型        还没有选择模型。",
        "                    → 请在网页里选择一个，或用 --starter 启动以获取小型演示模型。",
        "",
        "问题 1 个，注意 0 个。",
    ]
    english = report.lines(FINDINGS, "en")
    assert {line.index(word) for line, word in zip(english, ("3.12", "9.0", "No", "→"), strict=False)} == {29}


def test_a_terminal_without_the_signs_gets_plain_ones() -> None:
    for encoding, language in (("ascii", "en"), ("gbk", "zh")):
        text = "\n".join(report.lines(FINDINGS, language, encoding))
        assert text.encode(encoding)
        assert "x " in text


def test_the_report_names_nobody() -> None:
    text = "/home/li/data, /home/lisa/x, C:\\Users\\li\\y, user wangwei, WANG wangweiwei li"
    told = report.anonymous(text, Path("/home/li"), "li")
    assert told == "~/data, /home/lisa/x, C:\\Users\\…\\y, user wangwei, WANG wangweiwei li"
    assert (
        report.anonymous("owner wangwei: wangweiwei", Path("/home/wangwei"), "wangwei")
        == "owner …: wangweiwei"
    )
    assert report.anonymous("/tmp/x", Path("/"), "") == "/tmp/x"


def test_the_page_shows_what_is_wrong_first_and_runs_nothing() -> None:
    for language in i18n.LANGUAGES:
        shown = present_doctor.findings(FINDINGS, language)
        assert shown.index('class="problem"') < shown.index("<dl>")
        assert "<b>" not in shown
        assert FINDINGS[0].cure(language) in shown


# The command


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glmui", "doctor", *arguments],
        cwd=ROOT, env={**os.environ, "LC_ALL": "C.UTF-8", **environment}, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=60, encoding="utf-8",
    )  # fmt: skip


@POSIX
def test_the_command_mends_and_tells_in_an_installation_with_nothing_left(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    (data / "settings.toml").write_text("broken =")
    gone = dict.fromkeys(("torch", "transformers", "gradio", "sentencepiece", "pynvml", "psutil"), MISSING)
    with stand_ins(tmp_path, **gone) as environ:
        done = doctor("--json", "--fix", "--data-dir", str(data), **environ)
    told = json.loads(done.stdout)
    assert done.returncode == 1, "torch is still missing"
    assert done.stderr == ""
    assert [sorted(f) for f in told["findings"]] == [["cure", "detail", "name", "status"]] * len(
        told["findings"]
    )
    worst = {f["name"]: f["status"] for f in told["findings"]}
    assert worst["torch"] == worst["imports"] == "problem"
    assert worst["settings_file"] == worst["data_folder"] == "ok"
    assert len(told["mended"]) == 2
    failing = [f["detail"] for f in told["findings"] if f["name"] == "imports"]
    for name in ("transformers", "gradio", "sentencepiece", "pynvml", "psutil"):
        assert any(name in detail for detail in failing), name
    assert (data / "settings.toml.broken").is_file()


@POSIX
def test_without_pydantic_one_sentence_says_so(tmp_path: Path) -> None:
    with stand_ins(tmp_path, pydantic=MISSING) as environ:
        done = doctor("--data-dir", str(tmp_path), **environ)
    assert done.returncode == 1
    assert done.stderr.startswith("The package pydantic is missing")
    assert done.stderr.count("\n") == 1
