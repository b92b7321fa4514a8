"""`glmui bench`: the figures, their arithmetic, and what is said where one cannot be taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from glmui import cli, i18n
from glmui.bench import measure, random_model
from glmui.bench.figures import Figures, NotMeasured, decode_rate, median_of
from glmui.bench.probe import ReadProbe
from glmui.engine.families import open_family
from glmui.engine.placement import cache_dtype
from glmui.errors import EngineError, FetchError
from glmui.quantizing.tensor_header import bytes_of
from glmui.tools.bench_results import Results, of_limit, table
from glmui.types import EngineInfo, EngineSpec
from tests.tiny_llama import make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent


def bench(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "glmui", "bench", *arguments, "--data-dir", str(data_dir), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def filled(**changes: Any) -> Results:
    """Results with made-up figures."""
    results = Results(
        info=EngineInfo(
            model="m", dtype="int4", device="cpu", threads=2, kernel="avx2", cpu_precision="fast"
        ),
        load_s=[4.25, 1.5],
        rows={
            "prefill_tok_s": {"32": 9.0, "128": 10.5, "512": 11.0},
            "decode_tok_s": {"128": 4.0, "1024": 3.0},
            "batch_tok_s": {"1": 4.0, "2": 7.5, "4": 12.0, "8": 1234.5},
        },
        weight_bytes=3_900_000_000,
        cache_bytes=100_000_000,
        limits=[19.0, 21.0, 20.0],
        peak_rss=5_100_000_000,
    )
    for name, value in changes.items():
        setattr(results, name, value)
    return results


def lines(results: Results, language: str) -> list[str]:
    return table(results, lambda key, **values: i18n.text(language, f"cli.{key}", **values))


def test_the_part_of_the_limit_is_what_is_read_over_what_could_be() -> None:
    assert of_limit(4_000_000_000, 4.0, 20.0) == pytest.approx(0.8)
    assert of_limit(4_000_000_000, None, 20.0) is None
    assert of_limit(4_000_000_000, 4.0, None) is None
    figures = filled().as_json()
    assert (figures["read_limit_gb_s"], figures["decode_of_limit"]) == (20.0, 0.8)
    assert (figures["load_s"], figures["load_again_s"], figures["peak_rss_gb"]) == (4.25, 1.5, 5.1)
    assert (figures["kernel"], figures["cpu_precision"]) == ("avx2", "fast")


@pytest.mark.parametrize(
    ("language", "decode", "batch"),
    [("en", "decode after 128 tokens", "batch of 8"), ("zh", "在 128 个 token 之后生成", "8 条同时生成")],
)
def test_the_table_is_aligned_and_has_units(language: str, decode: str, batch: str) -> None:
    shown = lines(filled(), language)
    assert "int4" in shown[0]
    assert "avx2" in shown[0]
    text = "\n".join(shown)
    assert "cli." not in text
    assert "{" not in text
    assert next(line for line in shown if decode in line).endswith(" 4.00 tok/s")
    assert next(line for line in shown if batch in line).endswith(" 1234 tok/s")
    assert "4.00 GB" in shown[-1]  # what a token reads, explained
    speeds = [line.removesuffix("tok/s") for line in shown if line.endswith("tok/s")]
    assert len({sum(2 if ord(c) > 0x2E80 else 1 for c in line) for line in speeds}) == 1


def test_a_figure_that_is_missing_is_said() -> None:
    results = filled(missing=[("batch_tok_s", "4", "no_batch")])
    results.rows["batch_tok_s"]["4"] = None
    shown = lines(results, "en")
    assert "Not measured: decode, batch of 4" in shown[-1]
    assert next(line for line in shown if line.startswith("decode, batch of 4")).endswith("-")
    assert results.as_json()["batch_tok_s"]["4"] is None


def test_spread_over_two_memories_there_is_no_limit() -> None:
    results = filled(info=EngineInfo(device="mixed"), limits=[])
    assert results.as_json()["decode_of_limit"] is None
    assert "not in one memory" in lines(results, "en")[-1]


@pytest.mark.slow
def test_the_whole_command_on_a_small_model(tmp_path: Path) -> None:
    done = bench(tmp_path, "--random", "tiny", "--threads", "1", "--json")
    assert done.stderr == ""
    figures = json.loads(done.stdout)
    assert list(figures) == [
        "load_s", "load_again_s", "prefill_tok_s", "decode_tok_s", "batch_tok_s", "peak_rss_gb",
        "read_limit_gb_s", "decode_of_limit", "cpu_precision", "kernel", "threads",
    ]  # fmt: skip
    assert list(figures["prefill_tok_s"]) == ["32", "128", "512"]
    assert list(figures["decode_tok_s"]) == ["128", "1024"]
    assert list(figures["batch_tok_s"]) == ["1", "2", "4", "8"]
    rates = [value for name in figures if name.endswith("tok_s") for value in figures[name].values()]
    assert all(value > 0 for value in rates)
    assert all(figures[name] > 0 for name in ("load_s", "load_again_s", "peak_rss_gb", "read_limit_gb_s"))
    assert 0 < figures["decode_of_limit"] < 1.5
    assert figures["threads"] == 1
    assert list(tmp_path.glob("bench-*")) == []  # the random model is gone


def test_a_transformers_model_decodes_one_row(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "llama")
    engine = open_family(EngineSpec("llama", str(folder), "cpu", 1), lambda progress: None)
    subject, described = measure.subject_of(engine), json.loads((folder / "config.json").read_text())
    subject.prefill(8)
    rows = subject.at(16, 1)
    rows.reset()
    rows.step()
    heads = described.get("num_key_value_heads") or described["num_attention_heads"]
    size = described.get("head_dim") or described["hidden_size"] // described["num_attention_heads"]
    assert rows.cache_bytes() == 16 * 2 * 4 * described["num_hidden_layers"] * heads * size
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0.5 * stored < subject.weight_bytes < 2.1 * stored
    with pytest.raises(NotMeasured, match="no_batch"):
        subject.at(16, 2)


def test_chatglm_reads_all_of_its_weights_and_its_cache(tmp_path: Path) -> None:
    random_model.write(tmp_path, "tiny")
    config = random_model.SIZES["tiny"]
    spec = EngineSpec("tiny", str(tmp_path), "cpu", 1)
    subject = measure.subject_of(open_family(spec, lambda progress: None))
    stored = sum(bytes_of((dtype, shape)) for _, dtype, shape in random_model.tensors_of(config))
    assert stored <= subject.weight_bytes < 1.01 * stored  # the embedding in float16 as in the file
    subject.prefill(8)
    rows = subject.at(16, 3)
    rows.reset()
    rows.step()
    kept = cache_dtype(spec) or torch.float32
    assert rows.cache_bytes() == 3 * 16 * 2 * kept.itemsize * config.num_layers * config.hidden_size


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "--random"),
        (("--model", "starter", "--random", "tiny"), 2, "--random"),
        (("--model", "/no/such/folder"), 1, "/no/such/folder"),
        (("--model", str(ROOT)), 1, "config.json"),
        (("--model", "echo"), 2, "--model"),
    ],
)
def test_what_cannot_be_measured_is_said(
    tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = bench(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_too_little_memory_is_said_before_loading(tmp_path: Path) -> None:
    random_model.write(tmp_path, "tiny")
    spec = EngineSpec("tiny", str(tmp_path), "cpu")
    measure.check_memory(spec, 4_000_000_000)
    with pytest.raises(EngineError, match=r"1\.5 GB of memory, and 1\.0 GB"):
        measure.check_memory(spec, 1_000_000_000)


def test_a_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = (10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(random_model.shutil, "disk_usage", lambda folder: type("U", (), {"free": usage[2]}))
    with pytest.raises(FetchError, match="1 MB free"):
        random_model.write(tmp_path, "chatglm-6b-int4")
    assert list(tmp_path.iterdir()) == []


def test_the_random_6b_has_the_published_size() -> None:
    config = random_model.SIZES["chatglm-6b-int4"]
    tensors = list(random_model.tensors_of(config))
    total = sum(bytes_of((dtype, shape)) for _, dtype, shape in tensors)
    assert total / 1e9 == pytest.approx(3.89, abs=0.01)
    assert set(dict(cli.BENCH)["--random"]["choices"]) == set(random_model.SIZES)


def test_the_probe_reads_at_a_believable_speed() -> None:
    probe = ReadProbe(2, size=1 << 24)
    assert 0.1 < probe.measure() < 10_000
    probe.close()


class Told(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, **values: Any) -> None:
        self.append((kind, values))

    def figure(self, name: str, key: str) -> dict[str, Any]:
        return next(v for kind, v in self if (kind, v.get("name"), v.get("key")) == ("figure", name, key))


class Model:
    """A subject that takes no time and can decode one row."""

    weight_bytes = 1000
    reads_context = True

    def prefill(self, tokens: int) -> None: ...

    def at(self, context: int, rows: int) -> Model:
        if rows > 1:
            raise NotMeasured("no_batch")
        return self

    def reset(self) -> None: ...

    def step(self) -> None: ...

    def cache_bytes(self) -> int:
        return 24


def test_the_limit_is_taken_between_the_runs_of_one_figure() -> None:
    told, probed = Told(), []
    info = EngineInfo(device="cpu", context_length=600)
    Figures(Model(), info, told, lambda: probed.append(len(told))).take()
    assert ("bytes", {"weights": 1000, "cache": 24}) in told
    assert len(probed) == 6  # before, between and after five runs
    place = [i for i, (kind, v) in enumerate(told) if kind == "doing" and v["name"] == "decode_tok_s"]
    assert all(place[0] < p <= place[1] for p in probed)
    assert told.figure("decode_tok_s", "1024") | {"name": ""} == {
        "name": "", "key": "1024", "value": None, "why": "short_context"
    }  # fmt: skip
    assert told.figure("batch_tok_s", "8")["why"] == "no_batch"
    assert told.figure("batch_tok_s", "1")["value"] > 0


def test_medians_of_as_many_runs_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter(range(0, 1000, 10))
    monkeypatch.setattr("glmui.bench.figures.time.monotonic", partial(next, clock))
    values = iter([1.0, 5.0, 3.0, 100.0])
    assert median_of(partial(next, values), seconds=30) == 3.0
    assert median_of(lambda: 7.0, seconds=0) == 7.0  # once, however long it takes


def test_decoding_starts_from_the_same_context_each_time() -> None:
    calls: list[str] = []

    class Slow(Model):
        def reset(self) -> None:
            calls.append("reset")

        def step(self) -> None:
            calls.append("step")

    assert decode_rate(Slow()) > 0
    runs = "".join(c[0] for c in calls).split("r")[2:]
    assert {len(run) for run in runs} == {32}
