"""The report in headless Chromium, with a script that uses the page as a reader does."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gn_detect.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.usefixtures("real_curves"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

LISTEN = """<script>
window.problems = [];
addEventListener("error", (e) => problems.push(String(e.message || e.target.src)), true);
addEventListener("unhandledrejection", (e) => problems.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => problems.push("policy: " + e.blockedURI));
for (const kind of ["error", "warn"]) { console[kind] = (...all) => problems.push(all.join(" ")); }
</script>"""
"""Goes before all of the page: whatever goes wrong in it is noted."""

USE = """<pre id="checks"></pre><script>
const checks = {};
const $ = (selector) => document.querySelector(selector);
const $$ = (selector) => [...document.querySelectorAll(selector)];
const seen = (selector) => $$(selector).filter((e) => e.getClientRects().length && e.checkVisibility());
const choose = (selector, value) => {
  $(selector).value = value;
  $(selector).dispatchEvent(new Event("input"));
};
const column = (table, number) => $$(`table.${table} tbody tr`).map((r) => r.cells[number].dataset.value);
const head = (table, number) => $(`table.${table} thead`).rows[0].cells[number];
const use = async () => {
  checks.title = document.title;
  $$(".pictures img").forEach((image) => { image.loading = "eager"; });
  for (let i = 0; i < 50 && !$$(".pictures img").every((image) => image.complete); i++) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  checks.pictures_loaded = $$(".pictures img").map((image) => image.naturalWidth > 100);
  checks.charts = seen("svg").length;
  checks.charts_have_size = $$("svg").every((svg) => svg.getBoundingClientRect().height > 100);
  checks.no_sideways_scroll = document.documentElement.scrollWidth <= innerWidth;

  checks.worst_first = column("images", 7).map(Number);
  head("images", 7).click(); head("images", 7).click();
  checks.sorted_up = column("images", 7).map(Number);
  head("images", 7).click();
  checks.sorted_down = column("images", 7).map(Number);
  checks.arrow = head("images", 7).getAttribute("aria-sort");
  head("images", 0).click();
  checks.by_name = column("images", 0);
  head("images", 0).dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
  checks.by_name_with_the_keyboard = column("images", 0);
  head("categories", 2).click();
  checks.categories_by_ap = column("categories", 2).map(Number);

  choose("input.search", "00");
  checks.all_match = seen("table.images tbody tr").length;
  choose("input.search", "003.PNG");
  checks.one_matches = seen("table.images tbody tr").map((r) => r.cells[0].textContent);
  checks.shown = $(".shown").textContent;
  choose("input.search", "");

  checks.lines_of_all = seen(".line[data-group]").length;
  choose("select.category", "1");
  checks.lines_of_one = seen('.line[data-group="1"]').length;
  checks.other_lines = seen('.line:not([data-group="1"])[data-group]').length;
  checks.images_with_it = seen("table.images tbody tr").length;
  checks.chosen_row = $("table.categories tr.chosen").dataset.category;
  choose("select.category", "all");
  $('table.categories tr[data-category="0"]').click();
  checks.row_chooses = $("select.category").value;
  $('table.categories tr[data-category="0"]').click();
  checks.row_chooses_no_more = $("select.category").value;

  choose("select.rank", "worst");
  checks.worst_alone = seen(".pictures figure").map((f) => f.dataset.rank);
  choose("select.rank", "all");

  const back = () => getComputedStyle(document.body).backgroundColor;
  const before = back();
  $("#theme").click();
  checks.theme_changes = before !== back();
  $(".pictures img").click();
  checks.enlarged = $("#zoom").open && $("#zoom img").src === $(".pictures img").src;
  $("#zoom").click();
  checks.closed_again = !$("#zoom").open;
  checks.config_folded = seen("#config pre").length;
  $("#config summary").click();
  checks.config_unfolded = seen("#config pre").length;
};
window.addEventListener("load", () => use().catch((e) => problems.push(e.stack)).then(() => {
  checks.problems = problems;
  $("#checks").textContent = JSON.stringify(checks);
}));
</script>"""


def browse(page: Path, profile: Path, width: int = 1240) -> tuple[str, str]:
    """The page's content after its scripts have run, and what Chromium logged."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},1000", "--virtual-time-budget=8000"]
    result = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
    )
    return result.stdout, result.stderr


@pytest.mark.slow
def test_filters_tables_and_pictures_work(make_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report(make_run(), pictures=2)
    untouched, log = browse(page, tmp_path / "profile")
    assert "CONSOLE" not in log
    assert 'id="config"' in untouched

    text = page.read_text(encoding="utf-8").replace(
        '<meta charset="utf-8">', f'<meta charset="utf-8">{LISTEN}'
    )
    page.write_text(text.replace("</body>", f"{USE}</body>"), encoding="utf-8")
    content, log = browse(page, tmp_path / "profile")
    found = re.search(r'<pre id="checks">(.+?)</pre>', content, re.S)
    assert found, log[-2000:]
    checks = json.loads(html.unescape(found.group(1)))
    qualities = [0, 50, 50, 100]
    names = [f"00{i}.png" for i in range(1, 5)]
    assert {key: checks.pop(key) for key in ("worst_first", "sorted_up", "sorted_down")} == {
        "worst_first": pytest.approx(qualities),
        "sorted_up": pytest.approx(qualities),
        "sorted_down": pytest.approx(qualities[::-1]),
    }
    by_ap = checks.pop("categories_by_ap")
    assert len(by_ap) == 2
    assert by_ap == sorted(by_ap, reverse=True)
    assert by_ap[0] > by_ap[1]
    assert checks == {
        "title": "run",
        "pictures_loaded": [True] * 4,
        "charts": 7,
        "charts_have_size": True,
        "no_sideways_scroll": True,
        "arrow": "descending",
        "by_name": names,
        "by_name_with_the_keyboard": names[::-1],
        "all_match": 4,
        "one_matches": ["003.png"],
        "shown": "1",
        "lines_of_all": 6,
        "lines_of_one": 6,
        "other_lines": 0,
        "images_with_it": 4,
        "chosen_row": "1",
        "row_chooses": "0",
        "row_chooses_no_more": "all",
        "worst_alone": ["worst", "worst"],
        "theme_changes": True,
        "enlarged": True,
        "closed_again": True,
        "config_folded": 0,
        "config_unfolded": 1,
        "problems": [],
    }


@pytest.mark.slow
def test_an_empty_run_and_a_narrow_window_raise_no_error(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    page = write_report(make_run(evaluated=False, trained=False))
    content, log = browse(page, tmp_path / "profile", width=400)
    assert "has not been evaluated yet" in content
    assert "CONSOLE" not in log
