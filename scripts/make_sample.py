"""Write sample.jsonl and its companions: instruction rows about the world that the built-in base has read about.

    python scripts/make_sample.py

| file | rows |
| --- | --- |
| sample.jsonl | the pairs that are trained on |
| sample_heldout.jsonl | the same tasks and phrasings, about entities and texts of no pair |
| sample_rephrased.jsonl | the same tasks, such entities and texts, in phrasings of no pair |
| sample_unseen.jsonl | task types of no pair |

The same seed gives the same files. Single-turn rows are alpaca style (instruction, input where useful, output);
rows with several turns or a system prompt hold messages. Every row names its task.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from leaks import SCORED_FILES, find_in_pairs, texts_of
from sample_tasks import TASKS, UNSCORED_TASKS, UNSEEN_TASKS, Draw, Row, chat

Tasks = dict[str, Callable[[Draw], Row]]
PAIRS, SCORED = 96, 20  # rows a task
# Tasks of several kinds or slow to learn have more pairs, easy ones fewer (docs/log.md).
PAIRS_OF = {
    "yes_no": 192,
    "system_format": 144,
    "memory": 144,
    "extract_field": 144,
    "sentiment": 64,
    "ticket_team": 64,
    "summary": 64,
    "bullets": 64,
    "small_talk": 64,
}
MOST_DRAWS = 200  # for each row wanted
FOLDER = Path(__file__).resolve().parent.parent
# Word runs that the corpus or a pair happens to hold across the edge of a list, found by the leak check: not for
# scored rows.
FOUND_IN_CORPUS = {
    " banana lime bean ",
    " beet potato cabbage ",
    " black red grey ",
    " cabbage bean onion ",
    " carrot pea bean ",
    " carrot potato cucumber ",
    " cherry fig grape ",
    " cherry onion peach ",
    " gardener firefighter judge ",
    " green yellow red ",
    " grey black brown yellow ",
    " grey orange brown green ",
    " grey orange yellow ",
    " grey purple red ",
    " horse goat camel ",
    " parrot mirror frog ",
    " pink red grey yellow ",
    " pumpkin book radish ",
    " purple green white blue pink ",
    " red black grey ",
    " red orange yellow ",
}
TURNS_BEFORE = 0.1  # share of single questions that come after another one; none where no task may be shown first


def prompt_of(row: Row) -> str:
    """All that comes before the last answer, in a form that only equal prompts share."""
    messages = row.get("messages")
    return json.dumps(messages[:-1] if isinstance(messages, list) else [row["instruction"], row.get("input")])


def draw_single(tasks: Tasks, draw: Draw) -> Row:
    while True:
        row = draw.rng.choice(list(tasks.values()))(draw)
        if "output" in row:
            return row


def after_another(row: Row, earlier: Row) -> Row:
    """The same question as the second one of a talk."""
    asked = [str(each["instruction"]) + (f"\n\n{each['input']}" if "input" in each else "") for each in (earlier, row)]
    return chat(asked[0], str(earlier["output"]), asked[1], str(row["output"]))


def make_rows(tasks: Tasks, counts: dict[str, int], draw: Draw, taken: set[str]) -> list[Row]:
    """Draw so many rows of each task, no prompt twice nor any of `taken`, then mix the tasks."""
    rows: list[Row] = []
    for task, make in tasks.items():
        made = tried = 0
        while made < counts[task]:
            if (tried := tried + 1) > MOST_DRAWS * counts[task]:
                raise ValueError(f"task {task} has fewer than {counts[task]} different rows; only {made} were found")
            row = make(draw)
            if "output" in row and not draw.new and draw.rng.random() < TURNS_BEFORE:
                row = after_another(row, draw_single(tasks, draw))
            row = {"task": task, **row}
            known = draw.held_out and not FOUND_IN_CORPUS.isdisjoint(texts_of(row))
            if not known and prompt_of(row) not in taken:
                taken.add(prompt_of(row))
                rows.append(row)
                made += 1
    draw.rng.shuffle(rows)
    return rows


def make_files(seed: int, rows_per_task: int, scored_per_task: int) -> dict[str, list[Row]]:
    """The rows of all four files by name; `rows_per_task` scales the pairs, whose tasks differ in number."""
    taken: set[str] = set()
    pair_tasks = TASKS | UNSCORED_TASKS
    pairs = {task: PAIRS_OF.get(task, PAIRS) * rows_per_task // PAIRS for task in pair_tasks}
    scored = dict.fromkeys(TASKS | UNSEEN_TASKS, scored_per_task)

    def draw(name: str, tasks: Tasks, counts: dict[str, int], held_out: bool, new: bool) -> list[Row]:
        return make_rows(tasks, counts, Draw(Random(f"{name}/{seed}"), held_out, new), taken)

    return {
        "sample.jsonl": draw("pairs", pair_tasks, pairs, held_out=False, new=False),
        "sample_heldout.jsonl": draw("heldout", TASKS, scored, held_out=True, new=False),
        "sample_rephrased.jsonl": draw("rephrased", TASKS, scored, held_out=True, new=True),
        "sample_unseen.jsonl": draw("unseen", UNSEEN_TASKS, scored, held_out=True, new=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write the four files into")
    parser.add_argument("--rows-per-task", type=int, default=PAIRS, help="pairs of most tasks")
    parser.add_argument("--scored-per-task", type=int, default=SCORED, help="held-out rows of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = make_files(args.seed, args.rows_per_task, args.scored_per_task)
    scored = {f"{name}:{line}": row for name in SCORED_FILES for line, row in enumerate(files[name], start=1)}
    if found := find_in_pairs(scored, files["sample.jsonl"]):
        raise SystemExit(f"{len(found)} texts of held-out rows stand in the pairs: {found}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows, {len({row['task'] for row in rows})} tasks, {len(text) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
