"""From a trained model to one that others can load: export, card, GGUF, and the upload to the hub."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qftlab.model.export import ExportReport, export_model
from qftlab.serve import ExportConfig
from qftlab.serve.card import GGUF, card_of, card_text, run_of
from qftlab.train.run import own_settings

WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.gguf"]


def dtype_of_run(config: ExportConfig) -> str:
    """The dtype asked for; for `auto` that in which the run trained: adapters in fp32 may stand on weights in bf16."""
    run = run_of(config.model)
    if config.dtype != "auto" or run is None:
        return config.dtype
    asked = own_settings(run).get("dtype", "auto")
    return "float32" if asked == "float16" else asked  # training never computes in fp16


def hand_over(model, tokenizer: PreTrainedTokenizerBase, config: ExportConfig, *, progress: bool = False) -> str:
    """Exports a model with its card, and as GGUF and to the hub where asked, and says what was done, in lines.

    Args:
        model: merged in place: not to be used afterwards.
        tokenizer: its tokenizer.
        config: where to, how much is checked, and what else is made.
        progress: whether to draw a bar.

    Raises:
        ValueError, FileExistsError, ExportError, OSError: as `export_model`, `card_of`, `write_gguf` and `push`.
        ImportError: for a GGUF without gguf.
    """
    card, name, write_gguf = card_of(config), Path(config.output).resolve().name, None
    if config.gguf != "none":
        try:
            from qftlab.serve.gguf_file import write_gguf
        except ImportError as error:
            raise ImportError("--gguf needs gguf, which is not installed: pip install gguf") from error
    if config.push_to:
        hub_token()  # what is missing is said before the work, not after it

    def also(place: Path, report: ExportReport) -> None:
        if write_gguf:
            write_gguf(place, config.gguf, name, check=config.check != "none")
        text = card_text(name, card, report, tokenizer, GGUF if write_gguf else "")
        (place / "README.md").write_text(text, encoding="utf-8")

    options = {"check": config.check, "in_place": True, "also": also, "progress": progress}
    report = export_model(model, tokenizer, config.output, **options)
    said = f"{report.positions} greedy tokens as before, largest difference of a logit "
    said += f"{report.largest_difference:.1e} of the largest one (allowed {report.tolerance:.0e})"
    lines = [f"{report.path}: {said if report.positions else 'nothing was checked'}; {report.seconds:.0f} s"]
    lines += [f"{report.path / GGUF}: {config.gguf}, for llama.cpp and Ollama"] if write_gguf else []
    lines += [f"pushed to {push(report.path, config.push_to, config.private)}"] if config.push_to else []
    return "\n".join([*lines, f'serve it: vllm serve "{report.path}" (README.md there has more commands)'])


def hub_token() -> str:
    """The hub's token, from the environment only.

    Raises:
        ValueError: if HF_TOKEN is not set.
    """
    if not (token := os.environ.get("HF_TOKEN")):
        raise ValueError("push_to needs a token that may write, got none: set HF_TOKEN in the environment")
    return token


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Uploads a folder to the hub; weights that are there and not in the folder are removed. Returns the address.

    Args:
        folder: what `export_model` wrote.
        repository: owner/name; it is made where there is none.
        private: whether it shall be private; a public one that is there already is then refused.

    Raises:
        ValueError: without HF_TOKEN.
        OSError: with what the hub said.
    """
    from huggingface_hub import HfApi

    token = hub_token()
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ValueError("it is there already, and public: make it private on the hub, or leave --private out")
        options = {"commit_message": "Exported with qftlab", "delete_patterns": WEIGHTS}
        api.upload_folder(repo_id=repository, folder_path=folder, **options)
    except Exception as error:  # of whatever kind the hub's client raises
        reason = str(error).strip().split("\n")[0].replace(token, "…")
        raise OSError(f"{folder} is whole, but was not pushed to {repository}: {reason}") from None
    return f"{api.endpoint}/{repository}"
