"""Export: adapters merged, the result read back from disk and checked, then put where transformers and vLLM load it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qftlab.files import aside
from qftlab.model.head import module_mode
from qftlab.model.loading import load_model, save_model
from qftlab.model.lora import is_adapted, merge_adapters, row_layers, trained_token_ids
from qftlab.settings import check_choice

log = logging.getLogger(__name__)
# Merging adds B A to W before the product with x instead of after it: honest logits differ by rounding alone. How much
# that is depends on depth, width and weights, so it is measured: the matrices of the model read back are nudged by one
# unit in the last place, and the largest move of a logit is the unit. Measured on 68 honest merges (2 to 24 layers,
# three families, three dtypes, adapters pushed far): at most 2.1 units of three nudges, and 2.4 of one. A ceiling keeps
# half precision, where a nudge is coarse, from hiding a wrong merge.
UNITS = 4
NUDGES = {"none": 0, "quick": 1, "full": 3}
CEILINGS = {torch.float32: 2**-10, torch.float16: 2**-7, torch.bfloat16: 2**-4}
PROBES = ("47 + 38 =", "def add(a, b):\n    return", "The sum of the first 100 natural numbers is")
NEW_TOKENS = 16


class ExportError(ValueError):
    """An exported model that does not do what the model in memory does; nothing is left at its folder."""


@dataclass(frozen=True)
class ExportReport:
    """What was checked of the folder at `path`, on `positions` greedy tokens: none with check "none".

    `largest_difference` is of a logit, as a share of the largest one; `tolerance` is what was allowed: `UNITS` times
    what one more rounding of all weights does in this model, and at most the ceiling of its dtype. `seconds` is what it
    all took, `check` what was asked for.
    """

    path: Path
    positions: int
    largest_difference: float
    tolerance: float
    rows: int
    is_tied: bool
    check: str
    seconds: float


def export_model(
    model,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    check: str = "quick",
    prompts: Sequence[str] = PROBES,
    in_place: bool = False,
    also: Callable[[Path, ExportReport], object] = lambda folder, report: None,
    progress: bool = False,
) -> ExportReport:
    """Writes a model as one folder of plain weights that transformers and vLLM load, after checking what it wrote.

    Checked on the model as read back from disk: every token that the model in memory writes greedily after the prompts
    (in half precision, near ties aside), logits as near as rounding allows in this model, embedding rows that no
    adapter trains unchanged, a tied head still tied.

    Args:
        model: plain, or with adapters, which are merged.
        tokenizer: its tokenizer, saved beside the weights with its chat template.
        folder: must not exist, or be empty.
        check: "quick" takes the first prompt, and once more with all tokens whose rows were trained; "full" takes all
            prompts, one more for each such token, and measures three times what rounding does; "none" checks nothing.
        prompts: texts to check on, special tokens written out.
        in_place: merges into the weights of `model`, which must not be used afterwards; saves a copy of them.
        also: writes more into the folder, such as a card; called with where it is now and what was checked.
        progress: whether to draw a `tqdm.auto` bar.

    Returns:
        What was checked. The folder is written aside and renamed, so what is there is whole.

    Raises:
        FileExistsError: if the folder holds something.
        ValueError: for quantised weights, fewer rows than the tokenizer has tokens, or a tie the config denies.
        ExportError: if a check fails.
    """
    from tqdm.auto import tqdm

    check_choice(tuple(NUDGES), check=check)
    folder, began = Path(folder), time.monotonic()
    new, layers = trained_token_ids(model), row_layers(model)
    _check_exportable(model, tokenizer, folder, len(layers))
    texts = _probe_texts(check, prompts, [token for token in tokenizer.convert_ids_to_tokens(new) if token])
    steps = 2 * len(texts) + NUDGES[check] + 2
    with tqdm(total=steps, unit="step", disable=not progress) as bar, aside(folder) as place:
        bar.set_description("greedy tokens")
        wanted = [_greedy(model, tokenizer, text, bar) for text in texts]
        kept = [layer.weight.detach().to("cpu", copy=True) for layer in layers] if texts else []
        rows, device = layers[0].weight.shape[0], str(layers[0].weight.device)
        bar.set_description("merging and writing")
        plain = merge_adapters(model, in_place=in_place) if is_adapted(model) else model
        _write(plain, tokenizer, place)
        bar.update()
        del plain  # the copy read back needs its room
        found = 0, 0.0, 0.0
        if texts:
            bar.set_description("reading back and comparing")
            found = _checked_(load_model(place, dtype="auto", device=device), wanted, kept, new, NUDGES[check], bar)
        report = ExportReport(folder, *found, rows, len(layers) == 1, check, time.monotonic() - began)
        also(place, report)
        bar.update()
    log.info("exported to %s (check %s)", folder, check)
    return report


def _check_exportable(model, tokenizer: PreTrainedTokenizerBase, folder: Path, matrices: int) -> None:
    """Refuses what no export could be made of, before anything is computed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be new or empty to export to: choose another, or remove it first")
    if getattr(model, "is_quantized", False):
        raise ValueError("weights must be whole to export, got quantised ones: load_model(…) without quant")
    if len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"rows must cover all {len(tokenizer)} tokens, got {rows}: call extend_model first")
    if (is_tied := matrices == 1) != bool(model.config.tie_word_embeddings):
        raise ValueError(
            f"config must say what the weights are, got tie_word_embeddings={not is_tied} and {matrices} matrices: "
            "vLLM would load another model (modules_to_save unties the head, add_adapters(token_ids=…) does not)"
        )


def _probe_texts(check: str, prompts: Sequence[str], new: Sequence[str]) -> list[str]:
    """The texts that are continued: with the trained tokens one by one, or all of them after the first prompt."""
    if check == "full":
        return [*prompts, *(f"{prompts[0]}{token}" for token in new)]
    return [prompts[0], *([f"{prompts[0]}{''.join(new)}"] if new else [])] if check == "quick" else []


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
def _greedy(model, tokenizer: PreTrainedTokenizerBase, text: str, bar) -> _Probe:
    """Greedy tokens: drafted with a cache, and settled by whole passes, the same arithmetic as what is compared."""
    ids, limit = tokenizer(text, add_special_tokens=False).input_ids, len(tokenizer)
    start = len(ids)
    if not start:
        raise ValueError("prompts must have at least one token each, got an empty one")
    for _ in range(NEW_TOKENS + 1):  # each settles one token more, unless a kernel is not the same twice
        ids = _draft(model, ids, start + NEW_TOKENS - len(ids), limit)
        probe = _Probe(text, ids, start, limit, _logits(model, ids, NEW_TOKENS + 1)[:-1])
        if (at := _first_other(probe.logits, probe)) is None:  # what is left of the draft is greedy throughout
            break
        ids = [*ids[: start + at], int(probe.logits[at, :limit].argmax())]
    bar.update()
    return probe


def _draft(model, ids: list[int], count: int, limit: int) -> list[int]:
    """The ids and `count` more, each the likeliest after a cache of those before; without one in a family of none."""
    ids, past, fresh, device = list(ids), {}, list(ids), next(model.parameters()).device
    with module_mode(model, False):
        for _ in range(count):
            output = model(input_ids=torch.tensor([fresh], device=device), logits_to_keep=1, **past)
            ids.append(int(output.logits[0, -1, :limit].argmax()))
            cache = getattr(output, "past_key_values", None)
            past, fresh = ({}, ids) if cache is None else ({"past_key_values": cache}, ids[-1:])
    return ids


@torch.no_grad()
def _logits(model, ids: list[int], last: int) -> Tensor:
    with module_mode(model, False):
        output = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), logits_to_keep=last)
    return output.logits[0].float().cpu()  # (last, V)


def _checked_(
    model, wanted: list[_Probe], kept: list[Tensor], new: list[int], nudges: int, bar
) -> tuple[int, float, float]:
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
    bar.update(len(wanted))
    apart, unit = _apart(read_back, [probe.logits for probe in wanted]), _unit_(model, wanted, read_back, nudges, bar)
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
def _unit_(model, wanted: list[_Probe], read_back: list[Tensor], nudges: int, bar) -> float:
    """How far, as `_apart` says it, logits move when every matrix is rounded once more: a unit up or down at random."""
    matrices, moved = [p for p in model.parameters() if p.ndim > 1], []
    generator = torch.Generator(matrices[0].device).manual_seed(0)
    for _ in range(nudges):
        for p in matrices:
            signs = torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
            p.mul_(1 + torch.finfo(p.dtype).eps * signs)
        moved.append(_apart(_all_logits(model, wanted), read_back))
        bar.update()
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
