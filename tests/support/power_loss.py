"""A directory on a disk that can lose power: it takes the calls of the os module and tells what may be left.

Nothing is on the disk before its fsync: of the names that were changed since the directory was flushed any may be
there and any not, and a file that was not flushed may hold nothing, the beginning of what was written, or zeros.
That is harsher than the file systems of Linux with their usual options, and what POSIX allows.
"""

import itertools
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any


class PowerLostError(BaseException):
    """The power went before a call reached the disk."""


class _File:
    def __init__(self, disk: "FragileDirectory", number: int) -> None:
        self._disk, self._number = disk, number
        self._buffer = b""

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.flush()

    def write(self, content: bytes) -> None:
        self._buffer += content

    def flush(self) -> None:
        if self._buffer:
            self._disk.step()
            self._disk.content[self._number] += self._buffer
            self._buffer = b""

    def fileno(self) -> int:
        return self._number


class FragileDirectory:
    """Stands in for the module os; what is not about files in the directory goes to the real one."""

    def __init__(self, lose_power_at: int | None = None) -> None:
        self.calls = 0
        self.content: dict[int, bytes] = {}
        """By inode, which is the file descriptor too, as the running system sees it."""
        self._lose_power_at = lose_power_at
        self._flushed: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._names_on_disk: dict[str, int] = {}
        self._pending: list[tuple[str | None, str | None, int]] = []
        """Changes of names since the last flush: (name that goes, name that comes, inode)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def step(self) -> None:
        if self.calls == self._lose_power_at:
            raise PowerLostError
        self.calls += 1

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is None:
            return os.open(path, flags, mode)
        self.step()
        inode = self._names.get(path)
        if inode is None:
            inode = 10_000 + len(self.content)
            self._change(None, path, inode)
        self.content[inode] = b""  # O_TRUNC
        return inode

    def fdopen(self, fd: int, mode: str) -> Any:
        return _File(self, fd) if fd in self.content else os.fdopen(fd, mode)

    def fsync(self, fd: int) -> None:
        self.step()
        if fd in self.content:
            self._flushed[fd] = self.content[fd]
        else:
            self._names_on_disk, self._pending = dict(self._names), []

    def replace(self, source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        self.step()
        self._change(source, target, self._names[source])

    def unlink(self, path: str, *, dir_fd: int) -> None:
        self.step()
        if path not in self._names:
            raise FileNotFoundError(path)
        self._change(path, None, self._names[path])

    def _change(self, gone: str | None, come: str | None, inode: int) -> None:
        self._pending.append((gone, come, inode))
        _apply(self._names, gone, come, inode)

    def leftovers(self) -> Iterator[dict[str, bytes]]:
        """Yield every directory, name to content, that may be found when the power is back."""
        for choice in itertools.product((True, False), repeat=len(self._pending)):
            names = dict(self._names_on_disk)
            for change, done in zip(self._pending, choice, strict=True):
                if done:
                    _apply(names, *change)
            for contents in itertools.product(*(self._contents(inode) for inode in names.values())):
                yield dict(zip(names, contents, strict=True))

    def _contents(self, inode: int) -> list[bytes]:
        written, flushed = self.content[inode], self._flushed.get(inode, b"")
        if written == flushed:
            return [flushed]
        cuts = sorted({0, 1, len(written) // 2, max(0, len(written) - 2), len(written)})
        return [flushed, bytes(len(written)), *(written[:cut] for cut in cuts)]


def _apply(names: dict[str, int], gone: str | None, come: str | None, inode: int) -> None:
    if gone is not None:
        names.pop(gone, None)
    if come is not None:
        names[come] = inode
