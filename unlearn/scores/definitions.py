"""Every score, once: pure functions of what a model says of a row, or of such values over rows.

Letters: an answer's T tokens y_1..y_T, then one end-of-sequence token; l_t = -log p(y_t | prompt, y_<t) in nats; `loss` is
the mean of l over the T + 1 (TOFU's avg loss); `right` (T,) says at which of the T the model's argmax is y_t. What has no
value (an answer without tokens) is nan, and is left out of means.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import hmean, ks_2samp, mannwhitneyu

Floats = NDArray[np.float64]
DEFINITIONS = ("geometric", "arithmetic")
ROUGE_TOKENIZERS = ("ascii", "unicode")
OPEN_UNLEARNING = 1e-10  # the epsilon that open-unlearning adds to the denominators; TOFU has none


# ---- TOFU (arXiv 2401.06121) ----


def probability(loss: ArrayLike) -> Floats:
    """exp(-loss): the geometric mean of the tokens' probabilities."""
    return np.exp(-np.asarray(loss, dtype=float))


def probability_among(loss: float, wrong: Sequence[float], epsilon: float = 0.0) -> float:
    """p / (p + sum of the wrong answers' p + epsilon), p = exp(-loss) each: the probability on the two real-world sets."""
    return float(np.exp(-loss - logsumexp([-loss, *(-x for x in wrong), _log(epsilon)])))


def best_choice(losses: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The number of the likeliest of a question's choices, the first where several are: accuracy is how often that is right.

    Args:
        losses: of each choice the sum of its tokens' l, end-of-sequence not counted, in nats.
        lengths: by which they are divided, in characters: `accuracy_norm`.
    """
    return int(np.argmin(np.asarray(losses, dtype=float) / np.asarray(1 if lengths is None else np.maximum(lengths, 1))))


def choice_probability(losses: Sequence[float], correct: int) -> float:
    """The right choice's probability among all choices, exp(-loss) each (see `best_choice`)."""
    return float(np.exp(-losses[correct] - logsumexp(-np.asarray(losses, dtype=float))))


def truth_ratio(correct: float, wrong: Sequence[float], definition: str = "geometric", epsilon: float = 0.0) -> float:
    """How probable the wrong answers are beside the paraphrased correct one: w / (exp(-correct) + epsilon).

    Args:
        correct: the loss of the paraphrased answer (on the real-world sets, of the answer itself).
        wrong: the losses of the perturbed answers.
        definition: of w: `geometric`, exp(-mean of the losses), as TOFU's code and leaderboard have it; `arithmetic`, the
            mean of exp(-loss), as its paper has it.

    Raises:
        ValueError: the definition is neither.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"truth_ratio={definition}: is one of {', '.join(DEFINITIONS)}")
    losses = np.asarray(wrong, dtype=float)
    log_w = -losses.mean() if definition == "geometric" else logsumexp(-losses) - np.log(len(losses))
    with np.errstate(over="ignore"):  # a wrong answer may be e^800 times as probable: the ratio is inf, and its inverse 0
        return float(np.exp(log_w - np.logaddexp(-correct, _log(epsilon))))


def truth_ratio_forget(ratios: ArrayLike, epsilon: float = 0.0) -> float:
    """Mean of min(R, 1 / (R + epsilon)): 1 where wrong and correct answers are equally probable."""
    values = np.asarray(ratios, dtype=float)
    with np.errstate(divide="ignore"):
        return mean(np.minimum(values, 1 / (values + epsilon)))


def truth_ratio_keep(ratios: ArrayLike) -> float:
    """Mean of max(0, 1 - R): 1 where the correct answer alone is probable."""
    return mean(np.maximum(0, 1 - np.asarray(ratios, dtype=float)))


def model_utility(parts: Sequence[float]) -> float:
    """The harmonic mean of the nine scores off the forget set: 0 where one of them is 0, nan where one has no value."""
    return float(hmean(np.asarray(parts, dtype=float))) if not np.isnan(parts).any() else float("nan")


def forget_quality(ratios: ArrayLike, retain_ratios: ArrayLike) -> tuple[float, float]:
    """p-value and statistic D of the two-sample Kolmogorov-Smirnov test of the forget truth ratios of two models.

    The second model has seen the retain split only: a large p says that the two cannot be told apart.
    """
    test = ks_2samp(np.asarray(ratios, dtype=float), np.asarray(retain_ratios, dtype=float))
    return float(test.pvalue), float(test.statistic)


def rouge_recalls(answers: Sequence[str], truths: Sequence[str], rouge_tokenizer: str = "ascii") -> dict[str, list[float]]:
    """Each row's `rouge1` and `rougeL` recall with stemming: the share of the truth's words that the answer has; in order, for
    `rougeL`. Nan where the truth has no word.

    Args:
        rouge_tokenizer: what a word is: `ascii`, a-z and 0-9 alone, as rouge-score is published and TOFU has it; `unicode`,
            see `unicode_words`.

    Raises:
        ValueError: the tokenizer is neither.
    """
    from rouge_score.rouge_scorer import RougeScorer

    words = _rouge_words(rouge_tokenizer)
    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=words)
    found = [
        scorer.score(truth, answer) if words.tokenize(truth) else None for answer, truth in zip(answers, truths, strict=True)
    ]
    return {kind: [row[kind].recall if row is not None else float("nan") for row in found] for kind in ("rouge1", "rougeL")}


def rouge_f1(answers: Sequence[str], truths: Sequence[str]) -> dict[str, list[float]]:
    """Each row's `rouge1` and `rougeL` F1 without stemming, as MUSE has them (arXiv 2407.06460): 0 where one has no word."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    found = [scorer.score(truth, answer) for answer, truth in zip(answers, truths, strict=True)]
    return {kind: [row[kind].fmeasure for row in found] for kind in ("rouge1", "rougeL")}


def _rouge_words(rouge_tokenizer: str) -> Any:
    """What rouge-score takes as its tokenizer."""
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    if rouge_tokenizer not in ROUGE_TOKENIZERS:
        raise ValueError(f"rouge_tokenizer={rouge_tokenizer}: is one of {', '.join(ROUGE_TOKENIZERS)}")
    published = DefaultTokenizer(use_stemmer=True)

    class Words(Tokenizer):
        """The stems of words of a-z and 0-9 as published, others as they are."""

        def tokenize(self, text: str) -> list[str]:
            return [stem for word in unicode_words(text) for stem in (published.tokenize(word) if word.isascii() else [word])]

    return Words() if rouge_tokenizer == "unicode" else published


ONE_BY_ONE = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "THAI", "LAO", "KHMER", "MYANMAR")  # names of what has no spaces


def unicode_words(text: str) -> list[str]:
    """The text's words: runs of letters, digits and the marks on them, in any script; NFKC and case folded.

    A character, with its marks, is a word in scripts that have no spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese).
    What only steers the layout (joiners, soft hyphens, variation selectors) is left out.
    """
    words: list[str] = []
    inside = joins = False  # a word: may it take marks, and letters
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        kind, name = unicodedata.category(char), unicodedata.name(char, "")
        if kind == "Cf" or name.startswith("VARIATION SELECTOR"):
            continue
        if inside and kind in ("Mn", "Mc"):
            words[-1] += char
        elif kind[0] in "LN":
            alone = name.startswith(ONE_BY_ONE)
            words[-1:] = [words[-1] + char] if joins and not alone else [*words[-1:], char]
            inside, joins = True, not alone
        else:
            inside = joins = False
    return words


def loses_letters(text: str) -> bool:
    """Whether rouge-score's own tokenizer drops a letter, digit or mark of the text."""
    return any(not word.isascii() for word in unicode_words(text))


# ---- extraction and memorisation ----


def ps_exact(right: NDArray[np.bool_]) -> float:
    """1 - k/T, k the shortest prefix of the answer after which greedy decoding gives the rest exactly (arXiv 2502.19301's PS).

    Greedy decoding gives the rest if and only if every later argmax is right under teacher forcing: T - k is the length of
    the run of right ones at the end. The last one wrong: 0.
    """
    wrong = np.flatnonzero(~right)
    return (len(right) - 1 - (wrong[-1] if len(wrong) else -1)) / len(right) if len(right) else float("nan")


def extraction_strength(right: NDArray[np.bool_]) -> float:
    """The same with k <= T - 1, so that it is 1/T where the last is wrong: open-unlearning's (arXiv 2307.01881)."""
    return max(ps_exact(right), 1 / len(right)) if len(right) else float("nan")


def exact_memorization(right: NDArray[np.bool_]) -> float:
    """The share of the T tokens whose argmax is right (arXiv 2205.10770, as in open-unlearning)."""
    return float(right.mean()) if len(right) else float("nan")


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common subsequence."""
    best = np.zeros(len(b) + 1, dtype=int)
    for token in a:
        found = np.where(np.asarray(b) == token, best[:-1] + 1, 0) if len(b) else best[1:]
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], found))
    return int(best[-1])


# ---- membership: higher for a row that looks less like a member of the training set ----


def zlib_score(loss: float, text: str) -> float:
    """The loss over the bytes of the compressed answer (arXiv 2012.07805)."""
    return loss / len(zlib.compress(text.encode()))


def min_k(log_p: Floats, k: float = 0.4) -> float:
    """Minus the mean of the max(1, floor(k T)) lowest of the T answer tokens' log-probabilities (arXiv 2310.16789).

    With (log p - mu) / sigma in their place, see `standardised`, this is min-k++ (arXiv 2404.02936).
    """
    return -float(np.sort(log_p)[: max(1, int(len(log_p) * k))].mean()) if len(log_p) else float("nan")


def standardised(log_p: Floats, mean: Floats, variance: Floats) -> Floats:
    """(log p - mu) / sigma, mean and variance those of log p over the vocabulary under the model's own distribution."""
    return (log_p - mean) / np.sqrt(np.maximum(variance, 1e-6))


def auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """P(a holdout row's score > a forget row's), ties half; 1 = the forget rows look like members, 0.5 = no difference."""
    members, others = (values[~np.isnan(values)] for values in map(np.asarray, (forget, holdout)))
    if not len(members) or not len(others):
        return float("nan")
    return float(mannwhitneyu(others, members, method="asymptotic").statistic / (len(others) * len(members)))


def privleak(auc_model: float, auc_retain: float) -> float:
    """100 ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain) of min-k (arXiv 2407.06460, with open-unlearning's epsilon).

    Below 0 the forget rows still look like members, above 0 they look forgotten too thoroughly.
    """
    return 100 * (auc_retain - auc_model) / (1 - auc_retain + OPEN_UNLEARNING)


def relative_auc(auc_model: float, auc_retain: float) -> float:
    """100 (AUC - AUC_retain) / AUC_retain, PrivLeak as arXiv 2407.06460 prints it; nan where AUC_retain is 0.

    Which PrivLeak that is depends on what AUC is of; `privleak` is this of 1 - AUC, with an epsilon.
    """
    return 100 * (auc_model - auc_retain) / auc_retain if auc_retain else float("nan")


# ---- over rows ----


def mean(values: ArrayLike) -> float:
    """The mean of those that have a value; nan where none has."""
    numbers = np.asarray(values, dtype=float)
    return float(numbers[~np.isnan(numbers)].mean()) if (~np.isnan(numbers)).any() else float("nan")


def token_mean(losses: ArrayLike, tokens: ArrayLike) -> float:
    """The mean over all tokens of all rows, of each row's mean and how many tokens that is of; nan without rows."""
    weights = np.asarray(tokens, dtype=float)
    return float((np.asarray(losses, dtype=float) * weights).sum() / weights.sum()) if len(weights) else float("nan")


def _log(epsilon: float) -> float:
    return float(np.log(epsilon)) if epsilon else -np.inf
