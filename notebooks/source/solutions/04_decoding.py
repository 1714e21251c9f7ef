# %% [markdown]
# # 04 · Decoding: solutions
#
# One good answer to each exercise of [04 · Decoding](../04_decoding.ipynb), with the reason in a sentence or two. Yours may
# look different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth more than this page.

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

from qftlab import SamplingParams, beam_search, generate, render_prompt
from qftlab_course import checks, stages
from qftlab_course.world.instructions import sum_steps

# %% tags=["parameters"]
PRESET = "tiny"

# %% [markdown]
# ## Exercise 04.1 · Entropy at a temperature
#
# `log_softmax` stays finite where `softmax(...).log()` would be the log of 0. A probability may still be so small that `exp` gives
# 0; such a token adds nothing to the sum, and choosing `p > 0` leaves it out.

# %%
def my_entropy(logits, temperature):
    logp = (logits / temperature).log_softmax(-1)
    p = logp.exp()
    return -(p * logp)[p > 0].sum()


checks.check("04.1", my_entropy)

# %% [markdown]
# The toy numbers of the notebook: ½, ¼, ¼ at $T = 1$ and at $T = ½$.

# %%
logits = torch.log(torch.tensor([0.5, 0.25, 0.25]))
assert abs(my_entropy(logits, 1.0) - 1.5 * math.log(2)) < 1e-6
print(f"{my_entropy(logits, 1.0):.2f} and {my_entropy(logits, 0.5):.2f} nats")

# %% [markdown]
# ## Exercise 04.2 · The top-p filter
#
# What counts is the mass *before* a token, in sorted order. `order` says where each sorted entry came from, so `order[is_kept]`
# are ids of the vocabulary again. Nothing is changed in place, because the caller may still need these logits.

# %%
def my_top_p(logits, p):
    probs, order = logits.softmax(-1).sort(descending=True)
    is_kept = probs.cumsum(-1) - probs < p
    out = torch.full_like(logits, -math.inf)
    out[order[is_kept]] = logits[order[is_kept]]
    return out


checks.check("04.2", my_top_p)

# %%
logits = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.2, 0.15]))
assert my_top_p(logits, 0.8).isfinite().tolist() == [False, True, False, True, True]
assert my_top_p(logits, 0.01).isfinite().sum() == 1, "the likeliest always stays"

# %% [markdown]
# ## Exercise 04.3 · The repetition penalty
#
# Two cases, because a logit is not a probability: dividing −1 by 2 gives −0.5, which is *more*. An id that stands in `seen` twice
# is read twice from the same old logits and written twice with the same value, so it is punished once.

# %%
def my_penalty(logits, seen, penalty):
    picked = logits[seen]
    out = logits.clone()
    out[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
    return out


checks.check("04.3", my_penalty)

# %% [markdown]
# The rule has an odd side: it depends on where zero is. Add 10 to all logits, and the distribution is the same as before, but the
# penalty now hits much harder. That is how it was published, and how transformers computes it.

# %%
logits = torch.tensor([3.0, -1.0, 2.0])
before = my_penalty(logits, [0, 1], 2.0).softmax(-1)
after = my_penalty(logits + 10, [0, 1], 2.0).softmax(-1)
print(f"the first token: {before[0]:.2f}, with all logits raised by 10: {after[0]:.2f}")
assert torch.allclose(logits.softmax(-1), (logits + 10).softmax(-1))
assert after[0] < before[0] / 10

# %% [markdown]
# ## Predict, then run: a penalty of 1.5
#
# In the calculation nearly every digit has been seen: the question has a 1 and a 0. The logit of the right `0` is the highest until
# it is punished; then an unseen digit wins, and the next steps go on from the wrong number. Even where the digits survive, the
# division no longer is by 2. At the end `<|im_end|>` has been seen too, because it closed the user's turn.
#
# ## Exercise 04.4 · Stop strings across token borders
#
# The text is one string, however it was cut. Searching it anew after each piece costs little for short answers. The library
# searches only the end of the text, as far back as a stop string can reach.

# %%
def my_until_stop(pieces, stops):
    text = ""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], count
    return text, len(pieces)


checks.check("04.4", my_until_stop)

# %% [markdown]
# ## Predict, then run: four questions in one batch, padded right
#
# Only the longest row comes out right. Each other row reads its first token off a pad, and every token after that stands too far
# from its question. Nothing in the output says so.
#
# ## Exercise 04.5 · One step of beam search
#
# Adding `scores[:, None]` turns the log-probabilities of tokens into those of whole texts, and only those can be compared across
# beams. `divmod` takes the place in the flattened tensor apart. The rank among all candidates decides whether an end counts; ends
# do not use up places among the running.

# %%
def my_beam_step(scores, logprobs, eos_id):
    beams, vocabulary = logprobs.shape
    values, places = (scores[:, None] + logprobs).flatten().topk(2 * beams)
    running, finished = [], []
    for rank, place in enumerate(places.tolist()):
        score = float(values[rank])
        parent, token = divmod(place, vocabulary)
        if token != eos_id:
            running.append((parent, token, score))
        elif rank < beams:
            finished.append((parent, token, score))
    return running[:beams], finished


checks.check("04.5", my_beam_step)

# %% [markdown]
# The toy numbers of the notebook: *A* 0.6, *B* 0.4, and after them 0.5 or 0.9. Two beams, tokens 0 and 1, and an end that nobody wants.

# %%
logprobs = torch.log(torch.tensor([[0.5, 0.499, 0.001], [0.9, 0.099, 0.001]]))
running, finished = my_beam_step(torch.log(torch.tensor([0.6, 0.4])), logprobs, 2)
print([(parent, token, f"{math.exp(score):.2f}") for parent, token, score in running])
assert running[0][:2] == (1, 0) and not finished

# %% [markdown]
# ## Explain: the beams and the sum
#
# The search did its work: it found a text that is likelier than the right one. The failure is the *model's*. Let us measure it.
# The right answer and the beams' begin alike; how much likelier is the wrong one, and how likely is the right token where they
# part?

# %%
sft = stages.stage("sft", preset=PRESET)
model, tokenizer = sft.model, sft.tokenizer
END = tokenizer.convert_tokens_to_ids("<|im_end|>")
problem = "What is the sum of the first 100 natural numbers? Please think step by step."
prompt = render_prompt(tokenizer, [{"role": "user", "content": problem}])
right = tokenizer(sum_steps(100)).input_ids + [END]
print(sum_steps(100))


def logprobs_of(ids):
    """Log-probability of each token of `ids` after the prompt, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids], device=model.device)).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].float().cpu().log_softmax(-1)  # (T, V)
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]

# %%
turn = {"max_new_tokens": 110, "stop_token_ids": [END]}
wrong = beam_search(model, tokenizer, [prompt], num_beams=4, **turn)[0].token_ids
part = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
ratio = (logprobs_of(wrong).sum() - logprobs_of(right).sum()).exp()
print(f"the wrong answer is {ratio:.0f} times as likely as the right one")
good, bad = (float(logprobs_of(ids)[part].exp()) for ids in (right, wrong))
print(f"where they part, the right token has {good:.2f}, the wrong one {bad:.2f}")
assert ratio > 2 and good < bad

# %% [markdown]
# **More beams** make it no better: the wrong text stays the likelier one. **A higher temperature** gives the right token a chance,
# and every wrong one too. **A checker** turns that chance into an answer: draw many, keep what passes. **More training** on such
# sums could move the token itself. Here is the simplest checker; it knows the answer, as the reward of notebook 08 will:

# %%
searched = beam_search(model, tokenizer, [prompt], num_beams=12, **turn)[0].text
many = {"num_generations": 512, "batch_size": 256, **turn}
drawn = generate(model, tokenizer, [prompt], params=SamplingParams(), **many)
passed = [row.text for row in drawn if row.text == sum_steps(100)]
print("12 beams are right:", searched == sum_steps(100))
print("of 512 samples the checker passes:", len(passed))
assert passed and searched != sum_steps(100)

# %%
checks.progress("04")
