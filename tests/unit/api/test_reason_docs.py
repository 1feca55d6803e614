"""docs/reasons.md explains every reason and condition, and no other."""

import re
from pathlib import Path

from wattlock_api.constants import ConditionReason, ConditionType, Reason

PAGE = (Path(__file__).parents[3] / "docs/reasons.md").read_text()

EXPLAINED = [*Reason, *ConditionReason, *ConditionType]


def first_cells() -> set[str]:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGE, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_reason_and_condition_is_explained():
    assert {str(name) for name in EXPLAINED} - first_cells() == set()


def test_nothing_is_explained_that_does_not_exist():
    assert first_cells() - {str(name) for name in EXPLAINED} == set()
