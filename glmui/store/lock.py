"""One app per data folder: an operating-system lock, which a killed process cannot leave behind."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from glmui.errors import StoreError
from glmui.store.database import told

if sys.platform == "win32":
    import msvcrt

    def lock_descriptor(descriptor: int) -> None:
        # Windows locks bytes against reading too, so one far behind the text is taken.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock_descriptor(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class FolderLock:
    """Holds `glmui.lock` in the data folder, from construction to `release`.

    The file tells who holds it and `newest`, the last message known to be in the database (0: none
    known), which tells a database that has lost something from one that never had it.
    Raises StoreError: database_in_use (with the holder's pid), data_folder_unwritable, disk_full.
    """

    def __init__(self, folder: Path) -> None:
        with told(folder):
            self._descriptor = os.open(folder / "glmui.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                self._take(folder)
            except BaseException:
                os.close(self._descriptor)
                raise
        _, self.newest = self._read()

    def write(self, newest: int) -> None:
        """Note the holder and the newest message.

        Nothing is flushed: the note survives a kill, and after a power cut it is at worst too old.
        """
        self.newest = newest
        text = f"{os.getpid():<10}\n{newest:<20}\n"
        try:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, text.encode("ascii"))
        except OSError:
            pass  # only a notice would need it

    def release(self) -> None:
        os.close(self._descriptor)

    def _take(self, folder: Path) -> None:
        try:
            lock_descriptor(self._descriptor)
        except OSError as error:
            if error.errno not in _HELD:
                raise
            raise StoreError("database_in_use", folder=folder, pid=self._read()[0] or "?") from error

    def _read(self) -> tuple[int, int]:
        """(pid, newest message), zeros where the file does not tell."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        words = os.read(self._descriptor, 64).split()
        numbers = [int(word) if word.isdigit() else 0 for word in words[:2]]
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
