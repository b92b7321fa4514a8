"""`glmui quantize` in a process of its own: choose bits, write the folder, compare it with its source.

Says through the pipe: doing (step, fraction), chosen (a layer's bits), written (sizes), compared (figures),
done, failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from glmui.engine.device import count_physical_cores, resolve_device
from glmui.engine.wire import Wire
from glmui.engine.worker import explain
from glmui.errors import InvalidInput, to_values
from glmui.glm.files import weight_files
from glmui.quantizing import compare, sensitivity
from glmui.quantizing.folder import Bits, Source, check_place, folder_bytes, open_source, quantize_folder
from glmui.quantizing.job import QuantizeJob
from glmui.quantizing.new_folder import check_target

GROUP_SIZES = (None, 128, 64, 32)  # what the report compares INT4 with; None is one scale per row


def run(connection: Connection, job: QuantizeJob) -> None:
    """Do the job, telling of it; returns early when nobody listens any more."""
    wire = Wire(connection)
    try:
        _Work(job, wire).do()
        _say(wire, "done")
    except _NobodyListens:
        return
    except BaseException as error:
        wire.send("failed", error=to_values(explain(error)))


class _NobodyListens(Exception):
    """The command is gone: no reason to go on, and what is half made is removed on the way out."""


def _say(wire: Wire, kind: str, **values: object) -> None:
    try:
        wire.send(kind, **values)
    except OSError as error:
        raise _NobodyListens from error


class _Work:
    def __init__(self, job: QuantizeJob, wire: Wire) -> None:
        self._job, self._wire = job, wire
        self._device = resolve_device("auto" if job.device == "mixed" else job.device)
        self._folder, self._target = Path(job.source), Path(job.target)
        torch.set_num_threads(job.threads or count_physical_cores())

    def do(self) -> None:
        """Everything that can be wrong is found before the first long step."""
        check_place(self._folder, self._target)
        check_target(self._target)
        source = open_source(self._folder)
        bits = self._bits(source)
        writing = self._part("writing")
        quantize_folder(
            self._folder,
            self._target,
            bits,
            self._job.group_size,
            on_progress=lambda progress: writing(progress.fraction or 0.0),
        )
        self._say(
            "written",
            size=folder_bytes(source, bits, self._job.group_size),
            source_size=sum(file.stat().st_size for file in weight_files(self._folder)),
        )
        if self._job.report:
            self._compare(source, bits)

    def _bits(self, source: Source) -> Bits:
        job = self._job
        uniform = source.uniform(job.bits, job.embeddings)
        folder_bytes(source, uniform, job.group_size)  # raises for a group size that does not fit
        if job.target_gb is None:
            return uniform
        table = source.table(sensitivity.WIDTHS[0]) if job.embeddings else {}
        room = int(min(job.target_gb, 1e6) * 1e9) if job.target_gb > 0 else 0
        if room < sensitivity.smallest_bytes(source, job.group_size, table):
            raise sensitivity.too_small(source, job.group_size, table)
        samples = compare.samples_for(self._folder)[:: sensitivity.EVERY]
        errors = sensitivity.measure(
            self._folder, samples, job.group_size, self._device, self._part("measuring")
        )
        choices = sensitivity.choose(source, errors, room, job.group_size, table)
        for choice in choices:
            self._say("chosen", **asdict(choice))
        return {choice.name: choice.bits for choice in choices} | table

    def _compare(self, source: Source, bits: Bits) -> None:
        """The source once, then the result as it lies on the disk, then what other forms would have given."""
        samples = compare.samples_for(self._folder)
        whole = compare.see_folder(self._folder, samples, self._device, on_part=self._part("source"))
        others = self._others(source, bits)
        total = len(others) + 1
        seen = compare.see_folder(
            self._target, samples, self._device, on_part=self._part("comparing", 1, total)
        )
        self._tell("result", samples, whole, seen, folder_bytes(source, bits, self._job.group_size))
        for number, (name, other, group_size) in enumerate(others, start=2):
            part = self._part("comparing", number, total)
            seen = compare.see_folder(self._folder, samples, self._device, other, group_size, part)
            self._tell(name, samples, whole, seen, folder_bytes(source, other, group_size))

    def _others(self, source: Source, bits: Bits) -> list[tuple[str, Bits, int | None]]:
        """INT8, and INT4 in every group size that fits, but for what the result itself is."""
        wanted: list[tuple[str, int, int | None]] = [("int8", 8, None)]
        wanted += [(f"int4-{size}" if size else "int4", 4, size) for size in GROUP_SIZES]
        found: list[tuple[str, Bits, int | None]] = []
        for name, width, group_size in wanted:
            plan = source.uniform(width, self._job.embeddings)
            if (plan, group_size) == (dict(bits), self._job.group_size) or not _fits(
                source, plan, group_size
            ):
                continue
            found.append((name, plan, group_size))
        return found

    def _tell(
        self, name: str, samples: list[compare.Sample], whole: compare.Seen, seen: compare.Seen, size: int
    ) -> None:
        self._say("compared", name=name, size=size, **asdict(compare.agreement(samples, whole, seen)))

    def _part(self, step: str, number: int = 1, total: int = 1) -> Callable[[float], None]:
        """What tells how far a step is, which is one of several alike."""
        return lambda part: self._say("doing", step=step, fraction=(number - 1 + part) / total)

    def _say(self, kind: str, **values: object) -> None:
        _say(self._wire, kind, **values)


def _fits(source: Source, bits: Bits, group_size: int | None) -> bool:
    try:
        folder_bytes(source, bits, group_size)
    except InvalidInput:
        return False
    return True
