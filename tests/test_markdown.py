from __future__ import annotations

import pytest

from glmui.ui.markdown import for_display


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>bold</b> move", "a &lt;b>bold&lt;/b> move"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<!-- hidden -->", "&lt;!-- hidden -->"),
        ("1 < 2 and a<-b", "1 < 2 and a<-b"),
        ("List<String>", "List&lt;String>"),
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
        "```\nstill growing <b>",
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
    assert for_display("```\n<a>\n```\n<b>") == "```\n<a>\n```\n&lt;b>"
    assert for_display("it costs $5 <b> and $10") == "it costs $5 &lt;b> and $10"


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
