"""The card beside a trimmed file: what was kept, what was lost, and how that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distill.reports.document import Section, Table
from distill.reports.render.markdown import code, escaped, section
from distill.runtime.format import human_bytes
from distill.trimming.scripts import LostScript

REPOSITORY_NOTE = "Made by `distill trim`, without training."


@dataclass(frozen=True)
class Measured:
    """One of the two files. Bits for each byte of the held-out text, tokens of all that text,
    tokens per second (medians), parameters and bytes."""

    name: str
    sha256: str
    vocabulary: int
    file_bytes: int
    parameters: int
    bits_per_byte: float
    held_out_tokens: int
    generation: float
    prompt: float


@dataclass(frozen=True)
class Trimmed:
    """Everything that is known of a trimmed file.

    ``dropped_mass``: the part of the teacher's probability on tokens that are not kept;
    ``mass_positions``: over how many it was summed. ``logit_difference``: the largest of kept
    tokens over ``proof_positions``. ``judged_bytes``: of held-out text, for the bits.
    """

    original: Measured
    trimmed: Measured
    dropped_mass: float
    mass_positions: int
    logit_difference: float
    proof_positions: int
    token_lines: int
    judged_bytes: int
    licence: str = ""
    lost: Sequence[LostScript] = field(default_factory=tuple)

    @property
    def more_bits(self) -> float:
        """What the trimmed file needs more, as a share."""
        return self.trimmed.bits_per_byte / self.original.bits_per_byte - 1

    @property
    def more_tokens(self) -> float:
        """How many more tokens held-out text has, as a share."""
        return self.trimmed.held_out_tokens / max(1, self.original.held_out_tokens) - 1

    def to_json(self) -> dict[str, Any]:
        """For other programs."""
        shares = {"more_bits": self.more_bits, "more_tokens": self.more_tokens}
        return {**asdict(self), **shares}


def comparison(result: Trimmed) -> Table:
    """Both files side by side."""
    first, second = result.original, result.trimmed
    rows = [
        ["tokens in the vocabulary", f"{first.vocabulary:,}", f"{second.vocabulary:,}"],
        ["file", human_bytes(first.file_bytes), human_bytes(second.file_bytes)],
        ["parameters", f"{first.parameters / 1e6:,.1f} M", f"{second.parameters / 1e6:,.1f} M"],
        [
            "bits per byte, held-out",
            f"{first.bits_per_byte:.4f}",
            f"{second.bits_per_byte:.4f} ({result.more_bits:+.2%})",
        ],
        [
            "tokens of held-out text",
            f"{first.held_out_tokens:,}",
            f"{second.held_out_tokens:,} ({result.more_tokens:+.2%})",
        ],
        ["generation, tokens/s", f"{first.generation:,.1f}", f"{second.generation:,.1f}"],
        ["prompt, tokens/s", f"{first.prompt:,.1f}", f"{second.prompt:,.1f}"],
    ]
    return Table("", ["", "original", "trimmed"], rows)


def sentences(result: Trimmed) -> list[str]:
    """What the table does not say."""
    said = [
        f"Tokens that were dropped had {result.dropped_mass:.3%} of the model's probability over "
        f"{result.mass_positions:,} positions of the text; text that would have them is written "
        "with kept tokens.",
        f"Proof in llama.cpp: on the same tokens the logits of kept tokens are within "
        f"{result.logit_difference:.1e} of the original's over {result.proof_positions} positions; "
        f"tokenizer.json and llama.cpp give the same ids on {result.token_lines} pieces of text.",
        f"Bits per byte are over the same {result.judged_bytes:,} bytes of held-out text, each "
        "file with its own tokenizer.",
    ]
    for one in result.lost:
        said.append(
            f"{one.share:.1%} of the {one.name} letters in the text ({one.of_text:.2%} of all its "
            "letters) have no token any more and are written in bytes."
        )
    return said


def trim_section(result: Trimmed) -> Section:
    """The result as a part of a report."""
    return Section("trimmed", "Against the original", sentences(result), [comparison(result)])


def card(result: Trimmed) -> str:
    """The card, in Markdown."""
    first, second = result.original, result.trimmed
    parts = [
        f"# {escaped(first.name)}, {second.vocabulary:,} tokens",
        REPOSITORY_NOTE
        + " Rows of dropped tokens are gone from the embedding and the output matrix; all other "
        "weights are the original's, bit for bit.",
        section(trim_section(result)),
        f"## Files\n\n- original: SHA-256 {code(first.sha256)}"
        f"\n- this file: SHA-256 {code(second.sha256)}",
        f"## License\n\n{escaped(result.licence or 'not stated in the original file')}",
    ]
    return "\n\n".join(parts) + "\n"
