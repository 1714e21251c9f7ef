# %% [markdown]
# # 06 · Teacher data: solutions
#
# One good answer to each exercise of [06 · Teacher data](../06_teacher_data.ipynb), with the reason in a sentence or two. Yours may look
# different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth more than this page.

# %% tags=["setup"]
import re
import sys

if colab := sys.modules.get("google.colab"):  # on Colab only: fetch the library
    at = get_ipython().getoutput("curl $COLAB_JUPYTER_IP:$KMP_TARGET_PORT/api/sessions")
    at = f"{at} {colab._message.blocking_request('get_ipynb')}".replace("%2F", "/")
    repo = re.search(r"github[.com]*/([\w.-]+/[\w.-]+)/blob/([\w./-]+?)/notebooks/", at)
    assert repo, "put here instead: !pip install git+https://github.com/OWNER/NAME"
    get_ipython().system(repo.expand(r"pip install -q git+https://github.com/\1@\2"))

# %%
import json
import random
from collections import Counter

from qftlab.settings import AGENT, EDIT
from qftlab_course import checks
from qftlab_course.agent_edit import expert, prompts
from qftlab_course.agent_edit.check import course_verdict
from qftlab_course.agent_edit.problems import bug_problems

# %% tags=["parameters"]
SEED = 0
PROBLEMS = 240

# %% [markdown]
# ## Exercise 06.1 · How long to wait
#
# The cap goes inside, so that the draw is of the capped limit: cut off afterwards, all late attempts would wait exactly `cap`, together. The server's wish goes outside, because it is a
# least time, and not one to be drawn from.

# %%
def my_pause(attempt, draw, retry_after=None, base=1.0, cap=60.0):
    limit = min(cap, base * 2**attempt)
    return max(draw * limit, retry_after or 0.0)


checks.check("06.1", my_pause)

# %%
rng = random.Random(SEED)
waits = [sum(my_pause(n, rng.random()) for n in range(6)) for _ in range(2000)]
mean = sum(waits) / len(waits)
print(f"six attempts wait {mean:.0f} seconds, half of 1 + 2 + 4 + 8 + 16 + 32")
assert abs(mean - 31.5) < 1.5

# %% [markdown]
# ## Exercise 06.2 · Read a journal that was cut off
#
# A line counts only with its newline. A piece that *happens* to be readable is a trap: `{"key": "a", "answer": "one"}` without a newline is whole, but the next line would be glued to it, and then neither can be read. And the first of two
# answers counts, because it has been given out: a row may have been built on it.

# %%
def my_replay(text):
    whole = text[: text.rfind("\n") + 1]
    answers = {}
    for line in whole.splitlines():
        record = json.loads(line)
        answers.setdefault(record["key"], record["answer"])
    return answers, len(whole)


checks.check("06.2", my_replay)

# %%
records = [{"key": str(i), "answer": "x" * i} for i in range(30)]
lines = "".join(json.dumps(record) + "\n" for record in records)
for cut in range(len(lines)):  # a kill after every single character
    answers, kept = my_replay(lines[:cut])
    assert lines[:kept].count("\n") == len(answers)

# %% [markdown]
# ## Exercise 06.3 · The strict reading
#
# `partition` takes the text apart from left to right, and what is left over at each step must be what may stand there. `json.loads` of everything from the first brace on does three checks at once: that the call parses, that there is only one, and that nothing follows. The
# sentence before it must have no brace; the prompt's form gives it none.

# %%
TOOLS = {AGENT: ("python", {"code"}),
         EDIT: ("editor", {"original_code", "modified_code"})}


def my_reading(output):
    before, _, rest = output.partition("<think>")
    thought, closed, rest = rest.partition("</think>")
    if before.strip() or not closed or not thought.strip():
        return ""
    if sum(output.count(token) for token in TOOLS) != 1:
        return ""
    token = next((t for t in TOOLS if rest.lstrip().startswith(t)), "")
    if not token or "{" not in rest:
        return ""
    try:
        call = json.loads(rest[rest.index("{") :])
    except ValueError:
        return ""
    tool, names = TOOLS[token]
    is_right = set(call) == {"name", "arguments"} and call["name"] == tool
    return token if is_right and set(call["arguments"]) == names else ""


checks.check("06.3", my_reading)

# %% [markdown]
# ## Predict, then run: how many threads?
#
# Our own work is to blame, not the teacher's: at 32 threads 320 answers a second would be due, and each costs about two thousandths of a second of packing and unpacking here, besides what the teacher, on the same core, needs. With a latency of three seconds 32 threads want
# eleven answers a second, and there is room for ten times as many.
#
# ## Predict, then run: form and mode
#
# About two thirds of the strictly right answers are in the right mode. EDIT is always right where it was called for. AGENT was called for as often and is given much less:

# %%
teacher = expert.Expert(seed=SEED)
problems = bug_problems(PROBLEMS, SEED)
marks = Counter()
for problem in problems:
    asked = [{"role": "system", "content": prompts.SYSTEM},
             {"role": "user", "content": f"{problem.program}\n{problem.report}"}]
    said = teacher.answer("chat/completions", {"messages": asked})
    text = said["choices"][0]["message"]["content"]
    marks["lenient"] += course_verdict(text).passed
    marks["strict"] += my_reading(text) != ""
    marks["strict, and the mode"] += my_reading(text) == problem.mode
print(dict(marks))
assert marks["lenient"] > marks["strict"] > marks["strict, and the mode"]

# %% [markdown]
# ## Predict, then run: quantity or filtering?
#
# Filtering, by far, with fewer than half the rows. *Quantity* fails on the bugs that nobody named: four in five of its rows there say EDIT, and a model says what is most frequent. It would fail in the same way with ten times the money.
#
# ## Exercise 06.4 · Balance
#
# Count first, then go through the rows once. Sorting by mode would train on one mode after the other, where the loop does not shuffle.

# %%
def my_balanced(modes):
    least = min(Counter(modes).values(), default=0)
    seen = Counter()
    kept = []
    for i, mode in enumerate(modes):
        seen[mode] += 1
        if seen[mode] <= least:
            kept.append(i)
    return kept


checks.check("06.4", my_balanced)

# %% [markdown]
# ## Explain: "98 % pass"
#
# First: pass *what*? A checker that looks for names passes rows that no program can read. Second: was the mode compared with what each question was made for, by something that the teacher did not write? A validator that
# takes the mode from the answer will agree with any answer. (A third, if you like: of those that pass, how many are AGENT?)

# %%
checks.progress("06")
