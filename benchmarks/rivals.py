"""transformers' side of the generation benchmarks, each way of calling it as its own documentation would have it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.harness import MismatchError, Options
from qftlab.maths.sampling import SamplingParams, filter_logits


class EndAt(StoppingCriteria):
    """Ends row r after `lengths[r]` new tokens: one comparison a step, cheaper than looking for stop tokens."""

    def __init__(self, width: int, lengths: Tensor) -> None:
        self.last = width + lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        """(B,) bool, True for a row that has its tokens."""
        return input_ids.shape[1] >= self.last


def left_pad(prompts: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T) int64, padded on the left with id 0 as `generate` needs it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def as_settings(params: SamplingParams) -> dict:
    """Our sampling parameters in transformers' words; its top_k of 50 by default is turned off."""
    if params.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}


def generate(
    model,
    prompts: list[list[int]],
    new_tokens: int,
    params: SamplingParams,
    lengths: list[int] | None = None,
    **settings,
) -> list[list[int]]:
    """`model.generate` over all prompts at once.

    Args:
        model: of transformers.
        prompts: ids.
        new_tokens: the most new tokens.
        params: greedy or sampling.
        lengths: new tokens of each returned row, where rows end by themselves.
        settings: go to `generate`.

    Returns:
        New ids of each row, cut to `lengths`, or after the first stop token if `eos_token_id` is among the settings.
    """
    ids, mask = left_pad(prompts, model.device)
    criteria = None if lengths is None else [EndAt(ids.shape[1], torch.tensor(lengths, device=ids.device))]
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        stopping_criteria=criteria,
        **as_settings(params),
        **settings,
    )
    rows = out[:, ids.shape[1] :].tolist()
    if lengths is not None:
        return [row[:n] for row, n in zip(rows, lengths, strict=True)]
    stops = settings.get("eos_token_id")
    stops = set(stops if isinstance(stops, list) else [stops])
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


class Continuous:
    """transformers' continuous batching: what `generate_batch` calls, with a length for each request.

    A context manager that starts its thread, warms it up (CUDA graphs) and stops it; that time is not counted.
    """

    def __init__(self, model, params: SamplingParams, options: Options) -> None:
        config = GenerationConfig(eos_token_id=-1, pad_token_id=0, **as_settings(params))
        small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it takes most of the memory
        paging = small if model.device.type == "cpu" else ContinuousBatchingConfig()
        self.open = lambda: model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=paging, block=True, timeout=5
        )
        self.deadline = options.deadline

    def __enter__(self) -> Continuous:
        self.context = self.open()
        self.manager = self.context.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)

    def run(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """New ids of each request.

        Raises:
            TimeoutError: if the requests are not finished by the deadline, or the thread stopped by itself.
        """
        wanted = zip(prompts, lengths, strict=True)
        names = [self.manager.add_request(ids, max_new_tokens=length) for ids, length in wanted]
        limit, rows = min(self.deadline, time.monotonic() + 120), {}
        while len(rows) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                rows[result.request_id] = list(result.generated_tokens)
            elif time.monotonic() > limit or not self.manager.is_running():
                raise TimeoutError(f"continuous batching gave {len(rows)} of {len(names)} requests")
        return [rows[name] for name in names]


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """transformers' warpers in the order `generate` builds them in, on fp32 logits (B, V)."""
    scores = logits.float()
    if params.temperature != 1:
        scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores


def draw(logits: Tensor, params: SamplingParams) -> Tensor:
    """One token for each row, (B,), as `generate` draws it: warpers, softmax, multinomial."""
    return torch.multinomial(warp(logits, params).softmax(-1), 1).squeeze(1)


def same_distribution(logits: Tensor, params: SamplingParams) -> str:
    """Compares the processed distributions of both sides on the same logits (B, V).

    Tokens whose cumulative mass lies within 1e-6 of p may stand on either side of top-p's cut (DESIGN.md), so a row may
    differ by one token at the edge, whose share is then the difference.

    Returns:
        What was found.

    Raises:
        MismatchError: if probabilities differ by more than 1e-6 beyond that.
    """
    ours, theirs = filter_logits(logits, params).softmax(-1), warp(logits, params).softmax(-1)
    gap = (ours - theirs).abs().amax(-1)
    edge = ((ours > 0) != (theirs > 0)).sum(-1)
    if bool(((gap > 1e-6) & (edge != 1)).any()):
        raise MismatchError(f"processed distributions differ by {gap.max():.2g} under {params}")
    return f"processed distributions within {gap.max():.0e}; edge tokens in {int((edge > 0).sum())} of {len(edge)} rows"


class Ties:
    """Says whether two continuations of a prompt are equally likely as far as fp32 can tell.

    The model in fp64 is the judge. Two sides that both are right may differ by what their products round: those of the
    layers (seven each) and the head stand one after the other, and each rounds by a unit of the largest logit.

    Args:
        model: of transformers.
        prompts: ids.
        is_beam: compare whole hypotheses by their mean log-probability, not greedy tokens where they part.
    """

    def __init__(self, model, prompts: list[list[int]], is_beam: bool = False) -> None:
        self.model, self.prompts, self.is_beam = model, prompts, is_beam

    @torch.no_grad()
    def __call__(self, row: int, ours: list[int], theirs: list[int]) -> bool:
        """Whether row `row` may come out either way."""
        exact, prompt, values, largest = copy.deepcopy(self.model).double(), self.prompts[row], [], 0.0
        same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if same is None and not self.is_beam:
            return False  # one ends where the other goes on
        for ids in (ours, theirs):
            new = ids if self.is_beam else ids[: same + 1]
            logits = exact(torch.tensor([prompt + new], device=exact.device)).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1)[range(len(new)), new]
            values.append((chosen.mean() if self.is_beam else chosen[-1]).item())
            largest = max(largest, logits.abs().max().item())
        products = 7 * self.model.config.num_hidden_layers + 1
        return abs(values[0] - values[1]) <= 2 * products * torch.finfo(torch.float32).eps * largest


def same_tokens(
    ours: list[list[int]], theirs: list[list[int]], is_tie: Callable[[int, list[int], list[int]], bool] | None = None
) -> str:
    """Says how many greedy tokens are equal.

    Args:
        ours, theirs: new ids of each row.
        is_tie: told a row and both of its answers, whether rounding alone may part them (`Ties`).

    Raises:
        MismatchError: at the first token that differs, unless it is a tie.
    """
    ties = equal = 0
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        equal += at
        if a != b:
            if is_tie is None or not is_tie(row, a, b):
                raise MismatchError(f"row {row} differs at token {at}: ours {a[at : at + 3]}, theirs {b[at : at + 3]}")
            ties += 1
    return f"{equal} tokens equal" + (f"; {ties} rows part at a tie of fp32" if ties else "")


def same_lengths(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """For sampled tokens, which differ by their random numbers: the rows must be of the same lengths."""
    if list(map(len, ours)) != list(map(len, theirs)):
        raise MismatchError("rows differ in length")
    return f"{len(ours)} rows of equal lengths, {sum(map(len, ours))} tokens"


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """For bf16, where both sides round differently: the share of tokens before the first difference of their row."""
    same_lengths(ours, theirs)
    equal = 0
    for a, b in zip(ours, theirs, strict=True):
        equal += next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
    return f"bf16: {100 * equal / sum(map(len, ours)):.0f} % of tokens stand before their row's first difference"
