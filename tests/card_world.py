"""A page with one imagined 6 GB card: the real app, a scripted engine that says it is there, a fake NVML."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI

from glmui.chat import ChatService
from glmui.choice import Choice
from glmui.downloads import Downloads
from glmui.memory.forecast import Forecast, forecast
from glmui.meter import Meter
from glmui.security import Guard, allowed_hosts
from glmui.server import import_gradio
from glmui.settings import Settings
from glmui.store import Store
from glmui.text import pieces
from glmui.types import EngineInfo, EngineSpec
from glmui.ui.desk import Desk
from glmui.ui.shelf import Shelf
from tests.small_vocabulary import small_vocabulary
from tests.small_world import Echo, World, wait_for

GIB = 2**30
MODEL = "chatglm-6b-int4"
CARD = "NVIDIA GeForce RTX 3060 Laptop GPU"
OTHERS = 400_000_000  # bytes of the card that the screen takes
HELD = 4_300_000_000  # and the loaded model
FALL_SECONDS = 0.4  # so long the driver goes on counting memory that is free
CONFIG = {
    "model_type": "chatglm",
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "vocab_size": 130528,
    "max_sequence_length": 2048,
    "quantization_bit": 4,
}


class CardEngine(Echo):
    """The scripted engine in the clothes of a ChatGLM on card and CPU."""

    loaded = EngineInfo(
        state="ready",
        model=MODEL,
        family="chatglm",
        device="mixed",
        dtype="int4",
        context_length=2048,
        context_room=2048,
        layers=("cuda:0",) * 20 + ("cpu",) * 8,
        pid=os.getpid(),
        reason="reasons.chatglm_mixed",
        kernel="sm_86",
    )
    ended_at = -FALL_SECONDS

    def info(self) -> EngineInfo:
        if self._awake:
            return self.loaded
        return EngineInfo(model=MODEL, family="chatglm", context_length=2048)

    def unload(self) -> None:
        super().unload()
        self.ended_at = time.monotonic()

    @property
    def held(self) -> int:
        """Bytes of the card, as a driver tells of it: a little late."""
        return HELD if self._awake or time.monotonic() - self.ended_at < FALL_SECONDS else 0


class NvmlCard:
    """NVML's functions for one card. lets_go: whether its number falls when the engine ends.
    tells_owners: whether it says whose memory it is, which Windows does not."""

    def __init__(self, engine: CardEngine, total: int = 6 * GIB, others: int = OTHERS) -> None:
        self.engine, self.total, self.others = engine, total, others
        self.lets_go = self.tells_owners = True

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, card: int) -> str:
        return CARD

    def nvmlDeviceGetMemoryInfo(self, card: int) -> Any:
        held = self.engine.held if self.lets_go else HELD
        return SimpleNamespace(used=self.others + held, total=self.total)

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[Any]:
        held = self.engine.held if self.tells_owners else None
        return [] if held == 0 else [SimpleNamespace(pid=os.getpid(), usedGpuMemory=held)]


class NoCard(NvmlCard):
    def __init__(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 0


def put_model(data_dir: Path) -> Path:
    """The folder of a ChatGLM-6B-INT4 as far as anybody looks who does not load it."""
    folder = data_dir / "models" / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "ice_text.model").write_bytes(small_vocabulary())
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class CardWorld(World):
    """cards: whether there is the card; without it, it is a computer with a CPU alone."""

    def __init__(self, folder: Path, cards: bool = True, **settings: Any) -> None:
        put_model(folder)
        self.folder = folder
        self.engine = CardEngine()
        self.card = NvmlCard(self.engine)
        self.meter = Meter(self.card if cards else NoCard())
        self.choice = Choice(Settings(data_dir=folder, model=MODEL, **settings))
        self.store = Store.open(folder)
        self.service = ChatService(
            self.store, self.engine, self.choice.spec, lambda _: pieces.count, self._foresee
        )

    def _foresee(self, spec: EngineSpec) -> Forecast | None:
        info = self.engine.info()
        return forecast(spec, self.meter.read(info.pid), info if info.pid is not None else None)

    @property
    def page(self) -> Desk:
        downloads = Downloads(lambda: self.choice.settings, self.choice.take_up)
        shelf = Shelf(self.service, self.choice, downloads, self.meter)
        return Desk(self.service, self.choice, shelf, self.meter)


@contextmanager
def served(desk: Desk, data_dir: Path) -> Iterator[str]:
    """The page of this desk behind the real guard, on a port of this machine; its address."""
    import_gradio(Settings(data_dir=data_dir))
    from glmui.ui.mount import mount

    app = FastAPI(openapi_url=None)
    mount(app, desk)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        guarded = Guard(app, allowed_hosts(port, "127.0.0.1"))
        config = uvicorn.Config(guarded, log_config=None, ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_for(lambda: server.started, 30)
        yield f"http://127.0.0.1:{port}/"
        server.should_exit = True
        thread.join(10)
