"""How llama.cpp cuts a text into words before byte-level BPE, by a GGUF file's pre-tokenizer name.

The patterns say what llama.cpp does, not what the model's authors once wrote: they differ in places
(a letter beyond A-Z has no case), and the teacher's ids are llama.cpp's. Each pattern cuts every
piece that the ones before it left; what no pattern matches stays a piece of its own. What is a
letter, a number or white space, both sides agree upon for every character up to Unicode 15; the
letters and numbers that Unicode 16 added are unassigned to llama.cpp, so a word of them may be cut
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTION = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_BLANKS = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_BLANKS}"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_OTHERS}|{_BLANKS}"
_PUNCTUATION = r"[\p{P}$+<=>\^~|]+"
_PUNCTUATION_FALCON = r"[\p{P}$+<=>\^~|`]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"


def _modern(digits: str, letters: str = r"\p{L}", others: str = _OTHERS + r"[\r\n]*") -> str:
    """The kind that Llama 3 and Qwen 2 use: a word takes the one character before it along."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}|{others}|{_LINES}"


def _cased(digits: str, contraction: str = "") -> str:
    """As GPT-4o and Tekken: a word ends with its small letters; only a-z and A-Z have case."""
    start, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"(?:(?![a-z])\p{L})", r"(?:(?![A-Z])\p{L})"
    words = f"{start}{upper}*{lower}+{contraction}|{start}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}|{_OTHERS}[\r\n/]*|{_LINES}"


_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(r"\p{N}")
_QWEN35 = _modern(r"\p{N}", r"\p{L}\p{M}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")
_GPT4O = _cased(r"\p{N}{1,3}", f"(?:{_CONTRACTION})?")
_TEKKEN = _cased(r"\p{N}")

# Ranges of letters of the alphabets with cases, as DeepSeek's tokenizers list them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "\ufb00-\ufb06\ufb13-\ufb17Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
# Its range begins at U+3000, which llama.cpp takes for white space
_DEEPSEEK_SIGNS = "!-/:-~！-／：-～‘-‟\u3001-。"
# The range from U+0800 has white space in it
_DEEPSEEK_SCRIPTS = "(?:(?!\\s)[一-龥ࠀ-一가-\ud7ff])+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]\^_`{|}~][A-Za-z]+"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """``patterns`` (regular expressions of the tokenizers library) and what else the name implies.

    ``ignore_merges``: a word that is a token is that token, whatever the merges say. ``add_bos``:
    the default where the file does not state it.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_BY_KIND = {
    PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", _THREE_DIGITS)): ("", "default"),
    PreTokenizer((_GPT2,)): (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"),
        *("gigachat", "mellum", "modern-bert", "a.x-4.0"),
        *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
    ),
    PreTokenizer((r"\p{N}", _GPT2)): (
        *("starcoder", "smollm", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    PreTokenizer((_PUNCTUATION_FALCON, _GPT2, _THREE_DIGITS)): ("falcon",),
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe"),
    PreTokenizer((_QWEN2,)): (
        *("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2", "kormo"),
        "solar-open",
    ),
    PreTokenizer((_QWEN35,)): ("qwen35",),
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    PreTokenizer(
        (
            *(r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?[{_DEEPSEEK_SIGNS}]+"),
            *(r"\s+\z", _DEEPSEEK_SCRIPTS, r"\p{N}+"),
        )
    ): ("deepseek-llm",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_SCRIPTS, r"\p{N}")): (
        "deepseek-coder",
    ),
    PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)): (
        "deepseek-v3",
        "hunyuan-dense",
    ),
}

PRE_TOKENIZERS = {name: kind for kind, names in _BY_KIND.items() for name in names}
