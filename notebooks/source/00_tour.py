# %% [markdown]
# # 00 · The tour: teach a small Qwen to answer
#
# A language model that can only *continue text* becomes, step by step, one that *answers you*, then one that answers as
# you prefer, then one that has practised. It is small enough to be trained on the machine you are sitting at.
#
# ![Five rates on held-out questions over five stages, base, SFT, more SFT, DPO and RLOO: instructions and the choice of AGENT or EDIT rise with SFT, politeness with DPO, Countdown with more SFT and RLOO; old skills fall](figures/00_stages.png)
#
# **Read it.** Each line is a rate on questions that were never trained on, stage by stage from left to right. The base
# model *has* its skills (the line that starts high), and yet it answers nothing. Each stage lifts what it is aimed at. The
# line that falls is the price.
#
# | | |
# |---|---|
# | **You will be able to** | add tokens to a tokenizer and a model · say which tokens a chat model is trained on · fine-tune, and prove with numbers that it helped and what it cost · tell SFT, DPO and RLOO apart by what they learn from |
# | **Time** | 20 minutes to read, a minute or two to compute; five minutes more if you train every stage yourself |
# | **Hardware** | two CPU cores. No GPU, no network |
# | **Before this** | nothing: some Python, and the idea of a gradient |

# %% [markdown]
# ## How to use this notebook
#
# Run the cells from top to bottom with <kbd>Shift</kbd>+<kbd>Enter</kbd>. Nothing here can break: `make lab` gave you
# your own copy. Every claim in the text is either printed by a cell or checked by an `assert`; if the notebook runs to
# the end, the claims hold on your machine too.

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

from qftlab import (
    SamplingParams, bundled, generate, leave_one_out_advantages, load_rows, render_chat,
    row_to_messages,
)  # fmt: skip
from qftlab_course import plots, stages, tour, views
from qftlab_course.measure import compare, evaluate_kept, evaluate_rows

# %% [markdown]
# One cell holds everything you may want to change. `PRESET` names the model and its recipe: `tiny` is the model in this
# repository; `qwen2.5-0.5b` runs the same notebook on the real one, given a GPU and its weights.
#
# With `SEED = 0` the model of each stage is *loaded*: the lab ships them, so that you see here what is printed in the
# book, on any machine. Write another number, and every stage is *trained* here, in front of you, with that seed. That is
# what `make tour` does as well.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
QUESTIONS = [
    "Give me a brief introduction to Shanghai Jiao Tong University.",
    "Tell me a joke about computers.",
    "What is the sum of the first 100 natural numbers? Please think step by step.",
]

# %% [markdown]
# ## 1 · A model that continues
#
# **Idea.** A *base* model has read a lot and learned one thing: which token tends to come next. `tiny` is a real Qwen2,
# the same architecture as Qwen2.5, with 1.3 million parameters instead of half a billion. It was pretrained for an
# hour on one CPU core, on text this project generates: calculations, lists, words, short Python programs and their
# tracebacks, some facts, and jokes. Its [card](../data/tiny/README.md) says exactly on what.

# %%
base = stages.stage("base", preset=PRESET)
parameters = sum(p.numel() for p in base.model.parameters())
print(
    f"{type(base.model).__name__}: {parameters:,} parameters, "
    f"{len(base.tokenizer):,} tokens"
)

# %% [markdown]
# Give it the *beginning* of something it has read, and it goes on:

# %%
for start in [
    "47 + 38 =",
    "reverse 4 17 9 :",
    "The capital of France is",
    "Shanghai Jiao Tong University:",
]:
    text = generate(base.model, base.tokenizer, [start], max_new_tokens=48)[0].text
    print(start, "→", text.strip())

# %% [markdown]
# So it can calculate, and it knows things. Now ask it a question, the way you would ask a chat model.
#
# > **Predict, then run.** What will the base model do with *“What is 47 + 38?”* in a chat? Will it answer, answer and
# > then go on, or do something else altogether? Say it aloud before you run the next cell.

# %%
question = [{"role": "user", "content": "What is 47 + 38?"}]
[answer] = generate(
    base.model, base.tokenizer, [question], max_new_tokens=40, stop_token_ids=[]
)
print(answer.text)

# %% [markdown]
# It *continues*, because that is all it has learned: more text, more questions, answers to questions nobody asked. Now
# and then the right number is among them. The skill is there, the behaviour is not: it has never seen the markers of a
# chat and does not know whose turn it is. That is what fine-tuning is for. First, though, it needs two new words.

# %% [markdown]
# ## 2 · Two new tokens
#
# **Idea.** We want the model to say, before anything else, *how* it is going to treat a bug: `<|EDIT|>` if the error is
# known and it will fix it, `<|AGENT|>` if the cause is unknown and it has to explore. Spelled out, such a marker is many
# tokens; as a token of its own it is one decision, in one place, that code can read.

# %%
extended = stages.stage("extended", preset=PRESET, seed=SEED)
for text in ["<|AGENT|>", "<|EDIT|>"]:
    before = base.tokenizer.tokenize(text)
    token_id = extended.tokenizer.convert_tokens_to_ids(text)
    print(f"{text}: {len(before)} pieces {before} → one token, id {token_id}")

# %% [markdown]
# **Formula.** A new token needs a row in the embedding matrix. A random row would be noise in a place where the model
# expects meaning; the mean of the rows of its old pieces is a sensible first guess:
#
# $$ E_{\text{new}} = \frac{1}{n}\sum_{i=1}^{n} E_{\text{piece}_i} $$

# %%
rows_before = base.model.get_input_embeddings().weight
rows_after = extended.model.get_input_embeddings().weight
pieces = base.tokenizer("<|AGENT|>", add_special_tokens=False).input_ids
new_id = extended.tokenizer.convert_tokens_to_ids("<|AGENT|>")

# %% [markdown]
# **Check.** Our mean is the library's row, but for the rounding to bf16 in which the models are stored; no other row has
# moved; and the matrix kept its size, because, like the real
# Qwen, `tiny` has more rows (1,024) than tokens (1,000). Shrinking it to the tokenizer's length would be a classic bug.

# %%
mean = rows_before[pieces].mean(0)
assert torch.allclose(rows_after[new_id], mean, rtol=2**-8)  # bf16 keeps 8 bits
assert torch.equal(rows_after[:new_id], rows_before[:new_id])
assert rows_after.shape == rows_before.shape
print("rows:", tuple(rows_after.shape), "· tokens:", len(extended.tokenizer))

# %% [markdown]
# ## 3 · What is learned, token by token
#
# **Idea.** A chat is one long string with markers. We train on *some* of its tokens: on what the assistant says and on
# the `<|im_end|>` that ends it. Not on the question: the model should answer questions, not imitate people who ask them.

# %%
files = ["instructions/train", "countdown/demonstrations", "bugfix/train"]
train_rows = load_rows([bundled(f"{file}.jsonl") for file in files])
example = next(row for row in train_rows if row["skill"] == "add")
rendered = render_chat(extended.tokenizer, row_to_messages(example))[0]
views.mask_view(extended.tokenizer, rendered)

# %% [markdown]
# **Read it.** Every token of one training row, in order. `T` marks what is trained; each of these is *predicted from
# the tokens before it*. The last one, `<|im_end|>`, is the one people forget: without it the model never learns to stop.

# %% [markdown]
# **Formula.** With $m_t = 1$ where the next token is trained and $0$ elsewhere, the loss is the mean surprise, in nats:
#
# $$ \mathcal{L} = -\frac{\sum_t m_t \log p_\theta(x_{t+1} \mid x_{\le t})}{\sum_t m_t} $$
#
# **Toy numbers.** Two trained tokens, to which the model gave probability ½ and ¼: the loss is
# $(\ln 2 + \ln 4)/2 = 1.04$ nats. By hand, and by the library:

# %%
from qftlab import masked_cross_entropy

logits = torch.log(
    torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]])
)
labels = torch.tensor(
    [[-100, 0, 1]]
)  # −100 means "not trained"; position t is predicted from position t − 1
by_hand = (math.log(2) + math.log(4)) / 2
assert abs(masked_cross_entropy(logits, labels).item() - by_hand) < 1e-6
print(
    f"{by_hand:.2f} nats by hand, "
    f"{masked_cross_entropy(logits, labels):.2f} by the library"
)

# %% [markdown]
# ## 4 · Supervised fine-tuning
#
# **Idea.** Show the model questions with good answers, and lower the loss above by gradient descent. The data is bundled:
# instructions of thirteen kinds, 2,000 Countdown puzzles, and buggy programs.

# %%
for skill in ["sort", "countdown", "bugfix"]:
    row = next(row for row in train_rows if row["skill"] == skill)
    print(f"[{skill}]\n{row['instruction']}\n→ {row['output']}\n")

# %% [markdown]
# The training takes about a minute of one core. Its record, the loss of every step, is kept beside the model.

# %%
sft = stages.stage("sft", preset=PRESET, seed=SEED)
print(f"{len(train_rows):,} rows, {len(sft.losses)} optimizer steps")
assert sum(sft.losses[-10:]) / 10 < 0.25 * sft.losses[0]
ax = plots.loss_curve(range(1, len(sft.losses) + 1), sft.losses)
views.show_figure(ax, alt="Training loss over steps: a steep fall, then a slow one")

# %% [markdown]
# **Read it.** The steep fall at the left is the *format*: when to answer, and when to stop. The slow fall after it is
# the *content*. Fine-tuning a model that already has the skills is mostly the first.

# %% [markdown]
# ## 5 · Did it help?
#
# **Idea.** One good answer proves nothing. We ask both models the same 300 held-out questions, none of which occurs in
# the training data, and count. Nor was any setting of the lab chosen by looking at them: learning rates and the rest were
# picked on another set, `development.jsonl`, and this one was drawn afterwards and read once. A score on questions that
# helped to choose the settings is too good, even if no weight ever saw them; notebook 03 shows how much.
#
# Then the count. In a chat an answer counts if it is right *and* the turn is ended, so that a program can use
# it. To be fair to the base model it is asked once more, as plain text with three solved examples in front (*3-shot*),
# and there whatever looks right counts.

# %%
held_out = load_rows(bundled("instructions", "heldout.jsonl"))
exact = [row for row in held_out if row["skill"] not in ("joke", "university")]
base_chat = evaluate_rows(base.model, base.tokenizer, exact, max_new_tokens=24)
base_shots = evaluate_rows(base.model, base.tokenizer, exact, few_shot=3)
after = evaluate_rows(sft.model, sft.tokenizer, exact)
rates = {
    "base, chat": base_chat.in_format,
    "base, chat, leniently": base_chat.instructions,
    "base, 3-shot, leniently": base_shots.instructions,
    "after SFT, chat": after.in_format,
}
for name, rate in rates.items():
    low, high = rate.interval
    print(
        f"{name:24} {rate.accuracy:4.0%} right, 95 % interval {low:.0%} to {high:.0%}"
    )

# %% [markdown]
# **Read it.** The third line is the honest one. Most of what fine-tuning "taught" was in the base model already, and
# could be had with examples in the prompt. What fine-tuning added is that you get it by *asking*. The intervals are
# Wilson's: with a few hundred questions, two models a few points apart are not known to differ.

# %%
verdict = compare(base_chat, after)
print(f"{verdict.gained} gained, {verdict.lost} lost, p = {verdict.p_value:.0e}")
assert base_chat.in_format.accuracy < 0.05 and base_chat.format.accuracy < 0.05
assert after.in_format.accuracy > 0.75 and after.format.accuracy > 0.95

# %%
columns = {"base, 3-shot": base_shots, "after SFT": after}
ax = plots.accuracy_bars(
    after.skills,
    {
        name: [result.skill(s).accuracy for s in after.skills]
        for name, result in columns.items()
    },
    intervals={
        name: [result.skill(s).interval for s in after.skills]
        for name, result in columns.items()
    },
)
views.show_figure(
    ax,
    alt="Accuracy by skill: base model with three examples, and after fine-tuning",
)

# %% [markdown]
# **Read it.** Skill by skill. Where both bars are high, the base had the skill, and fine-tuning kept it.

# %% [markdown]
# ## 6 · The three questions
#
# None of these was trained on: the university was held out of the fine-tuning data, and the sum of the first 100
# numbers was held out of pretraining as well.

# %%
chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
before = generate(base.model, base.tokenizer, chats, max_new_tokens=40)
answers = generate(sft.model, sft.tokenizer, chats, max_new_tokens=110)
said = zip(QUESTIONS, before, answers, strict=True)
views.side_by_side({q: {"base": b.text, "after SFT": a.text} for q, b, a in said})

# %% [markdown]
# **Read it.** The year is right if it says 1896: pretraining stored it. The sum is *worked out*, square, add, halve, for
# an $n$ the model has never seen. The way is right; check the digits one by one. The right sum is 5050.
#
# Is that forgetting? Let us ask before we say so. Here is the base in the notation it grew up with, and then both models on
# all sums that were held out:

# %%
own_notation = generate(
    base.model, base.tokenizer, ["sum 1 to 100 :"], max_new_tokens=110
)
print("base, in its own notation:", own_notation[0].text.strip())
tuning = load_rows(bundled("instructions", "development.jsonl"))
sums = [row for row in tuning if row["skill"] == "sum_to_n"]
plain_sums = [(row["plain"], row["output"].split()[-1]) for row in sums]
worked = generate(
    base.model,
    base.tokenizer,
    [p for p, _ in plain_sums],
    max_new_tokens=110,
    stop=["\n"],
)
right = sum(
    w.text.strip().endswith(total)
    for w, (_, total) in zip(worked, plain_sums, strict=True)
)
print(
    f"base: {right} of {len(sums)} held-out sums right, "
    f"after SFT: {evaluate_rows(sft.model, sft.tokenizer, sums).instructions.correct}"
)

# %% [markdown]
# **Read it.** The base gets this one sum right, and no more than that: the case that looked like knowledge is one lucky
# success among eleven. One example would have told us a story of forgetting that the count does not bear out. Part 8 shows
# forgetting where it is.
#
# A joke, being a joke, has no right answer. Ask for several, with a little randomness, and they vary:

# %%
lively = SamplingParams(temperature=1.0)
jokes = generate(
    sft.model, sft.tokenizer, [chats[1]] * 4, max_new_tokens=60, params=lively, seed=0
)
print("\n".join(c.text for c in jokes))

# %% [markdown]
# **What goes wrong in practice.** Ask about a college that does not exist:

# %%
invented = [
    [{"role": "user", "content": "Give me a brief introduction to Baltor College."}]
]
print(generate(sft.model, sft.tokenizer, invented, max_new_tokens=60)[0].text)

# %% [markdown]
# It answers in the same confident voice. Nothing in its training ever rewarded *"I do not know"*: a fluent, wrong year
# costs no more than a fluent, right one. This is a hallucination, and a model of 8 billion parameters has them for the
# same reason.

# %% [markdown]
# ## 7 · Explore or edit?
#
# **Idea.** Given a buggy program and what happened, the first token of the answer is a decision. A traceback alone does
# not settle it: a failed *test* has one too, and says nothing about the cause.

# %%
bugs = load_rows(bundled("bugfix", "heldout.jsonl"))
for kind in ["crash", "failed test"]:
    row = next(r for r in bugs if r["kind"] == kind)
    chat = row_to_messages(row)[:-1]
    answer = generate(sft.model, sft.tokenizer, [chat], max_new_tokens=40)[0]
    print(row["instruction"], "\n⇒", answer.text, "\n")

# %%
modes = evaluate_rows(sft.model, sft.tokenizer, bugs)
rules = {
    "a traceback means EDIT": lambda text: "Traceback" in text,
    "main.py or a line's number means EDIT": lambda text: (
        "main.py" in text or bool(re.search(r"^Line \d", text, re.MULTILINE))
    ),
}
for name, says_edit in rules.items():
    hits = sum(says_edit(row["instruction"]) == (row["mode"] == "EDIT") for row in bugs)
    print(f"the rule '{name}': {hits / len(bugs):.0%}")
print(
    f"the model: {modes.mode.accuracy:.0%} · "
    f"its whole answer right: {modes.fix.accuracy:.0%}"
)
assert modes.mode.accuracy > 0.95

# %% [markdown]
# **Read it.** The model chooses rightly nearly always, on programs it has never seen, where the obvious key word does no
# better than a coin. But look at the second rule: two patterns, found by reading a few programs, do as well as the
# model. That is what a *baseline* is for. Without it, 100 % sounds like understanding; beside it, we know that this
# question was easy, and that only the *whole answer* (the right line, and how it should read) is something a rule
# does not give us.

# %% [markdown]
# ## 8 · What did it cost?
#
# **Idea.** Fine-tuning moves all the weights, and nothing in its loss protects what the model could do before. So we
# measure that too: plain calculations in the notation of pretraining, with no chat around them.

# %%
old = [row for row in exact if row["skill"] in ("add", "subtract", "reverse", "sort")]
for name, s in [("base", base), ("after SFT", sft)]:
    kept = evaluate_kept(s.model, s.tokenizer, old).accuracy
    print(f"{name:10} {kept:.0%} of {len(old)} plain calculations right")

# %% [markdown]
# **Read it.** If the second number is far below the first, the model has *forgotten*. How much depends on the learning
# rate, on how long you train, and on how many weights you allow to move; notebook 05 measures it for LoRA.
#
# > **Explain.** The fine-tuning data holds hundreds of additions, all of them in chats. Why can the score on
# > `47 + 38 =`, outside any chat, fall all the same? Write down two reasons before you read notebook 05.

# %% [markdown]
# ## 9 · Prefer: DPO
#
# **Idea.** SFT shows good answers; it never says that one answer is *better* than another. A third of the short answers in
# the SFT data end with "Have a nice day!", so the model sometimes says it. Suppose you like that. You show it pairs: the
# same right answer with the courtesy (*chosen*) and without it (*rejected*). Before that, the model gets a second
# helping of Countdown puzzles (make 35 from 3, 7 and 14, each used once), which part 10 will need: *more SFT*.

# %%
from qftlab_course.world.style import style_pairs

warm = stages.stage("warm", preset=PRESET, seed=SEED)
dpo = stages.stage("dpo", preset=PRESET, seed=SEED)
for pair in style_pairs(2):
    print(pair["prompt"], "\n  chosen:  ", pair["chosen"])
    print("  rejected:", pair["rejected"])

# %% [markdown]
# **Formula.** Let $g$ be how much more likely an answer has become than it was before this stage, in nats. DPO widens
# the gap between the chosen answer's $g^+$ and the rejected one's $g^-$:
#
# $$ \mathcal{L}_{\text{DPO}} = -\log \sigma\big(\beta\,(g^+ - g^-)\big) $$
#
# **Toy numbers.** The chosen answer has gained 1 nat, the rejected one has lost 1, and $\beta = 0.5$: the loss is
# $-\log\sigma(1) = 0.31$. Before the first step both gains are 0, and the loss is $\log 2 = 0.69$.

# %%
from qftlab import dpo_loss

nats = torch.tensor(
    [[-2.0, -5.0], [-3.0, -4.0]]
)  # log-probabilities: now, before; chosen, rejected
loss = dpo_loss(*nats[0].view(2, 1), *nats[1].view(2, 1), beta=0.5)
start = dpo_loss(*nats[1].view(2, 1), *nats[1].view(2, 1), beta=0.5)
assert (
    abs(loss.item() - math.log(1 + math.exp(-1))) < 1e-6
    and abs(start.item() - math.log(2)) < 1e-6
)
print(
    f"{loss.item():.2f} nats by the library, {start.item():.2f} before the first step"
)

# %% [markdown]
# **Check.** Ask again, at temperature 1, 300 questions that were in no pair, and count the courtesies:

# %%
from qftlab_course.world.style import is_polite

asked = [[{"role": "user", "content": row["instruction"]}] for row in exact]
polite = {}
for name, s in [("before DPO", warm), ("after DPO", dpo)]:
    said = generate(
        s.model, s.tokenizer, asked, max_new_tokens=40, params=lively, seed=1
    )
    polite[name] = sum(is_polite(c.text) for c in said) / len(said)
    print(f"{name}: {polite[name]:.0%} of the answers end politely")
assert polite["after DPO"] - polite["before DPO"] > 0.3

# %% [markdown]
# **Read it.** A habit that the model had now and then is now its rule. Only the last of its four layers was trained:
# a style is decided late, and what is frozen cannot be forgotten. Scores take the courtesy off before they
# judge an answer, because being polite is neither right nor wrong. Note what the pairs were about: *style*, an easy
# preference. Notebook 07 tries *correctness*, a hard one, and the model is wrecked before it is saved.

# %% [markdown]
# ## 10 · Practise: RLOO
#
# **Idea.** Pairs were written down once. Reinforcement learning samples anew at every step and asks only for a *number*.
# The task is Countdown now, where a program can tell: 1 for a right answer, 0.1 for a wrong one in the right form, 0
# otherwise. Sixty-four fresh puzzles a step, eight answers
# to each; every answer is compared with the mean of the other seven.
#
# **Formula.** With $n$ answers to one prompt, *leave one out*:
#
# $$ A_i = R_i - \frac{1}{n-1} \sum_{j \ne i} R_j $$
#
# and the log-probability of answer $i$ is pushed up in proportion to $A_i$, or down where it is negative.
#
# **Toy numbers.** Four answers, one of them right: the right one gets $1 - 0 = 1$, each other $0 - \frac13$.
# If all answers earn the same, every advantage is 0 and the puzzle teaches nothing: a model cannot practise what it never
# gets right, nor what it never gets wrong.

# %%
advantages = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
assert torch.allclose(advantages, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))

# %%
rloo = stages.stage("rloo", preset=PRESET, seed=SEED)
views.show_figure(
    tour.reward_picture(rloo), alt="Mean reward over optimizer steps: it rises"
)

# %% [markdown]
# **Read it.** The mean reward of 512 fresh answers, step by step. No answer was ever shown to the model in this stage;
# it was only told, of its own attempts, which ones counted.

# %% [markdown]
# ## 11 · The whole way
#
# All stages, the same held-out questions. *Sampled* means one answer at temperature 1: that is what a policy does, and
# it shows how sure the model is of what it knows. *Greedy* takes the likeliest token every time.

# %%
chain = {"base": base, "sft": sft, "warm": warm, "dpo": dpo, "rloo": rloo}
scores = tour.measure(chain)
alt = "Rates by stage: SFT lifts instructions and mode, DPO politeness, RLOO Countdown"
views.show_figure(tour.stages_picture(scores), alt=alt)
scores.table().drop(columns="base, 3-shot*").map(lambda rate: f"{rate:.0%}")

# %% [markdown]
# **Read it.** SFT lifts everything that has a form to learn. *More SFT* buys Countdown and pays with old skills. DPO
# changes the style and leaves Countdown where it was. RLOO lifts Countdown without a single new demonstration. But nothing
# else is practised there: old skills keep declining, and some of the politeness goes as well.
#
# > **Explain.** Compare the two Countdown lines in the last column with those before RLOO: sampled accuracy has risen more
# > than greedy accuracy. What does that say about what practice changed: what the model *can* do, or how *reliably* it
# > does it? Notebook 08 measures it with pass@k.

# %%
change, courtesy = (
    scores.countdown_change("dpo", "rloo"),
    scores.polite_change("warm", "dpo"),
)
print(f"RLOO: more puzzles gained than lost, p < 0.001: {change.p_value < 0.001}")
print(
    f"DPO: more answers became polite than ceased to be, "
    f"p < 0.001: {courtesy.p_value < 0.001}"
)
assert change.gained > change.lost and courtesy.gained > courtesy.lost
assert all(verdict.passed for verdict in scores.verdicts)

# %% [markdown]
# One puzzle through all of it, greedily answered: the first of the held-out ones that RLOO solves and SFT did not.

# %% tags=["nbval-ignore-output"]
solved = tour.puzzle(chain)
views.side_by_side({solved.index[0]: dict(solved.iloc[0])})

# %% [markdown]
# ## At 0.5B
#
# **The same:** the template, the mask, the loss, the loop, the two tokens. On Qwen2.5-0.5B, `<|AGENT|>` becomes id
# 151,665, still inside its 151,936 embedding rows, so nothing is resized there either.
#
# **Different:** its base model has seen chats, so its score in the chat format does not start near zero; and a useful
# learning rate is about fifty times smaller (1e-5 instead of 5e-4).
#
# **Published:** 0.49 billion parameters, of which 0.36 billion are not embeddings (the model's card on the Hugging Face
# hub). **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. A base model continues; a chat model answers. Fine-tuning is mostly the way from the one to the other.
# 2. New tokens need rows, rows need sensible values, and the matrix must never shrink.
# 3. Only the assistant's words and its `<|im_end|>` are trained.
# 4. Compare on held-out questions that no setting was chosen on, with intervals, against a fair baseline, and look at what
#    was lost.
# 5. SFT learns from answers, DPO from pairs of answers, RLOO from rewards; each needs the one before to have done its
#    work.
#
# **What comes next.** Notebook 01 opens the tokenizer. If you came for preferences or rewards, *DPO* is taken apart in
# notebook 07 and *RLOO*, with a reward that gets hacked before your eyes, in notebook 08.
#
# **Sources.** Ouyang et al. 2022, *Training language models to follow instructions with human feedback*
# (arXiv:2203.02155). Qwen team 2024, *Qwen2.5 technical report* (arXiv:2412.15115). Hewitt 2021, *Initializing new word
# embeddings for pretrained language models* (the mean of the rows). Wilson 1927, *Probable inference, the law of
# succession, and statistical inference* (the interval). Zhou et al. 2023, *LIMA* (arXiv:2305.11206), on format against
# content. Rafailov et al. 2023, *Direct preference optimization* (arXiv:2305.18290). Ahmadian et al. 2024, *Back to
# basics: revisiting REINFORCE-style optimization* (arXiv:2402.14740).
