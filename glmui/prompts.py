"""What the model will see: how much of a conversation fits, and what is left out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from glmui.errors import InvalidInput
from glmui.types import BOUNDS, ChatSettings, GenerationParams, Message, TokenCounter

# A prompt may fill max_length up to this part; the rest is kept free for the reply.
REPLY_SHARE = 0.25
# Where memory is what is scarce, the reply is kept this much of it: a few paragraphs.
REPLY_TOKENS = 256
SHORTEST_REPLY = 32  # tokens; less is no answer


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that fit, how many tokens they cost, and how many of the oldest rounds were left out.

    cut: the reply that is to go on lacks its beginning.
    """

    messages: tuple[Message, ...]
    tokens: int
    left_out: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens of prompt and reply together, 0 where unknown. trained: what the model was trained for.
    room: what memory has room for."""

    trained: int = 0
    room: int = 0

    def length(self, params: GenerationParams) -> int:
        """What max_length comes to with this model, whatever memory has room for."""
        return min(params.max_length, self.trained or params.max_length)

    def within(self, params: GenerationParams) -> Limits:
        """The same with no more room than max_length can use: what changes beyond it changes nothing."""
        return replace(self, room=min(self.room, self.length(params)))

    def bounded(self, params: GenerationParams) -> GenerationParams:
        """The parameters with a max_length that memory has room for, as far as BOUNDS let it be so small."""
        lowest = int(BOUNDS["max_length"][0])
        return replace(params, max_length=max(lowest, min(params.max_length, self.room or params.max_length)))


NO_LIMITS = Limits()


def token_budget(params: GenerationParams, limits: Limits = NO_LIMITS, most: int | None = None) -> int:
    """Tokens a prompt may have so that a reply still fits. most: the user's own history budget."""
    length = limits.length(params)
    reply = params.max_new_tokens or int(length * REPLY_SHARE)
    budget = max(length - reply, length // 2)
    if 0 < limits.room < length:
        budget = min(budget, limits.room - reply_wish(params, limits.room))
    return min(budget, most) if most else budget


def reply_wish(params: GenerationParams, room: int) -> int:
    """Tokens that are kept for a reply where memory has room for `room` in all."""
    return min(params.max_new_tokens or REPLY_TOKENS, room // 2)


def compose(
    messages: Sequence[Message], settings: ChatSettings, count: TokenCounter, limits: Limits = NO_LIMITS
) -> Prompt:
    """What the model sees of a conversation. Where the assistant has the last word, that is to go on.

    Raises InvalidInput: "prompt_too_long", "prompt_beyond_memory", "no_room_to_go_on", "empty_message".
    """
    if settings.system.strip():
        messages = [Message("system", settings.system.strip()), *messages]
    most = settings.history_tokens if settings.history == "tokens" else None
    kept = with_room_to_go_on(messages, count, settings.params, limits)
    prompt = fit(
        kept,
        count,
        token_budget(settings.params, limits, most),
        hard_limit=limits.length(settings.params) - 1,
        max_rounds=settings.history_rounds if settings.history == "rounds" else None,
    )
    if 0 < limits.room <= prompt.tokens:
        raise InvalidInput("prompt_beyond_memory", tokens=prompt.tokens, room=limits.room)
    return replace(prompt, cut=kept is not messages)


def with_room_to_go_on(
    messages: Sequence[Message], count: TokenCounter, params: GenerationParams, limits: Limits
) -> Sequence[Message]:
    """The messages themselves; where a reply is to go on whose round alone fills the room, with that reply
    cut at its beginning, so that it may go on for as long as another one. Where it is rather the question
    that fills the room, only once next to nothing is left. Raises InvalidInput("no_room_to_go_on") where
    nothing of the reply could be kept.
    """
    if not messages or messages[-1].role != "assistant":
        return messages
    system = [m for m in messages[:1] if m.role == "system"]
    *asked, reply = split_rounds(messages[len(system) :])[-1]
    room = min(limits.length(params), limits.room or limits.length(params))
    budget = token_budget(params, limits)

    def cost(start: int) -> int:
        return count([*system, *asked, replace(reply, content=reply.content[start:])])

    question = cost(len(reply.content))
    if room - cost(0) >= (SHORTEST_REPLY if question > budget // 2 else reply_wish(params, room)):
        return messages
    if question + SHORTEST_REPLY > budget:
        raise InvalidInput("no_room_to_go_on", room=room)
    start = bisect_left(range(len(reply.content)), -budget, key=lambda start: -cost(start))
    return [*messages[:-1], replace(reply, content=reply.content[start:])]


def fit(
    messages: Sequence[Message],
    count: TokenCounter,
    budget: int,
    hard_limit: int,
    max_rounds: int | None = None,
) -> Prompt:
    """Keep the system text, the newest message and as many of the newest rounds as the budget holds.

    Whole rounds are left out, oldest first. The newest message alone may exceed `budget` (history
    is what a budget cuts) but never `hard_limit`: then InvalidInput says how long it is.
    """
    system = [m for m in messages[:1] if m.role == "system"]
    rounds = split_rounds(messages[len(system) :])
    if not rounds:
        raise InvalidInput("empty_message")
    total = len(rounds)
    if max_rounds is not None:
        rounds = rounds[-max(max_rounds, 0) - 1 :]

    def build(kept: int) -> list[Message]:
        return system + [m for one in rounds[len(rounds) - kept :] for m in one]

    kept, tokens = 1, count(build(1))
    if tokens > hard_limit:
        raise InvalidInput("prompt_too_long", tokens=tokens, limit=hard_limit)
    # Double the number of rounds while they fit, then bisect: few counts however long the history.
    low, high = 1, len(rounds) + 1  # `low` rounds fit, `high` do not
    while low + 1 < high:
        middle = min(low * 2, (low + high + 1) // 2, high - 1)
        cost = count(build(middle))
        if cost <= budget:
            low, kept, tokens = middle, middle, cost
        else:
            high = middle
    return Prompt(tuple(build(kept)), tokens, total - kept)


def split_rounds(messages: Sequence[Message]) -> list[list[Message]]:
    """Group messages into rounds: each begins with a user message and holds what answers it."""
    rounds: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return rounds


def chatglm_prompt(history: Sequence[tuple[str, str]], query: str) -> str:
    """ChatGLM-6B's template: numbered rounds, or the bare query when there is no history."""
    if not history:
        return query
    rounds = (f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history))
    return f"{''.join(rounds)}[Round {len(history)}]\n问：{query}\n答："


def chatglm2_prompt(history: Sequence[tuple[str, str]], query: str) -> str:
    """ChatGLM2-6B's template: rounds are counted from 1, and a first question is one too."""
    rounds = (f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, 1))
    return f"{''.join(rounds)}[Round {len(history) + 1}]\n\n问：{query}\n\n答："


def chatglm_rounds(messages: Sequence[Message]) -> tuple[list[tuple[str, str]], str]:
    """Messages as (history, query). These models know no system text: it goes before the first question."""
    system = "\n".join(m.content for m in messages if m.role == "system")
    pairs: list[tuple[str, str]] = []
    for one in split_rounds([m for m in messages if m.role != "system"]):
        question = "\n".join(m.content for m in one if m.role == "user")
        pairs.append((question, "\n".join(m.content for m in one if m.role == "assistant")))
    if not pairs:
        raise InvalidInput("empty_message")
    if system:
        pairs[0] = (f"{system}\n\n{pairs[0][0]}", pairs[0][1])
    return pairs[:-1], pairs[-1][0]
