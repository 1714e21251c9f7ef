"""Recipes: each parses, names known data, and the commands of the README run one after the other on `tiny`."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from qftlab import cli
from qftlab.rows.schemas import SCHEMAS, convert_row
from qftlab.rows.sources import HUB, _is_hub, load

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
WARMSTART, SMOLTALK = "Asap7772/cog_behav_all_strategies", "HuggingFaceTB/smol-smoltalk"
PROBLEMS, PAIRS = "asingh15/countdown_tasks_3to4", "HuggingFaceH4/ultrafeedback_binarized"
LITTLE = "--train.max_steps 2 --train.batch_size 2 --train.eval_every 1 --train.tokens_per_micro_batch 2048"
SHRUNK = {
    "data": "--limit 4",
    "sft": f"{LITTLE} --max_length 512 --device cpu",
    "dpo": f"{LITTLE} --max_length 512 --device cpu",
    "reward": f"{LITTLE} --max_length 512 --device cpu",
    "rloo": f"{LITTLE} --max_length 496 --device cpu --train.save_every 1 --policy.max_new_tokens 8 "
    "--policy.num_generations 2 --policy.sample_every 1",
    "chat": "--max_new_tokens 4 --device cpu",
}


def commands(title: str = "") -> list[list[str]]:
    """The arguments of every command in the README, or in one of its sections."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    part = text.partition(f"\n## {title}")[2].partition("\n## ")[0] if title else text
    blocks = re.findall(r"```bash\n(.*?)```", part, re.DOTALL)
    return [shlex.split(line)[3:] for block in blocks for line in block.splitlines()]


def test_every_recipe_is_run_by_a_command_of_the_readme() -> None:
    given = [arguments[arguments.index("--config") + 1] for arguments in commands() if "--config" in arguments]
    assert {Path(name).name for name in given} == {path.name for path in FILES} and len(FILES) == 8
    assert len(commands()) == sum(len(commands(title)) for title in ("Countdown", "Chat", "AGENT")) == 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_says_the_source_of_each_setting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    [(name, told)] = re.findall(r"^#   python -m qftlab (\w+) --config recipes/(.+)$", text, re.MULTILINE)
    config = cli.parse(name, ["--config", str(path)])
    assert told == path.name
    for key, value in flat(yaml.safe_load(text)).items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == (tuple(value) if isinstance(value, list) else value) or found == (value,), key
    settings = text.partition("\npolicy:")[2] or text.partition("\ntrain:")[2]
    bare = [line for line in settings.splitlines() if line.startswith("  ") and " # " not in line]
    assert not bare or name == "data", f"no source: {bare}"


def flat(found: dict, prefix: str = "") -> dict:
    """{"train": {"lr": 1}} as {"train.lr": 1}."""
    pairs = [flat(v, f"{prefix}{k}.").items() if isinstance(v, dict) else [(prefix + k, v)] for k, v in found.items()]
    return dict(pair for part in pairs for pair in part)


def hub_names() -> set[str]:
    """Every data set that a recipe or a command names."""
    found = set()
    for arguments in commands("Countdown") + commands("Chat"):
        config = cli.parse(arguments[0], [FOLDER.parent.joinpath(a).as_posix() if a.endswith(".yaml") else a
                                          for a in arguments[1:]])  # fmt: skip
        found |= {n for key in ("data", "held_out") for n in getattr(config, key, ()) if _is_hub(n)}
    return found


def test_data_sets_have_a_known_layout() -> None:
    """By the registry; the course's own copy of Countdown is not in it and is known by its columns."""
    assert hub_names() == {WARMSTART, SMOLTALK, PROBLEMS, PAIRS}
    kinds = {name: SCHEMAS[HUB[name].schema].gives for name in hub_names() - {PROBLEMS}}
    assert kinds == {WARMSTART: "sft", SMOLTALK: "sft", PAIRS: "preference"}
    raw = {"nums": [44, 19, 35], "target": 98, "prompt": "<|im_start|>…", "ground_truth": {"target": 98}}
    assert convert_row(raw, "here")["numbers"] == [44, 19, 35]
    assert HUB[PAIRS].split == "train_prefs"


# Every command in its order, on `tiny`


def hub_folder(folder: Path, **splits: list[dict]) -> Path:
    """A folder as the hub has it: data/SPLIT-00000-of-00001.parquet."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def local_data(root: Path, real: Path) -> dict[str, str]:
    """Real rows under the columns of each data set; WarmStart's are Countdown's worked solutions in its own words."""
    problems = load_raw(real / "countdown" / "uft_countdown_train.parquet", 24)
    warm = [{"query": row["question"], "completion": f"<think>\n{row['answer']}"} for row in problems]
    tasks = [{"target": row["target"], "nums": row["nums"], "prompt": "<|im_start|>…"} for row in problems]
    said = load(real / "chat_messages" / "conversations.jsonl", limit=24).rows
    chats = [{"messages": row["messages"], "source": "x"} for row in said]
    pairs = [binarized(row) for row in short_pairs(real / "ultrafeedback" / "train_clean.jsonl", 24)]
    made = {
        WARMSTART: {"train": warm[:16], "test": warm[16:]},
        PROBLEMS: {"train": tasks[:16], "test": tasks[16:]},
        SMOLTALK: {"train": chats[:16], "test": chats[16:]},
        PAIRS: {"train": pairs[:16], "test_prefs": pairs[16:]},
    }
    return {name: str(hub_folder(root / name.replace("/", "-"), **splits)) for name, splits in made.items()}


def load_raw(path: Path, count: int) -> list[dict]:
    return pytest.importorskip("pyarrow.parquet").read_table(path).slice(0, count).to_pylist()


def short_pairs(path: Path, count: int) -> list[dict]:
    """Pairs of unequal scores that fit the context of `tiny`."""
    rows = load(path, skip=("equal pair", "score tie", "empty answer")).rows
    lengths = [len(r["prompt"][-1]["content"]) + max(len(r["chosen"]), len(r["rejected"])) for r in rows]
    return [row for row, length in zip(rows, lengths, strict=True) if length < 450][:count]


def binarized(row: dict) -> dict:
    """A pair with the columns of HuggingFaceH4/ultrafeedback_binarized."""
    sides = {side: [*row["prompt"], {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    scores = {f"score_{side}": row[f"score_{side}"] for side in sides}
    return {"prompt": row["prompt"][-1]["content"], "prompt_id": "x", **sides, "messages": sides["chosen"], **scores}


def shrink(arguments: list[str], local: dict[str, str]) -> list[str]:
    """A command of the README on `tiny`, with local folders in place of hub names, and two steps."""
    name, *rest = (str(FOLDER.parent / a) if a.endswith(".yaml") else local.get(a, a) for a in arguments)
    config = cli.parse(name, rest)
    more = shlex.split(SHRUNK[name])
    if getattr(config, "model", "") == "Qwen/Qwen2.5-0.5B":
        more += ["--model", "tiny"]
    if config_data := [local[source] for source in getattr(config, "data", ()) if source in local]:
        more += ["--data", *config_data]
    return [name, *rest, *more]


@pytest.mark.parametrize("title", ["Countdown", "Chat"])
def test_the_commands_run_in_their_order(title: str, tmp_path, real_data, monkeypatch, capsys) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    local = local_data(tmp_path / "hub", real_data)
    monkeypatch.chdir(tmp_path)
    for arguments in commands(title):
        assert cli.main(shrink(arguments, local)) == 0, capsys.readouterr().err
    if title == "Countdown":
        rows = load("runs/data/countdown-train.jsonl").rows
        assert "using the numbers [44, 19, 35], create an equation that equals 98" in rows[0]["instruction"].lower()
        check_rewards("runs/countdown-rloo", "reasoned")
    else:
        records = metrics("runs/chat-dpo")
        assert all(0 <= r["held_out_preference_accuracy"] <= 1 for r in records if "held_out_loss" in r)
        records = metrics("runs/chat-reward")
        assert all(0 <= r["held_out_accuracy"] <= 1 for r in records if "held_out_loss" in r)
        check_rewards("runs/chat-rloo", "model")


def test_the_special_token_project_runs_in_its_order(tmp_path, real_data, monkeypatch, capsys) -> None:
    """Two rows' worth of everything: a teacher on this machine, problems of LiveCodeBench, and `tiny` for Qwen3-8B."""
    from planted_teacher import PlantedTeacher

    from qftlab_course.agent_edit.problems import read_problems
    from qftlab_course.flaky import Flaky

    lines = (real_data / "livecodebench" / "lcb_400.jsonl").read_text(encoding="utf-8").splitlines()
    short = sorted((line for line in lines if json.loads(line)["platform"] == "leetcode"), key=len)[:12]
    (tmp_path / "lcb.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
    (tmp_path / "query_only.json").write_text('[{"Query": "It is wrong: x = 1"}]', encoding="utf-8")
    (tmp_path / "short.txt").write_text("Help.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    teacher = PlantedTeacher(read_problems([tmp_path / "lcb.jsonl"]))
    shrunk = {
        "teach-data": "--samples 12 --tries 1 --threads 4",
        "sft": f"{LITTLE} --model tiny --device cpu --quant none --dtype float32 --max_length null",
        "tasks": "--max_new_tokens 4 --system short.txt",  # 512 tokens are all that `tiny` has
    }
    with Flaky(teacher.answer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for name, *rest in commands("AGENT"):
            rest = [str(FOLDER.parent / word) if word.endswith(".yaml") else word for word in rest]
            rest = ["lcb.jsonl" if word == "livecodebench/code_generation_lite" else word for word in rest]
            code = cli.main([name, *rest, *shlex.split(shrunk.get(name, ""))])
            assert code == (1 if name in ("validate", "check") else 0), capsys.readouterr().err
    assert (tmp_path / "runs" / "agent-edit" / "latest" / "curves.png").exists()


def metrics(output: str) -> list[dict]:
    """The records of the only run in a folder of runs, all finite, two steps, measured before and after each."""
    lines = (Path(output) / "latest" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert all(math.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert [r["step"] for r in records if "held_out_loss" in r] == [0, 1, 2]
    return records


def check_rewards(output: str, name: str) -> None:
    """Rewards are reported in training and on held-out prompts, and samples are shown at every step."""
    records = metrics(output)
    assert all(f"reward_{name}" in r and "entropy" in r for r in records if "loss" in r)
    assert all("held_out_reward" in r for r in records if "held_out_loss" in r)
    samples = [r["samples"] for r in records if "samples" in r]
    assert len(samples) == 2 and all({"row", "prompt", "text", "reward"} <= set(s) for part in samples for s in part)
