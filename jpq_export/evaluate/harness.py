"""Zero-shot tasks through lm-eval (Gao et al., 2021; the extra `tasks`): its prompts and metrics, our predictors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import datasets  # pyright: ignore[reportMissingImports] comes with lm-eval
import lm_eval.api.task as building  # pyright: ignore[reportMissingImports] an extra
from jinja2 import UndefinedError
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports] an extra
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from jpq_export.errors import UsageError
from jpq_export.evaluate.answers import Progress, Score, score_answers
from jpq_export.evaluate.predictors import Predictor
from jpq_export.evaluate.task_data import TaskChoice, TaskData

SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
BOOTSTRAP = 1000  # resamples for the standard error of LAMBADA's perplexity; accuracies have a closed form
WIDTH = 1.96  # standard errors either side of a 95% interval
Tokens = list[int]


class ScoredModel(TemplateLM):
    """Our model as lm-eval's: `encode` gives ids without special tokens; BOS leads where `spec.add_bos` says so.

    TemplateLM splits a text into context and answer, so tokens are the ones that lm-eval's own HFLM sees.
    """

    def __init__(
        self, predictor: Predictor, spec: Any, encode: Callable[[str], Tokens], *, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self._predictor, self._spec, self._encode, self._progress = predictor, spec, encode, progress

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self._spec.eos_ids[0] if self._spec.eos_ids else self._spec.bos_id or 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        return self.eot_token_id if self._spec.bos_id is None else self._spec.bos_id

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._spec.max_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Ids of a text; BOS in front unless it is there, or `add_special_tokens` is False."""
        ids, bos_id = list(self._encode(string)), self._spec.bos_id
        wanted = self._spec.add_bos and add_special_tokens is not False
        return [bos_id, *ids] if wanted and bos_id is not None and ids[:1] != [bos_id] else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it the greedy continuation) of every (context, answer)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, Tokens, Tokens]], **_: Any) -> list[tuple[float, bool]]:
        scores = self._scores([(context, answer) for _, context, answer in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model has positions; every token is counted once."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: `run_tasks` has looked before."""
        raise UsageError(
            f"{len(requests)} requests to generate text; only tasks that score given answers are supported"
        )

    def _scores(self, pairs: list[tuple[Tokens, Tokens]]) -> list[Score]:
        return score_answers(self._predictor, [self._cut(*pair) for pair in pairs], progress=self._progress)

    def _cut(self, context: Tokens, answer: Tokens) -> tuple[Tokens, Tokens]:
        """A context too long loses its beginning; the last token of the answer is predicted and needs no position."""
        room = self.max_length + 1 - len(answer)
        if room < 1:
            raise UsageError(f"an answer of {len(answer)} tokens; the model has {self.max_length} positions")
        return context[-room:], answer


def run_tasks(model: ScoredModel, choice: TaskChoice) -> dict[str, Any]:
    """Per task: each metric with `<metric>_stderr` and `<metric>_ci95`, `samples`, `version`. Errors: `load_tasks`."""
    tasks = load_tasks(choice)
    with _quiet():
        found = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=_manager(),
            limit=choice.limit,
            num_fewshot=0,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return {name: _summary(found, name) for name in choice.names}


def load_tasks(choice: TaskChoice) -> list[Any]:
    """lm-eval's tasks on the rows of `choice`, or else on the hub's or its local cache's.

    Raises:
        UsageError: no such task, one that generates text, or data that cannot be had or do not fit.
    """
    return [_task(name, choice.data.get(name)) for name in choice.names]


@cache
def _manager() -> Any:
    """lm-eval's index of its own tasks: seconds."""
    return TaskManager()


def _task(name: str, data: TaskData | None) -> Any:
    manager = _manager()
    if name not in manager.all_subtasks:
        raise UsageError(f"--tasks {name}: lm-eval knows no such task; one is arc_easy, see its list for others")
    # A group's members may differ from the registered task: everything but the source of its rows stays lm-eval's.
    own = {"task": name, "custom_dataset": lambda **_: _every_split(data)}
    spec = name if data is None else {"group": "local", "task": [own]}
    try:
        with _quiet():
            task = manager.load([spec])["tasks"][name]
    except OSError as error:  # of the hub's client: no network, no such data set
        raise UsageError(f"--tasks {name}: no data ({_first_line(error)}); give a folder by --task-data") from error
    except (KeyError, ValueError, TypeError, UndefinedError) as error:
        if data is None:
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"--task-data {data.name}: not rows of {name} ({reason})") from error
    if task.OUTPUT_TYPE not in SCORED:
        raise UsageError(f"--tasks {name}: it generates text ({task.OUTPUT_TYPE}); only tasks with given answers run")
    return task


def _every_split(data: TaskData | None) -> dict[str, Any]:
    """Whatever split a task asks for: nothing is learned from examples, so one set of rows serves as all."""
    assert data is not None
    rows = datasets.Dataset.from_list(data.rows)
    return dict.fromkeys(("train", "validation", "test"), rows)


def _summary(found: Any, name: str) -> dict[str, Any]:
    out: dict[str, Any] = {"samples": found["n-samples"][name]["effective"], "version": found["versions"][name]}
    values = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "," in key}
    for metric, value in values.items():
        if metric.endswith("_stderr"):
            continue
        out[metric] = float(value)
        error = values.get(f"{metric}_stderr")
        if isinstance(error, float):  # "N/A" of a single sample
            low, high = out[metric] - WIDTH * error, out[metric] + WIDTH * error
            share = metric.startswith("acc")
            out[f"{metric}_stderr"] = error
            out[f"{metric}_ci95"] = [max(low, 0.0), min(high, 1.0)] if share else [low, high]
    return out


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Its log lines, its progress bars and a pool of processes for a thousand resamples are not wanted here."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, parallel, bar = logger.level, os.environ.get("DISABLE_MULTIPROC"), building.tqdm
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"], building.tqdm = "1", _no_bar
    try:
        yield
    finally:
        logger.setLevel(level)
        building.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        if parallel is None:
            del os.environ["DISABLE_MULTIPROC"]


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items
