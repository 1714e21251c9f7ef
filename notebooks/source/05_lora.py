# %% [markdown]
# # 05 · LoRA: training one number in thirty
#
# Full fine-tuning moves every weight of a model, and needs memory for each. LoRA leaves them where they are and trains two thin
# matrices beside each of them. You build one by hand, count what it saves, teach it two new tokens without touching
# the other thousand, and merge it away again. In between you measure what the method is praised for: that it forgets less.
#
# ![W is frozen; two thin matrices B and A, scaled, are added to it; merged they are one matrix again](figures/05_lora.png)
#
# **Read it.** Left, dashed, the frozen matrix of one layer. Middle, the two thin ones that are trained in its place: a
# thirtieth of the numbers. Right, what they become when training is over: one matrix, as large and as fast as before.
#
# | | |
# |---|---|
# | **You will be able to** | add an adapter to a layer by hand · count what is trained · train two token rows and no others · weigh learning against forgetting · merge, and prove that nothing changed · name four ways to lose what was trained |
# | **Time** | 30 minutes to read, 24 for the four exercises; two minutes to compute, once |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [03 · The training loop](03_training_loop.ipynb), and the new tokens of [01](01_tokenizer_extension.ipynb) |

# %% tags=["setup"]
import sys

if "google.colab" in sys.modules:  # on Colab only: fetch the library, leave torch and transformers as they are
    REPO = "OWNER/qftlab"
    get_ipython().run_line_magic("pip", f"install -q --no-deps git+https://github.com/{REPO}")
    get_ipython().run_line_magic("pip", "install -q jsonargparse")

# %%
import copy
import tempfile
import warnings

import torch

from qftlab.core import plots
from qftlab.data.batching import Example
from qftlab.data.bundled import bundled
from qftlab.data.sources import load_rows
from qftlab.evaluate.kept import evaluate_kept
from qftlab.generate.engine import generate
from qftlab.model.config import LoRAConfig
from qftlab.model.export import export_model
from qftlab.model.loading import load_model
from qftlab.model.lora import add_adapters, count_parameters, load_adapters, merge_adapters, save_adapters
from qftlab.teach import checks, stages, views
from qftlab.train.config import TrainConfig
from qftlab.train.sft import encode_rows, fit_examples, fit_rows, held_out_loss
from qftlab.train.step import Step

# %% [markdown]
# Everything you may want to change is in this cell. `RUNS` is what part 4 compares: a rank (0 is full fine-tuning), a learning
# rate, and the tokens whose rows are trained beside the two new ones.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
RANK = 4
RATE = 2e-3
ROWS = ("<", "answer", ">", "</", "<|im_start|>", "<|im_end|>")
RUNS = {"full": (0, 1e-3, ()), "full, fast": (0, 2e-3, ()), "rank 1": (1, 2e-3, ROWS), "rank 4": (4, 2e-3, ROWS),
        "rank 16": (16, 2e-3, ROWS), "16, no rows": (16, 2e-3, ())}
STEPS = 40

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
# $A$ starts at random and $B$ at zero, so that the first step begins at exactly the old model. Dividing by $r$ keeps the size of the
# update, and with it a good learning rate, about the same for every rank.
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
    """W x + (alpha / r) · B (A x) for each row of x (T, D_in); weight (D_out, D_in), a (r, D_in), b (D_out, r)."""
    ...


checks.check("05.1", my_adapted)

# %% [markdown]
# **Check.** A real layer of our model, wrapped by [peft](https://github.com/huggingface/peft), the library everybody uses for this.
# It puts an object around each layer that holds $W$ as `base_layer`, and the two thin matrices beside it.

# %%
adapted_layer = checks.or_library("05.1", my_adapted)

# %%
start = stages.stage("extended", preset=PRESET)
tokenizer = start.tokenizer
wrapped = add_adapters(copy.deepcopy(start.model), LoRAConfig(RANK, alpha=32.0), seed=SEED)
layer = wrapped.get_base_model().model.layers[0].mlp.up_proj
a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

# %% [markdown]
# Before a step is taken, $B$ is zero and the wrapped layer answers exactly as the bare one. Then we push, and compare:

# %%
x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(SEED))
with torch.no_grad():
    assert torch.equal(layer(x), layer.base_layer(x))  # B is zero: nothing has changed yet
    b.normal_(0, 0.05)
    found = adapted_layer(x, layer.base_layer.weight, a, b, 32.0)
    assert torch.allclose(found, layer(x), atol=1e-5)
print(f"W {tuple(layer.base_layer.weight.shape)}, A {tuple(a.shape)}, B {tuple(b.shape)}: by hand as by peft")

# %% [markdown]
# **Is the bet any good?** We can look. The course's own fine-tuned model was trained in full; its $\Delta W$ is the difference to
# the model it started from. *Singular values* say how much of a matrix each pattern carries, the strongest first.

# %%
tuned = stages.stage("sft", preset=PRESET).model
blocks = zip(start.model.get_decoder().layers, tuned.get_decoder().layers, strict=True)
updates = [(new.mlp.up_proj.weight - old.mlp.up_proj.weight).detach() for old, new in blocks]
energy = [torch.linalg.svdvals(update).square() for update in updates]
shares = torch.stack([e.cumsum(0) / e.sum() for e in energy]).mean(0)  # (160,)

# %% [markdown]
# A matrix of random numbers, of the same shape, for comparison: it has no patterns, so what it shows is chance.

# %%
noise = torch.linalg.svdvals(torch.randn(updates[0].shape, generator=torch.Generator().manual_seed(SEED))).square()
chance = noise.cumsum(0) / noise.sum()

# %%
ax = plots.new_axes(None, 7.0, 3.4)
ranks = range(1, len(shares) + 1)
ax.plot(ranks, shares, "-", color=plots.PALETTE[0], linewidth=2, label="what fine-tuning did")
ax.plot(ranks, chance, "--", color=plots.PALETTE[3], linewidth=2, label="a random matrix")
ax.set_xscale("log")
ax.set_xticks([1, 4, 16, 64, 160], ["1", "4", "16", "64", "160"])
ax.set_xlabel("rank", fontsize=12)
ax.set_ylabel("share of the update", fontsize=12)
ax.legend(fontsize=12, frameon=False)
views.show_figure(ax, alt="Share of a full fine-tuning update that its best approximation of each rank holds: far above "
                  "that of a random matrix at small ranks, and still not all of it at rank 16")

# %% [markdown]
# **Read it.** At rank 16, a tenth of the width, the best approximation holds most of the update, far more than chance; but not all. The bet
# is good and not free. Mind what the picture does not say: training *at* rank 16 may well find another update
# than the truncation of this one.

# %%
print(f"rank 4 holds {shares[3]:.0%} of the update and rank 16 {shares[15]:.0%}; of a random matrix {chance[15]:.0%}")
assert shares[3] > 2 * chance[3] and shares[15] > 1.5 * chance[15]

# %% [markdown]
# ## 2 · What it costs
#
# **Formula.** A matrix of $D_{out} \times D_{in}$ costs $r \, (D_{out} + D_{in})$ trained numbers. For each of them AdamW keeps two
# averages and training a gradient; for a frozen one neither.
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
    """Trained numbers: `rank` adapters on matrices of shapes (D_out, D_in), and `num_rows` token rows of `width`."""
    ...


checks.check("05.2", my_count)

# %%
count = checks.or_library("05.2", my_count)
new_ids = tokenizer.convert_tokens_to_ids(["<|AGENT|>", "<|EDIT|>"])
shapes = [tuple(m.weight.shape) for name, m in start.model.named_modules() if name.endswith("_proj")]
for rank in [1, 4, 16, 64]:
    adapted = add_adapters(copy.deepcopy(start.model), LoRAConfig(rank), token_ids=new_ids)
    trained, total = count_parameters(adapted).trained, count_parameters(start.model).total
    assert trained == count(shapes, rank, len(new_ids), start.model.config.hidden_size)
    print(f"rank {rank:>2}: {trained:>9,} trained, {trained / total:.0%} of the model's {total:,}")

# %% [markdown]
# **Read it.** At this width a rank of 64 is no longer thin. The share falls as models grow, since a matrix grows with the square of the width and
# its adapter with the width. The same function, for two real models:

# %%
def block(d, kv, q, mlp):
    """The seven matrices of one block: query, key, value, output, gate, up and down."""
    return [(q, d), (kv, d), (kv, d), (d, q), (mlp, d), (mlp, d), (d, mlp)]


for name, d, kv, q, mlp, layers, total in [("Qwen2.5-0.5B", 896, 128, 896, 4864, 24, 0.494e9),
                                           ("Qwen3-8B", 4096, 1024, 4096, 12288, 36, 8.19e9)]:
    trained = count(layers * block(d, kv, q, mlp), 16, 2, d)
    print(f"{name}, rank 16: {trained:,} trained, {trained / total:.1%}; training state {16 * total / 1e9:.0f} GB "
          f"in full, {(2 * total + 16 * trained) / 1e9:.1f} GB with adapters")

# %% [markdown]
# **Read it.** In full: 16 bytes for each number (weight, gradient, two averages, 4 bytes each). With adapters: 2 bytes for each frozen
# one, in bf16, and 16 for each trained one. Activations come on top in both. So a model of 8 billion parameters fits on one card of 80 GB with adapters,
# and in full does not.

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
    """The table (V, D) after a step of `lr` against the gradient, in the rows `ids` only; `table` itself stays."""
    ...


checks.check("05.3", my_move_rows)

# %% [markdown]
# **Code.** peft does it with `trainable_token_indices`, and our `add_adapters(token_ids=…)` sets it by the kind of model: a list of ids
# where head and embedding are tied, a dict with both layers' names where they are not. We train on programs with a bug: is a
# tool needed to find it (`<|AGENT|>`), or is the fix plain (`<|EDIT|>`)?

# %% [markdown]
# > **Predict, then run.** The model has 1,024 rows. 12 steps, adapters of rank 4, two rows free. In how many rows
# > does the table change? And how many do after full fine-tuning, where every row is free: those of the tokens that occur, or all?

# %%
bugs = load_rows(bundled("bugfix", "train.jsonl"))
adapted = add_adapters(copy.deepcopy(start.model), LoRAConfig(RANK), token_ids=new_ids, seed=SEED)
config = TrainConfig(lr=RATE, batch_size=24, max_steps=12, seed=SEED)
result = fit_rows(adapted, tokenizer, bugs, config)
merged = merge_adapters(adapted)
print(f"loss {result.losses[0]:.1f} → {result.losses[-1]:.1f}")

# %% [markdown]
# `merge_adapters` gives the plain model that part 5 is about. Here it lets us lay the tables side by side, and the fully fine-tuned
# model of notebook 00 beside them:

# %%
def rows_moved(model):
    """How far each row of the table has moved from where it started, (V,)."""
    return (model.get_input_embeddings().weight - start.model.get_input_embeddings().weight).norm(dim=1).detach()


by_lora, by_full = rows_moved(merged), rows_moved(tuned)

# %%
ax = plots.new_axes(None, 7.0, 3.4)
ax.plot(by_full, ".", color=plots.PALETTE[1], markersize=4, label="full fine-tuning: every row is free")
ax.plot(by_lora, "D", color=plots.PALETTE[0], markersize=5, label="LoRA and two rows", zorder=3)
ax.set_xlabel("row of the table (token id)", fontsize=12)
ax.set_ylabel("how far it moved", fontsize=12)
ax.legend(fontsize=12, frameon=False, loc="upper left")
ax.set_ylim(top=1.45 * max(by_full.max(), by_lora.max()))
views.show_figure(ax, alt="How far each of the 1,024 rows moved: under LoRA all are at zero but the last two with "
                  "a token, 1000 and 1001; in full fine-tuning nearly all have moved")

# %% [markdown]
# **Read it.** Diamonds lie on the zero line, all but two: the new tokens. Dots, of the fully fine-tuned model, lie above it
# everywhere. And the straight line of dots at the top? Those are tokens that *never occur*, most of them the single bytes. In the softmax every
# row is pushed away whenever it is not the answer; their push never changes direction, and AdamW makes every steady push large.

# %%
assert by_lora.nonzero().flatten().tolist() == new_ids
assert (by_full > 0).sum() > 900
assert merged.lm_head.weight is merged.model.embed_tokens.weight  # still tied

# %% [markdown]
# **Check.** And the frozen weights: every tensor under an adapter is bit for bit what it was.

# %%
frozen = dict(start.model.named_parameters())
same = [name for name, p in adapted.get_base_model().named_parameters() if "base_layer" in name
        and torch.equal(p, frozen[name.replace(".base_layer", "").replace(".token_adapter", "")])]
print(f"{int((by_lora > 0).sum())} rows moved; {len(same)} frozen tensors of the wrapped layers are bit for bit what they were")

# %% [markdown]
# ## 4 · Learned against forgotten
#
# **Idea.** A model that learns something new may lose what it knew. *LoRA learns less and forgets less* is the title of a study on 7B models
# (Biderman et al. 2024). Does it hold here? We teach Countdown, "make 22 of 1, 12 and 11", which the base cannot do, and
# measure two things every eight steps:
#
# - **learned**: the loss on Countdown puzzles that were never trained on,
# - **forgotten**: the loss on plain arithmetic, `47 + 38 = 85`, which the base does well.
#
# One more thing is compared: *which rows*. A Countdown answer, `<answer>12 - 1 + 11</answer><|im_end|>`, is written with tokens that
# this base expects nowhere: its loss on such answers starts at 10 nats, where a blind guess has 6.93. All runs with adapters train the
# rows of six such tokens (`ROWS`), except one.

# %% [markdown]
# > **Predict, then run.** Three questions. Which forgets more, full fine-tuning or rank 4? Does rank 1 suffice? And will the
# > run *without* the six rows catch up, as its adapters can still bend every layer?
#
# The six runs take a minute or two together, once. Their numbers are then kept beside the stages.

# %%
def loss_on(model, examples, config):
    """Mean surprise of the trained tokens of examples, in nats, as the loop measures it."""
    return held_out_loss(Step(model), examples, config)()


def plain_example(row):
    """A row in the plain notation of pretraining ("47 + 38 =" → " 85"), loss on the answer only."""
    asked, answer = (tokenizer(text).input_ids for text in (row["plain"], f" {row['output']}\n"))
    return Example(asked + answer, [False] * len(asked) + [True] * len(answer))


old_rows = load_rows(bundled("instructions", "heldout.jsonl"))[::2]
old = [plain_example(row) for row in old_rows if row["skill"] != "joke"]
new = encode_rows(tokenizer, load_rows(bundled("countdown", "heldout.jsonl"))[:100])[0]
puzzles = load_rows(bundled("countdown", "demonstrations.jsonl"))

# %%
def run_path(rank, rate, tokens, steps, seed):
    """Trains one run; what was learned and what was forgotten every 8 steps, and the old skills at its end."""
    model = copy.deepcopy(start.model)
    if rank:
        ids = tokenizer.convert_tokens_to_ids(["<|AGENT|>", "<|EDIT|>", *tokens])
        model = add_adapters(model, LoRAConfig(rank), token_ids=ids, seed=seed)
    config = TrainConfig(lr=rate, batch_size=24, max_steps=steps, eval_every=8, seed=seed)
    path = []

    def on_log(record):
        if "held_out_loss" in record:
            path.append((record["held_out_loss"], loss_on(model, old, config)))

    examples = encode_rows(tokenizer, puzzles)[0]
    fit_examples(model, examples, config, held_out=new, on_log=on_log)
    return {"path": path, "kept": evaluate_kept(model, tokenizer, old_rows).accuracy}


paths = {name: stages.measured("lora", run_path, rank=rank, rate=rate, tokens=list(tokens), steps=STEPS, seed=SEED)
         for name, (rank, rate, tokens) in RUNS.items()}

# %%
ax = plots.new_axes(None, 7.5, 4.6)
for i, (name, run) in enumerate(paths.items()):
    learned, forgotten = zip(*run["path"][1:], strict=True)
    ax.plot(forgotten, learned, plots.MARKERS[i] + plots.DASHES[i % 4], color=plots.PALETTE[i], label=name, markersize=7)
first_learned, first_forgotten = paths["full"]["path"][0]
ax.axvline(first_forgotten, color="grey", linestyle=":", linewidth=1)
ax.set_xscale("log")
ax.set_xticks([0.2, 0.3, 0.5, 1, 2], ["0.2", "0.3", "0.5", "1", "2"])
ax.minorticks_off()
ax.set_xlabel("forgotten: loss on plain arithmetic (nats)", fontsize=12)
ax.set_ylabel("learned: loss on new puzzles (nats)", fontsize=12)
ax.set_ylim(0, 4)
ax.legend(fontsize=11, frameon=False, loc="upper right")
views.show_figure(ax, alt="Paths of six runs, loss on new puzzles against loss on plain arithmetic: adapters with their "
                  "rows come down almost straight, full fine-tuning bends to the right, fast full fine-tuning far to the "
                  "right, and adapters without the rows stop half-way down")

# %% [markdown]
# **Read it.** Every path starts above the frame, on the dotted line: what the base knows of plain arithmetic. A path that
# comes straight down learns for nothing; one that bends right pays with what it knew. Ranks 4 and 16 come down as far as full
# fine-tuning, and end further left. Rank 1 comes down as far, too, but ends further *right*: fewer numbers alone protect nothing. Doubling the
# rate of full fine-tuning learns most and ruins the old skill: three plain problems of four are wrong.
#
# And the run without the rows stops half-way. Adapters bend hidden states; but what a hidden state is compared with, at the output, is a row.

# %%
last = {name: run["path"][-1] for name, run in paths.items()}
able = [name for name, (learned, _) in last.items() if learned < 1]
print("learned, from the least forgotten on:", " · ".join(sorted(able, key=lambda name: last[name][1])))
assert last["rank 16"][1] < last["rank 4"][1] < last["full"][1] < last["rank 1"][1] < last["full, fast"][1]
assert max(last[name][0] for name in able) < last["full"][0] + 0.2 and last["16, no rows"][0] > 2 * last["rank 16"][0]
assert paths["full, fast"]["kept"] < 0.5 < 0.8 < paths["rank 16"]["kept"]

# %% [markdown]
# How far may one generalise? One model of 1.3 million parameters, one task, one seed, one rate for each method, chosen by hand. What does
# carry over is the *way to ask*: never compare two methods by what they learned alone, and never at a single rate.
#
# > **Explain.** A colleague reports: "LoRA forgets less. At the same learning rate, full fine-tuning ruined the model and
# > LoRA did not." Which of the runs above should they see, and what is wrong with "the same rate"? Two sentences.

# %% [markdown]
# ## 5 · Merge, and prove it
#
# **Idea.** Two thin products at every layer cost time at every token. When training is over nobody needs them apart: multiply
# them out and add them to $W$. The result is a plain model, which any program can load.
#
# **Formula.** $\;W' = W + \frac{\alpha}{r} B A\;$, since $\;W x + \frac{\alpha}{r} B (A x) = \big(W + \frac{\alpha}{r} B A\big)\, x$.

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
    """The one matrix (D_out, D_in) that does what weight and adapter do together; `weight` itself stays."""
    ...


checks.check("05.4", my_merge)

# %%
merge = checks.or_library("05.4", my_merge)
layer = adapted.get_base_model().model.layers[0].mlp.up_proj
by_hand = merge(layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight, 32.0)
assert torch.allclose(by_hand, merged.model.layers[0].mlp.up_proj.weight, atol=1e-6)

# %% [markdown]
# One matrix agrees. Do all of them together? Eight programs that were never trained on, answered greedily by both:

# %%
prompts = [[{"role": "user", "content": row["instruction"]}] for row in load_rows(bundled("bugfix", "heldout.jsonl"))[:8]]
before = [c.token_ids for c in generate(adapted, tokenizer, prompts, max_new_tokens=24)]
after = [c.token_ids for c in generate(merged, tokenizer, prompts, max_new_tokens=24)]
print(f"{sum(map(len, before))} greedy tokens; merged model writes the same: {before == after}")
assert before == after

# %% [markdown]
# **Check, before you ship.** A merge is where trained weights get lost, so the library's `export_model` trusts nothing: it writes
# the folder, *reads it back*, and compares with the model in memory. Greedy tokens equal, logits within a hundred-thousandth of the
# largest, rows that nobody trained unchanged, a tied head still tied. If one of them fails, nothing is left on the disk.

# %%
with tempfile.TemporaryDirectory() as folder:
    report = export_model(adapted, tokenizer, f"{folder}/exported")
    print(f"{report.positions} greedy tokens checked, {report.rows} rows, tied: {report.is_tied}")
    plain = load_model(report.path)
    save_adapters(adapted, f"{folder}/adapters")
    loaded = load_adapters(stages.stage("base", preset=PRESET).model, f"{folder}/adapters")
assert [c.token_ids for c in generate(plain, tokenizer, prompts, max_new_tokens=24)] == before
assert [c.token_ids for c in generate(loaded, tokenizer, prompts, max_new_tokens=24)] == before

# %% [markdown]
# The last line loads the *adapters* on the base as shipped, which has never heard of the two tokens: their rows travel in the same small
# file. So one base can serve many adapters.

# %% [markdown]
# ## 6 · What goes wrong in practice
#
# **`modules_to_save` unties the head.** It is the answer most forums give for new tokens: train `embed_tokens` and `lm_head`
# whole. On a tied model it makes two matrices out of one, trains every row of both, and the file grows by a table.

# %%
from peft import LoraConfig, get_peft_model

settings = LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peft warns as well
    whole = get_peft_model(copy.deepcopy(start.model), settings)
two = add_adapters(copy.deepcopy(start.model), LoRAConfig(RANK), token_ids=new_ids)
print(f"{count_parameters(whole).trained:,} trained numbers, against {count_parameters(two).trained:,}")
is_tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
print("head still tied:", is_tied)
assert not is_tied

# %% [markdown]
# And `export_model` refuses it, since the config still says the two are one, and programs disagree on which to believe:

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
print("rows:", start.model.config.vocab_size, "→", shrunk.config.vocab_size)
try:
    add_adapters(shrunk, LoRAConfig(RANK), token_ids=new_ids)
except ValueError as error:
    print(error)

# %% [markdown]
# **The rows are forgotten.** Leave `token_ids` out, and the new tokens keep their first guess: part 4's half-way run again. With a
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
