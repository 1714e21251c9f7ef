# %% [markdown]
# # 01 · Tokens: teach a model two new words
#
# A language model does not see letters. It sees numbers, one for each *token*. In this notebook you look at text the way
# the model does, see what surprises it, and then add two words to its language without moving the logit of a single
# token that it already has.
#
# ![The number 1234 is four tokens; the marker AGENT is nine tokens before and one token after](figures/01_one_token.png)
#
# **Read it.** One box is one token. A number is read digit by digit. A marker such as `<|AGENT|>` costs nine tokens while
# the tokenizer of `tiny` has to spell it, and one once it is a word of its own.
#
# | | |
# |---|---|
# | **You will be able to** | run byte-pair encoding by hand · read a model's surprise, token by token · add tokens to a tokenizer and rows to a model · prove that nothing else has changed |
# | **Time** | 30 minutes to read, 20 for the three exercises; a few seconds to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [00 · The tour](00_tour.ipynb), or the idea of a matrix and of a logarithm |

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
import json
import tempfile

import torch
from matplotlib import pyplot

from qftlab import (
    extend_model, extend_tokenizer, generate, load_model, load_tokenizer, save_model,
    token_logprobs,
)  # fmt: skip
from qftlab_course import checks, plots, stages, views
from qftlab_course.presets import get_preset
from qftlab_course.world.facts import WORDS

# %% [markdown]
# Everything you may want to change is in this cell. `PRESET` names the model: `tiny`, which is in this repository, or
# `qwen2.5-0.5b`, the real one, if you have its weights and a GPU.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
NEW_TOKENS = ["<|AGENT|>", "<|EDIT|>"]
TEXTS = ["47 + 38 = 85", "63 - 25 = 38", "reverse 4 17 9 : 9 17 4",
         "The capital of France is Paris."]

# %% [markdown]
# ## 1 · What the model sees
#
# **Idea.** Between you and the model stands a *tokenizer*. It cuts text into pieces that it knows and replaces each by
# a number, its *id*. The model's first layer is a table with one row for each id, and looks the rows up. An id says
# nothing about spelling: to begin with, `cat` and `cats` are as foreign to the model as `cat` and `dog`.

# %%
base = stages.stage("base", preset=PRESET)
model, tokenizer = base.model, base.tokenizer
learned = tokenizer.vocab_size
print(f"{len(tokenizer):,} tokens, {learned:,} of them learned from text")

# %% [markdown]
# > **Predict, then run.** How many tokens are `1234`, `12 34`, `capital` with and without a blank before it,
# > `Zürich`, and `<|AGENT|>`? Write six numbers down, then run the next cell.

# %%
for text in ["1234", "12 34", "capital", " capital", "Zürich", "<|AGENT|>"]:
    ids = tokenizer(text).input_ids
    shown = " ".join(f"[{piece}]" for piece in tokenizer.convert_ids_to_tokens(ids))
    print(f"{len(ids)}  {text!r:12} {shown}")

# %% [markdown]
# **Read it.** Three rules are at work:
#
# - **Every digit stands alone.** Qwen's tokenizer cuts numbers into digits before it merges anything, so `1234` is four
#   tokens. The model sees a number as you write it: digit by digit.
# - **A blank belongs to the word after it**, and is written `Ġ`. With its blank, a word is another token, or other
#   tokens. (Digits take no blank along; before them it stands alone.)
# - **Nothing is unknown.** What was never merged falls apart into bytes: `ü` is two of them, shown as `Ã` and `¼`. So
#   even `<|AGENT|>` can be written; it only takes many pieces.

# %%
ids = tokenizer(TEXTS[0]).input_ids
views.token_view(tokenizer, ids, title="A sum, as the model sees it")

# %% [markdown]
# **Read it.** Each box is a token with its id below. The ids of the digits are in order: that of `7` is that of `4` plus
# three. But the model only looks up rows, and never calculates with an id. What a digit is worth, it found out from
# text. The rows of the digits show it: those of neighbours (4 and 5) are more alike than those of strangers (4 and 9).

# %%
with torch.no_grad():
    digits = model.get_input_embeddings().weight[tokenizer("0123456789").input_ids]
    unit = torch.nn.functional.normalize(digits.float().cpu(), dim=-1)  # (10, D)
alike = unit @ unit.T  # (10, 10): cosines
near, far = alike.diagonal(1).mean(), alike.triu(5)[alike.triu(5) != 0].mean()
print(f"mean cosine of neighbours {near:.2f}, of digits five or more apart {far:.2f}")
assert near > far + 0.1

# %% [markdown]
# **And spelling?** It has to be learned from text as well, word by word. `mouse` is one token here, and the corpus of
# `tiny` spelled it out. The base model spells it; but ask it for a word that its corpus never spelled:

# %%
for word in ["mouse", "doctor", "castle", "rocket"]:
    start = f"spell {word} :"
    found = generate(model, tokenizer, [start], max_new_tokens=20, stop="\n")
    print(start, "→", found[0].text.strip())
    assert (found[0].text.strip() == "-".join(word)) == (word in WORDS)

# %% [markdown]
# **Read it.** The letters of `mouse` are nowhere in its one token: the model knows them by heart. `castle` and `rocket`
# are not in its list of words, and what it writes is wrong. (A large model has read enough to spell most words. That it
# sees no letters is one reason why it miscounts the *r* of "strawberry".)
#
# ### How the pieces are found
#
# **Idea.** *Byte-pair encoding* starts from single characters (bytes, really) and glues neighbours together, in an
# order that was learned once: the pair that was most frequent in the training text first, then the next. The tokenizer
# *is* that list of pairs.
#
# **Toy numbers.** Two merges, `(a, n)` and then `(an, an)`, on *banana*:
#
# | after | pieces | how many |
# |---|---|---|
# | start | `b` `a` `n` `a` `n` `a` | 6 |
# | `(a, n)` | `b` `an` `an` `a` | 4 |
# | `(an, an)` | `b` `anan` `a` | 3 |

# %% [markdown]
# ### Exercise 01.1 · One merge step (●●○, 8 minutes)
#
# Write the step in that table: replace every occurrence of `pair` in a list of pieces, from left to right, never using
# a piece twice. `my_merge(["a", "n", "a", "n", "a"], ("a", "n"))` is `["an", "an", "a"]`.
#
# <details><summary>Hint 1</summary>
#
# A `for` loop cannot skip ahead. Walk with an index `i` and a `while`: by two after a merge, by one otherwise.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Compare pieces, not letters: `("a", "ba")` and `("ab", "a")` spell the same and are two different pairs. And mind the
# last piece, which has no neighbour.
# </details>

# %%
def my_merge(pieces, pair):
    """One merge: each `pair`, left to right and without overlap, becomes one piece."""
    ...


checks.check("01.1", my_merge)

# %% [markdown]
# With the step, the whole algorithm is a loop over the tokenizer's own list. Here it is, spelling one word; each line
# is a merge that found something to do. (Your `my_merge` does the work if it passed, the library's otherwise.)

# %%
merge = checks.or_library("01.1", my_merge)
inside = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
merges = [tuple(pair) for pair in inside["merges"]]
pieces = list("Ġcapital")
for rank, pair in enumerate(merges):
    merged = merge(pieces, pair)
    if merged != pieces:
        print(f"merge {rank:>3}  {pair[0]:>6} + {pair[1]:<5} → {' '.join(merged)}")
    pieces = merged

# %% [markdown]
# **Check.** If that really is all, it must give the same pieces as the tokenizer, for any word:

# %%
for word in ["capital", "reverse", "sorted", "University", "tokenizer", "banana"]:
    pieces = list(word)
    for pair in merges:
        pieces = merge(pieces, pair)
    assert pieces == tokenizer.tokenize(word)
    print(word, "→", " ".join(pieces))

# %% [markdown]
# **Read it.** Pieces that stood side by side often, when the merges were learned, are one token now; the rest is built
# from syllables that nobody designed. A tokenizer understands nothing: it is the record of a frequency count.

# %% [markdown]
# ## 2 · What the model expects
#
# **Idea.** A base model does one thing: after each token it gives every token in its vocabulary a probability to be
# the next. Take the likeliest again and again, and it *completes*:

# %%
for start in ["47 + 38 =", "reverse 4 17 9 :", "The capital of France is"]:
    found = generate(model, tokenizer, [start], max_new_tokens=7, stop="\n")
    print(start, "→", found[0].text.strip())

# %% [markdown]
# But completing shows only the winner. Give it a *finished* text and ask at every token how likely it had been, and
# you see what the model knew and when. The natural scale is **surprise**, in *nats*:
#
# **Formula.** $\quad s_t = -\ln\, p(x_t \mid x_1 \dots x_{t-1})$
#
# **Toy numbers.** A token with probability 1 is no surprise: 0 nats. With probability ½ it is 0.69 nats. One of ten
# equally likely digits is 2.30. Blind guessing among the 1,024 rows of `tiny` is 6.93. The loss that pretraining
# lowers is the mean of these numbers.
#
# **Code.** The model returns *logits*, one score for each row of its table. `log_softmax` makes log-probabilities of
# them. Position $t$ predicts token $t + 1$: hence `[:-1]` on one side and `[1:]` on the other. The very first token
# has no surprise, because nothing came before it.

# %%
def surprise(model, text):
    """The tokens of a text but the first, and the surprise of each in nats."""
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)  # (1, T)
    with torch.no_grad():
        logprobs = model(ids).logits.float().log_softmax(-1)  # (1, T, V)
    picked = logprobs[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]  # (T − 1,)
    return [tokenizer.decode([i]) for i in ids[0, 1:].tolist()], -picked.cpu()

# %% [markdown]
# **Check.** Four lines by hand, one function in the library, the same numbers:

# %%
ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    logits = model(ids).logits
by_library = -token_logprobs(logits, ids)[0].cpu()
assert torch.allclose(surprise(model, TEXTS[0])[1], by_library, atol=1e-5)

# %% [markdown]
# Now two sums that differ in one digit. Where will the model be surprised? At the numbers it has to add, at the signs,
# at the result?

# %%
axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")[1]
for ax, text in zip(axes, ["47 + 38 = 85", "47 + 38 = 75"], strict=True):
    pieces, nats = surprise(model, text)
    plots.surprise_bars(pieces, (-nats).tolist(), title=text, ax=ax)
    ax.patches[-2].set(facecolor=plots.PALETTE[1], hatch="///")  # the result begins
axes[1].set_ylabel("")
views.show_figure(
    axes, alt="Surprise in nats, token by token, of a right sum and of a wrong one: "
    "the operands surprise in both, the first digit of the result in the wrong one")

# %% [markdown]
# **Read it.** The digits of the operands surprise the model, and must: nobody can know which numbers come. The `+` could
# have been another sign; the `=` could not, in the texts that this model has read. The first digit of the *result*
# (hatched) is no surprise where it is right, and a big one where it is wrong. That drop to nearly zero is what "it can
# add" looks like from the inside.

# %%
right, wrong = (surprise(model, text)[1] for text in ("47 + 38 = 85", "47 + 38 = 75"))
operands, plus, equals, result = right[[0, 3, 4]], right[1], right[5], right[-2]
assert operands.min() > 1.5 and plus > 1 and equals < 0.1 and result < 0.1
assert wrong[-2] > 10
assert torch.allclose(right[:-2], wrong[:-2], atol=1e-4)  # the same text up to there

# %% [markdown]
# ## 3 · Two new words
#
# **Idea.** Later in the course the model decides, before it treats a bug, *how*: `<|AGENT|>` means "the cause is
# unknown, I explore", `<|EDIT|>` means "the error is known, I fix it". Spelled out, such a decision is smeared over
# many tokens. As one token it has one probability, at one place, and a program can read it off without parsing text.

# %%
extended = load_tokenizer(base.path)
report = extend_tokenizer(extended, NEW_TOKENS)
for token in report.new:
    count = len(token.pieces_before)
    print(f"{token.text}: {count} pieces → one token, id {token.id}")
word = NEW_TOKENS[0]
before, after = (list(zip(t.tokenize(word), t(word).input_ids, strict=True))
                 for t in (tokenizer, extended))
views.pieces_view(word, before, after)

# %% [markdown]
# **Read it.** Above, the marker as the base model's tokenizer spells it; below, after one call. The new token is
# looked for *before* the text is cut into pieces, so it is found wherever it stands.
#
# **Check.** A new token gets the next free id, and every other text is read exactly as before:

# %%
assert len(extended) == len(tokenizer) + len(NEW_TOKENS)
assert [token.id for token in report.new] == [len(tokenizer), len(tokenizer) + 1]
assert all(extended(text).input_ids == tokenizer(text).input_ids for text in TEXTS)
assert extended.decode(extended("<|EDIT|> line 3").input_ids) == "<|EDIT|> line 3"

# %% [markdown]
# ## 4 · Two new rows
#
# **Idea.** The tokenizer is done; the model knows nothing of it yet. It keeps one *row* of numbers for each token, in
# its **embedding table**. In `tiny`, as in Qwen2.5-0.5B, the table is used twice (*tied*): at the bottom a row says
# what a token means; at the top, the dot product of a row with the model's last hidden state is that token's logit.

# %%
table = model.get_input_embeddings().weight
print(f"rows {len(table):,} · tokens {len(tokenizer):,}, now {len(extended):,}")
print(f"numbers in a row: {table.shape[1]} · tied: {model.config.tie_word_embeddings}")

# %% [markdown]
# **Read it.** There are more rows than tokens! Tables are padded to a round number (here a multiple of 128), because
# graphics cards multiply round matrices faster. So our two words need no new rows: there are rows that exist and stand
# empty. The rule for any model: *grow the table if the tokenizer has outgrown it, and never shrink it.*

# %% [markdown]
# ### What to write into a row
#
# **Idea.** The rows exist, but hold nothing useful, because no token ever used them. What the model makes of a token
# depends on where its row lies among the others. So put the new row where the rows of its old pieces lie, on average.
#
# **Formula.** $\quad E_{\text{new}} = \dfrac{1}{n}\displaystyle\sum_{i=1}^{n} E_{\text{piece}_i}$
#
# **Toy numbers.** Pieces with rows $(1, 0)$, $(3, 2)$ and once more $(3, 2)$ give $\tfrac13(7, 4) = (2.33, 1.33)$: a
# piece that occurs twice counts twice.
#
# ### Exercise 01.2 · A row from its pieces (●○○, 5 minutes)
#
# <details><summary>Hint</summary>
#
# A tensor can be indexed with a list of ids, repeats included. That gives one row for each piece; average over the
# pieces, not over the width.
# </details>

# %%
def my_mean_row(table, piece_ids):
    """The new row (D,): the mean of its pieces' rows in `table` (V, D), repeats too."""
    ...


checks.check("01.2", my_mean_row)

# %% [markdown]
# **Code.** Now by hand, in a copy of the model. `no_grad`, because nobody wants to differentiate the writing of a
# weight.

# %%
mean_row = checks.or_library("01.2", my_mean_row)
by_hand = copy.deepcopy(model)
rows = by_hand.get_input_embeddings().weight
with torch.no_grad():
    for token in report.new:
        rows[token.id] = mean_row(table.cpu(), list(token.pieces_before)).to(rows)

# %% [markdown]
# **Check.** The library's `extend_model` does the same for tied and untied models and grows the table if it must. Our
# rows are its rows:

# %%
extended_model = copy.deepcopy(model)
extend_model(extended_model, extended, report)
library_rows = extended_model.get_input_embeddings().weight
assert torch.allclose(rows, library_rows, atol=1e-6)
assert torch.equal(library_rows[: len(tokenizer)], table[: len(tokenizer)])
assert library_rows.shape == table.shape

# %% [markdown]
# ### Has the model noticed?
#
# **Idea.** Nothing else should have changed. Run the same prompt through both models and compare the logits of all the
# *old* tokens. Not approximately: bit by bit.

# %%
with torch.no_grad():
    before = model(ids).logits[0]  # (T, V)
    after = extended_model(ids).logits[0]
moved = (after != before)[:, : len(tokenizer)]
print(f"{moved.numel():,} old logits compared, {moved.sum()} differ")
assert not moved.any()

# %% [markdown]
# > **Explain.** Not one old logit has moved. And yet the *probabilities* of the old tokens are not exactly what they
# > were. Why? And had the table been *grown* by two rows, in which direction would every one of them have moved? Write
# > two sentences; ours are in the [solutions](solutions/01_tokenizer_extension.ipynb).

# %% [markdown]
# ### Why the mean is safe
#
# **Idea.** A logit is a dot product, and a dot product with a mean is the mean of the dot products. So the new token's
# logit is the mean of its pieces' logits, and its probability is their *geometric mean*:
#
# **Formula.** $\quad p_{\text{new}} = \Big(\prod_{i=1}^{n} p_{\text{piece}_i}\Big)^{1/n} \;\le\; \max_i\,
# p_{\text{piece}_i}$
#
# **Toy numbers.** Pieces with probability 0.04 and 0.01 give $\sqrt{0.0004} = 0.02$. A new token is never likelier than
# its likeliest piece, and one unlikely piece is enough to keep it unlikely. **Check**, on the model itself:

# %%
probs = after.float().softmax(-1)  # (T, V)
for token in report.new:
    pieces = probs[:, list(token.pieces_before)]  # (T, pieces)
    assert torch.allclose(probs[:, token.id].log(), pieces.log().mean(-1), atol=1e-3)
    assert (probs[:, token.id] <= pieces.max(-1).values).all()

# %% [markdown]
# ### Save, reload
#
# **Idea.** Tokenizer and model travel together or not at all. Save both, load both, and compare everything: weights,
# ids and special tokens.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_model(extended_model, extended, folder)
    again = load_model(folder, dtype=get_preset(PRESET).dtype)
    tokenizer_again = load_tokenizer(folder)
saved, loaded = extended_model.state_dict(), again.state_dict()
assert saved.keys() == loaded.keys()
assert all(torch.equal(saved[name].cpu(), loaded[name]) for name in saved)
assert tokenizer_again.get_vocab() == extended.get_vocab()
assert tokenizer_again.all_special_tokens == extended.all_special_tokens
print("every weight, every id and every special token came back as it was")

# %% [markdown]
# ## 5 · What goes wrong in practice
#
# ### Random rows
#
# **Idea.** What if the row is not a mean, but noise? We try four fillings for the two rows and ask each model, at
# every position of ordinary text, how much probability it gives to our new tokens. They never occur there, so the right
# amount is next to nothing.

# %%
def filled(write):
    """A copy of the base model with `write(rows)` applied to the new tokens' rows."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        write(changed.get_input_embeddings().weight[len(tokenizer) : len(extended)])
    return changed

def noise(std):
    """Writes normal noise of this standard deviation, the same on every machine."""
    draws = torch.Generator().manual_seed(SEED)
    return lambda rows: rows.copy_(torch.randn(rows.shape, generator=draws) * std)

LOUD = "noise, std 1 (torch's default)"
models = {"as found": model, "mean of the pieces": extended_model,
          "noise, std 0.02": filled(noise(0.02)), LOUD: filled(noise(1.0))}
for name, filling in models.items():
    nats = torch.cat([surprise(filling, text)[1] for text in TEXTS]).mean()
    print(f"{name:32} {nats:.2f} nats a token on old text")

# %%
def new_token_share(model):
    """The probability of the new tokens at each position of the first text."""
    with torch.no_grad():
        probs = model(ids).logits[0].float().softmax(-1)  # (T, V)
    return probs[:, len(tokenizer) : len(extended)].sum(-1).tolist()

shares = {name: new_token_share(filling) for name, filling in models.items()}
most = {name: max(share) for name, share in shares.items()}
assert most["as found"] < 1e-6 and most["mean of the pieces"] < 0.01
assert most["noise, std 0.02"] < 0.01 and most[LOUD] > 0.5

# %%
ax = plots.new_axes(None, 9.6, 4.2)
pieces = [plots.visible(tokenizer.decode([i])) for i in ids[0].tolist()]
for i, (name, share) in enumerate(shares.items()):
    ax.plot(share, plots.DASHES[i], marker=plots.MARKERS[i], color=plots.PALETTE[i],
            label=name)
ax.set_yscale("log")
ax.set_xticks(range(len(pieces)), pieces, family=plots.TOKEN_FONT)
ax.legend(fontsize=plots.FONT_SIZE, frameon=False, loc="upper left",
          bbox_to_anchor=(1.0, 1.0))
plots.finish(ax, "text read so far, up to and with this token",
             "probability of the new tokens",
             "Loud rows take probability before any training")
views.show_figure(
    ax, alt="Probability of the two new tokens after each token of a sum, log scale: "
    "next to nothing for mean rows, more than a half at some places for loud noise")

# %% [markdown]
# **Read it.** The scale is logarithmic. Rows of noise as loud as `torch.nn.Embedding` makes them by default take, at
# some positions, more than half of the probability there is: the model would break into a new word in the middle of a
# sum, and the surprise printed above shows the damage. Quiet noise does little harm here, but it also says nothing about
# the token. The mean is bounded in *every* model, by the inequality above. (transformers' own resizing draws new rows
# close to the mean of *all* rows, which also keeps them quiet.) And the row as found? In `tiny` it is next to
# impossible, because pretraining pushed it down at every step: it begins by meaning *never*.

# %% [markdown]
# ### Twins
#
# **Idea.** The mean has a weakness of its own. Our two words share most of their pieces, `<`, `|`, `E`, `T`, `|`, `>`,
# and so their rows start out almost alike. A mean over the words of a *description* is another way to start.

# %%
descriptions = {"<|AGENT|>": "explore", "<|EDIT|>": "fix the error"}
described = copy.deepcopy(model)
extend_model(described, extended, report, init="description", descriptions=descriptions)
for name, filled_model in {"pieces": extended_model, "descriptions": described}.items():
    table_now = filled_model.get_input_embeddings().weight.detach().float()
    agent, edit = table_now[[token.id for token in report.new]]
    print(f"{name:12} cosine {torch.cosine_similarity(agent, edit, dim=0):.2f}")

# %% [markdown]
# **Read it.** 1 would be the same direction. Training has to pull the twins apart, and with enough examples it does
# (notebook 00 shows the result). With few, descriptions give it a head start.
#
# ### The line in every tutorial
#
# `model.resize_token_embeddings(len(tokenizer))` is what most recipes tell you. On a padded table it *shrinks*:

# %%
shrunk = copy.deepcopy(model)
shrunk.resize_token_embeddings(len(extended))
print(f"rows {len(table):,} → {len(shrunk.get_input_embeddings().weight):,}")
with torch.no_grad():
    kept = shrunk(ids).logits[0]  # (T, tokens)
assert torch.allclose(kept, model(ids).logits[0, :, : len(extended)], atol=1e-4)
try:
    shrunk.load_state_dict(model.state_dict())
except RuntimeError as error:
    assert "size mismatch" in str(error)
    print("the original's weights no longer fit: size mismatch")

# %% [markdown]
# **Read it.** The logits that are left are the same. But the model no longer fits what was made for the original:
# checkpoints, adapters that hold rows, servers that expect the published shape. And the round number is gone.
#
# ### Exercise 01.3 · Resize without shrinking (●○○, 6 minutes)
#
# Write the line that those tutorials need: return a table with `num_tokens` rows, the old rows as they are and the new
# ones zero. And if the table already has that many rows or more, leave its size alone.
#
# <details><summary>Hint 1</summary>
#
# `num_tokens` is how many tokens there are *in all*. How many rows are missing? Can that number be negative?
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.cat([upper, lower])` puts one table on top of another; `table.new_zeros(n, width)` makes zero rows of the
# right kind.
# </details>

# %%
def my_resize(table, num_tokens):
    """A table of max(rows, num_tokens) rows: old ones as they are, new ones zero."""
    ...


checks.check("01.3", my_resize)

# %% [markdown]
# ### The call that replaces
#
# In transformers 5, `add_special_tokens` *replaces* the list of extra special tokens unless told otherwise. Nobody
# warns you:

# %%
careless = load_tokenizer(base.path)
print("before:", careless.all_special_tokens)
careless.add_special_tokens({"extra_special_tokens": NEW_TOKENS})
print("after: ", careless.all_special_tokens)
lost = set(tokenizer.all_special_tokens) - set(careless.all_special_tokens)
assert "<|im_end|>" in lost  # and the library keeps them:
assert set(tokenizer.all_special_tokens) <= set(extended.all_special_tokens)

# %% [markdown]
# **Read it.** The markers of a chat are off the list. Their ids remain, but code that asks the tokenizer which tokens
# are special (to stop on them, say, or to filter them) no longer finds them. The cure is one argument,
# `replace_extra_special_tokens=False`, and one assert.
#
# ## Your exercises

# %%
checks.progress("01")

# %% [markdown]
# ## At 0.5B
#
# **The same:** all of it. Qwen2.5's tokenizer has 151,665 tokens and reads `1234` as four; its table has 151,936 rows,
# a multiple of 128. `<|AGENT|>` becomes id 151,665 and `<|EDIT|>` id 151,666, inside the table, and nothing is
# resized.
#
# **Different:** with 150 times as many tokens, `AGENT` is a piece of its own, so the marker is five pieces there and
# not nine. A row has 896
# numbers, and the table is 136 of the model's 494 million weights. The 7B model's table is padded to 152,064 rows and
# is not tied: there each new token needs a row in *two* tables, and `extend_model` sets both.
#
# **Published:** the spare rows are padding, for distributed training and for the arithmetic of GPUs, say Qwen's
# authors (github.com/QwenLM/Qwen3, issues 292 and 885). The model's card counts 0.49 billion parameters, 0.36 billion
# of them not embeddings. **Our own run:** the ids above were checked with Qwen2.5's own tokenizer; the weights were
# not run by us.

# %% [markdown]
# ## Recap
#
# 1. A tokenizer is an ordered list of merges. Digits stand alone, blanks belong to the next word, nothing is unknown.
#    What the letters of a token are, the model has to learn from text.
# 2. Surprise is $-\ln p$, in nats; its mean is the training loss.
# 3. A new token needs an id *and* a row. Tables are padded: grow if you must, never shrink.
# 4. The mean of the pieces is a safe start: old logits unchanged, the newcomer's probability bounded by its pieces'.
# 5. Save tokenizer and model together, and compare after reloading.
#
# **Next.** [02 · Chat and masking](02_chat_and_masking.ipynb): the new words get a place to stand in, and the model
# learns whose turn it is. Notebook 05 comes back to our two rows and trains nothing else.
#
# **Sources.** Sennrich, Haddow and Birch 2016, *Neural machine translation of rare words with subword units*
# (arXiv:1508.07909; byte-pair encoding). Hewitt 2021, *Initializing new word embeddings for pretrained language
# models* (the mean, and what small noise can do). Qwen team 2024, *Qwen2.5 technical report* (arXiv:2412.15115). The
# documentation of transformers 5 on `add_special_tokens` and `resize_token_embeddings`.
