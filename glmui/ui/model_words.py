"""How people speak of models, amounts and time: plain text, not yet HTML."""

from __future__ import annotations

from glmui import i18n
from glmui.downloads import Task
from glmui.i18n import Words
from glmui.types import Progress
from glmui.ui.inventory import Look
from glmui.ui.present import model_name, size


def label(name: str, say: Words) -> str:
    """A model as people call it."""
    return i18n.table(say.language).get(f"models.{name}") or model_name(name)


def stage(task: Task, paused: bool, say: Words) -> str:
    """What is being done, with how much of it is done where that is known."""
    if task.cancelled:
        return say("shelf.ending")
    fraction = task.progress.fraction
    words = say("shelf.paused") if paused else say(f"status.{task.progress.stage}")
    return words if fraction is None else f"{words} {fraction:.0%}"


def amount(progress: Progress, say: Words) -> str:
    """How much has come, how fast, and how long it will take; "" where nothing is transferred."""
    if progress.stage != "fetching" or not progress.total:
        return ""
    parts = [say("shelf.of", done=size(progress.done), total=size(progress.total))]
    if progress.per_second > 0:
        parts.append(f"{size(int(progress.per_second))}/s")
        parts.append(time_left((progress.total - progress.done) / progress.per_second, say))
    return " · ".join(parts)


def time_left(seconds: float, say: Words) -> str:
    """A duration as people say it: under a minute, minutes, hours."""
    if seconds < 60:
        return say("shelf.left_seconds")
    if seconds < 90 * 60:
        return say("shelf.left_minutes", minutes=round(seconds / 60))
    return say("shelf.left_hours", hours=f"{seconds / 3600:.1f}")


def computer(look: Look, say: Words) -> str:
    """One line: the memory and disk of this computer."""
    memory = look.memory
    parts = []
    if memory.ram_used is not None and memory.ram_total:
        free = room(memory.ram_total - memory.ram_used)
        parts.append(say("shelf.ram", free=free, total=room(memory.ram_total)))
    parts += [
        say("shelf.card", card=card.name, free=room(card.total - card.used), total=room(card.total))
        for card in memory.cards
        if card.used is not None and card.total is not None
    ]
    parts.append(say("shelf.disk", free=room(look.disk_free)))
    return say("shelf.computer", parts=say("shelf.comma").join(parts))


def room(count: int) -> str:
    """Bytes that are free or needed: whole GB from 3 GB on, since they flicker, and rounded down."""
    return f"{count // 10**9} GB" if count >= 3e9 else size(count)
