# %% [markdown]
# # 07 · DPO: learning from "this one, not that one"
#
# A teacher who cannot write the perfect answer can often say which of two is better. DPO trains a model on such choices, without a reward
# model and without sampling, by a loss that fits in five lines. You derive it, check it where the exact answer is known, and then
# watch it do on a real model what its loss allows and nobody wanted.
#
# ![Log-probabilities of chosen and rejected answers along two runs: under plain DPO both fall, and greedy accuracy with them; with an NLL term the chosen ones stay up](figures/07_dpo.png)
#
# **Read it.** Both runs learn to prefer the right answers: solid above dashed, further and further. But plain DPO, left, does so by making
# *both* unlikely, and then says neither. One more term in the loss, right, keeps the chosen answers near where they were.
#
# | | |
# |---|---|
# | **You will be able to** | derive DPO from a reward and a KL penalty · write its loss, and say what it must be before the first step · read margins beside both log-probabilities · say what a preference cannot teach · train a reward model, find its length bias, and over-optimise it |
# | **Time** | 40 minutes to read, 35 for the five exercises; two minutes to compute, once, and five if no stage is there yet |
# | **Hardware** | one CPU core. No GPU, no network |
# | **Before this** | [03 · The training loop](03_training_loop.ipynb); the sampling of [04](04_decoding.ipynb) for part 6 |

# %% tags=["setup"]
import sys

if "google.colab" in sys.modules:  # on Colab only: fetch the library, leave torch and transformers as they are
    REPO = "OWNER/qftlab"
    get_ipython().run_line_magic("pip", f"install -q --no-deps git+https://github.com/{REPO}")
    get_ipython().run_line_magic("pip", "install -q jsonargparse")

# %%
import copy
import logging
import math

import torch

from qftlab.core.losses import dpo_loss, preference_accuracy
from qftlab.core.sampling import SamplingParams
from qftlab.data.batching import Example
from qftlab.data.bundled import bundled
from qftlab.data.sources import load, load_rows
from qftlab.data.style import is_polite, style_pairs
from qftlab.generate.engine import generate
from qftlab.teach import checks, preference_plots, stages, views
from qftlab.teach.preferences import (
    answers_to, careless, has_product, is_right, share_of_products, share_right, token_gains,
)  # fmt: skip
from qftlab.text.chat import render_prompt
from qftlab.train.config import TrainConfig
from qftlab.train.dpo import fit_pairs
from qftlab.train.pair_rows import encode_pairs
from qftlab.train.preference_config import PreferenceLoss
from qftlab.train.reference import Reference
from qftlab.train.reward import ImplicitReward, ModelReward, fit_reward, reward_model
from qftlab.train.sft import fit_rows

# %% [markdown]
# Everything you may want to change is in this cell. `RUNS` is what part 3 compares: β and the weight of the NLL term. `CARELESS` is the share of pairs that
# the annotator of part 6 does not check.

# %% tags=["parameters"]
PRESET = "tiny"
SEED = 0
RATE = 4e-4
NUM_PAIRS, HELD_OUT = 256, 64
RUNS = {"plain": (0.1, 0.0), "plain, β 0.5": (0.5, 0.0), "NLL 0.2": (0.1, 0.2), "NLL 1": (0.1, 1.0)}
NUM_PROMPTS, NUM_ANSWERS = 64, 32
CARELESS = 0.7

# %% [markdown]
# ## 1 · From a reward to a loss
#
# **Idea.** Suppose we had a reward $r(x, y)$ for every answer $y$ to a prompt $x$. We want a policy $\pi$ that earns much of it and does not
# run away from the model we have, the *reference* $\pi_{\text{ref}}$:
#
# $$ \max_\pi \;\; \mathbb{E}_{y \sim \pi}\,[\,r(x, y)\,] \; - \; \beta \, \mathrm{KL}(\pi \,\|\, \pi_{\text{ref}}) $$
#
# Four steps lead from here to DPO.
#
# **1. The best policy is known.** Write the objective as one expectation, $-\beta\,\mathbb{E}_\pi \log \frac{\pi(y)}{\pi_{\text{ref}}(y)\, e^{r(y)/\beta}}$. That is
# $-\beta$ times a KL divergence, but for a constant. It is largest where the two are equal:
#
# $$ \pi^*(y \mid x) = \frac{1}{Z(x)} \; \pi_{\text{ref}}(y \mid x) \; e^{\,r(x, y)/\beta} $$
#
# **2. Turn it round.** For language nobody can compute $Z(x)$: it sums over all texts. But we can solve for the reward:
# $\; r(x, y) = \beta \log \frac{\pi^*(y \mid x)}{\pi_{\text{ref}}(y \mid x)} + \beta \log Z(x)$. Every policy *is* the best one for some reward.
#
# **3. Choices depend on differences.** Bradley and Terry (1952): the better answer $y_w$ is chosen over $y_l$ with probability
# $\sigma\big(r(x, y_w) - r(x, y_l)\big)$. In the difference $Z(x)$ cancels.
#
# **4. Maximum likelihood.** Put step 2 into step 3 and make the choices that people made likely:
#
# $$ L = -\log \sigma(\beta h), \qquad h = \log\frac{\pi(y_w)}{\pi_{\text{ref}}(y_w)} - \log\frac{\pi(y_l)}{\pi_{\text{ref}}(y_l)} $$
#
# No reward is left in it, and nothing is sampled. Two log-probabilities of the model, two of the reference, one sigmoid.

# %% [markdown]
# **Toy numbers.** One prompt, three answers. The reference likes the second; the reward likes the first.

# %%
reward = torch.tensor([1.0, 0.0, -1.0])
reference = torch.tensor([0.2, 0.5, 0.3])
for beta in [5.0, 0.5, 0.1]:
    best = reference * (reward / beta).exp()
    print(f"β {beta}:", [f"{p:.2f}" for p in best / best.sum()])

# %% [markdown]
# **Read it.** A large β stays with the reference, a small one takes the reward's favourite. β is the *price* of leaving, in reward per nat.
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
# Log-probabilities of long answers differ by hundreds of nats. The sigmoid of −90 is 0 in float32, and its log is minus infinity: use `F.logsigmoid`.
# </details>

# %%
def my_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The DPO loss of each pair (B,), from log-probabilities of whole answers (B,) in nats."""
    ...


checks.check("07.1", my_dpo_loss)

# %% [markdown]
# **By hand.** The policy has gained 0.5 nats on the chosen answer, and lost 1.5 on the rejected one: $h = 2$. With β = 0.5 the loss is
# $-\log \sigma(1) = \log(1 + e^{-1}) = 0.31$. And where policy and reference are equal, $h = 0$ and every pair costs $\log 2$, whatever β is:
# **the first loss of a DPO run must be 0.6931.** If yours is not, the reference is not what you think.

# %%
five_lines = checks.or_library("07.1", my_dpo_loss)
logprobs = [torch.tensor([x]) for x in (-3.5, -9.5, -4.0, -8.0)]  # chosen, rejected, and both under the reference
assert abs(five_lines(*logprobs, 0.5).item() - math.log(1 + math.exp(-1))) < 1e-6
many = [4 * torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
assert torch.allclose(five_lines(*many, 0.1), dpo_loss(*many, beta=0.1), atol=1e-6)
same = five_lines(many[0], many[1], many[0], many[1], 0.1)
assert torch.allclose(same, torch.full_like(same, math.log(2)), atol=1e-6)
print(f"by hand as the library, on 1,000 pairs; policy = reference costs {same.mean():.4f}")

# %% [markdown]
# ## 2 · Three answers, and an exact solution
#
# **Idea.** Step 1 gave the best policy in closed form. With three answers we can compute it, train by DPO on choices alone, and compare. The
# choices come from Bradley and Terry's coin: all pairs, weighted by how often they would be chosen. No reward enters the loss.

# %%
def train_bandit(beta, nll=0.0, steps=400, are_sure=False):
    """Probabilities of the three answers after DPO on all six ordered pairs."""
    chosen, rejected = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T
    gap = reward[chosen] - reward[rejected]
    weight = (gap > 0).float() if are_sure else gap.sigmoid()  # how often this order is chosen
    start, logits = reference.log(), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        logp = (start + logits).log_softmax(0)
        losses = five_lines(logp[chosen], logp[rejected], start[chosen], start[rejected], beta) - nll * logp[chosen]
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
names = ["reward 1, reference 0.2", "reward 0, reference 0.5", "reward −1, reference 0.3"]
ax = preference_plots.bandit(betas, found, fine, curves, names)
views.show_figure(ax, alt="Probabilities of three answers against β: the points that DPO reached lie on the curves of the exact policy; "
                  "at small β nearly all is on the answer of reward 1, at large β they near the reference")

# %% [markdown]
# **Read it.** Lines: the exact $\pi^*$. Points: what DPO found from choices. They agree to a thousandth. Left the reward rules, right the reference.
#
# **What the NLL term costs.** In practice one often adds the surprise of the chosen answer, $-\lambda \log \pi(y_w)$, as SFT has it. Part 3 shows why. Here one sees
# that it is not free: the policy it finds is no longer $\pi^*$, but drawn towards *how often an answer was chosen*.
#
# **When nobody ever disagrees.** Real data sets hold each pair once: $y_w$ won, always. Then no finite margin is enough for
# $-\log \sigma$, and β, which stood for the price of leaving, has no hold any more. More steps mean more margin, without end.

# %%
for nll in [0.0, 0.1, 1.0]:
    print(f"NLL {nll}:", [f"{p:.2f}" for p in train_bandit(0.5, nll)])
for steps in [50, 200, 1600]:
    print(f"nobody disagrees, {steps:>4} steps:", [f"{p:.4f}" for p in train_bandit(0.5, steps=steps, are_sure=True)])

# %% [markdown]
# Two cures are one line each. *Label smoothing* says that a share ε of the labels is wrong. *IPO* (`loss_type="ipo"`) asks for a certain margin, $(h' - \frac{1}{2\beta})^2$, and no more; its $h'$ is
# made of means per token.

# %% [markdown]
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
    """The loss of each pair (B,) whose label is the wrong way round with probability epsilon; score = beta · h."""
    ...


checks.check("07.2", my_smoothed_loss)

# %%
smoothed = checks.or_library("07.2", my_smoothed_loss)
zero = torch.zeros(1000)
assert torch.allclose(smoothed(0.1 * many[0], 0.1), dpo_loss(many[0], zero, zero, zero, label_smoothing=0.1), atol=1e-6)
scores = torch.linspace(0, 6, 601)
target = scores[smoothed(scores, 0.1).argmin()].item()
print(f"with ε 0.1 the loss is lowest at βh = {target:.1f}, which is log(0.9 / 0.1) = {math.log(9):.1f}")
assert abs(target - math.log(9)) < 0.02

# %% [markdown]
# ## 3 · Real pairs, and the moment to remember
#
# **Idea.** Now a model with 1.3 million parameters instead of three. It plays Countdown: "Use the numbers 11, 16, 2 once each to make 29." It was asked
# fresh problems, eight times each; a verifier scored the answers; a right one was put against one of the best wrong ones. So the pairs are
# *on-policy*: both answers are the model's own. A few of such a set:
#
# | prompt | chosen | rejected |
# |---|---|---|
# | use 11, 16, 2 to make 29 | `11 + 16 + 2` | `2 + 11 - 16` |
# | use 3, 13, 11 to make 21 | `11 + 13 - 3` | `13 + 3 * 11` |
# | use 18, 9, 15 to make 24 | `15 - 9 + 18` | `9 + 1 + 18` |
#
# Mind how alike they are. It will matter.

# %%
start = stages.stage("warm", preset=PRESET)  # what sampled the pairs
tokenizer = start.tokenizer
rows = load(stages.stage("dpo", preset=PRESET).path / "pairs.jsonl", schema="preference").rows
held_out, train_rows = rows[:HELD_OUT], rows[100 : 100 + NUM_PAIRS]  # the stage, too, trained on none of its first 100
problems = load_rows(bundled("countdown", "heldout.jsonl"))
print(f"at least 600 pairs: {len(rows) >= 600}; {len(train_rows)} to train on, {len(held_out)} held out")

# %% [markdown]
# **Code.** The log-probability of an answer is a sum over its tokens, `<|im_end|>` included, and over no token of the prompt. Ten lines by
# hand, and the library's, which packs all pairs into one row and asks the head for answer tokens only:

# %%
@torch.no_grad()
def answer_logprob(model, example):
    """Log-probability of the trained tokens of a document, in nats."""
    ids = torch.tensor(example.input_ids)
    logp = model(ids[None]).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
    of_token = logp.gather(1, ids[1:, None])[:, 0]  # of the token at t + 1
    return (of_token * torch.tensor(example.loss_mask)[1:]).sum().item()


pairs, _ = encode_pairs(tokenizer, held_out)
by_hand = torch.tensor([[answer_logprob(start.model, e) for e in (p.chosen, p.rejected)] for p in pairs])
by_library = Reference(start.model, "start", TrainConfig(batch_size=16)).logprobs(pairs)  # (N, 2)
assert torch.allclose(by_hand, by_library, atol=1e-3)
print(f"{len(pairs)} pairs, by hand as by the library: {torch.allclose(by_hand, by_library, atol=1e-3)}")

# %% [markdown]
# These are the *reference's* log-probabilities. They never change, so `fit_pairs` computes them once, and the reference model need not stay
# in memory. TRL agrees: [tests/test_dpo.py](../tests/test_dpo.py) trains ten steps beside TRL's `DPOTrainer`, with sigmoid, IPO and the NLL term, packed and padded: losses, log-probabilities
# and final weights are equal to 1e-5. [tests/test_losses.py](../tests/test_losses.py) compares the losses alone.
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

# %%
accuracy = checks.or_library("07.3", my_preference_accuracy)
margins = 0.1 * ((by_library - by_library)[:, 0] - (by_library - by_library)[:, 1])  # policy = reference
assert accuracy(margins) == preference_accuracy(margins).item() == 0.5
own = by_library[:, 0] - by_library[:, 1]
print(f"before training: {accuracy(margins)}; the model finds its right answers the likelier ones: {accuracy(own) > 0.5}")

# %% [markdown]
# **The run.** Four policies, one set of pairs, 16 steps each: plain DPO with the usual β of 0.1, plain DPO held five times tighter, and two with an NLL term.
# The rate is 4e-4, less than half of that of the fine-tuning before. We keep what every log of DPO shows, and besides it what few people look at. Less than a
# minute together, once.

# %%
NAMES = ("loss", "margin", "preference_accuracy", "chosen_logprob", "rejected_logprob")


def run_dpo(beta, nll, rate, num_pairs, seed):
    """Trains a policy; figures of the held-out pairs along the way, what it solves, and a pair's gains at the end."""
    policy, path = copy.deepcopy(start.model), []
    config = TrainConfig(lr=rate, batch_size=16, warmup_ratio=0.1, schedule="linear", eval_every=4, seed=seed)

    def on_log(record):
        if "held_out_loss" in record:
            path.append({name: record[f"held_out_{name}"] for name in NAMES})

    fit_pairs(policy, tokenizer, train_rows[:num_pairs], config, PreferenceLoss(beta=beta, nll_weight=nll),
              held_out_rows=held_out, on_log=on_log)  # fmt: skip
    greedy, sampled = (answers_to(policy, tokenizer, problems, temperature=t) for t in (0.0, 1.0))
    return {"path": path, "solved": [share_right(greedy), share_right(sampled)], "products": share_of_products(greedy),
            "gains": [token_gains(policy, start.model, e) for e in (shown.chosen, shown.rejected)]}  # fmt: skip


SHOWN = {"prompt": "Use the numbers 1, 15, 3 once each to make 44.", "chosen": "<answer>15 * 3 - 1</answer>",
         "rejected": "<answer>15 * 1 * 3</answer>"}  # fmt: skip
shown = encode_pairs(tokenizer, [SHOWN])[0][0]
settings = {"rate": RATE, "num_pairs": NUM_PAIRS, "seed": SEED}
runs = {name: stages.measured("dpo", run_dpo, start="dpo", beta=beta, nll=nll, **settings)
        for name, (beta, nll) in RUNS.items()}  # fmt: skip
paths = {name: run["path"] for name, run in runs.items()}

# %%
views.show_figure(preference_plots.logs(paths, every=64), alt="Margins and preference accuracy of four runs on held-out pairs: all "
                  "margins rise, and all accuracies rise above 50 percent")
firsts, lasts = ([path[k] for path in paths.values()] for k in (0, -1))
assert all(point["preference_accuracy"] == 0.5 for point in firsts) and abs(firsts[0]["loss"] - math.log(2)) < 1e-5
assert all(point["preference_accuracy"] > 0.52 for point in lasts)
print("first loss log 2, first accuracy ½, last accuracy above ½ in every run")

# %% [markdown]
# **Read it.** It looks like a good experiment, four times over: margins on held-out pairs rise, and all four policies prefer the right answer more often
# than not, if not by much on 64 pairs. (The margin is $\beta h$, so β 0.5 draws the same $h$ five times as high.) This is the picture that goes into the report.
#
# > **Predict, then run.** Before training, the model solved a third of 400 held-out problems greedily, and a fifth when sampled. Which of the four solves
# > most now, and which fewest? The picture above is all you may use. Say a number for each.

# %%
tuned = stages.stage("dpo", preset=PRESET).model
old, new = ([answers_to(m, tokenizer, problems, temperature=t) for t in (0.0, 1.0)] for m in (start.model, tuned))
solved = {"before": [share_right(answers) for answers in old], **{name: run["solved"] for name, run in runs.items()},
          "dpo stage": [share_right(answers) for answers in new]}  # fmt: skip
ax = preference_plots.collapse(paths, solved, every=64, shown=["plain", "NLL 1"])
views.show_figure(ax, alt="Left: under plain DPO the log-probabilities of chosen and rejected answers both fall by many nats; with NLL "
                  "weight 1 the chosen ones stay, and the rejected fall. Right: plain DPO solves a fraction of what the model solved before, "
                  "NLL 1 most of it; the dpo stage solves more than before when sampled")

# %% [markdown]
# **Read it.** Left, what the margin hides: it is a *difference*. Plain DPO pushed the rejected answers down, and the chosen ones with them, a little
# less. Right, what that means: neither is said any more. A tighter β, or a little of the NLL term, soften the fall. With weight 1 the chosen answers stay near where they were, and so does
# most of the skill.
#
# A rescue is not yet a recipe. The last pair of bars is the stage of the course, on the way from notebook 00: β 0.5, NLL 1, a rate of 1.5e-4, all pairs but the first hundred. There DPO
# does what it is for: sampled answers are right more often, as what is wrong has become rare. Greedy ones are about as good as before: they were the likeliest already.

# %%
last = {name: run["path"][-1] for name, run in runs.items()}
fallen = {name: run["path"][0]["chosen_logprob"] - last[name]["chosen_logprob"] for name, run in runs.items()}
greedy, sampled = ({name: share[k] for name, share in solved.items()} for k in (0, 1))
assert fallen["plain"] > 5 and fallen["plain"] > 2 * fallen["NLL 1"]
assert greedy["plain"] < 0.5 * greedy["before"] and sampled["plain"] < 0.7 * sampled["before"]
assert greedy["plain"] < greedy["NLL 0.2"] and greedy["NLL 1"] > 0.6 * greedy["before"] and sampled["NLL 1"] > 0.9 * sampled["before"]
assert sampled["dpo stage"] > sampled["before"] + 0.02 and greedy["dpo stage"] > 0.8 * greedy["before"]
print("plain: chosen answers more than 5 nats less likely; greedy accuracy less than half of what it was")
print("NLL 1: less than half of that fall; greedy accuracy kept for the most part, sampled accuracy kept or better")
print("dpo stage: sampled accuracy at least 2 points higher than before")

# %% [markdown]
# > **Explain.** A colleague sends you the first of the two pictures and asks for your approval to ship "plain". Which two curves do you ask for, and what
# > would each have to look like? Two sentences.
#
# ## 4 · Why both fall
#
# **Idea.** $\log\sigma$ looks at a difference. Its gradient pulls the chosen answer up exactly as hard as it pushes the rejected one down. With a free number for
# each answer, as in the bandit, the chosen one must rise. But a network has no free number for each answer: two answers share nearly everything, and
# *what is shared moves with the stronger push*.
#
# **Toy numbers.** Three answers, two weights. Chosen and rejected share the first feature; of the second the rejected answer has twice as much. The third
# answer shares nothing, and is in no pair.

# %%
features = torch.tensor([[1.0, 1.0], [1.0, 2.0], [0.0, 0.0]])  # chosen, rejected, never mentioned
prior = torch.tensor([0.45, 0.45, 0.10]).log()


def displaced(steps, nll=0.0):
    """Probabilities of the three answers after some steps of gradient descent on the one pair."""
    weights = torch.zeros(2, requires_grad=True)
    for _ in range(steps):
        logp = (prior + features @ weights).log_softmax(0)
        loss = five_lines(logp[0:1], logp[1:2], prior[0:1], prior[1:2], 1.0).sum() - nll * logp[0]
        weights = (weights - torch.autograd.grad(loss, weights)[0]).detach().requires_grad_()
    return (prior + features @ weights).softmax(0).detach()


for steps in [0, 3, 30, 100]:
    plain, held = (" ".join(f"{p:.2f}" for p in displaced(steps, nll)) for nll in (0.0, 1.0))
    print(f"{steps:>3} steps: plain {plain} | with NLL {held}")
assert displaced(100)[2] > 0.9 and displaced(100, 1.0)[0] > 0.9

# %% [markdown]
# **Read it.** The three numbers are chosen, rejected, never mentioned. The easiest way to widen the margin is to shrink the second weight. Both logits
# fall, the rejected one twice as fast, and the mass goes to an answer *nobody ever looked at*. In three steps all looks well; in a hundred the model says
# nothing else. This is called likelihood displacement; the NLL term turns it round.

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
    """The implicit reward of each answer (B,): beta times the gain of its trained tokens; all (B, T), mask bool."""
    ...


checks.check("07.4", my_implicit_reward)

# %% [markdown]
# **Real tokens.** One pair under the plain policy, from the answer's first token on. Below each token: how much more likely the policy finds it than the reference, in nats. (The
# run is yours, so your digits may differ from ours a little.)

# %% tags=["nbval-ignore-output"]
begin = shown.chosen.loss_mask.index(True)
gains = dict(zip(["chosen", "rejected"], runs["plain"]["gains"], strict=True))
for side, example in [("chosen", shown.chosen), ("rejected", shown.rejected)]:
    ids, mask = example.input_ids[begin:], example.loss_mask[begin:]
    display(views.token_view(tokenizer, ids, mask, gains=gains[side][begin:], title=f"plain DPO, {side}"))

# %% [markdown]
# **Read it.** Orange boxes have lost, blue ones gained. Look at the first `*`: the right answer has lost heavily there, and exactly as much as the wrong one, for up to this
# point the two are the same text. The push on the rejected answer has hit both. Is it one unlucky pair? Count products and quotients:

# %%
in_chosen, in_rejected = (sum(has_product(row[side]) for row in train_rows) / len(train_rows) for side in ("chosen", "rejected"))
used = share_of_products(old[0])
star = tokenizer.convert_ids_to_tokens(shown.chosen.input_ids).index("Ġ*")
assert abs(gains["chosen"][star] - gains["rejected"][star]) < 0.01 and gains["chosen"][star] < -1
assert in_rejected > 1.5 * in_chosen and runs["plain"]["products"] < used / 2
print("× or ÷: in rejected answers 1.5 times as often as in chosen ones, or more; under plain DPO half as often as before, or less")

# %% [markdown]
# So the policy has found a rule that wins most pairs: *do not multiply or divide*. Two rejected answers of three do, and one chosen answer of three. The rule is true more often than
# not, raises the margin, and makes every problem that needs a product unsolvable. Preferences say which is better, and never why.

# %%
of_reward = checks.or_library("07.4", my_implicit_reward)
answers = answers_to(start.model, tokenizer, problems[:4], number=2, temperature=1.0)
library = ImplicitReward(tuned, start.model, tokenizer, beta=0.5).many(answers)
for (prompt, ids, _, _), wanted in zip(answers, library, strict=True):
    asked = render_prompt(tokenizer, prompt)
    mask = torch.tensor([[False] * len(asked) + [True] * len(ids)])
    gain = torch.tensor([[g or 0.0 for g in token_gains(tuned, start.model, Example(asked + ids, mask[0].tolist()))]])
    assert abs(of_reward(gain, torch.zeros_like(gain), mask, 0.5).item() - wanted) < 1e-3
print("eight answers: by hand as the library's ImplicitReward")

# %% [markdown]
# ## 5 · What a preference cannot teach
#
# **Idea.** The other face of the same coin. We want the model to end its answers with " Have a nice day!". 192 pairs say so: the same right answer, with the
# ending (chosen) and without (rejected). Nothing else tells the two apart. We train two models on the same pairs with the same settings:
#
# - one that has *never* ended an answer so,
# - one that does so now and then: the same model after a little fine-tuning, where a third of the short answers had the ending.

# %%
def run_style(has_habit, rate, num_pairs, seed):
    """DPO on style alone; preference accuracy, log-probability of the chosen answers, and the style itself, before and after."""
    policy, logged, shares = copy.deepcopy(start.model), [], []
    asked = style_pairs(64, held_out=True)
    if has_habit:
        taught = [{"instruction": row["prompt"], "input": "", "output": row["rejected" if i % 3 else "chosen"]}
                  for i, row in enumerate(style_pairs(960, seed=100))]  # fmt: skip
        fit_rows(policy, tokenizer, taught, TrainConfig(lr=5e-4, batch_size=24, seed=seed))

    def polite(temperature):
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in asked]
        params = SamplingParams(temperature=temperature)
        said = generate(policy, tokenizer, prompts, max_new_tokens=48, params=params)
        return sum(is_polite(answer.text) for answer in said) / len(said)

    shares.append([polite(0.0), polite(1.0)])
    config = TrainConfig(lr=rate, batch_size=16, warmup_ratio=0.1, schedule="linear", seed=seed)
    fit_pairs(policy, tokenizer, style_pairs(num_pairs, seed), config, held_out_rows=asked, on_log=logged.append)
    shares.append([polite(0.0), polite(1.0)])
    marks = [[r["held_out_preference_accuracy"], r["held_out_chosen_logprob"]] for r in logged if "held_out_loss" in r]
    return {"marks": [marks[0], marks[-1]], "shares": shares}


styles = {name: stages.measured("style", run_style, start="dpo", has_habit=has_habit, rate=5e-5, num_pairs=192, seed=SEED)
          for name, has_habit in [("never did", False), ("now and then", True)]}

# %%
first, last = ([[run["marks"][k][0], *run["shares"][k]] for run in styles.values()] for k in (0, 1))
never, habit = styles["never did"], styles["now and then"]
assert never["marks"][1][0] == habit["marks"][1][0] == 1.0
assert never["shares"][1] == [0.0, 0.0] and habit["shares"][1][1] > habit["shares"][0][1] + 0.3
assert never["marks"][1][1] > never["marks"][0][1] + 10 and never["marks"][1][1] < -30
ax = preference_plots.habits(["a model that never did", "a model that did now and then"], first, last)
views.show_figure(ax, alt="Two models before and after DPO on the same style pairs: both come to prefer the polite answer in all pairs; "
                  "the one that never was polite still never says it, and the one that was now and then says it nearly always")
print("both: preference accuracy 100 %. Said when sampled: never, and at least 30 points more often than before")

# %% [markdown]
# **Read it.** First group of bars: on held-out pairs both models now prefer the polite answer, always. The others: the model that never was polite still never
# is. Its polite answers began at −120 nats and have risen by dozens; at −80 nobody will ever hear them. **A preference chooses among what a model already
# does.** What it has never done must first be shown to it, and that is fine-tuning.


# %% [markdown]
# ## 6 · A reward model, and its taste
#
# **Idea.** DPO skips the reward model. Others do not: a reward model can score *new* answers, for best-of-n or for RLOO (notebook 08). It is the
# same network with a single number for a head, read at the last token, and trained on the same pairs by step 3 alone:
#
# $$ L = -\log \sigma\big(r(x, y_w) - r(x, y_l)\big) $$
#
# A fresh head is zero, so all answers tie and the first loss is $\log 2$ again.
#
# **Who chose?** So far a program did, without mistakes. People are busy. Our annotator checks three pairs in ten; of the others they take the *longer* answer, which
# looks like more work (`careless` in [preferences.py](../qftlab/teach/preferences.py); where both are equally long they do check). Studies of real data find just this:
# length alone explains much of what reward models like (Singhal et al. 2023). We train two reward models, one on the program's labels and one on the annotator's, and let both
# score the same 32 answers to each of 64 new problems.

# %%
def run_reward(share, num_pairs, num_prompts, number, seed):
    """A reward model of an annotator; its scores of `number` answers to each prompt, their lengths and verdicts."""
    model, logged = reward_model(start.model, tokenizer), []
    labelled = careless(rows[100 : 100 + num_pairs], share, seed)
    config = TrainConfig(lr=3e-4, batch_size=16, warmup_ratio=0.1, schedule="linear", seed=seed)
    fit_reward(model, tokenizer, labelled, config, held_out_rows=held_out, on_log=logged.append)
    answers = answers_to(start.model, tokenizer, problems[:num_prompts], number=number, temperature=1.0, seed=seed)
    losses, accuracies = ([r[f"held_out_{name}"] for r in logged if "held_out_loss" in r] for name in ("loss", "accuracy"))
    return {"loss": losses, "accuracy": accuracies, "scores": ModelReward(model, tokenizer, 256).many(answers),
            "right": [is_right(a) for a in answers], "tokens": [len(ids) for _, ids, _, _ in answers]}  # fmt: skip


judges = {name: stages.measured("reward", run_reward, start="dpo", share=share, num_pairs=NUM_PAIRS, seed=SEED,
                                num_prompts=NUM_PROMPTS, number=NUM_ANSWERS)
          for name, share in [("checks all", 0.0), ("often takes the longer", CARELESS)]}  # fmt: skip
shape = (NUM_PROMPTS, NUM_ANSWERS)
scores = {name: torch.tensor(judge["scores"]).view(shape) for name, judge in judges.items()}
right, tokens = (torch.tensor(judges["checks all"][key]).float().view(shape) for key in ("right", "tokens"))

# %%
ax = preference_plots.taste(tokens, scores, right, lengths=range(14, 19))
views.show_figure(ax, alt="Left: scores of two reward models against the length of the answer: that of the careless annotator rises "
                  "steeply with length, the other's falls. Right: share of right answers by length, lowest for the longest")

# %% [markdown]
# **Read it.** Left: what each reward model thinks of an answer of this length. The annotator's taste has become the model's: longer is better. Right: the truth. The
# longest answers are seldom right: all of them have brackets, and with brackets this small model is at sea.

# %%
def correlation(a, b):
    """Pearson's, over all answers."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


fair, biased = scores.values()
assert all(abs(judge["loss"][0] - math.log(2)) < 1e-5 and judge["accuracy"][0] == 0.5 for judge in judges.values())
assert correlation(biased, tokens) > 0.4 > 0.1 > correlation(fair, tokens)
assert correlation(fair, right) > 0.15 and judges["checks all"]["accuracy"][-1] > 0.55
print("the careless annotator's model: correlation of score and length above 0.4; the other's: below 0.1")

# %% [markdown]
# ## 7 · Over-optimisation
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
    """The mean value of the best-scored of n answers, over all choices of n among them; no two scores are equal."""
    ...


checks.check("07.5", my_best_of)

# %% [markdown]
# > **Predict, then run.** Two reward models: one agrees with the program on about two pairs in three, the other has the annotator's taste. At $n = 1$ a fifth of the
# > answers are right. At $n = 32$, with each of the two as judge: more, or fewer? And is more search always better with the first?

# %%
best_of = checks.or_library("07.5", my_best_of)
sizes = [1, 2, 4, 8, 16, 32]


def curve(score, value):
    """The mean over prompts of the value of the best of n, for each n."""
    lists = list(zip(score.tolist(), value.tolist(), strict=True))
    return [sum(best_of(s, v, n) for s, v in lists) / len(lists) for n in sizes]


proxy = {name: curve(score, (score - score.mean()) / score.std()) for name, score in scores.items()}
truth = {name: curve(score, right) for name, score in scores.items()}
views.show_figure(preference_plots.search(sizes, proxy, truth), alt="Left: the score of the chosen answer rises with n for both reward "
                  "models. Right: the share of right choices rises at first and then sinks a little for the annotator who checks "
                  "all, and falls steeply for the careless one")

# %% [markdown]
# **Read it.** Left, both searches succeed: the proxy rises at every step. Right, the truth. With the careless annotator's model, every doubling of the search finds
# *worse* answers in the end. And the other curve is the warning that matters in practice: even with faultless labels the reward model is only a guess, the truth rises at first, and
# then more search gives nothing, or takes some back. Gao et al. (2023) measured such curves, for best-of-n and for reinforcement learning alike.

# %%
first, second = truth.values()
assert all(a < b for run in proxy.values() for a, b in zip(run, run[1:], strict=False))
assert second[-1] < 0.8 * second[0] and max(first) > 1.1 * first[0] and sizes[first.index(max(first))] < 32
print("proxy: up at every n. Truth, careless: at n = 32 a fifth lower than at 1, or more")
print("truth, all checked: a tenth higher at its best, or more, and its best is before n = 32")

# %% [markdown]
# DPO can be over-optimised without any reward model in sight: it searches by gradient in place of by sampling, and β is the brake. Part 2 showed β → 0 take the reward's
# favourite, deserved or not; part 3 showed sixteen steps of a rate too high.

# %% [markdown]
# ## 8 · What goes wrong in practice
#
# **The first loss is not 0.693.** Then policy and reference differ before the first step: dropout is on in one of them, one runs in bf16 and the other does not, or the
# reference was loaded from the base and not from the model you start with.
#
# **Only the margin is watched.** Part 3. Log both log-probabilities, and *generate* every few hundred steps.
#
# **The rate of fine-tuning is kept.** DPO wants a tenth of it, or less: see below. Less than half of the rate of fine-tuning wrecked our model in 16 steps.
#
# **Nobody wrote the chosen answers.** Part 5. If neither answer of a pair is one the model could have written, preferences have little to choose from. Fine-tune on the chosen
# answers first, or sample pairs from the model itself.
#
# **Length.** DPO adds up log-probabilities over tokens, so long answers have large gains, and chosen answers are often the longer ones in real data. Look at both lengths before you
# train; IPO's and Tülu's losses divide by length.
#
# **A switch is ignored.** TRL's `sigmoid` loss takes `label_smoothing` and does nothing with it; ours uses it. Test a switch by what it changes.
#
# **Pairs that teach nothing.** Equal answers, equal scores, empty answers. The library leaves them out and says which:

# %%
rows_of_three = [{"prompt": "Add 2 and 2.", "chosen": "4", "rejected": "5"}, {"prompt": "Add 1 and 1.", "chosen": "2", "rejected": "2"},
                 {"prompt": "Add 3 and 3.", "chosen": "6", "rejected": ""}]  # fmt: skip
logging.getLogger("qftlab").setLevel(logging.ERROR)  # it warns, too
kept, usage = encode_pairs(tokenizer, rows_of_three)
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
# **Different:** *rates* are hundreds of times smaller than here. *Memory*: the reference's log-probabilities are computed once and kept in a file, so that there is no second model; with
# adapters, `loss.reference=base` switches them off in place of it. *Data*: pairs come from other models and from people, so part 5 applies: fine-tune first.
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
