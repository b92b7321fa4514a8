"""An engine process that runs out of a card's memory: torch's own error, raised inside the model.

Put in worker's place (see test_out_of_memory.py). The spec's model tells what fails: "load", "prefill" or
"decode", as long as the spec is the chosen one; with " always" behind it, on every rung.
"""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import Any

from glmui.engine import worker
from glmui.types import EngineSpec

LONG = 30  # tokens of a prompt: longer ones fail
MOST_CALLS = 40  # of blocks: some tokens of the reply to a long prompt
WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 5.80 GiB"


def run(connection: Connection, spec: EngineSpec) -> None:
    """Entry of the process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    stage, _, always = spec.model.partition(" ")
    if always or not spec.hasty:
        _break(stage)
    worker.run(connection, spec)


def _break(stage: str) -> None:
    import torch

    from glmui.engine import chatglm
    from glmui.glm.model import GLMBlock

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(WORDS)

    if stage == "load":
        chatglm.load_model = full
        return
    inner, calls = GLMBlock.forward, 0  # since a long prompt began

    def forward(self: Any, x: torch.Tensor, *rest: Any, **more: Any) -> Any:
        nonlocal calls
        is_long = x.shape[1] > LONG
        calls += is_long or calls > 0
        if calls > MOST_CALLS or (stage == "prefill" and is_long):
            full()
        return inner(self, x, *rest, **more)

    GLMBlock.forward = forward  # type: ignore[method-assign]
