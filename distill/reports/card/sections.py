"""A model card in words: sentences and tables out of a run's facts. Plain text unless it is ``Markdown``.

Long because every sentence of the card is here.
"""

from __future__ import annotations

import re

from distill.capture.corpus import JSONL_SUFFIXES, TEXT_SUFFIXES
from distill.evaluation.scorers import STORED_TARGETS
from distill.heads.prompts import BUILT_IN, TEACHER
from distill.metrics.intervals import ratios, wilson
from distill.metrics.verification import CASCADE_GOAL, cascade_goal
from distill.reports.card.facts import CardFacts, UnlistedFile
from distill.reports.render.markdown import (
    Markdown,
    code,
    escaped,
    last_part,
    one_line,
    table,
    without_folders,
)
from distill.reports.run.tables import LANGUAGES, cascade_words
from distill.runs.exports import ExportedFile
from distill.runs.records import ModelScore
from distill.runtime.format import MISSING, figure, human_bytes, human_count, share
from students.model.head_decisions import ESCALATE

WHOLE_BITS = 15.5  # bits per weight from which on a file counts as not quantised
FEW_PROMPTS = 1000  # safety prompts below which the card calls them few
DIVERGENCES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon divergence",
    "skewed_forward_kl": "skewed forward KL",
    "skewed_reverse_kl": "skewed reverse KL",
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BESIDE_NAMES = re.compile(r"[^a-z0-9]+")


def teacher_name(facts: CardFacts) -> str:
    """What the teacher is called."""
    return without_folders(facts.results.teacher.name) or "a teacher without a name"


def student_name(facts: CardFacts) -> str:
    """What the student is called: after its size, or after the model that it was made of."""
    size = facts.results.student.size
    return "SO8T" if size is None else f"SO8T {without_folders(size)}"


def model_id(facts: CardFacts) -> Markdown:
    """A name that Ollama takes."""
    return Markdown(_BESIDE_NAMES.sub("-", student_name(facts).lower())[:60].strip("-"))


def summary(facts: CardFacts) -> str:
    """What it is, in two sentences."""
    student, teacher, found = facts.results.student, facts.results.teacher, facts.results.evaluation
    size = [] if student.parameters is None else [f"{human_count(student.parameters)} parameters"]
    size += [] if student.file_bytes is None else [f"{human_bytes(student.file_bytes)} as {student.quant}"]
    words = f"A small language model{_in_brackets(size)} that learnt to predict text as its teacher "
    of_teacher = [] if teacher.architecture is None else [teacher.architecture]
    of_teacher += [] if teacher.parameters is None else [f"{human_count(teacher.parameters)} parameters"]
    words += f"“{teacher_name(facts)}”{_in_brackets(of_teacher)} does."
    if found.exported.agreement is None:
        return words
    words += f" Its most probable next token is the teacher's at {share(found.exported.agreement)} of "
    words += f"{found.positions:,} places in text that it was not trained on"
    bounds = facts.intervals.get("agreement")
    return words + ("." if bounds is None else f" (95 % interval {_range(bounds, percent=True)}).")


def origin_table(facts: CardFacts) -> Markdown:
    """Teacher, student, text, soft targets, loss and training."""
    rows: list[list[object]] = [["Teacher", _teacher_words(facts)]]
    if _is_hash(facts.results.teacher.sha256):
        rows.append(["Teacher's SHA-256", code(facts.results.teacher.sha256)])
    rows.append(["Student", _student_words(facts)])
    if _is_hash(facts.base_sha256):
        rows.append(["SHA-256 of what it was made of", code(facts.base_sha256)])
    rows.append(["Text", _data_words(facts)])
    store = facts.results.soft_targets
    held_out = None if facts.settings.data is None else facts.settings.data.held_out
    words = f"{store.sequences:,} sequences, {human_count(store.tokens)} tokens"
    words += "" if held_out is None else f"; {100 * held_out:.3g}% of the sequences were kept out of training"
    rows.append(["Amount", words])
    digest = facts.further.soft_targets.corpus_sha256
    if digest is not None and _is_hash(digest):
        rows.append(["Text's SHA-256", Markdown(f"{code(digest)} (of its token ids)")])
    rows.append(["Learnt from", _targets_words(facts)])
    if loss := _loss_words(facts):
        rows.append(["Loss", loss])
    rows.append(["Training", _training_words(facts)])
    return table(["", ""], rows, words=True)


def data_name(facts: CardFacts) -> str:
    """What text it was, in a few words; a file is named and not where it lay, a folder is not."""
    data = facts.settings.data
    if facts.settings.store is not None or data is None:
        return "text that the records do not name"
    if data.path is None:
        return "the teacher's own words"
    name = last_part(data.path)
    return (
        one_line(name) if name.lower().endswith(JSONL_SUFFIXES + TEXT_SUFFIXES) else "text files of a folder"
    )


def scores_table(facts: CardFacts) -> Markdown:
    """Teacher, student before and after, and the exported file with its intervals."""
    found = facts.results.evaluation
    models = (found.before, found.after, found.exported)
    known = None if found.teacher is None else found.teacher.perplexity
    about = "≈ " if found.teacher is not None and found.teacher.approximate else ""
    first = {
        "kl": "0",
        "agreement": "100%",
        "perplexity": MISSING if known is None else about + figure(known),
    }
    titles = {"kl": "KL (nats per token)", "agreement": "same top token", "perplexity": "perplexity"}
    intervals = {name: bounds for name, bounds in facts.intervals.items() if name in titles}
    rows: list[list[object]] = []
    for name, title in titles.items():
        row: list[object] = [title, first[name], *(_score(model, name) for model in models)]
        if intervals:
            percent = name == "agreement"
            row.append(_range(intervals[name], percent=percent) if name in intervals else MISSING)
        rows.append(row)
    head = ["", "teacher", "before training", "trained", "student.gguf"]
    return table([*head, "95 % interval"] if intervals else head, rows)


def scores_note(facts: CardFacts) -> str:
    """What the figures mean and what they were measured on."""
    found = facts.results.evaluation
    words = (
        f"Over {found.positions:,} tokens of text kept out of training, at temperature 1. KL says how far the "
        f"probabilities of the next token are from the teacher's, over the {found.kl_over}: 0 is no difference. "
        "Perplexity is how many tokens the model wavers between: less is better."
    )
    if found.against == STORED_TARGETS:
        words += (
            " The teacher itself was not there: the student was measured against what had been stored of its answers, "
            "and the teacher's perplexity, where there is one, is what these give."
        )
    if not facts.intervals:
        words += " No confidence interval is recorded."
    return words


def files_table(facts: CardFacts) -> Markdown:
    """The exported files."""
    rows: list[list[object]] = [
        [
            code(one.file),
            f"{one.quant} (importance matrix)" if one.imatrix else one.quant,
            human_bytes(one.bytes),
            f"{one.bits_per_weight:.2f}",
            MISSING if one.kl is None else "0" if one.kl == 0 else f"{one.kl:.1e}",
            MISSING if one.agreement is None else f"{one.agreement:.2%}",
            MISSING if one.generation is None else f"{one.generation:,.0f}",
        ]
        for one in facts.files
    ]
    compared = ["KL to F32", "same top token"] if any(one.kl is not None for one in facts.files) else []
    head = ["file", "format", "size", "bits per weight", *compared, "tokens/s written"]
    return table(head, rows if compared else [[*row[:4], row[-1]] for row in rows])


def files_note(facts: CardFacts) -> str:
    """What the columns mean, and how the tensors of a file are stored that are not all as its name says."""
    words = []
    if any(one.kl is not None for one in facts.files):
        words.append(
            "KL (nats per token) and top token of each file are against the same student in 32-bit numbers; of the F32 "
            "file itself, against PyTorch. Speeds are those of the machine that made the files, at that moment."
        )
    others = (one for one in facts.files if one.types.keys() - {"F32", one.quant.upper()})
    words += [f"{one.file} has {_types(one)}." for one in others]
    return " ".join(words)


def checksums(facts: CardFacts) -> Markdown:
    """Hashes as ``sha256sum -c`` reads them."""
    return Markdown(
        "\n".join(
            f"{one.sha256}  {one.file}"
            for one in facts.files
            if _is_hash(one.sha256) and one.file.isprintable()
        )
    )


def safety_words(facts: CardFacts) -> str:
    """What the safety head learnt from and was measured on; nothing without one."""
    safety = facts.results.heads.safety
    if safety is None:
        return ""
    origin = {BUILT_IN: "came with the program", TEACHER: "were the teacher's own judgment"}
    labels = origin.get(safety.labels_from, f"came from {one_line(last_part(safety.labels_from))}")
    spoken = ", ".join(LANGUAGES.get(name, name) for name in safety.languages if name)
    return (
        f"It says ALLOW, ESCALATE or REFUSE of a request. The labels {labels}. It was trained on "
        f"{safety.prompts.get('train', 0):,} prompts and measured on {safety.test.prompts:,} others"
        f"{f' ({spoken})' if spoken else ''} of {safety.scenarios.get('test', 0):,} scenarios that it had not seen."
    )


def safety_table(facts: CardFacts) -> Markdown:
    """Recall and precision of every decision, those first that the head is tuned for, and how many are right."""
    safety = facts.results.heads.safety
    if safety is None:
        return Markdown("")
    says = (
        "of what should be refused, what it refuses",
        "of what it escalates, what should be",
        "of what it allows, what should be",
        "of what should be allowed, what it allows",
        "of what should be escalated, what it escalates",
        "of what it refuses, what should be",
    )
    rows: list[list[object]] = []
    for words, ratio in zip(says, ratios(safety.test), strict=True):
        bounds = (
            MISSING
            if ratio.low is None or ratio.high is None
            else _range((ratio.low, ratio.high), percent=True)
        )
        rows.append(
            [f"{ratio.name} ({words})", share(ratio.value), f"{ratio.right} of {ratio.cases}", bounds]
        )
    right = sum(safety.test.confusion[place][place] for place in range(len(safety.test.confusion)))
    low, high = wilson(right, safety.test.prompts)
    cases = f"{right} of {safety.test.prompts}"
    rows.append(
        ["right in all", share(right / safety.test.prompts), cases, _range((low, high), percent=True)]
    )
    return table(["", "share", "cases", "95 % interval (Wilson)"], rows)


def safety_note(facts: CardFacts) -> str:
    """How to read the intervals."""
    safety = facts.results.heads.safety
    if safety is None:
        return ""
    escalated = sum(row[ESCALATE] for row in safety.test.confusion)
    words = "Several prompts tell the same scenario, so the real uncertainty is larger than these intervals."
    return words if escalated else f"{words} It escalated none of them."


def verification_words(facts: CardFacts) -> str:
    """Whether the student knows where it agrees with the teacher; nothing without that head."""
    found = facts.results.heads.verification
    if found is None:
        return ""
    words = (
        f"For every token it says how probably the teacher would choose the same. Over {found.positions:,} "
    )
    words += f"held-out tokens {found.agreement:.1%} agree, and its calibration error is {found.calibration_error:.3f}."
    if found.auroc is not None:
        words += (
            f" It tells the two apart with an AUROC of {found.auroc:.3f} (0.5 is guessing, 1 is knowing)."
        )
    goal = cascade_goal(found)
    if goal is not None and goal.escalated == 0:
        return f"{words} For {CASCADE_GOAL:.0%} agreement the teacher need not be asked."
    return f"{words} {cascade_words(found)}"


def limits(facts: CardFacts) -> list[str]:
    """What the figures do not say, as far as the records tell."""
    results, settings = facts.results, facts.settings
    found = results.evaluation
    chosen = len(results.training.held_out) > 1
    said = [
        "What was measured is likeness to the teacher: not whether what it writes is true, useful or safe. It learns "
        "the teacher's mistakes too.",
        f"The figures come from {found.positions:,} tokens of the same source as the text it was trained on. Nothing "
        "is known of other texts, other tasks or other languages."
        + (" The best step was chosen on it too, which flatters the figures a little." if chosen else ""),
        "This is one training run"
        + ("" if settings.seed is None else f" (seed {settings.seed})")
        + ": another seed would give somewhat other figures.",
    ]
    if found.exported.agreement is not None:
        said.append(
            f"At {1 - found.exported.agreement:.1%} of these tokens it would choose otherwise than the teacher."
        )
    if (bits := _bits(facts)) is not None and bits < WHOLE_BITS:
        said.append(
            f"The teacher was quantised itself (about {bits:.1f} bits per weight): the student learnt from that file, "
            "not from the model before it was quantised."
        )
    longest = None if settings.data is None or settings.store is not None else settings.data.max_length
    if longest is not None:
        said.append(f"It was trained on sequences of at most {longest:,} tokens.")
    return [*said, *_safety_limits(facts)]


def licence_words(facts: CardFacts) -> Markdown:
    """The licence that the exported file carries; none is made up."""
    base = "" if facts.further.student.base is None else " and that of the model it was made of"
    found = facts.metadata.license
    if found is None:
        return Markdown(
            f"Unknown: the records name none. Check the teacher's licence{base} before you use or share this model."
        )
    names = dict.fromkeys(one for one in (found.identifier, found.name) if one)
    words = (
        f"{', '.join(escaped(one_line(name)) for name in names)}, as `student.gguf` says (`general.license`)."
    )
    if found.link:
        words += f" Its text: {escaped(one_line(found.link))}."
    return Markdown(f"{words} Check the teacher's licence{base} before you share this model.")


def proof_words(facts: CardFacts) -> str:
    """That llama.cpp computes what was trained."""
    proof, original = facts.results.proof, facts.results.f32_proof
    first = ""
    if original is not None and original != proof:
        first = (
            f"The F32 file that it was made from was compared with {original.against} over {original.positions:,} "
            f"tokens: largest difference of a logit {original.max_logit_difference:.1e}. "
        )
    return first + (
        f"The {proof.quant} file was loaded in llama.cpp and compared with {proof.against} over {proof.positions:,} "
        f"tokens: KL {proof.mean_kl:.1e} nats per token, largest difference of a logit "
        f"{proof.max_logit_difference:.1e}, same top token in {proof.agreement:.2%}; {proof.token_lines:,} texts got "
        "the teacher's token ids."
    )


def environment_words(facts: CardFacts) -> str:
    """What computed it."""
    found = facts.results.environment
    threads = f"{found.threads} thread{'s' if found.threads != 1 else ''}"
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    ran = facts.results.llama_cpp.text
    library = f" llama.cpp ran {ran}." if ran else ""
    return f"Computed on {found.machine} ({found.cpu}, {threads}) with Python {found.python}, {packages}.{library}"


def _data_words(facts: CardFacts) -> str:
    """What text it was, and which part of it the teacher spoke."""
    data, words = facts.settings.data, data_name(facts)
    if facts.settings.store is not None:
        return f"{words}; the teacher's answers to it had been stored before"
    if data is None:
        return words
    if data.path is None:
        words += "; it was given no text"
        if data.sampling_temperature is not None and data.top_p is not None:
            words += f" (sampled at temperature {data.sampling_temperature:g}, top-p {data.top_p:g})"
    elif words.lower().endswith(JSONL_SUFFIXES):
        words += ": texts as they are, prompts with the teacher's own answers"
    return words


def _teacher_words(facts: CardFacts) -> str:
    teacher = facts.results.teacher
    words = [teacher_name(facts)]
    words += [] if teacher.architecture is None else [teacher.architecture]
    words += [] if teacher.parameters is None else [f"{human_count(teacher.parameters)} parameters"]
    if teacher.width is not None and teacher.layers is not None:
        words.append(f"width {teacher.width:,} × {teacher.layers} layers")
    words += [] if teacher.vocab_size is None else [f"{teacher.vocab_size:,} tokens in its vocabulary"]
    words += [] if teacher.file_bytes is None else [human_bytes(teacher.file_bytes)]
    if facts.settings.store is not None:
        words.append("not there itself: its stored answers were")
    return ", ".join(words)


def _student_words(facts: CardFacts) -> str:
    student, further = facts.results.student, facts.further.student
    count = [] if student.parameters is None else [f"{human_count(student.parameters)} parameters"]
    if further.base is None:
        size = "" if student.size is None else f" {without_folders(student.size)} (width × layers)"
        words = [
            f"SO8T{size}",
            *count,
            "a decoder of the llama architecture with rotations folded into its weights",
        ]
        return ", ".join(words)
    words = [f"made of {one_line(last_part(further.base))}", *count]
    words += [] if further.architecture is None else [further.architecture]
    words += ["read in 4 bits (NF4)"] if further.load_in_4bit else []
    rank = (further.lora or {}).get("rank")
    trained = further.trained_parameters
    adapted = "LoRA" if rank is None else f"LoRA of rank {rank:g}"
    words.append(f"only {adapted}, rotations and heads trained")
    words += [] if trained is None else [f"{human_count(trained)} trained parameters"]
    return ", ".join(words)


def _targets_words(facts: CardFacts) -> str:
    recipe = facts.results.soft_targets.recipe
    kinds = {
        "hidden": "the teacher's final hidden state at each token, rounded, from which every probability follows",
        "dense": "the teacher's probability of every token",
        "compact": "the teacher's most probable tokens at each place and the mass of all others",
    }
    words = kinds.get(
        str(recipe.get("kind")), "the teacher's probabilities; how they were stored is not recorded"
    )
    if recipe.get("kind") == "compact" and isinstance(recipe.get("num_topk"), int):
        words = words.replace("most probable", f"{recipe['num_topk']:,} most probable")
        words += ", with a sketch of how it is shared out" if recipe.get("sketch_bytes") else ""
    if recipe.get("layers"):
        words += "; the hidden states of some of its layers too"
    return words


def _loss_words(facts: CardFacts) -> str:
    """The parts that counted, with their weights."""
    loss, heads = facts.settings.loss, facts.results.heads
    name = "KL" if loss.divergence is None else DIVERGENCES.get(loss.divergence, loss.divergence)
    at = "" if loss.temperature is None else f" at temperature {loss.temperature:g}"
    at += "" if loss.final_temperature is None else f", {loss.final_temperature:g} at the end"
    squared = "" if loss.temperature in (None, 1.0) else "T² × "
    parts = (
        (loss.alpha, f"{squared}{name} to the teacher{at}"),
        (loss.beta, "cross-entropy of the actual next token"),
        (loss.gamma if facts.results.soft_targets.recipe.get("layers") else None, "hidden states"),
        (loss.lambda_so8t, "regularisers of the rotations"),
        (loss.lambda_safety if heads.safety is not None else None, "safety head"),
        (loss.lambda_verification if heads.verification is not None else None, "verification head"),
    )
    return " + ".join(f"{weight:g} × {words}" for weight, words in parts if weight)


def _training_words(facts: CardFacts) -> str:
    training, settings = facts.results.training, facts.settings.train
    words = [
        f"{training.steps:,} steps over {human_count(training.tokens_seen)} tokens in {training.seconds:,.0f} s"
    ]
    if settings.epochs is not None and settings.batch_size is not None:
        words.append(
            f"at most {settings.epochs} times through the text, {settings.batch_size} sequences a step"
        )
    rate = facts.further.training.learning_rate or settings.learning_rate
    words += [] if rate is None else [f"learning rate at most {rate:.3g}"]
    words += [] if settings.schedule is None else [f"{settings.schedule} schedule"]
    if settings.on_policy:
        words.append(f"{settings.on_policy:.0%} of each batch written by the student itself")
    words.append(f"precision {training.precision}")
    words += [] if facts.settings.seed is None else [f"seed {facts.settings.seed}"]
    words.append(f"the weights are those of step {training.best_step:,}, the best on held-out text")
    return "; ".join(words)


def _safety_limits(facts: CardFacts) -> list[str]:
    safety = facts.results.heads.safety
    if safety is None:
        return ["It has no safety head, and its safety was not measured."]
    known = sum(safety.prompts.values())
    asked = Markdown(
        "Its safety head is asked by `distill judge` alone: nothing else that runs it stops an answer."
    )
    other = (
        "It was measured on requests like those it learnt from. Of others it may refuse what is harmless and allow "
        "what is not."
    )
    few = f"The safety head knows {known:,} prompts in all: a start, not a safeguard."
    return [asked, other, few] if known < FEW_PROMPTS else [asked, other]


def _score(score: ModelScore, name: str) -> str:
    value: float | None = getattr(score, name)
    return share(value) if name == "agreement" else figure(value)


def _range(bounds: tuple[float, float], *, percent: bool = False) -> str:
    low, high = bounds
    return f"{100 * low:.1f}–{high:.1%}" if percent else f"{figure(low)}–{figure(high)}"


def _types(one: ExportedFile | UnlistedFile) -> str:
    most_first = sorted(one.types.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in most_first) + " tensors"


def _bits(facts: CardFacts) -> float | None:
    """Bits per weight of the teacher's file, tokenizer included."""
    teacher = facts.results.teacher
    return 8 * teacher.file_bytes / teacher.parameters if teacher.file_bytes and teacher.parameters else None


def _is_hash(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def _in_brackets(words: list[str]) -> str:
    return f" ({', '.join(words)})" if words else ""
