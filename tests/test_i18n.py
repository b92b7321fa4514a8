from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from glmui import errors, i18n

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = re.compile(r"\{(\w+)\}")


def test_both_languages_say_the_same_things() -> None:
    english, chinese = i18n.table("en"), i18n.table("zh")
    assert set(english) == set(chinese)
    for key, text in english.items():
        assert set(PLACEHOLDER.findall(text)) == set(PLACEHOLDER.findall(chinese[key])), key


def _keys_of_calls() -> set[tuple[str, str]]:
    """(file, key) of every literal key given to words(), say(), i18n.text() and to an error."""
    families = {c.__name__ for c in (errors.GlmuiError, *errors.GlmuiError.__subclasses__())}
    found = set()
    for file in sorted((ROOT / "glmui").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).split(".")[-1]
            position = 1 if name == "text" else 0
            if len(node.args) <= position or not isinstance(node.args[position], ast.Constant):
                continue
            key = node.args[position].value
            if name in families:
                found.add((file.name, f"errors.{key}"))
            elif name in ("words", "say", "text") and isinstance(key, str) and "." in key:
                found.add((file.name, key))
    return found


def test_every_key_in_the_code_has_its_words() -> None:
    used = _keys_of_calls()
    assert len(used) > 50
    words = i18n.table("en")  # the command line gives its keys without their "cli." in front
    assert sorted(pair for pair in used if not {pair[1], f"cli.{pair[1]}"} & set(words)) == []


@pytest.mark.parametrize(
    ("wish", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh_CN.UTF-8", "zh"),
        ("de-DE,zh;q=0.5", "zh"),
        ("en-GB", "en"),
        ("C", "en"),
        ("", "en"),
        (None, "en"),
    ],
)
def test_the_nearest_language_is_picked(wish: str | None, language: str) -> None:
    assert i18n.pick(wish) == language


def test_a_gap_in_the_words_hides_nothing() -> None:
    assert i18n.text("en", "no.such.key") == "no.such.key"
    assert "{limit}" in i18n.text("en", "errors.prompt_too_long", tokens=3)


def test_an_error_crosses_a_pipe() -> None:
    before = errors.ModelError("prompt_too_long", tokens=3, limit=Path("x"))
    after = errors.from_values(*errors.to_values(before))
    assert type(after) is errors.ModelError
    assert after.message("zh") == before.message("zh")
