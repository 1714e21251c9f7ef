"""Data sets on the hub, or folders in the hub's own format, read through `datasets`; one registry of known names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qftlab.data.readers import DataError


@dataclass(frozen=True)
class HubSource:
    """A known data set: where it is, how its rows are laid out, and what it is for.

    Args:
        name: on the hub.
        schema: a name of `schemas.SCHEMAS`.
        recipe: the stage that trains on it: "sft", "dpo" or "rloo".
        split: the default split.
        is_large: read as a stream, so that only the rows that are asked for are fetched.
        file: a JSON-lines file of the repository to read, where its own loading script is not to be run.
    """

    name: str
    schema: str
    recipe: str
    split: str = "train"
    is_large: bool = False
    file: str = ""


HUB = {source.name: source for source in (
    HubSource("HuggingFaceTB/smol-smoltalk", "messages", "sft", is_large=True),
    HubSource("HuggingFaceH4/ultrafeedback_binarized", "preference", "dpo", split="train_prefs", is_large=True),
    HubSource("Asap7772/cog_behav_all_strategies", "prompt_completion", "sft"),
    HubSource("Jiayi-Pan/Countdown-Tasks-3to4", "countdown", "rloo", is_large=True),
    HubSource("livecodebench/code_generation_lite", "livecodebench", "rloo", split="test", is_large=True,
              file="test.jsonl"),
)}  # fmt: skip


def read_hub(name: str, split: str | None = None) -> Iterator[tuple[str, object]]:
    """Rows of a data set with their places, streamed where it is large.

    Args:
        name: a name on the hub, or a folder of files that `datasets` loads.
        split: by default the registry's, else "train".

    Raises:
        DataError: if `datasets` is not installed, or cannot find or read it; the reason is in the message.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install datasets") from None
    known = HUB.get(name)
    wanted = split or (known.split if known else "train")
    is_folder = Path(name).is_dir()
    options = {"streaming": is_folder or known is None or known.is_large}
    path = name
    if known and known.file and not is_folder:
        path, options["data_files"] = "json", {wanted: f"hf://datasets/{name}/{known.file}"}
    number = 0
    try:
        for row in datasets.load_dataset(path, split=wanted, **options):
            number += 1
            yield f"row {number}", row
    except GeneratorExit:
        raise
    except Exception as error:  # datasets passes on the errors of a dozen libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        way_out = "check its files" if is_folder else "check the name, the split and the connection"
        raise DataError(f"{name}, after row {number} of split {wanted!r}: {reason:.300}; {way_out}") from None
