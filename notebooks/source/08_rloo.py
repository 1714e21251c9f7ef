# %% [markdown]
# # 08 · RLOO: learn from a verdict
#
# Until now somebody always wrote the answer. Here nobody does. The model answers a puzzle eight times, a program says which
# answers are right, and the model is pushed towards those that did better than their siblings. You build each piece of that push
# and look at the run that the tour made with it. Then you watch it go wrong: a verifier forgets one check, a model finds the gap,
# and you repair it.
#
# ![One puzzle, four answers by the model, a verdict for each, and a push: the right answer up, the wrong ones down](figures/08_rloo.png)
#
# **Read it.** From left to right: a puzzle, four answers that the model drew itself, what the verifier pays, and how hard each is pushed. The pushes of
# a group add up to zero: what one answer gains, its siblings lose.
#
# | | |
# |---|---|
# | **You will be able to** | score answers by a program, safely · turn rewards into advantages, and say what a baseline buys · write the loss of RLOO and find its gradient in the library's · read the curves of a run · tell RLOO, GRPO and Dr. GRPO apart · notice a reward hack, and repair its cause |
# | **Time** | 40 minutes to read, 39 for the five exercises; a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [03 · The training loop](03_training_loop.ipynb), [04 · Decoding](04_decoding.ipynb); [07 · DPO](07_dpo.ipynb) helps with KL |

# %% tags=["setup"]
import re
import sys

if colab := sys.modules.get("google.colab"):  # on Colab only: fetch the library
    at = get_ipython().getoutput("curl $COLAB_JUPYTER_IP:$KMP_TARGET_PORT/api/sessions")
    at = f"{at} {colab._message.blocking_request('get_ipynb')}".replace("%2F", "/")
    repo = re.search(r"github[.com]*/([\w.-]+/[\w.-]+)/blob/([\w./-]+?)/notebooks/", at)
    assert repo, "put here instead: !pip install git+https://github.com/OWNER/NAME"
    get_ipython().system(repo.expand(r"pip install -q git+https://github.com/\1@\2"))

# %% tags=["recorded"]
import copy
import itertools
import json
import math
import random
import statistics

import torch

from qftlab import (
    PolicyConfig, bundled, clipped_policy_loss, countdown_reward, extract_answer,
    fresh_problems, leave_one_out_advantages, load_rows, pad, parse_expression,
)  # fmt: skip
from qftlab_course import checks, stages, views
from qftlab_course.lessons import policy_plots

# %% [markdown]
# Everything you may want to change is in this cell. `GROUP` is the number of answers to each puzzle, `BETAS` the lengths of the leash in part 4.
# `LAZY_ROWS` is how many demonstrations part 8 trains on, `SHARE` how many of them (besides the round ones) show the shortcut.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
GROUP = 8
BETAS = (1e-9, 0.1, 1.0)
KL_STEPS, HACK_STEPS = 10, 20
LAZY_ROWS, SHARE = 600, 0.1

# %% [markdown]
# ## 1 · A verdict instead of an answer
#
# **Idea.** Countdown: make 22 of 1, 12 and 11. An answer is hard to find and easy to check. So let a program check, and learn from its verdict. Three
# grades are enough: **1** for an answer that keeps every rule, **0.1** for one that can be read but is wrong (so that the form survives),
# **0** for the rest.
#
# **Read, never evaluated.** `eval(answer) == target` would be one line, and a trap: a model in training tries *everything*. `9**9**9**9`
# would hang the run, a name would be executed, `2**3` and `7//2` would pay for operations that the puzzle forbids. `parse_expression` knows
# numbers, four signs and brackets, counts in exact fractions, and returns nothing for anything else.
#
# **Toy numbers.** One puzzle, six answers:

# %%
puzzle = {"numbers": [1, 12, 11], "target": 22}
for text in ["12 - 1 + 11", "11 + 11", "22", "(12 - 1", "2**3 + 14", "exit()"]:
    print(countdown_reward(f"<answer>{text}</answer>", **puzzle), text)
assert countdown_reward("12 - 1 + 11", **puzzle) == 0  # right, but without the tags
assert not any(map(parse_expression, ["9**9**9**9", "7//2", "-3", "１+2", "()"]))
assert parse_expression("1/3 + 1/3 + 1/3").value == 1  # exact: no 0.999…

# %% [markdown]
# **Rollouts.** The model that practises is the tour's, after DPO. It answers 64 fresh puzzles eight times each, at temperature 1, and keeps the
# log-probability of every token it drew.
#
# **Which text is read?** `countdown_reward` reads all of it, for models that answer at once, as ours do. Past 512 characters it pays nothing: a model
# that rambles on after its answer would otherwise be paid as well as one that stops. A model that *thinks* needs the room, and names wrong
# answers on the way. `reasoned_reward` reads what follows the last `</think>`, by the same rules; rambling there earns nothing either. At the end of the cell
# below: an answer that stops, one that rambles on, and one behind thinking, by both rewards.

# %% tags=["recorded"]
start = stages.stage("dpo", preset=PRESET)
tokenizer = start.tokenizer

# %%
from qftlab import SamplingParams, encode_prompts, generate, reasoned_reward


def roll_out(model, rows, group=GROUP, temperature=1.0, seed=SEED):
    """`group` answers to each row, and their rewards (P, G)."""
    prompts = [prompt.ids for prompt in encode_prompts(tokenizer, rows)]
    answers = generate(model, tokenizer, prompts, num_generations=group, seed=seed,
                       max_new_tokens=32, batch_size=512, return_logprobs=True,
                       params=SamplingParams(temperature=temperature))
    asked = [row for row in rows for _ in range(group)]
    earned = [countdown_reward(a.text, row["numbers"], row["target"])
              for a, row in zip(answers, asked, strict=True)]
    return answers, torch.tensor(earned).view(-1, group)


puzzles = fresh_problems(64, SEED + 1)
answers, rewards = roll_out(start.model, puzzles)
grades = sorted({round(reward, 1) for reward in rewards.flatten().tolist()})
print(f"{tuple(rewards.shape)} rewards; grades that occur: {grades}")

right = "<answer>12 - 1 + 11</answer>"
rambling = right + " That was fun. Let me try it once more." * 15
thinking = "<think>" + "12 + 11 is 23, too much. " * 25 + f"</think>{right}"
for text in [right, rambling, thinking]:
    print(countdown_reward(text, **puzzle), reasoned_reward(text, **puzzle))
assert reasoned_reward(thinking + rambling, **puzzle) == 0

# %% [markdown]
# ## 2 · Better than its siblings
#
# **Idea.** We want more reward on average. The average runs over answers that the model itself draws, so its derivative looks hard: what changes with the weights is
# *how often* each answer comes. Two lines turn it into something that we can sample. A policy $\pi$ gives each answer $y$ its probability, and
# $\nabla \pi = \pi\, \nabla \log \pi$ by the chain rule. So
#
# $$ \nabla\, \mathbb{E}_{y \sim \pi}[R(y)] \;=\; \sum_y R(y)\, \nabla \pi(y) \;=\; \sum_y \pi(y)\, R(y)\, \nabla \log \pi(y) \;=\; \mathbb{E}\big[R(y)\, \nabla \log \pi(y)\big] $$
#
# $$ \mathbb{E}\big[\nabla \log \pi(y)\big] \;=\; \sum_y \nabla \pi(y) \;=\; \nabla \sum_y \pi(y) \;=\; \nabla\, 1 \;=\; 0 $$
#
# The first line is REINFORCE, of 1992: draw answers, and raise the log-probability of each in proportion to its reward. The second says that a constant $b$, taken off
# every reward, changes nothing on average: $\mathbb{E}[(R - b)\, \nabla \log \pi]$ is the same gradient.
#
# **Why take one off?** All rewards here are positive or zero, so plain REINFORCE pushes wrong answers up as well, only less. That they sink
# in the end is left to the average. A **baseline** says it at once: push up what is better than usual, down what is worse.
#
# **RLOO** takes as $b$ the mean of the *other* $G - 1$ answers to the same puzzle:
#
# $$ A_i = R_i - \frac{1}{G-1} \sum_{j \ne i} R_j $$
#
# It costs nothing, because the siblings are there anyway. It knows how hard the puzzle is. And it does not depend on $y_i$ itself, so the average stays exact.
#
# **Toy numbers.** Rewards 1, 0.1, 0.1, 0.1. The first: its siblings' mean is 0.1, $A_1 = 0.9$. The others: $(1 + 0.1 + 0.1)/3 = 0.4$, so $-0.3$ each.
#
# **Check.** A policy over three answers is small enough to add up everything. Both lines, by autograd:

# %%
theta, pays = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([1.0, 0.1, 0.0])
exact = torch.func.grad(lambda t: t.softmax(0) @ pays)(theta)
scores = torch.func.jacrev(lambda t: t.log_softmax(0))(theta)  # (answer, weight)
for b in (0.0, 0.4, 100.0):  # whatever the baseline is
    average = (theta.softmax(0) * (pays - b)) @ scores
    assert torch.allclose(average, exact, atol=1e-4)

# %% [markdown]
# ### Exercise 08.1 · Leave one out (●●○, 8 minutes)
#
# Advantages for a table of rewards, one row a puzzle.
#
# <details><summary>Hint</summary>
#
# The sum of the others is the sum of all, minus your own. `keepdim=True` keeps it a column.
# </details>

# %%
def my_advantages(rewards):
    """Each reward (P, G) minus the mean of the other answers' in its row."""
    ...


checks.check("08.1", my_advantages)

# %%
advantages_of = checks.or_library("08.1", my_advantages)
toy = torch.tensor([[1.0, 0.1, 0.1, 0.1]])
print([round(a, 2) for a in advantages_of(toy)[0].tolist()])
advantages = advantages_of(rewards)
assert torch.allclose(advantages, leave_one_out_advantages(rewards), atol=1e-6)
to_mean = rewards - rewards.mean(1, keepdim=True)
assert torch.allclose(advantages, GROUP / (GROUP - 1) * to_mean, atol=1e-6)
assert advantages.sum(1).abs().max() < 1e-5

mixed = (rewards == 1).sum(1).sub(3).abs().argmin().item()  # about three of eight right
group = answers[mixed * GROUP : (mixed + 1) * GROUP]
labels = [(extract_answer(a.text) or "(no answer)")[:24] for a in group]
numbers = ", ".join(map(str, puzzles[mixed]["numbers"]))
bars = policy_plots.advantage_bars(labels, advantages[mixed].tolist(),
                                   f"Make {puzzles[mixed]['target']} of {numbers}")
views.show_figure(bars, alt="Advantages of eight answers to one puzzle: bars to the "
                  "right for right ones, shorter bars to the left for wrong ones")

# %% [markdown]
# **Read it.** Bars to the right are pushed up, bars to the left down. Few right answers are pushed hard, many wrong ones a little each: the
# group as a whole stands still.
#
# **What does the baseline buy?** Less noise, they say. We can measure it. Choose a *direction* in the space of all weights: the gradient of a first set
# of puzzles. Ask each answer how much its log-probability grows along it. Reward times growth, averaged over a group, is what
# this group has to say about the direction: one number for each puzzle. By REINFORCE and by leave-one-out they should agree on average, and differ in spread.

# %%
from qftlab import Example, token_logprobs


def as_example(answer):
    """An answer of `generate` as a row to score; the prompt's tokens do not count."""
    ids = answer.prompt_ids + answer.token_ids
    return Example(ids, [i >= len(answer.prompt_ids) for i in range(len(ids))])


def answer_logprobs(model, answers, temperature=1.0):
    """log π of each whole answer (N,), in nats, at a temperature: the obvious form."""
    batch = pad([as_example(answer) for answer in answers], 0)
    labels = batch.pop("labels")
    logits = model(**batch).logits / temperature
    return token_logprobs(logits, labels).sum(1)  # (N, T − 1) → (N,)


pilot, pilot_rewards = roll_out(start.model, fresh_problems(24, SEED + 2))
weights = advantages_of(pilot_rewards).flatten()
objective = (weights * answer_logprobs(start.model, pilot)).mean()
gradient = torch.autograd.grad(objective, list(start.model.parameters()))
length = math.sqrt(sum(g.square().sum().item() for g in gradient))


def moved(size):
    """The model, `size` further along the direction."""
    model = copy.deepcopy(start.model)
    with torch.no_grad():
        for weight, g in zip(model.parameters(), gradient, strict=True):
            weight.add_(g, alpha=size / length)
    return model


with torch.no_grad():
    ahead, behind = (answer_logprobs(moved(size), answers) for size in (0.01, -0.01))
growth = ((ahead - behind) / 0.02).view(-1, GROUP)  # of log π, along the direction

# %% [markdown]
# > **Predict, then run.** Three ways to weigh the answers: the plain reward; leave-one-out; and the plain reward of a friendlier verifier, which pays 1
# > more for everything (1, 1.1 and 2). The ranking of answers is the same in all three. Whose histogram is the widest? Which two are about equal?

# %%
kinds = {"plain reward": rewards, "plain reward + 1": rewards + 1,
         "leave one out": advantages}
says = {name: (weight * growth).mean(1) for name, weight in kinds.items()}
views.show_figure(policy_plots.push_histogram(says), alt="Histograms of 64 puzzles' "
                  "pushes: plain reward and leave-one-out are narrow, plain reward "
                  "plus one is far wider")
assert torch.allclose(advantages_of(rewards + 1), advantages, atol=1e-5)  # it cancels

# %% [markdown]
# **Read it.** Dashed is widest by far: one point more for everybody, and the same puzzles contradict each other. Leave-one-out does not notice the
# point at all. And plain REINFORCE is *as good as* leave-one-out here, because few answers are right and most rewards are near zero already. How much a baseline
# helps depends on how often the model is right. With rewards of 0 and 1 we can count it out: the mean square of the weights, over all the ways in which a group of eight can come out.

# %%
groups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=GROUP)))  # all 256
ways = {"plain": groups, "leave one out": leave_one_out_advantages(groups)}
for p in (0.2, 0.9):
    chance = (p * groups + (1 - p) * (1 - groups)).prod(1)
    squares = [f"{name} {chance @ w.square().mean(1):.2f}" for name, w in ways.items()]
    print(f"right {p:.0%} of the time:", *squares)

# %% [markdown]
# A model that is right one time in five gains little from the baseline; one that is right nine times in ten, a factor of nine. And a baseline frees you from thinking about where the zero of your
# reward lies.

# %% [markdown]
# ## 3 · The loss, and how far one may go
#
# **Idea.** An answer is one action: its log-probability is the sum over its tokens. With an optimizer that makes losses small,
#
# $$ L = -\frac{1}{N} \sum_i A_i\, \rho_i, \qquad \rho_i = \exp\!\big(\log \pi_\theta(y_i) - \log \pi_{old}(y_i)\big) $$
#
# At the first update $\rho = 1$, and the derivative of $\rho$ is that of $\log \pi_\theta$: REINFORCE again. The *value* of the loss is then minus the mean of the
# advantages: zero, whatever the model learns. In a log of RLOO the loss says nothing; watch the reward.
#
# **Check.** The gradient of the obvious form against the library's `PolicyStep`, which computes the head only where an answer stands, and never holds all its logits:

# %%
from qftlab import PolicyStep

few, few_rewards = answers[: 8 * GROUP], rewards[:8]
few_advantages = leave_one_out_advantages(few_rewards).flatten()
by_hand = -(few_advantages * answer_logprobs(start.model, few)).mean()
expected = torch.autograd.grad(by_hand, list(start.model.parameters()))

batch = pad([as_example(answer) for answer in few], 0)
step = PolicyStep(start.model, PolicyConfig(num_generations=GROUP))
loss = step(**batch, num_tokens=len(few), stands_for=torch.tensor(len(few)),
            rewards=few_rewards.flatten())
found = torch.autograd.grad(loss, list(start.model.parameters()))
assert loss.abs() < 1e-5  # by construction
for a, b in zip(expected, found, strict=True):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
print("loss 0.0; gradient by hand and by the library agree")

# %% [markdown]
# **At the temperature of the sampler.** Many runs sample hotter than 1, so that the eight answers differ more. The policy then *is* the model at
# 1.3, say, and every log-probability must be taken there. Anything else compares two policies and calls the difference learning:

# %%
hot, _ = roll_out(start.model, puzzles[:24], temperature=1.3)
drawn = torch.tensor([sum(answer.logprobs) for answer in hot])
with torch.no_grad():
    off = {t: ((answer_logprobs(start.model, hot, t) - drawn).exp() - 1).abs()
           for t in (1.3, 1.0)}  # |ρ − 1| before any step
assert off[1.3].max() < 1e-3 and (off[1.0] > 0.2).float().mean() > 0.5

# %% [markdown]
# **The clip.** Rollouts are dear, so one likes to take several updates on the same answers. After the first, $\rho$ is no longer 1, and an answer that was
# pushed up would be pushed on, without end, by a sample that is out of date. PPO's remedy: beyond $1 \pm \epsilon$ there is nothing more to earn.
#
# $$ L_i = -\min\big(\rho_i A_i,\; \mathrm{clip}(\rho_i, 1-\epsilon, 1+\epsilon)\, A_i\big) $$
#
# **Toy numbers.** $\epsilon = 0.2$. Good answer, $A = 1$, $\rho = 1.5$: $-\min(1.5, 1.2) = -1.2$, flat: no gradient. Bad answer, $A = -1$, $\rho = 1.5$ (it has
# become *more* likely): $-\min(-1.5, -1.2) = 1.5$, still sloping: it must come down.
#
# ### Exercise 08.2 · The clipped loss (●●○, 8 minutes)
#
# <details><summary>Hint 1</summary>
#
# Log-probabilities subtract; ratios come from `torch.exp`.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.minimum` of two products, not of two ratios: with a negative advantage the order turns.
# </details>

# %%
def my_clipped_loss(logprobs, old_logprobs, advantages, epsilon):
    """The clipped loss of each answer (N,): -min(ratio · A, clipped ratio · A)."""
    ...


checks.check("08.2", my_clipped_loss)

# %%
clipped_loss = checks.or_library("08.2", my_clipped_loss)
some = torch.tensor([1.5, 0.5]).log(), torch.zeros(2), torch.tensor([1.0, -1.0])
assert torch.allclose(clipped_loss(*some, 0.2), clipped_policy_loss(*some, epsilon=0.2))
views.show_figure(policy_plots.clip_curves(clipped_loss, 0.2), alt="Loss by ratio, "
                  "flat above 1.2 for advantage 1, flat below 0.8 for advantage -1")

# %% [markdown]
# **Read it.** Grey is where the answer is about as likely as when it was drawn. The curves run flat only on the far side of a push that has *worked*; where an
# answer has moved the wrong way, the slope stays. With one update for each rollout, as in the tour, $\rho$ is always 1 and nothing is ever clipped.

# %% [markdown]
# ## 4 · A leash
#
# **Idea.** A verifier sees one thing. Everything else the model knows (to end its turn, to write plain text) is safe only as long as the policy stays near where it
# started. So distance is made to cost: **KL in the reward**, with the frozen start as reference,
#
# $$ R_i = r_i - \beta \sum_t \big(\log \pi_{old}(y_{i,t}) - \log \pi_{ref}(y_{i,t})\big) $$
#
# On average over samples the sum is $\mathrm{KL}(\pi \,\|\, \pi_{ref})$ in nats an answer. It is one of three usual estimates. With $r = \log \pi_{ref} - \log \pi$:
# $k_1 = -r$, exact on average, may be negative; $k_2 = r^2/2$, never negative, a little off; $k_3 = e^r - 1 - r$, exact on average *and* never negative.
#
# **Toy numbers.** Policy (½, ½), reference (¾, ¼): KL $= ½\ln\frac{2}{3} + ½\ln 2 = 0.144$.

# %% [markdown]
# ### Exercise 08.3 · k3, a distance that is never negative (●○○, 5 minutes)
#
# <details><summary>Hint</summary>
#
# Mind the direction: r is the reference minus the policy.
# </details>

# %%
def my_k3(logprobs, ref_logprobs):
    """k3, an estimate of KL(policy, reference), at each sampled token (T,)."""
    ...


checks.check("08.3", my_k3)

# %%
from qftlab import kl_estimate

k3 = checks.or_library("08.3", my_k3)
policy, reference = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
exact = (policy * (policy / reference).log()).sum()
chance = torch.Generator().manual_seed(SEED)
tokens = torch.randint(0, 2, (1000,), generator=chance)  # drawn from the policy
logs = policy.log()[tokens], reference.log()[tokens]
for name, values in [("k1", kl_estimate(*logs, "k1")), ("k2", kl_estimate(*logs, "k2")),
                     ("k3", k3(*logs))]:
    error = values.std() / 1000**0.5
    print(f"{name}: mean {values.mean():.2f} ± {error:.2f}, least {values.min():.2f}")
assert torch.allclose(k3(*logs), kl_estimate(*logs, "k3"), atol=1e-6)
assert abs(exact - 0.144) < 1e-3

# %% [markdown]
# **A real leash.** Three runs from the same start on the same puzzles, with β of 0, 0.1 and 1 (0 as a billionth, so that the distance is still measured). Together they take
# half a minute, so we made them beforehand: with eight seeds, and with one of these again on two other kinds of arithmetic, as other processors have it (here that changed nothing one can see). The function below
# is what was run; `run_leash(0.1, KL_STEPS, SEED)` makes one of them before your eyes.

# %% tags=["recorded"]
from qftlab import TrainConfig, fit_policy


def run_leash(beta, steps, seed):
    """RLOO for some steps; reward and KL (nats an answer) of each step's answers."""
    model, logs = copy.deepcopy(start.model), []
    config = TrainConfig(lr=3e-4, max_steps=steps, batch_size=32, schedule="constant",
                         weight_decay=0.0, seed=seed)
    policy = PolicyConfig(num_generations=GROUP, max_new_tokens=32, beta=beta)

    def verdict(prompt, ids, text, row):
        return countdown_reward(text, row["numbers"], row["target"])

    rows = fresh_problems(32 * steps, seed)
    fit_policy(model, tokenizer, rows, verdict, config, policy, on_log=logs.append)
    return {"reward": [log["reward"] for log in logs],
            "kl": [log["kl"] * log["length"] for log in logs]}

# %%
def ends(values):
    """What a curve begins and ends with: means of five steps."""
    return [round(statistics.fmean(part), 2) for part in (values[:5], values[-5:])]


def mean_of(curves):
    """The mean curve of some runs."""
    return [statistics.fmean(step) for step in zip(*curves, strict=True)]


leashes = json.loads(bundled("records", "08_leash.json").read_text())["runs"]
names = {f"{beta:g}": f"β = {0 if beta < 1e-6 else beta:g}" for beta in BETAS}
distances = {name: [run[beta]["kl"] for run in leashes] for beta, name in names.items()}
drawing = policy_plots.lines(range(1, KL_STEPS + 1), distances, "optimizer step",
                             "KL (nats an answer)")
views.show_figure(drawing, alt="KL from the start by step, runs and their means: up to "
                  "nearly 3 nats without a leash, below 1 with beta 0.1, a half with 1")
for beta, name in names.items():
    print(name, "mean reward:", ends(mean_of(run[beta]["reward"] for run in leashes)))
for run in leashes:
    far = [statistics.fmean(run[beta]["kl"][-5:]) for beta in names]
    assert far == sorted(far, reverse=True)  # the longer the leash, the further

# %% [markdown]
# **Read it.** Thin lines are single runs, thick ones their means. The same verifier, the same puzzles, and three distances. The first step is free, because its answers are the reference's own, and the second is the same for all three, because the first update saw no distance. From then on each run
# goes as far as its leash allows. Far is not good by itself: at this high rate the runs without a leash go three times as far as those with β = 0.1, and earn no more. And a leash can be too short: at β = 1
# a nat costs as much as a right answer earns, and the reward does not rise. Where your verifier is exact, the rate modest and the run short, 0 is a fair choice (the tour's); where the reward
# is a *model* of what people like, it is not.

# %% [markdown]
# ## 5 · The tour's run
#
# All pieces together, as `python -m qftlab rloo` and the tour run them. The stage keeps its recipe and its log. Six lines of the log, in the order in which to look at
# them when a run of yours goes wrong:

# %%
from qftlab_course import stage_recipes

trained = stages.stage("rloo", preset=PRESET)
recipe = stage_recipes.recipe("rloo", PRESET)
train, policy = recipe.train, recipe.policy
print(f"{train.max_steps} steps of {train.batch_size} × {policy.num_generations},",
      f"lr {train.lr:g}, temperature {policy.temperature:g}, β {policy.beta:g}")
views.show_figure(policy_plots.run_curves(trained.metrics), alt="Curves over steps: "
                  "reward rises, length stays, entropy falls, groups all alike grow, "
                  "hardly an answer is cut off, none is clipped")


for name in policy_plots.CURVES:
    print(f"{name:14}", ends([record[name] for record in trained.metrics]))
gaps = [record["sampler_gap_max"] for record in trained.metrics]
assert max(gaps) < 1e-3  # nats, of any token: sampler and trainer agree

# %% [markdown]
# **Read it.** Reward up: it works. Length flat: no padding, no shouting. Entropy *down*: the model makes up its mind, and with it rises the share of groups
# whose eight answers all earn the same. Such a group has advantage zero and teaches nothing: at the end more than half of what is sampled is computed and thrown away. Cut off: next to nothing, but for a bump near
# step 30 that passed by itself. Clipped: nothing, as it should be with one update a rollout.

# %% [markdown]
# ## 6 · What was learned: better, or only surer?
#
# **Idea.** *pass@k*: the chance that at least one of $k$ answers is right. With $c$ right among $n$ samples the unbiased estimate is
#
# $$ \text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k} $$
#
# **Toy numbers.** $n = 4$, $c = 1$: pass@1 = ¼, pass@2 = $1 - 3/6 = ½$, pass@4 = 1. We ask 200 held-out puzzles sixteen times each, before RLOO and after.

# %% tags=["nbval-ignore-output"]
from qftlab import pass_at_k

assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
held_out = load_rows(bundled("countdown", "heldout.jsonl"))[:200]
tries, ks = 16, [1, 2, 4, 8, 16]
models = {"before RLOO": start.model, "after RLOO": trained.model}
sampled = {name: roll_out(model, held_out, tries) for name, model in models.items()}
right = {name: (found == 1).sum(1).tolist() for name, (_, found) in sampled.items()}
passes = {name: [statistics.fmean(pass_at_k(tries, c, k) for c in counts) for k in ks]
          for name, counts in right.items()}
before, after = passes.values()
views.show_figure(policy_plots.pass_curves(ks, passes), alt="pass@k before and after "
                  "RLOO: after lies above at k of 1; they cross, and before ends above")
assert after[0] > before[0] + 0.02 and before[-1] > after[-1] + 0.02
for name, (one, *_, many) in passes.items():
    print(f"on this machine: {name} one answer {one:.0%}, sixteen answers {many:.0%}")

# %% [markdown]
# **Read it.** Left end: one answer of each model, and the trained one clearly wins. Right end: sixteen of each, and the lead has turned round: what the old model finds in
# sixteen tries, the new one often no longer finds. RLOO made likely what was likely already. Entropy told so in part 5.
#
# **Best-of-n at equal samples** is the same picture: at each $n$, both models give $n$ answers and a verifier picks the best. At $n = 1$ there is nothing to pick, and training pays.
# With many tries, and a verifier to pick with, it pays no longer. The dotted line shows one answer of the new model: where it meets the old model's curve, that many old answers
# *with a verifier* are worth one new answer *without*.
#
# **How far for how much?** The best policy within reach of a leash is known in closed form: $\pi^*_\beta \propto \pi_{ref}\, e^{r/\beta}$ (notebook 07). On our
# sixteen samples we can simply compute it: weigh each by $e^{r/\beta}$. Best-of-n is known too: at most $\ln n - (n-1)/n$ nats away. And the trained model's distance we
# measure, by scoring its answers under the old one.

# %%
solved = (sampled["before RLOO"][1] == 1).double()


def best_policy(beta):
    """(KL in nats, success) of the best reweighting of the old model's samples."""
    weight = torch.softmax(solved / beta, 1)
    kl = torch.special.xlogy(weight, weight * tries).sum(1).mean()
    return kl.item(), (weight * solved).sum(1).mean().item()


part = sampled["after RLOO"][0][::4]
with torch.no_grad():
    own = torch.tensor([sum(answer.logprobs) for answer in part])
    kl_after = (own - answer_logprobs(start.model, part)).mean().item()
best = [best_policy(beta) for beta in (10, 1, 0.5, 0.3, 0.2, 0.15, 0.1)]
best_of_n = {n: (math.log(n) - (n - 1) / n, value)
             for n, value in zip(ks, before, strict=True)}
drawing = policy_plots.frontier(best, best_of_n, (kl_after, after[0]))
views.show_figure(drawing, alt="Puzzles solved against KL: the best policies rise "
                  "steeply, best-of-n lies below, the trained model further right")
cheapest = min(kl for kl, success in best if success >= after[0])
assert kl_after > cheapest  # further than the best policy of equal success

# %% [markdown]
# **Read it.** High and left is good. The line and the squares *have the verifier at hand* for these very puzzles; the diamond has to do without, and must carry what it learned
# on other puzzles over. So it pays more nats for the same success. Nats are no sin in themselves; but old skills live near the old model, and the
# tour's table shows what they cost.
#
# **The plain rival: rejection sampling.** Sample, keep what is right, and do SFT on it (STaR, RAFT). That is REINFORCE with rewards of 0 and 1 and no baseline: only pushes
# up. It needs nothing that notebook 03 does not have. What it needs is care in choosing.
#
# ### Exercise 08.4 · Rejection sampling: choose what to train on (●●○, 8 minutes)
#
# Keep answers that earned exactly 1. Easy puzzles have many: at most `limit` for each puzzle, none of them twice. (The solution trains on your choice.)
#
# <details><summary>Hint</summary>
#
# `dict.fromkeys(texts)` drops doubles and keeps the order.
# </details>

# %%
def my_selection(prompts, answers, rewards, limit):
    """(prompt, answer) of right answers, in order, none twice, `limit` a prompt."""
    ...


checks.check("08.4", my_selection)

# %%
select = checks.or_library("08.4", my_selection)
texts = [[a.text for a in answers[i * GROUP :][:GROUP]] for i in range(len(puzzles))]
asked = [row["instruction"] for row in puzzles]
chosen = select(asked, texts, rewards.tolist(), 2)
solved = int((rewards == 1).any(1).sum())
print("one or two for each puzzle solved:", solved <= len(chosen) <= 2 * solved)

# %% [markdown]
# ## 7 · Three names
#
# | | RLOO | GRPO | Dr. GRPO |
# |---|---|---|---|
# | advantage | $R_i - \text{mean of the others}$ | $(R_i - \text{mean}) \,/\, \text{spread}$ | $R_i - \text{mean}$ |
# | the same, from $R_i - \text{mean}$ | $\times\; \frac{G}{G-1}$ | $\div$ spread of the group | as it is |
# | summed over | the answer: one ratio | tokens, each answer ÷ its length | tokens, ÷ one constant |
# | clipped | the answer | each token | each token |
# | KL | in the reward | in the loss, by $k_3$ | usually none |
#
# RLOO and Dr. GRPO differ in the advantage by a constant that the rate swallows. GRPO's two divisions are another matter. Dividing by the *length* makes a long wrong answer cheaper
# a token than a short one. And dividing by the *spread* weighs puzzles anew. How hard is one right answer pushed, if $c$ of eight are right?

# %%
share = [c / GROUP for c in range(1, GROUP)]
push = {"RLOO": [(1 - p) * GROUP / (GROUP - 1) for p in share],
        "Dr. GRPO": [1 - p for p in share],
        "GRPO": [(1 - p) / math.sqrt(p * (1 - p)) for p in share]}
rights = torch.tensor([[1.0] * c + [0.0] * (GROUP - c) for c in range(1, GROUP)])
by_library = leave_one_out_advantages(rights)[:, 0]
assert torch.allclose(by_library, torch.tensor(push["RLOO"]), atol=1e-6)
print("one right of eight, GRPO ÷ RLOO:", round(push["GRPO"][0] / push["RLOO"][0], 1))
drawing = policy_plots.lines(range(1, GROUP), push, "right answers among eight",
                             "advantage of a right one")
views.show_figure(drawing, alt="Advantage of a right answer against the number right "
                  "among eight: RLOO and Dr. GRPO fall in straight lines, close by; "
                  "GRPO starts two and a half times as high and falls in a curve")

# %% [markdown]
# **Read it.** All three push a rare success harder than a common one. GRPO pushes the rarest more than two and a half times as hard again: good where hard puzzles matter most, risky
# where a rare "success" is a mistake of the verifier. Which brings us to the next part.

# %% [markdown]
# ## 8 · The hack
#
# Here is a verifier. It reads the answer with the same careful parser, and compares the value with the target. It looks right; it passed review.

# %% tags=["recorded"]
def quick_verifier(text, numbers, target):
    """1.0 if the answer equals the target, 0.1 if it can be read, 0.0 otherwise."""
    expression = parse_expression(extract_answer(text) or "")
    if expression is None:
        return 0.0
    return 1.0 if expression.value == target else 0.1

# %% [markdown]
# **The student.** A model that has hardly ever seen the gap would take long to find it. But data made by people has habits. Suppose that those who wrote the demonstrations were lazy
# with round targets ("make 40": `<answer>40</answer>`), and now and then elsewhere: about one row in five. Our model is trained on 600 such rows. Now it does the same, now and then.
#
# > **Predict, then run.** RLOO on fresh puzzles, paid by the quick verifier. Two curves: what is *paid*, and how many answers are *truly* right, measured by the contract
# > and never shown to the model. Sketch both. Where does each end? And will length or entropy warn you?
#
# `"true": 0.0` below is a weight: the truth is measured and counts for nothing. All of it takes a quarter of a minute.

# %% tags=["recorded"]
from qftlab import fit_rows


def lazy_model(seed):
    """The start after demonstrations of which some just repeat the target."""
    model = copy.deepcopy(start.model)
    rows = load_rows(bundled("countdown", "demonstrations.jsonl"))
    rows = random.Random(seed).sample(rows, LAZY_ROWS)
    for i, row in enumerate(rows):
        if row["target"] % 10 == 0 or i < SHARE * LAZY_ROWS:
            row["output"] = f"<answer>{row['target']}</answer>"
    fit_rows(model, tokenizer, rows, TrainConfig(lr=6e-4, batch_size=32, seed=seed))
    return model


def run_course(model, verifier, steps, seed, beta=0.0):
    """RLOO of a copy, paid by a verifier: its curves, and samples of the last step."""
    curves, samples = [], []

    def paid(prompt, ids, text, row):
        return verifier(text, row["numbers"], row["target"])

    def true(prompt, ids, text, row):
        return float(countdown_reward(text, row["numbers"], row["target"]) == 1)

    config = TrainConfig(lr=2e-4, max_steps=steps, batch_size=32, schedule="constant",
                         weight_decay=0.0, seed=seed)
    policy = PolicyConfig(num_generations=GROUP, max_new_tokens=32, sample_every=steps,
                          weights={"true": 0.0}, beta=beta)
    fit_policy(copy.deepcopy(model), tokenizer, fresh_problems(32 * steps, seed),
               {"paid": paid, "true": true}, config, policy,
               on_log=lambda log: (samples if "samples" in log else curves).append(log))
    names = {"paid": "reward_paid", "true": "reward_true", "length": "length",
             "entropy": "entropy", "equal groups": "equal_groups"}
    kept = {short: [log[name] for log in curves] for short, name in names.items()}
    return kept | {"samples": samples[0]["samples"][::2]}  # the best of each puzzle

# %% tags=["nbval-ignore-output"]
student = lazy_model(SEED)
hacked = run_course(student, quick_verifier, HACK_STEPS, SEED)
print("on this machine, paid:", ends(hacked["paid"]), "true:", ends(hacked["true"]))
assert ends(hacked["paid"])[1] > 0.9 and ends(hacked["true"])[1] < 0.05

# %% [markdown]
# **Read what was paid.** No curve of the *paid* reward shows that something is wrong: it is the best run of this notebook. What shows it at once is to read samples, as
# anybody who trains with rewards should do every so many steps.

# %%
views.show_figure(policy_plots.sample_rows(hacked["samples"]), alt="Puzzles with the "
                  "answers that were paid best: each is the target, a bare number")

# %% [markdown]
# **Read it.** Left the puzzle, right what was paid for it. The answer *is* the target. Its value is right, and it uses none of the given numbers. The verifier forgot to ask.
#
# ### Exercise 08.5 · Repair the verifier (●●●, 10 minutes)
#
# Start from `quick_verifier` and add the missing check. Yours is tried on nineteen kinds of answers, most of them attacks: numbers left out, numbers used twice, other numbers, numbers joined,
# signs, powers, two answers, no answer, a division by zero. The numbers may be used in any order. The grades are those of part 1.
#
# <details><summary>Hint 1</summary>
#
# `expression.numbers` are the numbers that were used, in reading order.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A number may be given twice. A set would not know.
# </details>

# %%
def my_verifier(text, numbers, target):
    """1.0 for an answer that keeps every rule, 0.1 for a wrong one, 0.0 otherwise."""
    ...


checks.check("08.5", my_verifier)

# %% [markdown]
# Now the same student again, paid by your verifier.

# %% tags=["nbval-ignore-output"]
verifier = checks.or_library("08.5", my_verifier)
assert verifier("<answer>40</answer>", [4, 10, 7], 40) == 0.1
repaired = run_course(student, verifier, HACK_STEPS, SEED)
print("on this machine, paid:", ends(repaired["paid"]), "true:", ends(repaired["true"]))
assert ends(repaired["true"])[1] > ends(hacked["true"])[1] + 0.1
record = json.loads(bundled("records", "08_hack.json").read_text())["runs"]
courses = {"one check missing": (hacked, [run["hack"] for run in record]),
           "repaired": (repaired, [run["repaired"] for run in record])}
views.show_figure(policy_plots.courses(courses), alt="Two panels. With one check "
                  "missing the paid reward climbs to 1, true accuracy falls to 0. "
                  "Repaired, both rise. Thin lines of ten other runs agree")

# %% [markdown]
# **Read it.** Bold is your run, thin are ten others, recorded as in part 4. Left: the shortcut is paid in full each time it is drawn, an honest attempt about one time in nine. So the shortcut
# spreads, and by step fifteen hardly anything else is left. From then on nearly all groups are alike and nothing pulls back. Right: same start, same rate, same puzzles, one more
# check. The shortcut earns 0.1, and the truth goes up.
#
# **Would the log have warned you?** Length, entropy and the share of groups all alike, at the beginning and at the end of the ten runs, on average:

# %%
for name in ("paid", "true", "length", "entropy", "equal groups"):
    for kind in ("hack", "repaired"):
        print(f"{name:12} {kind:8}", ends(mean_of(run[kind][name] for run in record)))
assert all(ends(run["hack"]["true"])[1] < 0.05 for run in record)
assert all(ends(run["repaired"]["true"])[1] > 0.2 for run in record)

# %% [markdown]
# **Read it.** Entropy falls and groups become alike in both: that is what learning looks like. In the hacked runs all of it goes further, and answers get shorter, which can pass for thrift. The truth, measured beside
# the pay, or a look at the samples, leaves no doubt.
#
# > **Explain.** A colleague says: "Just add a KL penalty, then it cannot hack." Look at part 4 and at the left panel. What would a leash change about the curves,
# > and what not? Two sentences.

# %% [markdown]
# ## 9 · What goes wrong in practice
#
# **Groups all alike.** Advantages are zero, the loss too, and the log looks calm. Watch `equal_groups`: sample hotter, draw harder puzzles, or stop.
#
# **Nothing to find.** A model that is never right gets no signal at all: all groups earn 0.1. RL sharpens what is there; put it there first, by SFT.
#
# **Sampler and trainer differ.** Another temperature, a top-p filter, another dtype, weights that were not refreshed: the ratio is off before the first step.
# The log's `sampler_gap` must be tiny; part 3 shows the alternative. That is why RLOO's settings know no filters.
#
# **Answers cut off.** A right thought that ran into the token limit earns 0 and is pushed down: the model learns to be brief, or to babble, by your limit. Count `truncated`; mask such
# answers, or raise the limit.
#
# **The rate.** 2e-4 suits 1.3 million parameters; half a billion want 1e-6 to 1e-5 (below).
#
# **One seed.** Curves of RL from one set-up do not look alike: part 4's eight seeds without a leash end at mean rewards from 0.25 to 0.39. And while we set up part 8, with four shortcuts in a thousand besides the round ones,
# three seeds of five were hacked within thirty steps and two were not. That a verifier was not hacked in a run proves nothing about the verifier.
#
# ## Your exercises

# %%
checks.progress("08")

# %% [markdown]
# ## At 0.5B
#
# **The same:** reward, advantage, loss, log. `python -m qftlab rloo --config recipes/countdown-rloo.yaml` is this notebook on the real one.
#
# **Different:** the model thinks before it answers (so hundreds of tokens, and rewards that read what follows `</think>`); rates near 1e-6 where all weights are trained; sampling takes most of the
# time, which is why it goes to a server such as vLLM.
#
# **Published.** Ahmadian et al. (2024), who brought RLOO to language models: with four answers a prompt it won against PPO on summaries (TL;DR) and dialogue (Anthropic-HH), by up to 32 points of win rate, without PPO's
# second network; and in their PPO runs fewer than one batch in twenty was clipped at all. TRL 1.16, defaults: lr 1e-6, β 0.05, ε 0.2, one update a rollout, two answers a prompt, temperature 1. TinyZero (Pan et al. 2025) ran Countdown
# from *base* models, without SFT: 3B learned to search and check itself; 0.5B, says their README, fails to learn reasoning. With SFT first it works: a project of
# Stanford's course CS224R (model card `ba144220/cs224r-default-project-rloo`, 2026) took Qwen2.5-0.5B after SFT through 100 steps of RLOO (batch 128, 8 answers a prompt, lr 1e-5, KL weight 0.001,
# temperature 1, up to 1,024 tokens, one H100) on the same 1 / 0.1 / 0 rewards: of 800 sampled answers 244 right before and 491 after; at least one right in sixteen for 75 % of 40 puzzles
# before, and for 78 % of 50 after: the gain is all at small k, as in part 6. These settings are in `recipes/countdown-rloo.yaml`. Yue et al. (2025) find it on mathematics and code too: trained models win at small k, and at large k the base catches up and passes.
#
# **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. A verifier replaces the answer. Parse, never evaluate; a model in training tries everything.
# 2. $A_i = R_i - \text{mean of the others}$: no critic, no second network, and blind to where the reward's zero lies.
# 3. Log-probabilities at the sampler's temperature; one ratio an answer; a clip that only matters with several updates. The loss is zero; watch the reward.
# 4. KL in the reward is a leash: it sets how far, not which way.
# 5. RL makes the likely likelier: here pass@1 rises, and pass@16 falls.
# 6. What you pay for is what you get. Measure the truth beside the pay, and read samples.
#
# **Next.** [09 · Is it real?](09_is_it_real.ipynb): is the gain real, and does the exported model say the same?
#
# **Sources.** Williams 1992, *Simple statistical gradient-following algorithms* (REINFORCE). Kool et al. 2019, *Buy 4 REINFORCE samples, get a baseline for free*. Ahmadian et al. 2024, *Back to basics* (arXiv:2402.14740).
# Schulman et al. 2017, *PPO* (arXiv:1707.06347). Schulman 2020, *Approximating KL divergence*. Shao et al. 2024, *DeepSeekMath* (GRPO, arXiv:2402.03300). Liu et al. 2025, *Understanding R1-Zero-like training* (Dr. GRPO,
# arXiv:2503.20783). Chen et al. 2021 (pass@k, arXiv:2107.03374). Yue et al. 2025 (arXiv:2504.13837). Zelikman et al. 2022, *STaR* (arXiv:2203.14465). Dong et al. 2023, *RAFT* (arXiv:2304.06767). Gao et al. 2022, *Scaling laws for reward
# model overoptimization* (arXiv:2210.10760). TinyZero, github.com/Jiayi-Pan/TinyZero. TRL 1.16, `RLOOConfig`.
