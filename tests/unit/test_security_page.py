"""docs/security.md names code and tests that exist: a claim whose test was renamed away is no claim."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    *(DOCS / name for name in ("security.md", "reasons.md", "profiles.md", "tuning.md")),
    *sorted((DOCS / "runbooks").glob("*.md")),
]
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [target for _, target in LINK.findall(page.read_text()) if not target.startswith("https://")]
    for target in links:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_every_test_that_is_named_is_in_its_file():
    named = [(text[1:-1], target) for text, target in LINK.findall(PAGES[0].read_text()) if text.startswith("`test_")]
    assert len(named) > 40
    for name, target in named:
        assert re.search(rf"^def {name}\(", (DOCS / target).read_text(), re.MULTILINE), (name, target)
    words = PAGES[0].read_text()
    assert len(re.findall(r"`test_\w+`", words)) == len(named), "a test without its file"
