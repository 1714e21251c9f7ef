"""The layouts that rows come in, and what each becomes: a row to fine-tune on, a preference pair, or a problem.

One layout is one `Schema`: how it is known by its fields, and how a row of it is converted. `NAMES` says under which
names a meaning goes, so a layout is written once for all of them. Converted rows have

- sft: "instruction", "input", "output"; or "messages" of role and content;
- preference: "prompt" (messages), "chosen", "rejected" (texts), and "score_chosen", "score_rejected" where known;
- problem: "instruction" and "input", or "prompt" (messages), and what an answer is checked with, if there is something
  ("numbers" and "target", or "tests").

What a row says besides is kept in it; `unrendered` names what of it no model will see. A converted row is converted to
itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qftlab.maths.verify import reasoned_reward
from qftlab.rows.chat import MASKS, THOUGHTS, DataError, checked_text, loaded, turns

# Meaning → the fields that carry it, whatever their capitals; the first that a row has is taken.
NAMES = {
    "question": ("instruction", "prompt", "query", "question", "problem"),
    "input": ("input", "context"),
    "output": ("output", "completion", "response", "solution", "message_content", "answer"),
    "reasoning": THOUGHTS,
    "messages": ("messages", "conversations", "conversation"),
    "chosen": ("chosen", "chosen_messages", "response_j"),
    "rejected": ("rejected", "rejected_messages", "response_k"),
    "numbers": ("numbers", "nums", "num"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
}
KNOWN = {name for names in NAMES.values() for name in names}
CONTEXT = {name for meaning in ("reasoning", "system", "history", "tools") for name in NAMES[meaning]}
# Fields of a converted row that a model sees, or that say how it is trained on and scored, and those of its turns.
RENDERED = set(
    "instruction input output messages prompt chosen rejected score_chosen score_rejected label kto_tag numbers target "
    "tests func_name reference skill".split()
)
PLAIN = {"instruction", "input", "output"}
IN_TURNS = {"role", "content", "tool_calls", "reasoning_content", "tool_call_id", "tools", "name", *MASKS}
EMPTY = (None, "", [], {})
PICTURES = ("images", "image", "videos", "video", "audios", "audio")
BEGINS = re.compile(r"\s*(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|begin_of_text\|>|(<s>)?\s*\[INST\])")
ENDS = re.compile(r"(<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|endoftext\|>|</s>)\s*$")


@dataclass(frozen=True)
class Schema:
    """One layout of rows.

    Args:
        name: as `schema=` and the command line name it.
        gives: "sft", "preference" or "problem": what its rows become.
        fields: what a reader is told the rows must have.
        fits: whether a row looks like one of these.
        convert: a row and its place → the row in the lab's form; raises DataError.
    """

    name: str
    gives: str
    fields: str
    fits: Callable[[Mapping], bool]
    convert: Callable[[dict, str], dict]


def convert_row(
    row: object, where: str, schema: str = "auto", columns: Mapping[str, str] | None = None, wanted: str = ""
) -> dict:
    """A raw row in the lab's form.

    Args:
        row: what the file holds.
        where: its place, for the message.
        schema: a name of `SCHEMAS`, or "auto": the first that fits.
        columns: the row's own names for fields, as in {"prompt": "q", "output": "a"}.
        wanted: "sft" or "preference" where nothing else will do; "": any.

    Raises:
        DataError: naming the place, what is wrong and what was wanted.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with instruction and output, got {type(row).__name__}")
    if row.keys() == PLAIN and schema in ("auto", "alpaca") and not columns and wanted in ("", "sft"):
        if all(isinstance(text, str) for text in row.values()):  # nothing to convert, as in most rows
            return {name: checked_text(text, f"{where}, {name!r}") for name, text in row.items()}
    row = _with_problem(_named(row, where, columns or {}), where)
    found = SCHEMAS.get(schema) or next((s for s in SCHEMAS.values() if s.fits(row)), None)
    if found is None:
        known = "; ".join(f"{s.name} ({s.fields})" for s in SCHEMAS.values())
        has = ", ".join(map(repr, sorted(row))) or "nothing"
        raise DataError(f"{where} must have a text 'instruction', or fit another schema: {known}. It has {has:.300}. "
                        "Other names are given by --columns '{prompt: NAME, output: NAME}'")  # fmt: skip
    made = found.convert(row, where)
    kind, wanted = kind_of(made), wanted or (found.gives if schema != "auto" else "")
    if wanted not in ("", kind):
        needs = {"sft": "an answer to train on", "preference": "chosen and rejected", "problem": "a prompt alone"}[
            wanted
        ]
        way_out = {"sft": "`sft` trains on it", "preference": "`dpo` trains on it"}.get(kind, "`rloo` asks it")
        raise DataError(
            f"{where} must have {needs}, got {', '.join(made):.200}: {way_out}, or --columns names the fields"
        )
    return made


def text_of(row: Mapping, name: str, where: str) -> str:
    """A field that must be text.

    Raises:
        DataError: if it is missing, no text, or holds half a surrogate pair, which no tokenizer can read.
    """
    text = row.get(name)
    if not isinstance(text, str):
        raise DataError(f"{where} must have a text {name!r}, got {text!r:.60}; it has {sorted(row)!r:.200}")
    return checked_text(text, f"{where}, {name!r}")


def kind_of(row: Mapping) -> str:
    """What a converted row is: "sft", "preference" or "problem"."""
    return "preference" if "chosen" in row else "sft" if row.keys() & {"messages", "output"} else "problem"


def _named(row: dict, where: str, columns: Mapping[str, str]) -> dict:
    """The row under the names that this module knows, without fields that hold nothing (null, NaN).

    `columns` come first: a field that would be taken in place of one of them is kept under another name.
    """
    made: dict = {}
    for meaning, name in columns.items():
        if meaning not in KNOWN | RENDERED:
            raise DataError(f"columns must name fields among {', '.join(sorted(KNOWN | RENDERED))}, got {meaning!r}")
        if row.get(name) is None:
            raise DataError(f"{where} must have {name!r}, which columns give as {meaning}; it has {sorted(row)!r:.200}")
        made[meaning] = row[name]
    named = {*columns} | ({"chosen", "rejected", "messages"} if "output" in columns else set())
    taken = {other for names in NAMES.values() if {*names} & named for other in names}
    for key, value in row.items():
        if value is None or isinstance(value, float) and value != value or key in columns.values():
            continue
        name = key.lower() if key.lower() in KNOWN else key
        if name in made and name not in columns:
            raise DataError(f"{where} must say which field is its {name!r}, got two that differ in capitals only: "
                            f"--columns '{{{name}: {key}}}', and so on for others")  # fmt: skip
        made[f"unused {name}" if name in taken else name] = value
    return made


def remarks(row: Mapping) -> list[str]:
    """What a converted row should be looked at for.

    "equal pair", "score tie", "empty answer", "empty question", "labelled bad"; "wrong solution" where an <answer> does
    not solve the row's own Countdown problem; "rendered already" where a template's control tokens begin a prompt or
    end an answer; and "pictures or sound".
    """
    asked, said = [], []
    for turn in _turns(row)[1]:
        is_said = turn["role"] == "assistant"
        (said if is_said else asked).append(turn["content"] or (is_said and turn.get("tool_calls")) or "")
    found = {}
    if "chosen" in row:
        scores, said = (row.get("score_chosen"), row.get("score_rejected")), [row["chosen"], row["rejected"]]
        found = {"equal pair": said[0] == said[1], "score tie": None not in scores and scores[0] == scores[1]}
    texts = [text for text in said if isinstance(text, str)]
    found |= {
        "empty answer": any(isinstance(text, str) and not text.strip() or not text for text in said),
        "empty question": bool(asked) and not any(str(text).strip() for text in asked),
        "labelled bad": row.get("label") is False or row.get("kto_tag") is False,
        "wrong solution": "chosen" not in row and bool(texts) and _is_wrong(row, texts[-1]),
        "rendered already": any(map(BEGINS.match, asked)) or any(map(ENDS.search, texts)),
        "pictures or sound": any(row.get(name) for name in PICTURES),
    }
    return [name for name, is_so in found.items() if is_so]


def _is_wrong(row: Mapping, text: str) -> bool:
    """Whether a text has an <answer> to the row's Countdown problem, and a wrong one."""
    return "numbers" in row and "target" in row and reasoned_reward(text, row["numbers"], row["target"]) == 0.1


def _turns(row: Mapping) -> tuple[str, Sequence[Mapping]]:
    """The field that holds a converted row's turns, and these; "" and turns made of it for an instruction."""
    names = ("prompt",) if "chosen" in row else ("messages", "instruction", "prompt")
    name = next(name for name in names if name in row)
    if name != "instruction":
        return name, row[name]
    said = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row.get("output")}]
    return "", said if "output" in row else said[:1]


def unrendered(row: Mapping) -> set[str]:
    """Fields of a converted row, and of its turns ("messages.id"), that hold something and that no template shows."""
    seen = RENDERED - {"output"} if "chosen" in row else RENDERED
    found = {name for name, value in row.items() if name not in seen and value not in EMPTY}
    name, said = _turns(row)
    for turn in said:
        found |= {f"{name}.{key}" for key in turn.keys() - IN_TURNS if turn[key] not in EMPTY}
    return found


def _first(row: Mapping, meaning: str) -> str | None:
    """The field of a row that has this meaning."""
    return next((name for name in NAMES.get(meaning, (meaning,)) if name in row), None)


def _prompt_(row: dict, where: str, names: Sequence[str] = NAMES["question"]) -> list[dict]:
    """The turns before an answer, from all fields that say something of them; the row then lacks those fields."""
    name = next((n for n in (*names, "input") if n in row), "instruction")
    if isinstance(row.get(name), list):
        return _in_context_(row, _after_history_(row, turns(row.pop(name), where, name), where), where)
    text = text_of(row, name, where)
    del row[name]
    if more := _input(row, where):
        text = f"{text}\n{row.pop(more)}"
    row.pop("input", None)  # an empty one
    return _in_context_(row, _after_history_(row, [{"role": "user", "content": text}], where), where)


def _input(row: Mapping, where: str) -> str | None:
    """The field that holds more of a question, if it holds something; a context that is no text is none."""
    name = _first(row, "input")
    holds = name and row[name] and (name == "input" or isinstance(row[name], str))
    return name if holds and text_of(row, name, where) else None


def _after_history_(row: dict, said: list[dict], where: str) -> list[dict]:
    """The turns behind those of the field history: pairs of question and answer, or turns."""
    history = row.pop("history", None) or []
    if not isinstance(history, list):
        raise DataError(f"{where} must have a list as 'history', got {history!r:.60}")
    pairs = [isinstance(item, list | tuple) and len(item) == 2 for item in history]
    earlier = [{"human": i[0], "assistant": i[1]} if pair else i for i, pair in zip(history, pairs, strict=True)]
    start = said[0]["role"] == "system"
    return [*said[:start], *turns(earlier, where, "history"), *said[start:]] if earlier else said


def _in_context_(row: dict, said: list[dict], where: str) -> list[dict]:
    """The turns behind the system's words, and with the row's tools on the first, where templates look for them."""
    name = _first(row, "system")
    if name and isinstance(row[name], str) and said[0]["role"] != "system":
        system = checked_text(row.pop(name), f"{where}, {name!r}")
        said = [{"role": "system", "content": system}, *said] if system else said
    tools = loaded(row.pop("tools", None) or [], f"{where}, 'tools'")
    if not isinstance(tools, list):
        raise DataError(f"{where} must have a list as 'tools', got {tools!r:.60}")
    return [{**said[0], "tools": tools}, *said[1:]] if tools else said


def _answer(row: Mapping, where: str) -> str:
    """The field to be trained on. `answer` beside a longer text is what the text comes to, for a check.

    Raises:
        DataError: for two fields that could be it.
    """
    found = [name for name in NAMES["output"] if row.get(name)]
    name = found[0] if found else _first(row, "output") or "output"
    others = [other for other in found[1:] if row[other] != row[name]]
    if name in ("output", "completion") or not others:
        return name
    if others == ["answer"] and len(str(row[name])) > len(str(row["answer"])):
        return name
    raise DataError(f"{where} has {name} and {' and '.join(others)}, and either could be the answer: choose with "
                    f"--columns '{{output: {name}}}'")  # fmt: skip


def _answered(row: dict, where: str) -> dict:
    name, question = _answer(row, where), _first(row, "question") or "input"
    answers = row[name] if isinstance(row.get(name), list) else text_of(row, name, where)
    del row[name]
    thought = _first(row, "reasoning")
    thinking = {"reasoning_content": row.pop(thought)} if thought and isinstance(row[thought], str) else {}
    if isinstance(answers, str) and isinstance(row.get(question), str) and not thinking and not row.keys() & CONTEXT:
        more = _input(row, where) if question != "input" else None
        made = {"instruction": text_of(row, question, where), "input": row[more] if more else "", "output": answers}
        return {k: v for k, v in row.items() if k not in (question, more, "input")} | made
    said = [{"role": "assistant", "content": answers, **thinking}] if isinstance(answers, str) else answers
    said = [*_prompt_(row, where), *turns(said, where, name)]
    return {**row, "messages": said}


def _conversation(row: dict, where: str) -> dict:
    name = _first(row, "messages") or "messages"
    said = _in_context_(row, turns(row.pop(name, None), where, name), where)
    return {**row, "messages": said}


def _preference(row: dict, where: str) -> dict:
    sides, prompts = [], []
    for side in ("chosen", "rejected"):
        said = row.pop(_first(row, side) or side, None)
        said = [said] if isinstance(said, dict) else said
        if isinstance(said, str):
            sides.append(checked_text(said, f"{where}, {side!r}"))
            continue
        said = turns(said, f"{where}, {side!r}", side)
        if said[-1]["role"] != "assistant" or said[-1]["content"] is None:
            raise DataError(f"{where}, {side!r} must end with a text by the assistant, got {said[-1]!r:.60}")
        sides.append(said[-1]["content"])
        prompts.append(said[:-1])
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise DataError(f"{where}: chosen and rejected must answer the same prompt; their earlier turns differ")
    scores = row.get("metadata") if isinstance(row.get("metadata"), dict) else row
    for name in ("score_chosen", "score_rejected"):
        score = row.get(name, scores.get(name))
        if isinstance(score, int | float):
            row[name] = float(score)
    if prompts and prompts[0]:  # a prompt inside the answers is complete; the field beside it repeats its last turn
        row = {k: v for k, v in row.items() if k not in (*NAMES["messages"], "prompt")}
        prompt = _in_context_(row, prompts[0], where)
    else:
        prompt = _prompt_(row, where, (*NAMES["messages"], *NAMES["question"][1:], "instruction"))
        row = {k: v for k, v in row.items() if k not in NAMES["messages"]}
    return {**row, "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


def _prompted(row: dict, where: str) -> dict:
    prompt = _prompt_(row, where)
    return {**row, "prompt": prompt}


def _countdown(row: dict, where: str) -> dict:
    if not _has("numbers", "target")(row):
        raise DataError(f"{where} must have whole numbers as 'nums' and one as 'target'; it has {sorted(row)!r:.200}")
    row = {"skill": "countdown", **row}
    if _first(row, "question") is None:
        row["instruction"] = f"Use the numbers {', '.join(map(str, row['numbers']))} once each to make {row['target']}."
    if row.keys() & {"output", "completion", "response"}:
        return _answered(row, where)
    if isinstance(row.get("answer"), str):
        row["reference"] = row.pop("answer")
    said = _prompt_(row, where)
    is_one = len(said) == 1 and said[0].keys() == {"role", "content"}
    return {**row, **({"instruction": said[0]["content"], "input": ""} if is_one else {"prompt": said})}


def _with_problem(row: dict, where: str) -> dict:
    """The row with what a Countdown answer is checked with as "numbers" and "target", also where verl has it.

    Raises:
        DataError: if these are no whole numbers.
    """
    checked = row.get("reward_model", row)  # or beside the prompt, as in CS224R's rows
    truth = checked.get("ground_truth") if isinstance(checked, dict) else None
    found = {**(truth if isinstance(truth, dict) else {}), **row}
    if not _has("numbers", "target")(found):
        return row
    numbers, target = (
        loaded(found[_first(found, name) or name], f"{where}, {name!r}") for name in ("numbers", "target")
    )
    given = numbers if isinstance(numbers, list) and numbers else [None]
    if any(type(number) is not int for number in (*given, target)):
        raise DataError(f"{where} must have whole numbers as 'nums' and one as 'target', got {numbers!r:.60} and "
                        f"{target!r:.60}: it has both, as Countdown; rename them if it is none")  # fmt: skip
    return {k: v for k, v in row.items() if k not in NAMES["numbers"]} | {"numbers": numbers, "target": target}


def _livecodebench(row: dict, where: str) -> dict:
    question = text_of(row, "question_content", where)
    if starter := row.get("starter_code"):
        question += f"\n\nBegin with this code:\n{checked_text(str(starter), where)}"
    given = {name: loaded(row.get(name) or {}, f"{where}, {name!r}") for name in ("public_test_cases", "metadata")}
    tests = given["public_test_cases"] or []
    if not isinstance(tests, list) or any(not isinstance(t, dict) or not {"input", "output"} <= set(t) for t in tests):
        raise DataError(f"{where} must have tests with input and output in 'public_test_cases', got {tests!r:.60}")
    kept = {n: row[n] for n in ("question_id", "platform", "difficulty", "contest_date") if n in row}
    # Private tests are left behind: they are a pickle, and reading a pickle can run code.
    made = {"instruction": question, "input": "", "skill": "livecodebench", "tests": tests, **kept}
    name = given["metadata"].get("func_name") if isinstance(given["metadata"], dict) else None
    return made | ({"func_name": name} if name else {})


def _has(*meanings: str) -> Callable[[Mapping], bool]:
    """Whether a row has a field of each of these meanings, or names."""
    return lambda row: all(_first(row, meaning) for meaning in meanings)


def _is_pair(row: Mapping) -> bool:
    return _has("chosen")(row) or _has("rejected")(row)


def _is_alpaca(row: Mapping) -> bool:
    return "instruction" in row and "tests" not in row  # a problem that was read before has no answer


def _is_completed(row: Mapping) -> bool:
    return _has("question", "output")(row) or {"input", "output"} <= row.keys()


LAYOUTS = (
    Schema("preference", "preference", "prompt, chosen, rejected", _is_pair, _preference),
    Schema("livecodebench", "problem", "question_content, its tests", _has("question_content"), _livecodebench),
    Schema("messages", "sft", "messages of role, content", _has("messages"), _conversation),
    Schema("sharegpt", "sft", "conversations of from, value", _has("messages"), _conversation),
    Schema("countdown", "problem", "nums, target", _has("numbers", "target"), _countdown),
    Schema("alpaca", "sft", "instruction, input, output", _is_alpaca, _answered),
    Schema("prompt_completion", "sft", "prompt, completion", _is_completed, _answered),
    Schema("prompt", "problem", "prompt", _has("question"), _prompted),
)
SCHEMAS = {schema.name: schema for schema in LAYOUTS}


def row_to_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's turns: of any layout that is known here; its answer is the last, "" where it has none.

    Raises:
        ValueError: if the row has no such layout.
    """
    return messages_of(convert_row({"output": "", **row} if "instruction" in row else dict(row), "row"))


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`row_to_messages` of a row that is converted already."""
    if "messages" in row:
        return row["messages"]
    asked = row.get("prompt")
    if "chosen" not in row and "instruction" in row:
        question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        asked = [{"role": "user", "content": question}]
    return [*asked, {"role": "assistant", "content": row.get("chosen") or row.get("output", "")}]


def row_to_prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns that a row's answer replies to; raises as `row_to_messages`."""
    messages = row_to_messages(row)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
