"""The comparison page: figures that are those of the tests behind them, refusals, judges over HTTP, Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from qftlab import cli
from qftlab.evaluate.statistics import clustered_interval, paired_test
from qftlab.model.loading import load_model, save_model
from qftlab.remote import client as client_module
from qftlab.rows.tokenizer import load_tokenizer
from qftlab.settings import ServerConfig
from qftlab.train.reward import ModelReward, reward_model
from qftlab_course import judge
from qftlab_course.compare import (
    CompareConfig,
    change_of,
    check_same_rows,
    common_scorers,
    load_evaluation,
    mean_of,
    win_rates,
)
from qftlab_course.compare_page import _mark, compare, stage_table
from qftlab_course.flaky import Flaky
from qftlab_course.responses import to_lines

SKILLS = ("add", "sort")


def evaluation(folder: Path, marks: list, samples: int = 1, said=None, **changes) -> Path:
    """A folder as `evaluate --output` writes it: row n has marks[n], one for each of its samples."""
    folder.mkdir(parents=True)
    rows = [{"instruction": f"question {n}", "output": str(n), "skill": SKILLS[n % 2]} for n in range(len(marks))]
    rows = changes.pop("rows", rows)
    settings = {"model": f"runs/{folder.name}", "num_samples": samples, "scorers": ["right"], "seed": 0, **changes}
    responses, scores = [], []
    for n, row in enumerate(rows):
        values = marks[n] if isinstance(marks[n], list) else [marks[n]] * samples
        for sample, value in enumerate(values):
            text = said(n, sample) if said else f"{folder.name} says {n}"
            prompt = [{"role": "user", "content": row["instruction"]}]
            responses.append({"row": n, "sample": sample, "prompt": prompt, "response": text,
                              "token_ids": [1] * (n + 1), "finish_reason": "length" if n == 3 else "stop"})  # fmt: skip
            scores.append({"row": n, "sample": sample, "right": value})
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, records in (("rows", rows), ("responses", responses), ("scores", scores)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def three(folder: Path, **options) -> list[str]:
    """Of 8 rows, sft gains four and loses one; dpo gains one and loses none."""
    marks = [[0, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0]]
    named = zip(("initial", "sft", "dpo"), marks, strict=True)
    return [str(evaluation(folder / name, part, **options)) for name, part in named]


def test_the_table_has_the_figures_of_the_tests_behind_it(tmp_path) -> None:
    evaluations = [load_evaluation(folder) for folder in three(tmp_path)]
    check_same_rows(evaluations)
    assert common_scorers(evaluations) == ["right"]
    initial, sft, dpo = evaluations
    assert mean_of(sft, "right")[0] == 5 / 8
    change = change_of(initial, sft, "right")
    assert (change.gained, change.lost, change.prompts) == ([0, 2, 3, 5], [4], 8)
    assert change.test.p_value == 0.375, "2 · (C(5,0) + C(5,1)) ÷ 2⁵"
    # Differences 1, 0, 1, 1, −1, 1, 0, 0: mean 3/8, variance 0.5536, se 0.2631; t(7) is 2.365 at 97.5 %.
    assert change.visible == pytest.approx(0.2631 * (2.3646 + 0.8416), abs=1e-3)
    table = stage_table(evaluations, ["right"], {("right", "sft"): change,
                                                 ("right", "dpo"): change_of(sft, dpo, "right")})  # fmt: skip
    assert list(table.index) == ["initial", "sft", "dpo"]
    line = {key: value.replace("\u00a0", " ") for key, value in table.loc["sft"].items()}
    mean, low, high = mean_of(sft, "right")
    assert line["mean, %"] == f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert line["change"].startswith("+37.5 (−24.7 to 99.7)") and line["p"] == "0.375"
    assert (line["gained"], line["lost"], line["tokens"], line["cut off"]) == ("4", "1", "4.5", "12.5 %")
    assert table.loc["dpo", "gained"] == "1" and table.loc["initial", "change"] == "–"


def test_several_samples_count_as_one_prompt(tmp_path) -> None:
    """Rows are gained by their means; intervals and tests are those of `statistics` over prompts."""
    a = load_evaluation(evaluation(tmp_path / "a", [[0, 1], [1, 1], [0, 0], [1, 0]], samples=2))
    b = load_evaluation(evaluation(tmp_path / "b", [[1, 0], [1, 0], [1, 1], [1, 0]], samples=2))
    change = change_of(a, b, "right")
    assert (change.gained, change.lost) == ([2], [1]), "a row whose samples swap has not changed"
    values = [[0, 1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1, 1, 0]]
    keys = [0, 0, 1, 1, 2, 2, 3, 3]
    assert change.test == paired_test(*values, keys)
    assert mean_of(b, "right") == clustered_interval(values[1], keys, method="wilson", weights=[1] * 8)


def test_scores_that_are_none_or_no_shares(tmp_path) -> None:
    a = load_evaluation(evaluation(tmp_path / "a", [None, 2.5, -30.0, None]))
    b = load_evaluation(evaluation(tmp_path / "b", [1.0, 3.5, None, None]))
    change = change_of(a, b, "right")
    assert change.gained == [1] and change.prompts == 1 and change.visible != change.visible
    assert mean_of(a, "right")[0] == -13.75
    table = stage_table([a, b], ["right"], {("right", "b"): change})
    assert table.loc["a", "mean"].startswith("−13.8 (") and table.loc["b", "change"] == "+1 (–)"
    nothing = load_evaluation(evaluation(tmp_path / "c", [None] * 4))
    assert change_of(a, nothing, "right") is None
    assert stage_table([nothing], ["right"], {}).loc["c", "mean"] == "– (–)"


def test_the_page_shows_what_changed_first_and_runs_nothing(tmp_path) -> None:
    """Whatever a model writes stands there as text; the page loads nothing."""
    evil = "<script>alert(1)</script><img src=http://elsewhere.example/x>"
    folders = three(tmp_path, said=lambda n, sample: evil if n == 6 else f"said {n}")
    page = compare(CompareConfig(tuple(folders), str(tmp_path / "page.html"), examples=6))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;alert" in text.replace("\u200b", "")
    assert not re.search(r"<[^>]*(src|href)=(?!\"data:)", text), "a link or picture of elsewhere"
    table = text[text.index("Answers side by side</caption>") :]
    shown = re.findall(r"<tr><td>(\d), ([\w ]+)</td>", table)
    assert Counter(why for _, why in shown) == {"gained by sft": 4, "lost by sft": 1, "gained by dpo": 1}
    assert shown[0] == ("1", "gained by sft") and "<td>✗ said 0</td><td>✓ said 0</td>" in table
    assert "<td>question 4</td><td>4</td><td>✓ said 4</td><td>✗ said 4</td>" in table, "asked, reference, answers"
    assert "8 rows, 1 answer to each. With 8 prompts you can see a change of" in text
    assert 'alt="right: initial 25.0' in text and "sft, add: 2 gained, 1 lost" in text
    assert "Win rates" not in text and "differ in more" not in text
    markdown = compare(CompareConfig(tuple(folders), str(tmp_path / "page.md")))
    assert "&lt;script" in markdown.read_text(encoding="utf-8") and list(tmp_path.glob("page-*.png"))


def test_an_answer_may_hold_every_line_end_of_unicode(tmp_path) -> None:
    folder = evaluation(tmp_path / "a", [1, 0])
    read = load_evaluation(str(folder)).responses
    said = [{**response, "response": "one\u2028two\x85three\u2029"} for response in read]
    (folder / "responses.jsonl").write_bytes(to_lines(said))
    assert load_evaluation(str(folder)).responses == said


def test_words_are_no_tokens(tmp_path) -> None:
    """A server may give no ids: then the length is not known."""
    folder = Path(evaluation(tmp_path / "a", [1, 0]))
    told = load_evaluation(str(folder))
    lines = (folder / "responses.jsonl").read_text(encoding="utf-8").replace("[1]", "null")
    (folder / "responses.jsonl").write_text(lines, encoding="utf-8")
    silent = load_evaluation(str(folder))
    assert told.tokens == 1.5 and silent.tokens != silent.tokens
    assert stage_table([silent], ["right"], {}).loc["a", "tokens"] == "–"


def test_a_row_with_several_answers_says_how_many_are_right() -> None:
    assert [_mark(values) for values in ([1.0], [False], [True, False, None, 0.0], [0.1, 1.0], [None])] == [
        "✓", "✗", "1/3", "0.55", "–",
    ]  # fmt: skip


def test_settings_that_differ_besides_the_model_are_told(tmp_path) -> None:
    a, b = evaluation(tmp_path / "a", [0, 1]), evaluation(tmp_path / "b", [1, 1], sampling={"temperature": 1}, seed=1)
    page = compare(CompareConfig((str(a), str(b)), str(tmp_path / "page.html")))
    assert "differ in more than the model: seed" in page.read_text(encoding="utf-8")


def test_scorers_of_different_units_are_not_mixed(tmp_path) -> None:
    """A change of 0.5 characters is no change of 50 points, and lengths are not drawn beside shares."""
    folders = three(tmp_path)
    for folder in map(Path, folders):
        lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {"length": 30.0 + line["right"] / 2, "also": line["right"]}
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = compare(CompareConfig(tuple(folders), str(tmp_path / "page.html"))).read_text(encoding="utf-8")
    lines = re.findall(r"<tr><td>sft</td><td>([\w, %]+)</td><td>([\d.]+) .*?</td><td>(\S+) ", text)
    assert lines == [("right, %", "62.5", "+37.5"), ("length", "30.3", "+0.188"), ("also, %", "62.5", "+37.5")]
    [alt] = re.findall(r'alt="(right: [^"]*)"', text)
    assert "also: initial 25.0" in alt and "length" not in alt
    assert "Gained and lost by skill: length" in text and "points of right, by the stage" in text


def refusal(capsys, *arguments: str) -> str:
    assert cli.main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys) -> None:
    a = evaluation(tmp_path / "a", [0, 1, 1])
    rows = [{"instruction": f"question {n}", "output": "other" if n == 1 else str(n), "skill": SKILLS[n % 2]}
            for n in range(3)]  # fmt: skip
    b = evaluation(tmp_path / "b", [0, 1, 1], rows=rows)
    said = refusal(capsys, "--evaluations", f"[{a},{b}]")
    assert "b must be of the rows of a, got another row 2: output 'other' for '1'" in said
    c = evaluation(tmp_path / "c", [0, 1, 1, 0])
    assert "got 4 rows and 4 responses for 3 and 3" in refusal(capsys, "--evaluations", f"[{a},{c}]")
    d = evaluation(tmp_path / "d", [0, 1, 1], samples=2)
    assert "got 3 rows and 6 responses for 3 and 3" in refusal(capsys, "--evaluations", f"[{a},{d}]")
    (d / "scores.jsonl").unlink()
    assert "must hold an evaluation that ended, got no scores.jsonl" in refusal(capsys, "--evaluations", f"[{a},{d}]")
    kept = (c / "responses.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (c / "responses.jsonl").write_text("".join(kept[:-1]), encoding="utf-8")
    assert "must hold a score for each response, got 4 rows, 3" in refusal(capsys, "--evaluations", f"[{c},{c}]")
    (c / "responses.jsonl").write_text("".join([*kept[:-1], "{torn"]), encoding="utf-8")
    assert "responses.jsonl, line 4 must be a JSON object" in refusal(capsys, "--evaluations", f"[{c},{c}]")
    lines = (b / "scores.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (b / "scores.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    assert "must hold a score for each response, got 3 rows, 3" in refusal(capsys, "--evaluations", f"[{b},{b}]")
    assert "evaluations must be two or more, got 1" in refusal(capsys, "--evaluations", str(a))
    other = tmp_path / "e"
    shutil.copytree(a, other)
    (other / "scores.jsonl").write_text((a / "scores.jsonl").read_text().replace("right", "exact"))
    assert "must share a scorer" in refusal(capsys, "--evaluations", f"[{a},{other}]")
    assert not list(tmp_path.glob("*.html"))


# Judges


@pytest.fixture(autouse=True)
def little_waiting(monkeypatch) -> None:
    monkeypatch.setattr(client_module, "PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("[[A]]", 1.0), ("[[B]]", 0.0), ("Both are fine. [[C]]", 0.5), ("[[A]] indeed, [[A]]", 1.0),
        ("A is better", None), ("[A]", None), ("[[A]] or [[B]]", None), ("", None), ("[[D]]", None),
        ("<think>[[A]]? no</think>\n[[B]]", 0.0), ("<think>[[A]]", None),
    ],
)  # fmt: skip
def test_a_verdict_is_read_strictly(said: str, verdict: float | None) -> None:
    assert judge.verdict_of(said) == verdict


@pytest.mark.parametrize(("said", "value"), [("reward:-18.73", -18.73), (" reward: 4\n", 4.0), ("reward:", None),
                                             ("-18.73", None), ("reward:1e3", None), ("reward:nan", None)])  # fmt: skip
def test_a_reward_is_read_strictly(said: str, value: float | None) -> None:
    assert judge.reward_of(said) == value


def chat(text: str) -> dict:
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": usage}


def planted(path: str, body: dict) -> dict:
    """Takes A on odd questions, whatever it is; on even ones what `sft` says; question 6 is not readable."""
    [message] = body["messages"]
    number = int(re.search(r"question (\d)", message["content"])[1])
    first, second = re.findall(r"\[Answer [AB]\]\n(.*)\n", message["content"])
    assert body["temperature"] == 0 and body["model"] == "judge"
    if number == 6:
        return chat("I cannot decide.")
    return chat("[[A]]" if number % 2 or first.startswith("sft") else "[[B]]" if second.startswith("sft") else "[[C]]")


def test_a_judge_with_a_planted_bias_over_http(tmp_path) -> None:
    """A third of the requests fails in several ways; the figures are those of the plan, and a second time asks nothing.

    8 questions, sft against initial: 4 by the order (odd), 3 won (0, 2, 4), 1 unreadable twice.
    """
    folders = three(tmp_path)[:2]
    faults = {"429": 0.1, "500": 0.1, "reset": 0.1}
    with Flaky(planted, faults, retry_after=0.01) as server:
        options = {"judge": ServerConfig(server.url, "judge", threads=4, retries=9)}
        config = CompareConfig(tuple(folders), str(tmp_path / "page.html"), **options)
        [(name, found)] = win_rates([load_evaluation(folder) for folder in folders], config).items()
        assert name == "sft against initial"
        assert (found.wins, found.ties, found.losses, found.unread) == (3, 5, 0, 2)
        assert found.rate == (3 + 5 / 2) / 8 and found.by_order == 0.5
        assert found.first == (4 * 2 + 3 + 1) / 16, "odd: always; even: half of 6; unreadable: two halves"
        answered = sum(server.answered.values())
        text = compare(config).read_text(encoding="utf-8")
        assert sum(server.answered.values()) == answered == 16, "the journal beside the page has all"
    for words in (
        "<td>sft against initial</td>",
        "68.8",
        "<td>50\u00a0%</td>",
        "<td>75\u00a0%</td>",
        "Judged by judge, each pair in",
    ):
        assert words in text
    strict = CompareConfig(tuple(folders), str(tmp_path / "page.html"), ties_lose=True, **options)
    [found] = win_rates([load_evaluation(folder) for folder in folders], strict).values()
    assert found.rate == 3 / 8, "the journal answers, though the server is gone"


def test_a_reward_endpoint_is_asked_once_for_each_answer(tmp_path) -> None:
    """Longer is better here; one answer gets no number."""
    folders = [evaluation(tmp_path / name, [1] * 4, said=lambda n, sample, k=k: "x" * (1 + n * k))
               for k, name in enumerate(("none", "some", "more"))]  # fmt: skip

    def rewards(path: str, body: dict) -> dict:
        user, assistant = body["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        return chat(f"reward:-{10 - len(assistant['content'])}.5" if len(assistant["content"]) < 7 else "reward:?")

    with Flaky(rewards) as server:
        config = CompareConfig(tuple(map(str, folders)), str(tmp_path / "page.html"), judge_gives="reward",
                               judge=ServerConfig(server.url, "reward", threads=2))  # fmt: skip
        found = win_rates([load_evaluation(folder) for folder in folders], config)
        assert sum(server.answered.values()) == 4 + 3 + 3, "equal answers to one question are one"
    assert list(found) == ["some against none", "more against some", "more against none"]
    some = found["some against none"]
    assert (some.wins, some.ties, some.losses, some.by_order, some.first, some.unread) == (3, 1, 0, 0, 0.5, 0)
    assert found["more against none"].unread == 2 and found["more against none"].rate == (2 + 2 * 0.5) / 4


def test_a_reward_model_in_this_process(tmp_path) -> None:
    import torch

    tokenizer = load_tokenizer("tiny")
    model = reward_model(load_model("tiny"), tokenizer)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(0)))
    save_model(model, tokenizer, tmp_path / "reward")
    folders = three(tmp_path)[:2]
    config = CompareConfig(tuple(folders), str(tmp_path / "page.html"), reward_model=str(tmp_path / "reward"), judged=6,
                           device="cpu")  # fmt: skip
    [found] = win_rates([load_evaluation(folder) for folder in folders], config).values()
    score = ModelReward.load(str(tmp_path / "reward"))
    wins = 0
    for n in range(6):
        asked = [{"role": "user", "content": f"question {n}"}]
        wins += score(asked, [], f"sft says {n}", {}) > score(asked, [], f"initial says {n}", {})
    assert (found.wins, found.wins + found.ties + found.losses, found.first) == (wins, 6, 0.5)
    text = compare(config).read_text(encoding="utf-8")
    assert "Judged by reward, each pair in both orders, on the first 6 rows" in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge.url", "http://127.0.0.1:1/v1"], "judge must have both url and model"),
        (
            ["--judge.url", "http://127.0.0.1:1/v1", "--judge.model", "m", "--reward_model", "r"],
            "must not both be given",
        ),
        (["--output", "page.pdf"], "output must end in .html or .md, got 'page.pdf'"),
        (["--judged", "0"], "judged"),
    ],
)
def test_settings_are_checked(arguments: list, words: str, tmp_path, capsys) -> None:
    assert words in refusal(capsys, "--evaluations", "[a,b]", *arguments)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 900])
def test_one_screen_holds_what_each_stage_gave_and_cost(width: int, tmp_path) -> None:
    """Table and pictures end within 800 pixels, and nothing is wider than the window."""
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium on the path")
    marks = [[n % 5 == stage or stage > n % 7 for n in range(120)] for stage in range(4)]
    folders = [str(evaluation(tmp_path / name, part, said=lambda n, sample: "word" * 60))
               for name, part in zip(("initial", "sft", "dpo", "rloo"), marks, strict=True)]  # fmt: skip
    page = compare(CompareConfig(tuple(folders), str(tmp_path / "page.html")))
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        try:
            view = browser.new_page(viewport={"width": width, "height": 800})
            asked: list[str] = []
            view.on("request", lambda request: asked.append(request.url))
            view.goto(page.as_uri())
            size = (
                "[document.documentElement.scrollWidth, document.querySelector('img').getBoundingClientRect().bottom]"
            )
            wide, bottom = view.evaluate(size)
            assert wide <= width and bottom <= 800
            assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        finally:
            browser.close()
