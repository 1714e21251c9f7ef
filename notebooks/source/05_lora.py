# %% [markdown]
# # 05 · LoRA: training one number in thirty
#
# Full fine-tuning moves every weight of a model, and needs memory for each. LoRA leaves them where they are and trains two thin
# matrices beside each of them. You build one by hand, count what it saves, teach it two new tokens without touching
# the other thousand, and merge it away again. In between you measure what the method is praised for: that it forgets less.
#
# ![W is frozen; two thin matrices B and A, scaled, are added to it; merged they are one matrix again](figures/05_lora.png)
#
# **Read it.** Left, dashed, the frozen matrix of one layer. Middle, the two thin ones that are trained instead: a
# thirtieth of the numbers. Right, what they become when training is over: one matrix, as large and as fast as before.
#
# | | |
# |---|---|
# | **You will be able to** | add an adapter to a layer by hand · count what is trained · train two token rows and no others · weigh learning against forgetting · merge, and prove that nothing changed · name four ways to lose what was trained |
# | **Time** | 30 minutes to read, 24 for the four exercises; half a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [03 · The training loop](03_training_loop.ipynb), and the new tokens of [01](01_tokenizer_extension.ipynb) |

# %% tags=["setup"]
import re
import sys

if colab := sys.modules.get("google.colab"):  # on Colab only: fetch the library
    at = get_ipython().getoutput("curl $COLAB_JUPYTER_IP:$KMP_TARGET_PORT/api/sessions")
    at = f"{at} {colab._message.blocking_request('get_ipynb')}".replace("%2F", "/")
    repo = re.search(r"github[.com]*/([\w.-]+/[\w.-]+)/blob/([\w./-]+?)/notebooks/", at)
    assert repo, "put here instead: !pip install git+https://github.com/OWNER/NAME"
    get_ipython().system(repo.expand(r"pip install -q git+https://github.com/\1@\2"))

# %% tags=["recorded"]
import copy
import json
import math
import tempfile
import warnings

import torch

from qftlab import (
    LoRAConfig, TrainConfig, add_adapters, bundled, count_parameters, encode_rows,
    export_model, fit_rows, load_rows, merge_adapters,
)  # fmt: skip
from qftlab_course import checks, stages, views
from qftlab_course.lessons import training_plots

# %% [markdown]
# Everything you may want to change is in this cell. `RUNS` is what part 4 compares: a rank (0 is full fine-tuning), a learning
# rate, and the tokens whose rows are trained beside the two new ones. `LIVE` is the one of them that you train yourself.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
RANK = 4
RATE = 2e-3
ROWS = ("<", "answer", ">", "</", "<|im_start|>", "<|im_end|>")
RUNS = {
    "full, slow": (0, 7e-4, ()),
    "full": (0, 1e-3, ()),
    "full, fast": (0, 2e-3, ()),
    "rank 1": (1, 2e-3, ROWS),
    "rank 4": (4, 2e-3, ROWS),
    "rank 16": (16, 2e-3, ROWS),
    "16, no rows": (16, 2e-3, ()),
}
STEPS, LIVE = 40, "rank 4"

# %% [markdown]
# ## 1 · An update of low rank
#
# **Idea.** After fine-tuning, a weight matrix is $W + \Delta W$. Full fine-tuning lets $\Delta W$ be anything. LoRA bets that it can
# be simple: a sum of a few patterns "read this from the input, write that to the output". A matrix made of $r$
# such patterns has **rank** $r$, and is the product of two thin matrices.
#
# **Formula.** With $A$ of $r$ rows that read and $B$ of $r$ columns that write, both trained, and $W$ frozen,
#
# $$ y = W x + \frac{\alpha}{r} \, B \, (A x) $$
#
# $A$ starts at random and $B$ at zero, so that the first step begins at exactly the old model. Dividing by $r$ keeps the
# update from growing with the number of patterns.
#
# **Toy numbers.** One pattern, $r = 1$, $\alpha = 1$: read the first input, write its double to the second output.

# %%
a = torch.tensor([[1.0, 0.0, 0.0]])  # (r, D_in)
b = torch.tensor([[0.0], [2.0]])  # (D_out, r)
print((b @ a).tolist())
assert torch.linalg.matrix_rank(b @ a) == 1

# %% [markdown]
# Six numbers in the product, five in the factors. With 448 × 160 it is 71,680 against 608.

# %% [markdown]
# ### Exercise 05.1 · A layer with an adapter (●●○, 8 minutes)
#
# Write the formula for a batch of rows: `x` is (T, D_in), one position in each row.
#
# <details><summary>Hint 1</summary>
#
# A layer of torch computes `x @ weight.T`. The adapter is two such layers, one after the other.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The rank need not be handed over: it is `a.shape[0]`.
# </details>

# %%
def my_adapted(x, weight, a, b, alpha):
    """W x + (alpha / r) B (A x) for rows of x (T, D_in); a (r, D_in), b (D_out, r)."""
    ...


checks.check("05.1", my_adapted)

# %% [markdown]
# **Check.** A real layer of our model, wrapped by [peft](https://github.com/huggingface/peft), the library that most people use for this.
# It puts an object around each layer that holds $W$ as `base_layer`, and the two thin matrices beside it.

# %%
adapted_layer = checks.or_library("05.1", my_adapted)

# %% tags=["recorded"]
start = stages.stage("extended", preset=PRESET)
tokenizer = start.tokenizer

# %%
settings = LoRAConfig(RANK, alpha=32.0)
wrapped = add_adapters(copy.deepcopy(start.model), settings, seed=SEED)
layer = wrapped.get_base_model().model.layers[0].mlp.up_proj
a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

# %% [markdown]
# Before a step is taken, $B$ is zero and the wrapped layer answers exactly as the bare one. Then we push, and compare:

# %%
x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(SEED))
with torch.no_grad():
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero: nothing has changed
    b.normal_(0, 0.05)
    found = adapted_layer(x, layer.base_layer.weight, a, b, 32.0)
    assert torch.allclose(found, layer(x), atol=1e-5)
shapes = [tuple(matrix.shape) for matrix in (layer.base_layer.weight, a, b)]
print("W {}, A {}, B {}: by hand as by peft".format(*shapes))

# %% [markdown]
# **Is the bet any good?** We can look. The course's own fine-tuned model was trained in full; its $\Delta W$ is the difference to
# the model it started from. *Singular values* say how much of a matrix each pattern carries, the strongest first.
# A matrix of random numbers, of the same shape, has no patterns: what it shows is chance.

# %%
tuned = stages.stage("sft", preset=PRESET).model
blocks = zip(start.model.get_decoder().layers, tuned.get_decoder().layers, strict=True)
pairs = [(old.mlp.up_proj.weight, new.mlp.up_proj.weight) for old, new in blocks]
updates = [(new - old).detach() for old, new in pairs]
energy = [torch.linalg.svdvals(update).square() for update in updates]
shares = torch.stack([e.cumsum(0) / e.sum() for e in energy]).mean(0)  # (160,)
generator = torch.Generator().manual_seed(SEED)
noise = torch.randn(updates[0].shape, generator=generator)
noise = torch.linalg.svdvals(noise).square()
chance = noise.cumsum(0) / noise.sum()

# %%
curves = {"what fine-tuning did": shares, "a random matrix": chance}
alt = ("Share of a full fine-tuning update that its best approximation of each rank "
       "holds: far above that of a random matrix at small ranks, and still not all of "
       "it at rank 16")
views.show_figure(training_plots.shares_by_rank(curves), alt=alt)

# %% [markdown]
# **Read it.** At rank 16, a tenth of the width, the best approximation holds most of the update, far more than chance; but not all. The bet
# is good and not free. Mind what the picture does not say: training *at* rank 16 may well find another update
# than the truncation of this one.

# %%
for rank in [4, 16]:
    held, by_chance = shares[rank - 1], chance[rank - 1]
    print(f"rank {rank:>2} holds {held:.0%}, and {by_chance:.0%} of a random matrix")
    assert held > 1.5 * by_chance
assert 0.5 < shares[15] < 0.9

# %% [markdown]
# ## 2 · What it costs
#
# **Formula.** A matrix of $D_{out} \times D_{in}$ costs $r \, (D_{out} + D_{in})$ trained numbers. For each of them training keeps a
# gradient and AdamW two averages; for a frozen one neither.
#
# **Toy numbers.** 448 × 160 at rank 4: $4 \cdot 608 = 2{,}432$ of $71{,}680$, one in thirty.

# %% [markdown]
# ### Exercise 05.2 · How many numbers are trained (●○○, 5 minutes)
#
# Add them up over all adapted matrices. Some token rows are trained as well, whole; each has `width` numbers.
#
# <details><summary>Hint</summary>
#
# One `sum` over the shapes, and one product behind it. The rank has nothing to do with the rows.
# </details>

# %%
def my_count(shapes, rank, num_rows, width):
    """Trained numbers: adapters on matrices (D_out, D_in), and rows of `width`."""
    ...


checks.check("05.2", my_count)

# %%
count = checks.or_library("05.2", my_count)
new_ids = tokenizer.convert_tokens_to_ids(["<|AGENT|>", "<|EDIT|>"])
matrices = {n: m for n, m in start.model.named_modules() if n.endswith("_proj")}
shapes = [tuple(matrix.weight.shape) for matrix in matrices.values()]
width, total = start.model.config.hidden_size, count_parameters(start.model).total
for rank in [1, 4, 16, 64]:
    model = copy.deepcopy(start.model)
    adapted = add_adapters(model, LoRAConfig(rank), token_ids=new_ids)
    trained = count_parameters(adapted).trained
    assert trained == count(shapes, rank, len(new_ids), width)
    print(f"rank {rank:>2}: {trained:>7,} trained, {trained / total:.0%} of {total:,}")

# %% [markdown]
# **Read it.** At this width a rank of 64 is no longer thin. The share falls as models grow, because a matrix grows with the square of the width and
# its adapter with the width. The same function, for two real models:

# %%
def block(d, kv, q, mlp):
    """Matrices of one block: query, key, value, output, gate, up and down."""
    return [(q, d), (kv, d), (kv, d), (d, q), (mlp, d), (mlp, d), (d, mlp)]


qwens = {"Qwen2.5-0.5B": (24 * block(896, 128, 896, 4864), 2, 896, 0.494e9),
         "Qwen3-8B": (36 * block(4096, 1024, 4096, 12288), 4, 4096, 8.19e9)}
for name, (matrices, num_rows, width, total) in qwens.items():
    trained = count(matrices, 16, num_rows, width)
    in_full, with_adapters = 16 * total / 1e9, (2 * total + 16 * trained) / 1e9
    print(f"{name}, rank 16: {trained:,} trained, {trained / total:.1%}; "
          f"{in_full:.0f} GB in full, {with_adapters:.1f} GB with adapters")
assert with_adapters < 80 < in_full

# %% [markdown]
# **Read it.** In full: 16 bytes for each number (weight, gradient, two averages, 4 bytes each). With adapters: 2 bytes for each frozen
# one, in bf16, and 16 for each trained one. Activations come on top in both. So a model of 8 billion parameters fits on one card of 80 GB with adapters,
# and in full does not. (The larger model has two tables, so two tokens have four rows.)

# %% [markdown]
# ## 3 · Two rows and no others
#
# **Idea.** Adapters sit on the blocks. But we have added two tokens, and their rows of the embedding table are only a first guess
# (notebook 01). They must be trained; the thousand others need not be. In a *tied* model the same rows
# are read at the input and written at the output, so the two rows are trained in both places at once.

# %% [markdown]
# ### Exercise 05.3 · Move two rows and no others (●●○, 6 minutes)
#
# One step of plain gradient descent on a table, in the rows `ids` only.
#
# <details><summary>Hint</summary>
#
# `moved = table.clone()` first. Then `moved[ids]` reads and writes several rows at once.
# </details>

# %%
def my_move_rows(table, gradient, ids, lr):
    """The table (V, D) after a step of `lr` in the rows `ids` only; `table` stays."""
    ...


checks.check("05.3", my_move_rows)

# %% [markdown]
# **Code.** peft does it with `trainable_token_indices`, and our `add_adapters(token_ids=…)` sets it by the kind of model: a list of ids
# where head and embedding are tied, a dict with both layers' names where they are not. We train on programs with a bug: is a
# tool needed to find it (`<|AGENT|>`), or is the fix plain (`<|EDIT|>`)?

# %% [markdown]
# > **Predict, then run.** The model has 1,024 rows. 12 steps, adapters of rank 4, two rows free. In how many rows
# > does the table change? And how many do after full fine-tuning, where every row is free: those of the tokens that occur, or all?

# %% tags=["nbval-ignore-output"]
bugs, model = load_rows(bundled("bugfix", "train.jsonl")), copy.deepcopy(start.model)
adapted = add_adapters(model, LoRAConfig(RANK), token_ids=new_ids, seed=SEED)
config = TrainConfig(lr=RATE, batch_size=24, max_steps=12, seed=SEED)
result = fit_rows(adapted, tokenizer, bugs, config)
merged = merge_adapters(adapted)
print(f"on this machine: loss {result.losses[0]:.1f} → {result.losses[-1]:.1f}")

# %% [markdown]
# `merge_adapters` gives the plain model that part 5 is about. Here it lets us lay the tables side by side, and the fully fine-tuned
# model of notebook 00 beside them:

# %%
def rows_moved(model):
    """How far each row of the table has moved from where it started, (V,)."""
    before, after = (m.get_input_embeddings().weight for m in (start.model, model))
    return (after - before).norm(dim=1).detach()


by_lora, by_full = rows_moved(merged), rows_moved(tuned)

# %%
moved = {"full, every row": by_full, "LoRA and two rows": by_lora}
alt = ("How far each of the 1,024 rows moved: under LoRA all are at zero but the last "
       "two with a token, 1000 and 1001; in full fine-tuning nearly all have moved")
views.show_figure(training_plots.rows_moved(moved), alt=alt)

# %% [markdown]
# **Read it.** Diamonds lie on the zero line, all but two: the new tokens. Dots, of the fully fine-tuned model, lie above it
# everywhere. And the straight line of dots at the top? Those are tokens that *never occur* in the rows. In the softmax every
# row is pushed away whenever it is not the answer; their push never changes direction, and AdamW makes every steady push large.

# %%
assert by_lora.nonzero().flatten().tolist() == new_ids
assert (by_full > 0).sum() > 900
files = ["instructions/train", "countdown/demonstrations", "bugfix/train"]
rows = load_rows([bundled(f"{file}.jsonl") for file in files])
occur = {i for example in encode_rows(tokenizer, rows)[0] for i in example.input_ids}
never = sorted(set(range(len(by_full))) - occur)
far, usual = by_full[never].median(), by_full[sorted(occur)].median()
print(f"rows of {len(never)} tokens that never occur: {far / usual:.0f} times as far")
assert far > 2 * usual
assert merged.lm_head.weight is merged.model.embed_tokens.weight  # still tied

before, same = dict(start.model.named_parameters()), []
for name, parameter in adapted.get_base_model().named_parameters():
    if "base_layer" in name:
        plain = name.replace(".base_layer", "").replace(".token_adapter", "")
        assert torch.equal(parameter, before[plain])
        same.append(plain)
print(f"{len(same)} frozen tensors are bit for bit what they were")

# %% [markdown]
# ## 4 · Learned against forgotten
#
# **Idea.** A model that learns something new may lose what it knew. *LoRA learns less and forgets less* is the title of a study on 7B models
# (Biderman et al. 2024). Does it hold here? We teach Countdown, "make 22 of 1, 12 and 11", which the base cannot do, and
# measure two things every eight steps, and a third at the end:
#
# - **learned**: the loss on Countdown puzzles that were never trained on,
# - **forgotten**: the loss on plain problems, `47 + 38 = 85`, which the base does well,
# - **right**: how many of those it still answers correctly, token by token.
#
# One more thing is compared: *which rows*. A Countdown answer, `<answer>12 - 1 + 11</answer><|im_end|>`, is written with tokens that
# this base expects nowhere: its loss on such answers is above that of a blind guess. All runs with adapters train the
# rows of six such tokens (`ROWS`), except one.

# %% [markdown]
# > **Predict, then run.** Three questions. Which forgets more, full fine-tuning or rank 4? Does rank 1 suffice? And will the
# > run *without* the six rows catch up, because its adapters can still bend every layer?

# %% tags=["recorded"]
from qftlab import Example


def plain_example(row):
    """A row as in pretraining ("47 + 38 =" → " 85"), loss on the answer only."""
    texts = row["plain"], f" {row['output']}\n"
    asked, answer = (tokenizer(text).input_ids for text in texts)
    return Example(asked + answer, [False] * len(asked) + [True] * len(answer))


old_rows = load_rows(bundled("instructions", "heldout.jsonl"))[::2]
old = [plain_example(row) for row in old_rows if row["skill"] != "joke"]
unseen = load_rows(bundled("countdown", "heldout.jsonl"))[:100]
new = encode_rows(tokenizer, unseen)[0]
puzzles = load_rows(bundled("countdown", "demonstrations.jsonl"))
examples = encode_rows(tokenizer, puzzles)[0]

# %% tags=["recorded"]
from qftlab import Step, fit_examples, held_out_loss
from qftlab_course.measure import evaluate_kept


def run_path(rank, rate, tokens, steps, seed):
    """One run: what was learned and forgotten every 8 steps; old skills at the end."""
    model = copy.deepcopy(start.model)
    if rank:
        ids = tokenizer.convert_tokens_to_ids(["<|AGENT|>", "<|EDIT|>", *tokens])
        model = add_adapters(model, LoRAConfig(rank), token_ids=ids, seed=seed)
    config = TrainConfig(lr=rate, batch_size=24, max_steps=steps, eval_every=8,
                         seed=seed)
    forgotten, path = held_out_loss(Step(model), old, config), []

    def on_log(record):
        if "held_out_loss" in record:
            path.append((record["held_out_loss"], forgotten()))

    fit_examples(model, examples, config, held_out=new, on_log=on_log)
    return {"path": path, "kept": evaluate_kept(model, tokenizer, old_rows).accuracy}

# %% [markdown]
# One run is one draw: with another seed, or on another make of processor, it ends elsewhere. So this lesson ships eight runs of each kind
# (`python -m benchmarks.records 05_lora` made them, with the two cells above), and you train one more of the kind `LIVE`.

# %%
record = json.loads(bundled("records", "05_lora.json").read_text())
runs = [run for run in record["runs"] if run["numerics"] == "plain"]  # eight seeds
ends = {}
for name in RUNS:  # in each of its runs: learned, forgotten, still right
    last = [[*run[name]["path"][-1], run[name]["kept"]] for run in runs]
    ends[name] = torch.tensor(last)  # (8, 3)
print(f"means of {len(runs)} runs ± the standard deviation of one run")
for name, values in ends.items():
    both = zip(values.mean(0), values.std(0), strict=True)
    cells = [f"{mean:.2f} ± {sd:.2f}" for mean, sd in both]
    print(f"{name:12} learned {cells[0]} · forgotten {cells[1]} · right {cells[2]}")

# %% tags=["nbval-ignore-output"]
mine = run_path(*RUNS[LIVE], STEPS, SEED)
print(f"on this machine, {LIVE}: learned {mine['path'][-1][0]:.2f}, "
      f"forgotten {mine['path'][-1][1]:.2f}, right {mine['kept']:.2f}")
assert mine["path"][-1][0] < 1.2 and mine["path"][-1][1] < 1

# %%
kinds = {name: torch.tensor([run[name]["path"] for run in runs]) for name in RUNS}
yours = torch.tensor(mine["path"])
assert yours[0, 0] > math.log(1024)  # the base expects such answers nowhere
ax = training_plots.trade_off(kinds, (f"{LIVE}, yours", yours))
alt = ("Paths of seven kinds of runs, eight thin lines and a bold mean each, loss on "
       "new puzzles against loss on plain problems: ranks 4 and 16 with their rows and "
       "slower full fine-tuning come down beside the dotted line of the base, rank 1 "
       "and fast full fine-tuning bend right; without the rows it stops half-way")
views.show_figure(ax, alt=alt)

# %% [markdown]
# **Read it.** Thin lines are runs, bold lines their means, stars your own. Every path starts above the frame, on the dotted line: what the base
# knows of plain problems. A path that comes straight down pays nothing for what it learns; one that bends right pays with what it knew.
#
# Of the three of full fine-tuning, the faster one learns more and forgets more: so one rate says nothing about a method. Rank 1 ends
# further right than *full*: fewer numbers alone protect nothing. And the run without the rows stops half-way. Adapters bend hidden
# states; but what a hidden state is compared with, at the output, is a row.
#
# **Does LoRA forget less?** On the development rows, where we chose the rates, rank 16 ended to the left of *full*. On these held-out rows,
# which were read once, it does not: by the loss, *full* ends further left, even left of the base. By right answers it is the other way round: rank 16 keeps
# more than *full*, as many as *full, slow*, and learns more than that. A loss is a mean over tokens; an answer is right only if every token is. So say
# which of the two you mean by "forgotten", before you look, and report it also when it disagrees with you.

# %%
LEARNED, FORGOTTEN, RIGHT = range(3)


def lower(one, other, column):
    """By how much `one` ends below `other`, in standard errors of the paired mean."""
    gaps = ends[other][:, column] - ends[one][:, column]
    return (gaps.mean() / gaps.std() * len(gaps) ** 0.5).item()


claims = [("full, slow", "full", FORGOTTEN), ("full", "full, fast", FORGOTTEN),
          ("full", "full, slow", LEARNED), ("full, fast", "full", LEARNED),
          ("full", "rank 1", FORGOTTEN), ("full", "rank 16", FORGOTTEN),
          ("full", "rank 16", RIGHT), ("rank 16", "full, slow", LEARNED)]
assert all(lower(*claim) > 4 for claim in claims)
assert ends["16, no rows"][:, LEARNED].min() > 2 * ends["rank 16"][:, LEARNED].max()
print("each of these differences is more than four standard errors of its mean")

# %% [markdown]
# How far may one generalise? One model of 1.3 million parameters, one task, and rates chosen by hand, on development rows. What does
# carry over is the *way to ask*: never compare two methods by what they learned alone, never at a single rate, never by a single run.
#
# > **Explain.** A colleague reports: "LoRA forgets less. At the same learning rate, full fine-tuning ruined the model and
# > LoRA did not." Which of the runs above should they see, and what is wrong with "the same rate"? Two sentences.

# %% [markdown]
# ## 5 · Merge, and prove it
#
# **Idea.** Two thin products at every layer cost time at every token. When training is over nobody needs them apart: multiply
# them out and add them to $W$. The result is a plain model, which any program can load.
#
# **Formula.** $\;W' = W + \frac{\alpha}{r} B A\;$, because $\;W x + \frac{\alpha}{r} B (A x) = \big(W + \frac{\alpha}{r} B A\big)\, x$.

# %% [markdown]
# ### Exercise 05.4 · Merge an adapter (●○○, 5 minutes)
#
# Return the merged matrix, and leave `weight` as it is.
#
# <details><summary>Hint</summary>
#
# Which of `a @ b` and `b @ a` has the shape of `weight`?
# </details>

# %%
def my_merge(weight, a, b, alpha):
    """The matrix (D_out, D_in) that does what weight and adapter do; `weight` stays."""
    ...


checks.check("05.4", my_merge)

# %%
merge = checks.or_library("05.4", my_merge)
layer = adapted.get_base_model().model.layers[0].mlp.up_proj
a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
by_hand = merge(layer.base_layer.weight, a, b, 32.0)
assert torch.allclose(by_hand, merged.model.layers[0].mlp.up_proj.weight, atol=1e-5)

# %% [markdown]
# One matrix agrees. Do all of them together? Eight programs that were never trained on, answered greedily by both:

# %%
from qftlab import generate

rows = load_rows(bundled("bugfix", "heldout.jsonl"))[:8]
prompts = [[{"role": "user", "content": row["instruction"]}] for row in rows]


def answers(model):
    """Greedy token ids of each answer."""
    return [c.token_ids for c in generate(model, tokenizer, prompts, max_new_tokens=24)]


before = answers(adapted)
assert answers(merged) == before
print(f"{len(before)} answers, token by token the same before and after the merge")

# %% [markdown]
# **Check, before you ship.** A merge is where trained weights get lost, so the library's `export_model` trusts nothing: it writes
# the folder, *reads it back*, and compares with the model in memory. Greedy tokens equal, logits equal up to rounding,
# rows that nobody trained unchanged, a tied head still tied. If one of them fails, nothing is left on the disk.

# %%
from qftlab import load_adapters, load_model, save_adapters

with tempfile.TemporaryDirectory() as folder:
    report = export_model(adapted, tokenizer, f"{folder}/exported")
    print(f"{report.rows} rows, tied: {report.is_tied}")
    plain = load_model(report.path)
    save_adapters(adapted, f"{folder}/adapters")
    base = stages.stage("base", preset=PRESET).model
    loaded = load_adapters(base, f"{folder}/adapters")
assert answers(plain) == answers(loaded) == before

# %% [markdown]
# `load_adapters` put the *adapters* on the base as shipped, which has never heard of the two tokens: their rows travel in the same small
# file. So one base can serve many adapters.

# %% [markdown]
# ## 6 · What goes wrong in practice
#
# **`modules_to_save` unties the head.** It is an answer that many forums give for new tokens: train `embed_tokens` and `lm_head`
# whole. On a tied model it makes two matrices out of one, and trains every row of both.

# %%
from peft import LoraConfig, get_peft_model

settings = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj"],
                      modules_to_save=["embed_tokens", "lm_head"])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peft warns as well
    whole = get_peft_model(copy.deepcopy(start.model), settings)
two = add_adapters(copy.deepcopy(start.model), LoRAConfig(RANK), token_ids=new_ids)
trained = [count_parameters(model).trained for model in (whole, two)]
print("{:,} trained numbers, against {:,}".format(*trained))
is_tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
print("head still tied:", is_tied)
assert not is_tied

# %% [markdown]
# And `export_model` refuses it, because the config still says the two are one, and programs disagree on which to believe:

# %%
try:
    export_model(whole, tokenizer, "never-written")
except ValueError as error:
    print(error)

# %% [markdown]
# **A resize that shrinks.** Tables have spare rows: 1,024 here for 1,002 tokens, 151,936 for 151,665 in Qwen2.5.
# `resize_token_embeddings(len(tokenizer))` throws the spare ones away. The model still runs; but its shapes are no longer those of the base, and
# whatever expects them fails: adapters with rows trained on the base, tensor-parallel serving, a merge of two models.

# %%
shrunk = stages.stage("base", preset=PRESET).model
shrunk.resize_token_embeddings(1000, mean_resizing=False)  # len(tokenizer) of the base
try:
    add_adapters(shrunk, LoRAConfig(RANK), token_ids=new_ids)
except ValueError as error:
    print(error)

# %% [markdown]
# **The rows are forgotten.** Leave `token_ids` out, and the new tokens keep their first guess, as the six rows did in part 4. With a
# real base this is the *common* case: Qwen2.5's base has `<|im_start|>` and `<|im_end|>`, and a LoRA that has to make a chat
# model of it does well to train their rows too.
#
# **Adapters before tokens.** `add_adapters` freezes the table as it finds it. Extend first: `extend_model` refuses a model that has adapters
# already, because rows written into the wrapper would be lost without a word.
#
# **Quantised weights are merged.** In QLoRA the frozen weights have 4 bits. A sum rounded back to 4 bits is another model than the one
# you tested; load the base in bf16, put the adapters on, then merge. The library refuses the short cut.

# %% [markdown]
# ## Your exercises

# %%
checks.progress("05")

# %% [markdown]
# ## At 0.5B and 8B
#
# **The same:** every line of this notebook. `add_adapters` finds the seven matrices of a block by their names, in Qwen2, Qwen3 and Llama.
#
# **Different:** Qwen3-8B is *untied*: its input table and its head are two matrices, and a plain list of ids would train the
# input rows only. `add_adapters` notices and names both, so that two tokens have four rows. *Precision*: the frozen weights are bf16; adapters and rows
# stay fp32, because a bf16 number near 1 has its next neighbour 0.008 away, and steps of 1e-4 would be rounded off. *Memory*:
# part 2. *Quantisation*: `load_model(…, quant="4bit")` needs a CUDA card and bitsandbytes, and says so elsewhere.
#
# **Published:** on GPT-3 with 175 billion parameters LoRA trained 10,000 times fewer numbers and took a third of the memory
# (Hu et al. 2021, abstract). QLoRA fine-tunes 65 billion on one card of 48 GB (Dettmers et al. 2023, abstract). Adapters do best at
# about ten times the rate of full fine-tuning (Schulman et al. 2025). **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. $W + \frac{\alpha}{r} B A$: two thin matrices, a few per cent of the numbers; at the start they change nothing.
# 2. Adapters bend hidden states. What a token *is*, at input and output, is its row: train the rows of new and of unpractised tokens.
# 3. Weigh what was learned against what was forgotten, along the whole path, and at more than one rate.
# 4. Merging is a sum. Prove it on what was read back from the disk.
# 5. Never shrink a table, never untie a head, never merge into 4 bits.
#
# **Next.** *06 · Teacher data*: where rows come from when you have none. Or on to *07 · DPO*.
#
# **Sources.** Hu et al. 2021, *LoRA* (arXiv:2106.09685). Aghajanyan et al. 2020, *Intrinsic dimensionality explains the effectiveness of
# language model fine-tuning* (arXiv:2012.13255). Dettmers et al. 2023, *QLoRA* (arXiv:2305.14314). Biderman et al. 2024, *LoRA learns less
# and forgets less* (arXiv:2405.09673). Schulman et al. 2025, *LoRA without regret* (Thinking Machines Lab). peft 0.21, `trainable_token_indices`.
