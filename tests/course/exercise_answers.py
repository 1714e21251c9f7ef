"""Answers to the exercises, as students write them: a stub and two right ones for each, and wrong ones of its own.

The tests run every check against them, and run the lessons on the second right one, which mostly has another form than
the library's: a tuple, a NumPy array, a float64 tensor. The `like` of a suspect is a wrong answer that the tests run
as well; here are those that no suspect implements, each with words that the check must say of it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from qftlab.maths.verify import extract_answer, parse_expression


@dataclass(frozen=True)
class Answers:
    """What is known about one exercise; `wrong` pairs an answer with words of the message it must get."""

    stub: Callable
    right: tuple[Callable, Callable]
    wrong: tuple[tuple[Callable, str], ...] = ()


# 01.1 ---------------------------------------------------------------------------------------------------------------
def stub_merge(pieces, pair):
    """One BPE merge: every occurrence of `pair`, left to right and without overlap, becomes one piece."""
    ...


def merge_by_index(pieces, pair):
    merged = []
    i = 0
    while i < len(pieces):
        if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair:
            merged.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged


def merge_by_stack(pieces, pair):
    first, second = pair
    merged, is_open = [], False
    for piece in pieces:
        if is_open and piece == second:
            merged[-1] = first + second
            is_open = False
        else:
            merged.append(piece)
            is_open = piece == first
    return tuple(merged)


# 01.2 ---------------------------------------------------------------------------------------------------------------
def stub_new_row(table, piece_ids):
    """The new embedding row (D,): the mean of the rows of `table` (V, D) that its old pieces had, repeats counted."""
    row = ...
    return row


def new_row_by_index(table, piece_ids):
    return table[piece_ids].mean(dim=0)


def new_row_by_numpy(table, piece_ids):
    return table.numpy()[piece_ids].mean(axis=0, dtype=np.float64)


# 01.3 ---------------------------------------------------------------------------------------------------------------
def stub_resize(table, num_tokens):
    """A table of max(rows, num_tokens) rows: the old rows unchanged, new ones zero; never fewer rows than before."""
    raise NotImplementedError


def resize_by_copy(table, num_tokens):
    bigger = torch.zeros(max(len(table), num_tokens), table.shape[1])
    bigger[: len(table)] = table
    return bigger


def resize_by_pad(table, num_tokens):
    return torch.nn.functional.pad(table, (0, 0, 0, max(0, num_tokens - len(table))))


def resize_shrinking(table, num_tokens):
    resized = torch.zeros(num_tokens, table.shape[1])
    kept = min(num_tokens, len(table))
    resized[:kept] = table[:kept]
    return resized


# 02.1 ---------------------------------------------------------------------------------------------------------------
def stub_loss_mask(turns):
    """One flag per token: True for an assistant's content and its `<|im_end|>`. A turn is (role, header, content)."""
    pass


def loss_mask_by_lists(turns):
    mask = []
    for role, header, content in turns:
        trained = role == "assistant"
        mask.extend([False] * len(header))
        mask.extend([trained] * len(content))
        mask.append(trained)  # <|im_end|>
        mask.append(False)  # the newline
    return mask


def loss_mask_by_tensor(turns):
    pieces = []
    for role, header, content in turns:
        flags = torch.zeros(len(header) + len(content) + 2, dtype=torch.bool)
        flags[len(header) : -1] = role == "assistant"
        pieces.append(flags)
    return torch.cat(pieces)


# 02.2 ---------------------------------------------------------------------------------------------------------------
def stub_targets(input_ids, loss_mask):
    """What each position must predict, (T,) -> (T - 1,): the next id where that token is trained, else -100."""
    ids = ...
    return ids.masked_fill(~loss_mask, -100)


def targets_by_where(input_ids, loss_mask):
    return torch.where(loss_mask[1:], input_ids[1:], torch.tensor(-100))


def targets_by_loop(input_ids, loss_mask):
    return [int(i) if on else -100 for i, on in zip(input_ids[1:], loss_mask[1:], strict=True)]


def targets_not_shifted(input_ids, loss_mask):
    return torch.where(loss_mask, input_ids, -100)


# 02.3 ---------------------------------------------------------------------------------------------------------------
def stub_pad_labels(rows, pad_id):
    """Labels (B, T) of rows padded on the right: the ids themselves, -100 on padding; a real `pad_id` stays trained."""
    ...


def pad_labels_by_length(rows, pad_id):
    labels = torch.full((len(rows), max(len(row) for row in rows)), -100)
    for i, row in enumerate(rows):
        labels[i, : len(row)] = torch.tensor(row)
    return labels


def pad_labels_by_torch(rows, pad_id):
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)


def pad_labels_in_place(rows, pad_id):
    width = max(len(row) for row in rows)
    for row in rows:
        row += [-100] * (width - len(row))
    return torch.tensor(rows)


# 02.4 ---------------------------------------------------------------------------------------------------------------
def stub_packed_mask(lengths):
    """Who may look at whom in one packed row, (T, T) bool: [query, key], causal, and within a document only."""
    mask = ...
    return mask


def packed_mask_by_blocks(lengths):
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths])


def packed_mask_by_loops(lengths):
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for length in lengths:
        for query in range(start, start + length):
            mask[query, start : query + 1] = True
        start += length
    return mask


# 03.1 ---------------------------------------------------------------------------------------------------------------
def stub_loss(logits, labels):
    """Mean NLL in nats over the trained labels; logits (B, T, V) at t predict the label at t + 1."""
    raise NotImplementedError("your turn")


def loss_by_gather(logits, labels):
    logits, targets = logits[:, :-1], labels[:, 1:]
    trained = targets != -100
    logprobs = logits.log_softmax(dim=-1)
    picked = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -picked[trained].sum() / trained.sum()


def loss_by_loop(logits, labels):
    total, count = 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                row = logits[b, t - 1].double()
                total += float(row.logsumexp(0) - row[labels[b, t]])
                count += 1
    return total / count


def loss_overflowing(logits, labels):
    targets = labels[:, 1:]
    probs = logits[:, :-1].exp() / logits[:, :-1].exp().sum(-1, keepdim=True)
    picked = probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -picked[targets != -100].log().mean()


def loss_indexing_minus_100(logits, labels):
    logprobs = logits[:, :-1].log_softmax(-1)
    return -logprobs.gather(-1, labels[:, 1:].unsqueeze(-1)).mean()


# 03.2 ---------------------------------------------------------------------------------------------------------------
def stub_weights(token_counts):
    """What the mean loss of each micro-batch is multiplied by, so that the sum is the mean over all trained tokens."""
    ...


def weights_by_list(token_counts):
    total = sum(token_counts)
    return [count / total for count in token_counts]


def weights_by_tensor(token_counts):
    counts = torch.tensor(token_counts, dtype=torch.float64)
    return counts / counts.sum()


# 03.3 ---------------------------------------------------------------------------------------------------------------
def stub_learning_rate(step, total, warmup, peak):
    """The rate of a step: (step + 1) / warmup of the peak while step < warmup, then half a cosine down to 0."""
    if step < warmup:
        return ...
    return ...


def learning_rate_in_two_cases(step, total, warmup, peak):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def learning_rate_by_half_angle(step, total, warmup, peak):
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = np.cos(np.pi / 2 * max(0, step - warmup) / (total - warmup)) ** 2
    return peak * rise * fall


def learning_rate_dividing_first(step, total, warmup, peak):
    rise = (step + 1) / warmup
    if rise <= 1:
        return peak * rise
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def learning_rate_with_short_pi(step, total, warmup, peak):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(3.14159 * (step - warmup) / (total - warmup)))


# 03.4 ---------------------------------------------------------------------------------------------------------------
def stub_leaks(train, test):
    """Indices, rising, of the test prompts that also occur in `train` once case and white space are evened out."""
    known = ...
    return [i for i, prompt in enumerate(test) if prompt in known]


def leaks_by_set(train, test):
    known = {" ".join(prompt.lower().split()) for prompt in train}
    return [i for i, prompt in enumerate(test) if " ".join(prompt.lower().split()) in known]


def leaks_by_pairs(train, test):
    def even(prompt):
        return re.sub(r"\s+", " ", prompt).strip().casefold()

    found = []
    for i in range(len(test)):
        if any(even(test[i]) == even(prompt) for prompt in train):
            found.append(i)
    return tuple(found)


def leaks_as_prompts(train, test):
    known = {" ".join(prompt.lower().split()) for prompt in train}
    return [prompt for prompt in test if " ".join(prompt.lower().split()) in known]


# 03.5 ---------------------------------------------------------------------------------------------------------------
def stub_rows(lengths, budget):
    """Rows of at most `budget` tokens, as lists of lengths: the longest first, each into the first row with room."""
    ...


def rows_by_for_else(lengths, budget):
    rows = []
    for length in sorted(lengths, reverse=True):
        for row in rows:
            if sum(row) + length <= budget:
                row.append(length)
                break
        else:
            rows.append([length])
    return rows


def rows_by_room_left(lengths, budget):
    rows, room = [], []
    for length in sorted(lengths)[::-1]:
        free = [i for i, left in enumerate(room) if left >= length]
        if not free:
            rows.append([])
            room.append(budget)
            free = [len(rows) - 1]
        rows[free[0]].append(length)
        room[free[0]] -= length
    return tuple(map(tuple, rows))


# 05.1 ---------------------------------------------------------------------------------------------------------------
def stub_adapted(x, weight, a, b, alpha):
    """W x + (alpha / r) · B (A x) for each row of x (T, D_in); weight (D_out, D_in), a (r, D_in), b (D_out, r)."""
    ...


def adapted_by_two_paths(x, weight, a, b, alpha):
    rank = len(a)
    return x @ weight.T + (alpha / rank) * ((x @ a.T) @ b.T)


def adapted_row_by_row(x, weight, a, b, alpha):
    whole = weight + alpha / b.shape[1] * torch.einsum("or,ri->oi", b, a)
    return np.stack([(whole @ row).numpy() for row in x])


def adapted_not_transposed(x, weight, a, b, alpha):
    return x @ weight.T + alpha / a.shape[0] * (x @ a) @ b


# 05.2 ---------------------------------------------------------------------------------------------------------------
def stub_count(shapes, rank, num_rows, width):
    """Trained numbers: `rank` adapters on matrices of shapes (D_out, D_in), and `num_rows` token rows of `width`."""
    return ...


def count_by_sum(shapes, rank, num_rows, width):
    return rank * sum(d_out + d_in for d_out, d_in in shapes) + num_rows * width


def count_by_building(shapes, rank, num_rows, width):
    total = torch.zeros(num_rows, width).numel()
    for d_out, d_in in shapes:
        total += torch.zeros(rank, d_in).numel() + torch.zeros(d_out, rank).numel()
    return float(total)


# 05.3 ---------------------------------------------------------------------------------------------------------------
def stub_move_rows(table, gradient, ids, lr):
    """The table (V, D) after a step of `lr` against the gradient, in the rows `ids` only; `table` itself stays."""
    ...


def move_rows_by_index(table, gradient, ids, lr):
    out = table.clone()
    for i in ids:
        out[i] = table[i] - lr * gradient[i]
    return out


def move_rows_by_mask(table, gradient, ids, lr):
    mask = torch.zeros(len(table), 1)
    mask[ids] = 1
    return table - lr * gradient * mask


def move_rows_in_place(table, gradient, ids, lr):
    table[ids] -= lr * gradient[ids]
    return table


# 05.4 ---------------------------------------------------------------------------------------------------------------
def stub_merge_adapter(weight, a, b, alpha):
    """The one matrix (D_out, D_in) that does what weight and adapter do together; `weight` itself stays."""
    ...


def merge_adapter_by_product(weight, a, b, alpha):
    return weight + (alpha / a.shape[0]) * (b @ a)


def merge_adapter_by_outer_products(weight, a, b, alpha):
    update = sum(torch.outer(b[:, k], a[k]) for k in range(len(a)))
    return (weight + alpha * update / len(a)).numpy()


def merge_adapter_in_place(weight, a, b, alpha):
    weight += alpha / a.shape[0] * (b @ a)
    return weight


ANSWERS = {
    "01.1": Answers(stub_merge, (merge_by_index, merge_by_stack)),
    "01.2": Answers(stub_new_row, (new_row_by_index, new_row_by_numpy)),
    "01.3": Answers(stub_resize, (resize_by_copy, resize_by_pad), ((resize_shrinking, "the table shrank"),)),
    "02.1": Answers(stub_loss_mask, (loss_mask_by_lists, loss_mask_by_tensor)),
    "02.2": Answers(
        stub_targets, (targets_by_where, targets_by_loop), ((targets_not_shifted, "the last position has nothing"),)
    ),
    "02.3": Answers(
        stub_pad_labels,
        (pad_labels_by_length, pad_labels_by_torch),
        ((pad_labels_in_place, "rows was changed in place"),),
    ),
    "02.4": Answers(stub_packed_mask, (packed_mask_by_loops, packed_mask_by_blocks)),
    "03.1": Answers(
        stub_loss,
        (loss_by_gather, loss_by_loop),
        (
            (loss_overflowing, "overflows"),
            (loss_indexing_minus_100, "no index"),
        ),
    ),
    "03.2": Answers(stub_weights, (weights_by_list, weights_by_tensor)),
    "03.3": Answers(
        stub_learning_rate,
        (learning_rate_in_two_cases, learning_rate_by_half_angle),
        (
            (learning_rate_dividing_first, "warmup may be 0"),
            (learning_rate_with_short_pi, "is π rounded"),
        ),
    ),
    "03.4": Answers(stub_leaks, (leaks_by_set, leaks_by_pairs), ((leaks_as_prompts, "return the indices"),)),
    "03.5": Answers(stub_rows, (rows_by_for_else, rows_by_room_left)),
}


# 04.1 ---------------------------------------------------------------------------------------------------------------
def stub_entropy(logits, temperature):
    """Entropy in nats of softmax(logits / temperature); logits (V,). A token of probability 0 adds nothing."""
    ...


def entropy_by_log_softmax(logits, temperature):
    logp = (logits / temperature).log_softmax(-1)
    p = logp.exp()
    return -(p * logp)[p > 0].sum()


def entropy_by_loop(logits, temperature):
    probs = (logits / temperature).softmax(-1).tolist()
    return sum(-p * math.log(p) for p in probs if p > 0)


def entropy_with_nan(logits, temperature):
    p = (logits / temperature).softmax(-1)
    return -(p * p.log()).sum()


# 04.2 ---------------------------------------------------------------------------------------------------------------
def stub_top_p(logits, p):
    """Logits (V,), -inf wherever the token is not in the smallest set of likeliest tokens whose mass reaches p."""
    ...


def top_p_by_scatter(logits, p):
    probs, order = logits.softmax(-1).sort(descending=True)
    is_cut_sorted = probs.cumsum(-1) - probs >= p
    is_cut = torch.zeros_like(is_cut_sorted).scatter(0, order, is_cut_sorted)
    return logits.masked_fill(is_cut, -math.inf)


def top_p_by_loop(logits, p):
    probs = logits.softmax(-1).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= p:
            break
        kept.append(token)
        mass += probs[token]
    return [x if i in kept else -math.inf for i, x in enumerate(logits.tolist())]


def top_p_in_place(logits, p):
    probs, order = logits.softmax(-1).sort(descending=True)
    logits[order[probs.cumsum(-1) - probs >= p]] = -math.inf
    return logits


# 04.3 ---------------------------------------------------------------------------------------------------------------
def stub_penalise(logits, seen, penalty):
    """Logits (V,) with the tokens in `seen` less likely: positive ones divided by the penalty, the others times it."""
    ...


def penalise_by_where(logits, seen, penalty):
    found = logits[seen]
    out = logits.clone()
    out[seen] = torch.where(found > 0, found / penalty, found * penalty)
    return out


def penalise_by_list(logits, seen, penalty):
    changed = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits.tolist())]
    return np.array(changed)


def penalise_in_place(logits, seen, penalty):
    for token in set(seen):
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    return logits


# 04.4 ---------------------------------------------------------------------------------------------------------------
def stub_until_stop(pieces, stops):
    """The text before the first stop string, and how many pieces had to be read to see it whole."""
    ...


def until_stop_by_find(pieces, stops):
    text = ""
    for i, piece in enumerate(pieces):
        text += piece
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], i + 1
    return text, len(pieces)


def until_stop_by_regex(pieces, stops):
    pattern = re.compile("|".join(map(re.escape, stops)))
    for count in range(1, len(pieces) + 1):
        found = pattern.search("".join(pieces[:count]))
        if found:
            return ["".join(pieces)[: found.start()], count]
    return ["".join(pieces), len(pieces)]


def until_stop_text_only(pieces, stops):
    return until_stop_by_find(pieces, stops)[0]


# 04.5 ---------------------------------------------------------------------------------------------------------------
def stub_beam_step(scores, logprobs, eos_id):
    """One step of beam search: (running, finished), each a list of (parent, token, score), best first."""
    ...


def beam_step_by_topk(scores, logprobs, eos_id):
    beams, vocabulary = logprobs.shape
    values, places = (scores.unsqueeze(1) + logprobs).flatten().topk(2 * beams)
    running, finished = [], []
    for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        parent, token = divmod(place, vocabulary)
        if token != eos_id:
            running.append((parent, token, value))
        elif rank < beams:
            finished.append((parent, token, value))
    return running[:beams], finished


def beam_step_by_sorting(scores, logprobs, eos_id):
    beams = len(scores)
    every = [(i, t, float(scores[i]) + float(x)) for i, row in enumerate(logprobs) for t, x in enumerate(row)]
    every = sorted(every, key=lambda candidate: candidate[2], reverse=True)[: 2 * beams]
    every = [list(candidate) for candidate in every]
    return [[c for c in every if c[1] != eos_id][:beams], [c for c in every[:beams] if c[1] == eos_id]]


def beam_step_misaligned(scores, logprobs, eos_id):
    values, places = (scores + logprobs).flatten().topk(2 * len(scores))
    return list(zip(places, values, strict=True)), []


ANSWERS |= {
    "04.1": Answers(
        stub_entropy, (entropy_by_log_softmax, entropy_by_loop), ((entropy_with_nan, "such a token must add 0"),)
    ),
    "04.2": Answers(stub_top_p, (top_p_by_scatter, top_p_by_loop), ((top_p_in_place, "logits was changed in place"),)),
    "04.3": Answers(
        stub_penalise, (penalise_by_where, penalise_by_list), ((penalise_in_place, "logits was changed in place"),)
    ),
    "04.4": Answers(
        stub_until_stop, (until_stop_by_find, until_stop_by_regex), ((until_stop_text_only, "return both"),)
    ),
    "04.5": Answers(
        stub_beam_step, (beam_step_by_topk, beam_step_by_sorting), ((beam_step_misaligned, "do not line up"),)
    ),
    "05.1": Answers(
        stub_adapted, (adapted_by_two_paths, adapted_row_by_row), ((adapted_not_transposed, "shapes do not meet"),)
    ),
    "05.2": Answers(stub_count, (count_by_sum, count_by_building)),
    "05.3": Answers(
        stub_move_rows, (move_rows_by_index, move_rows_by_mask), ((move_rows_in_place, "changed in place"),)
    ),
    "05.4": Answers(
        stub_merge_adapter,
        (merge_adapter_by_product, merge_adapter_by_outer_products),
        ((merge_adapter_in_place, "changed in place"),),
    ),
}


# 06.1 ---------------------------------------------------------------------------------------------------------------
def stub_pause(attempt, draw, retry_after=None, base=1.0, cap=60.0):
    """Seconds before the next try; attempt 0 has just failed, draw is in [0, 1)."""
    ...


def pause_by_max(attempt, draw, retry_after=None, base=1.0, cap=60.0):
    limit = min(cap, base * 2**attempt)
    return max(draw * limit, retry_after or 0)


def pause_by_loop(attempt, draw, retry_after=None, base=1.0, cap=60.0):
    limit = base
    for _ in range(attempt):
        limit = min(limit * 2, cap)
    seconds = draw * min(limit, cap)
    if retry_after is not None and retry_after > seconds:
        seconds = retry_after
    return torch.tensor(seconds, dtype=torch.float64)


# 06.2 ---------------------------------------------------------------------------------------------------------------
def stub_replay(text):
    """The answers by key, and how many characters are whole lines."""
    ...


def replay_by_lines(text):
    answers, kept = {}, 0
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        record = json.loads(line)
        answers.setdefault(record["key"], record["answer"])
        kept += len(line)
    return answers, kept


def replay_by_partition(text):
    whole, _, piece = text.rpartition("\n")
    records = [json.loads(line) for line in whole.split("\n") if line]
    return {r["key"]: r["answer"] for r in reversed(records)}, len(text) - len(piece)


def replay_everything(text):
    answers = {}
    for line in text.splitlines():
        record = json.loads(line)
        answers.setdefault(record["key"], record["answer"])
    return answers, len(text)


# 06.3 ---------------------------------------------------------------------------------------------------------------
CALLS = {"<|AGENT|>": ("python", {"code"}), "<|EDIT|>": ("editor", {"original_code", "modified_code"})}


def stub_reading(output):
    """The mode token of an answer that is right; "" for any other."""
    ...


def reading_by_partition(output):
    before, _, rest = output.partition("<think>")
    thought, closed, rest = rest.partition("</think>")
    if before.strip() or not closed or not thought.strip():
        return ""
    if sum(output.count(token) for token in CALLS) != 1:
        return ""
    token = next((token for token in CALLS if rest.lstrip().startswith(token)), "")
    if not token or "{" not in rest:
        return ""
    try:
        call = json.loads(rest[rest.index("{") :])
    except ValueError:
        return ""
    tool, names = CALLS[token]
    is_right = call.get("name") == tool and set(call) == {"name", "arguments"} and set(call["arguments"]) == names
    return token if is_right else ""


def reading_by_pattern(output):
    form = r"\s*<think>(?P<why>.+?)</think>\s*(?P<token><\|AGENT\|>|<\|EDIT\|>)[^{]*(?P<call>\{.*\})\s*"
    found = re.fullmatch(form, output, re.DOTALL)
    if found is None or not found["why"].strip() or len(re.findall(r"<\|(?:AGENT|EDIT)\|>", output)) > 1:
        return ""
    tool, names = CALLS[found["token"]]
    try:
        call = json.loads(found["call"])
        return (
            found["token"]
            if call == {"name": tool, "arguments": dict(call["arguments"])} and (call["arguments"].keys() == names)
            else ""
        )
    except (ValueError, KeyError):
        return ""


# 06.4 ---------------------------------------------------------------------------------------------------------------
def stub_balanced(modes):
    """The numbers of the rows to keep, in order: of each mode the first, equally many."""
    ...


def balanced_by_counting(modes):
    least = min(Counter(modes).values())
    left = dict.fromkeys(modes, least)
    kept = []
    for i, mode in enumerate(modes):
        if left[mode]:
            left[mode] -= 1
            kept.append(i)
    return kept


def balanced_by_sorting(modes):
    rows = {mode: [i for i, m in enumerate(modes) if m == mode] for mode in modes}
    least = min(map(len, rows.values()))
    return tuple(sorted(i for mine in rows.values() for i in mine[:least]))


ANSWERS |= {
    "06.1": Answers(stub_pause, (pause_by_max, pause_by_loop)),
    "06.2": Answers(stub_replay, (replay_by_lines, replay_by_partition), ((replay_everything, "leave it out first"),)),
    "06.3": Answers(stub_reading, (reading_by_partition, reading_by_pattern)),
    "06.4": Answers(stub_balanced, (balanced_by_counting, balanced_by_sorting)),
}


# 07.1 ---------------------------------------------------------------------------------------------------------------
def stub_dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The DPO loss of each pair (B,), from log-probabilities of whole answers (B,) in nats."""
    ...


def dpo_by_logsigmoid(chosen, rejected, ref_chosen, ref_rejected, beta):
    gain = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -torch.nn.functional.logsigmoid(beta * gain)


def dpo_by_softplus(chosen, rejected, ref_chosen, ref_rejected, beta):
    policy, reference = chosen - rejected, ref_chosen - ref_rejected
    return torch.nn.functional.softplus(-beta * (policy - reference).double())


def dpo_that_underflows(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -torch.log(torch.sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))))


def dpo_in_numbers(chosen, rejected, ref_chosen, ref_rejected, beta):
    rows = zip(*(side.tolist() for side in (chosen, rejected, ref_chosen, ref_rejected)), strict=True)
    return torch.tensor([np.logaddexp(0.0, -beta * ((c - rc) - (r - rr))) for c, r, rc, rr in rows])


def dpo_by_numpy(chosen, rejected, ref_chosen, ref_rejected, beta):
    gain = (chosen - ref_chosen - rejected + ref_rejected).numpy()
    return np.logaddexp(0.0, -beta * gain)


def dpo_without_gradient_of_rejected(chosen, rejected, ref_chosen, ref_rejected, beta):
    return dpo_by_logsigmoid(chosen, rejected.detach(), ref_chosen, ref_rejected, beta)


# 07.2 ---------------------------------------------------------------------------------------------------------------
def stub_smoothed(score, epsilon):
    """The loss of each pair (B,) whose label is the wrong way round with probability epsilon; score = beta · h."""
    ...


def smoothed_by_two_losses(score, epsilon):
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - epsilon) * log_sigmoid(score) - epsilon * log_sigmoid(-score)


def smoothed_by_shift(score, epsilon):  # -log σ(-s) = -log σ(s) + s
    return (torch.nn.functional.softplus(-score) + epsilon * score).tolist()


# 07.3 ---------------------------------------------------------------------------------------------------------------
def stub_preferred(margins):
    """Share of the pairs whose margin (B,) is above 0; a tie counts half."""
    ...


def preferred_by_sign(margins):
    return ((torch.sign(margins) + 1) / 2).mean().item()


def preferred_by_loop(margins):
    points = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins.tolist()]
    return np.mean(points)


# 07.4 ---------------------------------------------------------------------------------------------------------------
def stub_implicit_reward(logprobs, ref_logprobs, mask, beta):
    """The implicit reward of each answer (B,): beta times the gain of its trained tokens; all (B, T), mask bool."""
    ...


def implicit_reward_by_mask(logprobs, ref_logprobs, mask, beta):
    return beta * ((logprobs - ref_logprobs) * mask).sum(1)


def implicit_reward_by_row(logprobs, ref_logprobs, mask, beta):
    return [beta * (p[m].sum() - r[m].sum()) for p, r, m in zip(logprobs, ref_logprobs, mask, strict=True)]


# 07.5 ---------------------------------------------------------------------------------------------------------------
def stub_best_of(scores, values, n):
    """The mean value of the best-scored of n answers, over all choices of n among them; equal scores, equal values."""
    ...


def best_of_by_counting(scores, values, n):
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    total = sum(math.comb(rank, n - 1) * values[i] for rank, i in enumerate(order))
    return total / math.comb(len(scores), n)


def best_of_by_chance(scores, values, n):
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
    mean, none_yet = 0.0, 1.0  # the chance that no better one is among the n
    for rank, i in enumerate(order):
        is_chosen = min(1.0, n / (len(scores) - rank))
        mean += none_yet * is_chosen * values[i]
        none_yet *= 1 - is_chosen
    return mean


def best_of_by_enumeration(scores, values, n):
    choices = list(itertools.combinations(range(len(scores)), n))
    return sum(values[max(choice, key=lambda i: scores[i])] for choice in choices) / len(choices)


ANSWERS |= {
    "07.1": Answers(
        stub_dpo,
        (dpo_by_logsigmoid, dpo_by_softplus),
        (
            (dpo_that_underflows, "underflows"),
            (dpo_in_numbers, "a later cell trains through this loss"),
            (dpo_by_numpy, "a later cell trains through this loss"),
            (dpo_without_gradient_of_rejected, "the gradient at [1]"),
        ),
    ),
    "07.2": Answers(stub_smoothed, (smoothed_by_two_losses, smoothed_by_shift)),
    "07.3": Answers(stub_preferred, (preferred_by_sign, preferred_by_loop)),
    "07.4": Answers(stub_implicit_reward, (implicit_reward_by_mask, implicit_reward_by_row)),
    "07.5": Answers(
        stub_best_of, (best_of_by_counting, best_of_by_chance), ((best_of_by_enumeration, "2,704,156 ways"),)
    ),
}


# 08.1 ---------------------------------------------------------------------------------------------------------------
def stub_advantages(rewards):
    """Each reward (P, G) minus the mean of the other answers' in its row."""
    ...


def advantages_from_sums(rewards):
    others = rewards.sum(-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


def advantages_by_loop(rewards):
    rows = []
    for row in rewards.tolist():
        rows.append([r - sum(row[:i] + row[i + 1 :]) / (len(row) - 1) for i, r in enumerate(row)])
    return rows


# 08.2 ---------------------------------------------------------------------------------------------------------------
def stub_clipped(logprobs, old_logprobs, advantages, epsilon):
    """The clipped loss of each answer (N,): -min(ratio · A, clipped ratio · A)."""
    ...


def clipped_by_minimum(logprobs, old_logprobs, advantages, epsilon):
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, torch.clamp(ratio, 1 - epsilon, 1 + epsilon) * advantages)


def clipped_by_sign(logprobs, old_logprobs, advantages, epsilon):
    ratio = torch.exp(logprobs - old_logprobs)
    held = torch.where(advantages > 0, ratio.clamp(max=1 + epsilon), ratio.clamp(min=1 - epsilon))
    return (-held * advantages).numpy()


# 08.3 ---------------------------------------------------------------------------------------------------------------
def stub_k3(logprobs, ref_logprobs):
    """The k3 estimate of KL(policy, reference) at each token (T,), from tokens that the policy sampled."""
    ...


def k3_by_exp(logprobs, ref_logprobs):
    ratio = ref_logprobs - logprobs
    return ratio.exp() - 1 - ratio


def k3_by_probabilities(logprobs, ref_logprobs):
    return (ref_logprobs.exp() / logprobs.exp() - 1 + logprobs - ref_logprobs).tolist()


# 08.4 ---------------------------------------------------------------------------------------------------------------
def stub_selection(prompts, answers, rewards, limit):
    """(prompt, answer) of right answers: in order, none twice for a prompt, at most `limit` a prompt."""
    ...


def selection_by_loop(prompts, answers, rewards, limit):
    kept = []
    for prompt, texts, marks in zip(prompts, answers, rewards, strict=True):
        mine = []
        for text, mark in zip(texts, marks, strict=True):
            if mark == 1 and text not in mine and len(mine) < limit:
                mine.append(text)
        kept += [(prompt, text) for text in mine]
    return kept


def selection_by_dict(prompts, answers, rewards, limit):
    right = [{t: None for t, m in zip(ts, ms, strict=True) if m == 1} for ts, ms in zip(answers, rewards, strict=True)]
    return tuple([prompt, text] for prompt, texts in zip(prompts, right, strict=True) for text in list(texts)[:limit])


# 08.5 ---------------------------------------------------------------------------------------------------------------
def stub_verifier(text, numbers, target):
    """1.0 for an answer that keeps every rule, 0.1 for one that can be read but is wrong, 0.0 otherwise."""
    ...


def verifier_by_sorting(text, numbers, target):
    answer = extract_answer(text)
    expression = None if answer is None else parse_expression(answer)
    if expression is None:
        return 0.0
    is_right = expression.value == target and sorted(expression.numbers) == sorted(numbers)
    return 1.0 if is_right else 0.1


def verifier_by_counting(text, numbers, target):
    answer = extract_answer(text)
    if answer is None or (expression := parse_expression(answer)) is None:
        return 0.0
    if Counter(expression.numbers) != Counter(numbers):
        return 0.1
    return 1 if expression.value == target else 0.1


def verifier_without_asking(text, numbers, target):
    expression = parse_expression(extract_answer(text))
    if expression is None:
        return 0.0
    return 1.0 if expression.value == target and sorted(expression.numbers) == sorted(numbers) else 0.1


ANSWERS |= {
    "08.1": Answers(stub_advantages, (advantages_from_sums, advantages_by_loop)),
    "08.2": Answers(stub_clipped, (clipped_by_minimum, clipped_by_sign)),
    "08.3": Answers(stub_k3, (k3_by_exp, k3_by_probabilities)),
    "08.4": Answers(stub_selection, (selection_by_loop, selection_by_dict)),
    "08.5": Answers(
        stub_verifier,
        (verifier_by_sorting, verifier_by_counting),
        ((verifier_without_asking, "give None where there is nothing to read"),),
    ),
}


# 09.1 ---------------------------------------------------------------------------------------------------------------
def stub_prompt_interval(values, prompts):
    """Mean of the prompts' means, and its 95 % interval by Student's t: (mean, low, high)."""
    ...


def prompt_interval_by_loop(values, prompts):
    from scipy.stats import t

    groups = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    means = [sum(group) / len(group) for group in groups.values()]
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    reach = t.ppf(0.975, len(means) - 1) * math.sqrt(variance / len(means))
    return mean, mean - reach, mean + reach


def prompt_interval_by_pandas(values, prompts):
    import pandas as pd
    from scipy.stats import t

    means = pd.Series(values).groupby(list(prompts)).mean()
    reach = means.sem() * t.isf(0.025, len(means) - 1)
    return np.array([means.mean(), means.mean() - reach, means.mean() + reach])


# 09.2 ---------------------------------------------------------------------------------------------------------------
def stub_paired_p(a, b):
    """Exact two-sided p of "a and b are equally often right", from marks on the same prompts."""
    ...


def paired_p_by_comb(a, b):
    gained = sum(y and not x for x, y in zip(a, b, strict=True))
    lost = sum(x and not y for x, y in zip(a, b, strict=True))
    m = gained + lost
    tail = sum(math.comb(m, i) for i in range(min(gained, lost) + 1)) / 2**m
    return min(1.0, 2 * tail)


def paired_p_by_cdf(a, b):
    from scipy.stats import binom

    a, b = np.asarray(a, bool), np.asarray(b, bool)
    differ = int((a != b).sum())
    return np.minimum(1, 2 * binom.cdf(min((b & ~a).sum(), (a & ~b).sum()), differ, 0.5))


# 09.3 ---------------------------------------------------------------------------------------------------------------
def stub_pass(n, c, k):
    """Chance that one of k of the n answers is right, c of which are."""
    ...


def pass_by_comb(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_by_product(n, c, k):
    return float(1 - np.prod([max(0, n - c - i) / (n - i) for i in range(k)]))


# 09.4 ---------------------------------------------------------------------------------------------------------------
def stub_win_rate(shown_first, shown_second):
    """(win rate of A over both orders, share of pairs on which the order decided)."""
    ...


def win_rate_by_pairs(shown_first, shown_second):
    worth = {"first": 1.0, "tie": 0.5, "second": 0.0}
    pairs = list(zip(shown_first, shown_second, strict=True))
    won = sum((worth[x] + 1 - worth[y]) / 2 for x, y in pairs) / len(pairs)
    return won, sum(x == y and x != "tie" for x, y in pairs) / len(pairs)


def win_rate_by_counting(shown_first, shown_second):
    points = flips = 0
    for x, y in zip(shown_first, shown_second, strict=True):
        points += 2 * (x == "first") + (x == "tie") + 2 * (y == "second") + (y == "tie")
        flips += (x, y) in (("first", "first"), ("second", "second"))
    return points / 4 / len(shown_first), flips / len(shown_first)


ANSWERS |= {
    "09.1": Answers(stub_prompt_interval, (prompt_interval_by_loop, prompt_interval_by_pandas)),
    "09.2": Answers(stub_paired_p, (paired_p_by_comb, paired_p_by_cdf)),
    "09.3": Answers(stub_pass, (pass_by_comb, pass_by_product)),
    "09.4": Answers(stub_win_rate, (win_rate_by_pairs, win_rate_by_counting)),
}
