"""Clusters of similar tasks, by the words of their prompts and the form of their answers.

FLAN groups its tasks by hand and holds out a whole group (arXiv 2109.01652): a task is not unseen where its twin is
trained on. Here the groups come from the rows. Nothing is drawn at random: the same rows give the same clusters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_tune.errors import DataError
from qlora_tune.scores import find_labels, parse_json, split_words
from qlora_tune.shapes import Example

FORM_WEIGHT = 0.3  # of the answers' form in the similarity; the words of the prompts have the rest
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def cluster_tasks(examples: Sequence[Example], clusters: int) -> list[list[str]]:
    """Group the tasks of examples into at most so many clusters of similar tasks, of roughly equal size.

    Average linkage over the similarities: the two most similar groups are joined until few enough are left. A group
    that would outgrow an even share is not made while another pair can be joined. Rows without a task count for
    nothing. Raises DataError where fewer than two tasks stand in the rows.
    """
    tasks = sorted({example.task for example in examples if example.task})
    if len(tasks) < 2:
        raise DataError(
            f"Holding out clusters of tasks in turn needs two tasks at least, and the rows name {len(tasks)}: "
            f"{', '.join(tasks) or 'none'}. Name each row's task in a column task (or --map task=COLUMN)."
        )
    groups = _link(compare_tasks(examples, tasks), min(clusters, len(tasks)))
    return sorted([tasks[index] for index in group] for group in groups)


def compare_tasks(examples: Sequence[Example], tasks: Sequence[str]) -> Any:
    """How similar each two tasks are, as a symmetric matrix of shares: 1 is the same, 0 nothing in common."""
    import numpy as np

    rows: dict[str, list[Example]] = {task: [] for task in tasks}
    for example in examples:
        if example.task in rows:
            rows[example.task].append(example)
    words = _weigh_words({task: _count_words(found) for task, found in rows.items()})
    vocabulary = sorted({word for weights in words.values() for word in weights})
    matrix = np.array([[words[task].get(word, 0.0) for word in vocabulary] for task in tasks])
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    forms = np.array([describe_answers([example.answer for example in rows[task]]) for task in tasks])
    apart = np.abs(forms[:, None, :] - forms[None, :, :]).mean(axis=2)
    return (1 - FORM_WEIGHT) * (matrix @ matrix.T) + FORM_WEIGHT * (1 - apart)


def describe_answers(answers: Sequence[str]) -> list[float]:
    """The form of a task's answers, as shares from 0 to 1: JSON, lists, lines, one word, numbers, sentences, length."""
    words = [len(split_words(answer)) for answer in answers]
    signs = [
        [isinstance(parse_json(answer), (dict, list)) for answer in answers],
        [answer.lstrip().startswith(("- ", "* ", "1.")) for answer in answers],
        ["\n" in answer.strip() for answer in answers],
        ["," in answer for answer in answers],
        [count <= 1 for count in words],
        [_NUMBER.fullmatch(answer.strip()) is not None for answer in answers],
        [answer.rstrip().endswith((".", "!", "?")) for answer in answers],
    ]
    length = sum(math.log1p(count) for count in words) / len(words) / math.log1p(500)
    return [*(sum(sign) / len(answers) for sign in signs), float(bool(find_labels(answers))), min(length, 1.0)]


def _count_words(examples: Sequence[Example]) -> dict[str, float]:
    """The share of a task's prompts that each word stands in: an instruction's words are in many, an input's in few.

    Of a chat the last question counts, with what the system says: earlier turns may be about anything.
    """
    counts: Counter[str] = Counter()
    for example in examples:
        turns = example.messages[:-1]
        texts = [turn["content"] for turn in turns if turn["role"] == "system"]
        texts += [turn["content"] for turn in turns if turn["role"] == "user"][-1:]
        counts.update(set(split_words("\n".join(texts))))
    return {word: count / len(examples) for word, count in counts.items()}


def _weigh_words(shares: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Weigh each word's share by how few tasks have it: log((1 + tasks) / (1 + tasks with it)) + 1, smoothed idf."""
    having = Counter(word for found in shares.values() for word in found)
    idf = {word: math.log((1 + len(shares)) / (1 + count)) + 1 for word, count in having.items()}
    return {task: {word: share * idf[word] for word, share in found.items()} for task, found in shares.items()}


def _link(similarity: Any, clusters: int) -> list[list[int]]:
    """Average linkage of a similarity matrix's rows into groups; of equally similar pairs the first is joined."""
    import numpy as np

    groups = [[index] for index in range(len(similarity))]
    means, most = np.array(similarity), math.ceil(len(groups) / clusters)
    while len(groups) > clusters:
        sizes = np.array([len(group) for group in groups])
        allowed = np.triu(sizes[:, None] + sizes[None, :] <= most, k=1)
        if not allowed.any():
            most += 1  # what is left can't be joined evenly
            continue
        first, second = divmod(int(np.where(allowed, means, -np.inf).argmax()), len(groups))
        joined = (sizes[first] * means[first] + sizes[second] * means[second]) / (sizes[first] + sizes[second])
        means[first], means[:, first] = joined, joined
        means = np.delete(np.delete(means, second, axis=0), second, axis=1)
        groups[first] += groups.pop(second)
    return groups
