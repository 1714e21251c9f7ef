# %% [markdown]
# # 01 · Tokens: solutions
#
# One good answer to each exercise of [01 · Tokens](../01_tokenizer_extension.ipynb), with the reason in a sentence.
# Yours may look different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth
# more than this page.

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

import torch

from qftlab import extend_model, extend_tokenizer, load_tokenizer
from qftlab_course import checks, stages

# %% tags=["parameters"]
PRESET = "tiny"

# %% [markdown]
# ## Predict, then run: how many tokens?
#
# `1234` is **4** and `12 34` is **5**: every digit stands alone, and so does the blank, because a number never takes a
# blank along. `capital` with and without its blank are different tokens, and they may differ in number too: the merges
# that build a word from its front begin with `Ġ`. `Zürich` has more tokens than you would think, because `ü` is two
# bytes. And `<|AGENT|>` is **9**: its capitals were rarely neighbours in the training text, so hardly anything was
# merged.

# %%
base = stages.stage("base", preset=PRESET)
model, tokenizer = base.model, base.tokenizer
for text in ["1234", "12 34", "capital", " capital", "Zürich", "<|AGENT|>"]:
    print(len(tokenizer(text).input_ids), repr(text))

# %% [markdown]
# ## Exercise 01.1 · One merge step
#
# An index that moves by two after a merge and by one otherwise does both things at once: left to right, and no piece
# is used twice. Slices help at the end: `pieces[i : i + 2]` of the last piece has one element, and is no pair.

# %%
def my_merge(pieces, pair):
    merged, i = [], 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged

checks.check("01.1", my_merge)

# %% [markdown]
# ## Exercise 01.2 · A row from its pieces
#
# Indexing with a list gives one row for each id, (n, D), repeats included; `dim=0` averages over the pieces. A loop
# that adds the rows up and divides by `len(piece_ids)` is just as right.

# %%
def my_mean_row(table, piece_ids):
    return table[piece_ids].mean(dim=0)

checks.check("01.2", my_mean_row)

# %% [markdown]
# ## Exercise 01.3 · Resize without shrinking
#
# The one thing to see is the `max`: with more rows than tokens nothing is missing, and zero rows are added. Without
# it, `new_zeros` would be asked for a negative number of rows.

# %%
def my_resize(table, num_tokens):
    missing = max(0, num_tokens - len(table))
    return torch.cat([table, table.new_zeros(missing, table.shape[1])])

checks.check("01.3", my_resize)

# %% [markdown]
# ## Explain: same logits, other probabilities
#
# A probability is $e^{z_i} / \sum_j e^{z_j}$, and the sum runs over *all* rows of the table. The logits of the old
# tokens are the same, but the new tokens' have changed, so the sum has, and every old probability is multiplied by one
# and the same factor. Had the table been *grown* by two rows, the sum would have gained two positive terms: every old
# probability would have fallen. Here two spare rows were *overwritten*, so they may rise or fall; with mean rows
# either is a trifle.
#
# We can see the common factor. The difference of log-probabilities is the same number for all old tokens:

# %%
extended = load_tokenizer(base.path)
extended_model = copy.deepcopy(model)
extend_model(extended_model, extended, extend_tokenizer(extended))
ids = tokenizer("47 + 38 =", return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    after, before = (m(ids).logits.log_softmax(-1) for m in (extended_model, model))
shift = after - before
old = shift[0, -1, : len(tokenizer)]
assert torch.allclose(old, old[0].expand_as(old), atol=1e-4) and old.abs().max() < 0.01
print("one factor for all old tokens, within a hundredth of 1")

# %%
checks.progress("01")
