# %% [markdown]
# # 04 · Decoding: from probabilities to text
#
# A language model gives every token a probability, and no more. Somebody has to *choose*, token after token, and that choice
# decides whether you get a fact, a joke, a loop or a mess. Here every way of choosing is written out in a few lines: you write
# five of the harder pieces, the rest is given. Each is compared, token for token, with the library's and with transformers'.
#
# ![The loop of decoding: the text so far goes to the model, whose logits pass repetition penalty, temperature, top-k, top-p and min-p; one token is drawn, appended, and the loop goes round](figures/04_decoding.png)
#
# **Read it.** One turn of the loop makes one token. The boxes inside the frame change the distribution; each may be switched
# off, and their order matters. Greedy decoding is the same loop with an empty frame and the likeliest token instead of a drawn
# one.
#
# | | |
# |---|---|
# | **You will be able to** | decode greedily, with a cache · sample at a temperature · filter with top-k, top-p and min-p · penalise repetition and know the price · generate in batches · stop in the right place · search with beams |
# | **Time** | 45 minutes to read, 45 for the five exercises; under a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [02 · Chat and masking](02_chat_and_masking.ipynb), or knowing what `<\|im_end\|>` is for |

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
from collections import Counter
from itertools import product

import torch
from matplotlib import pyplot
from transformers import DynamicCache
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qftlab import (
    SamplingParams, beam_search, filter_logits, generate, render_prompt, uniform,
)  # fmt: skip
from qftlab_course import checks, plots, stages, views
from qftlab_course.decoding import texts_of
from qftlab_course.trace import beam_trace
from qftlab_course.widgets import DecodingLab
from qftlab_course.world.style import is_polite

# %% [markdown]
# Everything you may want to change is in this cell: the model, the number of beams, the most tokens of an answer, and the
# questions. Three are those of the [tour](00_tour.ipynb): one has one right answer, one has many, and the last has to be worked
# out.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
NUM_BEAMS, MAX_NEW = 4, 110
QUESTIONS = ["Give me a brief introduction to Shanghai Jiao Tong University.",
    "Tell me a joke about computers.", "What is 12 + 7?",
    "What is the sum of the first 100 natural numbers? Please think step by step."]

# %% [markdown]
# ## 1 · Greedy: always the likeliest
#
# **Idea.** The model reads the text so far and returns one **logit** for every token of its vocabulary. The softmax of the
# logits is the distribution of the next token. The simplest choice is the likeliest: take it, append it, ask again.
#
# **Formula.** $\quad x_{t+1} = \arg\max_v \, z_v(x_{\le t}) \qquad p_v = e^{z_v} / \sum_w e^{z_w}$
#
# **Toy numbers.** Logits $(2, 1, 0)$ give $(0.67, 0.24, 0.09)$. The exponential keeps the order, so greedy needs no softmax at all.

# %%
sft = stages.stage("sft", preset=PRESET)
model, tokenizer = sft.model, sft.tokenizer
END = tokenizer.convert_tokens_to_ids("<|im_end|>")
turn = {"max_new_tokens": MAX_NEW, "stop_token_ids": [END]}  # until the turn ends
asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
prompts = [render_prompt(tokenizer, messages) for messages in asked]

# %% [markdown]
# **Code.** In the simplest form the whole text goes through the model for every new token.

# %%
_, JOKE, SHORT, SUM = prompts


def next_logits(ids):
    """Logits (V,) of the token after `ids`."""
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits  # (1, T, V)
    return logits[0, -1].float().cpu()


def greedy(prompt, limit=MAX_NEW):
    """The likeliest token, again and again, until the turn ends."""
    new = []
    while len(new) < limit and END not in new:
        new.append(int(next_logits(prompt + new).argmax()))
    return new


def text_of(ids):
    """Ids as text, without the end of the turn."""
    return tokenizer.decode([i for i in ids if i != END])


joke = greedy(JOKE)
print(text_of(joke))

# %% [markdown]
# ### The same with a cache
#
# **Idea.** That loop reads the prompt anew for every token. But in a causal model a token's keys and values depend only on
# itself and on what stands *before* it, and that never changes. Keep them, and each turn reads one token instead of all.
#
# **Toy numbers.** A prompt of 16 tokens and 21 new ones: without a cache $16 + 17 + \dots + 36 = 546$ tokens go through the
# model; with one, $16 + 20 = 36$.
#
# We also leave open *how* a token is chosen: `choose` gets the logits and what was written so far. All of parts 1 to 4 is this loop.

# %%
def decode(prompt, choose, limit=MAX_NEW, model=model, end=END):
    """New tokens by `choose(logits, new)`; keys and values of what it read stay."""
    cache, new, unread = DynamicCache(config=model.config), [], prompt
    while len(new) < limit and end not in new:
        ids = torch.tensor([unread], device=model.device)
        with torch.no_grad():
            output = model(ids, past_key_values=cache, use_cache=True)
        new.append(int(choose(output.logits[0, -1].float().cpu(), new)))
        unread = new[-1:]
    return new


def likeliest(logits, new):
    """Greedy, as a way to choose."""
    return logits.argmax()

# %% [markdown]
# **Check.** Everything that follows is compared with two other programs: transformers, and this project's library. Four
# questions, the same tokens:

# %%
def by_transformers(prompt, **how):
    """What transformers' generate writes after `prompt`."""
    ids = torch.tensor([prompt], device=model.device)
    how = {"max_new_tokens": MAX_NEW, "eos_token_id": END,
           "pad_token_id": tokenizer.pad_token_id, **how}
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0]
    return text[len(prompt) :].tolist()


def by_library(prompt, **how):
    """What the library's generate writes after `prompt`."""
    return generate(model, tokenizer, [prompt], **turn, **how)[0].token_ids


for prompt in prompts:
    assert greedy(prompt) == decode(prompt, likeliest) == by_library(prompt)
    assert greedy(prompt) == by_transformers(prompt, do_sample=False)
print("by hand, with a cache, by the library and by transformers: the same tokens")

# %% [markdown]
# **Read it.** A cache changes the time and nothing else. If yours changes the text, it holds a wrong position or a wrong
# token. Compare with the loop *without* a cache.
#
# ## 2 · Temperature
#
# **Idea.** Greedy gives the same joke every day. **Sampling** draws the next token at random, each with its probability. The
# **temperature** $T$ says how much the model's preferences count: below 1 the likely become likelier, above 1 all become more
# alike.
#
# **Formula.** $\quad p_v(T) = \mathrm{softmax}(z / T)_v \qquad H = -\sum_v p_v \ln p_v$
#
# The **entropy** $H$, in nats, measures how open the choice is. $e^H$ is the number of equally likely tokens that would be
# just as open.
#
# **Toy numbers.** Probabilities $(½, ¼, ¼)$: $H = ½ \ln 2 + 2 \cdot ¼ \ln 4 = 1.04$ nats, and $e^{1.04} = 2.8$ tokens. At
# $T = ½$ they are squared and renormalised: $(⅔, ⅙, ⅙)$, $H = 0.87$.
#
# ### Exercise 04.1 · Entropy at a temperature (●○○, 6 minutes)
#
# Return the entropy, in nats, of the distribution that the logits (V,) give at a temperature.
#
# <details><summary>Hint 1</summary>
#
# `(logits / temperature).log_softmax(-1)` are the $\ln p_v$; their `exp()` are the $p_v$.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A token whose probability is 0 adds nothing, but `0 * -inf` is NaN. Add up only where `p > 0`.
# </details>

# %%
def my_entropy(logits, temperature):
    """Entropy in nats of softmax(logits / temperature), logits (V,); 0 ln 0 is 0."""
    ...


checks.check("04.1", my_entropy)

# %% [markdown]
# **Picture.** Three places in one joke: before its first word, after *Why did the*, and after *Because it*. How open is the
# next token, at each temperature?

# %%
entropy_at = checks.or_library("04.1", my_entropy)
openings = {"first token": "", "Why did the": "Why did the",
            "… Because it": "Why did the website go on a diet? Because it"}
places = {name: next_logits(JOKE + tokenizer(text).input_ids)
          for name, text in openings.items()}
temperatures = [i / 20 for i in range(2, 61)]
curves = {name: [float(entropy_at(logits, t)) for t in temperatures]
          for name, logits in places.items()}
sure, subject = curves["first token"], curves["Why did the"]
assert sure[18] < 0.1 and math.exp(subject[18]) > 12 and sure[38] > 1  # T = 1, 1, 2

ax = plots.new_axes(None, 9.6, 4.2)
for i, (name, values) in enumerate(curves.items()):
    ax.plot(temperatures, values, plots.DASHES[i],
            color=plots.PALETTE[i], linewidth=2.5, label=name)
ax.axhline(math.log(len(tokenizer)), color="black", linewidth=1, label="all alike")
ax.legend(fontsize=plots.FONT_SIZE, frameon=False, loc="upper left",
          bbox_to_anchor=(1.0, 1.0))
plots.finish(ax, "temperature", "entropy (nats)", "How open the next token is")
views.show_figure(
    ax, alt="Entropy against temperature at three places of a joke: the first token is "
    "near zero up to 1, the subject is open even when it is cool, all rise in the heat")

# %% [markdown]
# **Read it.** The thin line is the ceiling, all tokens equally likely. There is no *one* randomness of a text: at $T = 1$ the
# first token is as good as fixed, while the subject of the joke is open, with more than a dozen tokens in play. Up to about 1,
# temperature chooses among tokens that the model finds good. At 2 even the places that were certain are open, and that is where
# texts fall apart.
#
# ### Drawing by hand
#
# **Idea.** To draw from a distribution, lay the probabilities end to end on a line of length 1, throw a dart $u$ at it, and
# take the token it hits. The library's darts come from a hash of (seed, row, step), so a row's text does not depend on who else
# is in the batch. transformers throws with `torch.multinomial` and the global generator. **Check** both; then see two jokes at
# each of three temperatures:

# %%
def dart(logits, new):
    """The token that the library's dart hits, at temperature 1."""
    mass = logits[: len(tokenizer)].double().softmax(-1).cumsum(-1)
    u = uniform(SEED, torch.tensor([0]), len(new))  # seed, row 0, step
    return torch.searchsorted(mass, u * mass[-1], right=True)


def multinomial(logits, new):
    """As transformers draws at temperature 1.5."""
    return torch.multinomial((logits / 1.5).softmax(-1), 1)


assert decode(JOKE, dart) == by_library(JOKE, params=SamplingParams(), seed=SEED)
torch.manual_seed(SEED)
by_hand = decode(JOKE, multinomial)
torch.manual_seed(SEED)
assert by_hand == by_transformers(JOKE, do_sample=True, temperature=1.5, top_k=0)
for heat in [0.5, 1.0, 2.0]:
    for seed in [2, 6]:
        drawn = by_library(JOKE, params=SamplingParams(temperature=heat), seed=seed)
        print(f"T = {heat}: {text_of(drawn)[:72]!r}")

# %% [markdown]
# **Two ways on.** A third of the short answers that this model was trained on end with a wish, "Have a nice day!"; the others do
# not. So after `19` there are two good ways on: stop, or wish. Greedy takes the likelier one, every time, and you would never
# hear of the other. Samples show both, in the proportion that the temperature gives them.
#
# **Toy numbers.** Probabilities $(⅔, ⅓)$ at $T = ½$, squared and renormalised: $(0.8, 0.2)$.

# %%
for heat, expected in [(1.0, 1 / 3), (0.5, 1 / 5)]:
    how = {"params": SamplingParams(temperature=heat), "seed": SEED, **turn}
    drawn = generate(model, tokenizer, [SHORT], num_generations=400, **how)
    wishes = sum(is_polite(row.text) for row in drawn) / len(drawn)
    print(f"T = {heat}: {wishes:.1f} of 400 samples wish, {expected:.2f} expected")
    assert abs(wishes - expected) < 0.1 and not is_polite(text_of(greedy(SHORT)))

# %% [markdown]
# **Read it.** One greedy answer tells you what is likeliest, not how likely it is. (Notebook 07 makes the wish the rule.)
#
# ## 3 · Filters: cutting the tail
#
# **Idea.** A thousand tokens of which each has a probability of 0.0001 have a tenth together. One draw in ten then lands on
# something that the model finds absurd, and the text has to go on from there. Filters cut that tail. They differ in what they
# call a tail:
#
# | filter | keeps | good at | weak spot |
# |---|---|---|---|
# | **top-k** | the $k$ likeliest tokens | simple, cheap | $k$ is the same where one token is right and where a hundred are |
# | **top-p** | the smallest set of likeliest tokens with mass $p$ | follows the model's certainty | at a high temperature the set becomes huge |
# | **min-p** | tokens at least $m$ times as likely as the likeliest | still cuts when it is hot | knows only the likeliest, not how many are near it |
#
# **Toy numbers.** Probabilities $(0.5, 0.2, 0.15, 0.1, 0.05)$. Top-k with $k = 2$ keeps two. Top-p with $p = 0.8$ keeps three:
# two have 0.7, which is not enough, and *the token that crosses 0.8 is kept*. Min-p with $m = 0.15$ keeps those of at least
# $0.075$: four.
#
# What is cut gets the logit $-\infty$, that is the probability 0, and softmax spreads its share over the rest. Top-k and min-p
# are a line or two each, and stand below; top-p is yours.
#
# ### Exercise 04.2 · The top-p filter (●●○, 10 minutes)
#
# Return the logits (V,) with $-\infty$ outside the smallest set of likeliest tokens whose mass reaches $p$. The others stay as
# they are, *in their places*.
#
# <details><summary>Hint 1</summary>
#
# `probs.sort(descending=True)` returns two tensors: the sorted values, and where each of them came from.
# </details>
#
# <details><summary>Hint 2</summary>
#
# A token is kept if the mass *before* it is below $p$: `sorted.cumsum(-1) - sorted < p`. The likeliest has nothing before it, so
# it is always kept.
# </details>
#
# <details><summary>Hint 3</summary>
#
# Start with a tensor full of `-math.inf`, and copy the logits at `order[kept]` into it.
# </details>

# %%
def my_top_p(logits, p):
    """Logits (V,), -inf outside the smallest set of likeliest tokens of mass p."""
    ...


checks.check("04.2", my_top_p)

# %% [markdown]
# **Check.** Three filters, each by hand, by the library and by transformers. The same tokens survive, at all three places of
# the joke.

# %%
keep_top_p = checks.or_library("04.2", my_top_p)


def keep_top_k(logits, k):
    """Logits (V,), -inf outside the k likeliest (ties with the last are kept)."""
    return logits.masked_fill(logits < logits.topk(k).values[-1], -math.inf)


def keep_min_p(logits, m):
    """Logits (V,), -inf for tokens less than m times as likely as the likeliest."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < m * probs.max(), -math.inf)


rules = {"top-k": lambda logits: keep_top_k(logits, 5),
         "top-p": lambda logits: keep_top_p(logits, 0.8),
         "min-p": lambda logits: keep_min_p(logits, 0.1)}
others = {"top-k": (SamplingParams(top_k=5), TopKLogitsWarper(5)),
          "top-p": (SamplingParams(top_p=0.8), TopPLogitsWarper(0.8)),
          "min-p": (SamplingParams(min_p=0.1), MinPLogitsWarper(0.1))}
for name, (params, warper) in others.items():
    for logits in places.values():
        kept = rules[name](logits).isfinite()
        assert torch.equal(kept, filter_logits(logits[None], params)[0].isfinite())
        assert torch.equal(kept, warper(None, logits[None])[0].isfinite())

# %% [markdown]
# **Picture.** Who keeps what, at two of them: after *Because it*, and after *Why did the*.

# %%
columns = {name: places[name] for name in ("… Because it", "Why did the")}
figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for ax, (name, logits) in zip(panels, columns.items(), strict=True):
    probs, order = logits.softmax(-1).topk(12)
    ax.barh(range(12), 100 * probs, color=plots.PALETTE[5], edgecolor="black")
    for row, token in enumerate(order.tolist()):
        kept = " ".join(key for key in rules if rules[key](logits)[token].isfinite())
        ax.annotate(kept, (100 * probs[row], row), (6, 0), textcoords="offset points",
                    va="center", fontsize=plots.FONT_SIZE)
    words = [plots.visible(tokenizer.decode([token])) for token in order]
    ax.set_yticks(range(12), words, family=plots.TOKEN_FONT, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlim(0, 190 * float(probs[0]))
    plots.finish(ax, "probability (%)", "", f"after {name}")
views.show_figure(
    figure, alt="The twelve likeliest tokens at two places, and the filters that keep "
    "each: where three are likely, top-k keeps five; where a dozen are, also five")

# %% [markdown]
# **Read it.** Left, three tokens are likely; top-k 5 keeps two more that are nearly impossible. Right, a dozen are about equally
# likely, and top-k throws most of them away. Top-p and min-p adapt: few on the left, many on the right. Now heat both places up
# to $T = 2$ and count what is left:

# %%
for name, logits in columns.items():
    for heat in [1.0, 2.0]:
        kept = {key: int(rules[key](logits / heat).isfinite().sum()) for key in rules}
        print(f"{name:12} T = {heat}: {kept}")
        assert kept["top-k"] == 5 and (heat < 2 or kept["top-p"] > 5 * kept["min-p"])

# %% [markdown]
# **Read it.** Hot, top-p keeps a crowd: the tail has become so heavy that it takes a hundred tokens and more to reach 80 % of
# the mass. Min-p compares with the likeliest token, which heating lowers too, and stays strict. That is why min-p was proposed.
#
# **The order matters.** Temperature comes *before* the filters, in transformers and here: the filters see the heated distribution.
#
# ## 4 · Repetition
#
# **Idea.** A text that stands there once is likelier to come again, because models learn to copy. (Write one joke three times:
# for the base model its surprise falls from 24 nats to 13 to 7.) Greedy decoding, left to run, therefore tends to end in a loop.
# A *base* model that nobody stops at the end of a document shows it:

# %%
base = stages.stage("base", preset=PRESET)
start = base.tokenizer("Why did the computer").input_ids
looped = decode(start, likeliest, limit=100, model=base.model, end=None)
print(base.tokenizer.decode(looped))
# %% [markdown]
# **Formula.** The **repetition penalty** $\theta > 1$ (Keskar et al. 2019) lowers the logit of every token that already stands in the text,
# prompt included:
#
# $$ z_v \leftarrow \begin{cases} z_v / \theta & z_v > 0 \\ z_v \cdot \theta & z_v \le 0 \end{cases} \qquad \text{for } v \text{ seen before} $$
#
# **Toy numbers.** $\theta = 2$, logits $(3, -1, 2)$, the first two seen: $(1.5, -2, 2)$. The third token wins now. Both cases
# push *down*; dividing a negative logit would push it up.
#
# ### Exercise 04.3 · The repetition penalty (●○○, 6 minutes)
#
# Return new logits (V,). `seen` is a list of ids, in which an id may stand more than once; it is punished once.
#
# <details><summary>Hint 1</summary>
#
# `logits[seen]` picks several at once, and `out[seen] = ...` puts several back. Begin with `out = logits.clone()`.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.where(picked > 0, picked / penalty, picked * penalty)` has both cases.
# </details>

# %%
def my_penalty(logits, seen, penalty):
    """Logits (V,) with `seen` ids punished: z / penalty if z > 0, else z * penalty."""
    ...


checks.check("04.3", my_penalty)

# %%
penalise = checks.or_library("04.3", my_penalty)


def penalised(prompt, penalty, **how):
    """Greedy with a repetition penalty; the prompt counts as seen."""
    def choose(logits, new):
        return penalise(logits, prompt + new, penalty).argmax()
    return decode(prompt, choose, **how)


def repeats(ids):
    """The share of 4-grams that have stood there before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams)


freed = penalised(start, 1.3, limit=100, model=base.model, end=None)
print(f"repeated 4-grams: {repeats(looped):.0%}, with a penalty {repeats(freed):.0%}")
assert repeats(looped) > 0.5 > 2 * repeats(freed)

# %% [markdown]
# So the loop is broken. What does it cost? Ask the fine-tuned model for the sum again, with the penalty turned up step by step.
#
# > **Predict, then run.** In `100 * 100 = 10000` the digits *have* to repeat. What will a penalty of 1.3 do to the calculation,
# > and what one of 1.5?

# %%
for penalty in [1.0, 1.3, 1.5]:
    found = penalised(SUM, penalty)
    how = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    assert found == by_library(SUM, params=how)
    assert found == by_transformers(SUM, do_sample=False, repetition_penalty=penalty)
    print(f"{penalty}: {text_of(found)}\n")

# %% [markdown]
# **Read it.** Without a penalty the model multiplies right (and then adds wrong). With 1.3 it no longer divides by 2, because a 2
# stands there already. With 1.5 even $100 \cdot 100$ is not 10000: the model *knows* the digit and is not allowed to write it
# again. (`<|im_end|>` is punished too, because it closed the user's turn.) Qwen2.5's chat models ship with a
# penalty of 1.05 or 1.1. Turn it off for numbers, code, and anything else that has to repeat itself.

# %% [markdown]
# ## 5 · Where to stop
#
# **Idea.** A text ends in one of three ways: at a **stop token**, such as `<|im_end|>`; at a **stop string**, such as
# `"\nUser:"`; or when it is cut off. Stop tokens are easy: one comparison. Stop strings are not, because tokens do not end where
# strings do.
#
# Take the base model, which continues a list of questions, and let it write *one* more: it should stop at `"\nAnswer:"`.

# %%
text = "Question: What is 47 + 38?\nAnswer: 85\n\nQuestion:"
listing, stop = base.tokenizer([text, "\nAnswer:"]).input_ids
written = decode(listing, likeliest, limit=24, model=base.model, end=None)
pieces, ends = ([base.tokenizer.decode([i]) for i in ids] for ids in (written, stop))
print(pieces, "the stop string, as tokens:", ends, sep="\n")
assert "\nAnswer:" in "".join(pieces) and str(stop)[1:-1] not in str(written)

# %% [markdown]
# **Read it.** The newline is one token with the full stop before it, so the three tokens of the stop string never stand there in
# a row, and no single token contains it. Whoever compares *ids* never finds it. Compare text: append piece after piece, and
# search the whole.
#
# ### Exercise 04.4 · Stop strings across token borders (●●○, 8 minutes)
#
# Read `pieces` one after the other, and stop as soon as the text contains one of the strings in `stops`. Return the text before it,
# and how many pieces were read. `my_until_stop(["Hi", "\nU", "ser: x", "y"], ["\nUser:"])` is `("Hi", 3)`. Without a stop: everything.
#
# <details><summary>Hint 1</summary>
#
# `text.find(stop)` is the place, or −1.
# </details>
#
# <details><summary>Hint 2</summary>
#
# One piece may complete two stop strings. The one that comes first *in the text* counts: take the `min` of the places.
# </details>

# %%
def my_until_stop(pieces, stops):
    """The text before the first stop string, and how many pieces were read for it."""
    ...


checks.check("04.4", my_until_stop)

# %%
until_stop = checks.or_library("04.4", my_until_stop)
question, count = until_stop(pieces, ["\nAnswer:"])
theirs = generate(base.model, base.tokenizer, [listing], max_new_tokens=24,
                  stop="\nAnswer:", stop_token_ids=[])[0]
assert theirs.text == question and len(theirs.token_ids) == count
assert theirs.finish_reason == "stop"
ids = torch.tensor([listing], device=base.model.device)
output = base.model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
    eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    stop_strings=["\nAnswer:"], tokenizer=base.tokenizer)
assert output[0, len(listing) :].tolist() == written[:count]
print(f"{count} tokens read, and the text is {question!r}")

# %% [markdown]
# **Read it.** All three stop at the same token. The library cuts the text for you; transformers leaves the stop string in.
# (Whoever *streams* the text has to hold back an ending such as `"\nAns"` until it is clear that no stop string comes of it. The
# library's `stream` does.)
#
# ## 6 · Many prompts at once
#
# **Idea.** One step for sixteen prompts in one tensor costs much less than sixteen steps for one. Prompts differ in length, so
# short ones are **padded**, with a mask that says which positions are real. In training we padded on the right (notebook 02), and
# all was well. So we do the same here: pad on the right, pass the mask, read the logits of the last column, append.
#
# > **Predict, then run.** Four questions, of different lengths, in one batch. Which rows will come out right, and what will the others say?

# %%
asked = ["What is 12 + 7?", "What is 63 - 25?", "What is the capital of Iceland?",
         "Find the largest number: 30 61 49 8 77"]
batch = [render_prompt(tokenizer, [{"role": "user", "content": q}]) for q in asked]
alone = [by_library(prompt) for prompt in batch]
together = generate(model, tokenizer, batch, **turn)  # the library's own batch
assert [row.token_ids for row in together] == alone


def in_batch(prompts, side, positions_by_mask=False, read_last_real=False, limit=32):
    """Greedy, in one tensor padded on `side`: new tokens, to the end of each turn."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = 0 if side == "right" else width - len(prompt)
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    column = torch.full((len(ids),), -1)
    if read_last_real:
        column = mask.cumsum(1).argmax(1)
    for _ in range(limit):
        inputs = {"input_ids": ids, "attention_mask": mask}
        if positions_by_mask:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**{k: x.to(model.device) for k, x in inputs.items()}).logits
        token = logits.cpu()[torch.arange(len(ids)), column].argmax(-1)  # (B,)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], 1)
        column = torch.full_like(column, -1)
    new = ids[:, width:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in new]

# %%
right, left = in_batch(batch, "right"), in_batch(batch, "left")
assert left == alone and [a == b for a, b in zip(right, alone)] == [False] * 3 + [True]
found = {"alone": alone, "padded right": right, "padded left": left}
views.side_by_side({q: {name: text_of(rows[i]) for name, rows in found.items()}
                    for i, q in enumerate(asked)})

# %% [markdown]
# **Read it.** Padded on the right, one row survives: the longest, which has no padding. The others are wrong, and nothing shows
# it: no error, and a wrong number or capital looks like a right one. Padded on the left, every row is what it is alone.
# (transformers prints a warning when the last column holds a pad.)
#
# ### Why: two things at once
#
# `question, answer` has become `question, padding, answer`. Two things are wrong, and each can be put right:
#
# - **Where we read.** The last column of a short row is padding, so its logits say what follows a pad. Read at the last *real*
#   token.
# - **Where we write.** The mask hides the padding but leaves its gap: the first new token of a row stands as many steps too far
#   from its question as there are pads. **Position ids** that count only real tokens close the gap.

# %%
read, write = {"read_last_real": True}, {"positions_by_mask": True}
for side, how in product(["right", "left"], [{}, read, write, read | write]):
    rows = in_batch(batch, side, **how)
    count = sum(row == full for row, full in zip(rows, alone, strict=True))
    print(f"{side:5} {count} of {len(batch)} rows as alone · {', '.join(how)}")
    assert count == len(batch) or (side == "right" and how != read | write)

# %% [markdown]
# **Read it.** With both repairs, right padding is as good as left. Reading at the right place alone is not
# enough, because the gap stays. Closing the gap alone gives the right rows here, but by luck: the first token is still read off a
# pad, and what this model expects after a pad happens to be what it expects after the prompt. Left padding needs neither: the last
# column is real in every row, and there is no gap. It works even *without* position ids here, though every short row is shifted:
# Qwen's rotary positions only see **distances**, and a shift changes none. A model with learned, absolute positions (GPT-2) sees
# the shift. So always pass them: `(mask.cumsum(1) - 1).clamp(min=0)`.
#
# (The library's own batch, above, pads on neither side: its cache lets every row begin at column 0 and keeps each row's own
# length.)
#
# ## 7 · Beam search
#
# **Idea.** Greedy is short-sighted: the likeliest next token may lead to a text that is less likely as a whole. **Beam search**
# keeps the $K$ likeliest texts so far, the *beams*. At each step it looks at all continuations of all of them, and keeps the $K$
# best again.
#
# **Formula.** The score of a text is its log-probability, $s(x) = \sum_t \ln p(x_t \mid x_{<t})$. Every token makes it smaller,
# so short texts have an advantage; finished texts are therefore compared by $s(x) / |x|^{\alpha}$, where $\alpha$ is the *length
# penalty*, by default 1.
#
# **Toy numbers.** First token *A* 0.6 or *B* 0.4; after *A*, two tokens at 0.5 each; after *B*, one at 0.9. Greedy takes *A* and
# ends at $0.6 \cdot 0.5 = 0.30$. Two beams keep *B* in play and find $0.4 \cdot 0.9 = 0.36$.
#
# **Ends.** A beam that ends leaves the race, and another has to take its place. So the best $2K$ continuations are looked at: at
# most $K$ of them can end (each beam has one end), and so at least $K$ run on. An end counts only if it is among the best $K$.
#
# ### Exercise 04.5 · One step of beam search (●●●, 15 minutes)
#
# `scores` (K,) are the beams' log-probabilities, `logprobs` (K, V) those of every next token. Return two lists of triples
# `(parent, token, score)`, best first: `running`, the K best of the top 2K that do not end, and `finished`, the ends among the
# top K.
#
# <details><summary>Hint 1</summary>
#
# `(scores[:, None] + logprobs).flatten().topk(2 * K)` ranks all continuations at once.
# </details>
#
# <details><summary>Hint 2</summary>
#
# In a flattened (K, V) tensor, place `i` is row `i // V` and column `i % V`; `divmod(i, V)` gives both.
# </details>

# %%
def my_beam_step(scores, logprobs, eos_id):
    """One step: (running, finished), lists of (parent, token, score), best first."""
    ...


checks.check("04.5", my_beam_step)

# %% [markdown]
# **Code.** The search around that step: keep texts and scores, collect what has finished, and stop once the best running beam is
# no better than the worst of $K$ finished ones. (At the first step all beams are the same empty text, so all but one get a score
# that cannot win.)

# %%
beam_step = checks.or_library("04.5", my_beam_step)


def beams_by_hand(prompt, beams, length_penalty=1.0):
    """Finished texts as (score, tokens), best first; nothing is cached."""
    texts, finished = [[]] * beams, []
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1))
    for length in range(1, MAX_NEW + 1):
        ids = torch.tensor([prompt + text for text in texts], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[:, -1].float().cpu()  # (K, V)
        running, ended = beam_step(scores, logits.log_softmax(-1), END)
        finished += [(float(s) / length**length_penalty, texts[parent] + [int(token)])
                     for parent, token, s in ended]
        finished = sorted(finished, reverse=True)[:beams]
        texts = [texts[parent] + [int(token)] for parent, token, _ in running]
        scores = torch.tensor([float(s) for _, _, s in running])
        best = float(scores[0]) / length**length_penalty
        if len(finished) == beams and best <= finished[-1][0]:
            break
    return finished

# %% [markdown]
# **Check.** Token for token, by hand, by the library and by transformers: two questions, two numbers of beams, two length
# penalties.

# %%
for prompt, beams, penalty in product([JOKE, SHORT], [2, NUM_BEAMS], [0.0, 1.0]):
    how = {"num_beams": beams, "length_penalty": penalty}
    library = beam_search(model, tokenizer, [prompt], **turn, **how)[0]
    assert library.token_ids == beams_by_hand(prompt, beams, penalty)[0][1]
    assert library.token_ids == by_transformers(prompt, do_sample=False, **how)
    print(f"{beams} beams, penalty {penalty:.0f}: {library.text}")

# %% [markdown]
# **Read it.** Four beams find another joke than greedy's; two do not. With a length penalty of 0 the plain sum decides, and a
# shorter joke wins: not because it is better, but because it has fewer tokens to pay for. And the short sum ends with the wish
# when $\alpha = 1$, although the bare answer is likelier.
#
# **Picture.** Two beams, and the question of part 2 again. We hand the model its own `19` and watch:

# %%
opening, steps = SHORT + tokenizer("19").input_ids, []
beam_search(model, tokenizer, [opening], num_beams=2, on_step=steps.append, **turn)
start, said = opening[len(SHORT) :], texts_of(tokenizer)
trace = beam_trace(steps, start, said, num_beams=2, is_over=True)
views.decoding_tree(trace)

# %% [markdown]
# **Read it.** Each line is one step, with the running sum of log-probabilities in each box. At the first step one beam ends, and
# that is what greedy does: `19`, and stop. The other beam has to pay for beginning the wish. But once begun, every token of the
# wish is nearly certain and costs next to nothing. At the end its sum is still the lower one, but there are more tokens to divide
# it by, and so it wins. With $\alpha = 0$, as printed above, the sum decides, and the plain answer wins. So the length penalty
# made the choice, not the model: a sum favours short texts, a mean favours a long tail of certain tokens.
#
# ## 8 · Four questions, three strategies
#
# **Idea.** Now the comparison that counts: the same model and the same prompts; greedy, one sample at $T = 1$, and four beams.
# Above the table, the mean log-probability of a token of each answer, in this order: it is what the beams compare.

# %%
plain = {"params": SamplingParams(), "seed": SEED, **turn}
likely = generate(model, tokenizer, prompts, return_logprobs=True, **turn)
drawn = generate(model, tokenizer, prompts, return_logprobs=True, **plain)
searched = beam_search(model, tokenizer, prompts, num_beams=NUM_BEAMS, **turn)
answers = {"greedy": likely, "sampled": drawn, "beams": searched}
for i, name in enumerate(["university", "joke", "short", "sum"]):
    means = [sum(rows[i].logprobs) / len(rows[i].logprobs) for rows in (likely, drawn)]
    means.append(searched[i].score)
    print(f"{name:10}", " ".join(f"{mean:6.2f}" for mean in means))
    assert searched[i].score > means[0] - 1e-4
views.side_by_side({q: {name: rows[i].text for name, rows in answers.items()}
                    for i, q in enumerate(QUESTIONS)})

# %% [markdown]
# **Read it.** What is actually there to see:
#
# - **The university.** Three times the same text, letter by letter: the mean is nearly 0, so there is hardly another way on. Where
#   a model is sure, the strategy does not matter.
# - **The joke.** Three different ones. The beams' is the likeliest of them, and that does not make it the funniest.
# - **The short sum.** Greedy stops after the number. The beams add the wish, because its certain tokens lift the mean.
# - **The long sum.** Greedy and beams agree, and both are **wrong**: $10000 + 100$ is not 10200. The sample is wrong in its own
#   way. More search cannot help: it finds more of what the model believes, and the model believes in that 2.
#
# One answer each is an anecdote. So let us ask more often: eight jokes, sampled and by eight beams; and 512 sampled sums.

# %%
eight = generate(model, tokenizer, [JOKE], num_generations=8, **plain)
how = {"num_beams": 8, "num_return_sequences": 8}
beams = beam_search(model, tokenizer, [JOKE], **how, **turn)
ideas = {}
for name, rows in {"sampled": eight, "beams": beams}.items():
    ideas[name] = {" ".join(row.text.split("?")[0].split()[4:]) for row in rows}
    texts = [row.text for row in rows]
    print(f"{name}, different ideas: {len(ideas[name])}", *texts, sep="\n    ")
assert len(ideas["beams"]) < len(ideas["sampled"])

many = {"num_generations": 512, "batch_size": 256, **plain}
tries = generate(model, tokenizer, [SUM], **many)
ends = Counter(row.text.split("The answer is")[-1].strip(" .") for row in tries)
print("the most frequent of 512 answers:", ends.most_common(1)[0][0])
print("5050 is among them:", ends["5050"] > 0, "· in one of ten:", ends["5050"] > 51)
assert ends.most_common(1)[0][0] != "5050" and 0 < ends["5050"] < 51

# %% [markdown]
# **Read it.** The eight beams are one joke, *go on a diet*, with other subjects and reasons. Eight samples have five ideas. And the
# sum: sampling *does* find 5050 now and then. A vote among the samples would not help, because the most frequent answer is a wrong
# one. Somebody who can **check** an answer would: draw many, keep the right one. That is best-of-n, and the beginning of
# reinforcement learning (notebook 08).
#
# > **Explain.** The beams' answer to the sum is several times likelier than the right one, and wrong. Is that a failure of the
# > search or of the model? And which of these would help: more beams, a higher temperature, a checker, more training? Two
# > sentences. (The solutions measure it.)

# %% [markdown]
# ## 9 · The lab
#
# **Idea.** Everything of this notebook, to try out. Choose a preset or move a slider and watch the outlined bars (before the
# filters) turn into solid ones (after). *Step* draws a token, *Run* goes on to the end, *Undo* takes one back. Press a token's
# button, or focus it with Tab and press space, to **force** it: make the model say *robot* after *Why did the*, and see what it
# makes of it. Press a word of the text to go back there. The *Beam* tab grows a tree.
#
# The cell below takes five steps, shows the next token as a picture and a table, and then the lab itself. Where there is no
# kernel (GitHub, a printed page), the lab is only a table and a tree.

# %%
lab = DecodingLab(model, tokenizer, QUESTIONS[1], preset="top-k", chat=True, seed=SEED)
for _ in range(5):
    lab.state.step()
lab.refresh()
display(lab.view().picture(), lab.view())
lab

# %% [markdown]
# **Read it.** Each row is one token: outlined what the model gave it, solid what is left after the filters, hatched and named
# where a filter cut it. Top-k 5 has cut subjects that are nearly as likely as those it kept, and shared out their probability
# among the five.

# %% [markdown]
# ## 10 · What goes wrong in practice
#
# **Settings you did not choose.** transformers' `generate` fills what you leave open from the model's `generation_config.json`,
# and from its own defaults. Sampling cuts at **top-k 50** unless you say `top_k=0`. And a repetition penalty in that file stays
# on even when you ask for greedy decoding:

# %%
ids = torch.tensor([JOKE], device=model.device)
how = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True}
scores = model.generate(ids, max_new_tokens=1, pad_token_id=END, **how).scores[0]
print("tokens left by default:", int(scores.isfinite().sum()))
model.generation_config.repetition_penalty = 1.5  # as if it had come with the model
print("greedy is greedy:", by_transformers(SUM, do_sample=False) == greedy(SUM))
model.generation_config.repetition_penalty = None

# %% [markdown]
# **One generator for all rows.** With a global seed, a row's text depends on who else is in the batch: add a prompt, and every
# draw after it shifts. The library's darts depend on (seed, row, step) only, so the batch can be cut as one likes.
#
# **Tokens that do not exist.** `tiny` has 1,024 rows in its head and 1,002 tokens; Qwen2.5 has 151,936 and 151,665. The rows past
# the tokenizer are never the right answer in training, but they have logits, and a hot enough draw hits one. Cut them, as the
# first line of `dart` does.
#
# **Temperature 0.** Dividing by it gives infinities. It means greedy, here and in most servers; transformers wants
# `do_sample=False` instead.
#
# **Greedy is not always reproducible.** In bf16 two logits are easily equal to the last bit, and matrix products round
# differently for other batch sizes. The text may then change with the *number of rows*, on the same weights. Compare runs in
# fp32, or at one batch size.
#
# ## Your exercises

# %%
checks.progress("04")

# %% [markdown]
# ## At 0.5B
#
# **The same:** every loop, every filter, and every assert that two programs agree. What differs are the asserts about `tiny`'s
# own answers: its jokes, its wrong sum, its wishes.
#
# **Different:** the *vocabulary*, 151,936 logits a step: sorting them all for top-p is a noticeable part of a step, so fast
# samplers look at the likeliest few hundred first. The *cache*, 12,288 bytes a token in bf16 for Qwen2.5-0.5B: four beams of
# 1,000 tokens are 49 MB. And its *Instruct* checkpoint ships its own settings: temperature 0.7, top-p 0.8, top-k 20 and a
# repetition penalty of 1.1. Remember part 4 before you ask it for long numbers or code.
#
# **Published:** Qwen3's model cards recommend temperature 0.6, top-p 0.95, top-k 20 and min-p 0 in thinking mode, and warn
# against greedy decoding because of endless repetitions. In translation, Stahlberg and Byrne (2019) searched exactly: for more
# than half of the sentences the likeliest output of all was the *empty* one. **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. The model gives a distribution; decoding chooses. One loop, one cache, and a function that picks a token.
#    Greedy shows the likeliest way on and hides the others; samples show them in proportion.
# 2. Temperature moves the entropy, place by place. Filters cut the tail: top-k by count, top-p by mass, min-p by comparison.
# 3. A repetition penalty also punishes what has to repeat: digits, code, and the end of the turn.
# 4. In a batch, pad on the left and pass positions. Padded on the right, most rows answer another question, without an error.
# 5. Beam search finds likelier texts, and the length penalty decides among them. Likelier is neither truer nor more varied.
#
# **Next.** Side rooms: *05 · LoRA* and *06 · Teacher data*. Or straight on to *07 · DPO*, which teaches the model to prefer one answer to another.
#
# **Sources.** Holtzman et al. 2020, *The curious case of neural text degeneration* (arXiv:1904.09751), top-p and loops. Fan et al. 2018, *Hierarchical neural story generation*
# (arXiv:1805.04833), top-k. Nguyen et al. 2024, *Turning up the heat: min-p sampling* (arXiv:2407.01082). Keskar et al. 2019, *CTRL* (arXiv:1909.05858), the
# repetition penalty. Wu et al. 2016, *Google's neural machine translation system* (arXiv:1609.08144), beams and length. Stahlberg and Byrne 2019, *On NMT search errors and
# model errors* (arXiv:1908.10090). transformers issue 26569 and pull request 19067, on padding. Qwen team 2025, the model cards of Qwen3.
