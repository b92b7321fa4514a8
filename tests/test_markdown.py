from __future__ import annotations

import time

import pytest

from glmui.ui.markdown import for_display


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>bold</b> move", "a &#60;b>bold&#60;/b> move"),
        ("<script>alert(1)</script>", "&#60;script>alert(1)&#60;/script>"),
        ("<!-- hidden -->", "&#60;!-- hidden -->"),
        ("1 < 2 and a<-b", "1 < 2 and a<-b"),
        ("List<String>", "List&#60;String>"),
    ],
)
def test_html_is_shown_as_the_text_it_is(text: str, shown: str) -> None:
    assert for_display(text) == shown


@pytest.mark.parametrize(
    "literal",
    [
        "`<b>`",
        "``a `<b>` c``",
        "```html\n<b>x</b>\n```",
        "~~~\n<b>\n~~~",
        "$a<b$",
        "$$\na<b\n$$",
        "\\(a<b\\)",
        "\\[a<b\\]",
        "```md\n![x](https://example.com/x.png)\n```",
    ],
)
def test_code_and_formulas_are_left_alone(literal: str) -> None:
    assert for_display(literal) == literal


def test_text_after_code_is_defused_again() -> None:
    assert for_display("```\n<a>\n```\n<b>") == "```\n<a>\n```\n&#60;b>"
    assert "&#60;b>" in for_display("it costs $5 <b> and $10")


@pytest.mark.parametrize(
    "image",
    [
        "![cat](https://example.com/cat.png)",
        "![cat](http://example.com/cat.png 'title')",
        "![cat]( <//example.com/cat.png>)",
    ],
)
def test_a_remote_image_becomes_a_link_that_names_its_host(image: str) -> None:
    shown = for_display(image)
    assert not shown.startswith("!")
    assert "cat ↗ example.com" in shown


def test_what_looks_like_code_but_is_not_hides_no_html() -> None:
    shown = for_display("a ` b\n\n<b>RAW</b><img src=http://example.com/x> ` d")
    assert "<b>" not in shown
    assert "<img" not in shown


@pytest.mark.parametrize(
    "text", ["![a][r]", "![[x]](http://example.com)", "![a\nb](http://example.com/x.png)"]
)
def test_an_image_in_any_form_is_none(text: str) -> None:
    assert "![" not in for_display(text)


def test_prices_are_no_formulas() -> None:
    assert "$" not in for_display("It costs $5 here and $10 there")
    assert for_display("$x+1$ costs $5") == "$x+1$ costs <span>&#36;</span>5"


def test_an_unfinished_code_block_is_closed_so_that_notes_stand_below_it() -> None:
    assert for_display("```python\nprint(1)") == "```python\nprint(1)\n```"
    assert for_display("~~~~\n```\nx") == "~~~~\n```\nx\n~~~~"


@pytest.mark.parametrize(
    "piece", ["\\(", "\\[ ", "![", "$ ", "$$ ", "<a", "```a`\n", "~~~\n```\n", "![a](http://x", "` `` ``` "]
)
def test_a_hostile_text_takes_no_long_time(piece: str) -> None:
    began = time.process_time()
    for_display(piece * (200_000 // len(piece)))
    assert time.process_time() - began < 3, "quadratic?"
