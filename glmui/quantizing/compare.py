"""How far one model's next tokens are from another's, on a built-in set of Chinese and English texts.

Each sample is a question and its answer, as a conversation shows them to the model; what is compared is the
prediction of each token of the answer and of its end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from glmui.glm.cache import KVCache
from glmui.glm.checkpoint import AnyModel
from glmui.glm.config import read_config
from glmui.quantizing.folder import EITHER, Bits
from glmui.quantizing.streamed import Weights, cache_for, stream
from glmui.text.chatglms import open_tokenizer, prompt_ids
from glmui.types import Message

_TEXTS = Path(__file__).resolve().parent.parent.parent / "assets" / "comparison.json"
_ROWS = 64  # predictions worked on at a time: 67 MB of logits in float64

OnPart = Callable[[float], None]  # told the part done, 0..1


@dataclass(frozen=True, slots=True)
class Sample:
    """ids: question, answer and its end. scored: how many of the last ids are compared."""

    ids: tuple[int, ...]
    scored: int

    @property
    def targets(self) -> Tensor:
        """int64 [scored]: what came next in the text, for each compared prediction."""
        return torch.tensor(self.ids[-self.scored :])


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model made of the samples: hidden states [scored, H] before its output head, for each."""

    hidden: tuple[Tensor, ...]
    head: nn.Module

    @torch.inference_mode()
    def logits(self, sample: int, first: int, last: int) -> Tensor:
        """float64 [last - first, V] on the CPU, of these predictions of one sample."""
        out: Tensor = self.head(self.hidden[sample][first:last])
        return out.cpu().double()


@dataclass(frozen=True, slots=True)
class Agreement:
    """A result beside its source, over `tokens` predictions.

    kl: mean KL(source ‖ result) of the next token, in nats. top1: the share with the same likeliest token.
    source_perplexity, result_perplexity: of the texts.
    """

    tokens: int
    kl: float
    top1: float
    source_perplexity: float
    result_perplexity: float


def samples_for(folder: Path) -> list[Sample]:
    """The built-in texts as ids of the folder's vocabulary."""
    config = read_config(folder, EITHER)
    tokenizer = open_tokenizer(folder, config.family, config.vocab_size)
    samples = []
    for text in json.loads(_TEXTS.read_text(encoding="utf-8")):
        asked = [Message("user", text["question"])]
        said = [*asked, Message("assistant", text["answer"])]
        whole = [*prompt_ids(tokenizer, said), config.eos_token_id]
        samples.append(Sample(tuple(whole), len(whole) - len(prompt_ids(tokenizer, asked))))
    return samples


def see_folder(
    folder: Path,
    samples: Sequence[Sample],
    device: str = "cpu",
    bits: Bits | None = None,
    group_size: int | None = None,
    on_part: OnPart = lambda part: None,
) -> Seen:
    """One pass over a ChatGLM folder of any size, in the memory of one block, in float32 and not as kernels
    compute: see see_model for that. bits, group_size: as it would be with these modules quantised.

    Raises ModelError.
    """
    model = stream(Weights(folder, bits, group_size), device, on_part)
    hidden = run(model, samples, cache_for(model, longest(samples)))
    return _seen(model, samples, hidden)


def see_model(model: AnyModel, samples: Sequence[Sample]) -> Seen:
    """A model in memory, with whatever kernels it has. The result keeps its output head alive, no more."""
    return _seen(model, samples, (run(model, [s], model.new_cache(len(s.ids)))[0] for s in samples))


def _seen(model: AnyModel, samples: Sequence[Sample], hidden: Iterable[Tensor]) -> Seen:
    # Each prediction stands at the token before; the last hidden state predicts nothing that is known.
    rows = (row[-s.scored - 1 : -1].clone() for row, s in zip(hidden, samples, strict=True))
    return Seen(tuple(rows), model.get_submodule(model.HEAD))


@torch.inference_mode()
def run(model: AnyModel, samples: Sequence[Sample], cache: KVCache) -> Tensor:
    """Samples as one batch, padded on the left → normed hidden states [samples, n, H]."""
    rows, pads = model.pad_left([sample.ids for sample in samples])
    rows = rows.to(model.device)
    hidden: Tensor = model.transformer(rows, model.layout(rows, pads), cache)
    return hidden


def longest(samples: Sequence[Sample]) -> int:
    return max(len(sample.ids) for sample in samples)


@torch.inference_mode()
def agreement(samples: Sequence[Sample], source: Seen, result: Seen) -> Agreement:
    """The figures over all predictions of all samples, in float64."""
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for place, first, last in _pieces(samples):
        a, b = source.logits(place, first, last), result.logits(place, first, last)
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        targets = samples[place].targets[first:last, None]
        kl = (p.exp() * (p - q)).sum()
        same = (a.argmax(-1) == b.argmax(-1)).sum()
        sums += torch.stack((kl, same, p.gather(-1, targets).sum(), q.gather(-1, targets).sum()))
        tokens += last - first
    kl, same, known, known_now = (sums / tokens).tolist()
    return Agreement(tokens, max(kl, 0.0), same, _exp(-known), _exp(-known_now))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a broken model's is as good as infinite, which JSON cannot say


def _pieces(samples: Sequence[Sample]) -> Iterator[tuple[int, int, int]]:
    for place, sample in enumerate(samples):
        for first in range(0, sample.scored, _ROWS):
            yield place, first, min(first + _ROWS, sample.scored)
