"""English text that comes with every CPython: the sentences of `pydoc_data.topics`."""

import random
import re

# A sentence ends at . ! or ? before a character that can start a sentence; "e.g." and similar do not end one.
_BREAK = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<=[.!?])\s+(?=[A-Z\"*'(“\[])")
_BULLET = re.compile(r"^(\* |\[\d+\] |\d+\. )")
_PLAIN_WORD = re.compile(r"(?<![\w\"'*])[a-z]+(?![\w\"'*])")
# Prompts, grammar rules, heading underlines, table rules, code.
_NOT_PROSE = re.compile(r">>>|::=|\*\*\*|===|---|\^\^\^|~~~|\| \||\.\.\. |\bdef \w+\(")
_MAX_CHARACTERS = 400


def _is_sentence(text: str) -> bool:
    if not text or len(text) > _MAX_CHARACTERS or _NOT_PROSE.search(text):
        return False
    if not text.endswith((".", "!", "?", ":", ".)", '."')):
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters >= 0.8 * len(text) and len(_PLAIN_WORD.findall(text)) >= 4


def all_sentences() -> list[str]:
    """Every distinct sentence (about 2,300 of them), in an order fixed by a seed.

    Shuffled, so that any slice is a fair sample of all topics.
    """
    from pydoc_data.topics import topics

    found: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for piece in _BREAK.split(" ".join(paragraph.split())):
                text = _BULLET.sub("", piece)
                if _is_sentence(text):
                    found.setdefault(text.casefold(), text)
    sentences = list(found.values())
    random.Random(0).shuffle(sentences)  # noqa: S311 - an order, not a secret
    return sentences
