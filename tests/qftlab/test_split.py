"""Splits: no prompt on both sides, a pure function of rows and seed; contamination found where it is planted."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qftlab import cli
from qftlab.evaluate.split import contamination, prompt_key, prompt_text, split_rows
from qftlab.files import bundled
from qftlab.rows.sources import load, load_rows


def row(question: str, answer: str = "a") -> dict:
    return {"instruction": question, "input": "", "output": answer}


def test_keys_by_hand():
    assert prompt_key(row("  What\tIS\n\u2460 ")) == prompt_key(row("what is 1")) == "what is 1"
    assert prompt_key(row("3 + 4")) != prompt_key(row("3 - 4"))
    said = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "What"},
                         {"role": "user", "content": "is 1"}, {"role": "assistant", "content": "x"},
                         {"role": "user", "content": "more"}]}  # fmt: skip
    assert prompt_key(said) == "what is 1" and prompt_text({"prompt": "P"}) == "P"
    a, b = ({"instruction": "x", "numbers": n, "target": 5} for n in ([3, 2], [2, 3]))
    assert prompt_key(a) == prompt_key(b) == "countdown [2, 3] 5"
    with pytest.raises(ValueError, match="row must have instruction"):
        prompt_key({"question": "x"})


@given(st.lists(st.integers(0, 30), min_size=12, max_size=120), st.integers(0, 9), st.floats(0.15, 0.85))
def test_no_prompt_is_on_both_sides(names, seed, share):
    rows = [row(f"Q {n}" if i % 2 else f" q  {n}\n", str(i)) for i, n in enumerate(names)]
    try:
        made = split_rows(rows, test=share, seed=seed)
    except ValueError as error:
        assert "must fill both sides" in str(error)
        return
    keys = [{prompt_key(r) for r in side} for side in (made.train, made.test)]
    assert not keys[0] & keys[1] and made.num_groups == len(keys[0] | keys[1])
    assert sorted(made.train + made.test, key=str) == sorted(rows, key=str)
    assert len(made.test) <= round(share * len(rows))
    mixed = random.Random(0).sample(rows, len(rows))
    again = split_rows(mixed, test=share, seed=seed)
    assert sorted(again.test, key=str) == sorted(made.test, key=str)
    assert contamination(made.train, made.test).num_exact == 0


def test_default_is_80_to_20_and_the_seed_matters():
    rows = [row(f"question {i}") for i in range(1000)]
    made = split_rows(rows)
    assert (len(made.train), len(made.test), made.num_repeated) == (800, 200, 0)
    assert made == split_rows(rows) and made.train == [r for r in rows if r in made.train]
    shared = sum(r in made.test for r in split_rows(rows, seed=1).test)
    assert 15 < shared < 70  # independent splits share a fifth of 200; six standard deviations are 31
    for share in (0, 1, -1, 5):
        with pytest.raises(ValueError, match=r"test must be in \(0, 1\)"):
            split_rows(rows, test=share)
    with pytest.raises(ValueError, match="must fill both sides"):
        split_rows([row("same")] * 10)


def test_contamination_by_hand():
    test = [row("Hello there"), row("one two three four five six"), row("short"), row("one two three four five 6")]
    train = [row("nothing"), row("now: One, two three. four five!"), row(" hello  THERE"), row("short and sweet")]
    found = contamination(iter(train), test, n=5)
    assert (found.num_test, found.num_exact, found.num_overlapping, found.is_clean) == (4, 1, 2, False)
    assert found.first == ((1, 3, "same prompt"), (2, 2, "5 words in a row"), (4, 2, "5 words in a row"))
    assert contamination(train, test, n=6).num_overlapping == 0
    assert contamination(train[:1], test).is_clean and "of 4 test rows 0" in contamination([], test).summary()
    with pytest.raises(ValueError, match="n must be at least 2"):
        contamination(train, test, n=1)


def test_the_overlap_of_s1_and_math500(real_data):
    lines = (real_data / "chat_messages" / "s1_overlap_36.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    train, test = ([row(p[f"{name}_problem"]) for p in pairs] for name in ("train", "math500"))
    found = contamination(train, test, n=8)
    assert (len(pairs), found.num_test, found.num_exact, found.num_overlapping) == (36, 36, 2, 11)
    # Its authors count every sign of LaTeX as a token; so all 36 share 8, though mostly notation.

    def runs(text: str) -> set[tuple[str, ...]]:
        signs = re.findall(r"\w+|[^\w\s]", text.casefold())
        return {tuple(signs[i : i + 8]) for i in range(len(signs) - 7)}

    assert all(runs(p["train_problem"]) & runs(p["math500_problem"]) for p in pairs)
    clean = contamination(load(real_data / "alpaca" / "alpaca_train_950.json").rows, test)
    assert clean.is_clean


def test_real_files(real_data):
    rows = load(real_data / "alpaca" / "alpaca_data_1k.json").rows
    made = split_rows(rows)
    assert len(made.test) == 200 and contamination(made.train, made.test).num_exact == 0
    leaked = contamination(made.train + made.test[:20], made.test)
    assert leaked.num_exact == 20
    pairs = load(real_data / "ultrafeedback" / "train_clean.jsonl").rows
    assert contamination((r for r in pairs), split_rows(pairs).test).num_exact == 200


@pytest.mark.parametrize("name", ["countdown", "bugfix", "instructions"])
def test_the_bundled_sets_do_not_leak(name):
    training = {"countdown": "demonstrations.jsonl"}.get(name, "train.jsonl")
    # Every joke has the same prompt ("Tell me a joke about computers."): it is held out by its answer.
    train, test = ([r for r in load_rows(bundled(name, file)) if r.get("skill") != "joke"]
                   for file in (training, "heldout.jsonl"))  # fmt: skip
    found = contamination(train, test)
    assert found.num_exact == 0, found.summary()


def test_split_command_writes_both_sides_once(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row(f"q {i % 40}", str(i))) for i in range(50)))
    arguments = ["split", "--data", str(path), "--output", str(tmp_path / "out"), "--seed", "3"]
    assert cli.main(arguments) == 0
    assert "40 different prompts, 10 rows repeat one" in capsys.readouterr().out
    train, test = (load_rows(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "test"))
    assert len(train + test) == 50 and contamination(train, test).is_clean
    assert cli.main(arguments) == 2 and "exists: choose another output" in capsys.readouterr().err
    compare = ["split", "--data", str(path), "--against", str(tmp_path / "out" / "test.jsonl")]
    assert cli.main(compare) == 0 and f"of {len(test)} test rows {len(test)} have" in capsys.readouterr().out
    assert cli.main([*compare, "--output", "x"]) == 2 and cli.main(["split", "--data", str(path), "--n", "1"]) == 2


def test_split_command_writes_lists_under_other_names(tmp_path, capsys):
    """As the Tinker project's split_dataset.py leaves them: two files that hold one list each."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(f"q {i % 40}", f"答{i}") for i in range(50)]))
    arguments = ["split", "--data", str(path), "--output", str(tmp_path), "--names", "[train_set.json,test_set.json]"]
    assert cli.main(arguments) == 0
    sides = [json.loads((tmp_path / f"{name}_set.json").read_text(encoding="utf-8")) for name in ("train", "test")]
    assert [len(side) for side in sides] == [40, 10] and contamination(*sides).is_clean
    assert load_rows(tmp_path / "test_set.json") == sides[1] and "答" in (tmp_path / "test_set.json").read_text("utf-8")
    assert len((tmp_path / "test_set.json").read_text("utf-8").splitlines()) == 12, "a row a line, between brackets"
    capsys.readouterr()
    assert cli.main(arguments) == 2 and "train_set.json exists: choose another output" in capsys.readouterr().err
    for names in ("[a.json,a.json]", "[a.json,b.txt]", "[train,test]"):
        assert cli.main([*arguments[:5], "--names", names]) == 2
        assert "names must be two that end in .jsonl or .json, got" in capsys.readouterr().err


def test_only_numbers_with_a_target_are_a_countdown_problem():
    """A row with one of them is known by its text, so that columns of other data sets change nothing."""
    for extra in ({"numbers": [3, 2]}, {"target": 5}, {"numbers": [], "target": 5}, {"numbers": None, "target": 5}):
        assert prompt_key({**row("How  many?"), **extra}) == "how many?"
    rows = [{**row(f"q {i}"), **({"numbers": [2, 3]} if i % 2 else {"target": 5})} for i in range(20)]
    made = split_rows(rows, test=0.5)
    assert (made.num_groups, made.num_repeated, len(made.train), len(made.test)) == (20, 0, 10, 10)
    puzzles = [{"instruction": f"ask {i}", "numbers": n, "target": 5} for i, n in enumerate(([2, 3], [3, 2], [2, 4]))]
    assert split_rows(puzzles, test=0.4).num_groups == 2


def test_the_words_of_a_row_by_hand():
    assert prompt_text({"instruction": "a", "input": "b"}) == "a\nb" and prompt_text(row("a")) == "a"
    assert prompt_text({"messages": [{"role": "user", "content": None}, {"role": "user", "content": "x"}]}) == "\nx"
    found = contamination([row(f"same {i}") for i in range(12)], [row(f"same {i}") for i in range(12)])
    assert len(found.first) == 10 and found.num_exact == 12 and found.summary().count("\n") == 10
    # Nine words are two runs of eight: a text of eight words that ends with the second one is found by it.
    words = "a b c d e f g h i".split()
    overlap = contamination([row(" ".join(words[1:]))], [row(" ".join(words))])
    assert (overlap.num_exact, overlap.num_overlapping) == (0, 1) and not overlap.is_clean


ZH = "小明有十二个苹果，他先给了小红三个，又给了小刚四个"
JA = "太郎は林檎を十二個持っていて、花子に三個をあげました"
TH = "สมชายมีแอปเปิลสิบสองผลและให้สมหญิงไปสามผล"


def test_scripts_without_blanks_are_compared_by_characters(real_data) -> None:
    cases = real_data.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"{cases} is not there: the case files lie beside the real data")
    found = contamination(load_rows(cases / "13_zh_train.jsonl"), load_rows(cases / "13_zh_test.jsonl"))
    assert (found.num_exact, found.num_overlapping) == (0, 1)


@pytest.mark.parametrize("text", [ZH, JA, TH])
def test_a_prompt_that_was_changed_at_its_end_is_found(text) -> None:
    rows = [[{"instruction": f"{text}{end}", "output": "x"}] for end in ("？", "。请一步一步思考。")]
    found = contamination(*rows)
    assert (found.num_exact, found.num_overlapping) == (0, 1)
    assert contamination(rows[0], [{"instruction": text[:7] + "x", "output": "y"}]).is_clean, "seven are too few"
    assert contamination(
        [{"instruction": "a b c d e f g", "output": ""}], [{"instruction": "a b c d e f g h"}]
    ).is_clean
