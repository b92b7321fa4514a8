"""`glmui bench --suite appendix`: the table, its JSON and its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from glmui import cli, i18n
from glmui.bench import measure, suite
from glmui.engine.echo import EchoEngine
from glmui.errors import EngineError
from glmui.quantizing import compare
from glmui.tools.suite_page import page
from glmui.tools.suite_results import Column, as_json, table
from glmui.types import EngineInfo, EngineSpec, GenerationParams

Folder = Callable[[str], Path]


def column(dtype: str = "int4", **changes: Any) -> Column:
    values = {
        "load_s": 3.25, "load_again_s": 0.8, "rss": 4_000_000_000, "private": 300_000_000,
        "peak_rss": 4_200_000_000, "short_first_s": 0.35, "short_s": 2.5, "short_tokens": 24,
        "long_first_s": 0.5, "long_s": 25.0, "long_tokens": 256, "long_tok_s": 10.4,
        "rounds": 30, "failures": 0, "round_private": [300_000_000] * 30,
        "tokens": 900, "top1": 0.953, "kl": 0.0123,
    }  # fmt: skip
    info = EngineInfo(model="<model>", dtype=dtype, device="cpu", threads=2, kernel="avx2")
    return Column("none", info, {**values, **changes})


def say(language: str) -> Callable[..., str]:
    return lambda key, **values: i18n.text(language, f"cli.{key}", **values)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_has_a_column_for_each_form(language: str) -> None:
    lines = table([column("int8"), column("int4", long_s=12.5)], say(language))
    text = "\n".join(lines)
    assert "cli." not in text
    assert "{" not in text
    assert [cell in text for cell in ("int8", "int4", "25.00 s", "12.50 s", "95.3%", "0.0123")] == [True] * 6
    widths = {
        sum(2 if ord(c) > 0x2E80 else 1 for c in line.split("int8")[0]) for line in lines if "int8" in line
    }
    assert len(widths) == 1


def test_memory_that_grows_and_rounds_that_fail_are_said() -> None:
    growing = column(round_private=[300_000_000 + n * 10_000_000 for n in range(30)])
    assert growing.memory_is_flat is False
    assert "grows" in "\n".join(table([growing], say("en")))
    assert column(round_private=[300_000_000, 320_000_000] * 15).memory_is_flat is True
    assert "2 of 30 rounds failed" in "\n".join(table([column(failures=2)], say("en")))


def test_a_form_that_did_not_fit_is_a_column_with_a_reason() -> None:
    error = EngineError("bench_memory", model="m", need="26.8", free="20.1")
    columns = [Column("none", EngineInfo(), {}, error), column("int4")]
    text = "\n".join(table(columns, say("en")))
    assert "26.8 GB" in text
    figures = as_json(columns)["columns"]
    assert (figures[0]["error"], figures[0]["load"], figures[0]["dtype"]) == ("bench_memory", None, "float16")
    assert (figures[1]["error"], figures[1]["load_again"], figures[1]["memory"]) == (None, 0.8, 4.0)
    assert "<svg" in page(columns, say("en"), "en")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_is_whole_and_asks_nobody(language: str) -> None:
    text = page([column("int8"), column("int4")], say(language), language)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not [attrs for _, attrs in tags.found if {"src", "href", "onload"} & set(attrs)]
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "<model>" not in text
    assert [tag for tag, _ in tags.found].count("svg") == 5
    assert "polyline" in text


def test_a_conversation_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "ROUNDS", 6)
    monkeypatch.setattr(suite, "_ASKED", ("/echo speed=100000 tokens=3", "/echo error speed=100000"))
    engine = EchoEngine(EngineSpec("echo", "echo"))
    found = suite.converse(engine, GenerationParams(max_new_tokens=20))
    assert (found["rounds"], found["failures"]) == (6, 3)
    assert len(found["round_private"]) == 6
    assert all(own > 0 for own in found["round_private"])


class Pipe:
    """What a measuring process says, kept."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def send(self, kind: str, **values: Any) -> None:
        self.said.append({"kind": kind, **values})


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite in this process, with everything it asks shortened."""

    def messages(
        entry: object, spec: EngineSpec, then: object, died: str
    ) -> Iterator[tuple[Pipe, dict[str, Any]]]:
        pipe = Pipe()
        try:
            engine = measure.load(spec, pipe)  # type: ignore[arg-type]
            if entry is suite.run:
                suite._take(engine, pipe, spec, str(then))  # type: ignore[arg-type]
        finally:
            pipe.send("done", peak_rss=measure.peak_rss())
        yield from ((pipe, message) for message in pipe.said)

    monkeypatch.setattr("glmui.tools.suite.messages", messages)
    samples = compare.samples_for
    monkeypatch.setattr(compare, "samples_for", lambda folder: samples(folder)[:1])
    for name, value in {"ROUNDS": 3, "SHORT_TOKENS": 2, "LONG_TOKENS": 4, "ROUND_TOKENS": 2}.items():
        monkeypatch.setattr(suite, name, value)


@pytest.mark.usefixtures("brief")
@pytest.mark.slow
def test_the_command_on_a_float_model(
    tiny_chatglm: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three columns, of which the one that does not fit says so; the model is its own baseline."""
    checked = measure.check_memory

    def check(spec: EngineSpec, free: int) -> None:
        checked(spec, 0 if spec.quantize == "int8" else free)

    monkeypatch.setattr(measure, "check_memory", check)
    report, data = tmp_path / "report.html", tmp_path / "data"
    arguments = ["--model", str(tiny_chatglm("fp16")), "--data-dir", str(data), "--device", "cpu"]
    arguments += ["--threads", "1", "--html", str(report), "--json"]
    assert cli.main(["bench", "--suite", "appendix", *arguments]) == 0
    whole, eight, four = json.loads(capsys.readouterr().out)["columns"]
    assert (whole["dtype"], eight["dtype"], four["dtype"]) == ("float32", "int8", "int4")
    assert (whole["error"], eight["error"], four["error"]) == (None, "bench_memory", None)
    assert (whole["top1"], whole["kl"]) == (1.0, pytest.approx(0, abs=1e-6))
    assert four["kl"] > 0.01
    assert four["top1"] < 1
    assert (four["rounds"], four["failures"], four["memory_is_flat"]) == (3, 0, True)
    assert (four["short_tokens"], four["long_tokens"]) == (2, 4)
    assert 0 < four["own_memory"] <= four["memory"] <= four["peak_rss_gb"] * 1.01
    assert four["load_again"] > 0
    assert "<svg" in report.read_text(encoding="utf-8")
    assert list(data.glob("bench-*")) == []


def test_flags_that_do_not_go_together_are_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = ["--data-dir", str(tmp_path)]
    assert cli.main(["bench", "--model", "m", "--html", "x.html", *data]) != 0
    assert "--suite appendix" in capsys.readouterr().err
    assert cli.main(["bench", "--suite", "appendix", "--random", "tiny", *data]) != 0
    assert "--model" in capsys.readouterr().err
