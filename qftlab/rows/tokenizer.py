"""Tokenizers: loading them, and adding tokens without losing any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qftlab.files import resolve
from qftlab.rows.chat import knows_thinking

NEW_TOKENS = ("<|AGENT|>", "<|EDIT|>")
DEFAULT = "{%%- if enable_thinking is not defined %%}{%%- set enable_thinking = %s %%}{%%- endif %%}"


@dataclass(frozen=True)
class TokenChange:
    """One added token: its id, the ids it was spelled with before, and whether it is new to this tokenizer."""

    text: str
    id: int
    pieces_before: tuple[int, ...]
    is_new: bool


@dataclass(frozen=True)
class ExtensionReport:
    """What `extend_tokenizer` changed; lengths count added tokens too."""

    tokens: tuple[TokenChange, ...]
    len_before: int
    len_after: int

    @property
    def new(self) -> tuple[TokenChange, ...]:
        """The tokens that were not there before."""
        return tuple(t for t in self.tokens if t.is_new)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer: "tiny", a local folder (a GGUF file's own, where there is no other), or a hub name.

    Raises:
        FileNotFoundError: if there is no such folder, it holds no tokenizer, or the hub does not give it.
        ValueError: if it is damaged, or asks for code of its own.
    """
    source = resolve(name_or_path)
    path, options = Path(source), {}
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        if not (ggufs := sorted(path.glob("*.gguf"))):
            raise FileNotFoundError(f"{path} has neither tokenizer.json nor vocab.json: is it the model's folder?")
        options = {"gguf_file": ggufs[0].name}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # of any kind: tokenizers raises Exception itself
        raise not_loadable(source, error) from error


def not_loadable(source: str, error: Exception) -> OSError | ValueError:
    """What to raise when transformers could not load `source`: its reason in one sentence, and the way out."""
    reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
    if isinstance(error, LookupError | TypeError | AttributeError):
        reason = f"{type(error).__name__}, {reason}"
    if "trust_remote_code" in str(error):
        reason = "it asks for code of its own (auto_map), and no model's code is run here"
    kind = FileNotFoundError if isinstance(error, OSError | SafetensorError) else ValueError
    if kind is ValueError or Path(source).is_dir():
        return kind(f"{source} cannot be loaded: {reason}; save or copy the model there anew, or give another")
    return kind(
        f'{source} is no folder here, and the hub did not give it: {reason}; give "tiny", the folder of a saved model, '
        "or check the name and the connection"
    )


def set_thinking_(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> None:
    """Has the chat template ask with thinking on or off where nobody says which; saved with it, so every tool asks so.

    None leaves the template as it is.

    Raises:
        ValueError: for a template that cannot be asked for it.
    """
    if thinking is None:
        return
    if not knows_thinking(tokenizer):
        raise ValueError("thinking must be left at auto: this model's chat template has no enable_thinking to be set")
    ours = "|".join(re.escape(DEFAULT % word) for word in ("true", "false"))
    tokenizer.chat_template = DEFAULT % str(thinking).lower() + re.sub(f"^({ours})", "", tokenizer.chat_template)


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str] = NEW_TOKENS) -> ExtensionReport:
    """Adds special tokens in place; existing extra tokens stay, and a second call changes nothing.

    Args:
        tokenizer: changed in place.
        tokens: their texts, without white space.

    Returns:
        For each token its id, the pieces it was spelled with, and whether it is new.

    Raises:
        ValueError: for an empty text, one with white space, or one given twice.
    """
    for text in tokens:
        if not text or any(c.isspace() for c in text):
            raise ValueError(f"tokens must be non-empty and without white space, got {text!r}")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"tokens must differ from each other, got {list(tokens)}")
    known, before = tokenizer.get_vocab(), len(tokenizer)
    pieces = {text: tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in tokens}
    missing = [text for text in tokens if text not in known]
    if missing:
        # By default transformers 5 replaces the extra tokens that are there.
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    changes = [TokenChange(t, tokenizer.convert_tokens_to_ids(t), pieces[t], t in missing) for t in tokens]
    return ExtensionReport(tuple(changes), before, len(tokenizer))
