# %% [markdown]
# # 07 · DPO: solutions
#
# One good answer to each exercise of [07 · DPO](../07_dpo.ipynb), with the reason in a sentence or two. Yours may look
# different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth more than this page.

# %% tags=["setup"]
import sys

if "google.colab" in sys.modules:  # on Colab only: fetch the library, leave torch and transformers as they are
    REPO = "OWNER/qftlab"
    get_ipython().run_line_magic("pip", f"install -q --no-deps git+https://github.com/{REPO}")
    get_ipython().run_line_magic("pip", "install -q jsonargparse")

# %%
import itertools
import math

import torch
from torch.nn import functional as F

from qftlab.teach import checks

# %% tags=["parameters"]
SEED = 0

# %% [markdown]
# ## Exercise 07.1 · The DPO loss
#
# `F.logsigmoid` is the point. Its argument may be −400 without harm; `torch.log(torch.sigmoid(…))` is minus infinity from about −104 on, and its gradient is no number from there.

# %%
def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    gain = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * gain)


checks.check("07.1", my_dpo_loss)

# %% [markdown]
# The gradient says what DPO does: each pair is weighted by β times the probability that the policy still has it wrong, and pulls one answer up as hard as it pushes the other down.

# %%
chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-3.0, -2.0))
my_dpo_loss(chosen, rejected, torch.tensor([-3.0]), torch.tensor([-3.0]), 0.5).backward()
weight = 0.5 * torch.sigmoid(torch.tensor(0.5))  # h is -1
print(f"gradients {chosen.grad.item():.2f} and {rejected.grad.item():.2f}; β σ(−βh) = {weight:.2f}")
assert torch.allclose(-chosen.grad, weight) and torch.allclose(rejected.grad, weight)

# %% [markdown]
# ## Exercise 07.2 · Labels that may be wrong
#
# An expectation over the coin that flipped the label. Since $-\log\sigma(-s) = -\log\sigma(s) + s$, the loss is also plain DPO plus $\varepsilon s$: a small, steady
# push against the margin. It wins where $\sigma(-s) = \varepsilon$, at $s = \log\frac{1 - \varepsilon}{\varepsilon}$.

# %%
def my_smoothed_loss(score, epsilon):
    return -(1 - epsilon) * F.logsigmoid(score) - epsilon * F.logsigmoid(-score)


checks.check("07.2", my_smoothed_loss)

# %%
scores = torch.linspace(-6, 6, 13)
assert torch.allclose(my_smoothed_loss(scores, 0.1), -F.logsigmoid(scores) + 0.1 * scores, atol=1e-6)

# %% [markdown]
# ## Exercise 07.3 · Preference accuracy, with ties
#
# Two comparisons. `torch.sign` does it in one line as well: its mean, moved from −1 … 1 to 0 … 1.

# %%
def my_preference_accuracy(margins):
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


checks.check("07.3", my_preference_accuracy)

# %% [markdown]
# ## Exercise 07.4 · Credit, token by token
#
# Subtract, mask, add up. Without the mask the prompt would count: it has the same tokens in both answers, so it cancels in a margin, and yet not in a reward.

# %%
def my_implicit_reward(logprobs, ref_logprobs, mask, beta):
    return beta * ((logprobs - ref_logprobs) * mask).sum(1)


checks.check("07.4", my_implicit_reward)

# %% [markdown]
# The margin of DPO is the difference of two of these, so the loss of exercise 07.1 needs nothing else:

# %%
generator = torch.Generator().manual_seed(SEED)
draws = torch.randn(4, 5, 7, generator=generator)  # chosen, rejected, and both under the reference; 5 pairs, 7 tokens
mask = torch.ones(5, 7, dtype=torch.bool)
reward_up, reward_down = my_implicit_reward(draws[0], draws[2], mask, 0.1), my_implicit_reward(draws[1], draws[3], mask, 0.1)
assert torch.allclose(my_dpo_loss(*draws.sum(2), 0.1), -F.logsigmoid(reward_up - reward_down), atol=1e-6)

# %% [markdown]
# ## Exercise 07.5 · The best of n, without sampling again
#
# The answer at rank $i$ is the best of a choice if the other $n - 1$ all come from the $i$ answers below it. Listing all choices gives the same, and takes
# forever at 32: there are 601,080,390 ways to choose 16 of them.

# %%
def my_best_of(scores, values, n):
    ranked = [value for _, value in sorted(zip(scores, values, strict=True))]
    return sum(math.comb(i, n - 1) * value for i, value in enumerate(ranked)) / math.comb(len(ranked), n)


checks.check("07.5", my_best_of)

# %%
scores, values = [0.3, -1.0, 2.0, 0.9, 0.1], [1.0, 0.0, 0.0, 1.0, 0.0]
for n in range(1, 6):
    listed = [max(choice)[1] for choice in itertools.combinations(zip(scores, values, strict=True), n)]
    assert abs(my_best_of(scores, values, n) - sum(listed) / len(listed)) < 1e-9
print([f"{my_best_of(scores, values, n):.2f}" for n in range(1, 6)], "and", f"{math.comb(32, 16):,} choices of 16 in 32")

# %% [markdown]
# The five answers make a small over-optimisation: the judge likes a wrong answer best, so the truth rises at $n = 2$ and then falls to zero.
#
# ## Predict, then run: which of the four solves most?
#
# "NLL 1" solves most and "plain" fewest. The first picture hardly tells: all margins rise, that of "NLL 1" least of all, and the preference accuracies lie
# within some points of each other. None of the four lines says that most of a skill is gone. Margins and preference accuracy compare *two* answers; what a model says competes with *all* of them.
#
# ## Explain: the colleague's picture
#
# Ask for the log-probability of the chosen answers on held-out pairs, which must not fall far below where it began, and for the accuracy of *generated* answers, which
# must not fall at all. The margin may then be as large as it likes.
#
# ## Predict, then run: best of 32
#
# With the model of the annotator who checks, more answers are right than at $n = 1$, though the best $n$ is smaller than 32: from some point on the search finds what the
# reward model overrates. With the careless annotator's model fewer are right, and the more one searches the fewer: the longest of 32 answers is hardly ever the right one.

# %%
checks.progress("07")
