"""Write a ShareGPT file of conversations about any text, for runs on data shaped as people have it.

    python -m tools.studies.conversations TEXT -o FILE.jsonl [--count 500] [--seed 0]

Each conversation takes neighboring paragraphs of TEXT: a question that quotes a paragraph's first
words, and the paragraph as the answer. Numbers of turns and lengths vary as in public sets: half of
the conversations have one turn, the others up to five, and a tenth begin with a system message.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

QUESTIONS = (
    "What can you tell me about {topic}?",
    "Please continue: {topic} ...",
    "I read this: {topic} ... How does it go on?",
    "Explain it in more detail, starting from {topic}.",
)
SYSTEM = "You are a helpful assistant who answers from an encyclopedia."


def conversation(paragraphs: list[str], start: int, rng: random.Random) -> dict[str, Any]:
    """One ShareGPT row about the paragraphs from ``start`` on."""
    turns = 1 if rng.random() < 0.5 else rng.randint(2, 5)
    said = [{"from": "system", "value": SYSTEM}] if rng.random() < 0.1 else []
    for paragraph in paragraphs[start : start + turns]:
        topic = " ".join(paragraph.split()[: rng.randint(4, 12)])
        said.append({"from": "human", "value": rng.choice(QUESTIONS).format(topic=topic)})
        said.append({"from": "gpt", "value": paragraph})
    return {"id": f"conversation-{start}", "conversations": said}


def main(
    text: Annotated[Path, typer.Argument(help="A text file, one paragraph a line.")],
    output: Annotated[Path, typer.Option("--output", "-o")],
    count: Annotated[int, typer.Option(min=1)] = 500,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    lines = (line.strip() for line in text.read_text(encoding="utf-8").splitlines())
    paragraphs = [line for line in lines if len(line.split()) > 30]
    rng = random.Random(seed)
    starts = rng.sample(range(len(paragraphs)), min(count, len(paragraphs)))
    rows = [json.dumps(conversation(paragraphs, start, rng)) for start in starts]
    output.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} conversations in {output}")


if __name__ == "__main__":
    typer.run(main)
