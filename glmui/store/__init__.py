"""Conversations on the disk (SQLite)."""

from glmui.store.conversations import Store
from glmui.store.records import Conversation, Notice, ReplyState, StoredMessage

__all__ = ["Conversation", "Notice", "ReplyState", "Store", "StoredMessage"]
