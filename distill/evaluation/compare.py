"""``distill evaluate``: the teacher and its students, run through llama.cpp on the same text.

Logits are exact (float32 KV cache, no flash attention), so that results can be reproduced
elsewhere; generation and speed are measured as people run the models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from typing import TYPE_CHECKING

from distill.evaluation.candidates import Candidate, Candidates, find_candidates
from distill.evaluation.cost import UNSTEADY, Cost, measure_cost
from distill.evaluation.fidelity import TextScore, score_text
from distill.evaluation.greedy import SEQUENCES, GreedyScore, greedy_prompts, greedy_scores
from distill.evaluation.inputs.check import EvaluationInputs, check_evaluation
from distill.evaluation.inputs.request import Request
from distill.evaluation.records import Comparison, Fidelity, ModelEvaluation, TaskScore
from distill.evaluation.safety import SafetyTest, choose_prompts, score_safety
from distill.evaluation.scorers import llama_scorer
from distill.evaluation.text import choose_text, digest
from distill.metrics.distributions import tokens_per_pass
from distill.metrics.safety import SafetyScore
from distill.runtime.environment import environment, llama_cpp_environment
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from teachers.base import Keep, Tokens, whole_masks
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher

if TYPE_CHECKING:
    from distill.evaluation.inputs.task_file import Task


ARITHMETIC = "logits with a float32 KV cache, without flash attention"


def evaluate_files(
    request: Request,
    console: Console,
    inputs: EvaluationInputs | None = None,
) -> Comparison:
    """Measure everything asked for; ``inputs``: the result of ``check_evaluation``, if called.

    Raises:
        UserError, TeacherFileError, TeacherError, ChatTemplateError: the input cannot be used.
    """
    inputs = inputs or check_evaluation(request)
    chosen = find_candidates(inputs.files)
    if request.harness:
        from distill.evaluation.lm_eval_adapter import require_tasks

        require_tasks(list(request.harness))
    tests = {student.name: choose_prompts(student, inputs.prompts) for student in chosen.students}
    with ExitStack() as stack:
        measurement = Measurement(request, chosen, stack, console)
        for warning in [*chosen.warnings, *(test.note for test in tests.values() if test.note)]:
            measurement.warn(warning)
        return measurement.run(tests, inputs)


class Measurement:
    """One evaluation in progress; ``stack`` closes the models. Everything is keyed by model
    name."""

    def __init__(
        self, request: Request, chosen: Candidates, stack: ExitStack, console: Console
    ) -> None:
        self.request = request
        self.chosen = chosen
        self.everyone = [chosen.teacher, *chosen.students]
        self.stack = stack
        self.console = console
        self.models: dict[str, GGUFTeacher] = {}
        self.costs: dict[str, Cost] = {}
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Show a warning now, and keep it with the results."""
        self.console.warn(message)
        self.warnings.append(message)

    @property
    def teacher(self) -> GGUFTeacher:
        """The teacher, once it is loaded."""
        return self.models[self.chosen.teacher.name]

    @property
    def students(self) -> dict[str, GGUFTeacher]:
        """The students, once they are loaded."""
        return {student.name: self.models[student.name] for student in self.chosen.students}

    def run(self, tests: dict[str, SafetyTest], inputs: EvaluationInputs) -> Comparison:
        """Load, time and compare the models."""
        with self.console.stage("Load teacher") as stage:
            info = self._load(self.chosen.teacher).info
            stage.finish(
                f"{info.name}: {info.architecture}, {human_count(info.parameters)} parameters"
            )
        text = choose_text(self.request.text, self.chosen, self.teacher, inputs.data)
        for note in text.notes:
            self.console.note(note)
        for warning in text.warnings:
            self.warn(warning)
        self._measure_costs()
        with self.console.stage("Read text", total=len(text.items)) as stage:
            sequences = text.sequences(self.teacher, stage.update)
            stage.finish(text.description)
        masks = whole_masks(sequences, text.keep)
        scores = self._score(sequences, masks)
        greedy, prefix_length = self._write(sequences)
        safety = self._judge(tests)
        answers = self._answer(inputs.tasks)
        benchmarks = self._benchmark()
        evaluations = []
        for model in self.everyone:
            name, score, cost = model.name, scores[model.name], self.costs[model.name]
            evaluation = ModelEvaluation(
                name=name,
                path=str(model.file.path),
                sha256=model.file.sha256,
                architecture=model.file.architecture,
                file_type=model.file_type,
                parameters=model.file.parameters,
                file_bytes=model.file.size,
                perplexity=score.perplexity,
                calibration_error=score.calibration_error,
                prompt_speed=cost.prompt_speed,
                generation_speed=cost.generation_speed,
                peak_memory=cost.peak_memory,
                fidelity=self._fidelity(score, greedy.get(name), prefix_length),
                task=answers.get(name),
                safety=safety.get(name),
                harness=benchmarks.get(name, {}),
            )
            evaluations.append(evaluation)
        return Comparison(
            teacher=evaluations[0],
            students=evaluations[1:],
            text=text.description,
            text_sha256=digest(sequences, text.keep),
            sequences=len(sequences),
            positions=int(sum(mask.sum() for mask in masks)),
            skipped=text.skipped,
            seed=self.request.text.seed,
            environment=environment()
            | {
                "llama_cpp": llama_cpp_environment(),
                "arithmetic": ARITHMETIC,
                "gpu_layers": self.request.gpu_layers,
            },
            warnings=self.warnings,
        )

    def _load(self, candidate: Candidate) -> GGUFTeacher:
        model = GGUFTeacher(candidate.file.path, LoadOptions(self.request.gpu_layers))
        self.models[candidate.name] = self.stack.enter_context(model)
        return model

    def _measure_costs(self) -> None:
        """Load each model and measure it at once, while the models loaded before are idle."""
        with self.console.stage("Speed and memory", total=len(self.everyone)) as stage:
            for number, candidate in enumerate(self.everyone):
                stage.update(number, candidate.name)
                model = self.models.get(candidate.name) or self._load(candidate)
                self.costs[candidate.name] = measure_cost(model)
            cost = self.costs[self.chosen.teacher.name]
            stage.finish(
                f"teacher {cost.generation_speed:,.0f} tokens/s, {human_bytes(cost.peak_memory)}; "
                "median of three"
            )

        if unsteady := [name for name, cost in self.costs.items() if cost.spread > UNSTEADY]:
            self.warn(
                f"the speed of {', '.join(unsteady)} differed from trial to trial; is the machine "
                "busy otherwise?"
            )

    def _score(self, sequences: Sequence[Tokens], masks: Sequence[Keep]) -> dict[str, TextScore]:
        """All models on all positions that count."""
        positions = int(sum(mask.sum() for mask in masks))
        with self.console.stage("Compare", total=positions * len(self.everyone)) as stage:
            scorers = {name: llama_scorer(model, exact=True) for name, model in self.models.items()}
            vocab_size = self.teacher.info.vocab_size
            scores = score_text(
                self.chosen.teacher.name, scorers, sequences, vocab_size, stage.update, masks
            )
            stage.finish(
                "; ".join(
                    f"{name} KL {scores[name].compared['kl'].value:.4f}" for name in self.students
                )
            )
        return scores

    def _write(self, sequences: Sequence[Tokens]) -> tuple[dict[str, GreedyScore], int]:
        """Each student's greedy score, and the most tokens of a continuation."""
        start = greedy_prompts(
            sequences, min(model.info.context_length for model in self.models.values())
        )
        if start is None:
            self.warn(
                "the models' contexts leave no room to write in, so greedy continuations are left "
                "out"
            )
            return {}, 0
        total = min(SEQUENCES, len(sequences)) * len(self.everyone)
        with self.console.stage("Write", total=total) as stage:
            scores = greedy_scores(self.teacher, self.students, start, stage.update)
            stage.finish(
                "; ".join(
                    f"{name} {score.prefix.value:.1f} tokens alike"
                    for name, score in scores.items()
                )
            )
        return scores, start.new_tokens

    def _judge(self, tests: dict[str, SafetyTest]) -> dict[str, SafetyScore]:
        """The safety heads, where there are heads and prompts for them."""
        students = [student for student in self.chosen.students if tests[student.name].prompts]
        scores: dict[str, SafetyScore] = {}
        if not students:
            return scores
        with self.console.stage("Safety heads", total=len(students)) as stage:
            for number, student in enumerate(students):
                stage.update(number, student.name)
                prompts = tests[student.name].prompts
                scores[student.name] = score_safety(self.models[student.name], student, prompts)
            stage.finish(
                "; ".join(f"{name} accuracy {score.accuracy:.1%}" for name, score in scores.items())
            )
        return scores

    def _answer(self, tasks: list[Task]) -> dict[str, TaskScore]:
        """All models on the prompts of the task file."""
        scores: dict[str, TaskScore] = {}
        if not tasks or self.request.tasks is None:
            return scores
        from distill.evaluation.tasks import score_task

        with self.console.stage("Tasks", total=len(tasks) * len(self.everyone)) as stage:
            before = 0

            def answered(done: float) -> None:
                stage.update(before + done)

            for name, model in self.models.items():
                scores[name] = score_task(model, tasks, self.request.tasks.name, answered)
                before += len(tasks)
            stage.finish(
                "; ".join(f"{name} {score.share.value:.1%}" for name, score in scores.items())
            )
        return scores

    def _benchmark(self) -> dict[str, dict[str, dict[str, float]]]:
        """All models on the tasks of lm-evaluation-harness."""
        if not self.request.harness:
            return {}
        from distill.evaluation.lm_eval_adapter import run_harness

        results = {}
        with self.console.stage("lm-eval", total=len(self.everyone)) as stage:
            for number, (name, model) in enumerate(self.models.items()):
                stage.update(number, name)
                with redirect_stdout(sys.stderr):  # ours is for the result
                    results[name] = run_harness(
                        model, list(self.request.harness), self.request.harness_limit
                    )
            stage.finish(", ".join(self.request.harness))
        return results

    def _fidelity(
        self, score: TextScore, greedy: GreedyScore | None, prefix_length: int
    ) -> Fidelity | None:
        """The comparison with the teacher; none for the teacher itself."""
        if not score.compared:
            return None
        drafted = self.request.draft_length
        return Fidelity(
            **score.compared,
            tokens_per_pass=tokens_per_pass(score.compared["acceptance"].value, drafted),
            draft_length=drafted,
            greedy_prefix=None if greedy is None else greedy.prefix,
            prefix_length=prefix_length,
            greedy_same=None if greedy is None else greedy.same,
        )
