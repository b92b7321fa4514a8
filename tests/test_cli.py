"""The command line as a terminal sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest

from glmui import __version__, cli, i18n, server
from glmui.errors import StoreError
from glmui.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = ("serve.about", "chat.about", "commands", "flags_title", "flags.version", "flags.help")


def run(
    *arguments: str, start: Sequence[str] = ("-m", "glmui"), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        encoding="utf-8",
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """What `serve` was called with; nothing is served. The data folder is `tmp_path`."""
    calls: list[Settings] = []

    def serve(settings: Settings, language: str) -> int:
        calls.append(settings)
        return 0

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setenv("GLMUI_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    return calls


@pytest.mark.parametrize("start", [("app.py",), ("-m", "glmui")])
def test_version_and_help_answer_at_once(start: tuple[str, ...]) -> None:
    best = 10.0
    for _ in range(3):  # a busy machine may be slow once
        began = time.monotonic()
        assert run("--version", start=start).stdout == f"glmui {__version__}\n"
        best = min(best, time.monotonic() - began)
    assert best < 0.5
    assert "--no-browser" in run("--help", start=start).stdout


def test_help_in_the_terminals_language() -> None:
    for command in ((), ("serve",), ("chat",)):
        shown = run(*command, "--help", LC_ALL="zh_CN.UTF-8").stdout
        assert "显示版本" in shown
        assert "cli." not in shown
        assert "%%" not in shown


def test_every_flag_is_explained_in_both_languages() -> None:
    flags = {flag for command in cli.COMMANDS.values() for flag, _ in command.flags}
    keys = {f"cli.flags.{flag.removeprefix('--')}" for flag in flags} | {f"cli.{name}" for name in SENTENCES}
    for language in i18n.LANGUAGES:
        assert keys <= set(i18n.table(language))


@pytest.mark.parametrize(
    "arguments", [("--colour",), ("nonsense",), ("chat", "--port", "1"), ("--port", "x"), ("--mod", "x")]
)
def test_what_is_unknown_is_named(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr or arguments[-2] in done.stderr
    assert "Traceback" not in done.stderr


def test_so_many_layers_on_the_card_means_the_others_on_the_cpu(served: list[Settings]) -> None:
    assert cli.main(["--layers-on-gpu", "7", "--context", "1024"]) == 0
    assert cli.main(["--layers-on-gpu", "7", "--device", "auto"]) == 0
    assert cli.main([]) == 0
    told = [(one.device, one.layers_on_gpu, one.context) for one in served]
    assert told == [("mixed", 7, 1024), ("auto", 7, 2048), ("auto", None, 2048)]


def test_serve_is_the_default_and_flags_become_settings(served: list[Settings], tmp_path: Path) -> None:
    assert cli.main([]) == 0
    assert cli.main(["serve"]) == 0
    plain, named = served
    assert plain == named
    assert (plain.host, plain.port, plain.browser, plain.starter, plain.data_dir) == (
        "127.0.0.1",
        None,
        True,
        False,
        tmp_path,
    )

    flags = "--host ::1 --port 7999 --no-browser --model starter --starter --idle-minutes 0.5"
    flags += " --device cuda:1 --threads 3"
    assert cli.main([*flags.split(), "--log-level", "warning", "--data-dir", str(tmp_path / "x")]) == 0
    given = served[-1]
    assert (given.host, given.port, given.browser, given.model) == ("::1", 7999, False, "starter")
    assert (given.device, given.threads, given.starter, given.idle_minutes) == ("cuda:1", 3, True, 0.5)
    assert (given.log_level, given.data_dir) == ("warning", tmp_path / "x")


def test_the_environment_counts_and_a_flag_wins(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMUI_PORT", "7900")
    monkeypatch.setenv("GLMUI_BROWSER", "false")
    cli.main([])
    cli.main(["--port", "7901"])
    assert [(one.port, one.browser) for one in served] == [(7900, False), (7901, False)]


@pytest.mark.parametrize(
    "flags", [["--port", "0"], ["--device", "gpu"], ["--threads", "0"], ["--idle-minutes", "-1"]]
)
def test_a_bad_value_is_said_in_one_sentence(
    served: list[Settings], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags) == 2
    assert flags[0] in capsys.readouterr().err
    assert not served


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def serve(options: Namespace, language: str) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "serve", cli.Command(cli.SERVE, serve))


def test_errors_become_sentences_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    failing(monkeypatch, StoreError("data_folder_unwritable", folder="/x", detail="y"))
    assert cli.main([]) == 1
    assert "不可写" in capsys.readouterr().err
    failing(monkeypatch, ZeroDivisionError("oops"))
    assert cli.main([]) == 1
    assert "oops" in capsys.readouterr().err
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.main([]) == 130
    assert capsys.readouterr() == ("", "")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["--log-level", "debug"])


def test_chat_answers_once(tmp_path: Path) -> None:
    done = run(
        "chat", "--model", "echo", "--prompt", "你好", "--greedy", "--json", "--data-dir", str(tmp_path)
    )
    answer = json.loads(done.stdout)
    assert "你好" in answer["response"]
    assert answer["finish_reason"] == "stop"
    assert done.stderr == ""
    plain = run(
        "chat", "--model", "echo", "--prompt", "hello", "--data-dir", str(tmp_path), start=("app.py",)
    )
    assert plain.stdout.strip().endswith("hello")
    assert not (tmp_path / "glmui.db").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "--model"),
        (("--model", "echo", "--json"), 2, "--prompt"),
        (("--model", "echo", "--prompt", "x", "--top-p", "7"), 2, "top_p"),
        (("--model", "/no/such/folder", "--prompt", "x"), 1, "/no/such/folder"),
        (("--model", "echo", "--prompt", "  "), 2, "empty"),
    ],
)
def test_chat_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = run("chat", *arguments, "--data-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_single_answer_quietly(tmp_path: Path) -> None:
    endless = [sys.executable, "app.py", "chat", "--model", "echo", "--data-dir", str(tmp_path)]
    endless += ["--prompt", "/echo tokens=1000 speed=20", "--max-length", "4096"]
    with subprocess.Popen(
        endless, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        assert process.wait(5) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
