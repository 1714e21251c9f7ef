"""Fine-tuning on Tinker: the lab's rows, masks, batches and loss; the service holds the model and does the arithmetic.

Needs `pip install "qftlab[tinker]"`. There are no new tokens there: `<|AGENT|>` and `<|EDIT|>` are trained as the
ordinary pieces that the base's tokenizer makes of them. The command and the project's own configuration are
`qftlab_course.tinker_project`.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import TimeoutError as StillWaiting
from dataclasses import dataclass
from typing import Any

from qftlab.evaluate.lengths import FIRST, LengthStats, limited
from qftlab.remote.budget import ServerError
from qftlab.rows.batches import Example, batches, count_trained
from qftlab.rows.examples import Usage, place_of
from qftlab.settings import AGENT, EDIT, ENABLE_THINKING, Names, Thinking, check_at_least, check_fields

log = logging.getLogger(__name__)
URL, KEY = "TINKER_BASE_URL", "TINKER_API_KEY"
SERVICE = "https://tinker.thinkingmachines.dev/services/tinker-prod"
PATIENCE, TRIES = 5.0, 3  # seconds for one look at the service, and how many may fail in a row


@dataclass(frozen=True)
class TinkerConfig:
    """What is trained on Tinker: rows, masks and loss are those of `sft`.

    Args:
        data: files of rows, one or [several]; one that is missing is warned about.
        base_model: a model that the service trains; it is asked which.
        lora_rank: of the adapters, on attention and MLP as ours are.
        train_unembed: whether the head gets an adapter too; where the base ties it to the embedding, as small Qwens do,
            it could then not be merged.
        lr: of AdamW, the same in every step; β2 is 0.95 there, eps 1e-12.
        epochs: times every row is seen.
        batch_size: rows in one optimizer step.
        max_length: the most tokens of a row; by default the model's context.
        truncate: whether longer rows are cut, prompts whole; otherwise they are left out.
        show_length_warnings: whether the first ten of them are named.
        thinking: as in `sft`.
        seed: of the order of the rows and of the adapters.
        state: tinker://RUN/weights/NAME, to go on from with its optimizer.

    Raises:
        ValueError: for a value out of range.
    """

    data: Names = ()
    base_model: str = "Qwen/Qwen3-8B"
    lora_rank: int = 32
    train_unembed: bool = False
    lr: float = 1e-4
    epochs: int = 3
    batch_size: int = 16
    max_length: int | None = None
    truncate: bool = False
    show_length_warnings: bool = True
    thinking: Thinking = "auto"
    seed: int = 0
    state: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(1, lora_rank=self.lora_rank, epochs=self.epochs, batch_size=self.batch_size)
        check_at_least(2, max_length=self.max_length)
        check_at_least(0, lr=self.lr)


def supported_models() -> dict[str, int | None]:
    """The models that the service trains, and their context in tokens; it is asked within seconds.

    Raises:
        ServerError: if there is no service, or it refuses the key.
    """
    url, key = os.environ.get(URL, "").strip().rstrip("/") or SERVICE, os.environ.get(KEY, "").strip()
    if not key.startswith("tml-"):
        raise ServerError(f"{KEY} must be set, and begin with tml-: the console of Tinker gives one")
    try:
        asked = urllib.request.Request(f"{url}/api/v1/get_server_capabilities", headers={"X-API-Key": key})
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            models = json.load(answer)["supported_models"]
        return {one["model_name"]: one.get("max_context_length") for one in models if one.get("trainable", True)}
    except urllib.error.HTTPError as error:
        reason = f"it refuses the key of {KEY}" if error.code in (401, 403) else f"HTTP {error.code}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise ServerError(f"{URL} must be the address of a Tinker service that answers, got {url}: {reason}")


def result_of(future) -> Any:
    """What a future of the SDK comes to; while it waits, the service is looked at, which the SDK does for minutes.

    Raises:
        ServerError: if the service is gone, or says that the request failed.
    """
    import tinker

    failures = 0
    while True:
        try:
            return future.result(timeout=PATIENCE)
        except StillWaiting as error:
            if future.future().done():
                raise ServerError(f"Tinker gave no answer in its time: {error}") from None
            try:
                supported_models()
                failures = 0
            except ServerError:
                failures += 1
                if failures == TRIES:
                    raise
        except (tinker.TinkerError, RuntimeError) as error:  # the second: of a client that has failed before
            raise ServerError(f"Tinker refuses a request: {error}") from None


def connect(config: TinkerConfig) -> tuple[Any, Any, int | None]:
    """The SDK's service client, a training client, and the most tokens of a row.

    Raises:
        ImportError: without the SDK.
        ValueError: for a base model that the service does not train.
        ServerError: as `supported_models`.
    """
    try:
        import tinker
    except ImportError as error:
        raise ImportError('Tinker needs its SDK, and Python 3.11: pip install "qftlab[tinker]"') from error
    models, base = supported_models(), config.base_model
    if base not in models and not config.state:
        raise ValueError(f"base_model must be one that the service trains, got {base!r}: {', '.join(sorted(models))}")
    service = tinker.ServiceClient()
    if config.state:
        waiting = service.create_training_client_from_state_with_optimizer(config.state)
    else:
        waiting = service.create_lora_training_client(
            base, rank=config.lora_rank, seed=config.seed, train_unembed=config.train_unembed
        )
    limits = [limit for limit in (config.max_length, models.get(base)) if limit]
    return service, result_of(waiting), min(limits, default=None)


def read_examples(config: TinkerConfig, tokenizer, max_length: int | None = None) -> tuple[list[Example], list[dict]]:
    """Examples as `encode_rows` makes them, within a length, and the rows; lengths and what was cut are logged.

    Raises:
        ValueError: if nothing is left to train on.
    """
    from qftlab.rows.encoding import encode
    from qftlab.rows.sources import load

    loaded = load(list(config.data), wanted="sft", missing="warning")
    usage, stats, examples, cut = Usage(sources=dict(loaded.report.counts)), LengthStats(), [], []
    for number, documents in encode(tokenizer, loaded.rows, "sft", usage, thinking=ENABLE_THINKING[config.thinking]):
        stats.add(map(len, documents))
        for document in documents:
            kept, what = limited(document, max_length, "truncate" if config.truncate else "skip")
            examples += [kept] if kept else []
            if what:
                cut.append(f"{place_of(number, usage.sources)}: {len(document)} tokens, {what}")
            if not kept:
                usage.leave_out(number, what)
    log.info("%s", stats.summary())
    if cut:
        named = "\n ".join(["", *cut[:FIRST]]) if config.show_length_warnings else ""
        log.warning("%d documents do not fit into %s tokens:%s", len(cut), max_length, named)
    if any(token in str(row) for row in loaded.rows for token in (AGENT, EDIT)):
        log.info("%s and %s are no tokens on Tinker: they are trained as plain text", AGENT, EDIT)
    usage.close(examples)
    return examples, loaded.rows


def datum(example: Example, num_tokens: int):
    """An example as the SDK's Datum: its tokens but the last, those but the first as targets, mask ÷ num_tokens."""
    from tinker import types

    ids, weights = example.input_ids, example.mask[1:].astype("float32") / num_tokens
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]),
                       loss_fn_inputs={"target_tokens": ids[1:], "weights": weights})  # fmt: skip


def train(client, examples: Sequence[Example], config: TinkerConfig) -> list[float]:
    """Steps over all epochs in the order of `sft`, one batch a step; the mean loss of each epoch (nats a token).

    Raises:
        ValueError: if the loss of the first batch has not moved at all.
        ServerError: as `result_of`.
    """
    from tinker import types

    first, losses = None, []
    for epoch in range(config.epochs):
        found = []
        for numbers in batches(len(examples), batch_size=config.batch_size, seed=config.seed, epoch=epoch):
            part = [examples[i] for i in numbers]
            count = count_trained(part)
            data = [datum(example, count) for example in part]
            waiting = client.forward_backward(data, "cross_entropy")
            update = client.optim_step(types.AdamParams(learning_rate=config.lr))
            loss = result_of(waiting).metrics["loss:sum"]
            result_of(update)
            first = first or (data, loss)
            found.append((loss, count))
        losses.append(sum(loss * n for loss, n in found) / sum(n for _, n in found))
        log.info("epoch %d/%d: loss %.4f nats a token", epoch + 1, config.epochs, losses[-1])
    check_moved([first[1], result_of(client.forward(first[0], "cross_entropy")).metrics["loss:sum"]])
    return losses


def check_moved(losses: Sequence[float]) -> None:
    """Refuses a training that trained nothing: losses of the same rows, before and after.

    Raises:
        ValueError: if first and last are the same to six digits.
    """
    if abs(losses[-1] - losses[0]) <= 1e-6 * abs(losses[0]):
        said = f"the loss must move, got {losses[0]:.6f} before and after"
        raise ValueError(f"{said}: is optim_step called, and is the learning rate above 0?")
