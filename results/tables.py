"""Tables of finished runs; those on the pages come from the runs that are kept in results/runs/.

    python results/tables.py RUN [RUN ...]   print the rows of these runs as one table
    python results/tables.py                 write the tables of the pages and the README anew
    python results/tables.py --check         exit code 1 where a page differs from its runs

On a page a table stands between `<!-- runs: NAME NAME ... -->` and `<!-- end -->`. Needs no torch.

Gain: over the row "scratch" of the same run, in Dice points, of every seed; and its mean with a
paired interval over patients: the Dice of a patient's volumes is averaged over classes, volumes and
seeds, and patients are drawn anew 10 000 times (seeded; 2.5 % and 97.5 %).
"""
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TABLE = re.compile(r"(<!-- runs: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


class RunError(Exception):
    """Something a user can mend: the message names the run and what is wrong with it."""


def read_run(folder):
    """A run's options, metrics and lines of per_volume.csv."""
    try:
        options = json.loads((folder / "options.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
        with open(folder / "per_volume.csv") as file:
            volumes = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: not a finished run ({error})") from None
    return {"name": folder.name, "options": options, "metrics": metrics, "volumes": volumes}


def comparable(runs):
    """Raise RunError unless all runs have the same data, split and rule of scoring."""
    first = runs[0]
    for run in runs[1:]:
        for name in ("data", "split", "cases"):
            if name not in first["options"] or name not in run["options"]:
                continue                                           # runs of old have no "cases"
            a = first["options"][name]                             # data: None is the phantom
            b = run["options"][name]
            if a != b:
                raise RunError(f"{run['name']}: {name} is {b}, that of {first['name']} {a}")
        for name in ("rule", "classes"):
            if run["metrics"][name] != first["metrics"][name]:
                raise RunError(f"{run['name']}: {name} differs from that of {first['name']}")


def by_patient(run, method, labelled):
    """{patient: Dice}, the mean over classes of the mean over a patient's volumes and seeds."""
    scores = {}
    for line in run["volumes"]:
        if (line["method"], int(line["labelled"])) == (method, labelled) and line["dice"] != "nan":
            of_patient = scores.setdefault(line["patient"], {})
            of_patient.setdefault(line["class"], []).append(float(line["dice"]))
    return {p: np.mean([np.mean(v) for v in c.values()]) for p, c in scores.items()}


def interval(run, method, labelled):
    """(lowest, highest) gain over scratch in Dice points, 95 %, patients drawn anew."""
    ours = by_patient(run, method, labelled)
    base = by_patient(run, "scratch", labelled)
    gain = np.array([100 * (ours[p] - base[p]) for p in sorted(ours)])
    draws = np.random.default_rng(0).integers(0, len(gain), (10_000, len(gain)))
    return np.percentile(gain[draws].mean(1), (2.5, 97.5))


def number(cell, form):
    """A mean with ± its std, where there is one."""
    if cell["mean"] is None:
        return "none"
    std = "" if cell["std"] is None else f" ± {cell['std']:{form}}"
    return f"{cell['mean']:{form}}{std}"


def table(runs):
    """The rows of the runs as a Markdown table; scratch once, if it is the same in all."""
    comparable(runs)
    heads = ["run", "labelled", "method", "mean Dice", "HD95 mm", "missed", "gain by seed",
             "gain, 95 %"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    seen = set()
    for run in runs:
        gains = {(g["method"], g["labelled"]): g for g in run["metrics"]["gains"]}
        for row in run["metrics"]["summary"]:
            key = (row["method"], row["labelled"])
            cells = [str(row["labelled"]), row["method"], number(row["mean_dice"], ".3f"),
                     number(row["hd95_mm"], ".1f"), f"{row['missed']} of {row['n_scores']}", "", ""]
            if key in gains:
                low, high = interval(run, *key)
                cells[-2] = ", ".join(f"{100 * g:+.1f}" for g in gains[key]["per_seed"])
                cells[-1] = f"{100 * gains[key]['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"
            if tuple(cells) not in seen:
                lines.append("| " + " | ".join([run["name"], *cells]) + " |")
            seen.add(tuple(cells))
    return "\n".join(lines) + "\n"


def pages():
    """The README and the pages of results/."""
    return [HERE.parent / "README.md", *sorted(HERE.glob("*.md"))]


def rewritten(page):
    """The text of a page with its tables made from results/runs/."""
    def fresh(found):
        runs = [read_run(HERE / "runs" / name) for name in found[2].split()]
        return found[1] + table(runs) + found[3]
    return TABLE.sub(fresh, page.read_text())


def main(words):
    if words == ["--check"]:
        wrong = [page.name for page in pages() if rewritten(page) != page.read_text()]
        if wrong:
            raise RunError(f"{', '.join(wrong)}: not what the runs say; "
                           "run python results/tables.py")
        return
    if words:
        print(table([read_run(Path(word)) for word in words]), end="")
        return
    for page in pages():
        page.write_text(rewritten(page))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
