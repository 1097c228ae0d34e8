"""A page in a real browser: nothing goes wrong, nothing is asked for, no text lies on another."""

import html
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.reporting.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 800, 1400)
# A page in a frame is as narrow as the frame, so one start of the browser shows every width.
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, faults = []
    const charts = [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width)
    for (const svg of charts) {
      const edge = svg.getBoundingClientRect()
      const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()])
      texts.forEach(([name, a], place) => {
        if (a.left < edge.left - 1 || a.right > edge.right + 1) faults.push("over the edge: " + name)
        for (const [other, b] of texts.slice(place + 1))
          if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
            faults.push(name + " on " + other)
      })
    }
    return {width: page.documentElement.scrollWidth, charts: charts.length, faults}
  })
  document.body.textContent = JSON.stringify(found)
})
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_no_text_lies_on_another_at_any_width(make_run: Callable, study: Path, tmp_path: Path) -> None:
    pages = [write_report(make_run()), write_report(study), write_report(make_run("a"), make_run("b"))]
    frames = [
        f'<iframe width="{width}" style="border:0" srcdoc="{html.escape(page.read_text())}"></iframe>'
        for page in pages
        for width in WIDTHS
    ]
    (tmp_path / "all.html").write_text(f"<body>{''.join(frames)}<script>{MEASURE}</script></body>")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    noted = [f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, *noted, (tmp_path / "all.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = html.unescape(done.stdout.partition("<body>")[2].partition("</body>")[0])
    found = json.loads(told)
    assert [one["faults"] for one in found] == [[]] * len(frames)
    assert [one["width"] for one in found] == [*WIDTHS] * len(pages)  # nothing reaches over the side
    assert all(one["charts"] for one in found)
    assert "CONSOLE" not in done.stderr, done.stderr  # also what the page may not load is told there
