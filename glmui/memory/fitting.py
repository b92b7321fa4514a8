"""Questions around a plan: what a spec asks for, how long a conversation it holds, what less would bring."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from glmui.memory.model_size import CPU, ModelSize
from glmui.memory.plan import Plan, bytes_on, plan
from glmui.memory.plan_request import Machine, PlanRequest, budget
from glmui.memory.spread import longest
from glmui.types import LEAST_CONTEXT, EngineSpec


def context_of(size: ModelSize, found: Plan, most: int, mapped: bool = True) -> int:
    """The most tokens, up to `most`, that this very plan has memory for; 0 where not even its weights fit.

    mapped: whether there must be memory for all pages of files, too, so that none is read twice.
    """
    counts = Counter(found.layers)
    spared = 0 if mapped else found.mapped

    def fits(context: int) -> bool:
        on = bytes_on(size, replace(found.request, context=context), counts)
        on[CPU] -= spared
        return all(need <= budget(found.machine, found.request, name) for name, need in on.items())

    return longest(fits, most)


def longest_context(size: ModelSize, found: Plan, most: int) -> int:
    """How long a conversation may get, up to `most` tokens; 0 for none.

    Nobody is ended for want of RAM that pages of files would take: the system drops them and reads them
    again. That is slow, so no conversation grows into it by itself, but what was planned for is to be had.
    """
    planned = min(found.request.context, most)
    return max(context_of(size, found, most), context_of(size, found, planned, mapped=False))


def slow_context(size: ModelSize, found: Plan) -> int:
    """The most tokens with which a plan that is short would work slowly; 0 where there is no such number."""
    most = 0 if found.works else longest_context(size, found, found.request.context)
    return most if most >= LEAST_CONTEXT else 0


def context_that_fits(size: ModelSize, machine: Machine, request: PlanRequest) -> int:
    """The most tokens, up to those asked for, that any plan has room for; 0 for no conversation."""
    most = longest(
        lambda context: not plan(size, machine, replace(request, context=context)).short, request.context
    )
    return most if most >= LEAST_CONTEXT else 0


def layers_that_fit(size: ModelSize, found: Plan) -> int:
    """How many the cards hold, where more were asked onto them; 0 where something else is short."""
    if not set(found.short) - {CPU}:
        return 0
    free = replace(found.request, device="mixed", layers_on_gpu=None, prefill_piece=0)
    made = plan(size, found.machine, free)
    return made.layers_on_card if made.works else 0


def lighter(size: ModelSize, found: Plan) -> PlanRequest | None:
    """The smallest sacrifice that brings all layers onto the cards, where they are not: a quantised head, a
    quantised cache, or both. None where there is none, or where the layers were chosen."""
    asked = found.request
    free_to_choose = asked.device in ("auto", "mixed") and asked.layers_on_gpu is None
    if not (found.machine.cards and free_to_choose and CPU in found.layers):
        return None
    for head_bits, kv_cache in ((8, asked.kv_cache), (asked.head_bits, "int8"), (8, "int8")):
        less = replace(asked, head_bits=head_bits, kv_cache=kv_cache, prefill_piece=0)
        if (made := plan(size, found.machine, less)).layers_on_card == size.layers and not made.short:
            return less
    return None


def request_of(spec: EngineSpec) -> PlanRequest:
    """What a spec asks the plan for."""
    half = spec.kv_cache == "auto" and spec.cpu_precision != "exact"
    return PlanRequest(
        device=spec.device,
        context=min(spec.context, spec.context_most or spec.context),
        layers_on_gpu=spec.layers_on_gpu if spec.device == "mixed" else None,
        vram_reserve=spec.vram_reserve,
        head_bits=spec.head_bits,
        kv_cache="fp16" if half else spec.kv_cache,
        prefill_piece=spec.prefill_piece,
        packed=bool(spec.packed_dir),
    )


def most_tokens(spec: EngineSpec, size: ModelSize) -> int:
    """What a conversation may take at most, however much memory there is: what the model was trained for, or
    was asked to hold all the same."""
    most = max(size.positions, spec.context)
    return min(most, spec.context_most or most)


def room(spec: EngineSpec, size: ModelSize, found: Plan) -> int:
    """The most tokens of prompt and reply that the plan of this spec has memory for.

    Never less than LEAST_CONTEXT: where the plan has none it was asked for what does not fit, which is tried,
    and with less there is no conversation.
    """
    most = most_tokens(spec, size)
    return max(longest_context(size, found, most), min(LEAST_CONTEXT, most))
