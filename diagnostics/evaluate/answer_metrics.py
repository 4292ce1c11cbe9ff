"""Right or wrong: scores of generated answers, and the ways in which an answer fails.

Scores are between 0 and 1, the best over all accepted answers. Text is compared as SQuAD does (Rajpurkar et al., 2016):
lower case, without punctuation and articles, white space joined.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
# An answer that ends in a repetition of at least this many tokens is a loop.
LOOP_TOKENS = 20
FAILURES = ("empty", "unfinished", "repeating", "unparseable")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return text in lower case, without punctuation and articles, white space joined."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if the answers are the same, normalised."""
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the words, normalised."""
    ours, theirs = normalised(answer).split(), normalised(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def contains(answer: str, gold: str) -> float:
    """Return 1 if the accepted answer occurs in ``answer``, in upper or lower case."""
    return float(gold.lower() in answer.lower())


def number(answer: str, gold: str) -> float:
    """Return 1 if the last number of the answer is the right one."""
    last = last_number(answer)
    return float(last is not None and last == last_number(gold))


def last_number(text: str) -> float | None:
    """Return the last number in a text; None if there is none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("$", "")) if numbers else None


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "contains": contains,
    "number": number,
}


def score_answer(metric: str, answer: str, accepted: Sequence[str]) -> float:
    """Return the best score of an answer over the accepted ones; for ``share``, the share of them that it contains."""
    if metric == "share":
        return sum(contains(answer, gold) for gold in accepted) / len(accepted)
    return max(METRICS[metric](answer, gold) for gold in accepted)


def failures(metric: str, answer: str, token_ids: Sequence[int], finished: bool) -> dict[str, bool]:
    """Return the ways in which an answer can fail, apart from being wrong, and whether it does.

    ``empty``: nothing but white space. ``unfinished``: neither a stop string nor the end of text was reached.
    ``repeating``: it ends in a repeated piece of up to `LOOP_TOKENS` tokens, at least that many tokens in all.
    ``unparseable``: the metric needs a number and the answer has none.
    """
    return {
        "empty": not answer.strip(),
        "unfinished": not finished,
        "repeating": is_loop(token_ids),
        "unparseable": metric == "number" and last_number(answer) is None,
    }


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether tokens end in a repetition: a piece of 1 to `LOOP_TOKENS` tokens, twice or more, `LOOP_TOKENS` in all."""
    ids = list(token_ids)
    for period in range(1, LOOP_TOKENS + 1):
        length = max(2 * period, LOOP_TOKENS)
        if len(ids) >= length and all(ids[-i] == ids[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop string, and whether there was one."""
    ends = [end for word in stop if (end := text.find(word)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
