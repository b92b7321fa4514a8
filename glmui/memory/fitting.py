"""Questions around a plan: what a spec asks for, how long a conversation it holds, what less would bring."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import Machine, Plan, Wish, budget, bytes_on, longest, plan
from glmui.types import EngineSpec

LEAST_ROOM = 512  # tokens: with less there is no conversation


def context_of(size: ModelSize, found: Plan, most: int) -> int:
    """The most tokens, up to `most`, that this very plan has memory for; 0 where not even its weights fit."""
    counts = Counter(found.layers)

    def fits(context: int) -> bool:
        on = bytes_on(size, replace(found.wish, context=context), counts)
        return all(need <= budget(found.machine, found.wish, name) for name, need in on.items())

    return longest(fits, most)


def context_that_fits(size: ModelSize, machine: Machine, wish: Wish) -> int:
    """The most tokens, up to those wished for, that any plan has room for; 0 for no conversation."""
    most = longest(
        lambda context: not plan(size, machine, replace(wish, context=context)).short, wish.context
    )
    return most if most >= LEAST_ROOM else 0


def layers_that_fit(size: ModelSize, found: Plan) -> int:
    """How many the cards hold, where more were asked onto them; 0 where something else is short."""
    if not set(found.short) - {CPU}:
        return 0
    free = plan(size, found.machine, replace(found.wish, device="mixed", layers_on_card=None, piece=0))
    return 0 if free.short else free.layers_on_card


def lighter(size: ModelSize, found: Plan) -> Wish | None:
    """The smallest sacrifice that brings all layers onto the cards, where they are not: a quantised head, a
    quantised cache, or both. None where there is none, or where the layers were chosen."""
    wish = found.wish
    free_to_choose = wish.device in ("auto", "mixed") and wish.layers_on_card is None
    if not (found.machine.cards and free_to_choose and CPU in found.layers):
        return None
    for head_bits, cache in ((8, wish.cache), (wish.head_bits, "int8"), (8, "int8")):
        less = replace(wish, head_bits=head_bits, cache=cache, piece=0)
        if (made := plan(size, found.machine, less)).layers_on_card == size.layers and not made.short:
            return less
    return None


def wish_of(spec: EngineSpec) -> Wish:
    """What a spec asks the plan for."""
    cache = "fp16" if spec.kv_cache == "auto" and spec.cpu_precision != "exact" else spec.kv_cache
    return Wish(
        device=spec.device,
        context=min(spec.context, spec.context_most or spec.context),
        layers_on_card=spec.layers_on_gpu if spec.device == "mixed" else None,
        reserve=spec.vram_reserve,
        head_bits=spec.head_bits,
        cache=cache,
        piece=spec.prefill_piece,
    )


def most_tokens(spec: EngineSpec, size: ModelSize) -> int:
    """What a conversation may take at most, however much memory there is: what the model was trained for, or
    was asked to hold all the same."""
    most = max(size.positions, spec.context)
    return min(most, spec.context_most or most)


def room(spec: EngineSpec, size: ModelSize, found: Plan) -> int:
    """The most tokens of prompt and reply that the plan of this spec has memory for.

    Never less than LEAST_ROOM: where the plan has none it was asked for what does not fit, which is tried,
    and with less there is no conversation.
    """
    most = most_tokens(spec, size)
    return max(context_of(size, found, most), min(LEAST_ROOM, most))
