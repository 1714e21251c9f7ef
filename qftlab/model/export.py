"""Export: adapters merged, the result read back from disk and checked, then put where transformers and vLLM load it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qftlab.files import aside
from qftlab.model.loading import END_OF_TURN, load_model, save_model
from qftlab.model.lora import is_adapted, merge_adapters, row_layers, trained_token_ids

log = logging.getLogger(__name__)
# Merging adds B A to W before the product with x instead of after it: honest logits differ by rounding alone. How much
# that is depends on depth, width and weights, so it is measured: the matrices of the model read back are nudged by one
# unit in the last place, three times over, and the largest move of a logit is the unit. Measured on 22 honest merges (2
# to 48 layers, three families, three dtypes, adapters pushed far): 0.5 to 1.7 units. A ceiling keeps half precision,
# where a nudge is coarse, from hiding a wrong merge.
UNITS, NUDGES = 4, 3
CEILINGS = {torch.float32: 2**-10, torch.float16: 2**-7, torch.bfloat16: 2**-4}
PROBES = ("47 + 38 =", "def add(a, b):\n    return", "The sum of the first 100 natural numbers is")
NEW_TOKENS = 16


class ExportError(ValueError):
    """An exported model that does not do what the model in memory does; nothing is left at its folder."""


@dataclass(frozen=True)
class Card:
    """What the README of an exported model says besides what was checked.

    Args:
        base: the model it was made from.
        recipe: settings worth knowing, such as {"rank": 16, "learning rate": 1e-4}.
        data: files or data sets it was trained on, in words.
        metrics: what was measured, such as {"AGENT/EDIT mode": "100 % of 300"}; left out where none is given.
    """

    base: str = ""
    recipe: Mapping[str, object] = field(default_factory=dict)
    data: Sequence[str] = ()
    metrics: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport:
    """What was checked of the folder at `path`, on `positions` greedy tokens.

    `largest_difference` is of a logit, as a share of the largest one; `tolerance` is what was allowed: `UNITS` times
    what one more rounding of all weights does in this model, and at most the ceiling of its dtype.
    """

    path: Path
    positions: int
    largest_difference: float
    tolerance: float
    rows: int
    is_tied: bool


def export_model(
    model,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    card: Card | None = None,
    prompts: Sequence[str] = PROBES,
    in_place: bool = False,
) -> ExportReport:
    """Writes a model as one folder of plain weights that transformers and vLLM load, after checking what it wrote.

    Checked on the model as read back from disk: every token that the model in memory writes greedily after the prompts
    (in half precision, near ties aside), logits as near as rounding allows in this model, embedding rows that no
    adapter trains unchanged, a tied head still tied.

    Args:
        model: plain, or with adapters, which are merged.
        tokenizer: its tokenizer, saved beside the weights with its chat template.
        folder: must not exist, or be empty.
        card: facts for the README.
        prompts: texts to check on, special tokens written out; those whose rows were trained are added.
        in_place: merges into the weights of `model`, which must not be used afterwards; saves a copy of them.

    Returns:
        What was checked. The folder is written aside and renamed, so what is there is whole and checked.

    Raises:
        FileExistsError: if the folder holds something.
        ValueError: for quantised weights, fewer rows than the tokenizer has tokens, or a tie the config denies.
        ExportError: if a check fails.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be new or empty to export to: choose another, or remove it first")
    if getattr(model, "is_quantized", False):
        raise ValueError("weights must be whole to export, got quantised ones: load_model(…) without quant")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"rows must cover all {len(tokenizer)} tokens, got {rows}: call extend_model first")
    new, layers = trained_token_ids(model), row_layers(model)
    if (is_tied := len(layers) == 1) != bool(model.config.tie_word_embeddings):
        raise ValueError(
            f"config must say what the weights are, got tie_word_embeddings={not is_tied} and {len(layers)} matrices: "
            "vLLM would load another model (modules_to_save unties the head, add_adapters(token_ids=…) does not)"
        )
    texts = [*prompts, *(f"{prompts[0]}{token}" for token in tokenizer.convert_ids_to_tokens(new))]
    wanted = [_greedy(model, tokenizer, text) for text in texts]
    kept = [layer.weight.detach().to("cpu", copy=True) for layer in layers]
    device = layers[0].weight.device
    plain = merge_adapters(model, in_place=in_place) if is_adapted(model) else model
    with aside(folder) as place:
        _write(plain, tokenizer, place)
        del plain  # the copy read back needs its room
        again = load_model(place, dtype="auto", device=str(device))
        positions, largest, tolerance = _checked_(again, wanted, kept, new)
        report = ExportReport(folder, positions, largest, tolerance, rows, is_tied)
        (place / "README.md").write_text(card_text(folder.name, card or Card(), report, tokenizer), encoding="utf-8")
    log.info("exported to %s, %d greedy tokens checked", folder, report.positions)
    return report


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What `save_model` writes, in a folder that whoever may read it may enter."""
    save_model(model, tokenizer, folder)
    rights = (folder / "config.json").stat().st_mode & 0o777
    folder.chmod(rights | (rights & 0o444) >> 2)  # a temporary folder is the owner's alone


@dataclass(frozen=True)
class _Probe:
    """A prompt, what the model in memory wrote after it greedily, and its logits at those tokens (n, V) in fp32."""

    text: str
    ids: list[int]
    prompt_length: int
    vocab_limit: int
    logits: Tensor


@torch.no_grad()
def _greedy(model, tokenizer: PreTrainedTokenizerBase, text: str) -> _Probe:
    """Greedy tokens without a cache: slow, obvious, and the same arithmetic as the pass they are compared with."""
    ids, limit = tokenizer(text, add_special_tokens=False).input_ids, len(tokenizer)
    start = len(ids)
    if not start:
        raise ValueError("prompts must have at least one token each, got an empty one")
    for _ in range(NEW_TOKENS):
        ids.append(int(_logits(model, ids, 1)[0, :limit].argmax()))
    return _Probe(text, ids, start, limit, _logits(model, ids, NEW_TOKENS + 1)[:-1])


@torch.no_grad()
def _logits(model, ids: list[int], last: int) -> Tensor:
    is_training, device = model.training, next(model.parameters()).device
    try:
        output = model.eval()(input_ids=torch.tensor([ids], device=device), logits_to_keep=last)
        return output.logits[0].float().cpu()  # (last, V)
    finally:
        model.train(is_training)


def _checked_(model, wanted: list[_Probe], kept: list[Tensor], new: list[int]) -> tuple[int, float, float]:
    """Greedy tokens compared, the largest difference of a logit as a share of the largest logit, and what was allowed.

    `model` is nudged, and of no use afterwards.

    Raises:
        ExportError: for the first check that fails.
    """
    layers = row_layers(model)
    if len(layers) != len(kept):
        raise ExportError(f"head and embedding must stay {len(kept)} matrices, got {len(layers)} as read back")
    for layer, before in zip(layers, kept, strict=True):
        _unchanged_rows(before, layer.weight.detach().cpu(), new)
    is_exact = kept[0].dtype == torch.float32
    read_back = _all_logits(model, wanted)
    apart, unit = _apart(read_back, [probe.logits for probe in wanted]), _unit_(model, wanted, read_back)
    tolerance = min(CEILINGS[kept[0].dtype], UNITS * unit)
    if not apart <= tolerance:  # nan is refused as well
        advice = "" if is_exact else "export from float32 weights, or "
        raise ExportError(
            f"logits must agree within {tolerance:.1e} of the largest, what rounding explains, got {apart:.1e}: "
            f"{advice}look for trained layers that merging does not reach"
        )
    for probe, got in zip(wanted, read_back, strict=True):
        # Half precision may swap two tokens that the tolerance cannot tell apart; fp32 has no such excuse.
        if is_exact and (at := _first_other(got, probe)) is not None:
            raise ExportError(f"greedy tokens must be equal, got another one {at} tokens after {probe.text!r}")
    return sum(map(len, read_back)), apart, tolerance


def _all_logits(model, wanted: list[_Probe]) -> list[Tensor]:
    """The model's own logits at the tokens of each probe."""
    return [_logits(model, probe.ids, NEW_TOKENS + 1)[:-1] for probe in wanted]


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of a logit, as a share of the largest of its probe; nan where one is no number."""
    shares = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(shares).max().item()


@torch.no_grad()
def _unit_(model, wanted: list[_Probe], read_back: list[Tensor]) -> float:
    """How far, as `_apart` says it, logits move when every matrix is rounded once more: a unit up or down at random."""
    matrices, moved = [p for p in model.parameters() if p.ndim > 1], []
    generator = torch.Generator(matrices[0].device).manual_seed(0)
    for _ in range(NUDGES):
        for p in matrices:
            signs = torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            p.mul_(1 + torch.finfo(p.dtype).eps * signs)
        moved.append(_apart(_all_logits(model, wanted), read_back))
    return max(moved)


def _unchanged_rows(before: Tensor, after: Tensor, new: list[int]) -> None:
    if after.shape != before.shape:
        raise ExportError(f"rows must stay {before.shape[0]}, got {after.shape[0]} as read back")
    changed = [i for i in (after != before).any(1).nonzero().flatten().tolist() if i not in new]
    if changed:
        raise ExportError(f"rows that no adapter trains must stay, got {len(changed)} changed, first {changed[0]}")


def _first_other(got: Tensor, probe: _Probe) -> int | None:
    tokens = probe.ids[probe.prompt_length :]
    best = got[:, : probe.vocab_limit].argmax(1).tolist()
    return next((i for i, (a, b) in enumerate(zip(best, tokens, strict=True)) if a != b), None)


def card_text(name: str, card: Card, report: ExportReport, tokenizer: PreTrainedTokenizerBase) -> str:
    """The README of an exported model, in the hub's form: facts as given, checks as measured."""
    base = Path(card.base).name if Path(card.base).is_absolute() else card.base
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {json.dumps(base)}"] if base else []
    parts = ["\n".join([*head, "---"]), f"# {name}", f"Made from {base} with qftlab." if base else "Made with qftlab."]
    for title, facts in (("Recipe", card.recipe), ("Measured", card.metrics)):
        if facts:
            rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
            parts += [f"## {title}", f"| | |\n|---|---|\n{rows}"]
    if card.data:
        parts += ["## Data", "\n".join(f"- {line}" for line in card.data)]
    end = tokenizer.get_vocab().get(END_OF_TURN)
    stop = f"It ends a turn with `{END_OF_TURN}` (id {end})." if end is not None else ""
    checks = (
        f"Read back from disk, its logits at {report.positions} greedy tokens were within "
        f"{report.largest_difference:.0e} of those in memory (share of the largest; {report.tolerance:.0e} allowed). "
        f"{report.rows} embedding rows for {len(tokenizer)} tokens, {'tied to' if report.is_tied else 'apart from'} "
        f"the head. {stop}"
    )
    chat = "It has a chat template." if tokenizer.chat_template else "It has no chat template: give it plain text."
    use = "```bash\nvllm serve FOLDER\n```\n\nor `AutoModelForCausalLM.from_pretrained(FOLDER)` in transformers."
    parts += ["## Checked at export", checks.strip(), "## Use", f"{chat}\n\n{use}"]
    return "\n\n".join(parts) + "\n"
