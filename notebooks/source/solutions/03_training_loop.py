# %% [markdown]
# # 03 · The training loop: solutions
#
# One good answer to each exercise of [03 · The training loop](../03_training_loop.ipynb), with the reason in a sentence or two. Yours
# may look different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth more than this page.

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

import torch

from qftlab_course import checks

# %% tags=["parameters"]
SEED = 0

# %% [markdown]
# ## Exercise 03.1 · Masked cross-entropy by hand
#
# Four moves: shift, mask, pick, average. `log_softmax` subtracts the largest logit before it takes an exponential, so nothing
# overflows. `clamp` turns −100 into a column that exists; what is picked there is thrown away by the mask. The
# division is by the trained tokens of *all* rows together: a mean of row means would weigh a token in a short row more.

# %%
def my_loss(logits, labels):
    logits, targets = logits[:, :-1], labels[:, 1:]
    trained = targets != -100
    columns = targets.clamp(min=0).unsqueeze(-1)
    picked = logits.log_softmax(-1).gather(-1, columns).squeeze(-1)
    return -picked[trained].sum() / trained.sum()


checks.check("03.1", my_loss)

# %% [markdown]
# ## Exercise 03.2 · Weights of micro-batches
#
# A mean times its count is a sum, and a sum divided by all tokens is its share of the whole mean. So the weight is the
# micro-batch's share of the trained tokens.

# %%
def my_weights(token_counts):
    total = sum(token_counts)
    return [count / total for count in token_counts]


checks.check("03.2", my_weights)

# %% [markdown]
# The toy numbers of the notebook: one token with 4 nats, nine with 1 nat each.

# %%
weighted = sum(w * mean for w, mean in zip(my_weights([1, 9]), [4.0, 1.0], strict=True))
assert abs(weighted - 1.3) < 1e-9
print(f"by tokens {weighted:.2f}, as a mean of means {(4.0 + 1.0) / 2:.2f}")

# %% [markdown]
# ## Exercise 03.3 · Warm-up and cosine
#
# Two cases. `step + 1`, so that the first step moves; `step - warmup` over `total - warmup`, so that the cosine starts at the
# peak, where the warm-up has ended, and comes to 0 where the run does. With `warmup=0` the first case never happens, and
# nothing is divided by 0.

# %%
def my_rate(step, total, warmup, peak):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2


checks.check("03.3", my_rate)

# %%
rates = [my_rate(step, 6, 2, 1.0) for step in range(6)]
wanted = [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
assert all(abs(a - b) < 0.005 for a, b in zip(rates, wanted, strict=True))
print([f"{r:.2f}" for r in rates])

# %% [markdown]
# ## Predict, then run: which loss tells
#
# **A mean of means** changes the loss itself: the first. **A rate one step late** leaves the weights where they were in the first step:
# the second loss is wrong. **No clipping** and **a gradient that is never zeroed** show in the third. The first step of AdamW is the sign of
# the gradient, so neither its length nor what is left of it afterwards matters before the second step. **No weight decay**: none of
# the three. A step takes a share of $\eta \lambda$ away, 0.0015 times 0.01.

# %%
for length in [1.0, 20.0]:  # clipped or not
    weight = torch.nn.Parameter(torch.tensor([0.02]))
    adam = torch.optim.AdamW([weight], lr=0.0015, weight_decay=0.0)
    (length * weight).sum().backward()
    adam.step()
    print(f"gradient {length:>4}: 0.02 → {weight.item():.4f}")
    assert abs(weight.item() - 0.0185) < 1e-6

# %% [markdown]
# ## Predict, then run: three learning rates
#
# **Too small**: its sixteen steps together are less than a tenth of *one* right step. So the line is almost level. **Right** falls
# steeply, because the *format* is learned in a handful of steps, and then slowly.
# **Too large** rises at once. AdamW's step does not shrink when the gradient does: every weight moves by about $\eta$, whatever the
# slope, and weights of a few hundredths do not survive steps of six hundredths. For a while the model is *worse than blind guessing*,
# 6.93 nats: a ruined model is not modest, it is sure of wrong tokens.

# %%
way = sum(my_rate(step, 16, 1, 0.01) for step in range(16))
print(f"sixteen steps at a hundredth of the rate: {way:.2f} of one right step")
assert way < 0.1

# %% [markdown]
# Clipping does not save it. It shortens the gradient, and AdamW divides by the size of the gradient anyway:

# %%
moves = []
for clip in [1000.0, 1.0]:
    weight = torch.nn.Parameter(torch.tensor([0.02]))
    adam = torch.optim.AdamW([weight], lr=0.06, weight_decay=0.0)
    (50 * weight).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], clip)
    adam.step()
    moves.append(weight.item() - 0.02)
print("the weight moves by {:.2f} without clipping, by {:.2f} with it".format(*moves))
assert abs(moves[0] - moves[1]) < 1e-6

# %% [markdown]
# ## Explain: the loss climbs, and accuracy does not fall
#
# Accuracy asks only *which* answer is the likeliest; the loss also asks *how sure* the model was. A model that has learned sixteen answers
# by heart has learned to be sure. Where it was wrong before, it is now wrong with confidence: the right answer's probability goes from a
# half to a hundredth, and its surprise from 0.69 to 4.61 nats, while the mark stays "wrong". Where it is right, the most it can
# gain is what little surprise was left. So a few confident errors raise the mean, and no answer has changed sides.

# %%
of_the_truth = {"at its best": [0.6, 0.6, 0.6, 0.4],
                "overfitted": [0.99, 0.99, 0.99, 0.01]}
for name, p in of_the_truth.items():
    loss, right = -sum(map(math.log, p)) / len(p), sum(x > 0.5 for x in p)
    print(f"{name}: {right} of {len(p)} right, loss {loss:.2f} nats")
assert loss > 1.1 and right == 3

# %% [markdown]
# ## Exercise 03.4 · A detector
#
# One form for both sides, a set for the larger one, a lookup for each prompt of the other. `split()` without an argument cuts at any run of
# white space and drops it at the ends; `" ".join` puts single blanks back.

# %%
def my_leaks(train, test):
    def even(prompt):
        return " ".join(prompt.lower().split())

    known = {even(prompt) for prompt in train}
    return [i for i, prompt in enumerate(test) if even(prompt) in known]


checks.check("03.4", my_leaks)

# %% [markdown]
# What it cannot find is a question in other words, and no cleverer comparison of letters would:

# %%
assert my_leaks(["what is  47 + 38?"], ["What is 47 + 38?"]) == [0]
assert my_leaks(["Add 47 and 38."], ["What is 47 + 38?"]) == []

# %% [markdown]
# ## Predict, then run: going on after the power cut
#
# **All of them.** Nothing in the loop depends on anything but weights, averages and step; so the resumed run adds the same numbers in the same
# order, and floating-point sums in the same order have the same bits. It is only *reordered* sums that drift.
#
# ## Exercise 03.5 · First-fit-decreasing
#
# The `else` of the `for` runs when no row had room. Why the longest first? Short documents fit anywhere, so they are
# worth most at the end, when only gaps are left; a long one that comes late needs a row of its own.

# %%
def my_rows(lengths, budget):
    rows = []
    for length in sorted(lengths, reverse=True):
        for row in rows:
            if sum(row) + length <= budget:
                row.append(length)
                break
        else:
            rows.append([length])
    return rows


checks.check("03.5", my_rows)

# %% [markdown]
# It is a rule of thumb and not the best: two rows would do here, 4 3 3 | 4 3 3, and it takes three. No fast way is known that is
# always best.

# %%
rows = my_rows([4, 4, 3, 3, 3, 3], 10)
print(rows)
assert rows == [[4, 4], [3, 3, 3], [3]]

# %%
checks.progress("03")
