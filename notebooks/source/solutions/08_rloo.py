# %% [markdown]
# # 08 · RLOO: solutions
#
# One good answer to each exercise of [08 · RLOO](../08_rloo.ipynb), with the reason in a sentence or two. Yours may look
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
import statistics

import torch

from qftlab import (
    SamplingParams, TrainConfig, bundled, countdown_reward, encode_prompts,
    extract_answer, fit_rows, fresh_problems, generate, parse_expression,
)  # fmt: skip
from qftlab_course import checks, stages, views
from qftlab_course.lessons import policy_plots

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
GROUP = 8
PUZZLES = 256

# %% [markdown]
# ## Exercise 08.1 · Leave one out
#
# The sum of the others is the sum of all minus your own. Equivalent, and one line: `(rewards - rewards.mean(-1, keepdim=True)) * G / (G - 1)`. The library
# adds up differences instead, so that a group of equal rewards gives exactly 0.

# %%
def my_advantages(rewards):
    others = rewards.sum(-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


checks.check("08.1", my_advantages)

# %% [markdown]
# ## Exercise 08.2 · The clipped loss
#
# The minimum takes the *worse* of two offers. A clip alone would also forgive an answer that moved the wrong way: its gradient would be 0 just when it is needed.

# %%
def my_clipped_loss(logprobs, old_logprobs, advantages, epsilon):
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clipped * advantages)


checks.check("08.2", my_clipped_loss)

# %%
logprobs = torch.tensor([1.5, 1.5]).log().requires_grad_()
both = torch.tensor([1.0, -1.0])
my_clipped_loss(logprobs, torch.zeros(2), both, 0.2).sum().backward()
print([round(g, 2) for g in logprobs.grad.tolist()])  # the good one is done
assert logprobs.grad[0] == 0 and logprobs.grad[1] > 0

# %% [markdown]
# ## Exercise 08.3 · k3
#
# $e^r - 1 \ge r$ for every $r$, so no sample is negative. And the average is right: $e^r$ is $\pi_{ref}/\pi$, whose mean over samples of $\pi$ is 1, so $e^r - 1$ adds nothing
# on average, and it takes away much of the scatter of $-r$.

# %%
def my_k3(logprobs, ref_logprobs):
    ratio = ref_logprobs - logprobs
    return ratio.exp() - 1 - ratio


checks.check("08.3", my_k3)

# %% [markdown]
# ## Exercise 08.4 · Rejection sampling: choose what to train on

# %%
def my_selection(prompts, answers, rewards, limit):
    kept = []
    for prompt, texts, marks in zip(prompts, answers, rewards, strict=True):
        marked = zip(texts, marks, strict=True)
        right = dict.fromkeys(text for text, mark in marked if mark == 1)
        kept += [(prompt, text) for text in list(right)[:limit]]
    return kept


checks.check("08.4", my_selection)

# %% [markdown]
# And the training it is for: 256 fresh puzzles, eight answers each, and what is right goes into two epochs of SFT. Before and after, the model answers 256 other puzzles
# four times each, at temperature 1.

# %%
model, tokenizer = (stage := stages.stage("warm", preset=PRESET)).model, stage.tokenizer


def roll_out(rows, group):
    """Texts and rewards of `group` answers to each row."""
    prompts = [prompt.ids for prompt in encode_prompts(tokenizer, rows)]
    answers = generate(model, tokenizer, prompts, num_generations=group, seed=SEED,
                       max_new_tokens=32, batch_size=512,
                       params=SamplingParams(temperature=1.0))
    texts = [[a.text for a in answers[i * group :][:group]] for i in range(len(rows))]
    marks = [[countdown_reward(text, row["numbers"], row["target"]) for text in some]
             for row, some in zip(rows, texts, strict=True)]
    return texts, marks


def accuracy(rows):
    """Share of right answers among four to each row."""
    return statistics.fmean(mark == 1 for row in roll_out(rows, 4)[1] for mark in row)


# %% tags=["nbval-ignore-output"]
puzzles = fresh_problems(PUZZLES, SEED + 10)
others = fresh_problems(PUZZLES, SEED + 11)
before = accuracy(others)
texts, rewards = roll_out(puzzles, GROUP)
chosen = my_selection([row["instruction"] for row in puzzles], texts, rewards, 2)
rows = [{"instruction": prompt, "input": "", "output": text} for prompt, text in chosen]
config = TrainConfig(lr=3e-4, batch_size=32, epochs=2, seed=SEED)
fit_rows(model, tokenizer, rows, config)
after = accuracy(others)
print(f"on this machine: {len(rows)} rows; {before:.0%} right, then {after:.0%}")

# %% [markdown]
# With rewards of 0 and 1 this is REINFORCE without a baseline: two epochs of it on one rollout. Wrong answers teach it nothing, and a puzzle that the model
# never solves never enters the set. RLOO also pushes down.

# %% [markdown]
# ## Exercise 08.5 · Repair the verifier
#
# One line was missing. It compares sorted lists, because a number may be given twice. Nothing else is needed: the parser already knows which operations are allowed.

# %%
def my_verifier(text, numbers, target):
    expression = parse_expression(extract_answer(text) or "")
    if expression is None:
        return 0.0
    uses_all = sorted(expression.numbers) == sorted(numbers)
    return 1.0 if uses_all and expression.value == target else 0.1


checks.check("08.5", my_verifier)

# %% [markdown]
# ## Predict, then run: whose histogram is the widest?
#
# That of *plain reward + 1*. Each answer is pushed by at least 1, whatever it is worth, and the pushes of the eight cancel only on average. *Plain reward* and *leave one out*
# are about equal: most rewards are 0.1, so there is little for a baseline to take off. Were the model right nine times in ten, the plain reward would be the noisy one: the lesson counts a mean square of 0.90 against 0.10.
#
# ## Predict, then run: the hack
#
# The paid reward goes to 1 and stays. The truth rises for some steps at best, and goes to 0. No alarm sounds in the log: length falls, as the target alone is short, which looks like thrift; entropy falls as it does in every run that
# learns, and the share of groups all alike rises as it should in a run that succeeds. Only the truth, measured beside the pay, or a look at the samples, tells.
#
# ## Explain: "just add a KL penalty"
#
# A leash sets how far the policy goes, not which way. With the gap in place the shortcut still pays best for each nat, so a loose leash ends at the same place;
# a tight one keeps the honest gain away as well. We tried both, ten runs each, from the lesson's student and with the lesson's `run_course`:

# %%
record = json.loads(bundled("records", "08_leashed_hack.json").read_text())["runs"]
betas = {f"β = {beta}": [run[beta] for run in record] for beta in ("0.1", "1")}
leashed = {name: (runs[0], runs[1:]) for name, runs in betas.items()}
views.show_figure(policy_plots.courses(leashed), alt="With beta 0.1 paid reward climbs "
                  "to 1, true accuracy falls to 0; with beta 1 both stay. Ten runs.")
assert all(max(run["true"][-5:]) < 0.05 for run in betas["β = 0.1"])

# %% [markdown]
# Left: hacked all the same. Right: not hacked, and nothing learned either. A leash buys time to notice; the cause is the verifier.

# %%
checks.progress("08")
