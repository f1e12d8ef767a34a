"""The README as a text: its table of contents, and what its links lead to."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)  # a comment in a program is no heading


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_chapter_is_in_the_table_of_contents_in_order():
    beginning, _, rest = PROSE.partition("\n## ")
    contents = re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", beginning)
    chapters = [line for line in re.findall(r"^## (.+)$", f"## {rest}", re.MULTILINE) if line != "License"]
    assert contents == [(chapter, anchor(chapter)) for chapter in chapters]


def test_every_link_within_it_leads_somewhere():
    headings = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {anchor(heading) for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", PROSE)
    assert links
    assert [link for link in links if link not in anchors] == []
