"""What all tests share: repeatable property tests, small models, and the folder of real data where there is one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import settings

# What a shell starts in the background ignores Ctrl-C; some tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# No deadline: the cores of a shared machine stall for longer than any sensible one. Derandomised: a red run repeats.
settings.register_profile("qftlab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("qftlab")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Where .ci/run has installed a browser (QFTLAB_BROWSER=required), a browser test that is skipped has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("browser") and os.environ.get("QFTLAB_BROWSER") == "required":
        report.outcome, report.longrepr = "failed", f"QFTLAB_BROWSER=required, but it was skipped: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real tokenizers and data that QFTLAB_REAL_DATA names; without it the test is skipped."""
    folder = os.environ.get("QFTLAB_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("QFTLAB_REAL_DATA does not name the folder of real tokenizers and data sets")
    return Path(folder)


def random_model(family: str = "qwen2", **changes):
    """A random two-layer model of a real family, small enough for a test; fp32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from qftlab.model.attention import register_packed_attention

    kinds = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    shape = {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    if family == "qwen3":
        shape["head_dim"] = 8
    config_class, model_class = kinds[family]
    torch.manual_seed(0)
    config = config_class(**{**shape, **changes})
    config._attn_implementation = register_packed_attention()
    return model_class(config).eval()
