"""The decoding lab: sliders, the next token's distribution, and the text as it grows, in a notebook.

Only core ipywidgets (7.7 and 8), used from the keyboard: Tab moves, space presses, arrows move a slider. It writes
nothing but `HTML.value`. The tree is an <img> in an HTML widget and no anywidget: it needs no script, so it is the same
in JupyterLab, Colab and a saved page; what one can press are buttons. All that it does is `DecodingState`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape

from qftlab_course.decoding import DistributionView, candidate_svg, candidate_words, decoding_tree, distribution_view
from qftlab_course.decoding_state import PRESETS, DecodingState
from qftlab_course.drawing import BLUE, image
from qftlab_course.tokens import shorten
from qftlab_course.trace import Candidate

ROWS, CHIPS, TREE_STEPS = 12, 48, 12
REFRESH_SECONDS = 0.25  # of wall time between two pictures of a running text
# name, label, lowest and highest of the slider, its step (a whole number where the setting is one)
SAMPLE_SLIDERS = (
    ("temperature", "temperature", 0.0, 2.0, 0.05),
    ("top_k", "top-k", 0, 50, 1),
    ("top_p", "top-p", 0.05, 1.0, 0.05),
    ("min_p", "min-p", 0.0, 0.5, 0.01),
    ("repetition_penalty", "repetition", 1.0, 2.0, 0.05),
)
BEAM_SLIDERS = (("num_beams", "beams", 1, 8, 1), ("length_penalty", "len. penalty", -1.0, 2.0, 0.25))
LENGTH_SLIDER = ("max_new_tokens", "new tokens", 1, 128, 1)
STYLE = f"""<style>
.qftlab-decoding {{ max-width: 900px; }}
.qftlab-decoding .qftlab-token, .qftlab-decoding .qftlab-chip {{ font-family: "DejaVu Sans Mono", Menlo, Consolas,
  monospace; font-size: 14px; border: 1px solid #555; }}
.qftlab-decoding .qftlab-token {{ text-align: left; line-height: 24px; }}
.qftlab-decoding .qftlab-chip {{ line-height: 24px; }}
.qftlab-decoding .qftlab-bars img {{ display: block; }}
.qftlab-decoding button:focus, .qftlab-decoding .noUi-handle:focus {{ outline: 3px solid {BLUE};
  outline-offset: -3px; }}
.qftlab-decoding .qftlab-tree {{ overflow-x: auto; }}
.qftlab-decoding .qftlab-tree img {{ max-width: none; }}
</style>"""


class DecodingLab:
    """A text written token by token: drawn, searched with beams, or forced by hand, with every choice in view.

    Attributes:
        state: what it shows and does, without widgets.
        prompt: the text box of the prompt; presets: the buttons of the presets.
        buttons: Step, Run, Undo and Reset, by name.
        settings: name of a setting to its (slider, number box).
        seed, stopping: the seed's box, and the choice of early stopping.
        tabs: Sample and Beam.
        rows: twelve (button that forces the token, HTML of its bars).
        message, summary, tree: HTML widgets.
        chips: the box of the text's tokens; pressing one goes back to it.
        box: all of them.
    """

    def __init__(self, model, tokenizer, prompt: str = "12 + 7 =", *, preset: str = "plain", chat: bool = False,
                 seed: int = 0, max_new_tokens: int = 64) -> None:  # fmt: skip
        """Reads the prompt and shows what may come next; the arguments are those of `DecodingState`.

        Raises:
            ImportError: if ipywidgets is missing.
            ValueError: as `DecodingState`.
        """
        self._widgets = require_ipywidgets("DecodingLab", "qftlab_course.views.decoding_tree")
        self.state = DecodingState(model, tokenizer, prompt, preset=preset, chat=chat, seed=seed,
                                   max_new_tokens=max_new_tokens)  # fmt: skip
        self._is_writing = False  # while the lab itself sets its controls
        self._written: dict = {}  # slider: where the lab set it
        self._shown: list[Candidate] = []
        self._pool: list = []  # buttons of the chips
        self._first_chip = 0  # tokens kept by pressing the first one
        self._build_top()
        self._build_settings()
        self._build_text()
        self._lay_out()
        self.refresh()

    def _build_top(self) -> None:
        w = self._widgets
        self.message = w.HTML(layout={"min_height": "20px"})
        lines = min(6, self.state.prompt.count("\n") + 1)  # a one-line box would lose line breaks
        self.prompt = w.Textarea(value=self.state.prompt, description="Prompt", continuous_update=False, rows=lines,
                                 style={"description_width": "60px"}, layout={"width": "auto"})  # fmt: skip
        self.prompt.observe(lambda change: self._do(lambda: self.state.set_prompt(change["new"])), names="value")
        self.presets = w.ToggleButtons(options=list(PRESETS), value=self.state.preset, style={"button_width": "auto"},
                                       layout={"width": "auto"})  # fmt: skip
        self.presets.observe(self._on_preset, names="value")
        actions = {"Step": self.state.step, "Run": self.state.run, "Undo": self.state.undo, "Reset": self.state.reset}
        layout = w.Layout(width="68px")
        self.buttons = {name: w.Button(description=name, layout=layout) for name in actions}
        self.buttons["Step"].button_style = "primary"
        for name, action in actions.items():
            self.buttons[name].on_click(lambda _, action=action: self._do(action))

    def _build_settings(self) -> None:
        w, state = self._widgets, self.state
        self.settings: dict[str, tuple] = {}
        for spec in SAMPLE_SLIDERS:
            self._add_setting(*spec, lambda name, value: state.set_params(**{name: value}))
        for spec in BEAM_SLIDERS:
            self._add_setting(*spec, lambda name, value: state.set_beams(**{name: value}))
        self._add_setting(*LENGTH_SLIDER, lambda name, value: state.set_length(value))
        self.seed = w.IntText(description="seed", layout={"width": "170px"}, style={"description_width": "84px"})
        self.seed.observe(lambda change: self._do(lambda: setattr(state, "seed", change["new"])), names="value")
        self.stopping = w.ToggleButtons(options=[("False", False), ("True", True), ("never", "never")], value=False,
                                        style={"button_width": "66px"}, layout={"width": "auto"})  # fmt: skip
        self.stopping.observe(lambda change: self._do(lambda: state.set_beams(early_stopping=change["new"])),
                              names="value")  # fmt: skip
        length = w.HBox(self.settings["max_new_tokens"])
        sample = [w.HBox(self.settings[name]) for name, *_ in SAMPLE_SLIDERS]
        beam = [w.HBox(self.settings[name]) for name, *_ in BEAM_SLIDERS]
        self.tabs = w.Tab(children=[w.VBox([*sample, length, self.seed]),
                                    w.VBox([*beam, length, w.Label("early stopping"), self.stopping])])  # fmt: skip
        for place, title in enumerate(("Sample", "Beam")):
            self.tabs.set_title(place, title)
        self.tabs.selected_index = 0
        self.tabs.observe(self._on_tab, names="selected_index")

    def _add_setting(self, name: str, label: str, low, high, step, change: Callable) -> None:
        """A slider and a number box of one setting; the box takes values beyond the slider's ends."""
        w, is_whole = self._widgets, isinstance(step, int)
        slider = (w.IntSlider if is_whole else w.FloatSlider)(
            min=low, max=high, step=step, value=low, readout=False, description=label,
            style={"description_width": "84px"}, layout={"width": "178px"},
        )  # fmt: skip
        number = (w.IntText if is_whole else w.FloatText)(step=step, layout={"width": "58px"})
        number.observe(lambda event: self._do(lambda: change(name, event["new"])), names="value")
        slider.observe(lambda event: self._on_slider(slider, event["new"], lambda value: change(name, value)),
                       names="value")  # fmt: skip
        self.settings[name] = slider, number

    def _build_text(self) -> None:
        w = self._widgets
        self.summary, self.tree = w.HTML(), w.HTML()
        self.tree.add_class("qftlab-tree")
        self.chips = w.HBox([], layout={"flex_flow": "row wrap"})
        layout = w.Layout(width="124px", height="26px", margin="1px 8px 1px 0", flex="0 0 auto")
        self.rows = [(w.Button(layout=layout), w.HTML(layout={"height": "26px", "margin": "1px 0"}))
                     for _ in range(ROWS)]  # fmt: skip
        for place, (button, bars) in enumerate(self.rows):
            button.add_class("qftlab-token")
            bars.add_class("qftlab-bars")
            button.on_click(lambda _, place=place: self._do(lambda: self._force(place)))
        self._chip_layout = w.Layout(width="auto", height="26px", margin="2px")

    def _lay_out(self) -> None:
        w = self._widgets
        wrap = {"flex_flow": "row wrap", "align_items": "center", "justify_content": "space-between"}
        top = w.HBox([self.presets, w.HBox(list(self.buttons.values()))], layout=wrap)
        right = w.VBox([w.HBox(row, layout={"align_items": "center"}) for row in self.rows],
                       layout={"flex": "20 1 536px", "min_width": "0"})  # fmt: skip
        left = w.VBox([self.tabs], layout={"flex": "1 1 276px", "min_width": "270px", "margin": "0 12px 8px 0"})
        middle = w.HBox([left, right], layout={"flex_flow": "row wrap"})
        self.box = w.VBox([w.HTML(STYLE, layout={"display": "none"}), self.prompt, top, self.message, middle,
                           self.summary, self.chips, self.tree])  # fmt: skip
        self.box.add_class("qftlab-decoding")

    def _on_slider(self, slider, value, change: Callable) -> None:
        # A browser answers with 0.9000000000000001 where 0.9 was set; what the box says must not move by that.
        value = value if isinstance(value, int) else round(value, 6)
        if value != self._written.get(slider):
            self._written[slider] = value
            self._do(lambda: change(value))

    def _on_preset(self, change) -> None:
        if change["new"] is not None:
            self._do(lambda: self.state.choose_preset(change["new"]))

    def _on_tab(self, change) -> None:
        if change["new"] is not None:
            self._do(lambda: self.state.set_mode(("sample", "beam")[change["new"]]))

    def _force(self, place: int) -> None:
        self.state.force(self._shown[place].token if place < len(self._shown) else -1)

    def _do(self, action: Callable) -> None:
        """Runs what a control asks for. What goes wrong is said; the text and the other settings stay."""
        if self._is_writing:
            return
        try:
            running, last = action(), time.monotonic()
            for _ in running or ():
                if time.monotonic() - last > REFRESH_SECONDS:
                    self.refresh()
                    last = time.monotonic()
        except Exception as error:  # a widget's exception would end unseen in the log of the server
            self._show_text()
            self._say(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
        else:
            self.refresh()

    def refresh(self) -> None:
        """Shows the state; called after each change made by the controls."""
        self._say("")
        self._show_settings()
        self._show_text()

    def _say(self, message: str) -> None:
        self.message.value = f'<b role="alert">⚠ {escape(message)}</b>' if message else ""

    def _show_settings(self) -> None:
        state = self.state
        values = {**vars(state.params), **vars(state.beams), "max_new_tokens": state.max_new_tokens}
        self._is_writing = True
        try:
            for name, (slider, number) in self.settings.items():
                number.value = values[name]
                nearest = slider.min + slider.step * round((values[name] - slider.min) / slider.step)
                self._written[slider] = slider.value = round(min(slider.max, max(slider.min, nearest)), 6)
            self.stopping.value, self.seed.value = state.beams.early_stopping, state.seed
            self.presets.value, self.prompt.value = state.preset, state.prompt
            self.tabs.selected_index = int(state.mode == "beam")
        finally:
            self._is_writing = False

    def _show_text(self) -> None:
        try:
            view = self.view()
        except ValueError as error:  # NaN logits
            self._shown, view = [], None
            self._say(str(error))
        self._shown = list(view.distribution.candidates) if view else []
        for place, (button, bars) in enumerate(self.rows):
            row = self._shown[place] if place < len(self._shown) else None
            with button.hold_sync():
                button.description = shorten(row.text, 13) if row else "–"  # a button ignores an empty one
                button.tooltip = f"force {row.text}: {candidate_words(row)}" if row else "nothing to force"
            bars.value = image(candidate_svg(row), candidate_words(row)) if row else ""
        self.summary.value = view.summary if view else "Nothing comes next. Undo, a chip or Reset goes back."
        self._show_chips()
        self.tree.value = self.tree_view()._repr_html_()

    def _show_chips(self) -> None:
        texts = ["prompt", *self.state.texts()]
        forced = {place for place, step in enumerate(self.state.steps, start=1) if step.is_forced}
        first = max(0, len(texts) - CHIPS)
        while len(self._pool) < min(CHIPS, len(texts)):
            self._pool.append(self._chip(len(self._pool)))
        for place, chip in zip(range(first, len(texts)), self._pool, strict=False):
            with chip.hold_sync():
                chip.description = shorten(texts[place], 20)
                chip.icon = "bolt" if place in forced else ""
                chip.tooltip = "go back to here" + (" (forced by hand)" if place in forced else "")
        self._first_chip = first
        self.chips.children = self._pool[: len(texts) - first]

    def _chip(self, place: int):
        chip = self._widgets.Button(layout=self._chip_layout)
        chip.add_class("qftlab-chip")
        chip.on_click(lambda _: self._do(lambda: self.state.rewind(self._first_chip + place)))
        return chip

    def view(self) -> DistributionView | None:
        """What may come next, to print or to draw; None where the text has ended."""
        seen = self.state.distribution()
        shown = (" → " if self.state.chat else "").join([self.state.prompt, "".join(self.state.texts())])
        return None if seen is None else distribution_view(seen, title=f"After: {shown}")

    def tree_view(self):
        """The tree of what was done, the last twelve steps of it."""
        return decoding_tree(self.state.trace(), limit=TREE_STEPS)

    def static(self) -> None:
        """Displays a PNG and a text table of what is shown, for pages without a kernel: GitHub, and paper."""
        from IPython.display import display

        view = self.view()
        if view is not None:
            display(view.picture())
            display(view)
        if self.state.token_ids:
            display(self.tree_view())

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        # Not the box's own bundle: its text form would repeat every drawing, and it has no static stand-in.
        live = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        drawn = f"<pre>{escape(str(self.view() or ''))}</pre>{self.tree_view()._repr_html_()}"
        return {"application/vnd.jupyter.widget-view+json": live, "text/html": drawn, "text/plain": str(self)}

    def __repr__(self) -> str:
        return f"{self.view() or 'The text has ended.'}\n\n{self.tree_view()}"


def require_ipywidgets(who: str, instead: str):
    """The ipywidgets module.

    Args:
        who: what needs it.
        instead: what shows the same without it.

    Raises:
        ImportError: if it is missing, saying how to get it and what to use instead.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            f"{who} needs ipywidgets, which is not installed: run `pip install 'qftlab[lab]'`, or use {instead}, "
            "which shows the same without it"
        ) from error
    return ipywidgets
