"""The report in a browser: all charts are drawn, and the content security policy blocks nothing of the page."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mme.report.page import write_report
from tests.report.pages import EVALUATIONS, EXPERTS, RUN, evaluation, learned, train_records, write_run
from tests.report.test_inert import hostile_records

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")


def opened(page: Path, profile: Path, width: int = 1400) -> tuple[str, list[str]]:
    """The page's DOM, without scripts, after they have run, and the lines of the browser's console."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=20000", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=240)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    return dom, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_charts_are_drawn_and_the_policy_blocks_nothing(tmp_path: Path) -> None:
    record = evaluation("fuxi-mme", "test", 200, 0.11, insight=learned(), standard_errors={"ndcg@10": 0.01})
    records = [RUN, *train_records(), EXPERTS, *EVALUATIONS, record]
    page = write_report(write_run(tmp_path / "run", records))
    dom, console = opened(page, tmp_path / "profile")
    assert console == []
    assert 'data-charts="drawn"' in dom and "could not be drawn" not in dom
    places = len(re.findall(r'class="chart[ "]', dom))
    assert places == 15 and len(re.findall(r"<svg [^>]*class=\"marks\"", dom)) == places
    assert "70.0" in dom  # the load of the first expert, a text that occurs only in the chart


MEASURE = """{
const outside = (box, of) => Math.max(of.left - box.left, box.right - of.right);
const box = (element) => element.getBoundingClientRect();
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const drawn = setInterval(() => {
  if (document.body.dataset.charts !== "drawn") return;
  clearInterval(drawn);
  const found = document.body.dataset;
  found.page = document.documentElement.scrollWidth - innerWidth;
  const gaps = [...document.querySelectorAll(".charts")].flatMap((grid) => {
    const ends = {};
    for (const figure of grid.children) {
      const row = Math.round(box(figure).top);
      ends[row] = Math.max(ends[row] ?? 0, box(figure).right);
    }
    return Object.values(ends).map((end) => box(grid).right - end);
  });
  found.gap = Math.max(...gaps);
  found.svg = Math.max(...[...document.querySelectorAll(".chart")].map((place) => outside(box(place.querySelector("svg")), box(place))));
  found.overlaps = [...document.querySelectorAll(".role-axis-label")].map((axis) => {
    const shown = [...axis.querySelectorAll("text")].filter((label) => label.getAttribute("opacity") !== "0").map(box);
    return shown.some((label, place) => shown.slice(place + 1).some((other) => overlap(label, other)));
  }).filter(Boolean).length;
}, 50);
}"""


@pytest.mark.parametrize("width", [1400, 500])
def test_nothing_overflows_overlaps_or_leaves_half_a_row_empty(tmp_path: Path, width: int) -> None:
    groups = {
        "popularity": ["top 1%", "1–10%", "10–50%", "50–100%", "new"],
        "history": ["10–19", "20–49", "50–99", "100 or more"],
    }
    segments = {
        kind: [{"group": name, "users": 1234, "ndcg@10": 0.1, "standard_error": 0.01} for name in names]
        for kind, names in groups.items()
    }
    record = evaluation("fuxi-mme", "test", 200, 0.11, insight=learned(), segments=segments)
    run = write_run(tmp_path / "run", [RUN, *train_records(), EXPERTS, *EVALUATIONS, record])
    dom, console = opened(with_script(write_report(run), MEASURE), tmp_path / "profile", width)
    assert console == []
    found = {name: float(value) for name, value in re.findall(r'data-(page|gap|svg|overlaps)="([^"]*)"', dom)}
    assert found["page"] <= 0 and found["overlaps"] == 0, found
    assert found["gap"] <= 1 and found["svg"] <= 1, found


def with_script(page: Path, script: str) -> Path:
    """The page with one more script, which its policy admits."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = page.read_text().replace("script-src", f"script-src 'sha256-{digest}'", 1)
    page.write_text(source.replace("</main>", f"</main><script>{script}</script>", 1))
    return page


def test_hostile_run_is_drawn_and_runs_nothing(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "<b>run", hostile_records()))
    dom, console = opened(page, tmp_path / "profile")
    assert console == [] and 'data-charts="drawn"' in dom and "could not be drawn" not in dom
    assert "<img" not in dom and "alert(1)" in dom


WATCH = """{
const at = (type, options) => new PointerEvent(type, { bubbles: true, pointerType: "mouse", view: window, ...options });
const labels = (svg) => [...svg.querySelectorAll(".role-axis-label text")].map((text) => text.textContent).join(" ");
const wheel = (mark, place, name, ctrlKey) => {
  const event = new WheelEvent("wheel", { bubbles: true, cancelable: true, view: window, deltaY: -300, ctrlKey, ...place });
  mark.dispatchEvent(event);
  document.body.dataset[name] = event.defaultPrevented;
};
const drawn = setInterval(() => {
  if (document.body.dataset.charts !== "drawn") return;
  clearInterval(drawn);
  const svg = document.querySelector("#chart-0 svg");
  svg.scrollIntoView();
  const box = svg.getBoundingClientRect();
  const place = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  const mark = document.elementFromPoint(place.clientX, place.clientY);
  for (const type of ["pointerover", "mouseover", "pointermove", "mousemove"]) mark.dispatchEvent(at(type, place));
  document.body.dataset.before = labels(svg);
  setTimeout(() => {
    document.body.dataset.tooltip = document.getElementById("vg-tooltip-element")?.textContent;
    wheel(mark, place, "scrolled", false);
    setTimeout(() => wheel(mark, place, "zoomed", true), 500);
    setTimeout(() => { document.body.dataset.after = labels(svg); }, 1000);
  }, 500);
}, 50);
}"""


def test_hovering_shows_values_and_only_ctrl_and_the_wheel_zoom(tmp_path: Path) -> None:
    page = with_script(write_report(write_run(tmp_path / "run", [RUN, *train_records()])), WATCH)
    dom, console = opened(page, tmp_path / "profile")
    assert console == []
    seen = dict(re.findall(r'data-(\w+)="([^"]*)"', dom))
    assert re.fullmatch(r"line(recorded steps|smoothed)step(90|1[01]0|100)value(5|6)(\.\d+)?", seen["tooltip"])
    assert (seen["scrolled"], seen["zoomed"]) == ("false", "true")
    assert seen["before"] != seen["after"]


def test_policy_blocks_foreign_scripts(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", [RUN, *train_records()]))
    page.write_text(page.read_text().replace("<main>", "<main><script>document.body.dataset.evil = 1</script>", 1))
    dom, console = opened(page, tmp_path / "profile")
    assert "data-evil" not in dom and any("Content Security Policy" in line for line in console)
