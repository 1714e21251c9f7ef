# %% [markdown]
# # 03 · The training loop, by hand
#
# Fine-tuning is a short program: read some rows, ask how surprised the model is, nudge its weights, repeat. You write three
# of its parts: the loss, the weights of the micro-batches, and the learning rate. A loop of about 25 lines puts them
# together, and asserts show that it computes what the library and transformers compute. Then you
# break it on purpose: with bugs, with a bad learning rate, with too little data, and with a test set that leaks. At the end you
# make it cheap, and let it survive a power cut.
#
# ![One optimizer step: rows become micro-batches; each adds to the gradient; then clip, set the rate, move the weights](figures/03_loop.png)
#
# **Read it.** One *optimizer step*, left to right. The boxes inside the frame run once for each micro-batch and only add
# to the gradient; the weights move once, at the right. Parts 1 to 5 build these boxes one by one.
#
# | | |
# |---|---|
# | **You will be able to** | write and test a training loop · accumulate gradients without changing the loss · choose a learning rate · see overfitting · find a leak · pack rows · stop a run and go on to the same weights |
# | **Time** | 50 minutes to read, 41 for the five exercises; under a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [02 · Chat and masking](02_chat_and_masking.ipynb), or knowing what a loss mask is |

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
import copy
import dataclasses
import math
import random
import tempfile
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import get_cosine_schedule_with_warmup as cosine_with_warmup
from transformers import get_linear_schedule_with_warmup as linear_with_warmup

from qftlab import (
    TrainConfig, batches, bundled, encode_rows, fit_examples, fit_rows, load_rows,
    to_device,
)  # fmt: skip
from qftlab.train import loop
from qftlab_course import checks, plots, stages, views
from qftlab_course.lessons import training_plots

# %% [markdown]
# Everything you may want to change is in this cell. `PEAK` is the learning rate: three times that of the course's own
# fine-tuning, because our runs are much shorter. The sweep in part 6 tries rates far below it and far above.

# %% tags=["parameters"]
from qftlab_course.presets import get_preset

PRESET = "tiny"
SEED = 0
PEAK = 3 * get_preset(PRESET).lr
BATCH = 32  # rows in one optimizer step
NUM_LEAKED = 20

# %% [markdown]
# ## 1 · One number to lower
#
# **Idea.** We start from the model of notebook 01, with its two new tokens and no training in chats yet, and from rows whose
# tokens are marked as in notebook 02: `labels` holds the id where a token is trained, −100 where it is only read.

# %%
start = stages.stage("extended", preset=PRESET)
model, tokenizer = start.model, start.tokenizer
rows = load_rows(bundled("instructions", "train.jsonl"))
random.Random(SEED).shuffle(rows)
examples, usage = encode_rows(tokenizer, rows[:512])
print(f"{usage.rows} rows, {usage.tokens:,} tokens, {usage.trained_tokens:,} trained")

# %% [markdown]
# **Formula.** With $m_t = 1$ where the token at $t$ is trained and $0$ elsewhere, and every row of the batch in both sums,
#
# $$ \mathcal{L} = \frac{\sum_t m_t \, \big(-\ln p(x_t \mid x_{<t})\big)}{\sum_t m_t} $$
#
# Two things are easy to get wrong. The **shift**: the logits at position $t - 1$ predict the token at $t$. The **mean**: it is
# over the trained tokens, not over all positions, and not over rows.
#
# **Toy numbers.** Three trained tokens, to which the model gave the probabilities ½, ¼ and ⅛: the loss is
# $(\ln 2 + \ln 4 + \ln 8)/3 = 2 \ln 2 = 1.39$ nats. A thousand masked tokens around them change nothing.

# %% [markdown]
# ### Exercise 03.1 · Masked cross-entropy by hand (●●●, 12 minutes)
#
# Write the formula down without torch's `cross_entropy`. Logits are (B, T, V); labels (B, T) with −100 where nothing is
# trained.
#
# <details><summary>Hint 1</summary>
#
# Shift first: `logits[:, :-1]` against `labels[:, 1:]`. After that line, forget about the shift.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `log_softmax(-1)` is safe where `exp` overflows. `gather(-1, targets.unsqueeze(-1))` picks one column in each place.
# </details>
#
# <details><summary>Hint 3</summary>
#
# −100 is no column. `targets.clamp(min=0)` makes it one, and the mask throws the result away afterwards.
# </details>

# %%
def my_loss(logits, labels):
    """Mean NLL (nats) of trained labels; logits (B, T, V) at t predict label t + 1."""
    ...


checks.check("03.1", my_loss)

# %% [markdown]
# **Check.** Eight real rows, padded to a rectangle. The loss by your function (or by the library's, while yours is not
# done), by the library, and by transformers, which computes one itself as soon as it is handed labels:

# %%
from qftlab import masked_cross_entropy, pad

mean_nll = checks.or_library("03.1", my_loss)
batch = to_device(pad(examples[:8], tokenizer.pad_token_id), model.device)
with torch.no_grad():
    output = model(**batch)  # logits (B, T, V), and a loss: the batch has labels
found = float(mean_nll(output.logits, batch["labels"]))
by_library = masked_cross_entropy(output.logits, batch["labels"]).item()
assert abs(found - by_library) < 1e-5
assert abs(found - output.loss.item()) < 1e-5
print(f"{found:.2f} nats per trained token")

# %% [markdown]
# ## 2 · One step
#
# **Idea.** `backward()` asks of every weight: if you grew a little, would the loss rise or fall? The answers are the
# **gradient**. An optimizer moves each weight a little against its answer, and the loss falls. That is all of learning.
#
# **Formula.** AdamW keeps two running averages for each weight: $m$ of its gradients and $v$ of their squares. It divides the
# one by the root of the other, so that every weight moves by about the learning rate $\eta$, whether its gradients are large or
# small. *Weight decay* comes on top: a pull of a small share $\lambda$ of the weight towards 0.
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1)\, g \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \qquad
#    w \leftarrow w - \eta \left( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda w \right) $$
#
# The hats divide by $1 - \beta^t$ in step $t$, because both averages start at 0.
#
# **Toy numbers.** In the first step $\hat m = g$ and $\hat v = g^2$, so the fraction is the *sign* of $g$. A weight with gradient
# 5 and one with gradient −0.01 move equally far: one by $-\eta$, one by $+\eta$.

# %%
def adamw(w, gradients, eta=0.1, decay=0.0, betas=(0.9, 0.98), eps=1e-8):
    """A weight after each step of AdamW, given its gradients."""
    m = v = 0.0
    path = []
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        mean, size = m / (1 - betas[0] ** t), (v / (1 - betas[1] ** t)) ** 0.5
        w = w - eta * (mean / (size + eps) + decay * w)
        path.append(w)
    return path


print([round(adamw(1.0, [g])[0], 2) for g in [5.0, -0.01]])
assert abs(adamw(1.0, [5.0])[0] - 0.9) < 1e-6
assert abs(adamw(1.0, [-0.01])[0] - 1.1) < 1e-6

# %% [markdown]
# **Check.** Fifty random gradients, by hand and by torch. Then a weight with the value 2 of which no row wants anything: its
# gradient is 0. Plain Adam's decay is added *to the gradient*, so it is divided by its own size, and $\lambda$ has no say.
# AdamW's stands outside the fraction. That is the W: *decoupled* weight decay.
#
# **Clipping.** Now and then a batch is odd and its gradient enormous. *Clipping* shortens a gradient longer than a limit
# to that limit and keeps its direction: $(3, 4)$ has length 5; clipped to 1 it is $(0.6, 0.8)$.
# AdamW forgives a large gradient in the step itself, but remembers it: the steps that follow it are too short, dozens of them.

# %%
def by_torch(kind, w, gradients, **options):
    """A weight after each step of one of torch's optimizers."""
    weight = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer, path = kind([weight], lr=0.1, **options), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        path.append(weight.item())
    return path


noisy = torch.randn(50, generator=torch.Generator().manual_seed(SEED)).tolist()
wanted = by_torch(torch.optim.AdamW, 2.0, noisy, betas=(0.9, 0.98), weight_decay=0.01)
found = adamw(2.0, noisy, decay=0.01)
assert all(abs(a - b) < 1e-9 for a, b in zip(found, wanted, strict=True))
for decay in [0.01, 0.1]:
    (inside,) = by_torch(torch.optim.Adam, 2.0, [0.0], weight_decay=decay)
    (outside,) = adamw(2.0, [0.0], decay=decay)
    print(f"λ = {decay}: in the gradient 2 → {inside:.3f}, decoupled 2 → {outside:.3f}")
    assert abs(inside - (2 - 0.1)) < 1e-6
    assert abs(outside - 2 * (1 - 0.1 * decay)) < 1e-9

path = adamw(0.0, [1.0] * 20 + [100.0] + [1.0] * 40)  # one gradient is enormous
moves = [(before - after) / 0.1 for before, after in pairwise(path)]
at, later = moves[19], moves[19 + 30]
print(f"steps in units of η: {at:.2f} with the odd gradient, {later:.2f} thirty later")
assert moves[18] > 0.99 and at < 1 and later < 0.25

# %% [markdown]
# ## 3 · A step in pieces
#
# **Idea.** Many rows in a step give a calm gradient, and take much memory. *Accumulation* has both: cut the step into
# **micro-batches**, call `backward()` after each, and move the weights once at the end. Gradients add up by themselves. What
# has to be right is what they are divided by.
#
# **Toy numbers.** Two micro-batches: one with a single trained token, of surprise 4 nats; one with nine tokens of 1 nat each.
# The mean over all ten tokens is $(4 + 9)/10 = 1.3$. The mean of the two means is $(4 + 1)/2 = 2.5$: the lonely token
# counts as much as the nine others together.
#
# **Formula.** With $n_k$ trained tokens in micro-batch $k$ and $N = \sum_k n_k$ in the step, $\;\mathcal{L} = \sum_k \frac{n_k}{N}\, \mathcal{L}_k$.
#
# ### Exercise 03.2 · Weights of micro-batches (●○○, 5 minutes)
#
# Given the trained tokens of each micro-batch, return what the *mean* loss of each has to be multiplied by. For the toy
# numbers above, `[1, 9]`, that is `[0.1, 0.9]`.
#
# <details><summary>Hint</summary>
#
# They add up to 1, and a micro-batch without a trained token gets 0.
# </details>

# %%
def my_weights(token_counts):
    """What each micro-batch's mean loss is multiplied by, to sum to the step's mean."""
    ...


checks.check("03.2", my_weights)

# %% [markdown]
# **Code.** The gradient of the same eight rows: as 1 × 8, as 2 × 4, and as 8 × 1. We compare loss *and* gradient, because
# two losses may agree by accident and a million numbers of a gradient do not.

# %%
from qftlab import count_trained, count_trained_tokens

micro_weights = checks.or_library("03.2", my_weights)


def mean_loss(model, batch):
    """Mean surprise of the trained tokens of one micro-batch, by the model's logits."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]  # shifted
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def micro_batches(examples, size):
    """Examples as padded micro-batches of at most `size` rows."""
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]
    padded = [pad(part, tokenizer.pad_token_id) for part in parts]
    return [to_device(part, model.device) for part in padded]


def loss_and_gradient(examples, size, weigh):
    """The loss of one step, `size` rows at a time, and its gradient as one vector."""
    parts = micro_batches(examples, size)
    factors = weigh([count_trained_tokens(part) for part in parts])
    model.zero_grad()
    loss = sum(f * mean_loss(model, p) for f, p in zip(factors, parts, strict=True))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


file = load_rows(bundled("instructions", "train.jsonl"))
fixed, _ = encode_rows(tokenizer, file[:64])  # here and in part 9: whatever the SEED
mixed = sorted(fixed, key=lambda e: count_trained([e]))[::9]  # short and long


def equally(counts):
    """The mistake: every micro-batch weighs the same."""
    return [1 / len(counts)] * len(counts)


whole, gradient = loss_and_gradient(mixed, 8, micro_weights)
for size in [8, 4, 1]:
    right, right_gradient = loss_and_gradient(mixed, size, micro_weights)
    naive, naive_gradient = loss_and_gradient(mixed, size, equally)
    assert abs(right - whole) < 1e-5
    assert torch.allclose(right_gradient, gradient, atol=1e-4, rtol=1e-3)
    print(f"{8 // size} × {size}: by tokens {right:.2f}, mean of means {naive:.2f}")
assert abs(naive - whole) > 0.05
assert not torch.allclose(naive_gradient, gradient, atol=1e-2)

# %% [markdown]
# **Read it.** By tokens, all three lines agree: how a step is cut changes the memory and the time it takes, and
# nothing else. The mean of means depends on how it is cut, which means that a smaller GPU would train a different model.
# This is no toy bug: transformers itself had it until October 2024.

# %% [markdown]
# ## 4 · How far to go
#
# **Idea.** The learning rate is the length of a step. Early steps should be short, because AdamW's averages know nothing
# yet: the **warm-up** rises in a straight line. Late steps should be short, so that the weights settle: a half **cosine**
# falls to zero.
#
# **Formula.** For step $s$ of $S$, counted from 0, with $W$ steps of warm-up:
#
# $$ \eta_s = \eta_{\max} \cdot \begin{cases} (s + 1)/W & s < W \\ \tfrac12\big(1 + \cos \pi \tfrac{s - W}{S - W}\big) & \text{otherwise} \end{cases} $$
#
# **Toy numbers.** $S = 6$, $W = 2$, peak 1: the rates are 0.50, 1.00, then 1.00, 0.85, 0.50, 0.15.

# %% [markdown]
# ### Exercise 03.3 · Warm-up and cosine (●●○, 8 minutes)
#
# Return the rate of one step. Steps count from 0 to `total - 1`.
#
# <details><summary>Hint 1</summary>
#
# Two cases, and `warmup` may be 0. Ask `step < warmup` before you divide by it.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The cosine has `total - warmup` steps, and starts where the warm-up ends. `math.pi` needs `import math`.
# </details>

# %%
def my_rate(step, total, warmup, peak):
    """(step + 1) / warmup of the peak while step < warmup, then half a cosine to 0."""
    ...


checks.check("03.3", my_rate)

# %%
rate, config = checks.or_library("03.3", my_rate), TrainConfig(lr=1.0, warmup_ratio=0.1)
rates = torch.tensor([rate(step, 40, 4, 1.0) for step in range(40)])
wanted = [loop.learning_rate(config, step, 40) for step in range(40)]
assert torch.allclose(rates, torch.tensor(wanted))
ax = training_plots.rates({"four steps up, then half a cosine": rates})
views.show_figure(ax, alt="Rates: a straight rise to the peak, then a curve down to 0")

# %% [markdown]
# **Read it.** Four steps up, thirty-six down. The first rate is a quarter of the peak and not 0, so no step is wasted; the
# last is close to 0, and the weights come to rest.
#
# ## 5 · The loop
#
# Everything is there: loss, weights of micro-batches, gradient, clipping, rate, AdamW. Put together it is about 25 lines:

# %%
def train_by_hand(model, steps, peak, warmup, decay=0.01, loss_of=mean_loss,
                  weigh=micro_weights, rate_of=rate):
    """Train in place on `steps`, lists of micro-batches; returns each step's loss."""
    decayed = [p for p in model.get_decoder().layers.parameters() if p.ndim >= 2]
    kept = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": decay},
              {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    losses = []
    model.train()
    for step, parts in enumerate(steps):
        counts = [count_trained_tokens(part) for part in parts]  # in advance
        total = 0.0
        for factor, part in zip(weigh(counts), parts, strict=True):
            loss = factor * loss_of(model, part)
            loss.backward()  # adds to the gradient
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, len(steps), warmup, peak)
        optimizer.step()  # moves the weights
        optimizer.zero_grad()  # forgets the gradient
        losses.append(total)
    model.eval()
    return losses

# %% [markdown]
# **Read it.** Five things are worth a second look. The token counts are taken *before* the first forward pass. `backward`
# stands inside the inner loop, `step` and `zero_grad` outside. Clipping comes after the last micro-batch: clip each of them
# and you clip something else. The rate is set by us, step by step. And weight decay acts on
# matrices only: a norm's scale or a token's row is not pulled towards 0.
#
# **Check.** Six steps of 32 rows, in micro-batches of 16, in the library's own order of rows. There are two independent witnesses:
# the library's loop, which packs rows instead of padding them and never builds all logits; and our loop with transformers' own loss put
# in. Not only the first loss has to agree: those after it come from weights that *moved*, so they check the gradient and the optimizer too.

# %%
NUM_STEPS, WARMUP = 6, 2
order = batches(len(examples), batch_size=BATCH, seed=SEED, epoch=0)[:NUM_STEPS]
steps = [micro_batches([examples[i] for i in numbers], 16) for numbers in order]
by_hand = train_by_hand(copy.deepcopy(model), steps, PEAK, WARMUP)
by_transformers = train_by_hand(copy.deepcopy(model), steps, PEAK, WARMUP,
                                loss_of=lambda model, batch: model(**batch).loss)
six_steps = TrainConfig(lr=PEAK, max_steps=NUM_STEPS, batch_size=BATCH, seed=SEED,
                        micro_batch_size=16, warmup_ratio=WARMUP / NUM_STEPS)
undisturbed = copy.deepcopy(model)  # part 10 comes back to it
by_library = fit_examples(undisturbed, examples, six_steps).losses
for losses in [by_transformers, by_library]:
    assert all(abs(a - b) < 1e-4 for a, b in zip(by_hand[:3], losses[:3], strict=True))
    assert all(abs(a - b) < 1e-3 for a, b in zip(by_hand, losses, strict=True))
print("by hand, by transformers, by the library: three losses agree within 0.0001")

# %% [markdown]
# **Break it.** How much does such a check see? We put five bugs into the loop, one at a time, train three steps, and ask which
# loss is the first to be off by more than a thousandth.
#
# > **Predict, then run.** A mean of means; the rate one step late; no clipping; a gradient that is never zeroed; no weight decay.
# > For each: is it the first loss that tells, the second, the third, or none of the three?

# %%
def first_wrong(bug=None, **parts):
    """Which of three losses is the first to be wrong; parts go into the loop."""
    with bug or nullcontext():
        losses = train_by_hand(copy.deepcopy(model), steps[:3], PEAK, WARMUP, **parts)
    wrong = [abs(a - b) > 1e-3 for a, b in zip(losses, by_hand, strict=False)]
    return wrong.index(True) + 1 if any(wrong) else None


unclipped = patch("torch.nn.utils.clip_grad_norm_", lambda *_: None)
unforgotten = patch("torch.optim.AdamW.zero_grad", lambda _: None)
seen = {"mean of means": first_wrong(weigh=equally),
        "rate a step late": first_wrong(rate_of=lambda s, *rest: rate(s - 1, *rest)),
        "no clipping": first_wrong(unclipped),
        "never zeroed": first_wrong(unforgotten),
        "no weight decay": first_wrong(decay=0.0)}
print(seen)
assert list(seen.values()) == [1, 2, 3, 3, None]

# %% [markdown]
# **Read it.** A wrong loss shows at once. A wrong step shows one loss later. Clipping shows only in the third loss, because AdamW's
# first step is the sign of the gradient, whatever its length; and a gradient that was never zeroed has to wait for a second one. So
# compare three losses, and to more decimals than seem needed. Weight decay passes: in three steps it changes almost nothing. That is
# why part 2 tests it alone.

# %% [markdown]
# ## 6 · Which learning rate?
#
# **Idea.** If you may tune one number, tune this one. A setting is chosen on rows kept aside for that, the *development* rows;
# what is reported at the end is measured on others (part 8). We train the same model on the same 512 rows three times: with a
# hundredth of `PEAK`, with `PEAK`, and with forty times as much.
#
# > **Predict, then run.** Sketch three loss curves over 16 steps. Where does each one end? The one with too large a rate: does
# > it fall faster, stand still, or rise? And above or below the loss of a model that guesses blindly, $\ln 1024 = 6.93$ nats?
#
# **Read it.** The axis is logarithmic, the dotted line is the blind guess, and the wiggles are the batches: some are harder than others.

# %%
from qftlab_course.measure import evaluate_kept

development = load_rows(bundled("instructions", "development.jsonl"))[::3]  # a third
factors, sweep, kept = {"too small": 0.01, "right": 1, "too large": 40}, {}, {}
for name, factor in factors.items():
    config = TrainConfig(lr=PEAK * factor, batch_size=BATCH, seed=SEED)
    trial = copy.deepcopy(model)
    sweep[name] = fit_rows(trial, tokenizer, rows[:512], config,
                           held_out_rows=development)
    kept[name] = evaluate_kept(trial, tokenizer, development).accuracy

losses = {f"{name} ({PEAK * f:.2g})": sweep[name].losses for name, f in factors.items()}
ax = plots.loss_curve(range(1, 17), losses, window=1, title="")
ax.axhline(math.log(1024), color="grey", linestyle=":", linewidth=1.5)
ax.set_yscale("log")
ax.set_ylim(0.1, 60)
ax.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
ax.legend(fontsize=12, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
alt = ("Training loss of 16 steps at three learning rates, on a logarithmic axis: "
       "too small hardly falls, right falls steeply, too large shoots up above the "
       "dotted line of a blind guess and stays high")
views.show_figure(ax, alt=alt)

# %% tags=["nbval-ignore-output"]
final = {name: result.held_out[-1][1] for name, result in sweep.items()}
print("on this machine, development loss:", {n: f"{x:.1f}" for n, x in final.items()})
print("plain arithmetic still right:", {n: f"{share:.0%}" for n, share in kept.items()})
assert final["right"] < 0.5 * final["too small"]
assert sum(sweep["too large"].losses[1:9]) / 8 > math.log(1024)
assert kept["too large"] < 0.2 < kept["too small"]

# %% [markdown]
# Too small: almost level;
# nothing is wrong with it but the time it would take. Right: a steep fall, then a slow one. Too large: up at once, beyond the dotted
# line of a blind guess, and then a slow way out of the ruins. What the model knew from pretraining is gone: it can hardly do any of the
# plain problems that it did before (`47 + 38 =`).
#
# In practice: try rates a factor of three apart on a small part of the data, take the largest one that falls
# smoothly, and then go down one notch, because a long run meets odder batches than a short one.
#
# ## 7 · Learned, or learned by heart?
#
# **Idea.** The training loss says how well the model does on rows it *sees*. You want to know about rows it has not seen; so keep
# some aside, and measure the loss on them too. To see why, we train on a mere handful, 16 rows, again and again.

# %%
config = TrainConfig(lr=PEAK, schedule="constant", batch_size=16, max_steps=40,
                     eval_every=4, seed=SEED)
trial = copy.deepcopy(model)
handful = fit_rows(trial, tokenizer, rows[:16], config, held_out_rows=development)
when, unseen = zip(*handful.held_out, strict=True)

# %% tags=["nbval-ignore-output"]
print(f"on this machine: development loss {unseen[0]:.1f} at first, {min(unseen):.1f} "
      f"at best, {unseen[-1]:.1f} at last; {final['right']:.1f} after 512 rows once")
assert handful.losses[-1] < 0.1 and min(unseen) < 0.9 * unseen[0]
ax = plots.loss_curve(range(1, 41), handful.losses, held_out=(when, unseen), window=1,
                      title="Sixteen rows: the training loss says all is well")
views.show_figure(ax, alt="Training loss falls to 0; held-out loss falls, then rises")

# %% [markdown]
# **Read it.** At first both fall: the model learns what *every* row has in common, the format. Then they part. The training loss
# goes to zero, because sixteen answers can be learned by heart; the held-out loss turns and climbs. Where it turns is
# where to stop. More rows are the better cure, though: sixteen rows forty times, or 512 rows once, is about the same work.
#
# > **Explain.** The held-out *loss* may climb while held-out *accuracy* stays where it is, or even gains a little. How
# > can both be true? Write two sentences. (Think of an answer that is wrong anyway, at 40 % confidence and at 99 %.)

# %% [markdown]
# ## 8 · The leak
#
# **Idea.** So we trust the *test set*, held-out rows that no setting was chosen on. Then what if a few of them slip into training, by
# a careless merge of two files, or a scrape that found the answers? We do it on purpose. The skill is Countdown: make a number out of three others. It is
# hard for a model of this size, so *learned* and *learned by heart* are easy to tell apart.
#
# The test set has 100 puzzles. We take the fine-tuned model of notebook 00 and train it on 40 rows: once on 40 honest ones;
# once on 20 honest ones and 20 of the test set. All else is equal.
#
# **Read it** from the top: first the leaked puzzles, then the clean ones, and at the bottom all together, which is what a paper would report.

# %%
from qftlab import wilson_interval
from qftlab_course.measure import evaluate_rows

test = load_rows(bundled("countdown", "heldout.jsonl"))[:100]
leaked, clean = test[:NUM_LEAKED], test[NUM_LEAKED:]
honest = load_rows(bundled("countdown", "demonstrations.jsonl"))[: 2 * NUM_LEAKED]
print(leaked[0]["instruction"], "→", leaked[0]["output"])


def marks_after(train_rows):
    """The fine-tuned model, trained on rows: marks on leaked, clean, all puzzles."""
    sft = stages.stage("sft", preset=PRESET)
    if train_rows:
        config = TrainConfig(lr=PEAK, batch_size=20, epochs=20, seed=SEED)
        fit_rows(sft.model, sft.tokenizer, train_rows, config)
    scores = evaluate_rows(sft.model, sft.tokenizer, test).scores
    marks = [score.correct for score in scores]
    return marks[:NUM_LEAKED], marks[NUM_LEAKED:], marks


results = {"before": marks_after([]), "40 honest rows": marks_after(honest),
           "20 of them leaked": marks_after(honest[:NUM_LEAKED] + leaked)}
share, range95 = {}, {}
for name, parts in results.items():
    share[name] = [sum(marks) / len(marks) for marks in parts]
    range95[name] = [wilson_interval(sum(marks), len(marks)) for marks in parts]
groups = [f"{NUM_LEAKED} leaked", f"{len(clean)} clean", "all, as reported"]
ax = plots.accuracy_bars(groups, share, intervals=range95,
                         title="Twenty leaked rows, and accuracy lies")
alt = ("Accuracy before training, after honest rows, and after rows with a leak: on "
       "the leaked puzzles the last is far ahead, on the clean ones it is not")
views.show_figure(ax, alt=alt)

# %% tags=["nbval-ignore-output"]
on_leaked, on_clean, reported = share["20 of them leaked"]
print("on this machine, of leaked, clean and all puzzles:")
for name, parts in share.items():
    print(f"{name}: {' · '.join(f'{part:.0%}' for part in parts)}")
assert on_leaked > 0.6 and on_leaked > on_clean + 0.3

# %% [markdown]
# On the leaked puzzles the third model shines. On the clean ones neither it nor the honest one is better
# than before: forty rows, twenty times over, are part 7 again. In the lowest group
# the training with the leak *looks like a success*. Nothing about that number is odd. Only the split into leaked and clean
# gives it away, and that needs somebody who looks.
#
# ### Exercise 03.4 · A detector (●●○, 8 minutes)
#
# Return the indices of the test prompts that also occur among the training prompts. Copies are rarely exact: even out
# upper and lower case, and white space (inside too), before you compare.
#
# <details><summary>Hint 1</summary>
#
# `" ".join(text.lower().split())` does both at once.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A *set* answers "is it in there?" at the same speed for a hundred prompts and for a million. The indices are those in
# `test`, rising.
# </details>

# %%
def my_leaks(train, test):
    """Indices, rising, of test prompts that occur in `train`, case and blanks aside."""
    ...


checks.check("03.4", my_leaks)

# %%
find_leaks = checks.or_library("03.4", my_leaks)
prompts = [row["instruction"] for row in test]
dirty = [row["instruction"].upper() + "  " for row in honest[:NUM_LEAKED] + leaked]
assert find_leaks(dirty, prompts) == list(range(NUM_LEAKED))
assert not find_leaks([row["instruction"] for row in honest], prompts)
print("the detector finds the leaked rows, and finds nothing in the honest ones")

# %% [markdown]
# ## 9 · Padded or packed
#
# **Idea.** Rows differ in length, tensors are rectangles. *Padding* fills every row up to the longest, and the model computes the
# filling as well. *Packing* lays the rows end to end in one long row: no filling, the same loss. It needs two things, for
# nothing in a long row says by itself where one document ends and the next begins.
#
# **Formula.** With $d_t$ the document of the token at $t$, and $b_d$ the place where document $d$ begins,
#
# $$ \text{position}_t = t - b_{d_t} \qquad\qquad t \text{ may look at } u \;\iff\; u \le t \;\text{ and }\; d_u = d_t $$
#
# **Toy numbers.** Documents of 3, 2 and 4 tokens. Padded: $3 \times 4 = 12$ tokens for 9 real ones. Packed: 9, with positions
# 0 1 2, 0 1, 0 1 2 3, and borders at 0, 3, 5 and 9. The mask is the one you wrote in notebook 02: a staircase for each document.
#
# **Code.** Four ways to the loss of three documents: one by one; packed by hand, with the mask as a $T \times T$ table;
# packed by the library, which is told the borders only and makes no table; and packed by somebody who told attention nothing.

# %%
from qftlab import Step, pack

three = fixed[::30]  # three of 64
document = torch.tensor([n for n, e in enumerate(three) for _ in e.input_ids])  # (T,)
positions = torch.cat([torch.arange(len(e.input_ids)) for e in three])  # (T,)
inner = (document.diff().nonzero().flatten() + 1).tolist()
packed, borders = pack(three), [0, *inner, len(document)]
assert torch.equal(packed["position_ids"][0], positions)
assert packed["cu_seq_lens_q"].tolist() == borders

packed, step = to_device(packed, model.device), Step(model)
row = {"input_ids": packed["input_ids"], "labels": packed["labels"]}  # (1, T)
visible = (document[:, None] == document[None, :]).tril()[None, None]  # (1, 1, T, T)
told = {"position_ids": positions[None], "attention_mask": visible}
told = to_device(told, model.device)
counts = [count_trained([e]) for e in three]
with torch.no_grad():
    one_by_one = [float(mean_loss(model, part)) for part in micro_batches(three, 1)]
    alone = sum(n * x for n, x in zip(counts, one_by_one, strict=True)) / sum(counts)
    by_mask = float(mean_loss(model, {**row, **told}))
    by_borders = float(step(**packed, num_tokens=sum(counts)))
    not_told = float(mean_loss(model, row))
print(f"one by one {alone:.2f} · by hand {by_mask:.2f} · "
      f"by the library {by_borders:.2f} · not told {not_told:.2f}")
assert abs(by_mask - alone) < 1e-5 and abs(by_borders - alone) < 1e-5
assert abs(not_told - alone) > 0.05

# %% [markdown]
# **Read it.** Three of them agree to five decimals. In the fourth the documents see each other: each answer is predicted from
# strangers' chats as well as its own. No error, no warning, only another number. It may be higher or lower, and the run that
# follows learns from it all the same; so the test is never "does it look right" but "is it equal to one by one".
#
# How long should a packed row be? As long as memory allows: a *budget* of tokens. Then documents have to be
# fitted into as few rows as possible, like boxes into vans. Trying every way is hopeless. A rule of thumb from the 1970s is hard to
# beat, and never needs more than 11/9 of the best possible number of rows (and a bit): take the longest first, and put each into
# the first row that still has room.
#
# **Toy numbers.** Lengths 4, 8, 4, 2, 6 and rows of 10. In the order they come, always into the last row: 4 | 8 | 4 2 | 6, four rows.
# Longest first: 8 2 | 6 4 | 4, three.

# %% [markdown]
# ### Exercise 03.5 · First-fit-decreasing (●●○, 8 minutes)
#
# Return the rows, each a list of the *lengths* in it, in the order they went in. For the toy numbers:
# `[[8, 2], [6, 4], [4]]`.
#
# <details><summary>Hint 1</summary>
#
# Two loops: `for length in sorted(lengths, reverse=True)`, and inside it one over the rows so far.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A row has room if `sum(row) + length <= budget`. A `for` can have an `else`: it runs when no `break` did, and there a new row
# opens.
# </details>

# %%
def my_rows(lengths, budget):
    """Lists of lengths, `budget` at most; longest first, into the first with room."""
    ...


checks.check("03.5", my_rows)

# %%
from qftlab import first_fit_decreasing

fit_into_rows = checks.or_library("03.5", my_rows)
BUDGET = 128
lengths = [len(e.input_ids) for e in examples]
first, fitted = lengths[:BATCH], fit_into_rows(lengths[:BATCH], BUDGET)
wanted = first_fit_decreasing(first, BUDGET)
assert fitted == [[first[i] for i in row] for row in wanted]
axes = training_plots.documents({
    f"Padded, {BATCH} rows": ([[length] for length in first], max(first)),
    f"Fitted, {len(fitted)} rows": (fitted, BUDGET)})
alt = ("Two pictures of the same 32 documents: one to a row, most of the rectangle "
       "is filling; fitted into rows of 128 tokens, little of it is")
views.show_figure(axes, alt=alt)

parts = [sorted(lengths)[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
in_sorted = sum(len(part) * max(part) for part in parts)
print(f"all rows: sorted and padded {in_sorted:,} tokens, packed {sum(lengths):,}")

# %% [markdown]
# **Read it.** Solid is real, hatched is filling. On the left a few long answers make thirty short rows long, and the model computes
# all of it. On the right are the same documents in rows of 128 tokens; white lines are their borders. What little is hatched there
# is not even computed: the library's packed rows end where their last document ends.
#
# *Sorting* by length before cutting into batches helps too, nearly as much, but then long and short answers never meet in one step.
#
# **Check.** In the library all this is one word, `packing`. Three steps with it and three without: as in part 5, the losses agree
# within 0.0001.

# %%
found = {}
for packing in [True, False]:
    config = dataclasses.replace(six_steps, max_steps=3, packing=packing)
    found[packing] = fit_examples(copy.deepcopy(model), examples, config).losses
assert all(abs(a - b) < 1e-4 for a, b in zip(found[True], found[False], strict=True))

# %% [markdown]
# ## 10 · The power cut
#
# **Idea.** A run of a week dies on the fifth day: the power, the disk, somebody who wanted the GPU. A *checkpoint* is what you
# wish you had written down the evening before. What has to be in it? Everything that the next step depends on, and our loop
# is short enough to look: the **weights**, AdamW's two **averages** for each of them, and the number of the **step**.
#
# Nothing else. The rate is a function of the step. The rows are a function of seed and step (`batches`, part 5), and so is the
# randomness of dropout: the library draws it anew from seed and step. A loop that draws from one long stream of random numbers
# would have to save its place in it; one that shuffles as it goes, its order. Here one integer is enough.
#
# **Formula.** $\;(w, m, v)_{s+1} = f\big((w, m, v)_s,\; s\big)$, with the same $f$ in every run.
#
# **Toy numbers.** A weight with gradients 1, 1, 1 and then −1, and $\beta_1 = 0.9$. With its averages, $\hat m$ of the fourth step
# is $0.144/0.344 = 0.42$, and $\hat v = 1$: it goes on as before, slower. Without them the fourth step is a *first* step, and
# $\hat m/\sqrt{\hat v} = -1$: it turns round, at full speed.
#
# **Code.** The run of part 5, once more, saving every three steps. In the fourth the power fails.

# %%
went_on = adamw(0.0, [1.0, 1.0, 1.0, -1.0])
assert abs((went_on[2] - went_on[3]) / 0.1 - 0.42) < 0.005
assert abs(adamw(0.0, [-1.0])[0] - 0.1) < 1e-6  # forgot: the other way


class PowerCut(Exception):
    """The end of a run that nobody planned."""


def fail_in_step_four(record):
    if record["step"] == 4:
        raise PowerCut


disk = tempfile.TemporaryDirectory()
saving = dataclasses.replace(six_steps, save_every=3)
lost = copy.deepcopy(model)
try:
    fit_examples(lost, examples, saving, checkpoints=disk.name,
                 on_log=fail_in_step_four)
except PowerCut:
    (saved,) = Path(disk.name).iterdir()
for file in sorted(saved.iterdir()):
    print(f"{saved.name}/{file.name:22} {file.stat().st_size / 1e6:>5.1f} MB")

# %% [markdown]
# **Read it.** Two averages are twice the weights. `state.json` holds the step, the losses so far, and a fingerprint of settings and
# data. Step 4 is lost; it is not on the disk.
#
# > **Predict, then run.** The run goes on from step 3, in a model that has never seen a row. How many decimals of the final
# > weights will agree with those of part 5, which was never disturbed?

# %%
resumed = copy.deepcopy(model)  # what a new process begins with
again = fit_examples(resumed, examples, saving, checkpoints=disk.name, resume=True)
assert again.losses == by_library
both = zip(resumed.parameters(), undisturbed.parameters(), strict=True)
assert all(torch.equal(a, b) for a, b in both)
print(f"six losses and {resumed.num_parameters():,} weights: every bit the same")

# %% [markdown]
# **Read it.** All of them, to the last bit. Part 5 asked for a few decimals of three losses, because two *different* programs add in
# different orders. Here the same program adds the same numbers in the same order, so anything less than equal would mean that
# something was forgotten. (Another machine, or another number of threads, orders sums differently: a few decimals again.)
#
# No message says so when something is forgotten. What people forget:
#
# - *The averages.* The weights go on from where they were, and the next step is a first step, as in the toy numbers.
# - *The step.* The last three steps, begun as a new run from the saved weights: the rate warms up a second time, the first three
#   batches are read a second time, and the last three never.
# - *The settings.* Somebody halves the rate and resumes. That is neither the old run nor a new one.
# - *A whole file.* The power may fail *inside* a save as well. The library writes into a folder with another name, waits until
#   the disk has it all, and renames it: what is called `step-000003` is whole. A byte that changes afterwards is found by its sha256.
#
# The first is up to you: `resume=True`, and not a new run. Other settings and damaged files are refused, and named:

# %%
try:
    other = dataclasses.replace(saving, lr=PEAK / 2)
    fit_examples(resumed, examples, other, checkpoints=disk.name, resume=True)
except ValueError as error:
    print(str(error).splitlines()[1].strip())
disk.cleanup()

# %% [markdown]
# ## 11 · What goes wrong in practice
#
# **The last batch is smaller.** 50 rows in micro-batches of 8, four to a step, leave a last step of three, with 8, 8 and 2 rows.
# Code that divides by "four micro-batches" divides the last step by too much: its loss is three quarters of what it should be. Code that
# counts trained tokens is right without knowing. The library keeps these rows: each row is seen once an epoch.
#
# **The schedule is off by one.** With `step / warmup` the first rate is 0, and the first batch moves nothing. transformers' own
# schedules do so. It hardly shows: a first and a second loss are measured at *the same* weights.
#
# **The schedule counts the wrong steps.** Advance it with every micro-batch instead of every optimizer step, and with four of
# them it is through after a quarter of the run. And then? A line stays at 0. A cosine does what cosines do:

# %%
def rates_of(make, times, total=40):
    """Rates of the optimizer steps when the schedule moves `times` times in each."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = make(optimizer), []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for _ in range(times):
            schedule.step()
    return rates


meant = rates_of(lambda optimizer: cosine_with_warmup(optimizer, 0, 40), times=1)
line = rates_of(lambda optimizer: linear_with_warmup(optimizer, 0, 40), times=4)
cosine = rates_of(lambda optimizer: cosine_with_warmup(optimizer, 0, 40), times=4)
by_torch = rates_of(lambda optimizer: CosineAnnealingLR(optimizer, 40), times=4)
assert all(abs(a - b) < 1e-6 for a, b in zip(cosine, by_torch, strict=True))
assert max(line[10:]) == 0 and cosine[10] < 1e-6 and cosine[20] == cosine[40] == 1
assert rates_of(lambda optimizer: cosine_with_warmup(optimizer, 4, 40), times=1)[0] == 0

ax = training_plots.rates({"as meant": meant, "line, too often": line,
                           "cosine, too often": cosine})
alt = ("Rates over 40 steps: as meant, one fall from 1 to 0; a line advanced four "
       "times a step is at 0 from step 10 on; a cosine advanced four times a step "
       "falls to 0 at steps 10 and 30 and is back at the peak at steps 20 and 40")
views.show_figure(ax, alt=alt)

# %% [markdown]
# **Read it.** Solid is what was meant. The line is at 0 after ten steps, so three quarters of the run train nothing. The cosine, in
# transformers and in torch, comes back: it is at its peak in the middle of the run *and at the end*, where the weights should come to
# rest. The loss still falls; log the rate, and look at it.
#
# **The leak is a paraphrase.** Shuffle the numbers of a puzzle and it is the same puzzle, but no longer the same text. The
# library's `contamination` knows what a Countdown puzzle is and compares sorted numbers. Take that knowledge away (the
# last line: other words, no fields) and it is as blind as any text comparison:

# %%
from qftlab import contamination

again = "Use the numbers {1}, {2}, {0} once each to make {3}."
other = "Reach {3} from {2} and {1} and {0}."
shuffled, retold = [], []
for row in leaked:
    numbers = (*row["numbers"], row["target"])
    shuffled.append({**row, "instruction": again.format(*numbers)})
    retold.append({"instruction": other.format(*numbers)})
for name, copies in [("shuffled", shuffled), ("retold", retold)]:
    by_text = len(find_leaks([row["instruction"] for row in copies], prompts))
    by_numbers = contamination(copies, test).num_exact
    print(f"{name}: {by_text} found by text, {by_numbers} by the library")
assert contamination(shuffled, test).num_exact == NUM_LEAKED
assert contamination(retold, test).is_clean

# %% [markdown]
# No comparison of texts finds them all. Split *before* you paraphrase or augment, by what a row is about; and distrust a
# score that is much better than that of a fresh test set written by hand.
#
# **The leak is you.** No row has to slip anywhere. Twenty runs that are all equally good, right in 30 % of all puzzles, are measured on
# the same 100 puzzles; you report the best one. A thousand such searches:

# %%
chance = torch.Generator().manual_seed(SEED)
right = torch.rand(1000, 20, 100, generator=chance) < 0.3
best = right.float().mean(-1).max(-1).values.mean().item()  # of twenty, on average
fresh = right[:, 0].float().mean().item()
print(f"the best of twenty: {best:.0%} where chosen, {fresh:.0%} on fresh puzzles")
assert best > 0.36 and abs(fresh - 0.3) < 0.01

# %% [markdown]
# So choose on development rows, as often as you like, and read the test rows once, at the end. This lab does the same: all settings in its
# notebooks were chosen on `development.jsonl`, and the rates that it reports come from `heldout.jsonl`.
#
# ## Your exercises

# %%
checks.progress("03")

# %% [markdown]
# ## At 0.5B
#
# **The same:** the loop, line by line. The mask, the division by all trained tokens of the step, clipping at 1, warm-up and
# cosine, packing.
#
# **Different:** the *rate*, about 1e-5 where `tiny` takes 5e-4: large models have more to lose. The *precision*: forward and
# backward pass in bf16, but weights that move by 1e-5 are kept in fp32, because bf16 has 8 significant bits and rounds such a
# step away. The *memory*: 16 bytes for each of 0.494 billion parameters (weight, gradient, AdamW's two averages,
# 4 bytes each) is 7.9 GB before the first token. And the *logits*: 16,384 tokens × 151,936 rows × 4 bytes would be another 10 GB; that is
# why the library's `Step` computes them at trained positions only, and why micro-batches are small. And the *checkpoint*: weights and
# two averages, 12 bytes a parameter, are 5.9 GB; so it is saved every few hundred steps, and only the newest are kept.
#
# **Published:** Qwen2.5's own fine-tuning ran two epochs over more than a million rows, with a rate falling from 7e-6 to
# 7e-7, weight decay 0.1 and gradients clipped at 1.0 (Qwen2.5 technical report, section 4.1). **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. Shift, mask, and divide by the trained tokens of the whole step. Then it does not matter how the step is cut.
# 2. Check a loop by its first three losses, against an independent witness, to four decimals; and know what that cannot see.
# 3. The learning rate matters most. Too small costs time; too large costs what the model knew.
# 4. The training loss can only tell you that training works. Held-out rows tell you what was learned.
# 5. Twenty leaked rows make a score a lie that looks like a result. So does choosing on the rows that you report.
# 6. Packing is the same loss for fewer tokens, once positions restart and attention knows the borders. Assert it.
# 7. Weights, the optimizer's averages and the step: who saves these three, and draws all else from a seed, loses nothing.
#
# **Next.** [04 · Decoding](04_decoding.ipynb): the model gives probabilities; how do they become text?
#
# **Sources.** Loshchilov and Hutter 2019, *Decoupled weight decay regularization* (arXiv:1711.05101), AdamW; the same 2017, *SGDR*
# (arXiv:1608.03983), the cosine. Goyal et al. 2017, *Accurate, large minibatch SGD* (arXiv:1706.02677), warm-up. Pascanu et al. 2013,
# *On the difficulty of training recurrent neural networks* (arXiv:1211.5063), clipping. transformers issue 34191 and the Hugging Face blog,
# *Fixing gradient accumulation*, October 2024. Yang et al. 2023, *Rethinking benchmark and contamination for language models with rephrased
# samples* (arXiv:2311.04850). Krell et al. 2021, *Efficient sequence packing* (arXiv:2107.02027). Johnson 1973,
# *Near-optimal bin packing algorithms* (MIT), and Dósa 2007, first-fit-decreasing and its bound. Qwen team 2024,
# *Qwen2.5 technical report* (arXiv:2412.15115).
