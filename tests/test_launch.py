"""launch.sh and launch.py, run for real with stand-in Pythons on PATH: no network, nothing installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

HOME = Path(__file__).resolve().parent.parent
STAND_IN = Path(__file__).with_name("stand_in_python.py")
CARD_HERE = Path("/proc/driver/nvidia/gpus").is_dir()

pytestmark = pytest.mark.skipif(os.name == "nt", reason="launch.sh is for Linux and macOS")


class World:
    """A copy of the launchers in a folder with blanks and Chinese, and a PATH with nothing but stand-ins."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.home = place / "我的 应用 (1)"
        self.home.mkdir()
        for name in ("launch.sh", "launch.py"):
            shutil.copy(HOME / name, self.home)
        self.write("requirements.txt", "torch==2.13.0\ngradio==6.31.0\n")
        self.write("requirements-dev.txt", "pytest==9.2.0\n")
        self.write("requirements-compiler.txt", "ziglang==0.17.1\n")
        self.bin = place / "bin"
        for name in ("dirname", "readlink", "uname", "sh"):
            self.tool(name, f'exec {shutil.which(name)} "$@"')
        self.tool("cc", "")
        self.answers: list[tuple[str, int | str, str]] = []
        self.elsewhere = place / "elsewhere"
        self.elsewhere.mkdir()

    def write(self, name: str, content: str) -> None:
        (self.home / name).write_text(content)

    def tool(self, name: str, script: str, folder: str = "bin") -> None:
        file = self.place / folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        file.chmod(0o755)

    def python(self, name: str = "python3.11", folder: str = "bin") -> None:
        self.tool(name, f'exec "{sys.executable}" -I "{STAND_IN}" "{self.place}" "$0" "$@"', folder)

    def answer(self, part: str, status: int | str = 1, says: str = "") -> None:
        """Calls that contain `part` exit with `status` (or "hang") after printing `says`."""
        self.answers.append((part, status, says))

    def popen(
        self, *arguments: str, program: Path | None = None, path: str = "bin", **environment: str
    ) -> subprocess.Popen[str]:
        (self.place / "answers.json").write_text(json.dumps(self.answers), encoding="utf-8")
        folders = ":".join(str(self.place / folder) for folder in path.split())
        return subprocess.Popen(
            [str(program or self.home / "launch.sh"), *arguments],
            cwd=self.elsewhere,
            env={"PATH": folders, "HOME": str(self.place), "LC_ALL": "en_US.UTF-8", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )

    def start(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run launch.sh to its end; `calls` then holds this start's calls."""
        self.forget_calls()
        process = self.popen(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def forget_calls(self) -> None:
        (self.place / "calls.txt").write_text("")

    @property
    def calls(self) -> list[str]:
        return (self.place / "calls.txt").read_text(encoding="utf-8").splitlines()

    def called(self, part: str) -> list[str]:
        return [call for call in self.calls if part in call]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def installed(world: World) -> World:
    """A world whose first start is over."""
    world.python()
    assert world.start().returncode == 0
    return world


def app(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What app.py (or pytest) saw, from its one line on stdout."""
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


# --- finding a Python


@pytest.mark.parametrize(
    ("there", "failing", "chosen"),
    [
        (["python", "python3", "python3.13", "python3.12", "python3.11"], [], "python3.11"),
        (["python", "python3", "python3.13", "python3.12", "python3.11"], ["python3.11"], "python3.12"),
        (["python3", "python3.13"], [], "python3.13"),
        (["python3", "python"], ["python3"], "python"),
    ],
)
def test_each_candidate_is_run_and_the_first_that_fits_is_taken(
    world: World, there: list[str], failing: list[str], chosen: str
) -> None:
    for name in there:
        world.python(name)
    for name in failing:
        world.answer(f"{name} -I -c", 127, "pyenv: command not found")
    app(world.start())
    assert world.called("launch.py install")[0].startswith(f"{chosen} ")


def test_a_good_python_is_found_behind_a_failing_shim_of_the_same_name(world: World) -> None:
    world.tool("python3.11", "exit 127", folder="shims")
    world.python("python3.11")
    app(world.start(path="shims bin"))


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ({"LC_ALL": "zh_CN.UTF-8"}, "没有找到"),
        ({"LC_ALL": "", "LANG": "zh_TW"}, "没有找到"),
        ({"LC_ALL": "zh_CN.UTF-8", "GLMUI_LANGUAGE": "en"}, "No 64-bit Python 3.11, 3.12 or 3.13 was found"),
        ({"LC_ALL": "de_DE.UTF-8", "LANG": "zh_CN"}, "No 64-bit Python 3.11, 3.12 or 3.13 was found"),
    ],
)
def test_no_python_is_said_with_the_cure_of_this_system(
    world: World, language: dict[str, str], words: str
) -> None:
    world.python("python3")
    world.answer("python3 -I -c")
    world.tool("uname", "echo Linux")
    world.tool("apt-cache", '[ "$2" = python3.12-venv ]')
    done = world.start(**language)
    assert done.returncode == 1
    assert words in done.stderr
    assert "sudo apt install python3.12 python3.12-venv" in done.stderr


# --- installing once


def test_first_start_installs_and_the_second_only_checks(world: World) -> None:
    world.python()
    first = world.start("chat")
    assert app(first)["arguments"][1:] == ["chat"]
    assert "Installing (once, a few minutes)" in first.stderr
    assert len(world.called("-m venv")) == 1
    assert "-r " in world.called("-m pip")[-1]

    second = world.start("chat")
    assert app(second)["arguments"][1:] == ["chat"]
    assert second.stderr == ""
    check, start = world.calls
    assert "launch.py check" in check
    assert start.endswith("app.py chat")


def test_changed_requirements_are_installed_into_what_is_there(installed: World) -> None:
    installed.write("requirements.txt", "torch==2.13.0\ngradio==6.32.0\n")
    done = installed.start()
    app(done)
    assert "Installing what has changed" in done.stderr
    assert not installed.called("-m venv")
    assert [call.partition("pip ")[2].split()[1] for call in installed.called("-m pip")] == ["install"]


def test_a_new_torch_comes_from_its_own_index_too(installed: World) -> None:
    installed.write("requirements.txt", "torch==2.14.0\ngradio==6.31.0\n")
    app(installed.start())
    assert not installed.called("-m venv")
    assert len(installed.called("torch==2.14.0 --index-url")) == 1


def test_an_installation_that_was_killed_is_done_again_from_the_start(world: World) -> None:
    world.python()
    world.answer("install -r", "hang")
    world.forget_calls()
    process = world.popen()
    wait_until(lambda: bool(world.called("install -r")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    world.answers.clear()
    (world.home / ".venv/left-over").mkdir()
    app(world.start())
    assert len(world.called("-m venv")) == 1
    assert len(world.called("install -r")) == 1
    assert not (world.home / ".venv/left-over").exists()


def test_a_failed_update_leaves_what_was_there(installed: World) -> None:
    before = (installed.home / "requirements.txt").read_text()
    installed.write("requirements.txt", before + "nh3==0.3.8\n")
    installed.answer("install -r", 1, "Max retries exceeded")
    assert installed.start().returncode == 1

    installed.write("requirements.txt", before)
    app(installed.start())
    assert not installed.called("-m pip")


def test_another_python_version_makes_it_afresh(installed: World) -> None:
    stamp = installed.home / ".venv/glmui-stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"python": "3.10"}))
    app(installed.start())
    assert len(installed.called("-m venv")) == 1


def test_a_venv_whose_python_is_gone_is_made_afresh(installed: World) -> None:
    (installed.home / ".venv/bin/python").unlink()
    (installed.home / ".venv/glmui-stamp.json").unlink()
    app(installed.start())
    assert len(installed.called("-m venv")) == 1


def test_a_second_start_waits_for_the_one_that_installs(world: World) -> None:
    world.python()
    world.answer("install -r", "hang")
    world.forget_calls()
    first = world.popen()
    wait_until(lambda: bool(world.called("install -r")))
    second = world.popen()
    assert second.stderr
    assert "another window" in second.stderr.readline()
    (world.place / "go-on").touch()
    for process in (first, second):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(world.called("install -r")) == 1


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# --- what is installed


def torch_calls(world: World) -> list[str]:
    pip_calls = [call.partition("--no-input ")[2] for call in world.called("--no-input")]
    return [call for call in pip_calls if "torch" in call.partition(" -r ")[0]]


@pytest.mark.skipif(CARD_HERE, reason="this machine has an NVIDIA card of its own")
@pytest.mark.parametrize(
    ("card", "build"),
    [
        ("exit 9", "cpu"),
        ("echo 6.1", "cu126"),
        ("echo 8.6", "cu126"),
        ("echo 12.0", "cu130"),
        ("echo 7.5; echo 12.0", "cu130"),
        ("echo '[N/A]'", "cu126"),
    ],
)
def test_torch_comes_in_the_build_for_the_card(world: World, card: str, build: str) -> None:
    world.python()
    world.tool("nvidia-smi", card)
    app(world.start())
    asked, fetched = torch_calls(world)
    assert asked.startswith("index versions torch --index-url ")
    assert asked.endswith("--retries 0")
    assert fetched.startswith("install --no-deps --force-reinstall torch==2.13.0 --index-url ")
    assert fetched.endswith(f"/{build}")


@pytest.mark.parametrize("unreachable", ["index versions torch", "torch==2.13.0 --index-url"])
def test_torch_comes_from_the_general_index_when_its_own_fails(world: World, unreachable: str) -> None:
    world.python()
    world.answer(unreachable, 1, "Max retries exceeded")
    done = world.start()
    app(done)
    assert "PyTorch's own package index cannot be reached" in done.stderr
    assert torch_calls(world)[-1] == "install --no-deps --force-reinstall torch==2.13.0"


@pytest.mark.skipif(CARD_HERE, reason="this machine has an NVIDIA card of its own")
def test_a_card_that_comes_brings_its_torch_and_one_that_goes_changes_nothing(installed: World) -> None:
    installed.tool("nvidia-smi", "echo 8.6")
    app(installed.start())
    assert torch_calls(installed)[-1].endswith("/cu126")
    assert not installed.called("-m venv")

    installed.tool("nvidia-smi", "exit 9")
    app(installed.start())
    assert not installed.called("pip")


@pytest.mark.parametrize(
    ("compiler", "brought"), [("cc", False), ("gcc", False), ("clang", False), ("none", True)]
)
def test_a_compiler_is_brought_only_where_there_is_none(world: World, compiler: str, brought: bool) -> None:
    world.python()
    (world.bin / "cc").rename(world.bin / compiler)
    if sys.platform == "darwin":
        world.tool("xcode-select", f"exit {int(brought)}")
    app(world.start())
    assert ("requirements-compiler.txt" in world.called("install -r")[0]) == brought


def test_the_tests_get_the_dev_extra_and_run_from_the_folder(installed: World) -> None:
    seen = app(installed.start("test", "-k", "a or b"))
    assert seen["arguments"] == ["-m", "pytest", "-k", "a or b"]
    assert seen["cwd"] == str(installed.home)
    assert "requirements-dev.txt" in installed.called("install -r")[0]

    for arguments in ((), ("test",)):
        app(installed.start(*arguments))
        assert not installed.called("pip ")


# --- starting


def test_arguments_and_the_folder_one_is_in_are_passed_on_unchanged(installed: World) -> None:
    arguments = ["chat", "a b", 'say "hi"', "it's", "$HOME", "*", "", "你好", "--port=8000", "\\"]
    seen = app(installed.start(*arguments))
    assert seen["arguments"] == [str(installed.home / "app.py"), *arguments]
    assert seen["cwd"] == str(installed.elsewhere)


def test_the_exit_status_is_that_of_the_app(installed: World) -> None:
    installed.answer("app.py", 3)
    assert installed.start().returncode == 3


@pytest.mark.parametrize("relative", [False, True])
def test_it_starts_through_a_link(installed: World, relative: bool) -> None:
    link = installed.elsewhere / "glm ui.command"
    link.symlink_to(installed.home / "launch.command")
    target = Path("launch.sh") if relative else installed.home / "launch.sh"
    (installed.home / "launch.command").symlink_to(target)
    assert app(installed.start(program=link))["arguments"] == [str(installed.home / "app.py")]


@pytest.mark.parametrize(
    ("before", "upper", "lower"),
    [
        ({"http_proxy": "proxy:80"}, "localhost,127.0.0.1,::1", "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "a.b"}, "a.b,localhost,127.0.0.1,::1", "a.b,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "a", "no_proxy": "b"}, "a,localhost,127.0.0.1,::1", "b,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "*", "no_proxy": "*"}, "*", "*"),
    ],
)
def test_no_proxy_stands_between_the_browser_and_the_page(
    installed: World, before: dict[str, str], upper: str, lower: str
) -> None:
    seen = app(installed.start(**before))
    assert (seen["NO_PROXY"], seen["no_proxy"]) == (upper, lower)


@pytest.mark.parametrize(("system", "wanted"), [("Linux", "localhost,127.0.0.1,::1"), ("Darwin", None)])
def test_the_proxy_of_macos_itself_stays_in_force(installed: World, system: str, wanted: str | None) -> None:
    installed.tool("uname", f"echo {system}")
    assert app(installed.start())["NO_PROXY"] == wanted


def test_the_launchers_are_as_git_must_keep_them() -> None:
    assert os.readlink(HOME / "launch.command") == "launch.sh"
    assert os.access(HOME / "launch.sh", os.X_OK)
    assert "*.bat text eol=crlf" in (HOME / ".gitattributes").read_text()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-compiler.txt"])
def test_requirements_are_exact(name: str) -> None:
    lines = (HOME / name).read_text(encoding="ascii").splitlines()
    wanted = [line for line in lines if not line.startswith(("#", "-r "))]
    assert wanted
    assert all(line.partition(";")[0].count("==") == 1 for line in wanted)


# --- plain words


TROUBLES = {
    "no venv module": ("import ensurepip", "", "venv module", "venv 模块"),
    "no network": (
        "install -r",
        "Retrying (Retry(total=4)) after NewConnectionError",
        "Check the network",
        "检查网络",
    ),
    "disk full": (
        "install -r",
        "OSError: [Errno 28] No space left on device",
        "disk became full",
        "磁盘满了",
    ),
    "not writable": ("-m venv", "[Errno 13] Permission denied", "cannot be written", "不可写"),
    "anything else": ("install -r", "error: it broke", "error: it broke", "安装没有成功"),
}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_goes_wrong_is_said_plainly(world: World, trouble: str, language: str) -> None:
    part, says, english, chinese = TROUBLES[trouble]
    world.python()
    world.answer(part, 1, says)
    done = world.start(LC_ALL={"en": "en_GB.UTF-8", "zh": "zh_CN.UTF-8"}[language])
    assert done.returncode == 1
    assert {"en": english, "zh": chinese}[language] in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not world.called("app.py")


def test_without_a_terminal_the_words_are_left_in_a_file(world: World) -> None:
    done = world.start()
    assert (world.home / "launch.log").read_text(encoding="utf-8") == done.stderr


@pytest.mark.parametrize("dialog", ["zenity", "xmessage"])
def test_on_a_desktop_without_a_terminal_a_window_says_it(world: World, dialog: str) -> None:
    world.tool(dialog, f'printf "%s\\n" "$@" >"{world.place}/shown.txt"')
    done = world.start(DISPLAY=":99")
    assert done.stderr.strip() in (world.place / "shown.txt").read_text(encoding="utf-8")


@pytest.fixture
def launcher() -> ModuleType:
    """launch.py as a module."""
    spec = importlib.util.spec_from_file_location("launch", HOME / "launch.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    del sys.modules["launch"]
    return module


@pytest.mark.parametrize(
    ("build", "free", "enough"), [("cpu", 2.9, False), ("cpu", 3.1, True), ("cu126", 8, False)]
)
def test_too_little_disk_is_said_before_anything_is_fetched(
    launcher: Any, world: World, monkeypatch: pytest.MonkeyPatch, build: str, free: float, enough: bool
) -> None:
    monkeypatch.setattr(launcher.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * 10**9)))
    environment = launcher.Environment(world.home)
    if enough:
        environment.check_disk(build)
        return
    with pytest.raises(launcher.Trouble) as caught:
        environment.check_disk(build)
    words = launcher.text(caught.value.key, **caught.value.values)
    assert f"{free:.1f} GB" in words


def test_every_text_is_there_in_both_languages(launcher: Any) -> None:
    for english, chinese in launcher.TEXTS.values():
        assert english.isascii() or "…" in english
        assert not chinese.isascii()
        assert set(fields(english)) == set(fields(chinese))


def fields(words: str) -> list[str]:
    return [part.partition("}")[0] for part in words.split("{")[1:]]


# --- the applications menu


@pytest.mark.skipif(sys.platform == "darwin", reason="Linux only")
def test_a_menu_entry_is_made_and_starts_this_folder(world: World) -> None:
    odd = world.place / 'a "b" $c `d` 100% \\e'
    world.home.rename(odd)
    world.home = odd
    world.python()
    done = world.start("--desktop-entry", XDG_DATA_HOME=str(world.place / "data"))
    assert done.returncode == 0
    file = world.place / "data/applications/glmui.desktop"
    assert str(file) in done.stdout
    entry = dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines()[1:])
    assert entry["Terminal"] == "true"
    assert entry["Icon"].replace("\\\\", "\\") == str(odd / "assets/icon.svg")
    # A desktop takes off the value's escapes, then the field codes', then the arguments' quotes (as sh does).
    command = entry["Exec"].replace("\\\\", "\\").replace("%%", "%")
    words = subprocess.run(["sh", "-c", f'printf "%s\\n" {command}'], capture_output=True, encoding="utf-8")
    assert words.stdout.splitlines() == ["sh", "-c", '"$0" || read -r _', str(odd / "launch.sh")]
