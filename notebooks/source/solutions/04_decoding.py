# %% [markdown]
# # 04 · Decoding: solutions
#
# One good answer to each exercise of [04 · Decoding](../04_decoding.ipynb), with the reason in a sentence or two. Yours may look
# different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth more than this page.

# %% tags=["setup"]
import sys

if "google.colab" in sys.modules:  # on Colab only: fetch the library, leave torch and transformers as they are
    REPO = "OWNER/qftlab"
    get_ipython().run_line_magic("pip", f"install -q --no-deps git+https://github.com/{REPO}")
    get_ipython().run_line_magic("pip", "install -q jsonargparse")

# %%
import math

import torch

from qftlab.core.sampling import SamplingParams
from qftlab.generate.beam import beam_search
from qftlab.generate.engine import generate
from qftlab.teach import checks, stages
from qftlab.text.chat import render_prompt

# %% tags=["parameters"]
PRESET = "tiny"

# %% [markdown]
# ## Exercise 04.1 · Entropy at a temperature
#
# `log_softmax` stays finite where `softmax(...).log()` would be the log of 0. A probability may still be so small that `exp` gives 0; such a
# token adds nothing to the sum, and choosing `p > 0` leaves it out.

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
# What counts is the mass *before* a token, in sorted order. `order` says where each sorted entry came from, so `order[is_kept]` are ids of the
# vocabulary again. Nothing is changed in place: the student of the next exercise may still need these logits.

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
# Two cases, because a logit is not a probability: dividing −1 by 2 gives −0.5, which is *more*. An id that stands in `seen` twice is read twice from the
# same old logits and written twice with the same value, so it is punished once.

# %%
def my_penalty(logits, seen, penalty):
    picked = logits[seen]
    out = logits.clone()
    out[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
    return out


checks.check("04.3", my_penalty)

# %% [markdown]
# The rule has an odd side: it depends on where zero is. Add 10 to all logits, and the distribution is the same as before, but the penalty now hits much
# harder. That is how it was published and how everyone computes it.

# %%
logits = torch.tensor([3.0, -1.0, 2.0])
before, after = (my_penalty(logits + shift, [0, 1], 2.0).softmax(-1) for shift in (0.0, 10.0))
print(f"the first token, seen before: {before[0]:.2f}, and with all logits raised by 10: {after[0]:.2f}")
assert torch.allclose(logits.softmax(-1), (logits + 10).softmax(-1)) and after[0] < before[0] / 10

# %% [markdown]
# ## Predict, then run: a penalty of 1.5
#
# In the calculation every digit but the first few has been seen. The model still *prefers* the right `0`, but a penalised 0 loses to an unpenalised neighbour, and
# the wrong digit is then carried through the following steps with perfect logic. At the end `<|im_end|>` has been seen too: it closed the user's
# turn. So the model, which would stop with near certainty, is pushed past its end into tokens that nobody trained it to write there.
#
# ## Exercise 04.4 · Stop strings across token borders
#
# The text is one string, however it was cut. Searching it anew after each piece costs little for short answers. The library searches only the end of the text, as
# far back as a stop string can reach.

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
# Only the longest row comes out right. Each other row reads its first token off a pad, and every token after that stands too far from its question.
# What it writes is fluent because the model is: it answers *something*, just not you.
#
# ## Exercise 04.5 · One step of beam search
#
# Adding `scores[:, None]` turns the log-probabilities of tokens into those of whole texts, and only those can be compared across beams. `divmod` takes the place in the
# flattened tensor apart. The rank among all candidates decides whether an end counts; ends do not use up places among the running.

# %%
def my_beam_step(scores, logprobs, eos_id):
    beams, vocabulary = logprobs.shape
    values, places = (scores[:, None] + logprobs).flatten().topk(2 * beams)
    running, finished = [], []
    for rank, (score, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
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
# The search did its work: it found a text that the model likes better than the right one. The failure is the *model's*, in one place. Let us measure it. The right answer
# and the beams' share their words; how much likelier is the wrong one, and how likely is the right digit where they part?

# %%
sft = stages.stage("sft", preset=PRESET)
model, tokenizer = sft.model, sft.tokenizer
END = tokenizer.convert_tokens_to_ids("<|im_end|>")
question = "What is the sum of the first 100 natural numbers? Please think step by step."
prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
right = tokenizer("The sum is (100 * 100 + 100) / 2. Step 1: 100 * 100 = 10000. Step 2: 10000 + 100 = 10100. "
                  "Step 3: 10100 / 2 = 5050. The answer is 5050.").input_ids + [END]


def logprobs_of(ids):
    """Log-probability of each token of `ids` after the prompt, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return logits.float().cpu().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

# %%
wrong = beam_search(model, tokenizer, [prompt], max_new_tokens=110, stop_token_ids=[END])[0].token_ids
part = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
ratio = (logprobs_of(wrong).sum() - logprobs_of(right).sum()).exp()
print(f"the wrong answer is {ratio:.0f} times as likely as the right one")
print(f"where they part, the right digit has {logprobs_of(right)[part].exp():.2f}, the wrong one {logprobs_of(wrong)[part].exp():.2f}")
assert ratio > 2 and logprobs_of(right)[part].exp() < 0.2

# %% [markdown]
# **More beams** make it no better: the wrong text stays the likelier one. **A higher temperature** gives the right digit a chance, and every wrong digit too. **A checker** turns that
# chance into an answer: draw many, keep what passes. **More training** on such sums moves the digit itself. Here is the checker, as crude as they come; it knows the answer, as the reward of
# notebook 08 will:

# %%
many_beams = beam_search(model, tokenizer, [prompt], num_beams=12, max_new_tokens=110, stop_token_ids=[END])[0].text
drawn = generate(model, tokenizer, [prompt], num_generations=128, max_new_tokens=110, params=SamplingParams())
passed = [row.text for row in drawn if row.text.endswith("The answer is 5050.")]
print("12 beams are right:", many_beams.endswith("5050."), "· one of 128 samples is:", bool(passed))
assert passed and not many_beams.endswith("5050.")

# %%
checks.progress("04")
