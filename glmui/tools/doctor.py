"""`glmui doctor`: the findings in the terminal, and mending on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmui.doctor import report
from glmui.doctor.examine import examine, mend
from glmui.doctor.finding import Finding
from glmui.doctor.world import read_settings, terminal_encoding, this_machine


@dataclass(frozen=True)
class Wish:
    """What the command line asked for. verify: compare the model's files with their hashes (slow)."""

    as_json: bool = False
    fix: bool = False
    verify: bool = False


def run(wish: Wish, flags: Mapping[str, Any], language: str) -> int:
    """Look, mend if asked to and look again; the exit code, 1 where a problem is left."""
    findings, mended = look(wish.verify, flags), list[Finding]()
    if wish.fix and (mended := mend(findings)):
        findings = look(wish.verify, flags)
    said = [f.mended(language) for f in mended]
    if wish.as_json:
        told = report.as_json(findings, language)
        print(json.dumps({**told, "mended": said} if wish.fix else told, ensure_ascii=False, indent=2))
    else:
        said += [""] if said else []
        print("\n".join([*said, *report.lines(findings, language, terminal_encoding())]))
    return 1 if any(finding.status == "problem" for finding in findings) else 0


def look(verify: bool, flags: Mapping[str, Any]) -> list[Finding]:
    """Everything as it is now, the settings read anew."""
    return examine(this_machine(*read_settings(flags), verify))
