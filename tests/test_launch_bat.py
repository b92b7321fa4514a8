"""launch.bat under Wine's cmd, with a stand-in for py.exe and python.exe that writes down how it was called.

Runs where wine and a C compiler for Windows (mingw-w64) are installed; docs/launching.md tells what this
cannot show.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("x86_64-w64-mingw32-gcc")
WINE = shutil.which("wine")

pytestmark = pytest.mark.skipif(not (COMPILER and WINE), reason="needs wine and mingw-w64 (Debian packages)")

STAND_IN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

static int status(const char *name) { const char *value = getenv(name); return value ? atoi(value) : 0; }

int main(void) {
    static char line[32768];
    WideCharToMultiByte(CP_UTF8, 0, GetCommandLineW(), -1, line, sizeof line, NULL, NULL);
    FILE *log = _wfopen(L"C:\\calls.txt", L"ab");
    fprintf(log, "%s\n", line);
    fclose(log);
    if (strstr(line, " -c ")) {  /* is this a fitting Python? */
        const char *good = getenv("GOOD");
        return !(good && strstr(line, good) == line);
    }
    if (strstr(line, "launch.py\" check")) return status("CHECK");
    if (strstr(line, "launch.py\" install")) {
        if (status("INSTALL")) { puts("words of launch.py"); return status("INSTALL"); }
        wchar_t self[MAX_PATH];
        GetModuleFileNameW(NULL, self, MAX_PATH);
        return !CopyFileW(self, L".venv\\Scripts\\python.exe", FALSE);
    }
    printf("NO_PROXY=%s\n", getenv("NO_PROXY") ? getenv("NO_PROXY") : "(none)");
    return status("APP");
}
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wine drive with the stand-in in a folder of its own for each name it can have."""
    place = tmp_path_factory.mktemp("wine")
    source = place / "stand_in.c"
    source.write_text(STAND_IN)
    stand_in = place / "stand_in.exe"
    subprocess.run([str(COMPILER), "-O1", "-o", stand_in, source], check=True)
    for name in ("py", "python"):
        folder = place / "prefix/drive_c" / f"has-{name}"
        folder.mkdir(parents=True)
        shutil.copy(stand_in, folder / f"{name}.exe")
    shim = place / "prefix/drive_c/has-shim"
    shim.mkdir()
    (shim / "python.bat").write_bytes(b'@"C:\\has-py\\py.exe" shim %*\r\n')
    if wine(place / "prefix", "exit", "7").returncode != 7:
        pytest.skip("wine does not work here")
    return place / "prefix"


def wine(
    prefix: Path, *command: str, cwd: Path = HOME, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in Wine's cmd."""
    surroundings = {
        "PATH": os.environ["PATH"],
        "HOME": str(prefix.parent),
        "LC_ALL": "C.UTF-8",
        "WINEPREFIX": str(prefix),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",
    }
    return subprocess.run(
        [str(WINE), "cmd", "/c", *command],
        cwd=cwd,
        env=surroundings | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )


Launch = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def launch(prefix: Path, tmp_path: Path) -> Launch:
    """Run launch.bat in a folder whose name has blanks, brackets and Chinese: (exit status, words, calls)."""
    home = tmp_path / "我的 app (1)"
    (home / ".venv/Scripts").mkdir(parents=True)
    shutil.copy(HOME / "launch.bat", home)
    calls = prefix / "drive_c/calls.txt"

    def run(*arguments: str, tools: str = "py", **environment: str) -> tuple[int, str, list[str]]:
        calls.write_bytes(b"")
        path = ";".join(f"C:\\has-{tool}" for tool in tools.split())
        done = wine(prefix, "launch.bat", *arguments, cwd=home, WINEPATH=path, **environment)
        said = (done.stdout + done.stderr).decode("utf-8", "replace")
        return done.returncode, said, calls.read_text(encoding="utf-8").splitlines()

    return run


def asked(calls: list[str]) -> list[str]:
    """The candidates that were run to learn whether they fit."""
    return [call.partition(" -I -c ")[0] for call in calls if " -I -c " in call]


def test_first_start_installs_and_the_second_only_checks(launch: Launch) -> None:
    status, said, calls = launch("chat", "--prompt", "a b", GOOD="py -3.12", NO_PROXY="intranet")
    assert status == 0
    assert asked(calls) == ["py -3.11", "py -3.12"]
    assert 'app (1)\\launch.py" install' in calls[-2]
    assert calls[-1].endswith('app (1)\\app.py" chat --prompt "a b"')
    assert "NO_PROXY=intranet,localhost,127.0.0.1,::1" in said

    status, said, calls = launch()
    assert status == 0
    assert "NO_PROXY=(none)" in said
    assert len(calls) == 2
    assert 'launch.py" check' in calls[0]
    assert 'app.py"' in calls[1]


def test_what_changed_is_installed_and_tests_get_the_dev_extra(launch: Launch) -> None:
    launch(GOOD="py -3.11")
    status, said, calls = launch("test", "-k", "a b", GOOD="py -3.11", CHECK="1", HTTP_PROXY="proxy:80")
    assert status == 0
    assert "NO_PROXY=localhost,127.0.0.1,::1" in said
    assert 'launch.py" check dev' in calls[0]
    assert 'launch.py" install dev' in calls[2]
    assert calls[-1].endswith('python.exe" -m pytest -k "a b"')


def test_a_shim_that_is_a_batch_file_comes_back(launch: Launch) -> None:
    status, _, calls = launch("--version", tools="shim", GOOD='"C:\\has-py\\py.exe" shim')
    assert status == 0
    assert calls[-1].endswith('app.py" --version')


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_python_is_said_in_the_readers_language(launch: Launch, language: str) -> None:
    status, said, _ = launch(GLMUI_LANGUAGE=language, CI="true")
    assert status == 1
    assert "https://www.python.org/downloads/" in said
    assert ("No 64-bit Python 3.11" in said) == (language == "en")  # Wine's cmd garbles what is not ASCII
    assert "Press any key" not in said


@pytest.mark.parametrize("failing", ["INSTALL", "APP"])
def test_a_failure_keeps_the_window(launch: Launch, failing: str) -> None:
    status, said, calls = launch(GOOD="py -3.11", **{failing: "3"})
    assert status != 0
    assert "Press any key" in said
    assert ("words of launch.py" in said) == (failing == "INSTALL")
    assert ('app.py"' in calls[-1]) == (failing == "APP")
