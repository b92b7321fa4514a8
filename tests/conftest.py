"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples every time where a run decides something; fresh ones at home, where new finds are welcome.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# As in the engine process: two OpenMP threads that wait by spinning crawl once anything else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: their threads would only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.chatglm2_fixture import published_chatglm2, tiny_chatglm2  # noqa: E402
from tests.chatglm_fixture import published_chatglm, tiny_chatglm  # noqa: E402
from tests.starter_fixture import starter_data  # noqa: E402

__all__ = ["published_chatglm", "published_chatglm2", "starter_data", "tiny_chatglm", "tiny_chatglm2"]


def pytest_sessionstart() -> None:
    """Ctrl+C ends programs that tests start, also where the tests run in a script's background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are built for this run, once for all its workers; the account's own cache is left alone.

    The folder's name has a blank and Chinese characters, as an account's may."""
    before = dict(os.environ)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["XDG_CACHE_HOME"] = str(shared / "缓存 cache")
    yield
    os.environ.clear()
    os.environ.update(before)
