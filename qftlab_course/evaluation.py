"""The command `evaluate` from rows to results: asked, kept, scored, summed up."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from qftlab.decoding.engine import Completion
from qftlab.evaluate.answers import answer_of
from qftlab.evaluate.scorers import SCORERS as PLAIN
from qftlab.evaluate.scorers import Scorer
from qftlab.evaluate.split import prompt_key
from qftlab.files import bundled, read_json, versions
from qftlab.rows.examples import load_wanted, place_of
from qftlab.rows.schemas import kind_of, unrendered
from qftlab.rows.sources import DataError
from qftlab.rows.tokenizer import load_tokenizer
from qftlab_course import results
from qftlab_course.asking import LocalModel, ServerModel
from qftlab_course.measure import Evaluation, scored
from qftlab_course.references import measure_references
from qftlab_course.report import write_json
from qftlab_course.responses import JOURNAL, RESPONSES, SCORES, collect, response_folder, score, summarise
from qftlab_course.scores import SCORERS, lenient_scorer, skill_of

log = logging.getLogger(__name__)
RESULTS, SUBMISSION, COURSE = "evaluation_results.json", "submission.jsonl", "course_responses.jsonl"
ON_TINKER = "tinker://"
FREE = ("scorers", "pass_k", "threshold", "versions")  # settings that do not decide the responses


@dataclass(frozen=True)
class Outcome:
    """What came of an evaluation.

    Args:
        results: as evaluation_results.json has it.
        responses: as `collect` gives them.
        scores: as `score` gives them.
        evaluation: the table by skill, where each row was asked once and no scorer was named.
    """

    results: dict
    responses: list[dict]
    scores: list[dict]
    evaluation: Evaluation | None


def evaluate(config) -> Outcome:
    """Asks, scores and sums up.

    Args:
        config: an `EvaluateConfig`; a folder as its output gets every file, and is gone on with.

    Raises:
        DataError, FileNotFoundError: for rows that cannot be read.
        ValueError: for rows that cannot be asked, scorers that are none, or a folder of another evaluation.
        OSError: if a server fails, or the folder cannot be written.
    """
    rows, sources = asked_rows(config)
    scorers = scorers_for(config, rows)
    with ExitStack() as stack:
        model = kind_of_model(config)(config, rows, sources)
        folder = None
        if config.is_folder:
            settings = settings_of(config, model.identity(), list(scorers))
            folder = stack.enter_context(response_folder(config.output, settings, rows, FREE))
        if config.server.url:
            from qftlab.remote.client import Client

            journal = folder / JOURNAL if folder else None
            model.client = stack.enter_context(Client(config.server, journal))
        responses = collect(model.prompts(), model.ask, config.num_samples, folder and folder / RESPONSES)
        scores = score(responses, rows, scorers)
        found = sum_up(config, rows, responses, scores, list(scorers))
        found |= references(config, model, folder) | results.tinker_results(rows, responses)
        if folder:
            write_files(folder, rows, responses, scores, found)
    _say_unfinished(responses)
    return Outcome(found, responses, scores, by_skill(config, rows, responses))


def kind_of_model(config) -> type:
    """Who answers: a server, weights on Tinker (a tinker:// path), or a model of this process."""
    if config.model.startswith(ON_TINKER):
        from qftlab_course.tinker_asking import TinkerModel

        return TinkerModel
    return ServerModel if config.server.url else LocalModel


def asked_rows(config) -> tuple[list[dict], dict[str, int]]:
    """The rows to ask, those with an answer made ready to be measured by it, and how many each source gave.

    Raises:
        DataError, FileNotFoundError: as `load_wanted` and `answered_row`.
    """
    files = config.data or [str(bundled("instructions", "heldout.jsonl"))]
    rows, sources = load_wanted(files, "", config.columns, split=config.split, limit=config.limit)
    rows = [answered_row(row, place_of(number, sources)) if kind_of(row) == "sft" else row
            for number, row in enumerate(rows, 1)]  # fmt: skip
    unseen = Counter(name for row in rows for name in unrendered(row))
    if unseen:
        log.info("fields that no template shows: %s", ", ".join(f"{name} ({n})" for name, n in sorted(unseen.items())))
    return rows, sources


def answered_row(row: dict, where: str) -> dict:
    """A converted row whose "output" is the answer that a model is measured by, without its thinking.

    Raises:
        DataError: naming its place, if it does not end with one.
    """
    last = row["messages"][-1] if "messages" in row else {"role": "assistant", "content": row.get("output")}
    answer = answer_of(last["content"] or "") if last["role"] == "assistant" else ""
    if not answer:
        raise DataError(f"{where} must end with an answer to be measured by, got {last!r:.100}: leave it out, or name "
                        "the field as in --columns '{output: NAME}'")  # fmt: skip
    return {**row, "output": answer}


def named_scorers(names: Sequence[str], others: Mapping[str, Scorer] | None = None) -> dict[str, Scorer]:
    """The scorers of these names.

    Args:
        names: of `qftlab.evaluate.scorers.SCORERS`, of `others`, or "module:function" for one of your own.
        others: further scorers by name.

    Raises:
        ValueError: for a name that is none, or a module or function that is not there.
    """
    known, found = {**PLAIN, **(others or {})}, {}
    for name in names:
        module, is_own, function = name.partition(":")
        if name not in known and not is_own:
            raise ValueError(f"scorers must be of {', '.join(known)}, or module:function, got {name!r}")
        try:
            found[name] = known[name] if name in known else getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"scorers must name a function as module:function, got {name!r}: {error} (a file of this "
                             "folder is found by `python -m qftlab`)") from error  # fmt: skip
        if not callable(found[name]):
            raise ValueError(f"scorers must name a function, got {name!r}, which is a {type(found[name]).__name__}")
    return found


def scorers_for(config, rows: Sequence[Mapping]) -> dict[str, Scorer]:
    """The scorers that are named; or those that fit: the rows' skills, the course's rule for Countdown problems without
    a reference, exact and contained for rows that have a reference and no skill."""
    skill = lenient_scorer if config.few_shot else SCORERS["skill"]
    if config.scorers:
        return named_scorers(config.scorers, SCORERS | {"skill": skill})
    found: dict[str, Scorer] = {}
    if any(skill_of(row) and row.get("output") for row in rows):
        found["skill"] = lambda row, said: skill(row, said) if row.get("output") else None
    if any(results.is_problem(row) and not row.get("output") for row in rows):
        found |= {name: PLAIN[name] for name in ("countdown_course", "reasoned")}
    if any(not skill_of(row) and row.get("output") for row in rows):
        for name in ("exact", "contained"):
            found[name] = lambda row, said, name=name: None if skill_of(row) else PLAIN[name](row, said)
    return found


def settings_of(config, identity: dict, scorers: Sequence[str]) -> dict:
    """What settings.json holds: all that decides the responses, and what was done with them; never a key."""
    names = "data columns split limit few_shot max_new_tokens thinking seed num_samples pass_k threshold".split()
    asked = {name: getattr(config, name) for name in names}
    return identity | asked | {"sampling": asdict(config.sampling), "scorers": scorers, "versions": versions()}


def sum_up(
    config, rows: Sequence[dict], responses: Sequence[dict], scores: Sequence[dict], names: Sequence[str]
) -> dict:
    """The results but for the references: every scorer's summary, and the official score where a threshold is given."""
    keys, ks = [prompt_key(row) for row in rows], sorted({1, *config.pass_k})
    found = {name: summarise(scores, name, keys, ks) for name in names}
    made = {"model": config.server.model if config.server.url else config.model, "data": list(config.data),
            "num_rows": len(rows), "num_samples": config.num_samples,
            "failed": sum(one["finish_reason"] == "error" for one in responses), "scores": found}  # fmt: skip
    if config.threshold:
        name = next((name for name in names if found[name]["pass_at_k"]), None)
        if name is None:
            raise ValueError(f"threshold must go with a scorer of marks from 0 to 1, got {', '.join(names) or 'none'}: "
                             "--scorers [countdown_course]")  # fmt: skip
        accuracy = found[name]["pass_at_k"]["1"]["mean"]
        made["official_score"] = {"scorer": name, "accuracy": accuracy, "threshold": config.threshold,
                                  "score": results.official_score(accuracy, config.threshold)}  # fmt: skip
    return made


def references(config, model, folder: Path | None) -> dict:
    """Loss, perplexity and token accuracy of the rows' own answers, where there are such without a skill."""
    rows = [row for row in model.rows if row.get("output")]
    if not isinstance(model, LocalModel) or config.few_shot or not rows or all(map(skill_of, rows)):
        return {}
    kinds = ("loss", "perplexity", "token_accuracy")
    if folder and (folder / RESULTS).exists():  # of the same rows and weights
        before = read_json(folder / RESULTS)
        if "loss" in before:
            return {kind: before[kind] for kind in kinds}
    loaded, tokenizer, _ = model.loaded()
    sources = model.sources if len(rows) == len(model.rows) else None
    return measure_references(loaded, tokenizer, rows, sources=sources, batch_size=config.batch_size).to_dict()


def write_files(folder: Path, rows, responses: Sequence[dict], scores: Sequence[dict], found: dict) -> None:
    """The scores, the results, and what the leaderboards take."""
    results.write_lines(folder / SCORES, scores)
    results.write_lines(folder / SUBMISSION, results.submission(rows, responses))
    if lines := results.course_rows(rows, responses, scores):
        results.write_lines(folder / COURSE, lines)
    write_json(folder / RESULTS, found)


def by_skill(config, rows: Sequence[dict], responses: Sequence[dict]) -> Evaluation | None:
    """The table by skill, where each row was asked once by a model of this process, has a reference and a prompt of its
    own (its intervals count rows), and no scorer was named."""
    from qftlab.train.run import resolve_model

    is_elsewhere = config.server.url or config.model.startswith(ON_TINKER)
    if config.scorers or is_elsewhere or config.num_samples > 1 or not all(row.get("output") for row in rows):
        return None
    if len({repr(one["prompt"]) for one in responses}) < len(rows):
        return None
    completions = [Completion([], one["token_ids"], one["response"], one["finish_reason"]) for one in responses]
    return scored(load_tokenizer(resolve_model(config.model)), rows, completions, config.few_shot)


def _say_unfinished(responses: Sequence[dict]) -> None:
    reasons = Counter(one["finish_reason"] for one in responses)
    if cut := reasons["length"]:
        log.info("%d of %d answers were cut off: --max_new_tokens gives them more room", cut, len(responses))
    if failed := reasons["error"]:
        log.warning("%d of %d answers failed; they count as wrong", failed, len(responses))
