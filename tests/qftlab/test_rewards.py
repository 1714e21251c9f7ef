"""The Countdown reward: parsed, never evaluated, exact, quick, and deaf to tricks."""

from __future__ import annotations

import random
import time
from fractions import Fraction
from pathlib import Path

import pytest
from countdown_solver import solve
from hypothesis import given
from hypothesis import strategies as st

from qftlab.maths.verify import (
    answer_reward,
    countdown_reward,
    exact_reward,
    extract_answer,
    first_token_reward,
    parse_expression,
    reasoned_reward,
)
from qftlab.rows.countdown import countdown_row, random_problem


def reward(expression: str, numbers: list[int] = (3, 4, 5), target: int = 35) -> float:
    return countdown_reward(f"<answer>{expression}</answer>", list(numbers), target)


@pytest.mark.parametrize(
    ("expression", "numbers", "target", "want"),
    [
        ("(3 + 4) * 5", [3, 4, 5], 35, 1.0),
        ("5*(4+3)", [3, 4, 5], 35, 1.0),
        (" ( ( 3 + 4 ) * 5 ) ", [3, 4, 5], 35, 1.0),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24, 1.0),  # 8 ÷ 1/3: needs exact fractions
        ("10 - 3 - 2", [2, 3, 10], 5, 1.0),  # left to right: 5, not 9
        ("24 / 4 / 3", [24, 4, 3], 2, 1.0),
        ("2 + 3 * 4", [2, 3, 4], 14, 1.0),  # product first: 14, not 20
        ("2 + 3 * 4", [2, 3, 4], 20, 0.1),
        ("3 + 4 + 5", [3, 4, 5], 35, 0.1),
        ("7 * 5", [3, 4, 5], 35, 0.1),  # right value, wrong numbers
        ("35", [3, 4, 5], 35, 0.1),
        ("(3 + 4) * 5 + 5 - 5", [3, 4, 5], 35, 0.1),  # a number used three times
        ("(3 + 4) * 5", [3, 4, 5, 5], 35, 0.1),  # one left out
        ("3 / (4 - 4)", [3, 4, 4], 0, 0.1),  # parses, has no value
        ("1 - 1 / (2 - 2) * 0", [1, 1, 2, 2, 0], 1, 0.1),
        ("1 / 3 * 3", [1, 3, 3], 1, 1.0),
    ],
)
def test_by_hand(expression: str, numbers: list[int], target: int, want: float) -> None:
    assert reward(expression, numbers, target) == want


@pytest.mark.parametrize(
    "trick",
    [
        *("2**3", "7//2", "2 ** 3", "2 * * 3", "__import__('os')", "3 + x", "-3 + 4", "+3", "3 - -4", "3 4", "(3)(4)"),
        *("3(4)", "1e3", "3.5", "3,4", "007", "٣ + ٤", "３ + ４", "²", "3 × 4", "3 − 4", "3 + 4 = 7", "", " ", "()"),
        *("(3", "3)", ")3(", "3 +", "* 3", "(3 + ) 4", "3 +\u00a04", "3 + 4; 5", "3 + 4 # 5", "'3'", "[3]", "3 % 4"),
        *("3 & 4", "lambda: 3", "None", "True", "0x10", "1_0"),
    ],
)
def test_what_is_no_expression_earns_nothing(trick: str) -> None:
    assert parse_expression(trick) is None
    assert reward(trick) == 0.0


def test_negative_numbers_of_the_row_keep_their_sign() -> None:
    """5 + -3 = 2 with the row's -3; a sign is no operation, so a row without one pays none."""
    for said in ("5 + -3", "5 + (-3)", "-3 + 5", "(-3)+5", "- 3 + 5"):
        assert countdown_reward(f"<answer>{said}</answer>", [5, -3], 2) == 1, said
    assert countdown_reward("<answer>-3 - -4 * 2</answer>", [-3, -4, 2], 5) == 1
    assert countdown_reward("<answer>5 - 3</answer>", [5, -3], 2) == 0.1, "3 is not among them"
    assert countdown_reward("<answer>-3 + 5</answer>", [5, 3], 2) == 0
    for trick in ("--3 + 5", "-(3) + 5", "+5 - 3", "5 -", "-", "5 --3 -", "-*3", "5 - - -3"):
        assert countdown_reward(f"<answer>{trick}</answer>", [5, -3], 2) == 0, trick


def test_reasoned_reads_what_follows_the_thinking() -> None:
    """Thinking of any length earns; two answers or 512 characters behind it do not."""
    long, right = "<think>" + "3 + 4 is 7. <answer>8</answer> " * 40 + "</think>\n", "<answer>3 + 4</answer>"
    rambling = right + " and so on" * 60
    score = [[kind(text, [3, 4], 7) for text in (right, long + right, rambling, long + rambling, long + right * 2)]
             for kind in (countdown_reward, reasoned_reward)]  # fmt: skip
    assert score == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_exactly_one_answer() -> None:
    good = "<answer>(3 + 4) * 5</answer>"
    for text in (good, f"3 + 4 = 7, 7 * 5 = 35. {good}", f"{good} Done."):
        assert countdown_reward(text, [3, 4, 5], 35) == 1.0
    for text in ("(3 + 4) * 5", good + good, f"{good}</answer>", f"<answer>{good}", "<answer>(3 + 4) * 5",
                 "</answer>(3 + 4) * 5<answer>", "<ANSWER>(3 + 4) * 5</ANSWER>", "<answer ></answer>", ""):  # fmt: skip
        assert countdown_reward(text, [3, 4, 5], 35) == 0.0, text
    assert extract_answer("a<answer> b </answer>c") == " b "


def test_unread_past_512_characters() -> None:
    good = "<answer>(3 + 4) * 5</answer>"
    assert countdown_reward(" " * (512 - len(good)) + good, [3, 4, 5], 35) == 1.0
    assert countdown_reward(" " * (513 - len(good)) + good, [3, 4, 5], 35) == 0.0
    assert countdown_reward(good + "x" * 600, [3, 4, 5], 35) == 0.0
    assert parse_expression("1" * 513) is None and parse_expression("1" * 512) is not None


BOMBS = [
    "(" * 400, ")" * 400, "(" * 240 + "1" + ")" * 240, "1" + "/2" * 240, "9" * 490, "*".join(["9999999"] * 60),
    "+".join(f"1/{n}" for n in range(1001, 1080)), "1/(" * 120 + "2" + ")" * 120, "1-" * 245 + "1", "((((1)+1)" * 50,
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_within_ten_milliseconds(bomb: str) -> None:
    text = f"<answer>{bomb}</answer>"
    assert len(text) <= 512 or bomb == BOMBS[6] and len(bomb) <= 640
    times = []
    for _ in range(5):
        start = time.process_time()
        assert countdown_reward(text, [1, 2], 3) in (0.0, 0.1)
        times.append(time.process_time() - start)
    assert min(times) < 0.010  # seconds, the contract; the least of five, since a shared core stalls


@given(st.text(alphabet="0123456789+-*/() .x<>\n²٣", max_size=60))
def test_never_raises_and_never_reads_more_than_python(text: str) -> None:
    """Whatever parses here parses in Python to the same value: no expression is read in two ways."""
    expression = parse_expression(text)
    assert reward(text) in (0.0, 0.1, 1.0)
    if expression is None or expression.value is None:
        return
    digits = "".join(f"Fraction({part})" if part.isdigit() else part for part in split_numbers(text))
    assert eval(digits.replace("\n", " ").strip(), {"Fraction": Fraction}) == expression.value


def split_numbers(text: str) -> list[str]:
    parts = [""]
    for character in text:
        if parts[-1] and character.isdigit() != parts[-1][-1].isdigit():
            parts.append("")
        parts[-1] += character
    return parts


trees = st.recursive(
    st.integers(0, 30), lambda child: st.tuples(child, st.sampled_from("+-*/"), child), max_leaves=7
)  # fmt: skip


def written(tree: int | tuple) -> str:
    return str(tree) if isinstance(tree, int) else f"({written(tree[0])} {tree[1]} {written(tree[2])})"


def worth(tree: int | tuple) -> Fraction | None:
    if isinstance(tree, int):
        return Fraction(tree)
    a, b = worth(tree[0]), worth(tree[2])
    if a is None or b is None or (tree[1] == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b}.get(tree[1]) if tree[1] != "/" else a / b


def leaves(tree: int | tuple) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[2])


@given(trees)
def test_against_a_tree_worked_out_beside_it(tree: int | tuple) -> None:
    expression = parse_expression(written(tree))
    assert expression.value == worth(tree)
    assert list(expression.numbers) == leaves(tree)


def test_the_generators_solutions_earn_one() -> None:
    rng = random.Random(0)
    for count in (2, 3, 4):
        for _ in range(100):
            row = countdown_row(random_problem(rng, num_numbers=count))
            assert countdown_reward(row["output"], row["numbers"], row["target"]) == 1.0
            assert reward(solve(row["numbers"], row["target"]), row["numbers"], row["target"]) == 1.0
            assert countdown_reward(row["output"], row["numbers"], row["target"] + 1) == 0.1


# Attacks


def test_all_hints_of_the_real_data_earn_one(real_data: Path) -> None:
    import pandas

    files = [real_data / "countdown" / f"uft_countdown_{part}.parquet" for part in ("train", "test")]
    rows = [row for file in files for row in pandas.read_parquet(file).to_dict("records")]
    assert len(rows) == 11_264
    for row in rows:
        numbers, target = [int(n) for n in row["nums"]], int(row["target"])
        assert countdown_reward(row["answer"], numbers, target) == 1.0, row["answer"]
        said = row["hint"][-1].removeprefix("Therefore, the final equation is ")
        assert reward(said, numbers, target) == 1.0, said
        assert reward(said, numbers, target + 1) == 0.1 and reward(said, [*numbers, 1], target) == 0.1


DIGITS = ["٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "०१२३४५६७८९", "⁰¹²³⁴⁵⁶⁷⁸⁹", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗"]
NAMES = ["abs", "int", "sum", "pow", "eval", "None", "True", "target", "answer", "x", "e", "inf", "nan", "max", "E1"]
PARTS = ["__class__", "real", "numerator", "__add__", "bit_length()", "__class__.__bases__[0].__subclasses__()"]
CODE = ["__import__('pathlib').Path({!r}).touch()", "open({!r}, 'w')", "exec(\"open({!r}, 'w')\")",
        "(lambda: open({!r}, 'w'))()", "[open({!r}, 'w') for _ in (1,)]", "f\"{{open({!r}, 'w')}}\"",
        "eval(compile(\"open({!r}, 'w')\", '', 'eval'))", "print(open({!r}, 'w'))"]  # fmt: skip


def attacks(count: int, trap: str) -> list[tuple[str, list[int], int, float, str]]:
    """(text, numbers, target, what the contract pays, kind), drawn from a seed; the problem can be solved honestly."""
    chance, made = random.Random(0), []
    while len(made) < count:
        problem = random_problem(chance, num_numbers=chance.choice((2, 3, 4)))
        numbers, target, right = list(problem.numbers), problem.target, problem.solution
        a, b = numbers[:2]
        rest = "".join(f" + {n}" for n in numbers[2:])
        digit = chance.choice(DIGITS)
        strange = "".join(digit[int(c)] if c.isdigit() else c for c in right)
        deep, deepest = chance.randint(60, 120), "(" * 10_000 + right + ")" * 10_000
        joined = "".join(map(str, numbers))
        giant = "9" * chance.randint(60, 400)
        inside = [
            ("power", f"{a} ** {b}{rest}", 0.0), ("power", f"{a}**{b}", 0.0), ("power", f"{a} ^ {b}{rest}", 0.0),
            ("floor division", f"{a} // {b}{rest}", 0.0), ("modulo", f"{a} % {b}{rest}", 0.0),
            ("unary", f"-{a} + {b}{rest}", 0.0), ("unary", f"+{right}", 0.0), ("unary", f"{a} - -{b}{rest}", 0.0),
            ("unary", f"~{a} + {b}{rest}", 0.0), ("unary", f"-({right})", 0.0), ("unary", f"0 - {right}", 0.1),
            ("joined digits", joined, 0.1), ("joined digits", f"{a} {b}{rest}", 0.0),
            ("joined digits", f"{a}_{b}", 0.0),
            ("target alone", str(target), 0.1), ("target alone", f"{target} * 1", 0.1),
            ("leading zero", f"0{a} + {b}{rest}", 0.0), ("used twice", f"{right} + {a} - {a}", 0.1),
            ("unicode digits", strange, 0.0), ("unicode sign", right.replace(" ", "\u2009"), 0.0),
            ("unicode sign", f"{a} \u00d7 {b}{rest}", 0.0), ("unicode sign", f"{a} \u2212 {b}{rest}", 0.0),
            ("nesting", deepest, 0.0), ("nesting", "(" * deep + right + ")" * deep, 1.0),
            ("nesting", "(" * deep + right + ")" * (deep - 1), 0.0), ("nesting", "(" * 10_000, 0.0),
            ("giant number", giant, 0.1),
            ("giant number", f"{right} + {giant} - {giant}", 0.1 if len(giant) < 200 else 0.0),
            ("giant number", "9" * 5_000, 0.0), ("giant number", f"{a}e308", 0.0), ("giant number", f"1/{giant}", 0.1),
            ("name", chance.choice(NAMES), 0.0), ("name", f"{chance.choice(NAMES)}({right})", 0.0),
            ("attribute", f"({right}).{chance.choice(PARTS)}", 0.0), ("attribute", f"{a} .{chance.choice(PARTS)}", 0.0),
            ("code", chance.choice(CODE).format(trap), 0.0), ("code", f"{right}; " + CODE[0].format(trap), 0.0),
            ("code", f"{right} if True else 0", 0.0), ("code", f"{right} # {a}", 0.0),
            ("code", f"{right} == {target}", 0.0),
            ("equation", f"{right} = {target}", 0.0), ("nothing", "()", 0.0), ("zero", f"{a} / ({b} - {b})", 0.1),
            ("comma", f"{right}, {right}", 0.0), ("float", f"{a}.0 + {b}{rest}", 0.0),
            ("hex", f"0x{a} + {b}{rest}", 0.0),
        ]  # fmt: skip
        kind, expression, want = chance.choice(inside)
        if chance.random() < 0.1:
            whole = f"<answer>{right}</answer>"
            outside = [whole * 2, f"{whole} or <answer>{target}</answer>", f"<answer>{whole}</answer>",
                       f"{whole}</answer>", f"<answer>{whole}", f"</answer>{right}<answer>", whole.upper(), right,
                       whole + " " * 512]  # fmt: skip
            made.append((chance.choice(outside), numbers, target, 0.0, "two answers"))
        elif not (200 <= len(giant) < 260 and giant in expression):  # near the limit of characters
            made.append((f"<answer>{expression}</answer>", numbers, target, want, kind))
    return made


def test_a_thousand_attacks_score_as_the_contract_says(tmp_path: Path) -> None:
    """In 10 ms each (the least of three: a shared core stalls), and nothing is evaluated: no trap springs."""
    trap, seen = tmp_path / "sprung", set()
    for text, numbers, target, want, kind in attacks(1_000, str(trap)):
        seen.add(kind)
        times = []
        for _ in range(3):
            start = time.process_time()
            found = countdown_reward(text, numbers, target)
            times.append(time.process_time() - start)
        assert found == want, (kind, text[:200], numbers, target)
        assert min(times) < 0.010, (kind, text[:200], times)
    assert not trap.exists() and len(seen) >= 22


# The small ones


def test_format_exact_and_first_token() -> None:
    assert [answer_reward(t) for t in ("<answer>3</answer>", "so <answer>x</answer>.", "<answer> </answer>", "3",
                                       "<answer>3</answer><answer>3</answer>")] == [1, 1, 0, 0, 0]  # fmt: skip
    assert [exact_reward(t, "ab c") for t in ("ab c", " ab c\n", "ab  c", "AB c", "")] == [1, 1, 0, 0, 0]
    answers = ([7, 1, 2], [7], [1, 7], [8, 1], [7, 1, 8], [7, 7], [])
    assert [first_token_reward(ids, 7, (7, 8)) for ids in answers] == [1, 1, 0, 0, 0, 0, 0]
