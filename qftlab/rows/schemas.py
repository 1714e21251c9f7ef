"""The layouts that rows come in, and what each becomes: a row to fine-tune on, a preference pair, or a problem.

One layout is one `Schema`: how it is known by its fields, and how a row of it is converted. Converted rows have

- sft: "instruction", "input", "output"; or "messages" of role and content;
- preference: "prompt" (messages), "chosen", "rejected" (texts), and "score_chosen", "score_rejected" where known;
- problem: "instruction", "input", and what an answer is checked with ("numbers" and "target", or "tests").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "tool": "tool",
    "observation": "tool", "function": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
QUESTIONS = ("prompt", "query", "question", "problem")
ANSWERS = ("completion", "response", "answer", "solution")
PART_FORMS = {
    "text": "{}", "reasoning": "<think>\n{}\n</think>\n\n", "tool_call": "<tool_call>\n{}\n</tool_call>",
}  # as Qwen's template writes them  # fmt: skip
LAYOUTS = ("conversations", "messages", "chosen", "rejected", "chosen_messages", "rejected_messages", "prompt")


class DataError(ValueError):
    """A file or row that cannot be used; the message names the file, the row, the reason and the way out."""


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


def convert_row(row: object, where: str, schema: str = "auto") -> dict:
    """A raw row in the lab's form.

    Args:
        row: what the file holds.
        where: its place, for the message.
        schema: a name of `SCHEMAS`, or "auto": the first that fits.

    Raises:
        DataError: naming the place, what is wrong and what was wanted.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with instruction and output, got {type(row).__name__}")
    if schema != "auto":
        return SCHEMAS[schema].convert(row, where)
    found = next((s for s in SCHEMAS.values() if s.fits(row)), None)
    if found is None:
        known = "; ".join(f"{s.name} ({s.fields})" for s in SCHEMAS.values())
        has = ", ".join(map(repr, sorted(row))) or "nothing"
        raise DataError(f"{where} must have a text 'instruction', or fit another schema: {known}. It has {has:.300}")
    return found.convert(row, where)


def remarks(row: Mapping) -> list[str]:
    """What a converted row should be looked at for: "equal pair", "score tie", "empty answer", "labelled bad"."""
    if "chosen" in row:
        scores = row.get("score_chosen"), row.get("score_rejected")
        found = {
            "equal pair": row["chosen"] == row["rejected"],
            "score tie": None not in scores and scores[0] == scores[1],
            "empty answer": not (row["chosen"].strip() and row["rejected"].strip()),
        }
    else:
        said = [row["output"]] if "output" in row else []
        said += [m["content"] or m.get("tool_calls") for m in row.get("messages", ()) if m["role"] == "assistant"]
        is_blank = any(isinstance(text, str) and not text.strip() or not text for text in said)
        found = {"empty answer": is_blank, "labelled bad": row.get("label") is False}
    return [name for name, is_so in found.items() if is_so]


def text_of(row: Mapping, name: str, where: str) -> str:
    """A field that must be text.

    Raises:
        DataError: if it is missing, no text, or holds half a surrogate pair, which no tokenizer can read.
    """
    text = row.get(name)
    if not isinstance(text, str):
        raise DataError(f"{where} must have a text {name!r}, got {text!r:.60}; it has {sorted(row)!r:.200}")
    return checked_text(text, f"{where}, {name!r}")


def checked_text(text: str, where: str) -> str:
    """The text, unless it holds half a surrogate pair, which JSON can spell (\\ud800).

    Raises:
        DataError: if it does.
    """
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{where} holds half a surrogate pair, which is no character: remove it")
    return text


def _alpaca(row: dict, where: str) -> dict:
    if not isinstance(row.get("input") or "", str):
        raise DataError(f'{where} must have a text "input" or none, got {row["input"]!r:.60}')
    made = {**row, "input": row.get("input") or ""}
    for name in ("instruction", "output", "input"):
        text_of(made, name, where)
    return made


def _prompt_completion(row: dict, where: str) -> dict:
    question = next((n for n in QUESTIONS if n in row), "prompt")
    answer = next((n for n in ANSWERS if n in row), "completion")
    rest = {k: v for k, v in row.items() if k not in (question, answer)}
    if isinstance(row.get(question), list):
        answers = row[answer] if isinstance(row[answer], list) else [{"role": "assistant", "content": row[answer]}]
        return {**rest, "messages": turns([*row[question], *answers], where)}
    return {**rest, "instruction": text_of(row, question, where), "input": "", "output": text_of(row, answer, where)}


def _conversation(row: dict, where: str) -> dict:
    name = "messages" if "messages" in row else "conversations"
    rest = {k: v for k, v in row.items() if k != name}
    said = turns(row[name], where, name)
    if isinstance(row.get("system"), str) and row["system"] and said[0]["role"] != "system":
        said.insert(0, {"role": "system", "content": checked_text(row["system"], f"{where}, 'system'")})
    return {**rest, "messages": said}


def turns(messages: object, where: str, name: str = "messages") -> list[dict]:
    """Messages in the lab's form: role and content, from role/content or ShareGPT's from/value, text or parts.

    Raises:
        DataError: naming the turn, for a missing or unknown role, or content that is no text.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "{name}" must be a list of turns, got {messages!r:.60}')
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(messages, start=1)]


def _turn(turn: object, where: str) -> dict:
    keys = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or not isinstance(turn.get(keys[0]), str) or keys[1] not in turn:
        raise DataError(f"{where} must have role and content, got {turn!r:.60}")
    role, content = turn[keys[0]], turn[keys[1]]
    if role not in ROLES:
        raise DataError(f"{where} must have a role among {', '.join(ROLES)}, got {role!r:.60}")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    elif role == "function_call" and isinstance(content, str):
        content = PART_FORMS["tool_call"].format(content)
    if isinstance(content, str):
        checked_text(content, where)
    elif content is not None or not turn.get("tool_calls"):
        raise DataError(f"{where} must have a text as content, got {content!r:.60}")
    rest = {k: v for k, v in turn.items() if k not in keys}
    return {"role": ROLES[role], "content": content, **rest}


def _part(part: object, where: str) -> str:
    """One piece of a content that is a list: text, reasoning or a tool call."""
    kind = part.get("type") if isinstance(part, dict) else None
    text = (part.get("text") if "text" in part else part.get("value")) if kind in PART_FORMS else None
    if not isinstance(text, str):
        raise DataError(f"{where} must have parts of type {', '.join(PART_FORMS)} that hold text, got {part!r:.60}")
    return PART_FORMS[kind].replace("{}", text)


def _preference(row: dict, where: str) -> dict:
    sides, prompts = [], []
    for side in ("chosen", "rejected"):
        said = row.get(side, row.get(f"{side}_messages"))
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
    # A prompt inside the answers is complete; the field "prompt" beside it repeats its last turn.
    prompt = prompts[0] if prompts and prompts[0] else _prompt(row, where)
    scores = row.get("metadata") if isinstance(row.get("metadata"), dict) else row
    made = {k: v for k, v in row.items() if k not in LAYOUTS}
    for name in ("score_chosen", "score_rejected"):
        score = row.get(name, scores.get(name))
        if isinstance(score, int | float):
            made[name] = float(score)
    return {**made, "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


def _prompt(row: dict, where: str) -> list[dict]:
    """What both answers of a pair reply to, from the fields that say it."""
    name = next((n for n in ("conversations", "messages", *QUESTIONS) if n in row), "instruction")
    if isinstance(row.get(name), list):
        return turns(row[name], where, name)
    text = text_of(row, name, where)
    if name == "instruction" and row.get("input"):
        text = f"{text}\n{text_of(row, 'input', where)}"
    return [{"role": "user", "content": text}]


def _countdown(row: dict, where: str) -> dict:
    numbers, target = row.get("nums", row.get("numbers")), row.get("target")
    if not isinstance(numbers, list) or not numbers or any(type(n) is not int for n in numbers):
        raise DataError(f"{where} must have whole numbers as 'nums', got {numbers!r:.60}")
    if type(target) is not int:
        raise DataError(f"{where} must have a whole number as 'target', got {target!r:.60}")
    question = row.get("instruction")  # there in rows that `data --output` has written
    if not isinstance(question, str):
        question = f"Use the numbers {', '.join(map(str, numbers))} once each to make {target}."
    made = {"instruction": question, "input": "", "skill": "countdown", "numbers": numbers, "target": target}
    return made | ({"reference": row["answer"]} if isinstance(row.get("answer"), str) else {})


def _livecodebench(row: dict, where: str) -> dict:
    question = text_of(row, "question_content", where)
    if starter := row.get("starter_code"):
        question += f"\n\nBegin with this code:\n{checked_text(str(starter), where)}"
    given = {}
    for name, empty in (("public_test_cases", []), ("metadata", {})):
        try:
            value = row.get(name) or empty
            given[name] = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            raise DataError(f"{where} must have JSON in {name!r}, got {row[name]!r:.60}") from None
    tests = given["public_test_cases"]
    if not isinstance(tests, list) or any(not isinstance(t, dict) or not {"input", "output"} <= set(t) for t in tests):
        raise DataError(f"{where} must have tests with input and output in 'public_test_cases', got {tests!r:.60}")
    kept = {n: row[n] for n in ("question_id", "platform", "difficulty", "contest_date") if n in row}
    # Private tests are left behind: they are a pickle, and reading a pickle can run code.
    made = {"instruction": question, "input": "", "skill": "livecodebench", "tests": tests, **kept}
    name = given["metadata"].get("func_name") if isinstance(given["metadata"], dict) else None
    return made | ({"func_name": name} if name else {})


def _is_pair(row: Mapping) -> bool:
    return {"chosen", "rejected"} <= row.keys() or {"chosen_messages", "rejected_messages"} <= row.keys()


def _is_problem(row: Mapping) -> bool:
    is_answered = {"instruction", "output"} <= row.keys()  # a row to fine-tune on
    return bool({"nums", "numbers"} & row.keys()) and "target" in row and not is_answered


SCHEMAS = {schema.name: schema for schema in (
    Schema("preference", "preference", "prompt, chosen, rejected", _is_pair, _preference),
    Schema("countdown", "problem", "nums, target", _is_problem, _countdown),
    Schema("livecodebench", "problem", "question_content, public_test_cases",
           lambda r: "question_content" in r, _livecodebench),
    Schema("messages", "sft", "messages of role, content", lambda r: "messages" in r, _conversation),
    Schema("sharegpt", "sft", "conversations of from, value", lambda r: "conversations" in r, _conversation),
    Schema("alpaca", "sft", "instruction, input, output", lambda r: "instruction" in r, _alpaca),
    Schema("prompt_completion", "sft", "prompt, completion",
           lambda r: bool(r.keys() & {*QUESTIONS}) and bool(r.keys() & {*ANSWERS}), _prompt_completion),
)}  # fmt: skip
