"""Chatting in the terminal: one answer, or a conversation.

The database stays closed, so this runs beside the app.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from glmui import i18n, notes
from glmui.answering import answered
from glmui.engine.client import EngineClient
from glmui.engine.families import check_extras
from glmui.errors import EngineError, GlmuiError, InvalidInput
from glmui.hub import installed, starter
from glmui.meter import Meter
from glmui.outlook import Rooms, foreseer
from glmui.prompts import Limits
from glmui.settings import Settings, make_data_folder, spec_of
from glmui.text import open_counter
from glmui.tools.aligned import columns_of
from glmui.types import ChatEngine, ChatSettings, Chunk, GenerationParams, Message, Progress, TokenCounter


@dataclass(frozen=True)
class Wish:
    """What the command line asked for. `prompt` None means a conversation."""

    model: str
    prompt: str | None
    params: GenerationParams
    system: str = ""
    as_json: bool = False


def run(wish: Wish, settings: Settings, language: str) -> int:
    """Open the model and chat; the exit code. Naming the starter is the request to fetch it."""
    make_data_folder(settings.data_dir)
    terminal = Terminal(language)
    folder = find_model(wish.model, settings.data_dir, terminal.show)
    spec = spec_of(settings, wish.model, folder)
    check_extras(spec)
    engine, meter = EngineClient(spec), Meter()
    rooms = Rooms(engine, foreseer(engine, meter))
    rooms.configured(spec)
    try:
        count = open_counter(folder, settings.chatglm_family)
        chat = Chat(engine, count, partial(rooms.limits, spec), wish.params, wish.system)
        if wish.prompt is None:
            converse(chat, terminal)
        else:
            last = answer_once(chat, wish.prompt, terminal, wish.as_json)
            for words in notes.words(last.note, language):
                print(words, file=sys.stderr)
    finally:
        engine.close()
        meter.close()
    return 0


def find_model(name: str, data_dir: Path, show: Callable[[Progress], None]) -> Path:
    """The model's folder; the starter is fetched when it is not there yet."""
    if name == "starter":
        return starter.ensure_starter(data_dir, show, lambda: False)
    return installed.resolve(name, data_dir)


class Chat:
    """One conversation, remembered here and nowhere else. limits: the room that is known of now."""

    def __init__(
        self,
        engine: ChatEngine,
        count: TokenCounter,
        limits: Callable[[], Limits],
        params: GenerationParams,
        system: str = "",
    ) -> None:
        self._engine = engine
        self._count = count
        self._limits = limits
        self._settings = ChatSettings(params, system)
        self._said: list[Message] = []
        self._running = ""

    def ask(self, text: str) -> Iterator[Chunk]:
        """Stream the reply to `text`; whatever came of it is remembered. Raises GlmuiError."""
        if not text.strip():
            raise InvalidInput("empty_message")
        said = [*self._said, Message("user", text)]
        self._running, answer = uuid.uuid4().hex, ""
        try:
            for prompt, chunk in answered(
                said, self._settings, self._engine, self._count, self._limits, self._running
            ):
                answer += chunk.text
                left_out = notes.left_out(prompt.left_out) if chunk.finish_reason else ""
                yield replace(chunk, note=notes.join(left_out, chunk.note))
        finally:
            self._running = ""
            if answer:
                self._said += [Message("user", text), Message("assistant", answer)]

    def stop(self) -> None:
        """End the running reply; its text so far is kept."""
        self._engine.cancel(self._running)

    def forget(self) -> None:
        """Begin anew."""
        self._said.clear()


class Terminal:
    """Text to stdout; progress to stderr, and only where someone is looking at it."""

    def __init__(self, language: str, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.language = language
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._shown = 0

    def write(self, text: str) -> None:
        self._wipe()
        self._out.write(text)
        self._out.flush()

    def say(self, key: str, **values: Any) -> None:
        self.write(i18n.text(self.language, key, **values) + "\n")

    def words(self, key: str, **values: Any) -> str:
        """A text of the command line's own, by its key without "cli."."""
        return i18n.text(self.language, f"cli.{key}", **values)

    def note(self, key: str, **values: Any) -> None:
        """A line that stays, on stderr, of what is being done. key: as in `words`."""
        if self._err.isatty():
            self._err.write(self.words(key, **values) + "\n")
            self._err.flush()

    def show(self, progress: Progress) -> None:
        """One line that overwrites itself."""
        line = i18n.text(self.language, f"cli.stages.{progress.stage}")
        if progress.fraction is not None:
            line += f" {progress.fraction:.0%}"
        self.show_line(line)

    def show_line(self, line: str) -> None:
        """The same of words of one's own."""
        if not self._err.isatty():
            return
        self._wipe()
        self._err.write(line)
        self._err.flush()
        self._shown = columns_of(line)

    def _wipe(self) -> None:
        if self._shown:
            self._err.write(f"\r{' ' * self._shown}\r")
            self._err.flush()
            self._shown = 0


def answer_once(
    chat: Chat, prompt: str, terminal: Terminal, as_json: bool = False, alone: bool = True
) -> Chunk:
    """Print one reply as it comes, or as one JSON object at its end, which tells of an error too; its last
    chunk. alone: no other follows. Raises GlmuiError."""
    began, text, last = time.monotonic(), "", Chunk()
    try:
        for last in chat.ask(prompt):
            text += last.text
            if last.progress:
                terminal.show(last.progress)
            elif not as_json:
                terminal.write(last.text)
    except GlmuiError as caught:
        error = _without_continue(caught, alone)
        if as_json:
            broken = replace(last, finish_reason="error")
            told = {"error": {"code": error.code, "message": error.message(terminal.language)}}
            terminal.write(_as_json(text, broken, time.monotonic() - began, told))
        else:
            terminal.write("\n" if text else "")  # what is said of it gets a line of its own
        raise error from None
    terminal.write(_as_json(text, last, time.monotonic() - began) if as_json else "\n")
    return last


def _without_continue(error: GlmuiError, alone: bool) -> GlmuiError:
    """The error as it is told where there is no Continue, as the page has it."""
    kept, _, kind = error.code.partition(".")
    if kept != "memory_kept":
        return error
    return EngineError(f"memory_broke_off.{'alone' if alone else kind}", **error.values)


def _as_json(text: str, last: Chunk, seconds: float, more: dict[str, Any] | None = None) -> str:
    usage = last.usage
    answer = {
        "response": text,
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else last.tokens,
        "seconds": round(usage.seconds if usage else seconds, 3),
        "finish_reason": last.finish_reason,
        **(more or {}),
    }
    return json.dumps(answer, ensure_ascii=False) + "\n"


def converse(chat: Chat, terminal: Terminal, read: Callable[[str], str] = input) -> None:
    """Question and answer until `stop` or the end of input; `clear` forgets what was said."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editing)
    terminal.say("cli.chat.hello")
    while (line := _read_line(read)) not in (None, "stop"):
        if line == "clear":
            chat.forget()
            terminal.say("cli.chat.cleared")
        elif line:
            with _ctrl_c_calls(chat.stop):
                _answer_on(chat, line, terminal)


def _answer_on(chat: Chat, line: str, terminal: Terminal) -> None:
    """One round; what goes wrong ends it and not the conversation."""
    try:
        last = answer_once(chat, line, terminal, alone=False)
    except GlmuiError as error:
        terminal.write(f"{error.message(terminal.language)}\n")
    else:
        for words in notes.words(last.note, terminal.language):
            terminal.write(words + "\n")


def _read_line(read: Callable[[str], str]) -> str | None:
    try:
        return read("> ").strip()
    except EOFError:
        return None


@contextlib.contextmanager
def _ctrl_c_calls(action: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl+C do `action` instead of ending the program.

    A thread does it: the signal may interrupt the engine's client while it holds its own lock.
    """
    before = signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=action, daemon=True).start())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
