"""One suite over local training and Tinker: the SDK itself, against the service of `qftlab tinker-local`.

The oracle is plain transformers in float64 with adapters written out here; it knows neither our `Step` nor peft.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

tinker = pytest.importorskip("tinker", reason='without the SDK of Tinker: pip install "qftlab[tinker]", Python 3.11')
pytest.importorskip("fastapi", reason='without FastAPI: pip install "qftlab[serve]"')

from tinker import types  # noqa: E402

from qftlab.files import bundled  # noqa: E402
from qftlab.model.loading import load_model  # noqa: E402
from qftlab.remote import tinker as ours  # noqa: E402
from qftlab.remote.budget import ServerError  # noqa: E402
from qftlab.remote.tinker import TinkerConfig, check_moved, connect, datum, read_examples, supported_models, train  # noqa: E402
from qftlab.rows.batches import Example, batches, count_trained  # noqa: E402
from qftlab.rows.examples import encode_rows  # noqa: E402
from qftlab.rows.tokenizer import load_tokenizer  # noqa: E402
from qftlab_course import tinker_project as project  # noqa: E402
from qftlab_course.tinker_local import serving  # noqa: E402
from qftlab_course.tinker_project import ProjectConfig, bring_back, read_guide, to_peft  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = str(bundled("tiny"))
KEY = "tml-of-no-one"
TOLERANCE = 1e-5  # nats a token: fp32 of the service against float64; losses are about 1
ROWS = [json.loads(line) for line in (bundled("instructions") / "train.jsonl").read_text().splitlines()[:24]]


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """`tiny` with a head of its own, which is another matrix than the embedding."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    generator = torch.Generator().manual_seed(0)
    head.weight.data = model.lm_head.weight.detach() + 0.01 * torch.randn(head.weight.shape, generator=generator)
    model.lm_head = head
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(untied, tmp_path_factory):
    """A service of `tiny` under its own and the guide's name, and of the untied one, in this process."""
    before = {name: os.environ.get(name) for name in (ours.URL, ours.KEY, "TINKER_TELEMETRY")}
    models = ["tiny", "Qwen/Qwen3-8B-Base=tiny", f"untied={untied}", untied]
    with serving(models, tmp_path_factory.mktemp("tinker")) as address:
        os.environ |= {ours.URL: address, ours.KEY: KEY, "TINKER_TELEMETRY": "0"}
        yield address
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def service(url):
    return tinker.ServiceClient()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return encode_rows(load_tokenizer("tiny"), ROWS)[0]


def new_client(service, base: str = "tiny", seed: int = 3, head: bool = False, rank: int = 4):
    return service.create_lora_training_client(base, rank=rank, seed=seed, train_unembed=head).result()


def step(client, data, loss: str = "cross_entropy", lr: float = 1e-3, **config) -> float:
    waiting = client.forward_backward(data, loss, config or None)
    client.optim_step(types.AdamParams(learning_rate=lr)).result()
    return waiting.result().metrics["loss:sum"]


def loss_of(client, data) -> float:
    return client.forward(data, "cross_entropy").result().metrics["loss:sum"]


def external(client, folder: Path, name: str = "ext") -> dict[str, torch.Tensor]:
    """A run's adapters as anybody may have them: saved, and fetched by their links."""
    import urllib.request

    path = client.save_weights_external(name).result().path
    links = tinker.RestClient().get_external_weights_urls(path).result().urls
    target = folder / f"{name}.safetensors"
    with urllib.request.urlopen(links["adapter_model.safetensors"], timeout=30) as answer:
        target.write_bytes(answer.read())
    return load_file(target)


def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, by transformers' own forward."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


class Oracle:
    """transformers in float64, each adapted matrix as W x + (32 / r) B A x, trained by torch's AdamW."""

    def __init__(self, source: str, tensors: dict[str, torch.Tensor], lr: float = 1e-3) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager")
        self.model.requires_grad_(False)
        self.weights = {}
        for name, tensor in tensors.items():
            self.weights[name] = tensor.double().clone().requires_grad_()
        modules = dict(self.model.named_modules())
        for name in [n for n in self.weights if n.endswith("lora_A.weight")]:
            inner = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            inner = "lm_head" if inner == "model.unembed_tokens" else inner
            a, b = self.weights[name], self.weights[name.replace("lora_A", "lora_B")]
            modules[inner].register_forward_hook(
                lambda _, x, y, a=a, b=b: y + 32 / a.shape[0] * F.linear(F.linear(x[0], a), b)
            )
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=lr, betas=(0.9, 0.95), eps=1e-12,
                                           weight_decay=0.0)  # fmt: skip

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of each token but the first, one document at a time."""
        return logprobs_of(self.model, ids)

    def loss(self, part: list[Example]) -> torch.Tensor:
        """Mean over the trained tokens of all documents."""
        found = [-self.logprobs(e.input_ids)[torch.tensor(e.loss_mask[1:])] for e in part]
        return torch.cat(found).mean()

    def update(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def data_of(part: list[Example]) -> list:
    return [datum(example, count_trained(part)) for example in part]


def test_rows_become_the_same_tokens_and_masks_as_for_local_training(url, examples, tmp_path) -> None:
    """Read back from the SDK's own types: inputs shifted by one, weights that are mask over count, and no other."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    found, rows = read_examples(TinkerConfig(data=str(file)), load_tokenizer("tiny"))
    assert found == examples and len(rows) == len(ROWS)
    count = sum(sum(example.loss_mask[1:]) for example in examples)
    for example, one in zip(examples, data_of(examples), strict=True):
        targets, weights = (one.loss_fn_inputs[name].data for name in ("target_tokens", "weights"))
        assert one.model_input.to_ints() == example.input_ids[:-1] and targets == example.input_ids[1:]
        assert weights == pytest.approx([kept / count for kept in example.loss_mask[1:]])
    tokenizer = load_tokenizer("tiny")
    texts = [tokenizer.decode([t for t, kept in zip(e.input_ids, e.loss_mask, strict=True) if kept]) for e in examples]
    assert [text.removesuffix("<|im_end|>") for text in texts] == [row["output"] for row in ROWS]


@pytest.mark.parametrize(("base", "head"), [("tiny", False), ("tiny", True), ("untied", True)])
def test_losses_of_steps_are_those_of_transformers_in_float64(service, untied, examples, base, head, tmp_path) -> None:
    client = new_client(service, base, head=head)
    oracle = Oracle(untied if base == "untied" else TINY, external(client, tmp_path))
    assert any("unembed_tokens" in name for name in oracle.weights) == head
    for epoch in range(2):
        for numbers in batches(12, batch_size=4, seed=0, epoch=epoch):
            part = [examples[i] for i in numbers]
            assert step(client, data_of(part)) == pytest.approx(oracle.update(oracle.loss(part)), abs=TOLERANCE)


def test_the_recipe_trains_and_its_losses_are_the_oracle_s(service, examples, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    config = TinkerConfig(base_model="tiny", batch_size=4, epochs=2, lr=3e-4)
    client, examples = new_client(service), examples[:12]
    oracle = Oracle(TINY, external(client, tmp_path), lr=3e-4)
    losses = train(client, examples, config)
    for epoch, loss in enumerate(losses):
        total = 0.0
        for numbers in batches(len(examples), batch_size=4, seed=0, epoch=epoch):
            part = [examples[i] for i in numbers]
            total += oracle.update(oracle.loss(part)) * count_trained(part)
        assert loss == pytest.approx(total / count_trained(examples), abs=TOLERANCE)
    assert losses[1] < losses[0] - 0.02 and f"epoch 2/2: loss {losses[1]:.4f}" in caplog.text


def test_gradients_add_up_until_the_step(service, examples) -> None:
    whole, halves, data = new_client(service), new_client(service), data_of(examples[:10])
    step(whole, data, lr=1e-2)
    loss_of(halves, data)  # leaves no gradient
    for part in (data[:5], data[5:]):
        halves.forward_backward(part, "cross_entropy")
    halves.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    after = loss_of(whole, data)
    assert loss_of(halves, data) == pytest.approx(after, abs=1e-6)
    step(halves, data, lr=0.0)  # and are gone after it: a step of nothing changes nothing
    assert loss_of(halves, data) == pytest.approx(after, abs=1e-6)


def test_a_resumed_run_goes_on_to_the_last_digit(service, examples) -> None:
    client, data = new_client(service), data_of(examples[:6])
    for _ in range(3):
        step(client, data)
    path = client.save_state("half").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    fresh = service.create_training_client_from_state(path).result()
    on, resumed = ([step(one, data) for _ in range(3)] for one in (client, again))
    assert on == resumed
    assert [step(fresh, data) for _ in range(3)][:1] == on[:1] and loss_of(fresh, data) != loss_of(client, data)


def test_twenty_steps_on_tiny_lower_the_loss(service, examples) -> None:
    client, data = new_client(service), data_of(examples[:6])
    losses = [step(client, data, lr=5e-3) for _ in range(20)]
    assert losses[-1] < 0.2 * losses[0]


def test_sampling_ends_at_stops_and_repeats_with_its_seed(service) -> None:
    tokenizer, client = load_tokenizer("tiny"), service.create_sampling_client(base_model="tiny").result()
    ids = tokenizer("47 + 38 =", add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()

    def sample(count: int = 1, **params):
        made = types.SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params})
        return client.sample(types.ModelInput.from_ints(ids), count, made).result().sequences

    [plain] = sample()
    assert plain.tokens[: len(wanted)] == wanted
    [cut] = sample(stop=[plain.tokens[1]])
    assert cut.tokens == plain.tokens[:2] and cut.stop_reason == "stop"
    text = tokenizer.decode(plain.tokens[1])
    [found] = sample(stop=text)
    assert text in tokenizer.decode(found.tokens) and found.stop_reason == "stop" and len(found.tokens) <= 2
    [free] = sample(stop=[], max_tokens=20)
    assert len(free.tokens) == 20 and free.stop_reason == "length"
    ids = tokenizer("My name is", add_special_tokens=False).input_ids
    four, again, other = (sample(4, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert [s.tokens for s in four] == [s.tokens for s in again] != [s.tokens for s in other]
    assert len({tuple(s.tokens) for s in four}) > 1 and len({s.sequence_id for s in four}) == 4
    for one in four:  # over all of the vocabulary, at temperature 1
        logits = model(torch.tensor([ids + one.tokens])).logits[0, len(ids) - 1 : -1].double()
        oracle = logits.log_softmax(-1).gather(1, torch.tensor(one.tokens).unsqueeze(1)).squeeze(1)
        assert one.logprobs == pytest.approx(oracle.tolist(), abs=1e-4)


def test_prompt_logprobs_are_transformers_own(service, examples) -> None:
    client, ids = service.create_sampling_client(base_model="tiny").result(), examples[0].input_ids
    found = client.compute_logprobs(types.ModelInput.from_ints(ids)).result()
    assert found[0] is None and found[1:] == pytest.approx(Oracle(TINY, EMPTY).logprobs(ids).tolist(), abs=TOLERANCE)
    last = client.compute_logprobs(types.ModelInput.from_ints(ids), prompt_logprobs_last_n=3).result()
    assert last[:-3] == [None] * (len(ids) - 3) and last[-3:] == pytest.approx(found[-3:])


EMPTY = {"none": torch.zeros(1)}  # AdamW wants something


@pytest.mark.long
@pytest.mark.parametrize(("base", "head"), [("tiny", False), ("untied", True)])
def test_weights_come_back_by_the_sdk_s_command_line(service, url, untied, examples, base, head, tmp_path) -> None:
    """Merged by our loader and read by transformers: log-probabilities are those of the served sampler."""
    client, source = new_client(service, base, head=head), untied if base == "untied" else TINY
    for _ in range(4):
        step(client, data_of(examples), lr=1e-3)
    path = client.save_weights_external("back").result().path
    sampler = client.save_weights_for_sampler("back").result().path
    command = [str(Path(sys.executable).parent / "tinker"), "checkpoint", "download", path, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [folder] = [p for p in tmp_path.iterdir() if p.is_dir()]
    raw = tmp_path / "raw.safetensors"
    raw.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    to_peft(folder, source)
    merged = load_model(source, lora=folder, adapters="merge")
    merged.save_pretrained(tmp_path / "merged")
    plain, exact = (AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
                    for dtype in (torch.float32, torch.float64))  # fmt: skip
    served = service.create_sampling_client(model_path=sampler).result()
    base_ids = examples[0].input_ids
    untrained = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert (logprobs_of(untrained, base_ids) - logprobs_of(plain, base_ids)).abs().max() > 0.1
    oracle = Oracle(source, load_file(raw))
    for ids in [example.input_ids for example in examples[:6]]:
        found = served.compute_logprobs(types.ModelInput.from_ints(ids)).result()[1:]
        mine, truth = logprobs_of(plain, ids), oracle.logprobs(ids).detach()
        # Measured: fp32 alone moves a token's by 3e-5 (logits of 20), a document's mean by far less.
        assert (torch.tensor(found) - mine).mean().abs() < TOLERANCE
        assert found == pytest.approx(mine.tolist(), abs=5e-5)
        assert logprobs_of(exact, ids).tolist() == pytest.approx(truth.tolist(), abs=TOLERANCE)
    again = bring_back(path, source, tmp_path / "again")
    assert (again / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()


def test_an_adapter_on_a_tied_head_is_not_merged(service, tmp_path) -> None:
    path = new_client(service, head=True).save_weights_external("tied").result().path
    with pytest.raises(ValueError, match="ties its head.*train_unembed=False"):
        bring_back(path, "tiny", tmp_path / "tied")


def rollouts(client, examples: list[Example], shift: float = 0.0) -> list:
    """Data of a policy gradient: log-probabilities as they are now (plus a shift), advantages that differ by row."""
    given = client.forward(data_of(examples), "cross_entropy").result().loss_fn_outputs
    made = []
    for i, (example, output) in enumerate(zip(examples, given, strict=True)):
        advantages = [(1.0 - i) * kept for kept in example.loss_mask[1:]]
        logprobs = [value + shift for value in output["logprobs"].data]
        inputs = {"target_tokens": example.input_ids[1:], "logprobs": logprobs, "advantages": advantages}
        made.append(types.Datum(model_input=types.ModelInput.from_ints(example.input_ids[:-1]), loss_fn_inputs=inputs))
    return made


def test_importance_sampling_on_policy_is_the_policy_gradient(service, examples, tmp_path) -> None:
    """Loss: minus the sum of the advantages. Its step: that of float64 on −Σ A log p, three times over."""
    part, client = examples[:3], new_client(service)
    oracle = Oracle(TINY, external(client, tmp_path), lr=1e-2)
    for _ in range(3):
        data = rollouts(client, part)
        wanted = -sum(sum(one.loss_fn_inputs["advantages"].data) for one in data)
        assert step(client, data, "importance_sampling", lr=1e-2) == pytest.approx(wanted, abs=1e-3)
        terms = [(1.0 - i) * oracle.logprobs(e.input_ids)[torch.tensor(e.loss_mask[1:])].sum()
                 for i, e in enumerate(part)]  # fmt: skip
        oracle.update(-torch.stack(terms).sum())
        after = [oracle.loss([e]).item() for e in part]
        assert [loss_of(client, data_of([e])) for e in part] == pytest.approx(after, abs=1e-3)


def test_off_policy_losses_by_hand(service, examples) -> None:
    """Sampled half as likely as now: every ratio is 2, and ppo lets it count for 1.2 where that is worse."""
    client = new_client(service)
    data = rollouts(client, examples[:3], shift=-math.log(2))
    sums = [sum(one.loss_fn_inputs["advantages"].data) for one in data]  # positive, 0, negative
    found = client.forward(data, "importance_sampling").result().metrics["loss:sum"]
    assert found == pytest.approx(-2 * sum(sums), abs=1e-3)
    found = client.forward(data, "ppo").result().metrics["loss:sum"]
    assert found == pytest.approx(-1.2 * sums[0] - 2 * sums[2], abs=1e-3)
    found = client.forward(data, "ppo", {"clip_high_threshold": 1.5}).result().metrics["loss:sum"]
    assert found == pytest.approx(-1.5 * sums[0] - 2 * sums[2], abs=1e-3)


def test_what_the_service_refuses_is_said(service, examples) -> None:
    client, data = new_client(service), data_of(examples[:2])
    refused = []
    for bad in (lambda: client.forward_backward(data, "no_such_loss").result(),
                lambda: client.save_state("no/name").result(),
                lambda: client.forward(rollouts(client, examples[:1]), "cross_entropy").result()):  # fmt: skip
        with pytest.raises(tinker.RequestFailedError) as error:
            bad()
        assert error.value.category.value == "user"
        refused.append(str(error.value))
    assert "cross_entropy, importance_sampling, ppo, got 'no_such_loss'" in refused[0]
    assert "a number for each" in refused[2] and "weights 0" in refused[2]
    client.save_state("twice").result()
    with pytest.raises(tinker.RequestFailedError, match="there already"):
        client.save_state("twice").result()
    assert client.save_state("twice", overwrite=True).result().path.endswith("/weights/twice")
    with pytest.raises(tinker.BadRequestError, match="there is none"):
        service.create_sampling_client(model_path="tinker://a/sampler_weights/b").result()
    with pytest.raises(tinker.BadRequestError, match="must be one of tiny"):
        service.create_lora_training_client("meta-llama/none").result()
    step(client, data)  # and the run goes on


def test_checkpoints_are_listed_and_outlive_the_service(tmp_path, examples, url) -> None:
    """Another address, the same folder: what was saved is resumed and sampled by the next service."""
    losses = []
    for turn in range(2):
        with serving(["tiny"], tmp_path) as address:
            service = tinker.ServiceClient(base_url=address, api_key=KEY)
            rest = tinker.RestClient(base_url=address, api_key=KEY)
            if not turn:
                client = new_client(service)
                step(client, data_of(examples), lr=1e-2)
                saved = client.save_state("kept").result().path
            else:
                client = service.create_training_client_from_state_with_optimizer(saved).result()
            losses.append(loss_of(client, data_of(examples)))
            paths = [one.tinker_path for one in rest.list_user_checkpoints().result().checkpoints]
            assert paths == [saved] and rest.list_training_runs().result().training_runs[-1].lora_rank == 4
    assert losses[0] == losses[1]


def test_work_is_done_in_the_order_of_its_numbers(url) -> None:
    """Requests of one run may arrive in any order, and twice."""
    from qftlab_course.tinker_service import Service

    done, service = [], Service({"tiny": "tiny"}, "nowhere")
    tickets = [service.submit(f"run:{n}", lambda n=n: done.append(n), "run", n) for n in (3, 2, 2, 1, 4, 1)]
    service.close()
    assert done == [1, 2, 3, 4] and tickets[1] == tickets[2]


def test_a_wrong_key_or_address_is_one_sentence_within_seconds(url, monkeypatch, untied) -> None:
    secret = "tml-very-secret"
    with serving(["tiny"], key=secret) as locked:
        monkeypatch.setenv(ours.URL, locked)
        start = time.monotonic()
        for key, why in (
            (KEY, "refuses the key"),
            ("sk-secret", "must be set, and begin with tml-"),
            ("", "must be set"),
        ):
            monkeypatch.setenv(ours.KEY, key)
            with pytest.raises(ServerError, match=why) as error:
                connect(TinkerConfig(base_model="tiny"))
            assert not key or key not in str(error.value)
        monkeypatch.setenv(ours.KEY, secret)
        assert supported_models() == {"tiny": 512}
    for address in (locked, "http://127.0.0.1:9", "ftp:/nothing", "no address"):
        monkeypatch.setenv(ours.URL, address)
        with pytest.raises(ServerError, match="must be the address of a Tinker service") as error:
            connect(TinkerConfig(base_model="tiny"))
        assert secret not in str(error.value) and str(error.value).count("\n") == 0
    assert time.monotonic() - start < 10


def test_what_would_train_nothing_is_refused_before_anything_is_asked(monkeypatch) -> None:
    from qftlab_course.tinker_local import TinkerLocalConfig

    monkeypatch.setenv(ours.KEY, "")
    with pytest.raises(ValueError, match="data must name a file of rows, got none"):
        project.fine_tune(ProjectConfig())
    for models in ((), ""):
        with pytest.raises(ValueError, match="models must name at least one model"):
            TinkerLocalConfig(models)


def test_an_unknown_base_is_refused_by_naming_the_known(url) -> None:
    with pytest.raises(ValueError, match="got 'Qwen/Qwen3-30B-A3B': .*Qwen/Qwen3-8B-Base, tiny, untied"):
        connect(TinkerConfig(base_model="Qwen/Qwen3-30B-A3B"))


def test_a_service_that_dies_is_an_error_within_seconds(examples, url, monkeypatch) -> None:
    monkeypatch.setattr(ours, "PATIENCE", 0.3)
    with serving(["tiny"]) as address:
        monkeypatch.setenv(ours.URL, address)
        client = tinker.ServiceClient(base_url=address, api_key=KEY).create_lora_training_client("tiny").result()
        ours.result_of(client.forward(data_of(examples[:2]), "cross_entropy"))
    start = time.monotonic()
    with pytest.raises(ServerError, match="must be the address of a Tinker service that answers"):
        train(client, examples, TinkerConfig(base_model="tiny"))
    assert time.monotonic() - start < 10


SCRIPT = '''
    """As the project's guide does it: the whole set is one step, the prompt is plain text, the mask is made by hand."""
    import json, sys
    import numpy as np
    import tinker
    from tinker import types
    from config import *

    def example_of(row, tokenizer):
        inner = f"\\nInput: {row['input']}" if row["input"] else ""
        prompt = tokenizer.encode(f"Instruction: {row['instruction']}{inner}\\nResponse:", add_special_tokens=True)
        answer = tokenizer.encode(f" {row['output']}\\n\\n", add_special_tokens=False)
        tokens, weights = prompt + answer, [0] * len(prompt) + [1] * len(answer)
        return types.Datum(model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
                           loss_fn_inputs=dict(weights=weights[1:], target_tokens=tokens[1:]))

    client = tinker.ServiceClient().create_lora_training_client(base_model=BASE_MODEL, rank=LORA_RANK)
    tokenizer = client.get_tokenizer()
    rows = [row for name in DATA_FILES for row in json.load(open(name))]
    data, losses = [example_of(row, tokenizer) for row in rows], []
    for epoch in range(NUM_EPOCHS):
        waiting = client.forward_backward(data, "cross_entropy")
        if STEPS:
            client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
        logprobs = np.concatenate([one["logprobs"].tolist() for one in waiting.result().loss_fn_outputs])
        weights = np.concatenate([one.loss_fn_inputs["weights"].tolist() for one in data])
        losses.append(-np.dot(logprobs, weights) / weights.sum())
    sampler = client.save_weights_and_get_sampling_client(name="guide-20260101-000000")
    params = types.SamplingParams(max_tokens=SAMPLING_MAX_TOKENS, temperature=0.7, stop=["\\n\\n", "Instruction:"])
    prompt = types.ModelInput.from_ints(tokenizer.encode("Instruction: Add 8 and 97.\\nResponse:"))
    samples = sampler.sample(prompt=prompt, sampling_params=params, num_samples=3).result().sequences
    print(json.dumps({"losses": losses, "samples": [tokenizer.decode(one.tokens) for one in samples]}))
'''
CONFIG = """
import os
import re
MAX_SEQUENCE_LENGTH = 128
TRUNCATE_LONG_SEQUENCES = True
MODEL_NAME_PREFIX = "guide"
DATA_FILES = ["rows.json"]
BASE_MODEL = "Qwen/Qwen3-8B-Base"
LORA_RANK = 8
LEARNING_RATE = 1e-2
NUM_EPOCHS = 3
SAMPLING_MAX_TOKENS = 16384
TINKER_API_KEY = "tml-in-a-file"
OUTPUT_DIR = os.path.join("a", "b")
STEPS = {steps}
"""


@pytest.mark.long
@pytest.mark.parametrize("steps", [True, False])
def test_a_script_of_the_guide_s_kind_runs_as_it_is(url, steps, tmp_path) -> None:
    """And where it never calls optim_step, as its last version does not, our recipe's check finds out."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "config.py").write_text(CONFIG.format(steps=steps))
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["samples"]) == 3 and all("\n\n" not in text[:-2] for text in found["samples"])
    if steps:
        check_moved(found["losses"])
        assert found["losses"][-1] < found["losses"][0]
    else:
        assert len(set(found["losses"])) == 1
        with pytest.raises(ValueError, match="is optim_step called"):
            check_moved(found["losses"])


def test_a_rate_of_nothing_is_found_out(service, examples) -> None:
    with pytest.raises(ValueError, match="the loss must move, got"):
        train(new_client(service), examples, TinkerConfig(base_model="tiny", epochs=1, lr=0.0))


def test_the_guide_s_configuration_is_read_and_never_run(tmp_path, caplog) -> None:
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(steps=True) + "\nopen('was_run', 'w')\nLEARNING_RATE = 2e-5\n")
    found = read_guide(file)
    assert found == {"max_length": 128, "truncate": True, "name": "guide", "data": ["rows.json"], "lora_rank": 8,
                     "base_model": "Qwen/Qwen3-8B-Base", "lr": 2e-5, "epochs": 3,
                     "sampling_max_tokens": 16384}  # fmt: skip
    assert "TINKER_API_KEY is not known" in caplog.text and "OUTPUT_DIR is not known" in caplog.text
    assert "tml-in-a-file" not in caplog.text and not Path("was_run").exists()
    config = ProjectConfig(guide=str(file), epochs=7)
    assert (config.data, config.epochs, config.lora_rank, config.name) == (("rows.json",), 7, 8, "guide")
    yaml = tmp_path / "config.yaml"
    yaml.write_text("BASE_MODEL: tiny\nlora_rank: 2\nnonsense: 1\nSAMPLING_NUM_SAMPLES: 0\n")
    assert read_guide(yaml) == {"base_model": "tiny", "lora_rank": 2, "sampling_num_samples": 0}
    file.write_text("BASE_MODEL = pick()\nNUM_EPOCHS = 2\n")
    assert read_guide(file) == {"epochs": 2} and "BASE_MODEL is no plain value" in caplog.text
    file.write_text("NUM_EPOCHS = 0\n")
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        ProjectConfig(guide=str(file))


def test_files_are_merged_a_missing_one_is_warned_about_and_long_rows_are_named(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    long = {"instruction": "Say it.", "input": "", "output": "again and " * 60}
    for name, rows in (("a.json", ROWS[:12]), ("b.json", [long] * 12)):
        (tmp_path / name).write_text(json.dumps(rows))
    files = tuple(str(tmp_path / name) for name in ("a.json", "none.json", "b.json"))
    tokenizer = load_tokenizer("tiny")
    kept, _ = read_examples(TinkerConfig(data=files), tokenizer, 128)
    assert kept == encode_rows(tokenizer, ROWS[:12])[0] and "none.json" in caplog.text
    assert caplog.text.count("tokens, too long") == 10 and "12 documents do not fit into 128 tokens" in caplog.text
    assert "min " in caplog.text and "median" in caplog.text and "b.json, row 1:" in caplog.text
    cut, _ = read_examples(TinkerConfig(data=files, truncate=True), tokenizer, 128)
    whole = encode_rows(tokenizer, [long])[0][0]
    assert len(cut) == 24 and cut[-1].input_ids == whole.input_ids[:128]


def test_prices_are_a_table_with_its_date(tmp_path) -> None:
    """By hand: a million tokens, three epochs, $0.44 a million."""
    assert project.estimate(ProjectConfig(), 1_000_000) == (
        "3,000,000 tokens to train, about $1.32 at $0.44 a million (2026-10-07)"
    )
    table = tmp_path / "prices.yaml"
    table.write_text("tiny: {train: 2.0, date: 2030-01-01}\n")
    assert "about $4.00 at $2.0 a million (2030-01-01)" in project.estimate(
        ProjectConfig(base_model="tiny", epochs=2, prices=str(table)), 1_000_000
    )
    assert "no price of other" in project.estimate(ProjectConfig(base_model="other"), 1)


@pytest.mark.long
def test_the_command_trains_from_files_and_evaluate_asks_what_it_kept(url, untied, tmp_path, capsys) -> None:
    """Six rows learned by heart, asked on Tinker, and once more of the adapters that came back."""
    from qftlab.cli import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({k: row[k] for k in ("instruction", "input", "output")}) for row in ROWS[:6]))
    out = tmp_path / "adapters"
    options = ["--lora_rank", "16", "--lr", "2e-3", "--epochs", "60", "--batch_size", "6", "--output", str(out)]
    options += ["--train_unembed", "true"]  # `tiny` has never seen a chat, and ends no turn by its blocks alone
    assert main(["tinker", "--data", str(rows), "--base_model", untied, *options]) == 0
    said = capsys.readouterr().out
    path = re.search("tinker://[^ ]*/sampler_weights/qftlab-[0-9]{8}-[0-9]{6}", said).group()
    losses = [float(x) for x in re.search("loss of each epoch: (.*)", said).group(1).split(", ")]
    assert losses[-1] < 0.05 * losses[0] and "sample: " in said and "state, for --state: tinker://" in said
    results = {}
    for name, model in (("served", path), ("back", str(out))):
        assert main(["evaluate", "--model", model, "--data", str(rows), "--output", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "responses.jsonl").read_text().splitlines()
        results[name] = sorted((one["row"], one["response"]) for one in map(json.loads, lines))
    assert results["served"] == results["back"]
    assert sum(text == row["output"] for (_, text), row in zip(results["served"], ROWS, strict=False)) >= 5
    resumed = re.search("tinker://[^ ]*/weights/qftlab-[^ \n]*", said).group()
    assert main(["tinker", "--data", str(rows), "--base_model", untied, "--epochs", "1", "--state", resumed,
                 "--sampling_num_samples", "0"]) == 0  # fmt: skip
    again = float(re.search("loss of each epoch: (.*)", capsys.readouterr().out).group(1))
    assert again <= losses[-1] + 0.05
    assert KEY not in "".join(p.read_text() for p in tmp_path.rglob("*.json*"))
    assert main(["evaluate", "--model", path, "--data", str(rows), "--few_shot", "2"]) == 2
    assert "few_shot must be 0 on Tinker" in capsys.readouterr().err
    assert main(["evaluate", "--model", path, "--data", str(rows), "--sampling.min_p", "0.1"]) == 2
    assert "sampling.min_p must be 0 on Tinker, which does not have it, got 0.1" in capsys.readouterr().err


PAIRS = [{"prompt": f"What is {a} + {a}?", "chosen": str(2 * a), "rejected": f"It may be {a}."} for a in range(11, 23)]


@pytest.mark.long
def test_dpo_by_the_sdk_s_custom_loss_is_transformers_in_float64(service, tmp_path) -> None:
    """First loss log 2 by hand; every step that of a DPO written out on the oracle; the margins widen."""
    from qftlab.rows.examples import encode_pairs
    from qftlab_course.tinker_policies import train_pairs

    pairs = encode_pairs(load_tokenizer("tiny"), PAIRS)[0]
    config = TinkerConfig(base_model="tiny", epochs=3, batch_size=6, lr=3e-4)
    client = new_client(service)
    oracle = Oracle(TINY, external(client, tmp_path), lr=config.lr)

    def answer(example: Example) -> torch.Tensor:
        return oracle.logprobs(example.input_ids)[torch.tensor(example.loss_mask[1:])].sum()

    def log_ratio(pair) -> torch.Tensor:
        return answer(pair.chosen) - answer(pair.rejected)

    with torch.no_grad():
        start = [log_ratio(pair) for pair in pairs]
    losses = train_pairs(client, pairs, config, beta=0.5)
    for epoch, loss in enumerate(losses):
        total = 0.0
        for numbers in batches(len(pairs), batch_size=6, seed=0, epoch=epoch):
            each = [-F.logsigmoid(0.5 * (log_ratio(pairs[i]) - start[i])) for i in numbers]
            found = oracle.update(torch.stack(each).mean())
            total += found * len(numbers)
            if not epoch and numbers == batches(len(pairs), batch_size=6, seed=0, epoch=0)[0]:
                assert found == pytest.approx(math.log(2))
        assert loss == pytest.approx(total / len(pairs), abs=2e-4)  # sums of a dozen fp32 log-probabilities of 10 nats
    assert losses[2] < losses[0] - 0.01


@pytest.mark.long
def test_rloo_by_importance_sampling_earns_more(service) -> None:
    """A reward for the letter e; and the data it sends: prompts untrained, every ratio 1."""
    from qftlab.settings import PolicyConfig
    from qftlab.train.rollouts import encode_prompts
    from qftlab_course.tinker_policies import answers, policy_datum, train_policy

    tokenizer = load_tokenizer("tiny")
    prompts = encode_prompts(tokenizer, [{"prompt": f"Say {word}."} for word in "one two three four".split()])
    rewards = {"e": lambda messages, ids, text, row: text.count("e") / 4}
    policy = PolicyConfig(num_generations=8, max_new_tokens=8, temperature=1.0)
    client = new_client(service, rank=8)
    found = answers(client, tokenizer, prompts, policy, 0)
    assert len(found) == 32 and all(one.prompt_ids == prompts[i // 8].ids for i, one in enumerate(found))
    one = policy_datum(found[0], 0.25)
    size, before = len(found[0].token_ids), len(found[0].prompt_ids) - 1
    assert one.loss_fn_inputs["advantages"].data == [0.0] * before + [0.25] * size
    now = client.forward([one], "importance_sampling").result()
    assert now.metrics["loss:sum"] == pytest.approx(-0.25 * size, abs=1e-4)  # on policy every ratio is 1
    config = TinkerConfig(base_model="tiny", epochs=12, batch_size=4, lr=5e-3)
    means = train_policy(client, tokenizer, prompts, rewards, config, policy)
    assert sum(means[-3:]) > 1.5 * sum(means[:3])
    with pytest.raises(ValueError, match="beta must be 0"):
        train_policy(client, tokenizer, prompts, rewards, config, PolicyConfig(beta=0.1, temperature=1.0))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["dpo", "rloo"])
def test_the_command_s_other_stages(url, stage, tmp_path, capsys) -> None:
    from qftlab.cli import main

    file = tmp_path / "rows.jsonl"
    problems = [{"prompt": f"Make {a + b}.", "numbers": [a, b], "target": a + b} for a, b in ((1, 2), (3, 4), (5, 6))]
    file.write_text("\n".join(json.dumps(row) for row in (PAIRS if stage == "dpo" else problems)))
    options = ["--stage", stage, "--data", str(file), "--base_model", "tiny", "--epochs", "2", "--lora_rank", "2"]
    options += ["--rewards", "answer", "--num_generations", "4", "--sampling_max_tokens", "8"]
    assert main(["tinker", *options]) == 0
    said = capsys.readouterr().out
    assert ("mean reward of each epoch: 0." if stage == "rloo" else "loss of each epoch: 0.") in said
    assert main(["tinker", *options[:2], "--data", str(file), "--base_model", "tiny", "--num_generations", "1"]) == 2
    assert "num_generations must be at least 2, got 1" in capsys.readouterr().err
