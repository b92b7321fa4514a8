"""All checks in the order in which they are told, and mending what can be mended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from glmui.doctor import checks_data, checks_machine, checks_model, checks_plan, checks_python, checks_torch
from glmui.doctor.finding import Finding, warning
from glmui.doctor.world import World

log = logging.getLogger(__name__)

Check = Callable[[World], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    checks_python.python,
    checks_python.environment,
    checks_python.packages,
    checks_python.imports,
    checks_torch.torch,
    checks_torch.driver,
    checks_torch.cuda,
    checks_torch.cpu,
    checks_torch.compiler,
    checks_torch.kernels,
    checks_torch.card_kernels,
    checks_machine.memory,
    checks_machine.disk,
    checks_machine.temporary,
    checks_data.data_folder,
    checks_data.data_place,
    checks_data.settings_file,
    checks_data.database,
    checks_data.backups,
    checks_data.leftovers,
    checks_model.model,
    checks_plan.plan,
    checks_machine.port,
    checks_machine.proxy,
    checks_machine.clock,
    checks_python.terminal,
)


def examine(world: World, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Everything that was found. A check that fails is a finding itself, and the others go on."""
    return [finding for check in checks for finding in _look(check, world)]


def _look(check: Check, world: World) -> list[Finding]:
    name = check.__name__
    try:
        return list(check(world))
    except ModuleNotFoundError as error:
        return [warning(name, "needs_package", package=error.name)]
    except Exception as error:  # whatever this machine may come up with
        log.warning("%s could not be looked at", name, exc_info=True)
        return [warning(name, "not_looked", error=f"{type(error).__name__}: {error}")]


def mend(findings: Iterable[Finding]) -> list[Finding]:
    """Mend what can be mended; each finding that was, or as one that says why it was not."""
    return [_mend(finding) for finding in findings if finding.mend]


def _mend(finding: Finding) -> Finding:
    assert finding.mend
    try:
        finding.mend()
    except Exception as error:
        return warning(finding.name, "not_mended", error=error)
    return finding
