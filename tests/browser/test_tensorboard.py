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

TOOLS = {"chromium": shutil.which("chromium"), "chromedriver": shutil.which("chromedriver")}
MISSING = [name for name, path in TOOLS.items() if path is None] + ([] if find_spec("selenium") else ["selenium"])
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not found; apt-get install chromium chromium-driver, pip install selenium",
)
RUN = [
    *("data.rows=40", "data.dim=8", "queries.val_samples=200", "queries.test_samples=200", "trainer=debug"),
    *("cache=off", "threads=1", "hydra.run.dir=outputs/small"),
]
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1600,1200"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # the projector draws with WebGL
]
PLUGINS = ("timeseries", "hparams", "images", "custom_scalars", "projector")
PATIENCE = 60  # seconds
# All that is written on the page and the height of every picture, through the shadow roots that TensorBoard nests.
SEEN = """
const texts = [], pictures = [];
const walk = node => {
  if (node.tagName === "VZ-PROJECTOR-DATA-PANEL" && (node.colorOptions || []).some(option => option.name === "kind"))
    node.selectedColorOptionName = "kind";  // as a user would choose it
  if (node.tagName === "IFRAME" && node.contentDocument && node.contentDocument.body) walk(node.contentDocument.body);
  if (node.nodeType === 3) { if (node.data.trim()) texts.push(node.data.trim()); return; }
  if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return;
  const box = node.getBoundingClientRect ? node.getBoundingClientRect() : null;
  if (["IMG", "CANVAS", "SVG", "svg"].includes(node.tagName) && box && box.height > 0)
    pictures.push({tag: node.tagName.toLowerCase(), height: box.height, natural: node.naturalHeight || 0,
                   label: node.alt || node.getAttribute("aria-label") || "",
                   lines: node.querySelectorAll ? node.querySelectorAll("path").length : 0});
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return {text: texts.join("\\n"), pictures};
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
        deadline, seen = time.monotonic() + PATIENCE, {"text": "", "pictures": []}
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


def test_scalars_have_charts(look: Look) -> None:
    def shows(seen: dict[str, Any]) -> bool:
        drawn = [picture for picture in seen["pictures"] if picture["tag"] in ("svg", "canvas")]
        titles = "".join(seen["text"].split())  # of which each may be in pieces
        return "val/top1" in titles and "top1/coverage" in titles and len(drawn) >= 2

    look("scalars", "?tagFilter=val%2Ftop1%24%7Ctop1%2Fcoverage#timeseries", shows)


def test_the_hparams_table_has_the_test_figures(look: Look) -> None:
    seen = look("hparams", "#hparams", says("hp/pipeline/top1", "TABLE VIEW"))
    assert re.search(r"\b0\.\d{2,}|\b1\.0", seen["text"])


def test_every_figure_is_among_the_images(look: Look) -> None:
    def shows(seen: dict[str, Any]) -> bool:
        loaded = [picture for picture in seen["pictures"] if picture["tag"] == "img" and picture["natural"] > 300]
        return says("1_candidates", "2_reliability")(seen) and len(loaded) >= 2

    look("images", "#images", shows)


def test_the_custom_page_draws_both_stages_and_their_ceilings(look: Look) -> None:
    def shows(seen: dict[str, Any]) -> bool:
        charts = [picture for picture in seen["pictures"] if picture["tag"] == "svg" and picture["lines"] >= 5]
        return says("both stages and their ceilings", "Top-1", "Top-5")(seen) and len(charts) >= 2

    look("custom-scalars", "#custom_scalars", shows)


def test_the_projector_has_the_points(look: Look) -> None:
    look("projector", "#projector", lambda seen: bool(re.search(r"Points:\s*\d+", seen["text"])))
