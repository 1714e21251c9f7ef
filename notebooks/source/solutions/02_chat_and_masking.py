# %% [markdown]
# # 02 · Chat and masking: solutions
#
# One good answer to each exercise of [02 · Chat and masking](../02_chat_and_masking.ipynb), with the reason in a sentence.
# Yours may look different; the check decides. If you have not tried yet, go back: ten minutes of your own are worth more than this page.

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
import torch

from qftlab import Example, masked_cross_entropy, render_chat
from qftlab_course import checks, stages

# %% tags=["parameters"]
PRESET = "tiny"

# %% [markdown]
# ## Exercise 02.1 · The loss mask of a conversation
#
# The end marker belongs to the content, `len(content) + 1` flags with one answer; header and newline are always False.

# %%
def my_loss_mask(turns):
    mask = []
    for role, header, content in turns:
        is_trained = role == "assistant"
        mask += [False] * len(header) + [is_trained] * (len(content) + 1) + [False]
    return mask

checks.check("02.1", my_loss_mask)

# %% [markdown]
# ## Exercise 02.2 · Labels: every position predicts the next token
#
# Ids and mask are both cut at the front, because the mask describes the token that is *predicted*.

# %%
def my_targets(input_ids, loss_mask):
    return torch.where(loss_mask[1:], input_ids[1:], torch.tensor(-100))

checks.check("02.2", my_targets)

# %% [markdown]
# ## Exercise 02.3 · Padding when pad and end are the same token
#
# `pad_id` does not occur in the answer at all. That is the point: what is padding follows from the length of a row.

# %%
def my_pad_labels(rows, pad_id):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])

checks.check("02.3", my_pad_labels)

# %% [markdown]
# ## Exercise 02.4 · The attention mask of a packed row
#
# Same document, and not in the future. `torch.block_diag` over small triangles, or two loops, do as well.

# %%
def my_packed_mask(lengths):
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (document[:, None] == document[None, :]).tril()

checks.check("02.4", my_packed_mask)

# %% [markdown]
# ## Predict, then run: what do the models without ends do?
#
# Both give their answer, and then have to write something, because the one token that would end the turn was never trained.
# The model trained on the *whole text* writes what came next in its training text: after `<|im_end|>` came a newline,
# `<|im_start|>`, `user` and a question, and those *were* trained. So it opens the user's turn, asks a question of the kind it has
# read, answers it, and so on until it is cut off. The model trained on *answers* alone never had to write a header or a question.
# It falls back on what it knows from pretraining: `<|endoftext|>`, another document, more numbers. It does not stop either.

# %% [markdown]
# ## Explain: is anything learned from the question?
#
# A gradient of zero at the *logits* of the question means: the model is not taught to write questions. But the answer's logits were
# computed by attending to the question, so the answer's loss flows back *through* the question's positions, into keys, values and
# embeddings. The model learns to *use* the question without learning to say it.
#
# The experiment: take the loss of a masked row, and look at the gradient of the embedding of a token that occurs in the question
# only. If masking removed the question from learning, it would be zero.

# %%
base = stages.stage("base", preset=PRESET)
model, tokenizer = base.model, base.tokenizer
chat = [{"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5"}]
row = render_chat(tokenizer, chat)[0]
labels = torch.tensor([Example(row.input_ids, row.loss_mask).labels()])
ids = torch.tensor([row.input_ids], device=model.device)
vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
masked_cross_entropy(model(inputs_embeds=vectors).logits.cpu(), labels).backward()

# %% [markdown]
# The gradient at the question's *inputs*, which is what the shared weights see, is not zero anywhere. After the last trained
# prediction it is zero, because nothing that counts depends on what comes later.

# %%
pull = vectors.grad[0].abs().sum(-1)  # (T,)
last = max(t for t, kept in enumerate(row.loss_mask) if kept)
assert (pull[:last] > 0).all() and (pull[last:] == 0).all()
print(f"{int((pull > 0).sum())} of {len(pull)} inputs get a gradient, "
      f"though only {row.num_trained} tokens are trained")

# %% [markdown]
# A second experiment, without a gradient: change the question and keep the answer. The loss changes, so the question was read.

# %%
def loss_of(question):
    """Nats a trained token of the answer 5 to this question."""
    row = render_chat(tokenizer, [{"role": "user", "content": question}, chat[1]])[0]
    labels = torch.tensor([Example(row.input_ids, row.loss_mask).labels()])
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids], device=model.device)).logits.cpu()
    return masked_cross_entropy(logits, labels)

assert loss_of("What is 2 + 3?") != loss_of("What is 9 + 8?")

# %%
checks.progress("02")
