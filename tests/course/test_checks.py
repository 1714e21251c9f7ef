"""Exercise checks: every exercise against stub, right, wrong and delegating answers; the guard; messages; displays."""

from __future__ import annotations

import functools
import itertools
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from exercise_answers import ANSWERS, dpo_in_numbers
from torch.nn import functional as F

from qftlab.maths.losses import masked_cross_entropy
from qftlab_course import check_guard, checks
from qftlab_course.check_compare import as_tensor, bulk, difference, general_suspect, show
from qftlab_course.check_guard import Forbidden, guarded, resolve
from qftlab_course.exercises import Exercise, Suspect, get_exercise, nb03, notebooks, of_notebook

IDS = [name for notebook in notebooks() for name in of_notebook(notebook)]
# The mistakes that a suspect implements, each with the whole line that names it, and those that none does.
MISTAKES = [(name, s.like, f"suspect: {s.message}\n") for name in IDS for s in get_exercise(name).suspects if s.like]
WRONG = MISTAKES + [(name, *pair) for name in IDS for pair in ANSWERS[name].wrong]
MISTAKE = {name: wrong for name, wrong, _ in reversed(MISTAKES)}  # the first of each exercise
SEEDS = (0, 1, 2)
NOTHING = Forbidden({})


@pytest.fixture(autouse=True)
def fresh_memory():
    checks.forget()
    yield
    checks.forget()


def test_every_exercise_has_answers() -> None:
    assert list(ANSWERS) == IDS
    for name in IDS:
        assert len(ANSWERS[name].right) >= 2 and name in MISTAKE
        assert get_exercise(name).suspects and get_exercise(name).instead


@pytest.mark.parametrize("name", IDS)
def test_stub_is_not_attempted(name: str) -> None:
    results = {repr(checks.check(name, ANSWERS[name].stub)) for _ in range(3)}
    assert len(results) == 1, "the text must not depend on the inputs drawn"
    assert re.match(rf"{name} not attempted yet · .*{ANSWERS[name].stub.__name__}", results.pop())
    for blank in (..., None, lambda *args: None):
        assert checks.check(name, blank).status == "unattempted"


@pytest.mark.parametrize("name, right", [(name, f) for name in IDS for f in ANSWERS[name].right])
def test_right_answers_pass(name: str, right) -> None:
    results = [checks.check(name, right, seed=seed) for seed in (*SEEDS, None)]
    assert all(results), results
    assert len(set(map(repr, results))) == 1
    assert repr(results[0]).startswith(f"✓ {name} passed") and "\n" not in repr(results[0])


@pytest.mark.parametrize("name, wrong, words", WRONG)
def test_wrong_answers_fail_with_a_useful_message(name: str, wrong, words: str) -> None:
    """A suspect's own mistake is no right answer, no delegation, no exception, and not that of another suspect."""
    for seed in SEEDS:
        result = checks.check(name, wrong, seed=seed)
        text = repr(result)
        assert result.status == "failed" and not result and text.startswith(f"✗ {name} not yet")
        assert words in text, text
        for part in ("smallest failing input", "got:", "wanted:", f"seed={seed}"):
            assert part in text, text
        assert "Traceback" not in text and "0x" not in text


@pytest.mark.parametrize("name", IDS)
def test_delegation_is_refused(name: str) -> None:
    reference = checks.reference_of(get_exercise(name))
    wrapped = functools.wraps(reference)(lambda *args: reference(*args))
    table = {"f": reference}
    hidden = {
        "alias": reference,
        "partial": functools.partial(reference),
        "wrapper": wrapped,
        "call": lambda *args: reference(*args),
        "out of a table": lambda *args: table["f"](*args),
    }
    for way, answer in hidden.items():
        result = checks.check(name, answer, seed=0)
        assert result.status == "refused" and repr(result).startswith(f"✗ {name} refused"), (way, result)
        assert "Instead, " in repr(result) and get_exercise(name).instead in repr(result)


@pytest.mark.parametrize("name", IDS)
def test_forbidden_names_exist(name: str) -> None:
    assert checks.forbidden_of(get_exercise(name)).codes


@pytest.mark.parametrize("name", IDS)
def test_failing_inputs_are_found_small_and_draws_repeat(name: str) -> None:
    exercise = get_exercise(name)
    sizes = [bulk(exercise.draw(random.Random(0), size)) for size in range(1, exercise.sizes + 1)]
    assert sizes[0] <= sizes[-1]
    a, b = (exercise.draw(random.Random(7), 5) for _ in range(2))
    assert show(a) == show(b)
    assert checks.check(name, MISTAKE[name], seed=3) == checks.check(name, MISTAKE[name], seed=3)


# Delegation, hidden in the ways a student might ---------------------------------------------------------------------
def loss_through_module(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_through_local_import(logits, labels):
    from torch.nn.functional import cross_entropy as ce

    return ce(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_through_import_as(logits, labels):
    import torch.nn.functional as fun

    return fun.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_through_class(logits, labels):
    return torch.nn.CrossEntropyLoss()(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


MEAN_LOSS = torch.nn.CrossEntropyLoss()


def loss_through_instance(logits, labels):
    return MEAN_LOSS(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_through_getattr(logits, labels):
    return getattr(F, "cross_" + "entropy")(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_through_default(logits, labels, f=masked_cross_entropy):
    return f(logits, labels)


def loss_through_helper(logits, labels):
    return loss_through_inner(logits, labels)


def loss_through_inner(logits, labels):
    def inner():
        return masked_cross_entropy(logits, labels)

    return inner()


class LossObject:
    def __call__(self, logits, labels):
        return masked_cross_entropy(logits, labels)


class LossMethod:
    def loss(self, logits, labels):
        return masked_cross_entropy(logits, labels)


HIDDEN = [
    (loss_through_module, "torch.nn.functional.cross_entropy"),
    (loss_through_local_import, "torch.nn.functional.cross_entropy"),
    (loss_through_import_as, "torch.nn.functional.cross_entropy"),
    (loss_through_class, "torch.nn.CrossEntropyLoss"),
    (loss_through_instance, "torch.nn.CrossEntropyLoss"),
    (loss_through_getattr, "torch.nn.functional.cross_entropy"),
    (loss_through_default, "qftlab.maths.losses.masked_cross_entropy"),
    (loss_through_helper, "qftlab.maths.losses.masked_cross_entropy"),
    (loss_through_inner, "qftlab.maths.losses.masked_cross_entropy"),
    (LossObject(), "qftlab.maths.losses.masked_cross_entropy"),
    (LossMethod().loss, "qftlab.maths.losses.masked_cross_entropy"),
]


@pytest.mark.parametrize("answer, culprit", HIDDEN, ids=lambda v: getattr(v, "__name__", str(v)[:20]))
def test_hidden_delegation_is_named(answer, culprit: str) -> None:
    result = checks.check("03.1", answer)
    assert result.status == "refused" and f"uses {culprit}" in repr(result), result


def test_spy_sees_torch_methods_and_builtins_under_any_name() -> None:
    spied = Forbidden({n: resolve(n) for n in ("torch.Tensor.softmax", "torch.topk", "builtins.sorted")})
    held = {"topk": torch.topk, "sorted": sorted}
    assert guarded(lambda x: x.softmax(-1), (torch.ones(2),), 5, spied).calls == ("torch.Tensor.softmax",)
    assert guarded(lambda x: held["topk"](x, 1), (torch.ones(2),), 5, spied).calls == ("torch.topk",)
    assert guarded(lambda x: held["sorted"](x), ([2, 1],), 5, spied).calls == ("builtins.sorted",)
    assert guarded(lambda x: x.log_softmax(-1), (torch.ones(2),), 5, spied).calls == ()


def test_spy_gives_back_what_it_found() -> None:
    def hook(frame, event, arg):
        return None

    sys.setprofile(hook)
    try:
        guarded(lambda: 1 / 0, (), 5, NOTHING)
        assert sys.getprofile() is hook
    finally:
        sys.setprofile(None)
    handler = signal.getsignal(signal.SIGALRM)
    guarded(lambda: [1 for _ in iter(int, 1)], (), 0.1, NOTHING)
    assert signal.getsignal(signal.SIGALRM) is handler and sys.getprofile() is None
    assert torch.overrides._get_current_function_mode() is None


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(ValueError, match="torch.no_such_thing must name something that can be imported"):
        resolve("torch.no_such_thing")


# Time limit ---------------------------------------------------------------------------------------------------------
def endless():
    while True:
        pass


def endless_in_torch():
    x = torch.ones(64, 64)
    while True:
        x = x @ x * 0


def endless_swallowing_exceptions():
    while True:
        try:
            sum(range(100))
        except Exception:
            pass


def endless_swallowing_everything():
    while True:
        try:
            sum(range(100))
        except:  # noqa: E722
            pass


def asleep():
    time.sleep(30)


def endless_and_slow_swallowing_everything():
    x = torch.ones(256, 256)
    while True:
        try:
            x = x @ x * 0
        except:  # noqa: E722
            x = torch.ones(256, 256)


LATE = [endless, endless_in_torch, endless_swallowing_exceptions, endless_swallowing_everything, asleep]
LATE.append(endless_and_slow_swallowing_everything)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
@pytest.mark.parametrize("answer", LATE)
def test_time_limit_by_signal(answer) -> None:
    started = time.monotonic()
    outcome = guarded(answer, (), 0.2, NOTHING)
    assert outcome.timed_out and time.monotonic() - started < 5


@pytest.mark.parametrize("answer", LATE[:3])
def test_time_limit_by_thread_as_on_windows(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "setitimer", raising=False)
    started = time.monotonic()
    outcome = guarded(answer, (), 0.2, NOTHING)
    assert outcome.timed_out and time.monotonic() - started < 5
    assert not [t for t in threading.enumerate() if t.name == "qftlab-check"], "the worker must have died"


def test_a_thread_that_ignores_everything_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "setitimer", raising=False)
    monkeypatch.setattr(check_guard, "_GRACE", 0.1)
    stdout, started = sys.stdout, time.monotonic()
    outcome = guarded(lambda: time.sleep(2), (), 0.1, NOTHING)
    assert outcome.timed_out and time.monotonic() - started < 1.5 and sys.stdout is stdout


def test_checks_work_outside_the_main_thread() -> None:
    found = {}

    def work() -> None:
        found["right"] = checks.check("03.1", ANSWERS["03.1"].right[0], seed=0)
        found["refused"] = checks.check("03.1", loss_through_getattr, seed=0)
        found["late"] = checks.check("03.2", lambda counts: endless(), seconds=0.2)
        found["error"] = checks.check("03.2", lambda counts: counts[99], seed=0)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(60)
    assert found["right"] and found["refused"].status == "refused"
    assert "no answer within the time limit" in repr(found["late"])
    assert "IndexError" in repr(found["error"])


def test_someone_elses_timer_goes_on() -> None:
    before = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        guarded(lambda: 1, (), 5, NOTHING)
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 40 < left <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_an_endless_answer_is_reported_and_nothing_hangs() -> None:
    started = time.monotonic()
    result = checks.check("03.2", lambda counts: endless(), seconds=0.3)
    assert result.status == "failed" and "does a loop never end?" in repr(result)
    assert time.monotonic() - started < 10


def test_interrupt_by_the_reader_is_not_swallowed() -> None:
    def interrupted(counts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checks.check("03.2", interrupted)


# Messages -----------------------------------------------------------------------------------------------------------
def weights_with_bug(token_counts):
    total = sum(token_counts)
    missing = {}
    return [count / missing["total"] for count in token_counts], total


def test_an_exception_shows_the_students_line() -> None:
    text = repr(checks.check("03.2", weights_with_bug))
    assert "got:     KeyError: 'total'" in text
    assert re.search(r"in: +line \d of .*: +return \[count / missing", text), text
    assert "check_guard" not in text


def test_an_exception_inside_torch_shows_the_students_line_too() -> None:
    text = repr(checks.check("03.1", lambda logits, labels: torch.cat([logits, labels])))
    assert "torch.cat([logits, labels])" in text and "RuntimeError" in text


def test_a_wrong_signature_is_explained() -> None:
    text = repr(checks.check("03.2", lambda: []))
    assert "takes 0 positional arguments" in text and "the call your lambda(token_counts)" in text


def test_the_answer_exits_prints_or_forgets_to_return(capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(token_counts):
        print("counts", token_counts)
        return [0.0 for _ in token_counts]

    def forgets(token_counts):
        if len(token_counts) < 3:
            return [count / sum(token_counts) for count in token_counts]

    assert "printed: 'counts [" in repr(checks.check("03.2", noisy))
    assert "SystemExit" in repr(checks.check("03.2", lambda counts: sys.exit(3)))
    assert "is a return missing?" in repr(checks.check("03.2", forgets))
    assert "pass the function itself" in repr(checks.check("03.2", [0.5, 0.5]))
    assert capsys.readouterr().out == ""


def test_the_smallest_failing_input_is_small() -> None:
    def wrong_from_three_on(token_counts):
        return [count / sum(token_counts) + (len(token_counts) > 2) for count in token_counts]

    text = repr(checks.check("03.2", wrong_from_three_on))
    shown = re.search(r"token_counts = (\[.*\])", text).group(1)
    assert shown.count(",") == 2, text


def test_unknown_exercises_are_named() -> None:
    with pytest.raises(ValueError, match="must be one of 03.1, 03.2, 03.3, 03.4, 03.5, got '03.9'"):
        checks.check("03.9", None)
    with pytest.raises(ValueError, match=rf"with exercises \({', '.join(notebooks())}\), got '99'"):
        checks.check("99.1", None)
    with pytest.raises(ValueError, match="dots must be 1, 2 or 3, got 4"):
        Exercise("09.1", "x", 4, 1, len, lambda r, s: (), "y")
    with pytest.raises(ValueError, match="either like or when"):
        Suspect("x")


# Comparison ---------------------------------------------------------------------------------------------------------
NAN = float("nan")
DIFFERENCES = [
    (torch.ones(2, 3), torch.ones(2, 4), "shape (2, 3), wanted (2, 4)"),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), "at [1]: 2, wanted 2.5 (1 of 2 entries differ)"),
    (torch.tensor(NAN), torch.tensor(NAN), "nan, wanted nan"),
    (NAN, NAN, "nan, wanted nan"),
    (2.0, 1.0, "2, wanted 1"),
    (151_645, 151_646, "151645, wanted 151646"),
    (torch.tensor([151_645]), torch.tensor([151_646]), "at [0]: 151645, wanted 151646"),
    ("abc", "abd", "'abc', wanted 'abd': differs from character 2 on"),
    ("ab", "abc", "'ab', wanted 'abc': ends at character 2"),
    ([1, 2], [1, 2, 3], "2 entries, wanted 3"),
    ([1, [2, 4]], [1, [2, 3]], "at [1][1]: 4, wanted 3"),
    ({"a": 1}, {"a": 1, "b": 2}, "the key 'b' is missing"),
    ({"a": 1, "c": 1}, {"a": 1}, "the key 'c' is not wanted"),
    ({"a": [torch.ones(2)]}, {"a": [torch.zeros(2)]}, "at ['a'][0][0]: 1, wanted 0"),
    ("1", 1, "a str, wanted an int"),
    ([1], 1.0, "a list, wanted a number"),
    (3, [3], "an int, wanted a list of 1"),
    (None, 3, "got None: is a `return` missing?"),
]


@pytest.mark.parametrize("got, wanted, words", DIFFERENCES)
def test_differences_in_words(got, wanted, words: str) -> None:
    assert words in difference(got, wanted, 1e-5, 1e-4)


@pytest.mark.parametrize(
    "got, wanted",
    [
        (torch.ones(2, dtype=torch.float64), torch.ones(2)),
        (torch.tensor([1, 0]), torch.tensor([True, False])),
        (torch.tensor([float("-inf"), 1.0]), torch.tensor([float("-inf"), 1.0])),
        (torch.tensor(1.0, requires_grad=True), 1.0),
        (1.0, torch.tensor(1.0)),
        ([1, 2], torch.tensor([1, 2])),
        ((1, 2), [1, 2]),
        (torch.tensor([1.0]).numpy(), torch.tensor([1.0])),
        (torch.tensor([0.5]).numpy(), [0.5]),
        (1, 1.0),
        ({"a": (1, "x")}, {"a": [1, "x"]}),
        ({1, 2}, {2, 1}),
    ],
)
def test_equal_values_of_other_kinds(got, wanted) -> None:
    assert difference(got, wanted, 1e-5, 1e-4) is None


def test_general_suspects() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    assert "NaN" in general_suspect(x * NAN, x)
    assert "sign is flipped" in general_suspect(-x, x)
    assert "3 times the wanted value" in general_suspect(3 * x, x)
    assert "order" in general_suspect(x.flip(0), x)
    assert "axes are swapped" in general_suspect(torch.ones(2, 3), torch.ones(3, 2))
    assert "opposite" in general_suspect(torch.tensor([True, False]), torch.tensor([False, True]))
    assert general_suspect("a", "b") is None and general_suspect(x + 1, x) is None


# Displays -----------------------------------------------------------------------------------------------------------
def test_or_library_says_which_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="qftlab_course.checks")
    right = ANSWERS["03.1"].right[0]
    assert checks.or_library("03.1", right).__wrapped__ is right
    assert checks.or_library("03.1", ANSWERS["03.1"].stub) is masked_cross_entropy
    assert checks.or_library("03.2", MISTAKE["03.2"]) is nb03.weights
    assert [record.getMessage() for record in caplog.records] == [
        "✓ 03.1: the next cells run on your loss_by_gather.",
        "03.1 not attempted yet: the next cells run on the library's version.",
        "✗ 03.2 not yet: the next cells run on the library's version.",
    ]


def form(value) -> object:
    """What a value is made of: types, shapes and dtypes, without the numbers."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.requires_grad)
    if isinstance(value, list | tuple):
        return (type(value), *map(form, value))
    return type(value)


def as_float64(value):
    """Numbers as NumPy has them, tensors with twice the bits and a gradient."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.requires_grad else value.double().requires_grad_()
    return np.float64(value) if type(value) in (bool, int, float) else value


def as_lists(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [as_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def as_tuples(value):
    listed = as_lists(value)
    return tuple(map(as_tuples, listed)) if isinstance(listed, list) else listed


def as_array(value):
    whole = as_tensor(value)
    return value if whole is None else whole.numpy()


@pytest.mark.parametrize("name", IDS)
def test_or_library_gives_later_cells_the_librarys_form(name: str) -> None:
    """Whatever form of an answer passes the check, the cells after it get the one that they were written for."""
    exercise = get_exercise(name)
    reference, passed = checks.reference_of(exercise), 0
    for right, change in itertools.product(ANSWERS[name].right, (as_float64, as_lists, as_tuples, as_array)):
        odd = checks.or_library(name, answer := lambda *args, f=right, g=change: g(f(*args)), seed=0)  # noqa: B023
        if odd is reference:  # this form does not pass
            continue
        passed += odd.__wrapped__ is answer
        for size in range(1, exercise.sizes + 1):
            args = exercise.draw(random.Random(size), size)
            live = [a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
            wanted = reference(*(live if exercise.is_trained else args))
            assert form(odd(*live)) == form(wanted), (right, change, size)
            assert difference(odd(*live), wanted, exercise.atol, exercise.rtol) is None
    assert passed >= (1 if exercise.is_trained else 4)


def test_or_library_trains_through_an_answer_as_through_the_librarys() -> None:
    """Notebook 07 trains a bandit through 07.1; an answer without a gradient leaves the policy as it is."""
    gradients = []
    for loss in (get_exercise("07.1").reference, checks.or_library("07.1", ANSWERS["07.1"].right[1], seed=0)):
        chosen = torch.tensor([-3.5, -2.0], requires_grad=True)
        loss(chosen, chosen.detach() - 1, torch.zeros(2), torch.zeros(2), 0.5).sum().backward()
        gradients.append(chosen.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().min() > 0.1
    assert checks.or_library("07.1", dpo_in_numbers, seed=0) is get_exercise("07.1").reference


def test_or_library_follows_the_precision_of_its_input() -> None:
    loss = checks.or_library("07.1", ANSWERS["07.1"].right[1], seed=0)
    pair = [torch.tensor([x], dtype=torch.float64) for x in (-3.5, -9.5, -4.0, -8.0)]
    assert loss(*pair, 0.5).dtype == torch.float64 and loss(*[x.float() for x in pair], 0.5).dtype == torch.float32


def test_or_library_displays_in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", shown.append)
    checks.or_library("03.2", None)
    assert repr(shown[0]) == "03.2 not attempted yet: the next cells run on the library's version."
    assert shown[0]._repr_markdown_().startswith("**03.2** not attempted yet")
    checks.or_library("03.2", ANSWERS["03.2"].right[0])
    assert shown[1]._repr_markdown_().startswith("✓ **03.2**: the next cells run on your")


def test_progress_counts_in_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checks.progress("03").passed == 0
    checks.check("03.1", ANSWERS["03.1"].right[0])
    checks.check("03.2", ANSWERS["03.2"].stub)
    checks.check("03.3", MISTAKE["03.3"])
    board = checks.progress("03")
    assert (board.passed, board.total) == (1, 5)
    assert repr(board).splitlines() == [
        "Notebook 03: 1 of 5 exercises passed",
        "03.1  ●●●  Masked cross-entropy by hand              ✓ passed",
        "03.2  ●○○  Weights of micro-batches in accumulation  not attempted yet",
        "03.3  ●●○  A learning rate with warm-up and cosine   ✗ not yet",
        "03.4  ●●○  A detector of leaked test prompts         not run",
        "03.5  ●●○  First-fit-decreasing                      not run",
    ]
    page = board._repr_html_()
    assert page.count("<tr>") == 6 and "1 of 5 exercises passed" in page and "style" not in page
    assert not list(tmp_path.iterdir())


def test_results_show_as_markdown_and_text() -> None:
    result = checks.check("03.2", MISTAKE["03.2"], seed=0)
    assert result._repr_markdown_().startswith("✗ **03.2** not yet") and "```text\n" in result._repr_markdown_()
    assert "`" not in repr(result)


CELLS = [
    "from qftlab_course import checks\n\ndef my_loss(logits, labels):\n    ...",
    "checks.check('03.1', my_loss)",
    "loss = checks.or_library('03.1', my_loss)\nloss.__name__",
    "def my_loss(logits, labels):\n    targets = labels[:, 1:]\n    return logits.gather(-1, labels.unsqueeze(-1))",
    "checks.check('03.1', my_loss)",
    "def my_loss(logits, labels):\n    while True: pass\nchecks.check('03.1', my_loss, seconds=0.3)",
    "checks.progress('03')",
]


def test_in_a_real_kernel(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    home = {"metadata": {"path": str(Path(__file__).resolve().parents[2])}}
    NotebookClient(notebook, kernel_name="python3", timeout=120, resources=home).execute()
    told = ["".join(out["data"]["text/plain"] for out in cell.outputs) for cell in notebook.cells]
    stem = "03.1 not attempted yet"
    assert told[1].startswith(f"{stem} · Masked cross-entropy by hand (●●●, 12 min)")
    assert told[2] == f"{stem}: the next cells run on the library's version.'masked_cross_entropy'"
    assert "in:      line 3 of my_loss:  return logits.gather(-1, labels.unsqueeze(-1))" in told[4]
    assert "suspect: −100 marks what is not trained and is no index" in told[4]
    assert "does a loop never end?" in told[5] and told[6].startswith("Notebook 03: 0 of 5 exercises passed")


# The oracles are the library's --------------------------------------------------------------------------------------
def test_oracles_agree_with_the_library() -> None:
    from qftlab.rows.batches import Example, pad
    from qftlab.settings import TrainConfig
    from qftlab.train.optimizer import learning_rate
    from qftlab_course.exercises import nb02

    for step in range(20):
        config = TrainConfig(lr=2e-3, warmup_ratio=0.2, schedule="cosine")
        assert learning_rate(config, step, 20) == pytest.approx(nb03.learning_rate(step, 20, 4, 2e-3), abs=1e-15)
    rows, pad_id = nb02._draw_rows(random.Random(0), 7)
    padded = pad([Example(row, [True] * len(row)) for row in rows], pad_id)["labels"]
    wanted = nb02.pad_labels(rows, pad_id)
    assert torch.equal(padded[:, 1:], wanted[:, 1:]), "the first token of a row is never a target"
    ids, mask = nb02._draw_targets(random.Random(0), 5)
    labels = pad([Example(ids.tolist(), mask.tolist())], 0)["labels"]
    assert torch.equal(labels[0, 1:], nb02.targets(ids, mask))


def test_oracles_of_decoding_agree_with_the_library_and_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, StopStringCriteria, TopPLogitsWarper

    from qftlab.maths.logprobs import entropy
    from qftlab.maths.sampling import SamplingParams, filter_logits
    from qftlab.rows.tokenizer import load_tokenizer
    from qftlab_course.exercises import nb04

    rng, tokenizer = random.Random(0), load_tokenizer("tiny")
    for size in range(1, 9):
        logits, temperature = nb04._draw_entropy(rng, size)
        torch.testing.assert_close(nb04.entropy(logits, temperature), entropy(logits / temperature))
        logits, p = nb04._draw_top_p(rng, size)
        ours = nb04.top_p(logits, p)
        assert torch.equal(ours, filter_logits(logits[None], SamplingParams(top_p=p))[0])
        assert torch.equal(ours, TopPLogitsWarper(p)(None, logits[None])[0])
        logits, seen, penalty = nb04._draw_penalty(rng, size)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None])[0]
        torch.testing.assert_close(nb04.penalise(logits, seen, penalty), theirs)
        pieces, stops = nb04._draw_pieces(rng, size)
        ids = [i for piece in pieces for i in tokenizer(piece).input_ids]
        said = [tokenizer.decode([i]) for i in ids]
        text, count = nb04.until_stop(said, stops)
        stop = StopStringCriteria(tokenizer, stops)
        hits = [bool(stop(torch.tensor([ids[: n + 1]]), None)) for n in range(len(ids))]
        assert (hits.index(True) + 1 if any(hits) else len(ids)) == count and "".join(said).startswith(text)
