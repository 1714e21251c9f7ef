"""Views and widgets: nothing hides, nothing breaks the markup, and the marks are the mask."""

from __future__ import annotations

import ast
import base64
import graphlib
import json
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qftlab_course import views, widgets
from qftlab_course.tokens import cells, column, read_tokens, shorten, token_bytes, visible

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[2]
NASTY = [
    "<script>alert(1)</script>", "</td></tr></table>", "\x00\x07\x1b[31m", "\u202eabc\u2066", "שלום עולם",
    "a\u200b\ufeff", "e" + "\u0301" * 20, "\ud800", "]]>&amp;\"'", "🎉👩\u200d👩\u200d👧\ufe0f", "\u3164\u115f", "␣⏎",
    " " * 40, "",
]  # fmt: skip


class Strict(HTMLParser):
    """Fails on unbalanced tags and collects what a reader sees."""

    VOID = {"img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.tags, self.words, self.images = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(html: str) -> Strict:
    """The page, with balanced tags, known elements only, and each image well-formed XML with words for it."""
    page = Strict()
    page.feed(html)
    page.close()
    assert page.stack == []
    known = "p img details summary table caption thead tbody tr th td bdi br pre"
    assert page.tags <= set(known.split())
    for picture in page.images:
        kind, data = picture["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64" and picture["alt"].strip()
        root = ElementTree.fromstring(base64.b64decode(data))
        assert {node.tag.rpartition("}")[2] for node in root.iter()} <= {"svg", "title", "rect", "path", "g", "text"}
    return page


def svg_words(html: str) -> str:
    """All text drawn in the images of a view."""
    roots = [ElementTree.fromstring(base64.b64decode(image["src"].split(",", 1)[1])) for image in parsed(html).images]
    return "\n".join(node.text or "" for root in roots for node in root.iter() if node.tag.endswith("text"))


def hides_nothing(text: str, allowed: str = "\n") -> bool:
    """No control, format, private, unassigned or surrogate character; the mark that keeps a table in order is ours."""
    return all(char.isprintable() or char in allowed for char in text)


@pytest.fixture(scope="module")
def tiny():
    """The bundled tokenizer."""
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")


def chat(tokenizer, question: str, answer: str) -> SimpleNamespace:
    """A rendered turn by hand: headers and question read, answer and its end trained."""
    head = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    said, tail = tokenizer.encode(answer + "<|im_end|>"), tokenizer.encode("\n")
    return SimpleNamespace(
        input_ids=head + said + tail, loss_mask=[False] * len(head) + [True] * len(said) + [False] * len(tail)
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [(" a", "␣a"), ("\n", "⏎"), ("\t", "⇥"), ("", "∅"), ("\r", "<U+000D>"), ("\u200b", "<U+200B>"),
     ("\ud800", "<U+D800>"), (b"\xe2\x80", "<0xE2><0x80>"), ("é".encode(), "é"), ("\u0301", "<U+0301>"),
     ("e\u0301", "e\u0301"), (" " * 12, "␣×12"), ("␣", "<U+2423>"), ("\xa0", "<U+00A0>"), ("हिन्दी", "हिन्दी"),
     ("\ue000", "<U+E000>"), ("\u3164", "<U+3164>")],
)  # fmt: skip
def test_visible_by_hand(given, shown) -> None:
    assert visible(given) == shown


def test_visible_prose_keeps_lines_and_indentation() -> None:
    assert visible("if x:\n\treturn  1\x00", prose=True) == "if x:\n    return  1<U+0000>"


@given(st.text(max_size=40) | st.binary(max_size=40))
def test_visible_hides_nothing_and_keeps_what_was_visible(text) -> None:
    shown = visible(text)
    assert shown and hides_nothing(shown, "")
    assert hides_nothing(visible(text, prose=True))
    assert cells(shorten(shown, 10)) <= 10
    assert cells(column(shown, 10)) == 10
    if isinstance(text, str) and re.fullmatch("[a-z0-9<>&]+", text):
        assert shown == text


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_token_bytes_joined_are_the_text(tiny, text) -> None:
    """The oracle is the tokenizer's own input: byte-level BPE loses nothing."""
    text = unicodedata.normalize("NFC", text)  # Qwen's normaliser
    assert b"".join(token_bytes(tiny, tiny.encode(text))).decode("utf-8") == text


@pytest.mark.parametrize("text", NASTY)
def test_no_token_text_breaks_a_view(tiny, text) -> None:
    pieces = tiny.encode(text.encode("utf-8", "replace").decode("utf-8"))
    for view in (
        views.token_view(tiny, pieces, title=visible(text)),
        views.token_view(tiny, pieces, [True] * len(pieces), shift=True),
        views.pieces_view(text, [text, text], [(text, 5)]),
        views.side_by_side({text: {text + "a": text, "b": "\n" + text}}),
    ):
        page = parsed(view._repr_html_())
        assert hides_nothing("".join(page.words), "\xa0")
        assert hides_nothing(str(view), "\n\u200e")


@given(st.lists(st.integers(0, 1100), max_size=30), st.booleans(), st.randoms())
def test_every_id_can_be_shown(tiny, ids, shift, random) -> None:
    """Also ids past the tokenizer, which have a row and no token, and halves of characters in any order."""
    mask = [random.random() < 0.5 for _ in ids]
    view = views.token_view(tiny, ids, mask, shift=shift)
    page = parsed(view._repr_html_())
    assert hides_nothing("".join(page.words), "") and hides_nothing(str(view), "\n\u200e")
    marks = svg_words(view._repr_html_()).split("\n")
    assert marks.count("T") >= sum(mask[1:] if shift else mask)
    assert len(str(view).split("\n")) == 3 + len(ids)


def test_tokens_by_hand(tiny) -> None:
    """`<|im_end|>` is trained; the position before the answer predicts it; the end predicts nothing."""
    row = chat(tiny, "2+3?", "5")
    five, end, newline = read_tokens(tiny, row.input_ids, row.loss_mask)[-3:]
    before = read_tokens(tiny, row.input_ids, row.loss_mask)[-4]
    assert (five.text, end.text, newline.text) == ("5", "<|im_end|>", "⏎")
    assert (before.text, before.predicts, before.is_trained, before.is_loss_here) == ("⏎", "5", False, True)
    assert [token.is_trained for token in (five, end, newline)] == [True, True, False]
    assert [token.is_loss_here for token in (five, end, newline)] == [True, False, False]
    assert (end.is_special, five.is_special, newline.predicts) == (True, False, None)


def test_mask_view_text_form(tiny) -> None:
    row = SimpleNamespace(input_ids=tiny.encode("1 2<|im_end|>"), loss_mask=[False, False, True, True])
    ids = [str(number) for number in row.input_ids]
    text = str(views.mask_view(tiny, row, title="demo"))
    assert text.split("\n")[:2] == ["demo", "4 tokens, 2 trained"]
    assert [line.split() for line in text.split("\n")[2:]] == [
        ["position", "id", "token", "trained", "predicts"],
        ["0", ids[0], "1", "·", "␣"], ["1", ids[1], "␣", "·", "2"],
        ["2", ids[2], "2", "T", "<|im_end|>"], ["3", ids[3], "<|im_end|>", "T", "(end)"],
    ]  # fmt: skip
    shifted = str(views.mask_view(tiny, row, shift=True)).split("\n")[3:]
    assert [line.split()[3] for line in shifted] == ["·", "T", "T", "·"]


def test_html_reads_without_colour_and_without_css(tiny) -> None:
    view = views.mask_view(tiny, chat(tiny, "2+3?", "5"))
    html = view._repr_html_()
    assert "style" not in html and "class=" not in html and "<script" not in html
    words = svg_words(html).split("\n")
    assert words.count("T") == 2 and words.count("·") == len(view.rows[0]) - 2
    assert "trained is 5<|im_end|>" in parsed(html).images[0]["alt"]
    dashes = [line for line in re.findall(r"<path[^>]*>", view.svg()) if "dasharray" in line]
    assert len(dashes) == 1, "the untrained are dotted"


def test_chips_wrap_at_900_pixels(tiny) -> None:
    svg = ElementTree.fromstring(views.token_view(tiny, tiny.encode("one two three " * 40)).svg())
    right = [float(x) + float(w) for x, w in re.findall(r"M(\d+) \d+h(\d+)v", ElementTree.tostring(svg).decode())]
    assert svg.attrib["width"] == "900" and max(right) <= 900 - 9 and len(right) > 100


def test_several_rows_are_numbered_and_a_limit_says_what_it_hides(tiny) -> None:
    rows = [chat(tiny, "2+3?", "5"), chat(tiny, "2+4?", "6")]
    text = str(views.mask_view(tiny, rows, limit=5))
    assert "row 1 of 2, 5 tokens, 0 trained, " in text and "more not shown" in text
    assert len(parsed(views.mask_view(tiny, rows)._repr_html_()).images) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda t: views.token_view(t, [1, 2], [True]), "one value for each of the 2 ids, got 1"),
     (lambda t: views.token_view(t, [1, -100]), "got -100 at position 1; labels are not ids"),
     (lambda t: views.token_view(t, [1], limit=0), "limit must be at least 1"),
     (lambda t: views.mask_view(t, [1, 2]), "got int; for bare ids use token_view"),
     (lambda t: views.side_by_side({"p": {"a": ""}, "q": {"b": ""}}), r"columns \['a'\], got \['b'\] for 'q'"),
     (lambda t: views.attention_view("causal"), "'packed right', got 'causal'"),
     (lambda t: views.attention_view("padded", [0]), "at least 1 token, got"),
     (lambda t: views.picture(3, alt="x"), "matplotlib Figure or Axes, got int"),
     (lambda t: widgets.MaskViewer(t, []), "at least one conversation")],
)  # fmt: skip
def test_errors_say_rule_and_value(tiny, call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(tiny)


def test_attention_by_hand() -> None:
    """Documents of 1 and 2 tokens."""
    view = views.attention_view(lengths=(1, 2))
    rows = {kind: [matrix.rows for matrix in matrices] for kind, matrices in view.panels.items()}
    assert rows == {
        "padded": [["■–", "––"], ["■·", "■■"]],
        "packed wrong": [["■··", "×■·", "×■■"]],
        "packed right": [["■··", "·■·", "·■■"]],
    }
    assert list(view.panels["packed right"][0].positions) == [0, 0, 1]
    assert list(view.panels["packed wrong"][0].positions) == [0, 1, 2]
    assert view.count("packed wrong", "×") == 2
    words = svg_words(view._repr_html_()).split("\n")
    assert words.count("×") == 2
    assert "B1  × ■ ■" in str(view)


def test_pieces_go_from_many_to_one(tiny) -> None:
    before = [visible(piece) for piece in token_bytes(tiny, tiny.encode("<|AGENT|>"))]
    view = views.pieces_view("<|AGENT|>", before, [("<|AGENT|>", 1000)])
    assert len(before) > 3
    assert f"before: {len(before)} tokens" in str(view) and "after: 1 token " in str(view)
    assert "1000" in svg_words(view._repr_html_())


def test_side_by_side_keeps_code_and_order() -> None:
    view = views.side_by_side({"fix it": {"base": "", "sft": "def f():\n    return 1 < 2"}})
    assert "&nbsp;&nbsp;&nbsp;&nbsp;return 1 &lt; 2" in view._repr_html_()
    assert str(view) == "fix it\n  base  (nothing)\n  sft   def f():\n            return 1 < 2"


def test_figure_becomes_a_small_png_with_words_and_is_closed() -> None:
    from matplotlib import pyplot
    from PIL import Image

    before = pyplot.get_fignums()
    pictures = []
    for _ in range(2):
        axes = pyplot.subplots(figsize=(6, 4))[1]
        axes.plot([1, 2, 3])
        pictures.append(views.picture(axes, alt="a line that rises"))
    assert pyplot.get_fignums() == before
    assert pictures[0].png == pictures[1].png, "the same figure gives the same file"
    data, metadata = pictures[0]._repr_mimebundle_()
    assert metadata == {"image/png": {"alt": "a line that rises"}}
    assert data["text/plain"] == "[picture: a line that rises]"
    size = Image.open(BytesIO(base64.b64decode(data["image/png"]))).size
    assert 480 < size[0] < 660 and 300 < size[1] < 440 and len(pictures[0].png) < 20_000
    with pytest.raises(ValueError, match="alt must say"):
        views.picture(pyplot.figure(), alt=" ")


def test_show_figure_displays_png_with_alt(monkeypatch) -> None:
    import IPython.display
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    figure, axes = pyplot.subplots(1, 2)
    assert views.show_figure(axes, alt="two empty plots") is None
    assert shown[0].alt == "two empty plots" and not pyplot.fignum_exists(figure.number)


def test_mask_viewer_state_and_controls(tiny) -> None:
    rows = [chat(tiny, "2+3?", "5"), chat(tiny, "hi", "hello")]
    viewer = widgets.MaskViewer(tiny, rows, names=["sum", "<b>greeting</b>"])
    first = viewer.output.value
    assert first == viewer.view._repr_html_() and "5&lt;|im_end|&gt;" in first
    viewer.selector.value = 1
    assert "<b>" not in viewer.output.value and viewer.view.title == "<b>greeting</b>"
    assert viewer.view.shift is False
    viewer.toggle.value = True
    assert viewer.view.shift is True and "→" in svg_words(viewer.output.value)
    viewer.selector.value, viewer.toggle.value = 0, False
    assert viewer.output.value == first
    viewer.previous.click()
    assert viewer.selector.value == 1
    viewer.following.click()
    assert viewer.selector.value == 0 and viewer.output.value == first
    kinds = {type(child).__name__ for child in (viewer.selector, viewer.toggle, viewer.output)}
    assert kinds == {"Dropdown", "Checkbox", "HTML"}


def test_mask_viewer_bundle_has_a_static_stand_in_and_short_text(tiny) -> None:
    viewer = widgets.MaskViewer(tiny, [chat(tiny, "2+3?", "5")])
    bundle = viewer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == viewer.box.model_id
    assert bundle["text/plain"] == str(viewer.view) and "base64" not in bundle["text/plain"]
    parsed(bundle["text/html"])


def test_mask_viewer_renders_messages(tiny) -> None:
    pytest.importorskip("qftlab.rows.chat")
    viewer = widgets.MaskViewer(tiny, [[{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]])
    assert viewer.selector.options[0][0] == "1: 2+3?"
    expected = chat(tiny, "2+3?", "5")
    assert [token.id for token in viewer.view.rows[0]] == expected.input_ids
    assert [token.is_trained for token in viewer.view.rows[0]] == expected.loss_mask


def test_without_ipywidgets_the_message_says_what_to_do(tiny, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"pip install 'qftlab\[lab\]'.*mask_view"):
        widgets.MaskViewer(tiny, [chat(tiny, "2+3?", "5")])


@pytest.mark.long
def test_importing_views_imports_no_widgets_and_no_pyplot() -> None:
    code = "import sys, qftlab_course.widgets; print({'ipywidgets', 'matplotlib.pyplot'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-0.5b-instruct", "qwen3-0.6b"])
def test_real_tokenizers_and_naughty_strings(real_data, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_data / name)
    strings = json.loads((real_data / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
    assert len(strings) == 515
    for text in strings:
        ids = tokenizer.encode(text)
        row = SimpleNamespace(input_ids=ids, loss_mask=[place % 2 == 0 for place in range(len(ids))])
        view = views.mask_view(tokenizer, row, shift=bool(len(text) % 2), limit=10_000)
        page = parsed(view._repr_html_())
        assert hides_nothing("".join(page.words), "") and hides_nothing(str(view), "\n\u200e")
        joined = b"".join(token_bytes(tokenizer, ids)).decode("utf-8")
        assert joined == unicodedata.normalize("NFC", text)
    parsed(views.side_by_side({text or "empty": {"a": text} for text in strings})._repr_html_())


def test_sentencepiece_bytes(real_data) -> None:
    """The 260k Llama: `▁` is a space and `<0x0A>` a byte."""
    folder = real_data / "tinylm"
    found = sorted(folder.rglob("tokenizer_config.json")) + sorted(folder.rglob("tokenizer.json"))
    if not found:
        pytest.skip("no tokenizer that transformers can load in tinylm")
    tokenizer = AutoTokenizer.from_pretrained(found[0].parent)
    ids = tokenizer.encode("Once upon a time\n\x07", add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, ids)).decode("utf-8").lstrip() == "Once upon a time\n\x07"


def test_an_added_token_is_its_own_text_and_not_byte_level() -> None:
    """`é` is also how byte-level BPE writes the byte 0xE9; in an added token it is the letter."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    tokenizer.add_tokens(["é é"])
    ids = [tokenizer.convert_tokens_to_ids("é é")]
    assert token_bytes(tokenizer, ids) == ["é é".encode()]
    assert [(token.text, token.is_special) for token in read_tokens(tokenizer, ids)] == [("é␣é", True)]


def test_no_module_of_the_library_imports_in_a_circle() -> None:
    """Imports inside functions count as well: they hide a circle and do not break it."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "qftlab").rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    needs = {}
    for name, path in modules.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                longer = [f"{node.module}.{alias.name}" for alias in node.names]
                named |= {name if name in modules else node.module for name in longer}
        needs[name] = named & set(modules)
    list(graphlib.TopologicalSorter(needs).static_order())  # names the circle where there is one
