"""The shapes of the published models by their catalogue names: for planning without a folder."""

from __future__ import annotations

from dataclasses import replace

from glmui.glm.config import AnyConfig, GLM2Config, GLMConfig

_GLM = GLMConfig(130528, 4096, 16384, 28, 32)
_GLM2 = GLM2Config("chatglm2", 65024, 4096, 13696, 128, 28, 32, 2, 32768)
_GLM3 = replace(_GLM2, family="chatglm3", seq_length=8192)

SHAPES: dict[str, AnyConfig] = {
    "chatglm-6b": _GLM,
    "chatglm-6b-int8": replace(_GLM, quantization_bit=8),
    "chatglm-6b-int4": replace(_GLM, quantization_bit=4),
    "chatglm-6b-int4-qe": replace(_GLM, quantization_bit=4, quantization_embeddings=True),
    "chatglm2-6b": _GLM2,
    "chatglm2-6b-int4": replace(_GLM2, quantization_bit=4),
    "chatglm3-6b": _GLM3,
    "chatglm3-6b-int4": replace(_GLM3, quantization_bit=4),
}
