"""TensorBoard in a browser, as a user sees it after a run: needs selenium, chromium and chromedriver."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import command
from nvf.dashboards.figures import STYLE, WIDTH
from nvf.runs.curves import CHART

TOOLS = {"chromium": shutil.which("chromium"), "chromedriver": shutil.which("chromedriver")}
MISSING = [name for name, path in TOOLS.items() if path is None] + ([] if find_spec("selenium") else ["selenium"])
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not found; apt-get install chromium chromium-driver, pip install selenium",
)
RUN = [
    *("data.rows=40", "data.dim=8", "queries.val_samples=200", "queries.test_samples=200", "trainer=debug"),
    *("threads=1", "hydra.run.dir=outputs/small"),
]
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1600,1200"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # the projector draws with WebGL
]
PLUGINS = ["timeseries", "hparams", "images", "projector"]
PLUGINS += [] if "NVF_LOGDIR" in os.environ else ["text"]  # which a sweep alone has
PATIENCE = 60  # seconds
# All that is written on the page and the height of every picture, through the shadow roots that TensorBoard nests.
SEEN = """
const texts = [], pictures = [], colours = [], dark = document.body.classList.contains("dark-mode");
const walk = node => {
  if (node.tagName === "VZ-PROJECTOR-DATA-PANEL" && (node.colorOptions || []).some(option => option.name === "kind"))
    node.selectedColorOptionName = "kind";  // as a user would choose it
  if (node.tagName === "IFRAME" && node.contentDocument && node.contentDocument.body) walk(node.contentDocument.body);
  if (node.classList && node.classList.contains("run-color-swatch")) colours.push(node.style.background);
  if (node.nodeType === 3) { if (node.data.trim()) texts.push(node.data.trim()); return; }
  if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return;
  const box = node.getBoundingClientRect ? node.getBoundingClientRect() : null;
  if (["IMG", "CANVAS", "SVG", "svg"].includes(node.tagName) && box && box.height > 0)
    pictures.push({tag: node.tagName.toLowerCase(), height: box.height, width: box.width,
                   natural: node.naturalHeight || 0,
                   label: node.alt || node.getAttribute("aria-label") || "",
                   lines: node.querySelectorAll ? node.querySelectorAll("path").length : 0});
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return {text: texts.join("\\n"), pictures, colours, dark};
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ended(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a run, or the one that NVF_LOGDIR names."""
    if given := os.environ.get("NVF_LOGDIR"):
        return Path(given)
    folder = tmp_path_factory.mktemp("user")
    ran = command(*RUN, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    swept = command("-m", *RUN, "k=2,5", "seed=0,1", "dashboards=none", "hydra.sweep.dir=outputs/swept", cwd=folder)
    assert swept.returncode == 0, swept.stderr
    return folder / "outputs"


@pytest.fixture(scope="module")
def tensorboard(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that shows the run."""
    port = free_port()
    address, log = f"http://127.0.0.1:{port}/", tmp_path_factory.mktemp("server") / "log"
    program = [sys.executable, "-m", "tensorboard.main", "--logdir", str(outputs), "--host", "127.0.0.1"]
    with log.open("wb") as file:
        server = subprocess.Popen([*program, "--port", str(port)], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{address}data/plugins_listing", timeout=5) as answer:
                    plugins = json.load(answer)
                if all(plugins[name]["enabled"] for name in PLUGINS):  # it has read the run
                    break
            except OSError:
                pass
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield address
    finally:
        ended(server)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = TOOLS["chromium"] or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    service = Service(TOOLS["chromedriver"])  # named, so that selenium does not download one
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(PATIENCE)
    try:
        yield driver
    finally:
        try:
            driver.quit()
        finally:
            service.stop()


Look = Callable[[str, str, Callable[[dict[str, Any]], bool]], dict[str, Any]]


@pytest.fixture
def look(tensorboard: str, browser: Any, tmp_path: Path) -> Look:
    """Opens a page, waits until it shows what it should, and keeps a screenshot: name, address, condition."""
    screenshots = Path(os.environ.get("NVF_SCREENSHOTS", tmp_path))
    screenshots.mkdir(parents=True, exist_ok=True)

    def _look(name: str, page: str, shows: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        browser.get("about:blank")  # else a change behind the # loads nothing anew
        browser.get(tensorboard + page)
        deadline, seen = time.monotonic() + PATIENCE, {"text": "", "pictures": [], "colours": [], "dark": False}
        while not shows(seen) and time.monotonic() < deadline:
            time.sleep(0.5)
            seen = browser.execute_script(SEEN)
        time.sleep(1.5)  # animations end
        seen = browser.execute_script(SEEN)
        time.sleep(0.5)
        browser.save_screenshot(str(screenshots / f"{name}.png"))
        assert shows(seen), f"{page} shows: {seen['text'][:3000]}\n{seen['pictures']}"
        return seen

    return _look


def says(*words: str) -> Callable[[dict[str, Any]], bool]:
    return lambda seen: all(word in seen["text"] for word in words)


@pytest.mark.parametrize("dark", [False, True])
def test_the_first_chart_has_each_line_in_a_colour_of_its_own(look: Look, dark: bool) -> None:
    only = "" if "NVF_LOGDIR" in os.environ else "&runFilter=small"
    address = f"?smoothing=0&darkMode={str(dark).lower()}{only}#timeseries"
    seen = look(f"time-series{'-dark' * dark}", address, lambda seen: says(CHART, "1_won")(seen) and seen["colours"])
    lines = seen["text"].splitlines()
    assert seen["dark"] == dark
    for run in ("stage-1", "pipeline", "exact", "coverage"):
        assert f"curves/{run}" in seen["text"]
    assert "cache" not in seen["text"]
    assert "epoch" not in lines
    assert len({*seen["colours"]}) >= 5
    groups = [lines.index(group) for group in (CHART, "figures", "gradients", "hp", "train", "val")]
    assert groups == sorted(groups)  # the chart, then the figures, then all else


def test_the_hparams_table_has_a_row_for_each_run(look: Look) -> None:
    seen = look("hparams", "#hparams", says("hp/pipeline/top1", "TABLE VIEW"))
    assert re.search(r"\b0\.\d{2,}|\b1\.0", seen["text"])
    assert "curves/" not in seen["text"]


@pytest.mark.parametrize("dark", [False, True])
def test_letters_of_every_image_are_large_enough_to_read(look: Look, dark: bool) -> None:
    def shows(seen: dict[str, Any]) -> bool:
        loaded = [picture for picture in seen["pictures"] if picture["tag"] == "img" and picture["natural"] > 300]
        return says("3_others", "4_reliability")(seen) and len(loaded) >= 2

    seen = look(f"images{'-dark' * dark}", f"?darkMode={str(dark).lower()}#images", shows)
    assert seen["dark"] == dark
    points = STYLE["font.size"] / 72 / WIDTH  # the height of a letter as a share of the figure's width
    shown = [picture for picture in seen["pictures"] if picture["tag"] == "img" and picture["natural"] > 300]
    assert min(points * picture["width"] for picture in shown) > 7  # pixels
    assert points * 700 > 14


def test_a_sweep_has_its_table_as_a_text(look: Look) -> None:
    if "NVF_LOGDIR" not in os.environ:
        look("sweep-table", "#text", says("comparison", "best on validation", "val Top-1"))


def test_a_sweep_has_its_curves_and_its_comparison(look: Look) -> None:
    if "NVF_LOGDIR" not in os.environ:
        shows = says("1_curves", "2_comparison")
        look("sweep", "?runFilter=swept%24&tagFilter=figures#timeseries", shows)


def test_the_projector_has_the_points(look: Look) -> None:
    look("projector", "#projector", lambda seen: bool(re.search(r"Points:\s*\d+", seen["text"])))
