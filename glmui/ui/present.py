"""What the page shows, made of what is: pure functions from values to words and small HTML."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator, Sequence
from typing import Any

from glmui import errors
from glmui.i18n import Words
from glmui.jobs import Job
from glmui.meter import Reading
from glmui.notes import left_out
from glmui.notes import words as notes_words
from glmui.store import Conversation, StoredMessage
from glmui.types import EngineInfo, Progress
from glmui.ui.markdown import for_display, kept_for_display

# Reasons that are shown, not only told on hovering.
SLOWER = ("reasons.kernels_", "reasons.card_kernels_", "reasons.memory_")
WARN, FULL = 0.85, 0.95  # parts of a meter's bar at which its colour turns


def size(count: int | None) -> str:
    """Bytes as GB with one decimal, or MB below 1 GB."""
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# The thread


def thread(
    messages: Sequence[StoredMessage], live: Job | None, say: Words, seen: int | None = None
) -> list[dict[str, Any]]:
    """Chatbot messages. The reply being written is taken from its job, the others as they are saved.

    seen: how many rounds the model sees; a line is drawn above them. None for all.
    """
    shown = [_message(m, live if live and live.reply_id == m.id else None, say) for m in messages]
    if above := _unseen(messages, seen):
        words = html.escape(say("room.from_here"))
        shown[above - 1]["content"] += f'\n\n<small class="from-here">{words}</small>'
    return shown


def _unseen(messages: Sequence[StoredMessage], seen: int | None) -> int:
    """How many of the messages shown the model does not see."""
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    if seen is None or seen > len(asked):
        return 0
    return asked[len(asked) - seen] if seen else len(messages)


def _message(message: StoredMessage, live: Job | None, say: Words) -> dict[str, Any]:
    if live:
        notes = [live.save_error.message(say.language)] if live.save_error else []
        content = for_display(live.content) or "…"
    else:
        notes = footnotes(message, say)
        content = kept_for_display(message.content)
    lines = "".join(f"\n\n<small>{html.escape(note).replace('$', '&#36;')}</small>" for note in notes)
    return {"role": message.role, "content": (content + lines).strip() or "—"}


def footnotes(message: StoredMessage, say: Words) -> list[str]:
    """What must be said under a saved reply: why it ended early, what was left out before it."""
    notes = notes_words(left_out(message.left_out), say.language)
    if message.error:
        notes.append(f"⚠ {errors.from_values(*message.error).message(say.language)}")
    elif message.state in ("stopped", "interrupted"):
        notes.append(say(f"notes.{message.state}"))
    elif message.finish_reason == "length":
        notes.append(say("notes.length"))
    return notes + notes_words(message.note, say.language)


# The line under the thread


def status(live: Job | None, place: int, last: StoredMessage | None, say: Words) -> str:
    """One line: what the engine is doing for this conversation, or what the last reply took."""
    if live is None:
        return line("", _usage(last, say))
    if live.progress:
        return line("busy", stage(live.progress, place, say), live.progress.fraction, spoken=True)
    speed = live.tokens_per_second
    words = say("status.writing", tokens=live.tokens)
    return line("busy", words + (f" · {speed:.1f} {say('status.per_second')}" if speed else ""))


def stage(progress: Progress, place: int, say: Words) -> str:
    """What is being done, with how much of it is done where that is known."""
    if progress.stage == "queued" and place:
        return say("status.waiting", before=place)
    words = say(f"status.{progress.stage}")
    return words if progress.fraction is None else f"{words} {progress.fraction:.0%}"


def _usage(last: StoredMessage | None, say: Words) -> str:
    if last is None or last.usage is None:
        return ""
    usage = last.usage
    return say(
        "status.usage",
        prompt=usage.prompt_tokens,
        tokens=usage.completion_tokens,
        speed=f"{usage.tokens_per_second:.1f}",
        first=f"{usage.first_token_seconds:.1f}",
    )


def line(kind: str, words: str, fraction: float | None = None, spoken: bool = False) -> str:
    """A line of small print with an optional bar. kind: "", "busy" or "error". spoken: by screen readers."""
    bar = "" if fraction is None else f'<i class="fill" style="width:{fraction:.0%}"></i>'
    role = ' role="status"' if spoken else ""
    return f'<div class="status {kind}"{role}><span>{html.escape(words)}</span>{bar}</div>'


def versions(last: StoredMessage | None, say: Words) -> str:
    """Leafing through the versions of the last reply; nothing where there is only one."""
    if last is None or last.versions < 2:
        return ""

    def button(name: str, step: int, sign: str) -> str:
        words = html.escape(say(f"chat.{name}"))
        return (
            f'<button type="button" data-step="{step}" aria-label="{words}" title="{words}">{sign}</button>'
        )

    place = f"<span>{last.version} / {last.versions}</span>"
    return f'<div class="versions">{button("previous", -1, "‹")}{place}{button("next", 1, "›")}</div>'


# The list at the side


def conversations(rows: Sequence[Conversation], current: str, query: str, say: Words) -> str:
    """The list: a row for each conversation. assets/conversations.js gives it its life."""
    if not rows:
        words = say("list.not_found" if query.strip() else "list.empty")
        return f'<p class="none">{html.escape(words)}</p>'
    return f'<ul class="conversations">{"".join(_row(row, current, say) for row in rows)}</ul>'


def _row(row: Conversation, current: str, say: Words) -> str:
    title = html.escape(row.title or say("list.untitled"))
    here = ' class="current" aria-current="true"' if row.id == current else ""
    buttons = "".join(
        f'<button type="button" class="{name}" title="{words}" aria-label="{words}: {title}">{sign}</button>'
        for name, sign in (("rename", "✎"), ("delete", "✕"))
        for words in [html.escape(say(f"list.{name}"))]
    )
    return (
        f'<li{here} data-id="{html.escape(row.id)}">'
        f'<button type="button" class="title" title="{title}">{title}</button>'
        f"<time>{when(row.updated_at, say)}</time>{buttons}</li>"
    )


def when(moment: float, say: Words, now: float | None = None) -> str:
    """A time as people say it: today 14:05, yesterday, or the date."""
    then, today = time.localtime(moment), time.localtime(now or time.time())
    days = (_midnight(today) - _midnight(then)) / 86400
    if days < 0.5:
        return time.strftime("%H:%M", then)
    if days < 1.5:
        return say("list.yesterday")
    return time.strftime("%m-%d" if then.tm_year == today.tm_year else "%Y-%m-%d", then)


def _midnight(moment: time.struct_time) -> float:
    return time.mktime((*moment[:3], 0, 0, 0, 0, 0, -1))


# Engine and meter


def engine(info: EngineInfo, chosen: str, running: int, say: Words, idle_minutes: float = 0) -> str:
    """The chip at the top: which model, and whether it is awake; below it, why it is slower than need be.

    idle_minutes: after so many its memory is given back, 0 for never.
    """
    state = "busy" if running and info.state == "ready" else info.state
    device = say("settings.device_mixed") if info.device == "mixed" else info.device
    where = " · ".join(filter(None, [model_name(chosen), device]))
    why = say(info.reason, device=info.device, dtype=info.dtype, kernel=info.kernel) if info.reason else ""
    slow = f'<p class="slow">{html.escape(why)}</p>' if info.reason.startswith(SLOWER) else ""
    more = [why, *_kernels(info, say), _rest(info, chosen, idle_minutes, say)]
    told = "\n".join(filter(None, more))
    return (
        f'<div class="chip {state}" title="{html.escape(told)}"><b></b>'
        f"<span>{html.escape(where or say('engine.none'))}</span>"
        f"<em>{html.escape(say(f'engine.{state}') if chosen else '')}</em></div>{slow}"
    )


def _kernels(info: EngineInfo, say: Words) -> Iterator[str]:
    """What computes the layers on a card and on the CPU, where that is not torch."""
    names = info.kernel.split(", ") if info.kernel else []
    on_card = [name for name in names if name.startswith("sm_")]
    on_cpu = [name for name in names if name not in on_card]
    if on_card and not info.reason.startswith("reasons.card_kernels"):  # which tells of them already
        yield say("reasons.card_kernels", kernel=", ".join(on_card))
    if on_cpu:
        yield say("reasons.kernels", kernel=", ".join(on_cpu))


def _rest(info: EngineInfo, chosen: str, idle_minutes: float, say: Words) -> str:
    """Whether the model holds memory now, and for how long."""
    if info.state == "ready" and idle_minutes:
        return say("engine.idle_end", minutes=f"{idle_minutes:g}")
    return say("engine.sleeps") if info.state == "asleep" and chosen else ""


def model_name(model: str) -> str:
    """A model as the user knows it: a catalogue name, or the last part of its folder."""
    return model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]


def meter(reading: Reading, say: Words) -> str:
    """Bars for each card, or for RAM where there is no card."""
    bars = [
        _bar(
            card.name or say("meter.card", index=card.index),
            card.used,
            card.total,
            say("meter.own", size=size(card.own)) if card.own else "",
        )
        for card in reading.cards
    ]
    if reading.gpu_error == "unknown" and not bars:
        bars.append(_bar(say("meter.vram"), None, None, say("meter.unknown")))
    own = say("meter.own", size=size(reading.engine_rss)) if reading.engine_rss else ""
    bars.append(_bar(say("meter.ram"), reading.ram_used, reading.ram_total, own))
    return f'<div class="meter">{"".join(bars)}</div>'


def _bar(name: str, used: int | None, total: int | None, note: str) -> str:
    known = used is not None and bool(total)
    part = used / total if used is not None and total else 0.0
    level = "full" if part >= FULL else "warn" if part >= WARN else "calm"
    numbers = f"{size(used)} / {size(total)}" if known else ""
    label = html.escape(" · ".join(filter(None, [numbers, note])))
    return (
        f'<div class="bar {level}"><span>{html.escape(name)}</span><span>{label}</span>'
        f'<div role="meter" aria-label="{html.escape(name)}" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{part * 100:.0f}"><i style="width:{part:.0%}"></i></div></div>'
    )
