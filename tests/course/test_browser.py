"""JupyterLab in Chromium, from the keyboard only: `python lab.py test -m browser` (needs playwright and chromium)."""

from __future__ import annotations

import math
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

from qftlab_course.lessons.ab_game import planted_results

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
NOTEBOOK = ROOT / "notebooks" / "04_decoding.ipynb"
CELL = """
import sys
sys.path.insert(0, {root!r})
from transformers import AutoTokenizer
from qftlab_course.widgets import MaskViewer
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
    # Otherwise cells outside the window are not on the page at all.
    tracker = folder / ".settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}', encoding="utf-8")
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


@pytest.fixture
def page(lab) -> Iterator:
    """A page of Chromium, as wide as a laptop; a script error on it fails the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=QUIET).new_page(
            viewport={"width": 1280, "height": 1100}
        )
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        assert errors == []


def run_all(page, address: str, name: str) -> None:
    """Opens a notebook and runs all of it; returns when the last cell was sent, not when it is done."""
    page.goto(f"{address}/lab/tree/{name}?token=t&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=90_000)
    page.wait_for_function(IDLE, timeout=90_000)
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")


def test_mask_viewer_from_the_keyboard(lab, page) -> None:
    """Tab and space reach the next conversation and shift the marks: the picture and its words follow."""
    folder, address = lab
    cell = nbformat.v4.new_code_cell(CELL.format(root=str(ROOT), tiny=str(ROOT / "data" / "tiny")))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "viewer.ipynb")
    run_all(page, address, "viewer.ipynb")
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


GAME = """
import sys
sys.path.insert(0, {root!r})
from qftlab_course.lessons.ab_game import ABGame, planted_results
game = ABGame(planted_results(4))
game
"""


def test_real_or_noise_from_the_keyboard(lab, page) -> None:
    """Four calls by tab and space, one taken back: the score is that of the truth."""
    folder, address = lab
    cell = nbformat.v4.new_code_cell(GAME.format(root=str(ROOT)))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "game.ipynb")
    run_all(page, address, "game.ipynb")
    box = page.locator(".jupyter-widgets.widget-vbox")
    box.get_by_text("Result 1 of 4").wait_for(timeout=90_000)
    truths = [result.truth for result in planted_results(4)]
    page.get_by_role("button", name="Real", exact=True).focus()
    page.keyboard.press("Space")
    box.get_by_text("Result 2 of 4").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # taken back
    box.get_by_text("Result 1 of 4").wait_for()
    for number, truth in enumerate(truths, 1):
        page.get_by_role("button", name=truth.capitalize(), exact=True).press("Space")
        box.get_by_text(f"Result {number + 1} of 4" if number < 4 else "All 4 calls made: 4 are true").wait_for()


class Lab:
    """The decoding lab as a reader sees it."""

    def __init__(self, page) -> None:
        self.page, self.box = page, page.locator(".qftlab-decoding").last

    def bars(self) -> list[str]:
        """What the twelve rows say of their tokens' probabilities."""
        return self.box.locator(".qftlab-bars img").evaluate_all("images => images.map(image => image.alt)")

    def chips(self) -> list[str]:
        """The text, token by token, after the chip of the prompt."""
        return self.box.locator(".qftlab-chip").all_inner_texts()

    def tree(self) -> str:
        """The words of the tree's picture."""
        return self.box.locator(".qftlab-tree img").get_attribute("alt")

    def alerts(self) -> list[str]:
        """What the lab complains of."""
        return self.box.get_by_role("alert").all_inner_texts()

    def until(self, is_so, what: str) -> None:
        """Waits for something to be so, at most two minutes: how long a busy machine takes is not what is tested."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if is_so():
                return
            self.page.wait_for_timeout(50)
        shown = f"chips {self.chips()}, tree {self.tree()}, bars {self.bars()}"
        raise AssertionError(f"not within two minutes: {what}; {shown}")

    def press(self, locator, *keys: str) -> None:
        """Keys pressed on a control that has the focus."""
        locator.focus()
        for key in keys:
            self.page.keyboard.press(key)


def runs_on(seen: Lab, chips: list[str]) -> None:
    """Run writes the whole turn, and after a short Run a second one goes on; undone, the text is what it was."""
    run, undo = (seen.box.get_by_role("button", name=name, exact=True) for name in ("Run", "Undo"))
    seen.press(run, "Space")
    seen.until(lambda: seen.chips()[-1] == "<|im_end|>", "the end of the turn")
    turn = seen.chips()
    assert turn[: len(chips)] == chips and len(turn) > len(chips) + 6
    seen.press(run, "Space")
    seen.until(lambda: seen.alerts() == ["⚠ the text has ended with <|im_end|>: undo, rewind or reset to go on"], "why")
    seen.press(undo, "Space")
    seen.until(lambda: seen.chips() == chips and not seen.alerts(), "the text of before, and no message")
    seen.box.locator("input[type=number]").nth(5).fill("3")
    for count in (3, 6):
        seen.press(run, "Space")
        seen.until(lambda: seen.chips() == turn[: len(chips) + count], f"{count} tokens more")  # noqa: B023
    seen.press(undo, "Space", "Space")
    seen.until(lambda: seen.chips() == chips and not seen.alerts(), "the text of before, and no message")


def test_decoding_lab_of_notebook_04(lab, page) -> None:
    """The notebook is run; then, by keyboard: Run, a slider, a forced token, both tabs, a wrong number; two widths."""
    folder, address = lab
    shutil.copy(NOTEBOOK, folder / "04.ipynb")
    shutil.copytree(ROOT / "notebooks" / "figures", folder / "figures")
    run_all(page, address, "04.ipynb")
    page.locator(".qftlab-decoding .qftlab-token").last.wait_for(state="attached", timeout=480_000)
    seen = Lab(page)
    seen.box.scroll_into_view_if_needed()
    bars, chips, tree = seen.bars(), seen.chips(), seen.tree()
    assert len(bars) == 12 and chips[0] == "prompt"
    runs_on(seen, chips)
    slider, number = seen.box.locator(".noUi-handle").first, seen.box.locator("input[type=number]").first
    seen.press(slider, *["ArrowRight"] * 40)
    seen.until(lambda: float(number.input_value()) == 2, "the temperature at its highest")
    seen.until(lambda: seen.bars() != bars, "other probabilities at temperature 2")
    assert seen.chips() == chips and seen.tree() == tree
    third = seen.box.locator(".qftlab-token").nth(2)
    forced = third.inner_text()
    seen.press(third, "Space")
    seen.until(lambda: seen.chips() == [*chips, forced], f"{forced} as the last chip")
    seen.until(lambda: seen.tree() != tree, "another tree")
    assert third.evaluate("button => button === document.activeElement"), "the focus stays on the row"
    seen.press(seen.box.get_by_role("button", name="Undo", exact=True), "Space")
    seen.until(lambda: seen.chips() == chips and seen.tree() == tree, "the text and the tree of before")
    seen.press(seen.box.get_by_role("tab", name="Sample"), "ArrowRight", "Enter")
    seen.press(seen.box.get_by_role("button", name="Run", exact=True), "Space")
    seen.until(lambda: "Beam search" in seen.tree() and seen.chips() != chips, "a searched tree")
    seen.box.locator("input[type=number]:visible").first.fill("0")
    page.keyboard.press("Tab")
    alert = seen.box.get_by_role("alert")
    alert.wait_for(timeout=10_000)
    assert "num_beams must be at least 1, got 0" in alert.inner_text()
    row, tabs = seen.box.locator(".qftlab-token").first, seen.box.get_by_role("tablist")
    assert row.bounding_box()["x"] > tabs.bounding_box()["x"] + 200  # beside them
    page.set_viewport_size({"width": 760, "height": 1100})
    page.wait_for_timeout(500)
    assert seen.box.bounding_box()["width"] < 660
    assert row.bounding_box()["x"] < tabs.bounding_box()["x"] + 20  # under them
    assert row.bounding_box()["y"] > tabs.bounding_box()["y"] + 100


def test_chat_page_from_the_keyboard(page) -> None:
    """Enter sends; the answer is `generate`'s, token by token, each with its likeliest rivals; no width cuts it off."""
    from qftlab import SamplingParams, generate, load_model, load_tokenizer
    from qftlab.files import bundled
    from qftlab.serve.app import serving

    model, tokenizer = load_model(bundled("stages", "sft")), load_tokenizer(bundled("stages", "sft"))
    asked = "def last(xs):\n    return xs.len()\nLine 2 has the wrong name. <b onclick=x>"
    with serving(model, tokenizer, name="sft") as url:
        foreign: list[str] = []
        page.on("request", lambda request: foreign.append(request.url) if url[:-3] not in request.url else None)
        page.goto(url.removesuffix("v1"))
        page.locator("#state", has_text="ready").wait_for(timeout=30_000)
        page.locator("#seed").fill("4")
        page.locator("#temperature").fill("0.5")
        page.locator("#text").fill(asked)
        page.locator("#text").focus()
        page.keyboard.press("Shift+Enter")
        assert page.locator(".turn").count() == 0, "Shift and Enter begin a line"
        page.keyboard.press("Enter")
        page.locator("#send:enabled").wait_for(timeout=30_000)
        question = [{"role": "user", "content": asked}]
        [row] = generate(model, tokenizer, [question], max_new_tokens=64, params=SamplingParams(0.5), seed=4,
                         return_logprobs=True)  # fmt: skip
        tokens = page.locator(".assistant .token")
        assert tokens.all_inner_texts() == [tokenizer.decode([token]) for token in row.token_ids]
        assert page.locator(".user .said").inner_text() == asked and page.locator(".user b").count() == 0
        tokens.first.focus()
        chosen = page.locator("#detail td.chosen").all_inner_texts()
        assert chosen == [tokenizer.decode([row.token_ids[0]]), f"{math.exp(row.logprobs[0]):.3f}"]
        assert page.locator("#detail tr").count() == 9
        page.locator("#special").uncheck()
        page.locator("#max_tokens").fill("3")
        page.locator("#text").fill("and now?")
        page.locator("#text").press("Enter")
        page.locator("#state", has_text="ended at max tokens").wait_for(timeout=30_000)
        said = [*question, {"role": "assistant", "content": row.text}, {"role": "user", "content": "and now?"}]
        [row] = generate(model, tokenizer, [said], max_new_tokens=3, params=SamplingParams(0.5), seed=4)
        shown = page.locator(".assistant").last.locator(".token:visible").all_inner_texts()
        assert shown == [text for text in map(tokenizer.decode, row.token_ids) if not text.startswith("<|")]
        page.locator("#top_p").fill("1.5")
        page.locator("#text").fill("again")
        page.locator("#text").press("Enter")
        page.locator(".error", has_text="top_p must be in (0, 1], got 1.5").wait_for(timeout=30_000)
        for width in (1280, 900):
            page.set_viewport_size({"width": width, "height": 700})
            assert page.locator("html").evaluate("page => page.scrollWidth") == width
            for name in ("send", "stop", "new", "temperature", "seed", "special", "key"):
                box = page.locator(f"#{name}").bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
        bare = page.locator("textarea, input, [role=log]").evaluate_all(
            "found => found.filter(x => !x.labels?.length && !x.ariaLabel).map(x => x.id)"
        )
        assert bare == [] and foreign == []
