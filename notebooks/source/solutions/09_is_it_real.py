# %% [markdown]
# # 09 · Is it real? Solutions
#
# One good answer to each exercise of [09 · Is it real?](../09_is_it_real.ipynb), with the reason in a sentence or two. Yours may look
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
import math

import numpy as np

from qftlab_course import checks
from qftlab_course.lessons import ab_game

# %% tags=["parameters"]
SEED = 0
EXPERIMENTS = 2000

# %% [markdown]
# ## Exercise 09.1 · An interval that counts prompts
#
# The first line is the whole idea: from there on there are P numbers and no answers any more. A dict keeps prompts apart whatever their names and order are.

# %%
def my_interval(values, prompts):
    from scipy.stats import t

    groups = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    means = [np.mean(group) for group in groups.values()]
    reach = t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
    return np.mean(means), np.mean(means) - reach, np.mean(means) + reach


checks.check("09.1", my_interval)

# %% [markdown]
# Does it keep its promise? Two thousand experiments with 50 prompts of 16 answers, whose rates differ from prompt to prompt (a Beta law with mean 0.4):

# %%
chance = np.random.default_rng(SEED)
held = 0
for _ in range(EXPERIMENTS):
    rates = chance.beta(0.4, 0.6, size=50)
    marks = (chance.random((50, 16)) < rates[:, None]).astype(float)
    _, low, high = my_interval(marks.flatten(), np.arange(50).repeat(16))
    held += low <= 0.4 <= high
print(f"{held / EXPERIMENTS:.0%} of the intervals hold the true rate")
assert 0.93 < held / EXPERIMENTS < 0.97

# %% [markdown]
# ## Exercise 09.2 · Two models on the same prompts
#
# Only the prompts that changed say anything. With as many gained as lost, twice the tail counts the middle twice and passes 1; that case is p = 1.

# %%
def my_paired_p(a, b):
    gained = sum(y and not x for x, y in zip(a, b, strict=True))
    lost = sum(x and not y for x, y in zip(a, b, strict=True))
    m = gained + lost
    tail = sum(math.comb(m, i) for i in range(min(gained, lost) + 1)) / 2**m
    return min(1.0, 2 * tail)


checks.check("09.2", my_paired_p)

# %% [markdown]
# How often does it cry wolf, where nothing is to be found? At p < 0.05 at most once in twenty; being exact, it stays below.

# %%
pairs = [ab_game.alike_marks(chance, 200, 0.5, 0.5, 0.5) for _ in range(EXPERIMENTS)]
false = sum(my_paired_p(a.tolist(), b.tolist()) < 0.05 for a, b in pairs)
print("false alarms: at most one in twenty:", false / EXPERIMENTS < 0.06)
assert false / EXPERIMENTS < 0.06

# %% [markdown]
# ## Exercise 09.3 · pass@k
#
# `math.comb(n - c, k)` is 0 where fewer than k are wrong: then one of k is right for certain.

# %%
def my_pass_at_k(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


checks.check("09.3", my_pass_at_k)

# %% [markdown]
# Unbiased means: on average over samples it gives the true chance, here $1 - 0.7^4 = 0.76$, from only eight answers. The short cut is too low.

# %%
counts = chance.binomial(8, 0.3, size=20_000)
exact = np.mean([my_pass_at_k(8, int(c), 4) for c in counts])
short = np.mean(1 - (1 - counts / 8) ** 4)
print(f"unbiased {exact:.2f}, short cut {short:.2f}, truth {1 - 0.7**4:.2f}")
assert abs(exact - (1 - 0.7**4)) < 0.01 and short < exact - 0.02

# %% [markdown]
# ## Exercise 09.4 · A judge, asked in both orders
#
# In the other order the places have changed hands: "second" is A. Two ties agree with each other, and the order decided nothing.

# %%
def my_win_rate(shown_first, shown_second):
    worth = {"first": 1.0, "tie": 0.5, "second": 0.0}
    pairs = list(zip(shown_first, shown_second, strict=True))
    won = sum((worth[x] + 1 - worth[y]) / 2 for x, y in pairs)
    decided = sum(x == y != "tie" for x, y in pairs)
    return won / len(pairs), decided / len(pairs)


checks.check("09.4", my_win_rate)

# %%
print(*my_win_rate(["first"] * 4, ["first"] * 4), "a judge that always takes the first")
print(*my_win_rate(["first"] * 4, ["second"] * 4), "a judge that likes A")
checks.progress("09")
