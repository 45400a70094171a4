"""The page of a run and that of a sweep in a browser: needs selenium, chromium and chromedriver."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_tensorboard import browser, pytestmark

from nvf.dashboards.page import run_page
from nvf.report import report
from test_report import examples, made

__all__ = ["browser", "made", "pytestmark"]
WIDTHS, SCHEMES = (400, 1200), ("light", "dark")
# What of the letters has too little contrast with its ground (WCAG AA), and what reaches beyond the page.
FAULTS = """
const number = text => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = node => {
  for (; node; node = node.parentElement) {
    const colour = number(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const faults = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement, box = node.getBoundingClientRect();
  if (!walker.currentNode.data.trim() || !box.width || node.closest("style")) continue;
  seen += 1;
  const both = [luminance(number(getComputedStyle(node).color)), luminance(ground(node))];
  const [dim, bright] = both.sort((a, b) => a - b);
  const large = parseFloat(getComputedStyle(node).fontSize) >= 24;
  if ((bright + 0.05) / (dim + 0.05) < (large ? 3 : 4.5)) faults.push(["contrast", node.textContent.slice(0, 40)]);
  if (parseFloat(getComputedStyle(node).fontSize) < 11) faults.push(["small", node.textContent.slice(0, 40)]);
  if (box.right > innerWidth + 1 && !node.closest(".scroll")) faults.push(["beyond", node.textContent.slice(0, 40)]);
}
if (document.documentElement.scrollWidth > innerWidth) faults.push(["scrolls", document.documentElement.scrollWidth]);
return {seen, faults, scripted: window.scripted === true,
        lines: [...document.querySelectorAll("path")].filter(path => path.getBoundingClientRect().width > 0).length};
"""


@pytest.fixture(scope="module")
def pages(made: Path) -> dict[str, Path]:
    """The page of a run with examples, and that of a sweep of two."""
    hostile = "A long text with <img src=x onerror=window.scripted=true> and <script>window.scripted=true</script> " * 9
    (made / "examples.json").write_text(json.dumps(examples(hostile)))
    (made / "report.html").write_text(run_page(made), encoding="utf-8")
    results = json.loads((made / "results.json").read_text())
    sweep = made.with_name("sweep")
    for k in (3, 5):
        (sweep / f"k={k}").mkdir(parents=True)
        text = json.dumps({**results, "config": {**results["config"], "k": k}})
        (sweep / f"k={k}/results.json").write_text(text)
    return {"run": made / "report.html", "sweep": Path(report([sweep]))}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page", ["run", "sweep"])
def test_a_page_is_legible_on_a_telephone_and_a_screen_by_day_and_by_night(
    pages: dict[str, Path], browser: Any, page: str, scheme: str, width: int
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(pages[page].as_uri())
    found = browser.execute_script(FAULTS)
    assert found["faults"] == []
    assert found["seen"] > 20
    assert not found["scripted"]
    assert page == "sweep" or found["lines"] > 10
    if folder := os.environ.get("NVF_SCREENSHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (Path(folder) / f"report-{page}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
