"""What the scripted engine is told to do. A message that begins with /echo chooses:

/echo tokens=500 speed=100          so many words, so many a second
/echo load=3 prefill=2              seconds of each, with progress
/echo error | oom | crash | hang    what can go wrong, after `tokens` words (5 if not given)
/echo piece=128 context=512 layers=7
                                    memory runs out at once while the engine has more of one of these,
                                    with `oom` after its words
/echo hog=500                       really takes so many MB of RAM
/echo repeat | script | markdown    a loop that is noticed; HTML that must not run; all that markdown has
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from glmui.text import pieces

_TROUBLE = ("error", "oom", "crash", "hang")
_SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> the rest of the reply"
_MARKDOWN = """# Heading

**bold**, *slanted*, `code`, [a link](https://example.org)

1. one
2. two

| left | right |
|------|------:|
| 你好 | 42    |

```python
print("hello")
```

Euler: $e^{i\\pi} + 1 = 0$, and \\(a^2\\), and \\[\\sum_{k=1}^n k = \\frac{n(n+1)}{2}\\]

$$\\int_0^1 x\\,dx$$
"""


@dataclass(frozen=True, slots=True)
class Script:
    """text is said back. most: of what memory can hold, by name. hog: MB of RAM that are really taken."""

    text: str
    trouble: str = ""
    tokens: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    speed: float = 0.0
    note: str = ""
    most: dict[str, int] = field(default_factory=dict)
    hog: int = 0

    def words(self) -> list[str]:
        words = pieces.split(self.text)
        return words if self.tokens is None else list(itertools.islice(itertools.cycle(words), self.tokens))


def read_script(message: str) -> Script:
    """What a message asks for. A word or number that means nothing here is part of a text to say back."""
    first, *words = message.split() or [""]
    if first != "/echo":
        return Script(f"You said: {message}")
    script = Script(" ".join(words) or "echo")
    for word in words:
        name, _, value = word.partition("=")
        if word in _TROUBLE:
            script = replace(script, trouble=word, tokens=script.tokens or 5)
        elif word == "script":
            script = replace(script, text=_SCRIPT)
        elif word == "markdown":
            script = replace(script, text=_MARKDOWN)
        elif word == "repeat":
            script = replace(script, text="again and ", tokens=96, note="repetition")
        elif name == "tokens" and value.isdecimal():
            script = replace(script, tokens=int(value), text="word " if not script.trouble else script.text)
        elif name == "speed" and _is_number(value):
            script = replace(script, speed=float(value))
        elif name in ("load", "prefill") and _is_number(value):
            script.seconds[name] = float(value)
        elif name in ("piece", "context", "layers") and value.isdecimal():
            script.most[name] = int(value)
        elif name == "hog" and value.isdecimal():
            script = replace(script, hog=int(value))
    return script


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
