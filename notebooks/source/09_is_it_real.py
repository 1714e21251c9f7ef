# %% [markdown]
# # 09 · Is it real?
#
# Model B is right three points more often than model A. Is B better, or were the dice kind? Every table of results asks you this, and most do not help you to answer. Here you guess first, on
# twenty comparisons whose truth we know. Then you build what answers: an interval that counts prompts, a test that pairs them, the number of prompts you need. You catch a judge that likes
# whatever stands first. And you hand a model over: exported, loaded by others, served to a client, and still saying the same.
#
# ![Forty experiments, twice: intervals that count answers mostly miss the truth, intervals that count prompts hardly ever](figures/09_is_it_real.png)
#
# **Read it.** One line is one experiment: 50 prompts, 16 answers each, and its 95 % interval. The dashed line is the truth. A cross is an interval that misses it. Both panels show the same experiments; left counts answers, right counts prompts.
#
# | | |
# |---|---|
# | **You will be able to** | say what an interval promises, and when it lies · compare two models on the same prompts · say how many prompts a difference needs · compute pass@k without bias · use a judge, and measure its bias · export a model, and prove that it is the same one |
# | **Time** | 40 minutes to read, 34 for the four exercises; a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [00 · The tour](00_tour.ipynb); [07 · DPO](07_dpo.ipynb) and [08 · RLOO](08_rloo.ipynb) help |

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
import statistics

import numpy as np
import torch

from qftlab import (
    SamplingParams, contamination, countdown_reward, encode_prompts, fresh_problems,
    generate, wilson_interval,
)  # fmt: skip
from qftlab.evaluate import statistics as rates
from qftlab_course import checks, stages, views
from qftlab_course.lessons import ab_game, evaluation_plots

# %% [markdown]
# Everything you may want to change is in this cell. `MY_CALLS` is your way to play part 1 by typing: a letter for each result, r for real and n for noise. Leave it empty to use the buttons.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
MY_CALLS = ""
PUZZLES, ANSWERS = 200, 16
DRAWS = 1000

# %% [markdown]
# ## 1 · Real or noise?
#
# **A case of ours.** After an early DPO run of this lab we asked the model the same puzzles as before it. 43 puzzles were gained: wrong before, right after. 33 were lost. Ten more right, so DPO helps?
#
# > **Predict, then run.** If DPO changed nothing but the dice, each of these 76 puzzles would be a coin: gained or lost. Toss 76 coins. How often are they as lopsided as 43 to 33, one way or the other: once in
# > a hundred times, once in twenty, or once in three?

# %%
as_lopsided = sum(math.comb(76, i) for i in range(34)) * 2 / 2**76
print(f"once in {1 / as_lopsided:.1f} times")
assert as_lopsided > 0.25

# %% [markdown]
# A difference like that comes from dice alone in three experiments of ten. We could not say that DPO helped, and we said so. It is easy to see only when somebody has counted the coins.
#
# **Your turn.** Twenty comparisons. In each, B looks better than A. In ten of them it *is*: by 3, 4, 5, 6 or 10 points. In the other ten the two models are equally good, and you see the
# dice. You get what a table of results gives you: two rates, and the number of prompts. (We made them by chance with a known truth, because real results never come with one.)

# %%
game = ab_game.ABGame(ab_game.planted_results(seed=SEED), typed=MY_CALLS)
game

# %% [markdown]
# Made all twenty calls? Keep going: the truth comes in part 4. A coin gets ten right.

# %% [markdown]
# ## 2 · How far off can a rate be?
#
# **Idea.** Your prompts are a sample of all the prompts you could have asked. Another sample, another rate. An interval says how far the sample's rate may be from the one you want.
#
# $$ \hat p \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n}} $$
#
# is what school teaches, with $z = 1.96$ for 95 %. Wilson's form (1927) is the same idea, done right near 0 and 1: it never leaves them, and it has a width where all answers are right.
#
# **Toy numbers.** 40 % right, on more and more prompts:

# %%
for n in (50, 200, 800, 3200):
    low, high = wilson_interval(0.4 * n, n)
    print(f"{n:5} prompts: {low:.0%} to {high:.0%}, ± {50 * (high - low):.1f} points")
low, high = wilson_interval(50, 50)
print(f"50 of 50 right: {low:.0%} to {high:.0%}")

# %% [markdown]
# Four times the prompts, half the width. With 50 prompts a rate is good to 13 points each way, and "40 % against 45 %" says nothing at all. And fifty right answers of fifty do not
# mean 100 %: at 93 % such a run would still come up once in forty.
#
# **What 95 % promises.** Not that *this* interval holds the truth. It promises that of a hundred such experiments about 95 intervals do. That can be tested: run the experiment many times where the
# truth is known, and count.

# %% [markdown]
# ## 3 · Sixteen answers to one prompt
#
# **Idea.** Prompts are dear, answers are cheap. So one asks each prompt 16 times: Stanford's course on RL for language models scores its students on 50 prompts × 16 answers. Is that as good as 800 prompts?
#
# Three models of the course, 200 fresh puzzles, 16 answers each, drawn as that course draws them (temperature 0.6, top-k 20, top-p 0.95):

# %%
COURSE = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
puzzles = fresh_problems(PUZZLES, SEED + 7)


def ask(stage, rows, group=ANSWERS, seed=SEED):
    """Texts and marks (rows, group) of a course model's sampled answers."""
    model, tokenizer = stage.model, stage.tokenizer
    prompts = [prompt.ids for prompt in encode_prompts(tokenizer, rows)]
    answers = generate(model, tokenizer, prompts, num_generations=group, seed=seed,
                       max_new_tokens=32, batch_size=512, params=COURSE)
    texts = [[a.text for a in answers[i * group :][:group]] for i in range(len(rows))]
    right = [[countdown_reward(text, row["numbers"], row["target"]) == 1
              for text in some] for row, some in zip(rows, texts, strict=True)]
    return texts, np.array(right, dtype=float)


models = {name: stages.stage(name, preset=PRESET) for name in ("sft", "dpo", "rloo")}
asked = {name: ask(stage, puzzles) for name, stage in models.items()}
marks = {name: found for name, (_, found) in asked.items()}

# %% [markdown]
# **The experiment.** Let these 200 puzzles be the world. Its true rate is known: we asked them all. Draw 50 of them at random, with all their answers. Count 800 answers, compute
# Wilson's interval, see whether the truth is inside. A thousand times.

# %%
def experiments(found, interval, draws=DRAWS, prompts=50):
    """Intervals from random prompts of `found` (P, G), one for each experiment."""
    chance = np.random.default_rng(SEED)
    return [interval(found[chance.integers(0, len(found), prompts)])
            for _ in range(draws)]


def each_answer(sample):
    """Marks (P, G) as two lists: a number for each answer, and its prompt's number."""
    prompts = np.arange(len(sample)).repeat(sample.shape[1])
    return sample.flatten().tolist(), prompts.tolist()


def by_answer(sample):
    """Wilson's interval, as if all answers were independent."""
    return wilson_interval(sample.sum(), sample.size)


def share_held(intervals, truth):
    """How many of the intervals hold the truth."""
    return statistics.fmean(low <= truth <= high for low, high in intervals)

# %% [markdown]
# > **Predict, then run.** Three models: after SFT, after DPO, after RLOO. How often does a "95 %" interval hold the truth? For which of the three is it worst?

# %% tags=["nbval-ignore-output"]
naive = {name: experiments(found, by_answer) for name, found in marks.items()}
held = {name: share_held(naive[name], marks[name].mean()) for name in marks}
for name, share in held.items():
    print(f"{name}: {marks[name].mean():.0%} right; {share:.0%} of intervals hold that")
assert max(held.values()) < 0.88 and held["rloo"] < held["sft"]

# %% [markdown]
# 95 was promised. The better trained the model, the worse the interval lies: after RLOO most "95 %" intervals miss.
#
# **Why.** Answers to one prompt are alike. RLOO made the model sure of itself (notebook 08: its entropy falls), so a puzzle is solved sixteen times or never. The second answer to a prompt tells little that the first did not. How alike
# they are is a number, the *correlation within* prompts $\rho$, and it says what 16 answers are worth:
#
# $$ \text{variance of the mean} = \frac{p(1-p)}{P\,m}\,\big(1 + (m - 1)\,\rho\big) $$
#
# for $P$ prompts with $m$ answers each. At $\rho = 0$ all answers count; at $\rho = 1$ a prompt counts once, whatever $m$ is.

# %%
inside = {name: found.var(1, ddof=1).mean() for name, found in marks.items()}
alike = {name: 1 - inside[name] / found.var() for name, found in marks.items()}
worth = {name: ANSWERS / (1 + (ANSWERS - 1) * rho) for name, rho in alike.items()}
for name, number in worth.items():
    print(f"{name}: 16 answers to a prompt are worth about {number:.0f}")
assert worth["sft"] > worth["dpo"] > worth["rloo"] > 1

# %% [markdown]
# **What helps.** Count prompts. Take the mean of each prompt; these $P$ numbers *are* independent. Their mean, their spread, and Student's $t$, because there are few of them:
#
# $$ \bar y \pm t_{0.975,\,P-1} \cdot \frac{s}{\sqrt P}, \qquad s^2 = \frac{1}{P-1} \sum_i (y_i - \bar y)^2 $$
#
# **Toy numbers.** Four prompts with means 1, 1, 0, 0.5: mean 0.625, $s = 0.479$, $t_{0.975,3} = 3.18$. The interval: $0.625 \pm 3.18 \cdot 0.479 / 2 = 0.625 \pm 0.762$. Four prompts say nothing, however often they were asked.
#
# ### Exercise 09.1 · An interval that counts prompts (●●○, 10 minutes)
#
# `values` has one number for each answer, `prompts` says which prompt it answers; prompts may have different numbers of answers, and there are two prompts at least. Every prompt counts the same.
#
# <details><summary>Hint 1</summary>
#
# First a list of prompt means. From there on answers do not matter.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `scipy.stats.t.ppf(0.975, P - 1)`, and `numpy.std(means, ddof=1)`.
# </details>

# %%
def my_interval(values, prompts):
    """Mean of prompt means, and its 95 % interval by t: (mean, low, high)."""
    ...


checks.check("09.1", my_interval)

# %%
interval_of = checks.or_library("09.1", my_interval)
mean, low, high = interval_of([1, 1, 1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3])
print(f"{mean:.3f}, from {low:.3f} to {high:.3f}")
assert abs(high - mean - 0.762) < 1e-3
ours = rates.clustered_interval(*each_answer(marks["dpo"]), method="t")
assert np.allclose(interval_of(*each_answer(marks["dpo"])), ours)

# %% [markdown]
# **The same thousand experiments, counted by prompts.** The library's interval is by default Wilson's with as many answers as they are worth, and with $t$ for 1.96: the same idea, and better near 0 and 1, where the spread of few prompts is often seen too small.

# %%
def by_prompt(sample):
    """(low, high) of the library's interval."""
    return rates.clustered_interval(*each_answer(sample))[1:]


honest = {name: experiments(found, by_prompt) for name, found in marks.items()}
held = {name: share_held(honest[name], marks[name].mean()) for name in marks}
assert all(0.92 < share < 0.98 for share in held.values())
shown = {"count answers": naive["rloo"][:40], "count prompts": honest["rloo"][:40]}
views.show_figure(
    evaluation_plots.coverage(shown, marks["rloo"].mean(), "rate, 50 × 16 answers"),
    alt="Forty intervals by answers, most with a cross because they miss the truth; "
    "forty by prompts, wider, of which next to none misses")

# %% [markdown]
# **Read it.** Left are the short lines that everybody likes to report, and the crosses where they miss. Right are the same experiments, counted by prompts: more than three times as wide for this model, and true.
#
# **In one sentence:** *an interval is as wide as your prompts are few.* More answers make each prompt's own rate sharper. They do not make more prompts.

# %% [markdown]
# ## 4 · The same prompts, twice
#
# **Idea.** Two models, two rates, two intervals that overlap: no difference? Not so fast. Both answered the *same* prompts, and what is hard for one is hard for the other. So the luck of the prompts is in both rates,
# and it cancels in their difference. Compare prompt by prompt.
#
# With one answer each, only the prompts count on which the two differ, and under "no difference" each of them is a coin (McNemar 1947):
#
# $$ p = 2 \sum_{i=0}^{\min(g, l)} \binom{g+l}{i} \Big/ 2^{\,g+l}, \quad \text{at most } 1, \qquad g \text{ gained}, \; l \text{ lost} $$
#
# **Toy numbers.** 5 gained, 1 lost: $2 \cdot (1 + 6) / 64 = 0.22$. Five to one sounds like a lot. It is six coins.
#
# ### Exercise 09.2 · Two models on the same prompts (●●○, 10 minutes)
#
# <details><summary>Hint</summary>
#
# `math.comb`, and mind what happens if as many are gained as lost.
# </details>

# %%
def my_paired_p(a, b):
    """Exact two-sided p of "equally often right", from marks on the same prompts."""
    ...


checks.check("09.2", my_paired_p)

# %%
paired_p = checks.or_library("09.2", my_paired_p)
before, after = [0] * 43 + [1] * 33, [1] * 43 + [0] * 33  # DPO, of part 1
for a, b in [([0] * 5 + [1], [1] * 5 + [0]), (before, after)]:
    print(f"{sum(b)} gained, {sum(a)} lost: p = {paired_p(a, b):.2f}")
    assert abs(paired_p(a, b) - rates.paired_test(a, b, range(len(a))).p_value) < 1e-9

# %% [markdown]
# **Now the game.** What the paired test says of the twenty results, and the truth. `gained` and `lost` are what a table of results should have told you. Do not be surprised if a crude rule, "real from five points on", has more calls right: half of these twenty *are* real, so it pays to say so often. What that costs comes next.

# %%
by_test = ["real" if r.p_value < 0.05 else "noise" for r in game.results]
by_gap = ["real" if r.gap >= 0.05 else "noise" for r in game.results]
for name, calls in {"five points or more": by_gap, "p < 0.05": by_test}.items():
    print(f"{name}: {ab_game.count_right(game.results, calls)} of 20 calls true")
print(f"you: {game.score} of 20" if game.score else "you: some calls to go")
game.table()

# %% [markdown]
# The test does not win by much, and it misses real gains: 3 points on 50 prompts look like noise to anybody. What it promises is something else: how often it cries wolf. A hundred games like this one:

# %%
many = [r for s in range(100) for r in ab_game.planted_results(seed=SEED + 1 + s)]
said = {"five points or more": [r.truth for r in many if r.gap >= 0.05],
        "p < 0.05": [r.truth for r in many if r.p_value < 0.05]}
for name, truths in said.items():
    false = truths.count("noise") / len(truths)
    print(f"{name}: says real {len(truths)} times, and {false:.0%} of that is noise")

# %% [markdown]
# So read "real" as *real*, and "noise" as *cannot tell from here*. A test that finds nothing has not shown that there is nothing; part 5 says what it could have found.
#
# **With many answers a prompt** the same idea holds: subtract prompt by prompt, and count prompts. DPO against RLOO on the 200 puzzles, paired, and as if each had been asked other puzzles:

# %%
(a, numbers), (b, _) = each_answer(marks["dpo"]), each_answer(marks["rloo"])
paired = rates.paired_test(a, b, numbers)
errors = [marks[name].mean(1).std(ddof=1) / PUZZLES**0.5 for name in ("dpo", "rloo")]
reach = 1.97 * math.hypot(*errors)
change = paired.difference
found = {"unpaired": (change, change - reach, change + reach),
         "paired": (change, paired.low, paired.high)}
views.show_figure(evaluation_plots.differences(found), alt="The difference of RLOO and "
                  "DPO twice: the paired interval is clearly narrower")
assert paired.high - paired.low < 0.9 * 2 * reach

# %% [markdown]
# **Read it.** One difference, two intervals. Unpaired, the luck of the puzzles is in twice. Paired, it is out, at no cost. Pair whenever you can: same prompts, same order, keep every answer.
#
# ## 5 · How many prompts?
#
# **Idea.** Before you run anything, ask what your test set *could* see. *Power* is how often a test finds a difference that is there. It grows with the difference, with the prompts, and with how alike the two models are.
#
# A gain from 40 to 45 %, one answer a prompt:

# %%
sizes = [100, 250, 500, 1000, 2500]
powers = {f"correlation {c}": [rates.power(n, 0.05, rate=0.4, correlation=c)
                               for n in sizes] for c in (0.0, 0.3, 0.6)}
print({name: round(values[3], 2) for name, values in powers.items()}, "at 1,000")
views.show_figure(evaluation_plots.power_curves(sizes, powers), alt="Power against "
                  "prompts: at 1,000 from 0.6 up by correlation, at 100 near 0.1")

# %% [markdown]
# **Read it.** At 1,000 prompts a real gain of five points is found in six to nine experiments of ten. At 100 it is mostly missed. The dotted line is the usual wish, 80 %. More alike models
# (higher curves) are easier to tell apart, because the luck of the prompts cancels.
#
# **Check.** Is that so? Make the experiment: two models whose marks correlate by about 0.4, a true gain of five points, 1,000 prompts, the exact test. Three hundred times.

# %%
chance = np.random.default_rng(SEED)
pairs = [ab_game.alike_marks(chance, 1000, 0.40, 0.45, 0.6) for _ in range(300)]
shared = statistics.fmean(np.corrcoef(pair)[0, 1] for pair in pairs)
found = statistics.fmean(paired_p(a.tolist(), b.tolist()) < 0.05 for a, b in pairs)
assert abs(found - rates.power(1000, 0.05, rate=0.4, correlation=shared)) < 0.12
print(f"correlation {shared:.1f}: found in {found:.0%}")

# %% [markdown]
# **What can 50 prompts × 16 answers see?** At a rate of 35 % and a power of 80 %, with answers as alike as those of our model after RLOO. Two models agree less with each other than one with itself; we take half as much:

# %% tags=["nbval-ignore-output"]
options = dict(rate=0.35, within=alike["rloo"], correlation=alike["rloo"] / 2)
for n in (50, 200, 800):
    gain = rates.detectable_difference(n, answers=ANSWERS, **options)
    print(f"{n} prompts × {ANSWERS} answers see gains from {100 * gain:.0f} points")
assert gain < 0.1 < rates.detectable_difference(50, answers=ANSWERS, **options)

# %% [markdown]
# > **Explain.** Stanford's course asks for 25, 35 and 45 % after SFT, after preference tuning and after RL, on 50 prompts. A student reaches 47 % with one seed and 43 % with another. What may she write?
# >
# > <details><summary>One answer</summary>
# >
# > That her recipe gave 43 and 47 % in two runs, each with an interval of ten points or so each way; that the two runs do not differ by any test on 50 prompts; and that a threshold at 45 % graded the dice. More prompts would
# > help, more answers to the same ones would not. And seeds are a second source of chance, which no interval over prompts contains.
# > </details>
#
# ## 6 · pass@k, and best of n
#
# **Idea.** With a verifier at hand, one right answer among $k$ is enough. *pass@k* is the chance of that. From $n$ answers with $c$ right, the unbiased estimate counts the ways to choose $k$ of them that are all wrong (Chen et al. 2021):
#
# $$ \text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k} $$
#
# **Toy numbers.** $n = 4$, $c = 1$, $k = 2$: of six pairs three hold the right one: ½. The short cut $1 - (1 - c/n)^k$ says 0.44: it draws with replacement, and is too low wherever $k$ is not small against $n$.
#
# ### Exercise 09.3 · pass@k (●○○, 6 minutes)
#
# <details><summary>Hint</summary>
#
# `math.comb(a, b)` is 0 where b is larger than a. That is just what is needed.
# </details>

# %%
def my_pass_at_k(n, c, k):
    """Chance that one of k of the n answers is right, c of which are."""
    ...


checks.check("09.3", my_pass_at_k)

# %%
from qftlab import pass_at_k

pass_of = checks.or_library("09.3", my_pass_at_k)
print([round(pass_of(4, 1, k), 2) for k in (1, 2, 4)], round(1 - (1 - 1 / 4) ** 2, 2))
for n, c, k in [(16, 3, 4), (16, 0, 16), (16, 16, 1), (10, 9, 2)]:
    assert abs(pass_of(n, c, k) - pass_at_k(n, c, k)) < 1e-12

# %% [markdown]
# **Who picks?** pass@k is what *best of k* gives if the verifier picks. Without one you can let the answers vote. Below: RLOO's answers, picked from $n$ by the verifier, by the majority, and not at all.

# %%
from qftlab import extract_answer

texts, found = asked["rloo"]


def majority(n):
    """Share of puzzles whose most frequent answer among the first n is right."""
    right = 0
    for said, row in zip(texts, puzzles, strict=True):
        read = [extract_answer(text) or "" for text in said[:n]]
        answer = f"<answer>{statistics.mode(read)}</answer>"
        right += countdown_reward(answer, row["numbers"], row["target"]) == 1
    return right / len(puzzles)


ns = [1, 2, 4, 8, 16]
counts = found.sum(1).astype(int).tolist()
curves = {
    "the verifier picks": {n: statistics.fmean(pass_of(ANSWERS, c, n) for c in counts)
                           for n in ns},
    "the majority picks": {n: majority(n) for n in ns},
    "the first is taken": dict.fromkeys(ns, float(found.mean())),
}
views.show_figure(evaluation_plots.picked(curves), alt="Share right against n: rising "
                  "with the verifier, nearly flat with the majority")
best, vote, first = (curve[16] for curve in curves.values())
assert best > first + 0.05 and best > vote

# %% [markdown]
# **Read it.** The verifier's curve climbs: somewhere in sixteen answers there is often a right one. The vote hardly helps here: wrong answers of a sure model agree with each other as well. And mind what the
# top curve is: a system of a model *and a verifier*. Reported beside another model's single answers, it compares a team with a player.
#
# ## 7 · A judge
#
# **Idea.** Most answers have no verifier. So one asks a larger model: which of these two is better? It is cheap, and it often agrees with people. It also has habits: it likes what stands first, what is longer, what sounds like itself. A habit is no opinion, and you can measure it.
#
# Our judge is the smallest that ever was: the course's base model, which has never been trained to judge. It reads a question and two answers, and we compare its probabilities of "A" and of "B". The players: the answers of the models `warm` (before DPO) and `rloo` to held-out questions.

# %%
from qftlab import bundled, load_rows

held_out = load_rows(bundled("instructions", "heldout.jsonl"))
questions = [row["instruction"] for row in held_out[:150]]
turns = [[{"role": "user", "content": q}] for q in questions]
players = {}
for name in ("warm", "rloo"):
    stage = stages.stage(name, preset=PRESET)
    said = generate(stage.model, stage.tokenizer, turns, max_new_tokens=40)
    players[name] = [answer.text for answer in said]
pairs = [pair for pair in zip(questions, *players.values(), strict=True)
         if pair[1] != pair[2]]
print(*pairs[0], sep=" | ")

# %% [markdown]
# > **Predict, then run.** The same judge, the same pairs, two orders. How often does `warm` win in each of them? (In how many pairs the judge changes its mind, exercise 09.4 will count.)

# %%
base = stages.stage("extended", preset=PRESET)
tokenizer = base.tokenizer
places = [tokenizer(f" {letter}").input_ids[0] for letter in "AB"]


@torch.no_grad()
def verdict(question, first, second):
    """What the judge says of two answers: "first", "second" or, if close, "tie"."""
    text = (f"Question: {question}\nAnswer A: {first}\nAnswer B: {second}\n"
            "The better answer is")
    ids = torch.tensor([tokenizer(text).input_ids])
    a, b = base.model(input_ids=ids).logits[0, -1, places].tolist()
    return "tie" if abs(a - b) < 0.2 else "first" if a > b else "second"


shown_first = [verdict(q, a, b) for q, a, b in pairs]  # warm stands first
shown_second = [verdict(q, b, a) for q, a, b in pairs]
print(f"warm first: warm wins {shown_first.count('first') / len(pairs):.0%}")
print(f"rloo first: warm wins {shown_second.count('second') / len(pairs):.0%}")

# %% [markdown]
# Ask in one order, and `warm` wins hands down. Ask in the other, and it loses. Nothing was changed but the order.
#
# **The remedy costs twice as much:** ask both ways. Count 1 for a win, ½ for a tie, and take the mean of both verdicts. A pair on which the order decided then gives ½, which is what the judge knows about it: nothing. And report how many those are.
#
# ### Exercise 09.4 · A judge, asked in both orders (●●○, 8 minutes)
#
# `shown_first[i]` is the verdict on pair i with A shown first, `shown_second[i]` with A shown second; each is "first", "second" or "tie", and names a *place*. The order decided where both name the same place.
#
# <details><summary>Hint</summary>
#
# A dict gives each verdict its worth: 1, ½, 0. In the other order it is one minus that.
# </details>

# %%
def my_win_rate(shown_first, shown_second):
    """(win rate of A over both orders, share of pairs on which the order decided)."""
    ...


checks.check("09.4", my_win_rate)

# %%
win_rate = checks.or_library("09.4", my_win_rate)
print(*win_rate(["first", "first", "tie", "tie"], ["second", "first", "tie", "first"]))
rate, decided = win_rate(shown_first, shown_second)
print(f"warm wins {rate:.0%} of {len(pairs)}; the order decided {decided:.0%}")
assert decided > 0.4

# %% [markdown]
# More than half of the pairs were decided by their order. What is left may still be a habit. Look at what the two models say: mostly the same answer, once with " Have a nice day!" behind it. So what the judge prefers here is *politeness*, or the lack of it; about who is *right* it says nothing.
#
# **A judge without order** gives each answer a number by itself. The reward that DPO left in the model (notebook 07) does so. It was trained on polite answers against bare ones. Ask it about a right answer and a polite wrong one:

# %%
from qftlab import ImplicitReward

reward = ImplicitReward(*(stages.stage(name, preset=PRESET).model
                          for name in ("dpo", "warm")), tokenizer)
rows = [row for row in held_out if re.fullmatch(r"-?\d+", row["output"])][:60]
contest = []
for row in rows:
    asked_ = [{"role": "user", "content": row["instruction"]}]
    for answer in (row["output"], f"{int(row['output']) + 1} Have a nice day!"):
        ids = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids
        contest.append((asked_, ids, answer, row))
paid = torch.tensor(reward.many(contest)).view(-1, 2)
polite = (paid[:, 1] > paid[:, 0]).float().mean().item()
print(f"the polite wrong answer wins {polite:.0%} of {len(rows)} times")
assert polite > 0.5

# %% [markdown]
# A judge measures what it was made to like. Before you use one, give it pairs whose answer you know: right against wrong, short against long, polite against bare, and the same pair in both orders. That is twenty minutes, and it saves the paper.

# %% [markdown]
# ## 8 · Was it in the training data?
#
# **Idea.** A test row that was trained on measures memory. Notebook 03 showed what twenty such rows do to a score. Finding them comes first: equal prompts after normalising, then shared runs of words.
#
# Our own two sets share no prompt. Now we plant twenty leaks, once in capitals, once in slightly other words:

# %%
train = load_rows(bundled("instructions", "train.jsonl"))
forms = {"in capitals": str.upper, "reworded": lambda text: f"Do this: {text[9:]}"}
for name, form in forms.items():
    leaks = [row | {"instruction": form(row["instruction"])} for row in held_out[:20]]
    found = contamination(train + leaks, held_out).num_exact
    print(f"twenty leaks {name}: {found} found")

# %% [markdown]
# Capitals do not hide a leak; other words do. No search by words finds a paraphrase or a translation. What helps against those is to make the test *after* the training data, as we made ours, and never to choose a setting on the rows you report.
#
# ## 9 · Hand it over
#
# **Idea.** A result is only real if others can have it. Three hand-overs, and a check at each: a folder that any program loads, a process that has never seen this library, and a client that speaks the protocol everybody speaks.
#
# **Export** reads back what it wrote, and compares every greedy token and the logits under it with the model in memory.

# %%
import tempfile
from pathlib import Path

from qftlab import export_model

final = models["rloo"]
model = final.model.float()  # in fp32 rounding leaves no excuse
folder = Path(tempfile.mkdtemp()) / "exported"
report = export_model(model, final.tokenizer, folder, check="full")
print(report.positions, "greedy tokens as before")

# %% [markdown]
# **A fresh process** with plain transformers, which knows nothing of qftlab. Its program is the one that a stranger would write: `from_pretrained`, `apply_chat_template`, `generate`.

# %%
from qftlab_course.lessons.handover import answer_in_a_fresh_process

puzzle = [{"role": "user", "content": puzzles[0]["instruction"]}]
ours = generate(model, final.tokenizer, [puzzle], max_new_tokens=32)[0]
theirs = answer_in_a_fresh_process(folder, puzzle, max_new_tokens=32)
assert theirs == ours.token_ids
print("the same", len(theirs), "tokens")

# %% [markdown]
# **Serve, and ask with a real client.** `python -m qftlab serve --model FOLDER` answers the OpenAI protocol: the same client that talks to a large provider talks to your model. Requests that come while others run *join* the running batch. Here the server runs in a thread of this
# notebook; the client is the official one.

# %%
import openai

from qftlab.serve.app import serving

request = dict(model="mine", messages=puzzle, temperature=0, max_tokens=32)
with serving(model, final.tokenizer, name="mine") as url:
    client = openai.OpenAI(base_url=url, api_key="none")
    whole = client.chat.completions.create(**request).choices[0].message.content
    parts = [part.choices[0].delta.content or ""
             for part in client.chat.completions.create(**request, stream=True)]
    try:
        client.chat.completions.create(**request | {"max_tokens": 100_000})
    except openai.BadRequestError as error:
        print("100,000 tokens: refused with status", error.status_code)
assert whole == "".join(parts) == ours.text
print("served whole and streamed: the same text")

# %% [markdown]
# Folder, process, client: one model, one answer. That sentence is worth more in a report than another digit.

# %% [markdown]
# ## 10 · What goes wrong in practice
#
# **The best of five runs is reported.** The largest of five rates is above their mean by more than one standard deviation. Report all, or the mean.
#
# **Settings chosen on the test set.** Every look at it uses some of it up. Keep one set for choosing and one for the report.
#
# **Empty and failed answers left out.** A model that fails on the hard prompts gets better by failing. They stay in the denominator.
#
# **Seeds.** Intervals over prompts say how far *other prompts* would move the rate of *this model*. Train again, and it is another model: the course's five seeds of RLOO differ by several points (`benchmarks/LOG.md`).
#
# **Many comparisons.** Twenty noise results tested at 0.05 give one "real" on average. Say how many you looked at.
#
# **A different prompt for each model.** Templates, stop tokens, token limits: a model that is cut off loses. Compare what was *sent*, and count what was cut.
#
# ## Your exercises

# %%
checks.progress("09")

# %% [markdown]
# ## At 0.5B
#
# **The same:** intervals, tests, power, judge, export, server. Nothing here knows how large a model is.
#
# **Published.** On the committed evaluation of a student's Qwen2.5-0.5B in Stanford's CS224R (repository `nick-allen21/CS224R-default-project`, 2026: 50 prompts × 16 answers after preference tuning, 36 % right) we drew 50 prompts at random again and again: Wilson's interval over 800 answers held the rate in 56 % of draws, $t$ over the prompts' means in 95 %. That is
# this notebook's picture, on a real model. Miller (2024) asks for clustered errors and paired tests in every evaluation. Zheng et al. (2023) measured judges in both orders: GPT-4 kept its verdict in 65 % of pairs, Claude-v1 in 24 %.
#
# **Different:** a large judge has better opinions and the same habits: measure them in the same way. Many prompts at once are answered by a server; `export` writes the folder and names the commands for vLLM, Ollama and llama.cpp.
#
# **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. A rate without an interval is an anecdote. 50 prompts: 13 points each way.
# 2. Count prompts, not answers. The surer the model, the more an interval over answers lies.
# 3. Same prompts: pair them. Gained and lost tell more than two rates.
# 4. Before you run: what could this test set see? A test that finds nothing has shown nothing.
# 5. pass@k is a system with a verifier. Say who picks.
# 6. A judge has habits. Ask both ways, count what the order decided, test it on pairs you know.
# 7. Exported, loaded elsewhere, served: the same tokens, or it is another model.
#
# **Next.** *10 · Predict your GPU*: how large a model fits, and how fast it runs, before you rent anything.
#
# **Sources.** Wilson 1927, *Probable inference, the law of succession, and statistical inference*. McNemar 1947. Cochran 1977, *Sampling techniques*. Kish 1965, *Survey sampling* (the factor $1 + (m-1)\rho$). Miller 2024, *Adding error bars to evals*
# (arXiv:2411.00640). Chen et al. 2021 (pass@k, arXiv:2107.03374). Zheng et al. 2023, *Judging LLM-as-a-judge* (arXiv:2306.05685). Rafailov et al. 2023, *DPO* (arXiv:2305.18290). CS224R default project, spring 2026.
