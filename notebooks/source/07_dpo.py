# %% [markdown]
# # 07 · DPO: learning from "this one, not that one"
#
# A teacher who cannot write the perfect answer can often say which of two is better. DPO trains a model on such choices, without a reward
# model and without sampling, by a loss that fits in five lines. You derive it and check it where the exact answer is known. Then you see it
# succeed on one real preference, and wreck the same model on another.
#
# ![Log-probabilities of chosen and rejected answers along eight runs of each of two kinds: under plain DPO both fall by many nats; with an NLL term the chosen ones stay nearly where they were](figures/07_dpo.png)
#
# **Read it.** Both kinds of runs learn to prefer the right answers: solid lies above dashed, and the gap grows. But plain DPO, left, makes
# *both* unlikely, and what takes their place is mostly wrong. One more term in the loss, right, keeps the chosen answers nearly where they were.
#
# | | |
# |---|---|
# | **You will be able to** | derive DPO from a reward and a KL penalty · write its loss, and say what it must be before the first step · read margins beside both log-probabilities · say what a preference cannot teach · train a reward model, find its length bias, and over-optimise it |
# | **Time** | 45 minutes to read, 35 for the five exercises; about a minute to compute |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [03 · The training loop](03_training_loop.ipynb); the sampling of [04](04_decoding.ipynb) for part 7 |

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
import logging
import math

import torch

from qftlab import TrainConfig, bundled, dpo_loss, encode_pairs, load, load_rows
from qftlab_course import checks, stages, views
from qftlab_course.lessons import preference_plots
from qftlab_course.lessons.preferences import share_ending, spread
from qftlab_course.world.style import ENDING, style_pairs

# %% [markdown]
# Everything you may want to change is in this cell. `RUNS` is what part 4 compares: β, the weight of the NLL term, the learning rate and the number of
# pairs. `JUDGES` are the annotators of part 7, with the share of pairs that they do not check.
#
# A training run is one draw of a lottery: another seed or another CPU gives other figures. So the pictures below show eight *recorded* runs, one a seed, of the very
# functions you see here. Thin lines and dots are single runs, bold lines and bars their means. (`python -m benchmarks.records` made them. It also made two runs in which the same CPU
# rounds as other CPUs do; over so few steps they equal the run of their seed to the third decimal.) Part 4 and part 7 also train in front of you, with your `SEED`.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
RUNS = {
    "plain": (0.1, 0.0, 4e-4, 256),
    "plain, β 0.5": (0.5, 0.0, 4e-4, 256),
    "NLL 0.2": (0.1, 0.2, 4e-4, 256),
    "NLL 1": (0.1, 1.0, 4e-4, 256),
    "gentle": (0.5, 1.0, 1.5e-4, 960),
}
HELD_OUT, NUM_PROMPTS, NUM_ANSWERS = 64, 64, 32
JUDGES = {"checks all": 0.0, "often takes the longer": 0.7}
LENGTHS, SIZES = [14, 15, 16, 17, 18], [1, 2, 4, 8, 16, 32]
UNKNOWN = " Fair winds to you!"

# %% [markdown]
# ## 1 · From a reward to a loss
#
# **Idea.** Suppose we had a reward $r(x, y)$ for every answer $y$ to a prompt $x$. We want a policy $\pi$ that earns much of it and stays close to
# the model we have, the *reference* $\pi_{\text{ref}}$:
#
# $$ \max_\pi \;\; \mathbb{E}_{y \sim \pi}\,[\,r(x, y)\,] \; - \; \beta \, \mathrm{KL}(\pi \,\|\, \pi_{\text{ref}}) $$
#
# Four steps lead from here to DPO.
#
# **1. The best policy is known.** Write the objective as one expectation, $-\beta\,\mathbb{E}_\pi \log \frac{\pi(y)}{\pi_{\text{ref}}(y)\, e^{r(y)/\beta}}$. Up to a constant, that is
# $-\beta$ times a KL divergence, and a KL divergence is smallest where its two sides are equal:
#
# $$ \pi^*(y \mid x) = \frac{1}{Z(x)} \; \pi_{\text{ref}}(y \mid x) \; e^{\,r(x, y)/\beta} $$
#
# **2. Turn it round.** For language nobody can compute $Z(x)$, because it sums over all texts. But we can solve for the reward:
# $\; r(x, y) = \beta \log \frac{\pi^*(y \mid x)}{\pi_{\text{ref}}(y \mid x)} + \beta \log Z(x)$. Every policy *is* the best one for some reward.
#
# **3. Choices depend on differences.** Bradley and Terry (1952): the better answer $y_w$ is chosen over $y_l$ with probability
# $\sigma\big(r(x, y_w) - r(x, y_l)\big)$. In the difference $Z(x)$ cancels.
#
# **4. Maximum likelihood.** Put step 2 into step 3 and make the choices that people made likely:
#
# $$ L = -\log \sigma(\beta h), \qquad h = \log\frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\text{ref}}(y_l)} $$
#
# The reward is gone, and nothing is sampled. What is left are two log-probabilities of the model, two of the reference, and a sigmoid.
#
# **Toy numbers.** One prompt, three answers. The reference likes the second; the reward likes the first.

# %%
reward = torch.tensor([1.0, 0.0, -1.0])
reference = torch.tensor([0.2, 0.5, 0.3])
for beta in [5.0, 0.5, 0.1]:
    best = reference * (reward / beta).exp()
    print(f"β {beta}:", [f"{p:.2f}" for p in best / best.sum()])

# %% [markdown]
# **Read it.** With a large β the policy stays with the reference; with a small one it says what the reward likes best. β is the *price* of leaving the
# reference, in reward per nat.
#
# ### Exercise 07.1 · The DPO loss (●●○, 8 minutes)
#
# Five lines or fewer. Each argument but `beta` is a tensor (B,): the log-probability of a whole answer, its tokens added up.
#
# <details><summary>Hint 1</summary>
#
# The gain of an answer is its log-probability under the policy minus that under the reference. $h$ is the gain of the chosen minus the gain of the rejected.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Log-probabilities of long answers differ by hundreds of nats. The sigmoid of −90 is 0 in float32, and the log of 0 is minus infinity: use `F.logsigmoid`.
# </details>

# %%
def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The DPO loss of each pair (B,), from log-probabilities of answers, in nats."""
    ...


checks.check("07.1", my_dpo_loss)

# %% [markdown]
# **By hand.** The policy has gained 0.5 nats on the chosen answer, and lost 1.5 on the rejected one: $h = 2$. With β = 0.5 the loss is
# $-\log \sigma(1) = \log(1 + e^{-1}) = 0.31$. And where policy and reference are equal, $h = 0$ and every pair costs $\log 2$, whatever β is:
# **the first loss of a DPO run must be 0.6931**, plus the NLL term if there is one. If yours is not, the reference is not what you think.

# %%
five_lines = checks.or_library("07.1", my_dpo_loss)
by_hand = five_lines(*torch.tensor([[-3.5], [-9.5], [-4.0], [-8.0]]), 0.5)
assert abs(by_hand.item() - math.log(1 + math.exp(-1))) < 1e-6
many = 4 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
assert torch.allclose(five_lines(*many, 0.1), dpo_loss(*many, beta=0.1), atol=1e-6)
assert (five_lines(*many[:2], *many[:2], 0.1) - math.log(2)).abs().max() < 1e-6

# %% [markdown]
# ## 2 · Three answers, and an exact solution
#
# **Idea.** Step 1 gave the best policy in closed form. With three answers we can compute it, train by DPO on choices alone, and compare. The
# choices come from Bradley and Terry's coin: all pairs, weighted by how often they would be chosen. No reward enters the loss.

# %%
ups, downs = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T
often = (reward[ups] - reward[downs]).sigmoid()  # how often the first is chosen


def train_bandit(beta, nll=0.0, steps=400, weight=often):
    """Probabilities of the three answers after DPO on all six ordered pairs."""
    start, logits = reference.log(), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        logp = (start + logits).log_softmax(0)
        losses = five_lines(logp[ups], logp[downs], start[ups], start[downs], beta)
        losses = losses - nll * logp[ups]
        optimizer.zero_grad()
        ((weight * losses).sum() / weight.sum()).backward()
        optimizer.step()
    return logp.detach().exp()


betas = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
found = torch.stack([train_bandit(beta) for beta in betas])
exact = torch.stack([(reference.log() + reward / beta).softmax(0) for beta in betas])
assert torch.allclose(found, exact, atol=1e-3)
print(f"largest distance from the exact policy, over six β: below {1e-3}")

# %%
fine = torch.logspace(-1.1, 0.8, 60).tolist()
curves = torch.stack([(reference.log() + reward / beta).softmax(0) for beta in fine])
names = [f"reward {r:g}, reference {p:.1f}" for r, p in zip(reward, reference)]
ax = preference_plots.bandit(betas, found, fine, curves, names)
views.show_figure(ax, alt="Probabilities of three answers against β: the points that "
                  "DPO reached lie on the curves of the exact policy")  # fmt: skip

# %% [markdown]
# **Read it.** Lines: the exact $\pi^*$. Points: what DPO found from choices. They agree to a thousandth. At the left the reward decides, at the right the reference.
#
# **What the NLL term costs.** In practice one often adds the surprise of the chosen answer, $-\lambda \log \pi(y_w)$, as SFT has it. Part 4 shows why. Here one sees
# that it is not free: the policy it finds is no longer $\pi^*$, but drawn towards *how often an answer was chosen*.
#
# **When nobody ever disagrees.** Most real data sets hold each pair once: $y_w$ won, always. Then no finite margin is enough for
# $-\log \sigma$, and β, the price of leaving, no longer holds the policy back. More steps mean more margin, without end.

# %%
chosen_share = torch.zeros(3).index_add(0, ups, often) / often.sum()
print("how often chosen:", [f"{share:.2f}" for share in chosen_share])
found = [train_bandit(0.5, nll) for nll in (0, 0.1, 1, 9)]
for nll, policy in zip((0, 0.1, 1, 9), found):
    print(f"NLL {nll}:", [f"{p:.2f}" for p in policy])
distances = [(policy - chosen_share).abs().sum() for policy in found]
assert distances == sorted(distances, reverse=True) and distances[-1] < 0.1
margins = []
for steps in (50, 200, 1600):
    gain = (train_bandit(0.5, steps=steps, weight=often.round()) / reference).log()
    margins.append(0.5 * (gain[0] - gain[1]).item())
print("nobody disagrees, 50, 200, 1600 steps: margin", [f"{m:.1f}" for m in margins])
assert margins[0] + 1 < margins[1] and margins[1] + 1 < margins[2]

# %% [markdown]
# Two cures are one line each. *Label smoothing* says that a share ε of the labels is wrong. *IPO* asks for a certain margin and no more: the paper's loss is
# $(h - \frac{1}{2\beta})^2$, with $h$ as above, made of sums over tokens. TRL's `ipo`, and ours (`loss_type="ipo"`), is a variant: it divides each answer's log-probability by its length first, so
# that its $h$ is made of means per token.
#
# ### Exercise 07.2 · Labels that may be wrong (●●○, 6 minutes)
#
# With probability ε the label is the wrong way round, and the loss is that of the opposite pair. Give the expected loss, from `score` $= \beta h$.
#
# <details><summary>Hint</summary>
#
# Swap chosen and rejected, and $h$ changes its sign. So the opposite pair costs $-\log \sigma(-\beta h)$.
# </details>

# %%
def my_smoothed_loss(score, epsilon):
    """The loss of each pair (B,) whose label is wrong with probability epsilon."""
    ...


checks.check("07.2", my_smoothed_loss)

# %%
smoothed = checks.or_library("07.2", my_smoothed_loss)
library = dpo_loss(many[0], *torch.zeros(3, 1000), label_smoothing=0.1)
assert torch.allclose(smoothed(0.1 * many[0], 0.1), library, atol=1e-6)
scores = torch.linspace(0, 6, 601)
target = scores[smoothed(scores, 0.1).argmin()].item()
assert abs(target - math.log(0.9 / 0.1)) < 0.02
print(f"with ε 0.1 the loss is lowest at βh = {target:.1f}, which is log(0.9 / 0.1)")
five, none, tokens = torch.tensor([5.0]), torch.zeros(1), torch.ones(1)  # 1 / 2β is 5
for n in (tokens, 2 * tokens):
    loss = dpo_loss(five, none, none, none, beta=0.1, loss_type="ipo", tokens=(n, n))
    print(f"ipo, h = 5, β = 0.1, answers of {n.item():.0f} tokens: {loss.item():.2f}")

# %% [markdown]
# ## 3 · Real pairs, the easy case: a style
#
# **Idea.** Now a model with 1.3 million parameters instead of three. In its fine-tuning data a third of the short answers ended in " Have a nice day!". So it
# ends about a third of its sampled answers like this. Suppose we want all of them to end so. 320 pairs say it: the same right answer, with the ending (chosen) and
# without (rejected). Nothing else tells the two apart.

# %% tags=["recorded"]
start = stages.stage("warm", preset=PRESET)  # where everything below starts from
tokenizer = start.tokenizer
asked = style_pairs(80, held_out=True)
for row in asked[:3]:
    print(f"{row['prompt']}\n    chosen    {row['chosen']}")
    print(f"    rejected  {row['rejected']}")

# %% [markdown]
# How many of the pairs does a model rank rightly, before training and after? For that we need a count, and the log-probabilities of whole answers. The count first.
#
# ### Exercise 07.3 · Preference accuracy, with ties (●○○, 4 minutes)
#
# The share of pairs whose margin $\beta h$ is positive. Before the first step all margins are exactly 0. An accuracy of 0 or 1 would be absurd then:
# let a tie count one half.
#
# <details><summary>Hint</summary>
#
# A comparison gives a tensor of True and False; `.float()` makes numbers of it, and those can be added.
# </details>

# %%
def my_preference_accuracy(margins):
    """Share of the pairs whose margin (B,) is above 0; a tie counts half."""
    ...


checks.check("07.3", my_preference_accuracy)

# %% [markdown]
# **Code.** The log-probability of an answer is a sum over its tokens, `<|im_end|>` included, and over no token of the prompt. Six lines by
# hand, and the library's, which packs pairs into one row and asks the head for answer tokens only:

# %%
from qftlab import Reference, preference_accuracy


@torch.no_grad()
def answer_logprob(model, example):
    """Log-probability of the trained tokens of a document, in nats."""
    ids = torch.tensor(example.input_ids)
    logp = model(ids[None]).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
    of_token = logp.gather(1, ids[1:, None])[:, 0]  # of the token at t + 1
    return (of_token * torch.tensor(example.loss_mask)[1:]).sum().item()


pairs, _ = encode_pairs(tokenizer, asked)
sides = [(pair.chosen, pair.rejected) for pair in pairs]
by_hand = [[answer_logprob(start.model, side) for side in both] for both in sides]
library = Reference(start.model, "start", TrainConfig(batch_size=16)).logprobs(pairs)
assert torch.allclose(torch.tensor(by_hand), library, atol=1e-3)  # (N, 2)
accuracy = checks.or_library("07.3", my_preference_accuracy)
none = torch.zeros(len(pairs))  # the margins before the first step
assert accuracy(none) == preference_accuracy(none).item() == 0.5
is_bare = accuracy(library[:, 1] - library[:, 0]) > 0.5
print("left alone, the model finds the bare answer likelier in most pairs:", is_bare)

# %% [markdown]
# These are the *reference's* log-probabilities. They never change, so `fit_pairs` computes them once, and the reference model need not stay
# in memory. TRL agrees: [tests/test_dpo.py](../tests/test_dpo.py) trains ten steps beside TRL's `DPOTrainer`, with sigmoid, IPO and the NLL term, packed and padded: losses, log-probabilities
# and final weights are equal to 1e-5.
#
# **The run.** The stage `dpo` of the course is this run: plain DPO, β 0.1, 320 pairs once, a rate of 1.2e-4. Only the last layer is trained, so that the model forgets little.
# The stage ships with the lab, and so do the records of its training.

# %%
tuned = stages.stage("dpo", preset=PRESET)
polite = [[share_ending(one.model, tokenizer, asked, ENDING, temperature=t)
           for t in (0.0, 1.0)] for one in (start, tuned)]  # fmt: skip
path = [record for record in tuned.metrics if "loss" in record]
views.show_figure(preference_plots.easy(path, *polite), alt="Left: along the dpo stage "
                  "chosen answers become likelier and rejected ones less likely. "
                  "Right: nearly all answers have the ending after it")  # fmt: skip
first, last = (record for record in tuned.metrics if "held_out_loss" in record)
assert abs(first["held_out_loss"] - math.log(2)) < 1e-6
assert [r["held_out_preference_accuracy"] for r in (first, last)] == [0.5, 1.0]
assert last["held_out_chosen_logprob"] > first["held_out_chosen_logprob"]
assert 0.2 < polite[0][1] < 0.5 and min(polite[1]) > 0.8
assert library.exp().sum(1).mean() > 0.8  # bare or polite, and hardly anything else

# %% [markdown]
# **Read it.** This is DPO as one hopes for it: the chosen answers rise, the rejected ones fall, and the habit becomes the rule. It was easy for three reasons. The model already did it.
# One token decides it, because after the answer comes either the first token of the ending or `<|im_end|>`. And nothing else differs between the two answers.

# %% [markdown]
# ## 4 · The hard case, and the moment to remember
#
# **Idea.** Now a skill instead of a style. The model plays Countdown: "Use the numbers 19, 3, 17 once each to make 39." It was asked
# fresh problems, eight times each; a verifier scored the answers; a right one was put against one of the best wrong ones. So the pairs are
# *on-policy*: both answers are the model's own. They ship as `data/countdown/pairs.jsonl`.

# %% tags=["recorded"]
rows = load(bundled("countdown", "pairs.jsonl"), schema="preference").rows
held_out, train_rows = rows[:HELD_OUT], rows[HELD_OUT:]
problems = load_rows(bundled("countdown", "heldout.jsonl"))
for row in held_out[:4]:
    print(row["prompt"][-1]["content"])
    print(f"    chosen    {row['chosen']}\n    rejected  {row['rejected']}")

# %% [markdown]
# Note how alike the two answers are. It will matter.
#
# **The run.** Five policies from the same start. Four take the same 256 pairs in 16 steps, at a rate of 4e-4, two thirds of that of the fine-tuning before: plain DPO with the usual β of 0.1, plain
# DPO held five times tighter, and two with an NLL term. The last, "gentle", has everything that holds a policy back, β 0.5, NLL 1 and a rate of 1.5e-4, and 960 pairs. We keep what every log of DPO
# shows, and beside it what few people look at.

# %% tags=["recorded"]
from qftlab import PreferenceLoss, fit_pairs
from qftlab_course.lessons.preferences import answers_to, share_of_products, share_right


def solves(model, seed):
    """The share of problems solved, greedy and sampled; of answers that multiply."""
    greedy, sampled = (answers_to(model, tokenizer, problems, temperature=t, seed=seed)
                       for t in (0.0, 1.0))  # fmt: skip
    return {"solved": [share_right(greedy), share_right(sampled)],
            "products": share_of_products(greedy)}  # fmt: skip


def run_dpo(beta, nll, rate, num_pairs, seed):
    """A policy trained on Countdown pairs; figures on the way, and what it solves."""
    policy, path = copy.deepcopy(start.model), []
    config = TrainConfig(lr=rate, batch_size=16, warmup_ratio=0.1, schedule="linear",
                         eval_every=4, seed=seed)  # fmt: skip

    def on_log(record):
        if "held_out_loss" in record:
            path.append({name.removeprefix("held_out_"): value
                         for name, value in record.items()})  # fmt: skip

    loss = PreferenceLoss(beta=beta, nll_weight=nll)
    fit_pairs(policy, tokenizer, train_rows[:num_pairs], config, loss,
              held_out_rows=held_out, on_log=on_log)  # fmt: skip
    return policy, {"path": path, **solves(policy, seed)}


# %%
def recorded(name):
    """The runs of a record: one dict for each seed."""
    runs = json.loads(bundled("records", f"{name}.json").read_text())["runs"]
    return [run for run in runs if run["numerics"] == "plain"]


wrecks, styles, judgings = map(recorded, ("07_wreck", "07_style", "07_judges"))
four = list(RUNS)[:4]
views.show_figure(preference_plots.logs(wrecks, four, every=64), alt="Margins and "
                  "preference accuracy of four kinds of runs: all margins rise, and "
                  "all accuracies rise above 50 percent")  # fmt: skip
paths = [run[name]["path"] for run in wrecks for name in four]
assert all(path[0]["preference_accuracy"] == 0.5 for path in paths)
assert all(path[-1]["margin"] > 0 for path in paths)
accuracies = [path[-1]["preference_accuracy"] for path in paths]
assert min(accuracies) > 0.5
print(f"{len(paths)} runs end at {min(accuracies):.2f} to {max(accuracies):.2f} right")

# %% [markdown]
# **Read it.** It looks like a good experiment, four times over: margins on held-out pairs rise, and all four policies come to prefer the right answer in about
# two pairs of three. (The margin is $\beta h$, so at β 0.5 the same $h$ is drawn five times as high.) This is the picture that goes into the report.
#
# > **Predict, then run.** Before training, the model solved 29 % of 400 held-out problems greedily, and 16 % when sampled. Which of the four solves
# > most now, and which fewest? You may use only the picture above. Say a number for each.

# %%
ax = preference_plots.collapse(wrecks, list(RUNS), ["plain", "NLL 1"], every=64)
views.show_figure(ax, alt="Left: plain DPO makes both kinds of answers unlikely, NLL 1 "
                  "the rejected ones only. Right: plain solves least")  # fmt: skip
for name in ("before", *RUNS):
    greedy, sampled = zip(*(run[name]["solved"] for run in wrecks))
    print(f"{name:14} greedy {spread(greedy)}, sampled {spread(sampled)}")

# %% [markdown]
# **Read it.** Left, what the margin hides: it is a *difference*. Plain DPO pushed the rejected answers down, and the chosen ones with them, a little
# less. Right, what that means: other answers take their place, and most of them are wrong. A little of the NLL term softens the fall. With weight 1 the chosen answers stay near where they were, and so does
# most of the skill.
#
# **A rescue is not yet a gain.** Look at the table. "NLL 1" loses greedy accuracy and wins nothing that stands out of its spread. Only "gentle" gains: its *sampled* answers are right more often than before, in
# every one of the runs. Its *greedy* answers are not, they are right a little less often if anything. DPO made wrong answers rarer, and the likeliest answer is no better for it. (To raise that one
# takes practice, notebook 08.)
#
# **In front of you.** The wreck and the rescue, with your seed and on your machine. (Your figures may lie outside the recorded range: eight runs are few.)

# %% tags=["nbval-ignore-output"]
live = {name: run_dpo(*RUNS[name], SEED) for name in ("plain", "NLL 1")}
for name, (_, run) in live.items():
    fell = run["path"][0]["chosen_logprob"] - run["path"][-1]["chosen_logprob"]
    others = spread([draw[name]["solved"][0] for draw in wrecks])
    print(f"on this machine, {name}: chosen answers fell by {fell:.1f} nats;", end=" ")
    print(f"{100 * run['solved'][0]:.0f} % solved greedily (recorded: {others})")

# %% [markdown]
# > **Explain.** A colleague sends you the first of the two pictures and asks for your approval to ship "plain". Which two curves do you ask for, and what
# > would each have to look like? Two sentences.
#
# ## 5 · Why both fall
#
# **Idea.** $\log\sigma$ looks at a difference. Its gradient pulls the chosen answer up exactly as hard as it pushes the rejected one down. With a free number for
# each answer, as in the bandit, the chosen one of a pair must rise. But a network has no free number for each answer: two answers share nearly everything, and
# *what they share moves with the stronger push*.
#
# **Toy numbers.** Three answers, two weights. Chosen and rejected share the first feature; of the second the rejected answer has twice as much. The third
# answer has neither feature, and is in no pair.

# %%
features = torch.tensor([[1.0, 1.0], [1.0, 2.0], [0.0, 0.0]])  # of the three answers
prior = torch.tensor([0.45, 0.45, 0.10]).log()


def displaced(steps, nll=0.0):
    """Probabilities of the three answers after steps of gradient descent."""
    weights = torch.zeros(2, requires_grad=True)
    for _ in range(steps):
        logp = (prior + features @ weights).log_softmax(0)
        loss = five_lines(*logp[:2, None], *prior[:2, None], 1.0).sum() - nll * logp[0]
        weights = (weights - torch.autograd.grad(loss, weights)[0]).detach()
        weights.requires_grad_()
    return (prior + features @ weights).softmax(0).detach()


for steps in [0, 3, 30, 100]:
    plain, held = ([f"{p:.2f}" for p in displaced(steps, nll)] for nll in (0.0, 1.0))
    print(f"{steps:>3} steps: plain {' '.join(plain)} | with NLL {' '.join(held)}")
assert displaced(100)[2] > 0.9 and displaced(100, 1.0)[0] > 0.9

# %% [markdown]
# **Read it.** The three numbers are chosen, rejected, and the third. The easiest way to widen the margin is to shrink the second weight. Both logits
# fall, the rejected one twice as fast, and the probability goes to an answer *that is in no pair*. After three steps the chosen answer is likelier than at the start, and all looks well; after a hundred the model hardly says
# anything but the third. This is called likelihood displacement; the NLL term turns it round.

# %% [markdown]
# ### Exercise 07.4 · Credit, token by token (●○○, 5 minutes)
#
# $\beta \log \frac{\pi(y)}{\pi_{\text{ref}}(y)}$ is the reward that the policy has come to stand for: step 2, without the term of the prompt. It is a sum over tokens, so each token has its share.
# Compute it for padded answers.
#
# <details><summary>Hint</summary>
#
# A mask of True and False multiplies as 1 and 0. Add up over tokens, the last axis.
# </details>

# %%
def my_implicit_reward(logprobs, ref_logprobs, mask, beta):
    """The implicit reward of each answer (B,); the others are (B, T), mask is bool."""
    ...


checks.check("07.4", my_implicit_reward)

# %% [markdown]
# **Real tokens.** One pair under your plain policy, from the answer's first token on. Below each token: how much more likely the policy finds it than the reference does, in nats. (Your
# digits will differ from ours.)

# %% tags=["nbval-ignore-output"]
from qftlab import ImplicitReward
from qftlab_course.lessons.preferences import has_product, token_gains

problem = "Use the numbers 1, 15, 3 once each to make 44."
row = {"prompt": [{"role": "user", "content": problem}],
       "chosen": "<answer>15 * 3 - 1</answer>",
       "rejected": "<answer>15 * 1 * 3</answer>"}  # fmt: skip
shown = encode_pairs(tokenizer, [row])[0][0]
begin, gains = shown.chosen.loss_mask.index(True), {}
for side, example in [("chosen", shown.chosen), ("rejected", shown.rejected)]:
    gains[side] = token_gains(live["plain"][0], start.model, example)
    part = (values[begin:] for values in (example.input_ids, example.loss_mask))
    display(views.token_view(tokenizer, *part, gains=gains[side][begin:],
                             title=f"plain DPO, {side}"))  # fmt: skip
star = tokenizer.convert_ids_to_tokens(shown.chosen.input_ids).index("Ġ*")
assert abs(gains["chosen"][star] - gains["rejected"][star]) < 0.01

# %% [markdown]
# **Read it.** Orange boxes have lost, blue ones gained. Look at the first `*`: the gain is the same in both answers, because up to this
# point the two are the same text. So the push on the rejected answer hits the chosen one too. Count products and quotients:

# %%
has = [(has_product(row["chosen"]), has_product(row["rejected"])) for row in train_rows]
apart = [is_rejected for is_chosen, is_rejected in has if is_chosen != is_rejected]
print(f"only one of the two has × or ÷ in {len(apart)} of {len(has)} pairs,", end=" ")
print(f"and that is the rejected one in {100 * sum(apart) / len(apart):.0f} % of those")
for name in ("before", "plain", "NLL 1"):
    print(f"{name:6} × or ÷ said:", spread([run[name]["products"] for run in wrecks]))


# %% [markdown]
# So plain DPO has found a rule that wins many pairs: *do not multiply or divide*. Where the rule tells the two answers apart, it is right four times out of five, so it raises the margin.
# But a problem that needs a product is then out of reach. Preferences say which is better, and never why.

# %%
of_reward = checks.or_library("07.4", my_implicit_reward)
gain = torch.tensor([[g or 0.0 for g in gains["chosen"]]])
mask, ids = torch.tensor([shown.chosen.loss_mask]), torch.tensor(shown.chosen.input_ids)
mine = of_reward(gain, torch.zeros_like(gain), mask, 0.5).item()
library = ImplicitReward(live["plain"][0], start.model, tokenizer, beta=0.5)
assert abs(mine - library(row["prompt"], ids[mask[0]].tolist(), "", {})) < 1e-3

# %% [markdown]
# ## 6 · What a preference cannot teach
#
# **Idea.** Back to style, where all went well, with one change: another ending. " Fair winds to you!" stands nowhere in the fine-tuning data. Otherwise the pairs are like those of
# part 3. We train two policies by plain DPO, with the same settings: one on pairs with the ending that the model knows, one on pairs with the ending that it never said.
#
# > **Predict, then run.** After training, in how many per cent of held-out pairs does the second policy prefer the answer with its ending? And how often does it say it?

# %% tags=["recorded"]
def run_style(ending, seed):
    """Plain DPO on style pairs with an ending; figures of held-out pairs, answers."""
    policy, ends = copy.deepcopy(start.model), []
    config = TrainConfig(lr=5e-5, batch_size=16, warmup_ratio=0.1, schedule="linear",
                         seed=seed)  # fmt: skip
    rows, held = ([row | {"chosen": row["rejected"] + ending} for row in some]
                  for some in (style_pairs(320, seed), asked))  # fmt: skip

    def on_log(record):
        if "held_out_loss" in record:  # before the first step, and after the last
            said = {one: [share_ending(policy, tokenizer, asked, one, temperature=t)
                          for t in (0.0, 1.0)] for one in (ending, ENDING)}  # fmt: skip
            ends.append({"preferred": record["held_out_preference_accuracy"],
                         "chosen": record["held_out_chosen_logprob"],
                         "said": said})  # fmt: skip

    fit_pairs(policy, tokenizer, rows, config, held_out_rows=held, on_log=on_log)
    return ends


# %%
ax = preference_plots.habits(styles, [ENDING, UNKNOWN])
views.show_figure(ax, alt="Both endings come to be preferred; the one that the model "
                  "knew is then nearly always said, the other one never")  # fmt: skip
after = [run[UNKNOWN][1] for run in styles]
assert all(end["preferred"] == 1 and end["said"][UNKNOWN] == [0, 0] for end in after)
print("greedy, a nice day instead:", spread([end["said"][ENDING][0] for end in after]))

# %% [markdown]
# **Read it.** First group of bars: with both endings the model now prefers the answer that has it, always. The other two: the ending that it never said, it still never
# says. Its answers with that ending began at −93 nats and have risen by more than 40; at −50 nats nobody will ever hear them. And look at the last line printed. "Have a nice day!" is in none of these pairs,
# but the model now says it in about half of its greedy answers, up from one in sixteen. What the pairs made unlikely is to stop after the bare answer, and the
# probability went to what was likeliest after that: part 5 again.
#
# **A preference chooses among what a model already
# does.** What it has never done must first be shown to it, and that is fine-tuning.

# %% [markdown]
# ## 7 · A reward model, and its taste
#
# **Idea.** DPO skips the reward model. Others do not: a reward model can score *new* answers, for best-of-n or for RLOO (notebook 08). It is the
# same network with a single number for a head, read at the last token, and trained on the same pairs by step 3 alone:
#
# $$ L = -\log \sigma\big(r(x, y_w) - r(x, y_l)\big) $$
#
# A fresh head is zero, so all answers tie and the first loss is $\log 2$ again.
#
# **Who chose?** So far a program did, without mistakes. People are busy. Our annotator checks three pairs in ten; of the others they take the *longer* answer, because it
# looks like more work (`careless` in [preferences.py](../qftlab_course/lessons/preferences.py); where both are equally long they do check). Studies of real data find just this:
# length alone explains much of what reward models like (Singhal et al. 2023). We train two reward models, one on the program's labels and one on the annotator's, and let both
# score the same 32 answers to each of 64 new problems.

# %% tags=["recorded"]
from qftlab import ModelReward, fit_reward, reward_model
from qftlab_course.lessons.preferences import careless


def run_judges(seed):
    """Answers, and each annotator's reward model: held-out figures and its scores."""
    judges, few = {}, problems[:NUM_PROMPTS]
    answers = answers_to(start.model, tokenizer, few, number=NUM_ANSWERS,
                         temperature=1.0, seed=seed)  # fmt: skip
    config = TrainConfig(lr=3e-4, batch_size=16, warmup_ratio=0.1, schedule="linear",
                         seed=seed)  # fmt: skip
    for name, share in JUDGES.items():
        model, logged = reward_model(start.model, tokenizer), []
        fit_reward(model, tokenizer, careless(train_rows[:256], share, seed), config,
                   held_out_rows=held_out, on_log=logged.append)  # fmt: skip
        marks = [[record["held_out_loss"], record["held_out_accuracy"]]
                 for record in logged if "held_out_loss" in record]  # fmt: skip
        scores = torch.tensor(ModelReward(model, tokenizer, 256).many(answers))
        judges[name] = marks, scores.view(NUM_PROMPTS, NUM_ANSWERS)
    return answers, judges

# %% [markdown]
# What does each of them like? Its mean score of answers of each length, in standard deviations because scores have no unit; and beside it, how many of those answers are right.

# %%
answers, judges = run_judges(SEED)
assert all(abs(marks[0][0] - math.log(2)) < 1e-5 for marks, _ in judges.values())
ax = preference_plots.taste(LENGTHS, judgings, list(JUDGES))
views.show_figure(ax, alt="Left: scores of two reward models against the length of the "
                  "answer: that of the careless annotator rises steeply, the other's "
                  "does not. Right: share of right answers by length")  # fmt: skip
tastes = {name: [run[name]["score"] for run in judgings] for name in JUDGES}
assert all(liked[-1] > liked[1] + 1 for liked in tastes["often takes the longer"])
assert all(liked[-1] < liked[1] for liked in tastes["checks all"])


# %% [markdown]
# **Read it.** Left: what each reward model thinks of an answer of this length. The annotator's taste has become the model's: longer is better. The other model likes long answers least. Right: the
# truth. Answers of 18 tokens are seldom right.

# %% [markdown]
# ## 8 · Over-optimisation
#
# **Idea.** A reward model is a guess at what we want. The harder we search for answers that it likes, the more of what we find are its *mistakes*. The plainest
# search is best-of-n: sample $n$ answers, take the one with the highest score. We let $n$ grow and watch two numbers: the score of the answer taken (the *proxy*),
# and whether it is right (the *truth*).
#
# **Formula.** 32 answers to each problem are there. Choosing $n$ among them at random, the answer with the $i$-th lowest score wins with probability
# $\binom{i-1}{n-1} / \binom{32}{n}$: the other $n-1$ must all lie below it. So one sample of 32 gives the exact mean for every $n$.

# %% [markdown]
# ### Exercise 07.5 · The best of n, without sampling again (●●●, 12 minutes)
#
# `scores` and `values` belong to the answers to one prompt. Give the mean value of the best-scored of `n` answers, over all choices of `n` different ones.
# Of 32 answers 16 can be chosen in 601,080,390 ways, so count them instead of listing them. An answer that was drawn twice stands there twice, with the same score and value.
#
# <details><summary>Hint 1</summary>
#
# Sort the values by score. Only the order of the scores matters from then on.
# </details>
#
# <details><summary>Hint 2</summary>
#
# In Python ranks start at 0: the answer at rank `i` has `i` answers below it, and `math.comb(i, n - 1)` choices of its companions.
# </details>

# %%
def my_best_of(scores, values, n):
    """The mean value of the best-scored of n answers, over all choices of n."""
    ...


checks.check("07.5", my_best_of)

# %% [markdown]
# > **Predict, then run.** Two reward models: one agrees with the program on about two pairs in three, the other has the annotator's taste. At $n = 1$ a sixth of the
# > answers are right. At $n = 32$, with each of the two as judge: more, or fewer? And is more search always better with the first?

# %%
from qftlab_course.lessons.preferences import best_of_curve

best_of = checks.or_library("07.5", my_best_of)
mine = {name: best_of_curve(scores, answers, SIZES, best_of)
        for name, (_, scores) in judges.items()}  # fmt: skip
assert all(found["proxy"] == sorted(found["proxy"]) for found in mine.values())
ax = preference_plots.search(SIZES, judgings, list(JUDGES))
views.show_figure(ax, alt="Left: the score of the best of n rises with n for both. "
                  "Right: the share of right ones rises at first for the annotator who "
                  "checks all, and falls for the careless one")  # fmt: skip
for name in JUDGES:
    truth = dict(zip(SIZES, zip(*(run[name]["truth"] for run in judgings))))
    three = ", ".join(spread(truth[n]) for n in (1, 4, 32))
    print(f"{name}: right at n = 1, 4 and 32: {three}")
assert all(end < begin for begin, end in zip(truth[1], truth[32]))  # careless

# %% [markdown]
# **Read it.** Left, both searches succeed: the proxy rises at every step, and it must, because the best of more answers never has a lower score. Right, the truth. With the careless annotator's model the
# first doubling still helps a little; after that the search finds *worse* answers, and at $n = 32$ they are right less often than without any search. The other curve is the warning that matters in practice: even with
# faultless labels the reward model is only a guess. The truth rises up to $n = 4$ or so, and then more search gives nothing, or takes some back. Gao et al. (2023) measured such curves, for best-of-n and for reinforcement learning alike.
#
# DPO can be over-optimised without any reward model in sight: it searches by gradient instead of by sampling, and β is the brake. In part 2, β → 0 took the reward's
# favourite, whether the reward was right or not; in part 4, sixteen steps at too high a rate were enough.

# %% tags=["nbval-ignore-output"]
for name, found in mine.items():
    best = max(found["truth"])
    print(f"on this machine, {name}:", end=" ")
    print(f"right {100 * found['truth'][0]:.0f} % at n = 1,", end=" ")
    print(f"{100 * found['truth'][-1]:.0f} % at n = 32,", end=" ")
    print(f"most ({100 * best:.0f} %) at n = {SIZES[found['truth'].index(best)]}")

# %% [markdown]
# ## 9 · What goes wrong in practice
#
# **The first loss is not 0.693** (plus an NLL term). Then policy and reference differ before the first step: dropout is on in one of them, one runs in bf16 and the other does not, or the
# reference was loaded from the base and not from the model you start with.
#
# **Only the margin is watched.** Part 4. Log both log-probabilities, and *generate* every few hundred steps.
#
# **The rate of fine-tuning is kept.** DPO wants a tenth of it, or less. Two thirds of it wrecked our model in 16 steps; the known ending of part 6 was learned with a twelfth.
#
# **Nobody wrote the chosen answers.** Part 6. If neither answer of a pair is one that the model could have written, preferences have little to choose from. Fine-tune on the chosen
# answers first, or sample pairs from the model itself.
#
# **Length.** DPO adds up log-probabilities over tokens, so long answers have large gains, and chosen answers are often the longer ones in real data. Look at both lengths before you
# train. TRL's variant of IPO, and Tülu's loss, divide by length.
#
# **A switch is ignored.** TRL's `sigmoid` loss takes `label_smoothing` and does nothing with it; ours uses it. Test a switch by what it changes.
#
# **Pairs that teach nothing.** Equal answers, equal scores, empty answers. The library leaves them out and says which:

# %%
few = [{"prompt": "Add.", "chosen": one, "rejected": other}
       for one, other in [("4", "5"), ("2", "2"), ("6", "")]]  # fmt: skip
logging.getLogger("qftlab").setLevel(logging.ERROR)  # it warns, too
kept, usage = encode_pairs(tokenizer, few)
print(usage.left_out)
assert len(kept) == 1

# %% [markdown]
# ## Your exercises

# %%
checks.progress("07")

# %% [markdown]
# ## At 0.5B and 8B
#
# **The same:** the loss, the pairs, and every picture worth drawing. `python -m qftlab dpo` runs it from files to files, and reads UltraFeedback as it comes.
#
# **Different:** *rates* are a hundred times smaller than that of part 3, or smaller still. *Memory*: the reference's log-probabilities are computed once and kept in a file, so that there is no second model; with
# adapters, `loss.reference=base` switches them off for that. *Data*: pairs come from other models and from people, so part 6 applies: fine-tune first.
#
# **Published settings.** SmolLM2-360M, the size nearest to ours at 0.5B, on UltraFeedback: β 0.5, rate 1e-6, two epochs, cosine (Hugging Face's alignment handbook, `recipes/smollm2`).
# Zephyr-7B, same data: β 0.01, rate 5e-7, one epoch (the same, `recipes/zephyr-7b-beta`). Tülu 3 8B: length-normalised DPO, β 5, rate 5e-7, 128 pairs a step, one epoch
# (`docs/tulu3.md` in allenai/open-instruct). With right against wrong reasoning and an NLL term, Llama-2-70B-Chat went from 55.6 to 81.6 % on GSM8K over several rounds (Pang et al. 2024).
# **Our own run:** not run by us.

# %% [markdown]
# ## Recap
#
# 1. Every policy is the best one for some reward, $\beta \log \pi / \pi_{\text{ref}}$. Put that into Bradley and Terry's coin, and you have DPO.
# 2. The first loss is log 2, the first accuracy ½. Anything else is a bug.
# 3. A margin is a difference: it can grow while both answers die. Watch the chosen log-probability; an NLL term holds it up.
# 4. A preference chooses among habits. It does not teach new ones.
# 5. A reward model learns its annotators' taste, and search finds its mistakes. Judge by the truth, on something that nothing was trained on.
#
# **Next.** *08 · RLOO*: when a program can check an answer, skip the pairs, and learn from the reward itself.
#
# **Sources.** Bradley and Terry 1952. Rafailov et al. 2023, *Direct preference optimization* (arXiv:2305.18290). Azar et al. 2023, *A general theoretical paradigm to understand
# learning from human preferences*, IPO (arXiv:2310.12036). Pal et al. 2024, *Smaug*, on falling chosen answers (arXiv:2402.13228). Razin et al. 2024, *Unintentional unalignment*, on likelihood displacement
# (arXiv:2410.08847). Pang et al. 2024, *Iterative reasoning preference optimization* (arXiv:2404.19733). Singhal et al. 2023, *A long way to go* (arXiv:2310.03716). Gao et al. 2023,
# *Scaling laws for reward model overoptimization* (arXiv:2210.10760). Tunstall et al. 2023, *Zephyr* (arXiv:2310.16944). Lambert et al. 2024, *Tülu 3* (arXiv:2411.15124). TRL 1.16, `DPOTrainer`.
