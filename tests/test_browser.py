"""JupyterLab in Chromium, from the keyboard only: `python lab.py test -m browser` (needs playwright and chromium)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
CELL = """
import sys
sys.path.insert(0, {root!r})
from transformers import AutoTokenizer
from qftlab.teach.widgets import MaskViewer
tokenizer = AutoTokenizer.from_pretrained({tiny!r})
turns = lambda asked, said: [dict(role="user", content=asked), dict(role="assistant", content=said)]
MaskViewer(tokenizer, [turns("2+3?", "5"), turns("Spell cat.", "c a t")])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A JupyterLab of its own: the folder it serves and its address."""
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("lab")
    news = folder / ".settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}', encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JUPYTERLAB_SETTINGS_DIR": ".settings", "JUPYTERLAB_WORKSPACES_DIR": ".ws", "JUPYTER_CONFIG_DIR": ".config"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}",
               "--LabApp.expose_app_in_browser=True",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    with open(folder / ".log", "w", encoding="utf-8") as log:
        environment = os.environ | {name: str(folder / place) for name, place in own.items()}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token=t", folder / ".log")
        yield folder, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(address: str, log: Path) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=1)
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("JupyterLab did not start:\n" + log.read_text(encoding="utf-8")[-2000:])


def test_mask_viewer_from_the_keyboard(lab) -> None:
    """Tab and space reach the next conversation and shift the marks: the picture and its words follow."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path")
    folder, address = lab
    cell = nbformat.v4.new_code_cell(CELL.format(root=str(ROOT), tiny=str(ROOT / "data" / "tiny")))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "viewer.ipynb")
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=QUIET).new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/lab/tree/viewer.ipynb?token=t&reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=90_000)
        page.wait_for_function(IDLE, timeout=90_000)
        page.evaluate("async () => { await jupyterapp.commands.execute('notebook:run-all-cells') }")
        shown = page.locator(".jupyter-widgets img").first
        shown.wait_for(timeout=90_000)
        assert "trained is 5<|im_end|>" in shown.get_attribute("alt")
        page.locator(".jupyter-widgets select").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.wait_for_function("document.querySelector('.jupyter-widgets img').alt.includes('c␣a␣t<|im_end|>')")
        page.keyboard.press("Tab")
        before = shown.get_attribute("src")
        page.keyboard.press("Space")
        page.wait_for_function("before => document.querySelector('.jupyter-widgets img').src !== before", arg=before)
        page.locator(".jupyter-widgets summary").focus()
        page.keyboard.press("Space")
        columns = ["position", "id", "token", "loss here", "predicts"]
        assert page.locator(".jupyter-widgets th").all_inner_texts() == columns
        assert shown.evaluate("image => image.naturalWidth") == 900
        assert errors == []
