"""What each source says it has of an offer: asked once, remembered while a fetch runs."""

from __future__ import annotations

import asyncio

from glmui.hub.catalogue import Offer
from glmui.hub.patience import Patience
from glmui.hub.sources import Entry, Source, list_folder, listing_address, read_listing, repository
from glmui.hub.web import Trouble, Web

_TRIES = 3


class Listings:
    def __init__(self, web: Web, offer: Offer, patience: Patience) -> None:
        self._web = web
        self._offer = offer
        self._patience = patience
        self._known: dict[Source, dict[str, Entry] | Trouble] = {}

    async def entry(self, source: Source, path: str) -> Entry:
        """That file as the source states it. Raises Trouble, also where the source has no such file."""
        entries = await self.all(source)
        if path not in entries:
            raise Trouble("not there", again=False)
        return entries[path]

    async def all(self, source: Source) -> dict[str, Entry]:
        """Every file it has. Raises Trouble; a source that could not be asked is not asked again."""
        if source not in self._known:
            try:
                self._known[source] = await self._ask(source)
            except Trouble as trouble:
                self._known[source] = trouble
        known = self._known[source]
        if isinstance(known, Trouble):
            raise known
        return known

    def forget(self, source: Source) -> None:
        self._known.pop(source, None)

    async def _ask(self, source: Source) -> dict[str, Entry]:
        if source.speaks == "folder":
            try:
                return list_folder(source, self._offer)
            except OSError as error:
                raise Trouble("unreadable", again=False) from error
        repo = repository(source, self._offer)
        tries = min(_TRIES, self._patience.tries)
        for tried in range(1, tries + 1):
            try:
                answer = await self._web.read_json(listing_address(source, repo), source)
                return read_listing(source, repo, answer)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise Trouble("no list of files", again=False) from error
            except Trouble as trouble:
                # A host that does not answer at all is often one that is blocked: the next source is better.
                if not trouble.again or trouble.reason == "timeout" or tried == tries:
                    raise
                await asyncio.sleep(max(trouble.wait, self._patience.pause(tried)))
        raise AssertionError("unreachable")
