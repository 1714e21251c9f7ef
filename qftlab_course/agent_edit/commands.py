"""The commands of the two-token project; exit code 1 says that not all is right."""

from __future__ import annotations

import logging
import sys

from qftlab.commands import Command, text_of

log = logging.getLogger(__name__)


def run_check(config) -> None:
    """Prints the report; exit code 1 if an item failed, or there is none."""
    from qftlab_course.agent_edit.check import check_file

    report = check_file(config.data, config.level)
    print(report.to_text())
    for number, detail in enumerate(report.details, 1):
        log.debug("item %d: %s", number, detail)
    if not report.is_right:
        raise SystemExit(1)


def run_validate(config) -> None:
    """Prints the report and what was written; exit code 1 if a row was refused, or there is none."""
    from qftlab_course.agent_edit.quality import validate_file

    report, text = validate_file(config)
    print(text)
    if not report.cases or len(report.valid) < len(report.cases):
        raise SystemExit(1)


def run_teach(config) -> None:
    """Makes rows by a teacher, and says what came of it and where it is."""
    from qftlab_course.agent_edit.teach import make_set, said

    print(said(make_set(config, progress=sys.stderr.isatty())))


def run_tasks(config) -> None:
    """Answers the course's questions."""
    from qftlab_course.agent_edit.tasks import answer_tasks

    print(answer_tasks(config, progress=sys.stderr.isatty()))


COMMANDS = {
    "tokens": Command("adds <|AGENT|> and <|EDIT|> to a tokenizer and writes the ids of the tasks (hw3_1.json)",
                      "tokens --model MODEL --data query_and_output.json --output outputs/tasks/hw3_1.json",
                      "qftlab_course.agent_edit.tokens:TokensConfig",
                      text_of("qftlab_course.agent_edit.tokens:write_tokens")),
    "tasks": Command("answer questions in AGENT or EDIT mode by system prompt and tools (hw3_2.json)",
                     "tasks --data query_only.json --model Qwen/Qwen3-8B --device cuda",
                     "qftlab_course.agent_edit.tasks:TasksConfig", run_tasks),
    "teach-data": Command("training rows with AGENT and EDIT by a teacher behind an endpoint",
                          "teach-data --data livecodebench/code_generation_lite --samples 128 --threads 32",
                          "qftlab_course.agent_edit.teach:TeachConfig", run_teach),
    "check": Command("judges hw3_1.json or hw3_2.json as the course's checker does, or strictly",
                     "check --data outputs/tasks/hw3_2.json --level strict",
                     "qftlab_course.agent_edit.check:CheckConfig", run_check),
    "validate": Command("judges training rows with mode tokens, and writes the right ones and a report",
                        "validate --data rows.json --output outputs --keep_invalid true",
                        "qftlab_course.agent_edit.quality:ValidateConfig", run_validate),
}  # fmt: skip
