"""A card for each model: what it is and needs, what is being done for it, and what can be done."""

from __future__ import annotations

from html import escape
from urllib.parse import urlsplit

from glmui import i18n
from glmui.downloads import Task
from glmui.hub.catalogue import Licence, Offer
from glmui.hub.get import Removed
from glmui.i18n import Words
from glmui.ui.inventory import FIRST, Entry, Look, Need
from glmui.ui.model_words import amount, label, room, stage
from glmui.ui.present import FULL, size, when


class Cards:
    """Makes the cards of one look. area: begins the ids of what they hold."""

    def __init__(self, area: str, look: Look, words: Words) -> None:
        self.area = area
        self.look = look
        self.words = words
        self.running = look.task if look.task and not look.task.ended else None
        self.off = " disabled" if self.running else ""  # one thing at a time

    def say(self, key: str, **values: object) -> str:
        """A text ready to stand in HTML."""
        return escape(self.words(key, **values))

    def row(self, entry: Entry, heading: str = "h4", recommended: bool = False) -> str:
        """One model. heading: the element of its name."""
        task = self.look.task
        if task and (task.name != entry.name or task.kind == "import"):
            task = None
        busy = task is not None and task is self.running
        name = escape(label(entry.name, self.words))
        parts = [
            f'<div class="head"><{heading}>{name}</{heading}>{self._tag(entry, recommended)}</div>',
            self._about(entry),
            f'<p class="facts">{self._facts(entry)}</p>',
            "" if entry.model else self._needs(entry),
            "" if busy else self._state(entry),
            self.task(task) if task else "",
            "" if busy else self._acts(entry, task),
        ]
        return f'<li data-name="{escape(entry.name)}" class="{entry.state}">{"".join(parts)}</li>'

    # What it is

    def _tag(self, entry: Entry, recommended: bool) -> str:
        if entry.state in ("loaded", "chosen", "damaged"):
            return f'<em class="tag {entry.state}">{self.say(f"shelf.state_{entry.state}")}</em>'
        return f'<em class="tag">{self.say("shelf.recommended")}</em>' if recommended else ""

    def _about(self, entry: Entry) -> str:
        key = f"models_about.{entry.name}"
        return f"<p>{self.say(key)}</p>" if key in i18n.table(self.words.language) else ""

    def _facts(self, entry: Entry) -> str:
        facts = self._facts_here(entry) if entry.model else self._facts_there(entry)
        if entry.offer:
            facts.append(_licence(entry.offer.licence))
        elif entry.model and entry.model.licence:
            facts.append(escape(entry.model.licence))
        return " · ".join(facts)

    def _facts_here(self, entry: Entry) -> list[str]:
        assert entry.model is not None
        facts = [size(entry.model.size)]
        if entry.model.quantize in ("int8", "int4"):
            facts.append(self.say("shelf.quantised", bits=entry.model.quantize.upper()))
        if entry.model.date:
            facts.append(self.say("shelf.since", date=entry.model.date[:10]))
        return facts

    def _facts_there(self, entry: Entry) -> list[str]:
        offer = entry.offer
        if offer is None:
            return []
        facts = [self.say("shelf.download_size", size=_gigabytes(offer.download_gb))]
        if offer.disk_gb < 0.8 * offer.download_gb:
            facts.append(self.say("shelf.disk_size", size=_gigabytes(offer.disk_gb)))
        return facts

    # What it needs

    def _needs(self, entry: Entry) -> str:
        bars = "".join(self._need(need) for need in entry.needs)
        return f'<div class="needs">{bars}</div>{self._warning(entry)}'

    def _need(self, need: Need) -> str:
        part = min(need.need / need.total, 1.0)
        level = "full" if not need.met else "warn" if need.need >= FULL * need.free else "calm"
        name = escape(need.card) or self.say("meter.ram")
        told = self.say("shelf.need", need=room(need.need), free=room(need.free))
        return (
            f'<div class="bar {level}"><span>{name}</span><span>{told}</span>'
            f'<div role="meter" aria-label="{name}" aria-valuemin="0" aria-valuemax="100"'
            f' aria-valuenow="{part * 100:.0f}"><i style="width:{part:.0%}"></i></div></div>'
        )

    def _warning(self, entry: Entry) -> str:
        if entry.fits:
            return ""
        nearest = max(entry.needs, key=lambda need: need.free / max(need.need, 1))
        key = "shelf.too_big" if nearest.total < nearest.need else "shelf.too_full"
        need, free, total = room(nearest.need), room(nearest.free), room(nearest.total)
        return f'<p class="warn">{self.say(key, need=need, free=free, total=total)}</p>'

    # How it is

    def _state(self, entry: Entry) -> str:
        if entry.model and entry.model.problem:
            return self._trouble(entry.model.problem.message(self.words.language))
        if entry.model:
            return self._check(entry.name)
        return self._half(entry) if entry.state == "half" else ""

    def _check(self, name: str) -> str:
        """What the last check of this run found."""
        task = self.look.checks.get(name)
        if task is None:
            return ""
        if not task.problems:
            words = self.say("shelf.whole", time=when(task.ended, self.words))
            return f'<p class="fine" role="status">{words}</p>'
        return "".join(self._trouble(problem.message(self.words.language)) for problem in task.problems)

    def _half(self, entry: Entry) -> str:
        total = entry.offer.download_gb * 1e9 if entry.offer else 0
        part = min(entry.fetched / total, 0.99) if total else 0.0
        return self._bar(self.say("shelf.half", part=f"{part:.0%}", size=size(entry.fetched)), "", part)

    def _trouble(self, sentence: str) -> str:
        return f'<p class="trouble" role="alert">{escape(sentence)}</p>'

    # What is being done

    def task(self, task: Task) -> str:
        """How far it is, with what can be done about it; or why it failed."""
        if task.ended:
            return self._trouble(task.error.message(self.words.language)) if task.error else ""
        buttons = ""
        if self.look.paused:
            buttons = self.button("resume", "shelf.continue", "primary")
        elif task.progress.stage == "fetching" and task.progress.total:
            buttons = self.button("pause", "shelf.pause")
        buttons += "" if task.cancelled else self.button("cancel", "shelf.cancel")
        told = "" if self.look.paused else escape(amount(task.progress, self.words))
        words = escape(stage(task, self.look.paused, self.words))
        return self._bar(words, told, task.progress.fraction) + _acts(buttons)

    def _bar(self, words: str, told: str, fraction: float | None) -> str:
        now = "" if fraction is None else f' aria-valuenow="{fraction * 100:.0f}"'
        width = "" if fraction is None else f' style="width:{fraction:.0%}"'
        kind = " unknown" if fraction is None else ""
        return (
            f'<div class="doing{kind}"><span>{words}</span><span>{told}</span>'
            f'<div role="progressbar" aria-label="{words}" aria-valuemin="0" aria-valuemax="100"{now}>'
            f"<i{width}></i></div></div>"
        )

    # What can be done

    def button(self, act: str, key: str, kind: str = "") -> str:
        off = self.off if act in ("get", "renew", "verify") else ""
        return f'<button type="button" class="{kind}" data-act="{act}"{off}>{self.say(key)}</button>'

    def _acts(self, entry: Entry, task: Task | None) -> str:
        failed = task is not None and task.error is not None
        if entry.model:
            below = self.button("dismiss", "shelf.dismiss") if failed else ""
            return _acts(self._acts_here(entry), "top") + _acts(below)
        first = self.button("get", "shelf.again" if failed else "shelf.continue", "primary")
        if entry.state == "half":
            return _acts(first + self.button("forget", "shelf.forget"))
        if failed:
            return _acts(first + self.button("dismiss", "shelf.dismiss"))
        if entry.offer and entry.offer.licence.accept:
            licence = "" if self.running else self._acceptance(entry.offer)
            return _acts(self._opener(entry.offer), "top") + licence
        return _acts(self.button("get", "shelf.get", _weight(entry.name)), "top")

    def _acts_here(self, entry: Entry) -> str:
        check = self.look.checks.get(entry.name)
        damaged = entry.state == "damaged" or bool(check and check.problems)
        buttons = ""
        if entry.chats and entry.state == "here":
            buttons += self.button("use", "shelf.use", "primary")
        if damaged and entry.offer:
            buttons += self.button("renew", "shelf.renew", "primary")
        if entry.state != "damaged":
            buttons += self.button("verify", "shelf.verify")
        return buttons + self.button("remove", "shelf.remove")

    def removed(self, gone: Removed) -> str:
        """A line for a model in the trash."""
        words = self.say("shelf.removed", name=label(gone.name, self.words), size=size(gone.size))
        return (
            f'<div class="removed" data-name="{escape(gone.name)}"><span>{words}</span>'
            f"{self.button('restore', 'shelf.undo')}</div>"
        )

    # The licence

    def _opener(self, offer: Offer) -> str:
        kind, target = _weight(offer.name), self._id(offer)
        return (
            f'<button type="button" class="{kind}" popovertarget="{target}"{self.off}>'
            f"{self.say('shelf.get')}…</button>"
        )

    def _id(self, offer: Offer) -> str:
        return f"{self.area}-licence-{escape(offer.name)}"

    def _acceptance(self, offer: Offer) -> str:
        """The licence and its tick box, on a card over the page; its form says "get"."""
        name = escape(label(offer.name, self.words))
        host = escape(urlsplit(offer.licence.link).hostname or "")
        much = _gigabytes(offer.download_gb)
        return (
            f'<div popover id="{self._id(offer)}" class="gm-card" role="dialog" aria-label="{name}">'
            f'<form data-act="get"><h4>{name}</h4>'
            f"<p>{self.say('shelf.before_get', size=much)}</p>"
            f"<p>{_licence(offer.licence)} <small>({host})</small></p>"
            f'<label><input type="checkbox" name="accept" value="yes" required>'
            f"<span>{self.say('shelf.accept')}</span></label>"
            f'<div class="acts"><button type="submit" class="primary">'
            f"{self.say('shelf.get_size', size=much)}</button>"
            f'<button type="button" popovertarget="{self._id(offer)}" popovertargetaction="hide">'
            f"{self.say('shelf.not_now')}</button></div></form></div>"
        )


def _acts(buttons: str, where: str = "") -> str:
    """A row of buttons. where: "top" stands beside the name, "" below what is told."""
    return f'<div class="acts {where}">{buttons}</div>' if buttons else ""


def _licence(licence: Licence) -> str:
    host = escape(urlsplit(licence.link).hostname or "")
    return (
        f'<a href="{escape(licence.link)}" target="_blank" rel="noopener noreferrer" title="{host}">'
        f"{escape(licence.name)}</a>"
    )


def _weight(name: str) -> str:
    return "primary" if name == FIRST else ""  # one button stands out, not ten


def _gigabytes(count: float) -> str:
    return size(int(count * 1e9))
