"""What a LoRA adapter, and a prefix, cost each token: the time of a step with them over that of one without.

    python benchmarks/extras_cost.py --layers 8

A random INT4 model with ChatGLM3-6B's shapes and fewer layers; r = 8 on all four linear layers, 128
entries of prefix. Steps with and without take turns, so that whatever else the machine does meets both.
Medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from glmui.bench import random_model
from glmui.engine.decoders import decoder_of
from glmui.engine.loaded import with_kernels
from glmui.glm.adapter import PARTS, Adapter, attach
from glmui.glm.cache import Prefix
from glmui.glm.checkpoint import AnyModel, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    size = "chatglm3-6b-int4"
    random_model.SIZES[size] = replace(random_model.SIZES[size], num_layers=args.layers)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        random_model.write(Path(folder), size)
        model = load_model(folder, family="chatglm3")
        with_kernels(model, "cpu", args.threads, "balanced")
        model.cache_dtype = torch.float16
        plain = stepper(model)
        model.prefix = prefix_of(model)
        fronted = stepper(model)
        adapter = adapter_of(model, args.rank)

        def adapted() -> float:
            handles = attach(model, adapter)
            seconds = plain()
            for handle in handles:
                handle.remove()
            return seconds

        found = [(plain(), adapted(), fronted()) for _ in range(args.steps)]
    alone, with_adapter, with_prefix = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"step {alone * 1000:.1f} ms, adapter {with_adapter / alone:.3f}, prefix {with_prefix / alone:.3f}")


def stepper(model: AnyModel) -> Callable[[], float]:
    """A function that takes one step after a prompt of 128 tokens and tells its seconds."""
    decoder, ids = decoder_of(model), [64790, 64792, *range(300, 426)]
    decoder.prefill(ids, lambda part: None)

    def step() -> float:
        start = time.perf_counter()
        decoder.step(500)
        return time.perf_counter() - start

    return step


def adapter_of(model: AnyModel, rank: int) -> Adapter:
    pairs = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in PARTS:
            a = torch.randn(rank, layer.in_features) / 100
            pairs[name] = a, torch.randn(layer.out_features, rank) / 100
    return Adapter(pairs)


def prefix_of(model: AnyModel) -> Prefix:
    config = model.config
    return Prefix(torch.randn(2 * config.num_layers, config.kv_heads, 128, config.head_size))


if __name__ == "__main__":
    main()
