"""Widgets: core ipywidgets only (7.7 and 8), used from the keyboard, writing nothing but `HTML.value`."""

from __future__ import annotations

from collections.abc import Sequence

from qftlab_course.decoding_lab import DecodingLab as DecodingLab
from qftlab_course.decoding_lab import require_ipywidgets
from qftlab_course.views import TokenView, mask_view


class MaskViewer:
    """Conversations token by token: which tokens are trained, and what each position predicts.

    Tab moves between the controls, space presses them. (The buttons stand beside the selector because JupyterLab keeps
    the arrow keys of a selector for itself.)
    Where there is no kernel (GitHub, a printed page) the static view of the first state stands in its place.

    Attributes:
        selector: the conversation chosen (an ipywidgets Dropdown; its value is the index).
        previous, following: buttons to the conversation before and after, going round.
        toggle: whether the marks sit under the predicting position (a Checkbox).
        output: where the view is written (an HTML widget).
        box: all of them.
    """

    def __init__(self, tokenizer, conversations: Sequence, *, names: Sequence[str] | None = None, limit: int = 200):
        """Renders each conversation once.

        Args:
            tokenizer: a transformers tokenizer.
            conversations: each a list of messages (rendered by `render_chat`, all assistant turns trained) or what
                `render_chat` returned.
            names: what the selector calls them; by default the number and how the first user turn begins.
            limit: tokens shown of a row.

        Raises:
            ImportError: if ipywidgets is missing.
            ValueError: if there is no conversation, or names and conversations differ in number.
        """
        widgets = require_ipywidgets("MaskViewer", "qftlab_course.views.mask_view")
        if not conversations:
            raise ValueError("conversations must hold at least one conversation, got none")
        names = _names(conversations) if names is None else [str(name) for name in names]
        if len(names) != len(conversations):
            raise ValueError(f"names must be as many as the {len(conversations)} conversations, got {len(names)}")
        self._tokenizer, self._limit = tokenizer, limit
        self._rendered = [_rendered(tokenizer, conversation) for conversation in conversations]
        self._names = names
        options = [(name, index) for index, name in enumerate(names)]
        self.selector = widgets.Dropdown(options=options, value=0, description="Conversation",
                                         style={"description_width": "initial"}, layout={"width": "420px"})  # fmt: skip
        self.toggle = widgets.Checkbox(value=False, indent=False,
                                       description="Shift: show what each position predicts")  # fmt: skip
        self.output = widgets.HTML(value=self.view._repr_html_())
        self.previous = widgets.Button(description="Previous", layout={"width": "90px"})
        self.following = widgets.Button(description="Next", layout={"width": "90px"})
        self.previous.on_click(lambda _: self._move(-1))
        self.following.on_click(lambda _: self._move(1))
        row = [self.selector, self.previous, self.following, self.toggle]
        controls = widgets.HBox(row, layout={"align_items": "center", "flex_flow": "row wrap"})
        self.box = widgets.VBox([controls, self.output])
        for control in (self.selector, self.toggle):
            control.observe(self._refresh, names="value")

    @property
    def view(self) -> TokenView:
        """What is shown now; `print(viewer.view)` is its text form."""
        index = self.selector.value
        return mask_view(self._tokenizer, self._rendered[index], title=self._names[index],
                         shift=self.toggle.value, limit=self._limit)  # fmt: skip

    def _move(self, by: int) -> None:
        self.selector.value = (self.selector.value + by) % len(self._names)

    def _refresh(self, change=None) -> None:
        self.output.value = self.view._repr_html_()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        # Not the box's own bundle: its text form would repeat the whole drawing, and it has no static stand-in.
        view = self.view
        live = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        drawn = {"text/html": view._repr_html_(), "text/plain": str(view)}
        return {"application/vnd.jupyter.widget-view+json": live, **drawn}

    def __repr__(self) -> str:
        return str(self.view)


def _rendered(tokenizer, conversation):
    """A conversation as rendered rows; messages go through `render_chat`."""
    first = conversation[0] if isinstance(conversation, Sequence) and conversation else conversation
    if hasattr(first, "input_ids"):
        return conversation
    from qftlab.rows.chat import render_chat

    return render_chat(tokenizer, conversation)


def _names(conversations: Sequence) -> list[str]:
    """`1: What is 12 + 7?` for messages, `conversation 1` for rows that are already rendered."""
    names = []
    for number, conversation in enumerate(conversations, start=1):
        turns = [turn for turn in conversation if isinstance(turn, dict)] if isinstance(conversation, Sequence) else []
        asked = next((str(turn["content"]) for turn in turns if turn.get("role") == "user"), "")
        words = " ".join(asked.split())
        shown = words if len(words) <= 48 else words[:47] + "…"
        names.append(f"{number}: {shown}" if shown else f"conversation {number}")
    return names
