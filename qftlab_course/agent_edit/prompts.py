"""The words that a teacher or a model is asked with, each with the reason why it stands there."""

from __future__ import annotations

import json

from qftlab.settings import AGENT, EDIT

# In OpenAI's form, to be passed as `tools=`: the template of the model writes them where its training had them.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Runs a Python program and returns what it prints and the errors it raises.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The program to run."}},
                "required": ["code"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "editor",
            "description": "Replaces a program by a mended one.",
            "parameters": {
                "type": "object",
                "properties": {
                    "original_code": {"type": "string", "description": "The program as the user gave it."},
                    "modified_code": {"type": "string", "description": "The whole program, mended."},
                },
                "required": ["original_code", "modified_code"],
            },
        },
    },
]

# Each sentence is there because answers went wrong without it. Of 370 answers of Qwen3-8B to 37 students' prompts
# (summer camp 2025) 41 named several modes, 34 had other arguments, 40 were wrapped in tags, and of the bugs without an
# error more than half were answered with a fix: so the modes are told apart by what the *user* says, "exactly" is said
# of everything that may occur once, and an example shows the form without giving an answer to copy.
SYSTEM = f"""You help with faulty Python programs. You work in exactly one of two modes.

{AGENT}: the user names no concrete error. You do not know the cause yet, so you run the program and look.
{EDIT}: the user names a concrete error (an exception, its message, or the faulty line). The cause is known, so you \
fix it.

Decide by what the user says, not by what you can see in the program: a bug that you notice yourself is still unknown \
to the user, and has to be shown by running the program.

Answer in exactly this form, and write nothing else:
1. <think>, one or two sentences on which mode fits and why, </think>.
2. On a line of its own {AGENT} or {EDIT}: one of them, once. Never name a mode anywhere else.
3. One sentence on what you do, and directly behind it exactly one JSON object, the call of the mode's tool, without \
tags or code fences around it:
   {AGENT} {{"name": "python", "arguments": {{"code": "..."}}}}
   {EDIT} {{"name": "editor", "arguments": {{"original_code": "...", "modified_code": "..."}}}}
   original_code is the user's whole program, letter by letter; modified_code is the whole program, mended."""

# For teachers that only reason: the program writes the call, from a fix that was tested, so nothing in it can be wrong.
REASON = f"""You decide how a faulty Python program is to be treated.

{AGENT}: the user names no concrete error, so the program has to be run first.
{EDIT}: the user names a concrete error (an exception, its message, or the faulty line), so it can be fixed at once.

Decide by what the user says, not by what you can see in the program. Write <think>, one or two sentences on which \
mode fits and why, </think>, and then {AGENT} or {EDIT}. Nothing else: no code, no call."""

PLANT = {
    EDIT: "Write a Python program that tries to solve the problem, with one bug that makes it raise an exception on "
    "the examples. Answer with the program in one code block, without comments on the bug.",
    AGENT: "Write a Python program that tries to solve the problem, with one bug that makes it give a wrong result "
    "on the examples, without an exception. Answer with the program in one code block, without comments on the bug.",
}
MEND = "The program has a bug. Answer with the whole program, mended, in one code block."

# How a user asks, with {code} and, for EDIT, {error}: the program's own error, from running it. The original drew one
# of ten error texts at random, so that the error had nothing to do with the program.
ASKED = {
    "en": {
        AGENT: (
            "Something is wrong with this function, but I cannot find it.\n\n{code}",
            "This program gives wrong results. Can you look into it?\n\n{code}",
            "Please debug this, I do not know where the fault is.\n\n{code}",
            "I think that there is a bug in here.\n\n{code}",
            "The result is not what I expect. What is going on?\n\n{code}",
            "Can you help me to find out why this does not work?\n\n{code}",
            "This code does not behave as it should.\n\n{code}",
        ),
        EDIT: (
            "Error: {error}\nPlease fix this program.\n\n{code}",
            "I get this error: {error}\n\n{code}",
            "{error}\nMend it, please.\n\n{code}",
            "Running it ends with {error}\nHow must it be changed?\n\n{code}",
        ),
    },
    "zh": {
        AGENT: (
            "这段代码有问题，但我找不出来\n\n{code}",
            "这个程序的结果不对，能帮我看看吗？\n\n{code}",
            "帮我调试一下，我不知道哪里错了\n\n{code}",
            "我觉得这里有一个 bug\n\n{code}",
            "结果和我预期的不一样，是怎么回事？\n\n{code}",
            "能帮我找找它为什么不工作吗？\n\n{code}",
            "这段代码的行为不正常\n\n{code}",
        ),
        EDIT: (
            "报错信息：{error}\n请修复这个程序\n\n{code}",
            "运行时出现这个错误：{error}\n\n{code}",
            "{error}\n帮我修复它\n\n{code}",
            "程序以 {error} 结束，应该怎么改？\n\n{code}",
        ),
    },
}
SAYS = {AGENT: "I run it to see what happens.", EDIT: "I fix the error."}


def call_of(mode: str, program: str, fixed: str = "") -> dict:
    """The call that fits a mode: `python` runs the program, `editor` replaces it."""
    if mode == AGENT:
        return {"name": "python", "arguments": {"code": program}}
    return {"name": "editor", "arguments": {"original_code": program, "modified_code": fixed}}


def assembled(mode: str, thinking: str, program: str, fixed: str = "") -> str:
    """A whole answer in the exact form, of a teacher's thinking and a call that the program writes."""
    call = json.dumps(call_of(mode, program, fixed), ensure_ascii=False)
    return f"<think>{thinking.strip()}</think>\n{mode}\n{SAYS[mode]}{call}"
