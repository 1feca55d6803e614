"""Signals that end a sweep, taken where nothing is half done.

A handler that raised would do so between any two lines, also in those that undo locks. This one only notes the signal;
the sweep looks at the note while it waits, which is nearly all it does.
"""

import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SLICE_SECONDS = 0.1


class Interrupted(Exception):  # noqa: N818 - what happened, and no error
    """A signal asked for the end."""


class Stop:
    """Notes the first signal."""

    def __init__(self) -> None:
        self.signal_name = ""

    def install(self) -> None:
        """Take the signals, but those that whoever started this had ignored (nohup); only the main thread can."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.signal_name:
            raise Interrupted(self.signal_name)

    def pause(self, seconds: float) -> None:
        """Wait; a signal ends the wait within 0.1 s.

        Raises:
            Interrupted: a signal came.
        """
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE_SECONDS))
            self.check()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
