"""`glmui quantize`: what is printed, what is refused, and that Ctrl+C leaves nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmui import cli, i18n
from glmui.errors import EngineError
from glmui.glm.checkpoint import load_model
from glmui.quantizing import compare
from glmui.quantizing import run as quantize_run
from glmui.quantizing.job import QuantizeJob
from glmui.tools import quantize
from glmui.tools.quantize_results import Results, table
from tests.quantize_stand_ins import dying, halfway
from tests.test_quantize_report import SAMPLES

ROOT = Path(__file__).resolve().parent.parent
Tiny = Callable[[str], Path]


class Told(list[dict[str, Any]]):
    """The other end of the pipe. gone: after so many messages nobody listens."""

    def __init__(self, gone: int | None = None) -> None:
        super().__init__()
        self._gone = gone

    def send_bytes(self, data: bytes) -> None:
        if len(self) == self._gone:
            raise BrokenPipeError
        self.append(json.loads(data))

    def kinds(self, *kinds: str) -> list[dict[str, Any]]:
        return [message for message in self if message["kind"] in kinds]


def work(monkeypatch: pytest.MonkeyPatch, job: QuantizeJob, gone: int | None = None) -> Told:
    """Do the job in this process, on a few short texts."""
    told = Told(gone)
    monkeypatch.setattr(compare, "samples_for", lambda folder: SAMPLES)
    monkeypatch.setattr(quantize_run.torch, "set_num_threads", lambda count: None)
    quantize_run.run(told, job)  # type: ignore[arg-type]
    return told


def test_the_whole_command(tiny_chatglm: Tiny, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glmui", "quantize", tiny_chatglm("fp16"), tmp_path / "made", "--bits", "8",
         "--json", "--data-dir", tmp_path / "data"],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == [
        "source", "target", "bits", "group_size", "quantization_embeddings", "source_gb", "size_gb",
        "seconds",
    ]  # fmt: skip
    assert (found["bits"], found["target"]) == (8, str(tmp_path / "made"))
    stored = sum(file.stat().st_size for file in (tmp_path / "made").iterdir())
    assert found["size_gb"] * 1e9 == stored < found["source_gb"] * 1e9
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_report_is_that_of_compare(
    tiny_chatglm: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = tiny_chatglm("fp16"), tmp_path / "made"
    told = work(monkeypatch, QuantizeJob(str(source), str(made), report=True))
    assert told[-1]["kind"] == "done"
    rows = told.kinds("compared")
    assert [row["name"] for row in rows] == [
        "result",
        "int8",
        "int4-32",
    ]  # others do not fit, or are the result
    expected = compare.agreement(SAMPLES, *(compare.see_folder(folder, SAMPLES) for folder in (source, made)))
    assert rows[0]["kl"] == expected.kl
    assert rows[0]["result_perplexity"] == expected.result_perplexity
    assert rows[1]["kl"] < rows[0]["kl"]
    steps = [message["step"] for message in told.kinds("doing")]
    assert list(dict.fromkeys(steps)) == ["writing", "source", "comparing"]
    assert all(0 < message["fraction"] <= 1 for message in told.kinds("doing"))


def test_a_size_is_kept_and_each_layer_told(
    tiny_chatglm: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = tiny_chatglm("fp16"), tmp_path / "made"
    everything = work(monkeypatch, QuantizeJob(str(source), str(tmp_path / "large"), target_gb=1.0))
    assert {choice["bits"] for choice in everything.kinds("chosen")} == {16}
    [large] = everything.kinds("written")
    room = large["size"] - 30_000
    told = work(monkeypatch, QuantizeJob(str(source), str(made), target_gb=room / 1e9))
    size = sum(file.stat().st_size for file in made.iterdir())
    assert 0.99 * room < size <= room
    chosen = {choice["name"]: choice["bits"] for choice in told.kinds("chosen")}
    assert len(chosen) == 16
    assert len(set(chosen.values())) > 1
    model = load_model(made)
    bits = {name: getattr(model.get_submodule(name), "weight_bit_width", 16) for name in chosen}
    assert bits == chosen


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"target_gb": 0.001}, "target_gb_too_small"),
        ({"target_gb": float("nan")}, "target_gb_too_small"),
        ({"bits": 5}, "bits_unknown"),
        ({"group_size": 48, "target_gb": 1.0}, "group_size_does_not_fit"),
        ({"device": "cuda:77"}, "device_missing"),
        ({"source": "/no/such/folder"}, "model_no_folder"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    tiny_chatglm: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], code: str
) -> None:
    job = QuantizeJob(**{"source": str(tiny_chatglm("fp16")), "target": str(tmp_path / "made"), **wish})
    [failed] = work(monkeypatch, job)
    assert failed["error"][1] == code
    assert list(tmp_path.iterdir()) == []


def test_the_work_ends_when_nobody_listens(
    tiny_chatglm: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(monkeypatch, QuantizeJob(str(tiny_chatglm("fp16")), str(tmp_path / "made")), gone=3)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(clock: object, step: str, fraction: float) -> str:
        assert [path.name.startswith(".made.") for path in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "_work", halfway)
    monkeypatch.setattr(quantize._Clock, "words", interrupt)
    assert (
        cli.main(["quantize", str(ROOT), str(tmp_path / "made"), "--data-dir", str(tmp_path / "data")]) == 130
    )
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_work", dying)
    with pytest.raises(EngineError, match=r"exit code 9"):
        quantize.run(QuantizeJob("a", str(tmp_path / "made")), "en")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("/no/such/folder", "made"), 1, "/no/such/folder"),
        ((str(ROOT), "made", "--bits", "4", "--target-gb", "4"), 2, "not both"),
    ],
)
def test_the_command_line_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert cli.main(["quantize", *arguments, "--data-dir", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err


def filled() -> Results:
    row = {"size": 3_900_000_000, "tokens": 1206, "top1": 0.951, "source_perplexity": 7.4}
    return Results(
        QuantizeJob("/a", "/b", target_gb=4.5),
        size=4_490_000_000,
        source_size=13_420_000_000,
        seconds=61.4,
        chosen=[
            {"name": "transformer.layers.0.attention.dense", "bits": 8, "size": 16_800_000, "error": 0.0031},
            {
                "name": "transformer.layers.0.mlp.dense_h_to_4h",
                "bits": 4,
                "size": 33_600_000,
                "error": 0.0522,
            },
        ],
        compared=[
            {**row, "name": "result", "kl": 0.0123, "result_perplexity": 7.6},
            {**row, "name": "int8", "kl": 0.0004, "result_perplexity": 7.41},
            {**row, "name": "int4-128", "kl": 0.01, "result_perplexity": 7.55},
        ],
    )


@pytest.mark.parametrize(("language", "groups"), [("en", "INT4, groups of 128"), ("zh", "INT4，每组 128 个")])
def test_the_tables_are_aligned(language: str, groups: str) -> None:
    lines = table(filled(), lambda key, **values: i18n.text(language, f"cli.{key}", **values))
    text = "\n".join(lines)
    assert "4.49" in lines[0]
    assert "13.42" in lines[0]
    assert "cli." not in text
    assert "{" not in text
    row = next(line for line in lines if groups in line)
    assert re.findall(r"[\d.]+%?", row.removeprefix(groups)) == ["3.90", "0.0100", "95.1%", "7.55"]
    ends = [line for line in lines if line.endswith(("7.4", "7.6", "7.41", "7.55"))]
    assert len({sum(2 if ord(c) > 0x2E80 else 1 for c in line) for line in ends}) == 1
    layers = [line for line in lines if line.startswith("transformer.layers.0")]
    assert [line.split()[1:] for line in layers] == [["8", "16.8", "0.31%"], ["4", "33.6", "5.22%"]]


def test_the_json_has_what_the_tables_have() -> None:
    found = json.loads(json.dumps(filled().as_json()))
    assert found["bits"] is None
    assert found["layers"][0] == {
        "name": "transformer.layers.0.attention.dense", "bits": 8, "mb": 16.8, "error": 0.0031,
    }  # fmt: skip
    assert found["report"]["rows"][2] == {
        "name": "int4-128", "size_gb": 3.9, "kl": 0.01, "top1": 0.951, "perplexity": 7.55,
    }  # fmt: skip
    assert (found["report"]["tokens"], found["report"]["source_perplexity"]) == (1206, 7.4)
