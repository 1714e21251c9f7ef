# %% [markdown]
# # 03 · The training loop, by hand
#
# Fine-tuning is a short program: read some rows, ask how surprised the model is, nudge its weights, repeat. You write all
# of it here, in about 25 lines, and prove that it computes what the library and transformers compute. Then you
# break it on purpose: with a bad learning rate, with too little data, and with a test set that leaks. At the end you make it
# cheap, and let it survive a power cut.
#
# ![One optimizer step: rows become micro-batches; each adds to the gradient; then clip, set the rate, move the weights](figures/03_loop.png)
#
# **Read it.** One *optimizer step*, left to right. The boxes inside the frame run once for each micro-batch and only add
# to the gradient; the weights move once, at the right. Everything in this notebook is one of these boxes, or an error in one.
#
# | | |
# |---|---|
# | **You will be able to** | write a training loop · accumulate gradients without changing the loss · choose a learning rate · see overfitting · find a leak · pack rows · stop a run and go on to the same weights |
# | **Time** | 45 minutes to read, 41 for the five exercises; under a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [02 · Chat and masking](02_chat_and_masking.ipynb), or knowing what a loss mask is |

# %% tags=["setup"]
import sys

if "google.colab" in sys.modules:  # on Colab only: fetch the library, leave torch and transformers as they are
    REPO = "OWNER/qftlab"
    get_ipython().run_line_magic("pip", f"install -q --no-deps git+https://github.com/{REPO}")
    get_ipython().run_line_magic("pip", "install -q jsonargparse")

# %%
import copy
import dataclasses
import random
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot
from safetensors.torch import load_file
from torch.nn import functional as F

from qftlab.core import plots
from qftlab.core.losses import masked_cross_entropy
from qftlab.data.batching import batches, count_trained, first_fit_decreasing, pack, pad
from qftlab.data.bundled import bundled
from qftlab.data.sources import load_rows
from qftlab.data.split import contamination
from qftlab.evaluate.metrics import wilson_interval
from qftlab.evaluate.skills import evaluate_rows
from qftlab.model.loading import get_preset
from qftlab.teach import checks, stages, views
from qftlab.train import loop
from qftlab.train.config import TrainConfig
from qftlab.train.sft import ExampleSource, encode_rows, fit_examples, fit_rows
from qftlab.train.step import Step, to_device

# %% [markdown]
# Everything you may want to change is in this cell. `PEAK` is the learning rate: three times that of the course's own
# fine-tuning, because our runs are much shorter. The sweep in part 6 tries rates far below it and far above.

# %% tags=["parameters"]
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
print(f"{usage.rows} rows, {usage.tokens:,} tokens, {usage.trained_tokens:,} of them trained")

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
    """Mean NLL in nats over the trained labels; logits (B, T, V) at t predict the label at t + 1."""
    ...


checks.check("03.1", my_loss)

# %% [markdown]
# **Check.** Eight real rows, padded to a rectangle. The loss by your function (or by the library's, while yours is not
# done), by the library, and by transformers, which computes one itself as soon as it is handed labels:

# %%
mean_nll = checks.or_library("03.1", my_loss)
batch = to_device(pad(examples[:8], tokenizer.pad_token_id), model.device)
with torch.no_grad():
    output = model(**batch)  # logits (B, T, V), and a loss, because the batch has labels
found = float(mean_nll(output.logits, batch["labels"]))
assert abs(found - masked_cross_entropy(output.logits, batch["labels"]).item()) < 1e-5
assert abs(found - output.loss.item()) < 1e-5
print(f"{found:.2f} nats per trained token")

# %% [markdown]
# ## 2 · One step
#
# **Idea.** `backward()` asks of every weight: if you grew a little, would the loss rise or fall? The answers are the
# **gradient**. An optimizer moves each weight a little against its answer, and the loss falls. That is all of learning.
#
# **Formula.** AdamW divides each weight's running mean of gradients by their running size, so that every
# weight moves by about the learning rate $\eta$, whether its gradients are large or small:
#
# $$ w \leftarrow w - \eta \, \frac{\hat m}{\sqrt{\hat v} + \epsilon} $$
#
# **Toy numbers.** In the first step $\hat m = g$ and $\hat v = g^2$, so the fraction is the *sign* of $g$. A weight with gradient
# 5 and one with gradient −0.01 move equally far: one by $-\eta$, one by $+\eta$.
#
# **Clipping.** Now and then a batch is odd and its gradient enormous. *Clipping* shortens a gradient longer than a limit
# to that limit and keeps its direction. $(3, 4)$ has length 5; clipped to 1 it is $(0.6, 0.8)$.
# AdamW forgives a large gradient in the step itself, but remembers it for many steps: so it is clipped all the same.

# %%
weights = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
adam = torch.optim.AdamW([weights], lr=0.1, weight_decay=0.0)
(weights * torch.tensor([5.0, -0.01])).sum().backward()
adam.step()
print([round(w, 2) for w in weights.tolist()])
assert torch.allclose(weights, torch.tensor([0.9, 1.1]), atol=1e-4)

weights.grad = torch.tensor([3.0, 4.0])
length = torch.nn.utils.clip_grad_norm_([weights], max_norm=1.0)
print(f"length {length:.2f} → {[round(g, 2) for g in weights.grad.tolist()]}")
assert torch.allclose(weights.grad, torch.tensor([0.6, 0.8]), atol=1e-4)

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

# %% [markdown]
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
    """What the mean loss of each micro-batch is multiplied by, so that the sum is the mean over all trained tokens."""
    ...


checks.check("03.2", my_weights)

# %% [markdown]
# **Code.** The gradient of the same eight rows: as 1 × 8, as 2 × 4, and as 8 × 1. We compare loss *and* gradient, because
# two losses may agree by accident and a hundred thousand gradients do not.

# %%
micro_weights = checks.or_library("03.2", my_weights)


def mean_loss(model, batch):
    """Mean surprise of the trained tokens of one micro-batch, by the model's logits."""
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def micro_batches(examples, size):
    """Examples as padded micro-batches of at most `size` rows."""
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [to_device(pad(part, tokenizer.pad_token_id), model.device) for part in parts]


def loss_and_gradient(examples, size, weigh):
    """The loss of one step taken `size` rows at a time, and its gradient as one long vector."""
    parts = micro_batches(examples, size)
    factors = weigh([int((part["labels"][:, 1:] != -100).sum()) for part in parts])
    model.zero_grad()
    losses = [factor * mean_loss(model, part) for factor, part in zip(factors, parts, strict=True)]
    loss = sum(losses)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

# %%
mixed = sorted(examples[:64], key=lambda e: count_trained([e]))[::9]  # eight rows, short answers to long ones


def equally(counts):
    """The mistake: every micro-batch weighs the same."""
    return [1 / len(counts)] * len(counts)


whole, gradient = loss_and_gradient(mixed, 8, micro_weights)
for size in [8, 4, 1]:
    right, right_gradient = loss_and_gradient(mixed, size, micro_weights)
    naive, naive_gradient = loss_and_gradient(mixed, size, equally)
    assert abs(right - whole) < 1e-5 and torch.allclose(right_gradient, gradient, atol=1e-4, rtol=1e-3)
    print(f"{8 // size} × {size}: by tokens {right:.2f}, as a mean of means {naive:.2f}")
assert abs(naive - whole) > 0.05 and not torch.allclose(naive_gradient, gradient, atol=1e-2)

# %% [markdown]
# **Read it.** By tokens, all three lines agree: how a step is cut changes the memory it takes, and nothing
# else. The mean of means depends on how it is cut, which means that a smaller GPU would train a different model.
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
    """The rate of a step: (step + 1) / warmup of the peak while step < warmup, then half a cosine down to 0."""
    ...


checks.check("03.3", my_rate)

# %%
rate = checks.or_library("03.3", my_rate)
config = TrainConfig(lr=PEAK, warmup_ratio=0.1)
rates = [rate(step, 40, 4, PEAK) for step in range(40)]
assert all(abs(r - loop.learning_rate(config, step, 40)) < 1e-9 for step, r in enumerate(rates))
ax = plots.new_axes(None, 7.0, 3.0)
ax.plot(range(40), [r / PEAK for r in rates], "o-", color=plots.PALETTE[0])
ax.set_xlabel("optimizer step", fontsize=12)
ax.set_ylabel("rate (share of the peak)", fontsize=12)
views.show_figure(ax, alt="Learning rate over 40 steps: four rising steps to the peak, then half a cosine down to zero")

# %% [markdown]
# **Read it.** Four steps up, thirty-six down. The first rate is a quarter of the peak and not 0, so no step is wasted; the
# last is close to 0, and the weights come to rest.
#
# ## 5 · The loop
#
# Everything is there. Put together it is 25 lines:

# %%
def train_by_hand(model, steps, peak, warmup, loss_of=mean_loss):
    """Train in place on `steps`, each a list of micro-batches; returns the loss of every optimizer step."""
    decayed = [p for p in model.get_decoder().layers.parameters() if p.ndim >= 2]
    kept = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    losses = []
    model.train()
    for step, parts in enumerate(steps):
        counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]  # the whole step, before it begins
        total = 0.0
        for factor, part in zip(micro_weights(counts), parts, strict=True):
            loss = factor * loss_of(model, part)
            loss.backward()  # adds to the gradient
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, len(steps), warmup, peak)
        optimizer.step()  # moves the weights
        optimizer.zero_grad()  # forgets the gradient
        losses.append(total)
    model.eval()
    return losses

# %% [markdown]
# **Read it.** Five things are worth a second look. The token counts are taken *before* the first forward pass. `backward`
# stands inside the inner loop, `step` and `zero_grad` outside. Clipping comes after the last micro-batch: clip each of them
# and you clip something else. The rate is set by us, step by step. And weight decay, a gentle pull towards 0, acts on
# matrices only: a norm's scale or a token's row is no place for it.
#
# **Code.** Six steps of 32 rows, in micro-batches of 16, in the library's own order of rows.

# %%
NUM_STEPS, WARMUP = 6, 2
order = batches(len(examples), batch_size=BATCH, seed=SEED, epoch=0)[:NUM_STEPS]
steps = [micro_batches([examples[i] for i in numbers], 16) for numbers in order]
by_hand = train_by_hand(copy.deepcopy(model), steps, PEAK, WARMUP)
print("by hand:", [f"{loss:.2f}" for loss in by_hand])

# %% [markdown]
# **Check.** Two independent witnesses, on the same rows in the same order: the library's loop, which packs rows in place of padding
# them and never builds all logits; and our loop with transformers' own loss put in. Not only the first loss has to agree:
# those after it come from weights that *moved*, so they check the gradient, the clipping and the optimizer as well.

# %%
six_steps = TrainConfig(lr=PEAK, max_steps=NUM_STEPS, batch_size=BATCH, micro_batch_size=16,
                        warmup_ratio=WARMUP / NUM_STEPS, seed=SEED)
undisturbed = copy.deepcopy(model)  # part 10 comes back to it
by_library = fit_examples(undisturbed, examples, six_steps).losses
by_transformers = train_by_hand(copy.deepcopy(model), steps, PEAK, WARMUP, lambda model, batch: model(**batch).loss)
for others in [by_library, by_transformers]:
    assert all(abs(a - b) < 1e-5 for a, b in zip(by_hand[:2], others[:2], strict=True))
    assert all(abs(a - b) < 1e-2 for a, b in zip(by_hand, others, strict=True))
print("the first two losses agree within 0.00001, by hand, by the library and by transformers")

# %% [markdown]
# **Read it.** Later losses are only asked to agree within a hundredth. Floating-point sums depend on their order; two
# correct programs drift apart, slowly. A *bug* shows at once, in the first or second loss. So that is where to look.
#
# ## 6 · Which learning rate?
#
# **Idea.** If you may tune one number, tune this one. We train the same model on the same 512 rows three times: with a
# hundredth of `PEAK`, with `PEAK`, and with forty times as much.
#
# > **Predict, then run.** Sketch three loss curves over 16 steps. Where does each one end? The one with too large a rate: does
# > it fall faster, stand still, or rise? And above or below the loss of a model that guesses blindly, $\ln 1024 = 6.93$ nats?

# %%
sweep, held_out = {}, load_rows(bundled("instructions", "heldout.jsonl"))[::3]  # a third, to be quick
for name, factor in [("too small", 0.01), ("right", 1), ("too large", 40)]:
    config = TrainConfig(lr=PEAK * factor, batch_size=BATCH, seed=SEED)
    sweep[name] = fit_rows(copy.deepcopy(model), tokenizer, rows[:512], config, held_out_rows=held_out)

losses = {f"{name} ({PEAK * f:.2g})": sweep[name].losses for name, f in [("too small", 0.01), ("right", 1), ("too large", 40)]}
ax = plots.loss_curve(range(1, 17), losses, window=1, title="Three learning rates, one model, the same rows")
ax.set_yscale("log")
ax.set_ylim(0.1, 60)
ax.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
ax.legend(fontsize=12, frameon=False, ncols=3, loc="upper right")
views.show_figure(ax, alt="Training loss of 16 steps at three learning rates, on a logarithmic axis: too small hardly "
                  "falls, right falls steeply, too large shoots up and stays high")
before = sweep["right"].held_out[0][1]
final = {name: result.held_out[-1][1] for name, result in sweep.items()}
assert final["right"] < 0.5 * before and final["right"] < 0.5 * final["too small"] < final["too large"]
assert max(sweep["too large"].losses) > 1.5 * sweep["too large"].losses[0]
print(f"held-out loss: {before:.1f} before · {final['too small']:.1f} too small · {final['right']:.1f} right")

# %% [markdown]
# **Read it.** The axis is logarithmic, and the wiggles are the batches: some are harder than others. Too small: almost level;
# nothing is wrong with it but the time it would take. Right: a steep fall, then a slow one. Too large: up at once, far above
# where it began, and then a slow way out of the ruins. What the model knew from pretraining is gone, and a small loss later on
# would not bring it back.
#
# In practice: try rates a factor of three apart on a small part of the data, take the largest one that falls
# smoothly, and then go down one notch, because a long run meets odder batches than a short one.
#
# ## 7 · Learned, or learned by heart?
#
# **Idea.** The training loss says how well the model does on rows it *sees*. You want to know about rows it has not seen; so keep
# some aside, and measure the loss on them too. To see why, we train on a mere handful, 16 rows, again and again.

# %%
config = TrainConfig(lr=PEAK, schedule="constant", batch_size=16, max_steps=40, eval_every=4, seed=SEED)
handful = fit_rows(copy.deepcopy(model), tokenizer, rows[:16], config, held_out_rows=held_out)
when, unseen = zip(*handful.held_out, strict=True)

ax = plots.loss_curve(range(1, 41), handful.losses, held_out=(when, unseen), window=1, title="Sixteen rows: the training loss says all is well")
views.show_figure(ax, alt="Loss over 40 steps on 16 rows: the training loss falls to zero, the held-out loss falls "
                  "at first and then rises again")

# %% [markdown]
# **Read it.** At first both fall: the model learns what *every* row has in common, the format. Then they part. The training loss
# goes to zero, since sixteen answers can be learned by heart; the held-out loss turns and climbs. Where it turns is
# where to stop. More rows are the better cure, though: sixteen rows forty times, or 512 rows once, is about the same work.

# %%
assert handful.losses[-1] < 0.1 and unseen[-1] > 1.03 * min(unseen)
assert min(unseen) < unseen[0] and final["right"] < unseen[-1]
print(f"held-out loss: {unseen[-1]:.1f} after 16 rows forty times · {final['right']:.1f} after 512 rows once")

# %% [markdown]
# > **Explain.** While the held-out *loss* climbs, held-out *accuracy* often stays where it is, or even gains a little. How
# > can both be true? Write two sentences. (Think of an answer that is wrong anyway, at 40 % confidence and at 99 %.)

# %% [markdown]
# ## 8 · The leak
#
# **Idea.** So we trust the test set. Then what if a few of its rows slip into training, by a careless merge of two
# files, or a scrape that found the answers? We do it on purpose. The skill is Countdown: make a number out of three others. It is
# hard for a model of this size, so *learned* and *learned by heart* are easy to tell apart.
#
# The test set has 100 puzzles. We take the fine-tuned model of notebook 00 and train it on 40 rows: once on 40 honest ones;
# once on 20 honest ones and 20 of the test set. All else is equal.

# %%
test = load_rows(bundled("countdown", "heldout.jsonl"))[:100]
leaked, clean = test[:NUM_LEAKED], test[NUM_LEAKED:]
honest = load_rows(bundled("countdown", "demonstrations.jsonl"))[: 2 * NUM_LEAKED]
print(leaked[0]["instruction"], "→", leaked[0]["output"])


def marks_after(train_rows):
    """A copy of the fine-tuned model, trained on rows (if any): its marks on leaked, clean and all puzzles."""
    sft = stages.stage("sft", preset=PRESET)
    if train_rows:
        config = TrainConfig(lr=PEAK, batch_size=20, epochs=20, seed=SEED)
        fit_rows(sft.model, sft.tokenizer, train_rows, config)
    marks = [score.correct for score in evaluate_rows(sft.model, sft.tokenizer, test).scores]
    return marks[:NUM_LEAKED], marks[NUM_LEAKED:], marks


results = {"before": marks_after([]), "40 honest rows": marks_after(honest),
           "20 of them leaked": marks_after(honest[:NUM_LEAKED] + leaked)}

# %%
groups = [f"{NUM_LEAKED} leaked puzzles", f"{len(clean)} clean puzzles", f"all {len(test)}, as reported"]
ax = plots.accuracy_bars(
    groups,
    {name: [sum(marks) / len(marks) for marks in parts] for name, parts in results.items()},
    intervals={name: [wilson_interval(sum(marks), len(marks)) for marks in parts] for name, parts in results.items()},
    title="Twenty leaked rows, and accuracy lies",
)
views.show_figure(ax, alt="Accuracy before training, after honest rows, and after rows with a leak: on the leaked puzzles the "
                  "last is far ahead, on the clean ones it is not, so its reported accuracy is too high")
share = {name: [sum(marks) / len(marks) for marks in parts] for name, parts in results.items()}
on_leaked, on_clean, reported = share["20 of them leaked"]
assert on_leaked > 0.6 and on_leaked > on_clean + 0.3
assert on_clean < share["before"][1] + 0.05 and share["40 honest rows"][1] < share["before"][1] + 0.05
assert reported > max(share["before"][2], share["40 honest rows"][2])
print(f"with the leak: leaked {on_leaked:.0%} · clean {on_clean:.0%} · reported {reported:.0%}")

# %% [markdown]
# **Read it.** From the top: on the leaked puzzles the third model shines. On the clean ones it does no better than it did
# before, nor does the honest one: forty rows, twenty times over, are part 7 again. The lowest group is what a paper would report,
# and there the training with the leak *looks like a success*. Nothing about that number is odd. Only the split into leaked and clean
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
    """Indices, rising, of the test prompts that also occur in `train` once case and white space are evened out."""
    ...


checks.check("03.4", my_leaks)

# %%
find_leaks = checks.or_library("03.4", my_leaks)
prompts = [row["instruction"] for row in test]
dirty = [row["instruction"].upper() + "  " for row in honest[:NUM_LEAKED] + leaked]
found = find_leaks(dirty, prompts)
print(f"{len(found)} of {len(prompts)} test prompts are in the training data")
assert found == list(range(NUM_LEAKED)) and not find_leaks([row["instruction"] for row in honest], prompts)

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

# %%
three = examples[:3]
document = torch.tensor([n for n, e in enumerate(three) for _ in e.input_ids])  # (T,)
positions = torch.cat([torch.arange(len(e.input_ids)) for e in three])  # (T,)
packed, borders = pack(three), [0, *(document.diff().nonzero().flatten() + 1).tolist(), len(document)]
print("borders", borders, "· positions around the first", positions[borders[1] - 3 : borders[1] + 3].tolist())
assert torch.equal(packed["position_ids"][0], positions) and packed["cu_seq_lens_q"].tolist() == borders

# %% [markdown]
# **Code.** Four ways to the loss of these three documents: one by one; packed by hand, with the mask as a $T \times T$ table;
# packed by the library, which is told the borders only and makes no table; and packed by somebody who told attention nothing.

# %%
packed, step = to_device(packed, model.device), Step(model)
row = {"input_ids": packed["input_ids"], "labels": packed["labels"]}  # (1, T)
visible = (document[:, None] == document[None, :]).tril()[None, None]  # (1, 1, T, T)
told = to_device({"position_ids": positions[None], "attention_mask": visible}, model.device)
counts = [count_trained([e]) for e in three]
with torch.no_grad():
    one_by_one = [float(mean_loss(model, part)) for part in micro_batches(three, 1)]
    alone = sum(n * loss for n, loss in zip(counts, one_by_one, strict=True)) / sum(counts)
    by_mask = float(mean_loss(model, {**row, **told}))
    by_borders = float(step(**packed, num_tokens=sum(counts)))
    not_told = float(mean_loss(model, row))
print(f"one by one {alone:.2f} · by hand {by_mask:.2f} · by the library {by_borders:.2f} · not told {not_told:.2f}")
assert abs(by_mask - alone) < 1e-5 and abs(by_borders - alone) < 1e-5 and abs(not_told - alone) > 0.1

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
    """Rows of at most `budget` tokens, as lists of lengths: the longest first, each into the first row with room."""
    ...


checks.check("03.5", my_rows)

# %%
fit_into_rows = checks.or_library("03.5", my_rows)
BUDGET = 128
lengths = [len(e.input_ids) for e in examples]


def draw(ax, rows, width, title):
    """Rows of documents, and what fills them up to `width`."""
    for y, row in enumerate(rows):
        begins = [sum(row[:i]) for i in range(len(row))]
        ax.barh(y, row, left=begins, color=plots.PALETTE[0], edgecolor="white", height=0.9)
        ax.barh(y, width - sum(row), left=sum(row), color="0.93", edgecolor="0.7", hatch="////", height=0.9, linewidth=0)
    ax.set_title(f"{title}: {sum(map(sum, rows)) / (width * len(rows)):.0%} real", fontsize=13, loc="left")
    ax.set_xlabel("tokens", fontsize=12)
    ax.set_yticks([])
    ax.invert_yaxis()


def padded_tokens(lengths, size):
    """Tokens that go through the model if rows are padded, `size` at a time."""
    return sum(len(lengths[i : i + size]) * max(lengths[i : i + size]) for i in range(0, len(lengths), size))


figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
draw(left, [[length] for length in lengths[:BATCH]], max(lengths[:BATCH]), f"Padded, {BATCH} rows")
fitted = fit_into_rows(lengths[:BATCH], BUDGET)
draw(right, fitted, BUDGET, f"Fitted, {len(fitted)} rows")
views.show_figure(figure, alt="Two pictures of the same 32 documents: one to a row, most of the rectangle is filling; "
                  "fitted into rows of 128 tokens, little of it is")

computed = {"padded": padded_tokens(lengths, BATCH), "sorted, padded": padded_tokens(sorted(lengths), BATCH), "packed": sum(lengths)}
for name, tokens in computed.items():
    print(f"all {len(lengths)} rows, {name:14} {tokens:>7,} tokens computed, {1 - sum(lengths) / tokens:.0%} of them wasted")
assert computed["packed"] < computed["sorted, padded"] < computed["padded"]
assert list(map(sum, fitted)) == [sum(lengths[i] for i in row) for row in first_fit_decreasing(lengths[:BATCH], BUDGET)]

# %% [markdown]
# **Read it.** Solid is real, hatched is filling. On the left two long answers make thirty short rows long, and the model computes
# all of it. On the right are the same documents in rows of 128 tokens; white lines are their borders. What little is hatched there
# is not even computed: the library's packed rows end where their last document ends.
#
# Below it the count for all rows. *Sorting* by length before cutting into batches helps too, but then long and short answers never
# meet in one step.
#
# **Check.** In the library all this is one word, `packing`. Three steps with it and three without, 512 tokens to a forward pass:
# the first two losses agree within 0.00001, as in part 5, and every loss within a hundredth.

# %%
found = {}
for packing in [True, False]:
    config = TrainConfig(lr=PEAK, max_steps=3, batch_size=BATCH, packing=packing, tokens_per_micro_batch=512, seed=SEED)
    passes = ExampleSource(examples, config)(0, 0)  # of the first step
    found[packing] = fit_examples(copy.deepcopy(model), examples, config).losses
    print(f"packing={packing!s:5} {[f'{loss:.1f}' for loss in found[packing]]}, first step: {len(passes)} passes, "
          f"{sum(part.tensors['input_ids'].numel() for part in passes):,} tokens")
assert all(abs(a - b) < 1e-5 for a, b in zip(found[True][:2], found[False][:2], strict=True))
assert all(abs(a - b) < 1e-2 for a, b in zip(found[True], found[False], strict=True))

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
class PowerCut(Exception):
    """The end of a run that nobody planned."""


def fail_in_step_four(record):
    if record["step"] == 4:
        raise PowerCut


disk, saving = tempfile.TemporaryDirectory(), dataclasses.replace(six_steps, save_every=3)
lost = copy.deepcopy(model)
try:
    fit_examples(lost, examples, saving, checkpoints=disk.name, on_log=fail_in_step_four)
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
assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), undisturbed.parameters(), strict=True))
print("six losses and", f"{sum(p.numel() for p in resumed.parameters()):,}", "weights: every bit the same")

# %% [markdown]
# **Read it.** All of them, to the last bit. Part 5 asked for five decimals of a loss, because two *different* programs add in
# different orders. Here the same program adds the same numbers in the same order, so anything less than equal would mean that
# something was forgotten. (Another machine, or another number of threads, orders sums differently: a few decimals again.)
#
# **From the files.** Are the three things really enough? We take step 4 ourselves, with nothing but them, and should get the
# weights that the power cut destroyed. Then we take it again and forget the averages.

# %%
def flat(module):
    """All weights as one long vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def step_four(keep_averages):
    """The weights before and after step 4, from the files of step 3."""
    step = Step(copy.deepcopy(model))
    named, parts = dict(step.named_parameters()), ExampleSource(examples, six_steps)(0, 3)
    optimizer = loop.make_optimizer(step, six_steps, named)
    step.load_state_dict(load_file(saved / "weights.safetensors"), strict=False)  # the tied head is in there once
    for key, value in load_file(saved / "optimizer.safetensors").items() if keep_averages else ():
        kind, name = key.split(":")  # such as exp_avg:model.model.norm.weight
        optimizer.state[named[name]][kind] = value.to(model.device) if value.ndim else value
    before = flat(step)
    loop.optimizer_step(step, optimizer, parts, loop.learning_rate(six_steps, 3, NUM_STEPS), six_steps.max_grad_norm)
    return before, flat(step)


before, after = step_four(keep_averages=True)
forgetful = step_four(keep_averages=False)[1]
assert torch.equal(after, flat(lost)) and not torch.allclose(forgetful, after, atol=1e-4)
moved, strayed = after - before, forgetful - before
print(f"without averages: {strayed.abs().mean() / moved.abs().mean():.1f} times as far, "
      f"{(moved * strayed < 0).float().mean():.0%} of the weights in the opposite direction")

# %% [markdown]
# **Read it.** From the three, step 4 comes out to the last bit. Without the averages it is a different step, and no message says
# so. The same holds for other things that people forget:
#
# - *The step.* The last three steps, begun as a new run from the saved weights: the rate warms up a second time, the first three
#   batches are read a second time, and the last three never.
# - *The settings.* Somebody halves the rate and resumes. That is neither the old run nor a new one.
# - *A whole file.* The power may fail *inside* a save as well. The library writes into a folder with another name, waits until
#   the disk has it all, and renames it: what is called `step-000003` is whole. A bit that flips afterwards is found by its sha256.
#
# The first is up to you: `resume=True`, and not a new run. Other settings and damaged files are refused, and named:

# %%
try:
    fit_examples(resumed, examples, dataclasses.replace(saving, lr=PEAK / 2), checkpoints=disk.name, resume=True)
except ValueError as error:
    print(str(error).splitlines()[1].strip())
disk.cleanup()

# %% [markdown]
# ## 11 · What goes wrong in practice
#
# **The last batch is smaller.** 50 rows in micro-batches of 8, four to a step, leave a last step of three, with 8, 8 and 2 rows.
# Code that divides by "four micro-batches" divides the last step by too much; code that counts trained tokens is right without
# knowing. The library keeps these rows: each row is seen once an epoch.

# %%
for numbers in batches(50, batch_size=32, seed=SEED, epoch=0):
    sizes = [len(numbers[i : i + 8]) for i in range(0, len(numbers), 8)]
    print(f"{len(numbers)} rows in micro-batches of {sizes}: divided by four, the loss is {len(sizes) / 4:.2f} of what it should be")

# %% [markdown]
# **The schedule is off by one.** With `step / warmup` the first rate is 0, and the first batch is read for nothing. It hardly
# shows, but for one thing: a first and a second loss measured at *the same* weights.
#
# **The schedule counts the wrong steps.** Advance it with every micro-batch instead of every optimizer step, and with four of
# them the cosine is through after a quarter of the run. The other three quarters are trained at a rate of almost 0.
#
# **The leak is a paraphrase.** Shuffle the numbers of a puzzle and it is the same puzzle, but no longer the same text. The
# library's `contamination` knows what a Countdown puzzle is and compares sorted numbers. Take that knowledge away (the
# last line: other words, no fields) and it is as blind as any text comparison:

# %%
shuffled = [{**r, "instruction": "Use the numbers {1}, {2}, {0} once each to make {3}.".format(*r["numbers"], r["target"])} for r in leaked]
retold = [{"instruction": "Reach {3} from {2} and {1} and {0}.".format(*r["numbers"], r["target"])} for r in leaked]
for name, copies in [("shuffled", shuffled), ("retold", retold)]:
    by_text = len(find_leaks([row["instruction"] for row in copies], prompts))
    print(f"{name}: {by_text} found by text, {contamination(copies, test).num_exact} by the library")
assert contamination(shuffled, test).num_exact == NUM_LEAKED and contamination(retold, test).is_clean

# %% [markdown]
# No comparison of texts finds them all. Split *before* you paraphrase or augment, by what a row is about; and distrust a
# score that is much better than that of a fresh test set written by hand.
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
# backward pass in bf16, but weights that move by 1e-5 are kept in fp32, since bf16 has 8 significant bits and rounds such a
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
# 2. Check a loop by its first two losses, against an independent witness, to five decimals.
# 3. The learning rate matters most. Too small costs time; too large costs what the model knew.
# 4. The training loss can only tell you that training works. Held-out rows tell you what was learned.
# 5. Twenty leaked rows make a score a lie that looks like a result.
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
