# %% [markdown]
# # 01 · Tokens: teach a model two new words
#
# A language model never sees a letter. It sees numbers, one for each *token*, and everything it knows hangs on them.
# In this notebook you look at text the way the model does, listen to what surprises it, and then add two words to its
# language without disturbing a single one it already knows.
#
# ![The number 1234 is four tokens; the marker AGENT is nine tokens before and one token after](figures/01_one_token.png)
#
# **Read it.** One box is one token. A number is read digit by digit. A marker such as `<|AGENT|>` costs nine tokens as
# long as the tokenizer of `tiny` has to spell it, and one as soon as it is a word of its own.
#
# | | |
# |---|---|
# | **You will be able to** | run byte-pair encoding by hand · read a model's surprise, token by token · add tokens to a tokenizer and rows to a model · prove that nothing else has changed |
# | **Time** | 30 minutes to read, 20 for the three exercises; a few seconds to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [00 · The tour](00_tour.ipynb), or the idea of a matrix and of a logarithm |

# %% tags=["setup"]
import sys

if "google.colab" in sys.modules:  # on Colab only: fetch the library, leave torch and transformers as they are
    REPO = "OWNER/qftlab"
    get_ipython().run_line_magic("pip", f"install -q --no-deps git+https://github.com/{REPO}")
    get_ipython().run_line_magic("pip", "install -q jsonargparse")

# %%
import copy
import json
import tempfile

import torch
from matplotlib import pyplot

from qftlab.core import plots
from qftlab.core.logprobs import token_logprobs
from qftlab.generate.engine import generate
from qftlab.model.loading import get_preset, load_model, save_model
from qftlab.model.vocabulary import extend_model
from qftlab.teach import checks, stages, views
from qftlab.text.tokenizer import extend_tokenizer, load_tokenizer

# %% [markdown]
# Everything you may want to change is in this cell. `PRESET` names the model: `tiny`, which is in this repository, or
# `qwen2.5-0.5b`, the real one, if you have its weights and a GPU.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
NEW_TOKENS = ["<|AGENT|>", "<|EDIT|>"]
TEXTS = ["47 + 38 = 85", "63 - 25 = 38", "reverse 4 17 9 : 9 17 4", "The capital of France is Paris."]

# %% [markdown]
# ## 1 · What the model sees
#
# **Idea.** Between you and the model stands a *tokenizer*. It cuts text into pieces that it knows and replaces each by
# a number, its *id*. The model's first layer is a table with one row for each id, and looks the rows up. That is all
# the model ever learns about spelling: two pieces with different ids are as foreign to it as two different words.

# %%
base = stages.stage("base", preset=PRESET)
model, tokenizer = base.model, base.tokenizer
print(f"{type(tokenizer).__name__} with {len(tokenizer):,} tokens, {tokenizer.vocab_size:,} of them learned from text")

# %% [markdown]
# > **Predict, then run.** How many tokens are `1234`, `12 34`, `capital` with and without a blank before it,
# > `Zürich`, and `<|AGENT|>`? Write six numbers down, then run the next cell.

# %%
for text in ["1234", "12 34", "capital", " capital", "Zürich", "<|AGENT|>"]:
    ids = tokenizer(text).input_ids
    print(f"{len(ids)}  {text!r:12} {' '.join(f'[{piece}]' for piece in tokenizer.convert_ids_to_tokens(ids))}")

# %% [markdown]
# **Read it.** Three rules are at work:
#
# - **Every digit stands alone.** Qwen's tokenizer cuts numbers before anything else gets a say, so `1234` is four
#   tokens. That is good for arithmetic: the model sees columns, as you did at school.
# - **A blank belongs to the word after it**, and is written `Ġ`. With and without it, a word is a different token. (Digits
#   take no blank along; there it stands alone.)
# - **Nothing is unknown.** What was never merged falls apart into bytes: `ü` is two of them, shown as `Ã¼`. So even
#   `<|AGENT|>` can be written; it only takes many pieces.

# %%
views.token_view(tokenizer, tokenizer(TEXTS[0]).input_ids, title="A sum, as the model sees it")

# %% [markdown]
# **Read it.** Each box is a token with its id below. Digits keep their order: the id of `7` is the id of `4` plus
# three. The model has no way to know this; it found out what digits are worth from sums.
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
    """One BPE merge: every occurrence of `pair`, left to right and without overlap, becomes one piece."""
    ...


checks.check("01.1", my_merge)

# %% [markdown]
# With the step, the whole algorithm is a loop over the tokenizer's own list. Here it is, spelling one word; each line
# is a merge that found something to do. (Your `my_merge` does the work if it passed, the library's otherwise.)

# %%
merge = checks.or_library("01.1", my_merge)
merges = [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
pieces = list("Ġcapital")
for rank, pair in enumerate(merges):
    merged = merge(pieces, pair)
    if merged != pieces:
        print(f"merge {rank:>3}  {pair[0]:>6} + {pair[1]:<5} → {' '.join(merged)}")
    pieces = merged

# %% [markdown]
# **Check.** If that really is all, it must give the same pieces as the tokenizer, for any word:

# %%
for word in ["capital", "reverse", "sorted", "University", "return", "tokenizer", "banana"]:
    pieces = list(word)
    for pair in merges:
        pieces = merge(pieces, pair)
    assert pieces == tokenizer.tokenize(word)
    print(word, "→", " ".join(pieces))

# %% [markdown]
# **Read it.** Words that the model has read often are one token; the others are built from syllables nobody designed.
# The whole "understanding" of a tokenizer is a frequency count.

# %% [markdown]
# ## 2 · What the model expects
#
# **Idea.** A base model does one thing: after each token it gives every token in its vocabulary a probability to be
# the next. Take the likeliest again and again, and it *completes*:

# %%
for start in ["47 + 38 =", "reverse 4 17 9 :", "The capital of France is"]:
    print(start, "→", generate(model, tokenizer, [start], max_new_tokens=7, stop="\n")[0].text.strip())

# %% [markdown]
# But completing shows only the winner. Give it a *finished* text and ask at every token how likely it had been, and
# you see what the model knew and when. The natural scale is **surprise**, in *nats*:
#
# **Formula.** $\quad s_t = -\ln\, p(x_t \mid x_1 \dots x_{t-1})$
#
# **Toy numbers.** A token with probability 1 is no surprise: 0 nats. With probability ½ it is 0.69 nats. One of ten
# equally likely digits is 2.30. Blind guessing among the 1,024 rows of `tiny` is 6.93. The training loss of a language
# model is nothing but the mean of these numbers.
#
# **Code.** The model returns *logits*, one score for each row of its table. `log_softmax` makes log-probabilities of
# them. Position $t$ predicts token $t + 1$: hence `[:-1]` on one side and `[1:]` on the other. The very first token
# has no surprise, for nothing came before it.

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
    ax.patches[-2].set(facecolor=plots.PALETTE[1], hatch="///")  # the first digit of the result
axes[1].set_ylabel("")
views.show_figure(axes, alt="Surprise in nats, token by token, of a right sum and of a wrong one: the operands surprise "
                  "in both, the first digit of the result (hatched) only in the wrong sum")

# %% [markdown]
# **Read it.** The operands surprise the model, and must: nobody can know which numbers come. The `+` could have been
# another sign; the `=` could not. The first digit of the *result* (hatched) is no surprise where it is right, and a
# big one where it is wrong. That drop to nearly zero is what "it can add" looks like from the inside.

# %%
right, wrong = surprise(model, "47 + 38 = 85")[1], surprise(model, "47 + 38 = 75")[1]
assert right[-2] < 1 < wrong[-2] and right[-2] < right[0]
assert torch.allclose(right[:-2], wrong[:-2], atol=1e-4)  # up to the result, both texts are the same text

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
    print(f"{token.text}: {len(token.pieces_before)} pieces → one token, id {token.id}")
word = NEW_TOKENS[0]
before, after = [list(zip(t.tokenize(word), t(word).input_ids, strict=True)) for t in (tokenizer, extended)]
views.pieces_view(word, before, after)

# %% [markdown]
# **Read it.** Above, the marker as the base model's tokenizer spells it; below, after one call. The new token is
# matched *before* any merging, so it is found wherever it stands, and no merge can tear it apart.
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
print(f"rows {table.shape[0]:,} · tokens before {len(tokenizer):,} · tokens now {len(extended):,}")
print(f"numbers in a row: {table.shape[1]:,} · tied: {model.config.tie_word_embeddings}")

# %% [markdown]
# **Read it.** There are more rows than tokens! Tables are padded to a round number (here a multiple of 128), because
# graphics cards multiply round matrices faster. So our two words need no new rows; they move into rooms that are built
# and empty. The rule for any model: *grow the table if the tokenizer has outgrown it, and never, ever shrink it.*

# %% [markdown]
# ### What to write into a row
#
# **Idea.** The rows exist, but hold nothing useful: no token ever used them. Meaning, for a table, is *position*, so
# put the new word where its old spelling was, on average.
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
    """The new embedding row (D,): the mean of the rows of `table` (V, D) that its old pieces had, repeats counted."""
    ...


checks.check("01.2", my_mean_row)

# %% [markdown]
# **Code.** Now by hand, in a copy of the model. `no_grad`, because writing into a weight is not a thing to
# differentiate.

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
# **Idea.** Good surgery leaves no trace elsewhere. Run the same prompt through both models and compare the logits of
# all the *old* tokens. Not approximately: bit by bit.

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
# **Toy numbers.** Pieces with probability 0.04 and 0.01 give $\sqrt{0.0004} = 0.02$. A newcomer is never likelier than
# its likeliest piece, so before any training it stays quietly in the background. **Check**, on the real model:

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
    again, tokenizer_again = load_model(folder, dtype=get_preset(PRESET).dtype), load_tokenizer(folder)
weights = zip(extended_model.state_dict().values(), again.state_dict().values(), strict=True)
assert all(torch.equal(saved.cpu(), loaded) for saved, loaded in weights)
assert tokenizer_again.get_vocab() == extended.get_vocab()
assert tokenizer_again.all_special_tokens == extended.all_special_tokens
print("every weight, every id and every special token came back as it was")

# %% [markdown]
# ## 5 · What goes wrong in practice
#
# ### Random rows
#
# **Idea.** What if the row is not a mean, but noise? We try four fillings for the two rows and ask each model, at
# every position of ordinary text, how much probability it gives to our new tokens. The right amount, in text where
# they never occur, is next to nothing.

# %%
def filled(write):
    """A copy of the base model with `write(rows)` applied to the rows of the new tokens."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        write(changed.get_input_embeddings().weight[len(tokenizer) : len(extended)])
    return changed

def noise(std):
    """Writes normal noise of this standard deviation, the same on every machine."""
    return lambda rows: rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(SEED)) * std)

# %%
models = {"as found": model, "mean of the pieces": extended_model,
          "noise, std 0.02": filled(noise(0.02)), "noise, std 1 (torch's default)": filled(noise(1.0))}
for name, filling in models.items():
    nats = torch.cat([surprise(filling, text)[1] for text in TEXTS]).mean()
    print(f"{name:32} {nats:.2f} nats a token on old text")

# %%
def new_token_share(model):
    """The probability of the new tokens at each position of the first text."""
    with torch.no_grad():
        probs = model(ids).logits[0].float().softmax(-1)  # (T, V)
    return probs[:, len(tokenizer) : len(extended)].sum(-1).clamp(min=1e-12).tolist()

shares = {name: new_token_share(filling) for name, filling in models.items()}
stolen = {name: max(share) for name, share in shares.items()}
assert stolen["mean of the pieces"] < 0.01
assert stolen["noise, std 1 (torch's default)"] > 10 * stolen["mean of the pieces"]

# %%
ax = plots.new_axes(None, 8.4, 4.2)
pieces = [plots.visible(tokenizer.decode([i])) for i in ids[0].tolist()]
for i, (name, share) in enumerate(shares.items()):
    ax.plot(range(len(share)), share, plots.DASHES[i], marker=plots.MARKERS[i], color=plots.PALETTE[i], label=name)
ax.set_yscale("log")
ax.set_xticks(range(len(pieces)), pieces, family=plots.TOKEN_FONT, fontsize=plots.FONT_SIZE)
ax.tick_params(axis="y", labelsize=plots.FONT_SIZE)
ax.set_xlabel("text read so far, up to and with this token", fontsize=plots.FONT_SIZE)
ax.set_ylabel("probability of the new tokens", fontsize=plots.FONT_SIZE)
ax.set_title("Loud rows steal probability before any training", fontsize=plots.FONT_SIZE + 1, loc="left")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(fontsize=plots.FONT_SIZE, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
views.show_figure(ax, alt="Probability of the two new tokens after each token of a sum, on a logarithmic scale: "
                  "next to nothing for mean rows, near one at some positions for noise of standard deviation 1")

# %% [markdown]
# **Read it.** The scale is logarithmic (and ends at $10^{-12}$). Rows of noise as loud as `torch.nn.Embedding` makes
# them by default can take, at some positions, most of the probability there is: the model would break into a new word
# in the middle of a sum, and the surprise printed above shows the damage. Quiet noise does little harm here, but it
# also says nothing; how much it steals differs from model to model. The mean is bounded in *every* model, by the
# inequality above; transformers' own resizing now draws new rows close to the mean of *all* rows, for the same reason.
# And the row as found? In `tiny` it is silent, for pretraining pushed it down at every step: it begins by meaning
# *never*.

# %% [markdown]
# ### Twins
#
# **Idea.** The mean has a weakness of its own. Our two words share most of their spelling, `<|` … `|>`, and so their
# rows start out almost alike.

# %%
agent, edit = library_rows[[token.id for token in report.new]].detach().float()
likeness = torch.cosine_similarity(agent, edit, dim=0)
print(f"cosine of the two rows: {likeness:.2f}")
assert likeness > 0.5

# %% [markdown]
# **Read it.** 1 would be the same direction. Training has to pull the twins apart; with enough examples it does
# (notebook 00 shows the result). If you have few, let each row start from a *description*: `extend_model(...,
# init="description", descriptions={"<|EDIT|>": "fix the error", ...})` takes the mean over those words instead.
#
# ### The line in every tutorial
#
# `model.resize_token_embeddings(len(tokenizer))` is what most recipes tell you. On a padded table it *shrinks*:

# %%
shrunk = copy.deepcopy(model)
shrunk.resize_token_embeddings(len(extended))
print(f"rows {table.shape[0]:,} → {shrunk.get_input_embeddings().weight.shape[0]:,}")
try:
    shrunk.load_state_dict(model.state_dict())
except RuntimeError as error:
    print(str(error).split(":")[0] + ":", "size mismatch" if "size mismatch" in str(error) else error)

# %% [markdown]
# **Read it.** The model itself still talks. But it no longer fits anything made for the original: checkpoints,
# adapters, servers that expect the published shape. And the round number that made it fast is gone.
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
    """A table of max(rows, num_tokens) rows: the old rows unchanged, new ones zero; never fewer rows than before."""
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
assert "<|im_end|>" in lost
assert set(tokenizer.all_special_tokens) <= set(extended.all_special_tokens)  # the library keeps them

# %% [markdown]
# **Read it.** The markers of a chat are off the list: their ids remain, but code that asks the tokenizer which tokens
# are special, to stop on them, filter them or protect them, no longer hears of them. The cure is one argument,
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
# not nine. Four of the five are shared with `<|EDIT|>`, so expect the twins to be no less alike. A row has 896
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
