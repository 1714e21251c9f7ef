# %% [markdown]
# # 06 · Teacher data: rows from somebody who makes mistakes
#
# Every lesson so far began with rows. Now there are none. A stronger model shall write them, over the network, for money, and it is neither reliable nor always
# right. You ask it, survive its refusals, keep what you paid for through a `kill -9`, and find out that most of its answers *look* right. Then you
# spend the same money twice, on many rows and on good rows, train on both, and count.
#
# ![Questions go to a teacher through many threads; answers go into a journal, through a judge, and into a training set; what fails goes back or is thrown away](figures/06_teacher.png)
#
# **Read it.** From left to right: a plan of questions, many requests at a time, a journal that remembers every answer, a judge that gives a reason for each
# refusal, and the rows that are left. An arrow goes back: what was refused is asked again.
#
# | | |
# |---|---|
# | **You will be able to** | write a prompt for two modes, with tools · wait rightly when a server says no · say how many threads pay · lose nothing when a run is killed · judge answers by reason, not by look · decide what money is spent on |
# | **Time** | 40 minutes to read, 37 for the four exercises; a minute and a half to compute |
# | **Hardware** | one CPU core. No GPU, no network: the teacher runs on this machine |
# | **Before this** | [02 · Chat and masking](02_chat_and_masking.ipynb); [05 · LoRA](05_lora.ipynb) helps |

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
import logging
import random
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from qftlab.settings import AGENT, EDIT, ServerConfig
from qftlab_course import checks, stages, views
from qftlab_course.agent_edit import expert, prompts
from qftlab_course.agent_edit.problems import bug_problems
from qftlab_course.flaky import Flaky
from qftlab_course.lessons import teacher_plots

logging.getLogger("qftlab.remote").setLevel("ERROR")  # failures are planted here

# %% [markdown]
# Everything you may want to change is in this cell. `PRICES` are dollars for a million tokens that the teacher reads and writes, about what a large hosted model
# costs. `MONEY` is what you may spend in part 6.

# %% tags=["parameters"]
SEED = 0
PROBLEMS = 240
PRICES = (2.0, 8.0)
MONEY = 0.60
STEPS = 64

# %% [markdown]
# ## 1 · Ask once
#
# **Idea.** We want a model that uses two new words. `<|EDIT|>`: the user names the error, so fix it. `<|AGENT|>`: the user knows only that something is
# wrong, so run the program and look. Rows that show both, with thinking before and a tool call behind, do not exist. But there is a model, larger than ours, that can
# be *told* to write them.
#
# **The protocol.** Nearly every server speaks the same words, those of OpenAI's API: a list of messages goes to `/v1/chat/completions`, an answer with a price tag
# comes back. Our teacher does too. It sits on this machine, knows the programs of our bug set, and makes the mistakes that real teachers make, in about the same
# shares; how it was made is in `qftlab_course/agent_edit/expert.py`, which you should not read before part 5.
#
# **The system prompt** is most of the work. Each sentence below is there because answers went wrong without it. The modes are told apart by what the *user* says,
# because a model that sees the bug itself prefers to fix it. "Exactly" is said of all that may occur once.

# %%
print(prompts.SYSTEM)

# %% [markdown]
# **The tools** travel beside the messages, as `tools=`, not in the prompt's text: a server writes them where its model had them in training.

# %%
problems = bug_problems(PROBLEMS, SEED)
question = f"{problems[0].program}\n{problems[0].report}"
print(question)


def request(question, seed=0):
    """The body of a request: who answers, what is asked, with which tools."""
    messages = [{"role": "system", "content": prompts.SYSTEM},
                {"role": "user", "content": question}]
    return {"model": "expert", "messages": messages, "tools": prompts.TOOLS,
            "temperature": 0.7, "max_tokens": 2048, "seed": seed}


# %% [markdown]
# **One answer.** `Flaky` is the door: a small server on this machine, which will fail as you tell it to. The `openai` package talks to it as to any other.

# %%
teacher = expert.Expert(seed=SEED)
with Flaky(teacher.answer) as server:
    client = openai.OpenAI(base_url=server.url, api_key="not-needed")
    answer = client.chat.completions.create(**request(question))
print(answer.choices[0].message.content)
usage = answer.usage
print(usage.prompt_tokens, "tokens read,", usage.completion_tokens, "written")

# %% [markdown]
# **What it costs.** $\text{dollars} = (n_{in}\, p_{in} + n_{out}\, p_{out}) / 10^6$. Most of it is the system prompt, which is read again for every question. (Servers
# that remember a common beginning charge less for it: so it stands first, and never changes.)

# %%
def dollars(usage):
    """What an answer costs."""
    read, written = usage.prompt_tokens, usage.completion_tokens
    return (read * PRICES[0] + written * PRICES[1]) / 1e6


print(f"{1000 * dollars(usage):.2f} dollars for a thousand such answers")

# %% [markdown]
# **Never write the key down.** A real server wants one. It comes from the environment (`OPENAI_API_KEY`), never from a cell: a notebook is a file that one sends around. One
# of the repositories that this lesson learned from had published its key in a *result*, because the program wrote its whole configuration into it.
#
# ## 2 · When the server says no
#
# **Idea.** Servers refuse (429: too many requests), break (500), hang, and cut answers off in the middle. None of this is a reason to lose a row: wait, and ask again. How long? Not at once, because that makes
# the crowd worse. Not a fixed time, because then the crowd comes back as a crowd.
#
# **Formula.** Full jitter: before try $n$ wait a *random* share $u$ of a limit that doubles,
#
# $$ t_n = u \cdot \min(c,\; b\, 2^n), \qquad u \sim U(0, 1) $$
#
# and if the server says when it wants to be asked again (`Retry-After`), not less than that.
#
# **Toy numbers.** $b = 1$, $c = 60$, $u = 0.5$: half a second, one, two, four … thirty, thirty.
#
# ### Exercise 06.1 · How long to wait (●○○, 6 minutes)
#
# <details><summary>Hint</summary>
#
# `min` for the cap, `max` for the server's wish. Attempt 0 is the first that failed.
# </details>

# %%
def my_pause(attempt, draw, retry_after=None, base=1.0, cap=60.0):
    """Seconds before the next try; attempt 0 has just failed, draw is in [0, 1)."""
    ...


checks.check("06.1", my_pause)

# %% [markdown]
# **Check.** A thousand threads are refused in the same instant, at their third attempt. Without the draw they all come back four seconds later, in the same instant:

# %%
pause = checks.or_library("06.1", my_pause)
rng = random.Random(SEED)
back = {"all of the limit": [pause(2, 1.0) for _ in range(1000)],
        "a random share": [pause(2, rng.random()) for _ in range(1000)]}
words = ("Two histograms of a thousand threads: without jitter all come back after "
         "four seconds, with it they are spread evenly over the four seconds")
views.show_figure(teacher_plots.returns(back), alt=words)
busiest = max(Counter(int(10 * t) for t in back["a random share"]).values())
assert busiest < 60  # of a thousand, in a tenth of a second

# %% [markdown]
# **Read it.** The dashed line is flat: in every tenth of a second about 25 threads come back. The other one is a single spike of a thousand: the refusal will be repeated.
#
# Now the teacher fails for real: one request in three. A refusal is a row of the table, not an error of the program:

# %%
FAULTS = {"429": 0.15, "500": 0.08, "reset": 0.05, "cut": 0.05}


def ask(client, body, tries=8):
    """The answer's text, and how many tries it took."""
    for attempt in range(tries):
        try:
            answer = client.chat.completions.create(**body)
            return answer.choices[0].message.content, attempt + 1
        except (openai.APIError, json.JSONDecodeError):
            time.sleep(pause(attempt, rng.random(), base=0.01))
    raise RuntimeError(f"the teacher must answer, got {tries} failures")


with Flaky(teacher.answer, FAULTS, seed=SEED) as server:
    client = openai.OpenAI(base_url=server.url, api_key="not-needed", max_retries=0)
    tries = Counter(ask(client, request(question, seed=i))[1] for i in range(60))
print({n: tries[n] for n in sorted(tries)})
assert sum(tries.values()) == 60

# %% [markdown]
# Sixty answers, none missing. (`max_retries=0`: the package retries by itself otherwise, twice; here we want to see it.)
#
# ## 3 · Many at a time
#
# **Idea.** A teacher thinks for seconds, and the program waits. So ask several at once: threads that wait cost nothing.
#
# **Formula.** Little's law: if $N$ requests are always under way and each takes $L$ seconds, then $N / L$ are answered per second. It holds for any queue.
#
# **Toy numbers.** 128 rows, two requests each, three seconds a request: one thread needs 768 seconds, 32 threads 24.
#
# > **Predict, then run.** A teacher takes 0.1 seconds. With 1, 2, 4, 8, 16, 32 threads: where does the measured line leave Little's, and who is to blame, the teacher or we?

# %%
def rate(threads, url, each=5):
    """Answers per second of so many threads."""
    client = openai.OpenAI(base_url=url, api_key="not-needed", timeout=60)
    bodies = [request(question, seed=i) for i in range(threads * each)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda body: client.chat.completions.create(**body), bodies))
    return len(bodies) / (time.perf_counter() - begun)


with Flaky(teacher.answer, latency=0.1) as server:
    rates = {threads: rate(threads, server.url) for threads in (1, 2, 4, 8, 16, 32)}
words = ("Answers per second against threads, both doubling: measured points follow "
         "the line of Little's law at first and fall below it at many threads")
views.show_figure(teacher_plots.throughput(rates, 0.1), alt=words)
assert rates[4] > 1.5 * rates[1]

# %% [markdown]
# **Read it.** The dashed line is Little's law. The points follow it as long as our own work, packing and unpacking messages, fits between the answers: about two thousandths of a second
# of this machine for each, and here the teacher works on the same core. A hosted teacher has its own machine and a longer latency, so 32 threads are far from that limit. There the limit is its 429.
#
# **The library's client** does what you have seen so far, and three things more. It halves the number of requests at a time when the server says it is busy, and adds one for every round that goes well.
# It has one deadline for a request, by the clock: a server that sends a byte a minute does not hold a thread for ever. And it counts money *before* it is spent.

# %%
from qftlab.remote.client import Budget, Client, read_chat

budget = Budget(price_in=PRICES[0], price_out=PRICES[1])
with Flaky(teacher.answer, FAULTS, seed=SEED, retry_after=0.05) as server:
    local = ServerConfig(url=server.url, threads=32, retries=8)
    with Client(local, budget=budget) as client:
        def told(question):
            """The text of one answer."""
            return client.ask("chat/completions", request(question), read_chat)

        asked = [f"{problem.program}\n{problem.report}" for problem in problems]
        texts = dict(client.map(told, asked))
texts = [texts[i] for i in range(len(asked))]
print(f"{len(texts)} answers, {client.totals.answers} paid and used")
assert server.meter()["answered"] == len(texts)

# %% [markdown]
# ## 4 · Nothing lost, nothing asked twice
#
# **Idea.** A run over the network will be killed: a laptop closes, a cluster's clock runs out. The program that this lesson's rows come from kept all answers in memory and wrote them at the end; killed
# at 127 of 128, it had nothing. The cure is old: a **journal**. Write each answer down *before* you use it, one line each, at the end of one file. To go on, read the file, and ask only for what is not in it.
#
# **What a kill leaves.** A line may be cut off in the middle. Such a line does not count, and it has to be *taken away*: the next one would be glued to it, and both would be lost.
#
# **The key of a line** is a hash of everything that the answer depends on: prompt, model, temperature, tools, the number of the sample. Change the prompt, and nothing in the journal fits: nobody trains on answers to a question that
# was not asked.
#
# ### Exercise 06.2 · Read a journal that was cut off (●●○, 10 minutes)
#
# Lines look like `{"key": "a1", "answer": "…"}`. Give back the answers by key (of two with the same key the first counts), and how many characters are whole lines.
#
# <details><summary>Hint</summary>
#
# A line is whole if its newline is there. `text.rfind("\n")` finds the last one, or −1.
# </details>

# %%
def my_replay(text):
    """The answers by key, and how many characters are whole lines."""
    ...


checks.check("06.2", my_replay)

# %% [markdown]
# A file whose second line was cut off:

# %%
replay = checks.or_library("06.2", my_replay)
torn = '{"key": "a", "answer": "one"}\n{"key": "b", "answer": "tw'
print(replay(torn))
assert replay(torn) == ({"a": "one"}, 30)

# %% [markdown]
# **Check.** Now a real run: the command `teach-data` in a process of its own, 8 threads, 48 rows. When 20 answers are in its journal we kill it, with the signal that no program can catch. Then the same command once more:

# %%
folder = tempfile.TemporaryDirectory()
output = Path(folder.name) / "set.json"
journal = output.with_suffix(".journal.jsonl")


def command(url):
    """`python -m qftlab teach-data …`, as one would type it."""
    options = {"problems": 48, "samples": 48, "threads": 8, "url": url,
               "model": "expert", "output": str(output), "seed": SEED}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "qftlab", "teach-data", *flags]


def whole_lines():
    """How many answers the journal has."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


with Flaky(teacher.answer, {"500": 0.1}, seed=SEED, latency=0.2) as server:
    run = subprocess.Popen(command(server.url), stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    while whole_lines() < 20 and run.poll() is None:
        time.sleep(0.01)
    run.kill()
    run.wait()
    kept, paid = whole_lines(), Counter(server.answered)
    done = subprocess.run(command(server.url), capture_output=True, text=True)
    twice = sum(count > 1 for count in server.answered.values())
assert done.returncode == 0, done.stderr
assert kept >= 20 and not output.with_suffix(".part").exists()
assert twice <= 8  # those that were under way, at most one a thread
print("\n".join(done.stdout.splitlines()[:1]))

# %% [markdown]
# What was under way at the kill, at most one request a thread, was paid for twice. What had been written down was not: the second run asked for nothing that the journal has.
#
# ## 5 · Two judges
#
# **Idea.** 240 answers have come, and every one has *something* to do with what was asked. Which of them are rows to train on? The course that invented this task has a checker. It looks for some thinking, for one of the
# two tokens (EDIT first), and for an object that begins with the name of the right tool, anywhere.
#
# Qwen3-8B, asked with 37 students' prompts, passed that checker with 292 of 370 answers: 79 %. A strict reading of the same answers passed 197: 53 %. In between are answers with both tokens (41), wrong arguments (34),
# the call in another place (13), and calls that no program could read (8).
#
# **The strict reading.** Thinking that is not empty; right behind it one token, once in the whole answer; then, after any words, one JSON call of the mode's tool, with exactly its arguments under `arguments`; then nothing.
#
# ### Exercise 06.3 · The strict reading (●●●, 15 minutes)
#
# `python` takes `code`; `editor` takes `original_code` and `modified_code`.
#
# <details><summary>Hint 1</summary>
#
# `text.partition("</think>")` gives what stands before, the mark, and what stands behind.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A pattern cannot know where a JSON object ends, because code may have braces too. `json.loads` of everything from the first `{` on can: it fails on anything behind the object.
# </details>

# %%
def my_reading(output):
    """The mode token of an answer that is right; "" for any other."""
    ...


checks.check("06.3", my_reading)

# %% [markdown]
# Both judges, on the 240 answers:

# %%
from qftlab_course.agent_edit.check import course_verdict
from qftlab_course.agent_edit.outputs import judge

reading = checks.or_library("06.3", my_reading)
lenient = [course_verdict(text).passed for text in texts]
strict = [reading(text) for text in texts]
assert [judge(text).mode if judge(text).ok else "" for text in texts] == strict
print(f"of {len(texts)} answers the lenient checker passes {sum(lenient)}, "
      f"the strict reading {sum(mode != '' for mode in strict)}")

# %% [markdown]
# The lab's `judge` gives a *reason* with each refusal. These are the reasons for answers that the lenient checker has passed:

# %%
why = Counter(judge(text).reason for text, ok in zip(texts, lenient, strict=True) if ok)
why.pop("", None)
words = ("Bars: why the strict reading refuses answers that the lenient checker "
         "passes; two tokens and wrong arguments are the longest")
views.show_figure(teacher_plots.reasons(why), alt=words)

# %% [markdown]
# **Read it.** All of these passed the lenient checker. A model that is trained on them learns to name both modes, and to call tools with arguments that they do not take.
#
# > **Predict, then run.** Form is one thing. Of the answers that are *strictly* right in form, how many are in the mode that was called for? Our problems are half and half.

# %%
said = [(p, mode) for p, mode in zip(problems, strict, strict=True) if mode]
print(f"{sum(p.mode == mode for p, mode in said)} of {len(said)} are in the right mode")
picked = Counter((p.title, mode) for p, mode in said)
for kind in ("crash", "named line", "wrong value", "failed test"):
    print(f"{kind:12} AGENT {picked[kind, AGENT]:3}   EDIT {picked[kind, EDIT]:3}")

# %% [markdown]
# The teacher *lies with confidence*: where nobody named the error, it saw the bug by itself and fixed it more often than not. Its form is perfect, and often its fix is right. It is still the wrong row: it teaches that
# AGENT is hardly ever called for. Qwen3-8B does the same: on the five questions that name no error, the students' 37 prompts got 56 AGENT and 97 EDIT.
#
# No judge of *form* can see that. It takes what we knew when we asked: the mode that the question was made for. The original program drew a mode for every row, wrote it down, and never compared.
#
# **Does the fix work?** One more thing can be known: whether the mended program passes the problem's own test. Nobody has read that program, so it runs in a sandbox, where it can do no harm, with limits on time and memory:

# %%
from qftlab_course.agent_edit.sandbox import run_code, run_tests

if colab:  # elsewhere the sandbox came with JupyterLab
    get_ipython().system("pip install -q 'pydantic-monty>=1.4,<1.5'")
crash = next(problem for problem in problems if problem.title == "crash")
for program in (crash.program, crash.fixed):
    print(run_tests(program, crash.tests).passed)
print(run_code("while True:\n    pass", timeout=0.5).status)

# %% [markdown]
# Which sandbox it was is in every result (`level`): `monty`, an interpreter that knows no files and no network, or `bwrap`, a real Python in an empty house. There is a third level, `process`, which limits but does not confine; it is never chosen for you.
#
# ## 6 · The same money twice
#
# **The game.** You have 60 cents. Two ways to spend them:
#
# - **Quantity.** Ask each question once. Keep what the lenient checker passes.
# - **Filtering.** Keep an answer only if it is strictly right, in the mode that the question was made for, and its fix passes the test. If it is not, ask again, up to three times.
#
# Filtering throws away more than half of what it paid for. Quantity gets more than twice the rows. Both train the same model, from the same start, for the same number of steps.
#
# A recipe makes a row from a task: `whole` is the library's own for the strict way. The lenient one is short:

# %%
from qftlab.remote.client import BudgetError
from qftlab_course.agent_edit.teacher import plan, teach
from qftlab_course.agent_edit.recipes import whole


def lenient_recipe(ask, task):
    """One answer, as it comes; the checker of the course decides."""
    question = f"{task.problem.program}\n{task.problem.report}"
    output = ask(request(question)["messages"], prompts.TOOLS)
    issues = [] if course_verdict(output).passed else ["checker"]
    return {"instruction": question, "output": output, "issues": issues}


SETTINGS = {"model": "expert", "temperature": 0.7, "max_tokens": 512}


def spend(recipe, tries):
    """The valid rows that `MONEY` buys, and how many answers it paid for."""
    many = bug_problems(1000, SEED + 1)
    tasks = plan(many, len(many), (AGENT, EDIT), seed=SEED)
    rows, purse = [], Budget(money=MONEY, price_in=PRICES[0], price_out=PRICES[1])
    with Flaky(expert.Expert(seed=SEED, wrong_fixes=0.1).answer) as server:
        alone = ServerConfig(url=server.url, threads=1)  # always the same game
        with Client(alone, budget=purse) as client:
            try:
                rows.extend(teach(client, tasks, recipe, SETTINGS, tries=tries))
            except BudgetError:
                pass  # the purse is empty
    return [row for row in rows if row["valid"]], client.totals.requests


# %% [markdown]
# Both purses, spent:

# %%
sets = {}
for name, recipe, tries in [("quantity", lenient_recipe, 1), ("filtering", whole(), 3)]:
    sets[name], paid = spend(recipe, tries)
    modes = Counter(re.search(r"AGENT|EDIT", row["output"].partition("</think>")[2])[0]
                    for row in sets[name])
    print(f"{name:9}: {paid} answers, {len(sets[name])} rows:", sorted(modes.items()))

# %% [markdown]
# > **Predict, then run.** Which set gives the better model, on 300 programs that were never seen? And *where* will the other one fail: on the bugs that are named, or on those that are not?
#
# Quantity comes first. The model is `extended`: it has the two tokens, and has never seen a chat.

# %%
from qftlab import TrainConfig, bundled, fit_rows, generate, load_rows

held_out = load_rows(bundled("bugfix", "heldout.jsonl"))
MODE = re.compile(r"<\|(AGENT|EDIT)\|>")


def trained_on(rows):
    """A fresh model after `STEPS` steps on some rows."""
    start = stages.stage("extended")
    train = TrainConfig(lr=2e-3, max_steps=STEPS, batch_size=8, seed=SEED)
    fit_rows(start.model, start.tokenizer, rows, train)
    return start


def picks(start, rows):
    """Of each kind of bug the share of programs with the right mode."""
    asked = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    said = generate(start.model, start.tokenizer, asked, max_new_tokens=32,
                    batch_size=150)
    kinds = {row["kind"]: [] for row in rows}
    for row, answer in zip(rows, said, strict=True):
        found = MODE.search(answer.text)
        kinds[row["kind"]].append(found is not None and found[1] == row["mode"])
    return {kind: sum(marks) / len(marks) for kind, marks in sorted(kinds.items())}


models = {name: trained_on(rows) for name, rows in sets.items()}
shares = {name: picks(model, held_out) for name, model in models.items()}

# %% [markdown]
# The share of the right mode, by kind of bug:

# %%
words = ("Right mode by kind of bug: both sets teach crashes and named lines; wrong "
         "values and failed tests are right after filtering only")
views.show_figure(teacher_plots.modes_picked(shares), alt=words)

# %% [markdown]
# **Read it.** Both models are right about crashes and named lines, where the error is known. Where nobody names it, the model of *quantity* (plain bars) says EDIT nearly always: it has learned its teacher's bad habit. The model of
# *filtering* (hatched) is right there too, from fewer than half the rows.

# %% tags=["nbval-ignore-output"]
mean = {name: sum(by_kind.values()) / len(by_kind) for name, by_kind in shares.items()}
print("on this machine:", {name: f"{share:.0%}" for name, share in mean.items()})

assert mean["filtering"] > mean["quantity"] + 0.2

# %% [markdown]
# How general is that? One small model, one teacher whose lies we chose to be as frequent as those of Qwen3-8B. What carries over is the shape of the result: faults that are *random* (a bracket missing here, a token twice
# there) are averaged out by a model that sees enough rows; faults that are *systematic* are learned. More rows do not help against those, only a judge who knows something that the teacher does not.
#
# ### Balance
#
# The plan asked for both modes equally often. The filter did not let them through equally, because the teacher is worse at one of them. A model that sees EDIT twice as often as AGENT will, in doubt, say EDIT. So count what is *left*, and either ask more for the scarce mode or
# leave out some of the other.
#
# ### Exercise 06.4 · Balance (●○○, 6 minutes)
#
# <details><summary>Hint</summary>
#
# How often is the scarcest mode there? Each mode may stay so often, and its first rows stay.
# </details>

# %%
def my_balanced(modes):
    """The numbers of the rows to keep, in order: of each mode equally many."""
    ...


checks.check("06.4", my_balanced)

# %% [markdown]
# What is left of the rows that 60 cents bought:

# %%
balanced = checks.or_library("06.4", my_balanced)
modes = [row["expected_type"] for row in sets["filtering"]]
kept = [modes[i] for i in balanced(modes)]
print(dict(Counter(modes)), "→", dict(Counter(kept)))
assert kept.count("AGENT") == kept.count("EDIT")

# %% [markdown]
# **The other recipe.** Half of the faults above are in the *call*: JSON, arguments, a fix that does not fix. But who needs the teacher for that? The program has the buggy code, and a mended one that passed the test. It can write the call itself, without a
# fault, and let the teacher do what a program cannot: *reason*. The recipe `reasoned` asks for the thinking and the mode only, keeps it if the mode is the right one, and puts the row together. It is the better one, and
# cheaper, since thinking is short:

# %%
from qftlab_course.agent_edit.recipes import reasoned

made, paid = spend(reasoned(), 3)
print(f"reasoned : {paid} answers paid, {len(made)} rows")
assert len(made) > len(sets["filtering"])

# %% [markdown]
# > **Explain.** A colleague says: "I validated my data, 98 % pass." Which two questions do you ask before you believe that a model trained on it will pick the right mode?
#
# ## 7 · What goes wrong in practice
#
# **Errors that are not the program's.** For EDIT a user has to name an error. The original program drew one of ten error texts at random and put it beside any code: "IndexError" over a function without a list. A model learns from that
# to look at the word "Error" and not at the program. Running the program costs 50 milliseconds, and its own error is true:

# %%
broken = "def total(xs):\n    return sum(xs) / count\n\ntotal([1, 2])"
error = run_code(broken).error
print(error.partition(". Did you mean")[0])

# %% [markdown]
# **The tokens were never tokens.** The same repository trained its rows on a model whose tokenizer had not been extended. `<|AGENT|>` went in as seven ordinary pieces, came out as seven ordinary pieces, and every score was
# computed on the text, where nobody sees the difference. In this lab `new_tokens` extends tokenizer and model before the first step, and rewards read ids.
#
# **The list is written at the end.** Or the folder for it is made at the end, after two hours of requests. Or rows come in the order in which they were answered, so that no two runs give the same file.
#
# **Retrying what cannot succeed.** A wrong key is a 401: asking eight times more helps nobody. The client asks again after 408, 425, 429, every 5xx and everything that is broken on the way, and for all else ends at once, with what the server said.
#
# **A cap that is checked afterwards.** With 32 requests under way, "stop at 10 dollars" stops at 10 and 32 answers more. The client sets the price of an answer aside *before* it asks, at its largest.

# %% [markdown]
# ## Your exercises

# %%
checks.progress("06")

# %% [markdown]
# ## At real size
#
# The same prompts and the same program, against any endpoint that you have. The address and the key are in the environment:
#
# ```bash
# export OPENAI_BASE_URL=http://localhost:8000/v1        # vLLM, or a hosted service, or a proxy
# export OPENAI_API_KEY=…
# python -m qftlab teach-data --data livecodebench/code_generation_lite --samples 128 --threads 32 \
#     --model gpt-4.1 --budget.money 5 --budget.price_in 2 --budget.price_out 8
# python -m qftlab validate --data outputs/training_data/training_data_from_parquet.json
# python -m qftlab sft --config recipes/agent-edit.yaml
# ```
#
# **Different:** problems of LiveCodeBench have no buggy program, so the teacher plants one first, and it is run on the problem's examples: a request more for each row. Killed or refused, the same command goes on. With Qwen3-8B
# the recipe trains adapters on weights of 4 bits, and the rows of the two tokens. **Published:** 128 rows in five to fifteen minutes with 32 threads (the original's README). **Our own run:** not run by us, because no endpoint is to be had here.
#
# ## Recap
#
# 1. The prompt says how modes are told apart by what the user *says*, and "exactly" of everything that may occur once.
# 2. Wait a random share of a limit that doubles; obey `Retry-After`.
# 3. Threads ÷ latency, until your own work or their refusal is the limit.
# 4. Write each answer down before it is used; take a torn line away; the key is a hash of the whole question.
# 5. A lenient checker measures looks. Judge form strictly, the mode against what was asked, the fix by its test.
# 6. Random faults are averaged out, systematic ones are learned. And count the balance of what is left.
#
# **Next.** *07 · DPO*: when two answers are there and one is better.
#
# **Sources.** The task, its checker and its data: Mubuky, *FNLP-Summer-Day4* (MIT), and the course *SummerQuest 2025*. The counts of Qwen3-8B's answers: 37 participants' `hw3_2.json`, read by this lab. Assembled calls: qfwu, *hw4*. Full jitter: M. Brooker 2015,
# *Exponential backoff and jitter* (AWS architecture blog). J. Little 1961, *A proof for the queuing formula L = λW*.
