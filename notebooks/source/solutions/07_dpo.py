# %% [markdown]
# # 07 · DPO: solutions
#
# One good answer to each exercise of [07 · DPO](../07_dpo.ipynb), with the reason in a sentence or two. Yours may look
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
import itertools
import math

import torch
from torch.nn import functional as F

from qftlab_course import checks

# %% tags=["parameters"]
SEED = 0

# %% [markdown]
# ## Exercise 07.1 · The DPO loss
#
# `F.logsigmoid` is the point. Its argument may be −400 without harm; `torch.sigmoid(−90)` is 0 in float32, the log of 0 is minus infinity, and the gradient is not a number.

# %%
def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    gain = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * gain)


checks.check("07.1", my_dpo_loss)

# %%
far = torch.tensor([-90.0], requires_grad=True)
torch.sigmoid(far).log().backward()
print(f"naive: {torch.sigmoid(far).log().item()}, gradient {far.grad.item()};", end=" ")
print(f"logsigmoid: {F.logsigmoid(far).item()}")
assert torch.sigmoid(far).item() == 0 and F.logsigmoid(far).item() == -90

# %% [markdown]
# The gradient says what DPO does: each pair is weighted by β times the probability that the policy still has it wrong, and pulls one answer up as hard as it pushes the other down.

# %%
chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-3.0, -2.0))
reference = torch.tensor([-3.0])
my_dpo_loss(chosen, rejected, reference, reference, 0.5).backward()
weight = 0.5 * torch.sigmoid(torch.tensor(0.5))  # h is -1
print(f"gradients {chosen.grad.item():.2f} and {rejected.grad.item():.2f};", end=" ")
print(f"β σ(−βh) = {weight:.2f}")
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
plain = -F.logsigmoid(scores)
assert torch.allclose(my_smoothed_loss(scores, 0.1), plain + 0.1 * scores, atol=1e-6)

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
# chosen, rejected, and both under the reference; 5 pairs, 7 tokens
draws = torch.randn(4, 5, 7, generator=generator)
mask = torch.ones(5, 7, dtype=torch.bool)
reward_up = my_implicit_reward(draws[0], draws[2], mask, 0.1)
reward_down = my_implicit_reward(draws[1], draws[3], mask, 0.1)
losses = my_dpo_loss(*draws.sum(2), 0.1)
assert torch.allclose(losses, -F.logsigmoid(reward_up - reward_down), atol=1e-6)

# %% [markdown]
# ## Exercise 07.5 · The best of n, without sampling again
#
# The answer at rank $i$ is the best of a choice if the other $n - 1$ all come from the $i$ answers below it. Listing all choices gives the same, but at 32 answers it
# takes minutes for each prompt: there are 601,080,390 ways to choose 16 of them.

# %%
def my_best_of(scores, values, n):
    ranked = [value for _, value in sorted(zip(scores, values, strict=True))]
    won = sum(math.comb(i, n - 1) * value for i, value in enumerate(ranked))
    return won / math.comb(len(ranked), n)


checks.check("07.5", my_best_of)

# %%
scores, values = [0.3, -1.0, 2.0, 0.9, 0.1], [1.0, 0.0, 0.0, 1.0, 0.0]
for n in range(1, 6):
    choices = itertools.combinations(zip(scores, values, strict=True), n)
    listed = [max(choice)[1] for choice in choices]
    assert abs(my_best_of(scores, values, n) - sum(listed) / len(listed)) < 1e-9
print([f"{my_best_of(scores, values, n):.2f}" for n in range(1, 6)])
print(f"{math.comb(32, 16):,} choices of 16 in 32")

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
# ## Predict, then run: the ending it never said
#
# Preferred in all held-out pairs, and never said. Preferred means: likelier, relative to the reference, than the bare answer. At the start that takes a fraction of a nat. Said means: likelier
# than all else. From −93 nats no margin that 320 pairs can teach leads there.
#
# ## Predict, then run: best of 32
#
# With the model of the annotator who checks, more answers are right than at $n = 1$, but most of that is there at $n = 4$: from then on the search finds what the
# reward model overrates as often as what is right. With the careless annotator's model fewer are right at $n = 32$ than at $n = 1$, because the longest of 32 answers is seldom right.

# %%
checks.progress("07")
