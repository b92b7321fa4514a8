"""Stand-ins for the working process of `glmui quantize`. Light: a process that imports them is up at once."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

from glmui.engine.wire import Wire
from glmui.quantizing.job import QuantizeJob
from glmui.quantizing.new_folder import new_folder


def halfway(connection: Connection, job: QuantizeJob) -> None:
    """Half of a result is there, and it never ends."""
    with new_folder(Path(job.target), 0) as made:
        (made / "model.safetensors").write_bytes(b"half")
        Wire(connection).send("doing", step="writing", fraction=0.5)
        connection.recv_bytes()


def dying(connection: Connection, job: QuantizeJob) -> None:
    os._exit(9)
