"""ChatGLM-6B-INT4 on a CPU computed as its published code does it, for comparison.

For each multiplication a whole matrix is widened to float32 by a loop in C, compiled as published with
`gcc -O3 -fopenmp`, and multiplied by torch; the output head is float32. All else is glmui's.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmui.bench.figures import Subject
from glmui.bench.subjects import GLMSubject
from glmui.engine.decoders import decoder_of
from glmui.glm.checkpoint import load_model
from glmui.quant import QuantizedLinear

SOURCE = """
#include <stdint.h>
void widen(const int8_t *packed, const float *scale, float *out, long rows, long bytes) {
#pragma omp parallel for
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < bytes; c++) {
            int8_t both = packed[r * bytes + c];
            out[(r * bytes + c) * 2] = scale[r] * (both >> 4);
            out[(r * bytes + c) * 2 + 1] = scale[r] * ((int8_t)(both << 4) >> 4);
        }
}
"""


class PublishedLinear(nn.Module):
    def __init__(self, linear: QuantizedLinear, widen: ctypes._NamedFuncPointer) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = linear.weight_scale.float()
        self._widen = widen

    def forward(self, x: Tensor) -> Tensor:
        rows, width = self.weight.shape
        matrix = torch.empty(rows, 2 * width)
        pointers = (tensor.data_ptr() for tensor in (self.weight, self.scale, matrix))
        self._widen(*pointers, rows, width)
        return F.linear(x, matrix, self.bias)


def open_model(folder: str, threads: int) -> Subject:
    """The INT4 checkpoint in `folder`, computed the published way."""
    torch.set_num_threads(threads)
    model = load_model(folder)
    widen = compiled()
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, PublishedLinear(module, widen))
    weight = model.transformer.word_embeddings.weight
    model.lm_head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    model.lm_head.weight = model.transformer.word_embeddings.weight = nn.Parameter(weight.float())
    return GLMSubject(decoder_of(model))


def compiled() -> ctypes._NamedFuncPointer:
    """The loop, compiled in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "widen.c", Path(folder) / "widen.so"
        source.write_text(SOURCE, encoding="utf-8")
        command = ["gcc", "-O3", "-fPIC", "-pthread", "-fopenmp", "-std=c99", "-shared"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).widen
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2
    return function
