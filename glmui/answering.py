"""One reply from an engine, the prompt cut to the room there is: for the app and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from glmui import notes
from glmui.errors import InvalidInput
from glmui.prompts import Limits, Prompt, compose
from glmui.types import ChatEngine, ChatSettings, Chunk, Message, TokenCounter

_TOO_LONG = ("prompt_too_long", "prompt_beyond_memory")


def answered(
    said: Sequence[Message],
    settings: ChatSettings,
    engine: ChatEngine,
    count: TokenCounter,
    limits: Callable[[], Limits],
    request_id: str,
) -> Iterator[tuple[Prompt, Chunk]]:
    """Each chunk of the reply, with the prompt that it answers.

    limits: the room as it is known now. Where the model, once loaded, turns out to have less, the prompt is
    cut anew; that is why it may change before the first text. Raises what compose and the engine raise.
    """
    while True:
        known, spoke = limits(), False
        prompt = compose(said, settings, count, known)
        try:
            params = known.bounded(settings.params)
            for chunk in engine.stream_chat(prompt.messages, params, request_id):
                spoke = spoke or bool(chunk.text)
                yield prompt, _with_note(chunk, prompt)
            return
        except InvalidInput as error:
            if error.code not in _TOO_LONG or spoke or limits() == known:
                raise


def _with_note(chunk: Chunk, prompt: Prompt) -> Chunk:
    """A reply's last chunk tells that the model did not see where the reply began."""
    if not (prompt.cut and chunk.finish_reason):
        return chunk
    return replace(chunk, note=notes.join("begun_left_out", chunk.note))
