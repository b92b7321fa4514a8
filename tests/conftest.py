"""Fixtures that several test files share."""

from tests.chatglm_fixture import published_chatglm, tiny_chatglm
from tests.starter_fixture import starter_data

__all__ = ["published_chatglm", "starter_data", "tiny_chatglm"]
