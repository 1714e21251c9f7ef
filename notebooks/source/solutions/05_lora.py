# %% [markdown]
# # 05 · LoRA: solutions
#
# One good answer to each exercise of [05 · LoRA](../05_lora.ipynb), with the reason in a sentence or two. Yours may look
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
import torch

from qftlab_course import checks

# %% tags=["parameters"]
SEED = 0

# %% [markdown]
# ## Exercise 05.1 · A layer with an adapter
#
# The brackets are the point: `(x @ a.T) @ b.T` goes through $r$ numbers for each position; `x @ (b @ a).T` would first build the
# whole matrix that LoRA exists to avoid. The result is the same, the work is not.

# %%
def my_adapted(x, weight, a, b, alpha):
    scale = alpha / a.shape[0]
    return x @ weight.T + scale * ((x @ a.T) @ b.T)


checks.check("05.1", my_adapted)

# %% [markdown]
# ## Exercise 05.2 · How many numbers are trained
#
# $A$ has $r \cdot D_{in}$ numbers, $B$ has $D_{out} \cdot r$. The rows are trained whole, so the rank does not touch them.

# %%
def my_count(shapes, rank, num_rows, width):
    adapters = sum(rank * (d_out + d_in) for d_out, d_in in shapes)
    return adapters + num_rows * width


checks.check("05.2", my_count)

# %%
assert my_count([(448, 160)], 4, 0, 160) == 2_432
print(f"{448 * 160 / 2432:.0f} times fewer than the matrix itself")

# %% [markdown]
# ## Exercise 05.3 · Move two rows and no others
#
# A copy, and an index on both sides. A mask of zeros and ones, multiplied into the gradient, does as well. With AdamW it is *not* enough
# to zero the gradient: weight decay and the averages of earlier steps move a weight whose gradient is zero. That is why
# peft keeps the trained rows in a small parameter of their own.

# %%
def my_move_rows(table, gradient, ids, lr):
    moved = table.clone()
    moved[ids] -= lr * gradient[ids]
    return moved


checks.check("05.3", my_move_rows)

# %%
row = torch.nn.Parameter(torch.ones(1))
adam = torch.optim.AdamW([row], lr=0.1, weight_decay=0.0)
for gradient in [1.0, 0.0, 0.0]:  # one real step, then two with a masked gradient
    row.grad = torch.tensor([gradient])
    before = row.item()
    adam.step()
    print(f"gradient {gradient:.0f}: the weight moves by {row.item() - before:.2f}")
assert row.item() < before

# %% [markdown]
# ## Exercise 05.4 · Merge an adapter
#
# `b @ a` is (D_out, r) times (r, D_in). `weight + …` makes a new tensor; `weight += …` would have changed the frozen base, on which other
# adapters may rely.

# %%
def my_merge(weight, a, b, alpha):
    return weight + alpha / a.shape[0] * (b @ a)


checks.check("05.4", my_merge)

# %%
generator = torch.Generator().manual_seed(SEED)
sizes = [(5, 6), (4, 6), (2, 6), (4, 2)]
x, weight, a, b = (torch.randn(*size, generator=generator) for size in sizes)
merged, apart = x @ my_merge(weight, a, b, 8.0).T, my_adapted(x, weight, a, b, 8.0)
assert torch.allclose(merged, apart, atol=1e-4)

# %% [markdown]
# ## Predict, then run: how many rows move?
#
# **LoRA: two.** They are the only rows with a parameter behind them. **Full fine-tuning: all 1,024**, also those of tokens that occur in no row
# of the data. In a tied model a row gets a gradient in two ways: where its token is read, and at *every* trained position, where the
# softmax pushes down each row that is not the answer. That second push is small for an unlikely token, but it never changes its sign, and
# AdamW divides by the size: so the rows of tokens that never occur move further than almost all others.
#
# ## Predict, then run: who forgets?
#
# It depends on what is counted. By the loss, full fine-tuning at its usual rate forgets less than rank 4; by right answers it forgets more.
# Rank 1 suffices for learning this task, or nearly, and forgets most of the adapters. And the run without the six rows does not catch up: an adapter can turn a hidden state towards a row, but a row that was pushed away from everything
# in pretraining stays where it is.
#
# ## Explain: "at the same learning rate"
#
# The colleague should see *full* beside *full, fast*: a factor of two in the rate alone turns a good run into a ruined one. Adapters and
# weights do not live on the same scale ($B$ starts at zero, and $\alpha / r$ multiplies the update), so one rate for both says little about
# either; each method deserves its own best rate, and then both axes of the picture.

# %%
checks.progress("05")
