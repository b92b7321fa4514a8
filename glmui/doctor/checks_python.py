"""Python itself, the packages beside it, and the terminal it speaks to."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import suppress

from glmui.doctor.finding import Finding, ok, problem, warning
from glmui.doctor.world import World

_OLDEST, _NEWEST = (3, 11), (3, 13)


def python(world: World) -> Iterator[Finding]:
    version = ".".join(map(str, world.python))
    if not _OLDEST <= world.python[:2] <= _NEWEST:
        yield problem("python", "python_version", version=version)
    elif world.bits != 64:
        yield problem("python", "python_32_bits", version=version)
    else:
        yield ok("python", "python_fine", version=version)


def environment(world: World) -> Iterator[Finding]:
    yield (ok if world.separate else warning)("environment", f"environment_{_yes(world.separate)}")


def _yes(value: bool) -> str:
    return "own" if value else "shared"


def packages(world: World) -> Iterator[Finding]:
    """What requirements.txt pins against what is installed. A build's mark ("+cpu") is no other version."""
    pins = world.pins
    if not pins:
        yield ok("packages", "packages_unpinned")
        return
    found = {name: world.version_of(name) for name in pins}
    for name in (name for name, version in found.items() if version is None):
        yield problem("packages", "package_missing", package=name, version=pins[name])
    other = [f"{n} {v} ({pins[n]})" for n, v in found.items() if v and v.partition("+")[0] != pins[n]]
    if other:
        yield warning("packages", "packages_other", packages=", ".join(other))
    elif None not in found.values():
        yield ok("packages", "packages_fine", count=len(pins))


def imports(world: World) -> Iterator[Finding]:
    """Packages that are there and cannot be imported. torch is looked at by itself."""
    report = world.packages()
    failed: dict[str, str] = report.facts.get("failed", {})
    for name, error in failed.items():
        yield problem("imports", "import_fails", package=name, error=error)
    if report.doing and report.ending == "time":
        yield problem("imports", "import_hangs", package=report.doing)
    elif report.doing:
        yield problem("imports", "import_crashes", package=report.doing, ending=report.ending)
    elif not failed:
        yield ok("imports", "imports_fine")


def terminal(world: World) -> Iterator[Finding]:
    """Whether the terminal can show what a model answers."""
    if not world.encoding:
        return
    name = world.encoding
    with suppress(LookupError):
        name = codecs.lookup(world.encoding).name
    if name == "utf-8":
        yield ok("terminal", "terminal_fine", encoding=world.encoding)
    else:
        key = "terminal_windows" if world.platform == "win32" else "terminal_other"
        yield warning("terminal", key, encoding=world.encoding)
