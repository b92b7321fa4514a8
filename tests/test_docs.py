"""The documents keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glmui import cli
from glmui.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_every_setting_and_flag_is_described() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for name in Settings.model_fields:
        assert f"| `{name}` |" in text, name
    for name, _ in cli.SERVE:
        assert f"{name}`" in text or f"{name} " in text, name


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in cli.COMMANDS:
        assert name == "serve" or f"./launch.sh {name}" in text, name


@pytest.mark.parametrize("document", DOCS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / target).exists(), target


def test_the_map_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "glmui").iterdir()):
        if path.is_dir() and any(path.glob("*.py")):
            assert f"{path.name}/" in text, path.name
        elif path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in text, path.name
