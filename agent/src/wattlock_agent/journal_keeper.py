"""Gets the journal for the agent, as often as that takes, and says aloud what is wrong with it."""

import logging
from typing import Protocol

from wattlock_agent.agent import Agent
from wattlock_agent.journal import Journal, JournalError, JournalHeldError, NoJournal

_log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
_SHOWN_PROBLEMS = 8


class HostJournal(Journal, Protocol):
    """A journal that must be had before it can be used."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read or was not understood, a sentence each."""

    def acquire(self) -> None:
        """Take it and read it. Raises JournalError."""


class JournalKeeper:
    """Opens the journal for one agent."""

    def __init__(self, journal: HostJournal) -> None:
        self._journal = journal
        self._open = False
        self._due_seconds = float("-inf")
        self._problem = ""

    def open(self, agent: Agent, now_seconds: float) -> None:
        """Give the agent its journal, once it can be had; until then one that says why nothing may be locked."""
        if self._open or now_seconds < self._due_seconds:
            return
        self._due_seconds = now_seconds + RETRY_SECONDS
        try:
            self._journal.acquire()
            records = self._journal.records()
        except JournalError as error:
            if str(error) != self._problem:
                _log.warning("journal: %s", error)
            self._problem = str(error)
            held = isinstance(error, JournalHeldError)
            agent.open_journal(NoJournal(self._problem), other_agent=self._problem if held else "")
            return
        self._open = True
        for problem in self._journal.problems:
            _log.error("journal: %s", problem)
        for uuid, record in records.items():
            _log.info("gpu=%s lock of an earlier agent: %d MHz for pod %s", uuid, record.cap_mhz, record.pod_uid)
        agent.open_journal(self._journal, self._damage())

    def _damage(self) -> str:
        problems = self._journal.problems
        more = len(problems) - _SHOWN_PROBLEMS
        return "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more, see the log" if more > 0 else "")
