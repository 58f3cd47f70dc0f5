"""From benchmarks/results/*.json to what a reader sees: PNG charts and tables in README.md and docs/benchmarks.md.

The text between ``<!-- results: NAME -->`` and ``<!-- end of results -->`` is rewritten; everything else in these files is prose.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import report

PAGES = {"README.md": "docs/images/", "docs/benchmarks.md": "images/"}  # page -> its way to the charts
REGION = re.compile(r"(?P<begin><!-- results: (?P<name>[\w ]+) -->\n).*?(?P<end><!-- end of results -->)", re.DOTALL)
ABSENT = "Not recorded yet: `cute-infer bench {name}` on a machine with a GPU.\n"


def publish(folder: Path, root: Path) -> list[Path]:
    """Write the charts and fill every region of the pages; returns what was written."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    images = root / "docs" / "images"
    written = []
    if results:
        images.mkdir(exist_ok=True)
    for name, content in results.items():
        written.append(images / f"bench-{name}.png")
        report.plot(content, written[-1])
    for page, way in PAGES.items():
        path = root / page
        before = path.read_text(encoding="utf-8")
        after = fill(before, results, way)
        if after != before:
            path.write_text(after, encoding="utf-8")
            written.append(path)
    return written


def fill(page: str, results: dict[str, dict[str, Any]], way: str) -> str:
    """The page with the text of every region replaced."""
    return REGION.sub(lambda match: match["begin"] + region(match["name"], results, way) + match["end"], page)


def region(name: str, results: dict[str, dict[str, Any]], way: str) -> str:
    """What stands between the marks: the chart and the whole table, or with "NAME headline" the table's quick cases only."""
    name, _, headline = name.partition(" ")
    content = results.get(name)
    if content is None:
        return ABSENT.format(name=name)
    if headline:
        quick = {case.name for case in importlib.import_module(f"benchmarks.{name}").QUICK}
        content = {**content, "rows": [row for row in content["rows"] if row["case"] in quick]}
    return f"![{name}, by case and library]({way}bench-{name}.png)\n\n{report.markdown(content, heading=False)}\n"
