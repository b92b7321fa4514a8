"""Family causal_lm: any chat model that transformers knows natively, from safetensors and a chat template.

No code of the model's folder is ever run, and no pickled weights are opened.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from glmui.engine import device as devices
from glmui.engine.generate import Speaker, common_prefix
from glmui.engine.loaded import LoadedEngine, told, warm_up, with_kernels
from glmui.engine.model_folder import describe, weight_files
from glmui.engine.precision import Precision, precision_of
from glmui.errors import ModelError
from glmui.text.chat_template import ChatTokenizer
from glmui.text.detokenise import StreamingDetokeniser
from glmui.types import BITS, EngineInfo, EngineSpec, Message, Progress

_PIECE_WORK = 25e9  # multiply-adds a CPU does in about half a second: how long Stop may wait in a prefill


class CausalDecoder:
    """A transformers model and its KV cache. What a prompt shares with the last one is not computed again."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self.model = model
        self._piece = piece_length(sum(p.numel() for p in model.parameters()), device)
        self.renew()

    def renew(self) -> None:
        """See generate.Decoder."""
        self._ids: list[int] = []  # what the cache holds
        self.cache = DynamicCache(config=self.model.config)

    def prefill(self, ids: list[int], on_piece: Callable[[float], None]) -> Tensor:
        """Logits [vocab] after `ids`; see generate.Decoder."""
        start = self._keep(min(common_prefix(self._ids, ids), len(ids) - 1))
        logits = torch.empty(0)
        for begin in range(start, len(ids), self._piece):
            piece = ids[begin : begin + self._piece]
            logits = self._forward(piece)
            on_piece((begin + len(piece)) / len(ids))
        return logits

    def step(self, token: int) -> Tensor:
        """Logits [vocab] after one more id."""
        return self._forward([token])

    def _keep(self, length: int) -> int:
        """Cut the cache back to its first `length` ids; where it cannot be cut, begin anew. What was kept."""
        surplus = len(self._ids) - length
        if surplus == 0:
            return length
        try:
            if not length or not self.cache.is_croppable:
                raise RuntimeError
            self.cache.crop(-surplus)
        except RuntimeError:  # a sliding window has already dropped what would be needed
            self.renew()
            return 0
        del self._ids[length:]
        return length

    def _forward(self, ids: list[int]) -> Tensor:
        input_ids = torch.tensor([ids], device=self.device)  # [1, n]
        try:
            out = self.model(
                input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        except BaseException:
            self.renew()  # some layers may have cached this piece and others not
            raise
        self._ids += ids
        logits: Tensor = out.logits[0, -1]  # [vocab]
        return logits


def piece_length(parameters: int, device: torch.device) -> int:
    """Ids per piece of a prefill: few enough that Stop is quick, many enough that matrices are worth it."""
    if device.type != "cpu":
        return 512
    affordable = int(_PIECE_WORK / max(parameters, 1))
    return max(16, min(256, 1 << (max(affordable, 1).bit_length() - 1)))


def open_causal_lm(spec: EngineSpec, on_progress: Callable[[Progress], None]) -> LoadedEngine:
    """Load the model of `spec.folder`. Raises ModelError, InvalidInput (device) or EngineError."""
    folder = Path(spec.folder)
    described = describe(folder)
    weight_bytes = sum(file.stat().st_size for file in weight_files(folder))
    tokenizer = ChatTokenizer.from_folder(folder)
    precision = precision_of(spec.device, described.dtype, weight_bytes)
    threads = spec.threads or devices.count_physical_cores()
    torch.set_num_threads(threads)
    expected = weight_bytes * precision.torch_dtype.itemsize // (4 if described.dtype == "float32" else 2)
    with _watched(on_progress, expected if precision.device == "cpu" else 0):
        model = _quantized(_load(folder, precision), spec.quantize)
        model.to(precision.device)  # once it is small
        quantised = spec.quantize != "none" and precision.dtype == "float32"
        kernels = with_kernels(model, precision.device, threads, spec.cpu_precision) if quantised else None
    decoder = CausalDecoder(model, torch.device(precision.device))
    if precision.device != "cpu":
        warm_up(decoder, tokenizer.encode_chat)
        decoder.renew()
    info = EngineInfo(
        state="ready",
        model=spec.model,
        family="causal_lm",
        device=precision.device,
        dtype=precision.dtype if spec.quantize == "none" else spec.quantize,
        threads=threads,
        context_length=described.context_length,
        reason=precision.reason,
    )
    speaker = Speaker(
        decoder=decoder,
        stop_ids=tokenizer.eos_ids,
        context_length=described.context_length,
        stop_repetition=spec.stop_repetition,
        on_progress=on_progress,
    )

    def ask(messages: Sequence[Message]) -> tuple[list[int], StreamingDetokeniser]:
        return tokenizer.encode_chat(messages), StreamingDetokeniser(tokenizer.decode)

    return LoadedEngine(speaker, ask, told(info, kernels, spec.cpu_precision))


def _load(folder: Path, precision: Precision) -> Any:
    """The model, in RAM: to load it straight onto a card, transformers wants another package (accelerate)."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=precision.torch_dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError("model_not_loadable", folder=folder, detail=first_line) from error
    return model.eval()


def _quantized(model: Any, wish: str) -> Any:
    if wish == "none":
        return model
    from glmui.quant import quantize

    return quantize(model, weight_bit_width=BITS[wish])


@contextlib.contextmanager
def _watched(on_progress: Callable[[Progress], None], expected_bytes: int) -> Iterator[None]:
    """Report loading by how much this process has grown; 0 expected bytes: only that it goes on."""
    on_progress(Progress("loading", 0.0 if expected_bytes else None))
    done = threading.Event()
    before = psutil.Process().memory_info().rss

    def watch() -> None:
        while expected_bytes and not done.wait(0.25):
            grown = psutil.Process().memory_info().rss - before
            on_progress(Progress("loading", max(0.0, min(grown / expected_bytes, 0.99))))

    watcher = threading.Thread(target=watch, name="load-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
