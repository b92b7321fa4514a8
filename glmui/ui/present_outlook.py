"""What the page says of room: the line under the thread, and the offers for a message that is too much."""

from __future__ import annotations

import html
from typing import Any

from glmui.chat import Again
from glmui.i18n import Words
from glmui.outlook import Outlook, RoomLeft


def room(left: RoomLeft | None, say: Words) -> str:
    """One line in terms of the conversation; nothing where it cannot be told."""
    if left is None:
        return ""
    words = [say("room.left", tokens=about(left.tokens))]
    if left.for_room:
        key = "room.leaves_out_one" if left.for_room == 1 else "room.leaves_out"
        words.append(say(key, rounds=left.for_room))
    kind = " little" if left.little else ""
    return f'<p class="room{kind}">{html.escape(" · ".join(words))}</p>'


def about(tokens: int) -> str:
    """A number of tokens as people say it, never more than it is: 1,150, 480, 93."""
    step = 50 if tokens >= 1000 else 10 if tokens >= 100 else 1
    return f"{tokens // step * step:,}"


def offers(outlook: Outlook, say: Words, wish: Again | None = None) -> str:
    """The panel above the box: what is wrong, and a button for each thing that helps. assets/offers.js gives
    it its life.

    wish: what was asked for where it was no new message; the answer to the panel names it.
    """
    again = "_again" if wish else ""
    words = say(f"offers.why{again}", needed=f"{outlook.needed:,}", room=f"{outlook.room:,}")
    leave = html.escape(say(f"offers.cancel{again}"))
    buttons = "".join(_button(act, key, numbers, say) for act, key, numbers in acts(outlook))
    return (
        f'<section class="offers" role="dialog" data-wish="{wish or ""}" aria-labelledby="offers-title"'
        ' aria-describedby="offers-why">'
        f'<h2 id="offers-title">{html.escape(say(f"offers.title{again}"))}</h2>'
        f'<p id="offers-why">{html.escape(words)}</p>{buttons}'
        f'<button type="button" class="quiet" data-act="cancel">{leave}</button>'
        "</section>"
    )


def acts(outlook: Outlook) -> list[tuple[str, str, dict[str, Any]]]:
    """What would help, the least costly first: (act, a key of the locales' "offers", its numbers)."""
    rounds, layers, tokens = outlook.rounds_to_leave_out, outlook.layers_to_move, outlook.reply_room
    found: list[tuple[str, str, dict[str, Any]]] = []
    if outlook.cuts_reply:
        found.append(("leave_out", "leave_out_begun", {}))
    elif rounds:
        found.append(("leave_out", "leave_out_one" if rounds == 1 else "leave_out", {"rounds": rounds}))
    if tokens:
        found.append(("shorter", "shorter", {"tokens": f"{tokens:,}"}))
    if layers:
        numbers = {"layers": layers, "left": outlook.layers_left}
        found.append(("move_layers", "move_layers_one" if layers == 1 else "move_layers", numbers))
    if outlook.fits_on_cpu:
        found.append(("on_cpu", "on_cpu", {}))
    return found


def _button(act: str, key: str, numbers: dict[str, Any], say: Words) -> str:
    does, costs = (html.escape(say(f"offers.{name}", **numbers)) for name in (key, f"{act}_costs"))
    return f'<button type="button" data-act="{act}"><b>{does}</b><small>{costs}</small></button>'
