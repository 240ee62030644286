"""Tables of finished runs; those on the pages come from the runs that are kept in results/runs/.

    python results/tables.py RUN [RUN ...]   print these runs as one table, and draw tables.png
    python results/tables.py                 write the tables of the pages and the README anew
    python results/tables.py --check         exit code 1 where a page differs from its runs
    python results/tables.py --pair RUN METHOD RUN METHOD    one row's gain over another's
    python results/tables.py --keep RUN ...  copy what a table needs of these runs to results/runs/

On a page a table stands between one of these lines and `<!-- end -->`:

    <!-- runs: NAME NAME ... -->                        every row of these runs, with gains
    <!-- dice 1 3 7: TITLE = NAME METHOD; ... -->       mean Dice against labelled patients
    <!-- pairs 1 3 7: TITLE = NAME METHOD - NAME METHOD; ... -->   one row's gain over another's
    <!-- needs 1 3 7: TITLE = NAME METHOD; ... - NAME NAME -->  patients that scratch needs for it
    <!-- registration: NAME -->                         what CCT-R's registration is worth
    <!-- commands: NAME NAME ... -->                    how these runs were made

NAME is a folder of results/runs/. A cell that no run backs says "not run". Needs no torch.

Gain: over the row "scratch" of the same run, or over the other row of a pair, in Dice points, of
every seed that both have; and its mean with a paired interval over patients: the Dice of a
patient's class is averaged over volumes and seeds, patients are drawn anew, the same for both rows,
10 000 times (seeded; 2.5 % and 97.5 %), and each row's mean is over the drawn patients who have the
class, then over classes.

What scratch needs: the number of labelled patients at which the line through its mean Dice, drawn
over the logarithm of that number, reaches the row's Dice; the runs after the dash hold its rows.
"""
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
KINDS = "runs|dice|pairs|needs|registration|commands"
MARKED = rf"(<!-- ({KINDS})([^:>]*): ([^>]*?) -->\n).*?(<!-- end -->)"
TABLE = re.compile(MARKED, re.DOTALL)
KEPT = ["options.json", "metrics.json", "per_volume.csv", "run.txt"]
KEPT_TOO = ["registration.csv"]                                    # of CCT-R


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


def scores(run, method, labelled):
    """{(patient, class, case, seed): Dice} of this method and number of patients."""
    dice = {}
    for line in run["volumes"]:
        if (line["method"], int(line["labelled"])) == (method, labelled) and line["dice"] != "nan":
            key = (line["patient"], line["class"], line["case"], line["seed"])
            dice[key] = float(line["dice"])
    return dice


def by_patient(dice, seeds):
    """{(patient, class): mean Dice over volumes and `seeds`} of what `scores` gives."""
    values = {}
    for (patient, name, _, seed), value in dice.items():
        if seed in seeds:
            values.setdefault((patient, name), []).append(value)
    return {key: np.mean(of_key) for key, of_key in values.items()}


def mean_dice(dice):
    """Mean over the patients with a class (nan: without), then classes: [..., P, K] -> [...]."""
    there = np.isfinite(dice)
    of_class = np.where(there, dice, 0).sum(-2) / there.sum(-2).clip(1)        # [..., K]
    return of_class.sum(-1) / there.any(-2).sum(-1).clip(1)


def interval(ours, base):
    """(lowest, highest) gain in Dice points of one row's `scores` over another's: 95 %.

    Patients are drawn anew; of the seeds that both have.
    """
    seeds = {key[3] for key in ours} & {key[3] for key in base}
    rows = [by_patient(dice, seeds) for dice in (ours, base)]
    patients = sorted({patient for row in rows for patient, _ in row})
    classes = sorted({name for row in rows for _, name in row})
    draws = np.random.default_rng(0).integers(0, len(patients), (10_000, len(patients)))
    means = []
    for row in rows:
        dice = np.array([[row.get((p, c), np.nan) for c in classes] for p in patients])
        means.append(mean_dice(dice[draws]))                       # [10 000, P, K] -> [10 000]
    return np.percentile(100 * (means[0] - means[1]), (2.5, 97.5))


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
                low, high = interval(scores(run, *key), scores(run, "scratch", key[1]))
                cells[-2] = ", ".join(f"{100 * g:+.1f}" for g in gains[key]["per_seed"])
                cells[-1] = f"{100 * gains[key]['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"
            if tuple(cells) not in seen:
                lines.append("| " + " | ".join([run["name"], *cells]) + " |")
            seen.add(tuple(cells))
    return "\n".join(lines) + "\n"


def summary_row(run, method, labelled):
    """The line of a run's summary for this method and number of patients, or None."""
    for row in run["metrics"]["summary"]:
        if (row["method"], row["labelled"]) == (method, labelled):
            return row
    return None


def dice_cell(run, method, labelled):
    """Mean Dice, ± over seeds; a single seed is marked; "not run" without such a row."""
    row = summary_row(run, method, labelled)
    if row is None:
        return "not run"
    return number(row["mean_dice"], ".3f") + " (1 seed)" * (row["n"] == 1)


def kept_run(name):
    """A run of results/runs/, or None."""
    folder = HERE / "runs" / name
    return read_run(folder) if folder.is_dir() else None


def against_labelled(labelled, lines, sources, cell):
    """A table of "TITLE = NAME METHOD; ..." against the numbers of labelled patients.

    sources: 2 where a line names two rows, "NAME METHOD - NAME METHOD". A cell is
    cell(run, method, [run, method,] number of patients), or "not run" where a run is not kept.
    """
    heads = ["", *map(str, labelled)]
    rows = ["| " + " | ".join(heads).lstrip() + " |", "| --- " * len(heads) + "|"]
    runs = []
    for line in lines.split(";"):
        title, right = line.split("=")
        found = []
        words = []
        for source in right.split(" - ", sources - 1):
            name, method = source.split(maxsplit=1)
            run = kept_run(name)
            found.append(run)
            words += [run, method.strip()]
        runs += [run for run in found if run]
        cells = ["not run"] * len(labelled)
        if all(found):
            cells = [cell(*words, n) for n in labelled]
        rows.append("| " + " | ".join([title.strip(), *cells]) + " |")
    if runs:
        comparable(runs)
    return "\n".join(rows) + "\n"


def dice_by_seed(run, method, labelled):
    """{seed: mean Dice} of this method and number of patients."""
    return {row["seed"]: row["mean_dice"] for row in run["metrics"]["rows"]
            if (row["method"], row["labelled"]) == (method, labelled)}


def pair_cell(ours, method, base, base_method, labelled):
    """Gain of a row over another's, its interval, and that of every seed that both have."""
    a = dice_by_seed(ours, method, labelled)
    b = dice_by_seed(base, base_method, labelled)
    gains = [100 * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
    if not gains:
        return "not run"
    low, high = interval(scores(ours, method, labelled), scores(base, base_method, labelled))
    by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
    return f"{np.mean(gains):+.1f} [{low:+.1f}, {high:+.1f}] ({by_seed})"


def patients_needed(dice, curve):
    """Where the line through {patients: Dice}, over log patients, reaches `dice`; a text."""
    numbers = sorted(curve)
    if dice <= curve[numbers[0]]:
        return f"{numbers[0]} or fewer"
    for low, high in zip(numbers, numbers[1:]):
        if curve[low] < dice <= curve[high]:
            share = (dice - curve[low]) / (curve[high] - curve[low])
            return f"{low * (high / low) ** share:.1f}"
    return f"more than {numbers[-1]}"


def needs_table(labelled, content):
    """How many labelled patients scratch needs for the mean Dice of "TITLE = NAME METHOD; ...".

    After " - " the runs whose scratch rows are the curve; the first that has a number counts.
    """
    lines, names = content.rsplit(" - ", 1)
    baselines = [run for run in map(kept_run, names.split()) if run]
    curve = {}
    for run in baselines:
        for row in run["metrics"]["summary"]:
            if row["method"] == "scratch":
                curve.setdefault(row["labelled"], row["mean_dice"]["mean"])

    def cell(run, method, n):
        row = summary_row(run, method, n)
        if row is None or not curve:
            return "not run"
        comparable([run, *baselines])
        return patients_needed(row["mean_dice"]["mean"], curve)
    return against_labelled(labelled, lines, 1, cell)


def registration_table(name):
    """Label Dice of a run's registrations to the volumes of its first 1, 3, ... labelled patients.

    The mean of all pairs before, after the affine map and deformed; deformed, of one partner a
    volume: the one that BRS takes (least cycle error), the most similar one, the best by its label.
    """
    run = kept_run(name)
    if run is None:
        return "not run\n"
    text = read_text(HERE / "runs" / name / "registration.csv")
    every = list(csv.DictReader(text.splitlines()))
    heads = ["labelled", "pairs", "before", "affine", "deformed", "**taken by BRS**",
             "largest similarity", "best, by its label", "folded, mean; worst",
             "rank correlation"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for n in sorted({row["labelled"] for row in run["metrics"]["rows"]}):
        patients = next(r["patients"] for r in run["metrics"]["rows"] if r["labelled"] == n)
        pairs = [row for row in every if of_patients(row["labelled"], patients)]
        lines.append("| " + " | ".join(registration_cells(n, pairs, patients)) + " |")
    return "\n".join(lines) + "\n"


def of_patients(case, patients):
    """Whether a case, as patient099_frame01, is one of these patients'."""
    return any(case == patient or case.startswith(f"{patient}_") for patient in patients)


def registration_cells(n, pairs, patients):
    """The line of `registration_table` for n labelled patients and the rows of their pairs."""
    def numbers(name, rows=pairs):
        return np.array([float(row[name]) for row in rows])

    partners = {}
    for row in pairs:
        if not of_patients(row["volume"], patients):
            partners.setdefault(row["volume"], []).append(row)

    def mean_of(choose, name):                                     # one partner for each volume
        taken = [choose(rows, key=lambda row: float(row[name])) for rows in partners.values()]
        return numbers("dice_after", taken).mean()

    means = [numbers(f"dice_{when}").mean() for when in ("before", "affine", "after")]
    means.append(mean_of(min, "cycle_error_mm"))                   # BRS
    means.append(mean_of(max, "similarity_after"))
    means.append(mean_of(max, "dice_after"))
    folded = numbers("folded_percent")
    errors = np.argsort(np.argsort(numbers("cycle_error_mm")))     # places in their order
    dice = np.argsort(np.argsort(numbers("dice_after")))
    return [str(n), str(len(pairs)), *(f"{mean:.3f}" for mean in means),
            f"{folded.mean():.3f} %; {folded.max():.2f} %",
            f"{np.corrcoef(errors, dice)[0, 1]:.2f}"]


def commands(names):
    """The command, commit, machine and minutes of each run, a line each."""
    lines = []
    for name in names:
        for line in read_text(HERE / "runs" / name / "run.txt").splitlines():
            commit, command, machine, *minutes = line.split("; ")
            time = minutes[0] if minutes else "killed"
            lines.append(f"- `{command}` ({commit}; {machine}; {time})")
    return "\n".join(lines) + "\n"


def read_text(path):
    """The text of a file. Raises RunError."""
    try:
        return path.read_text()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None


def new_axis():
    """(figure, axis) that needs no screen."""
    import matplotlib                                              # here: a second to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    axis.grid(alpha=.3)
    return figure, axis


def draw(runs, path):
    """Mean Dice against labelled patients, a line a method and run, bars of one std over seeds."""
    figure, axis = new_axis()
    drawn = set()
    for run in runs:
        summary = run["metrics"]["summary"]
        for method in dict.fromkeys(row["method"] for row in summary):
            rows = [row for row in summary if row["method"] == method]
            rows.sort(key=lambda row: row["labelled"])
            labelled = [row["labelled"] for row in rows]
            dice = [row["mean_dice"]["mean"] for row in rows]
            std = [row["mean_dice"]["std"] or 0 for row in rows]
            if (method, *dice) in drawn:                           # scratch of several runs
                continue
            drawn.add((method, *dice))
            label = f"{method} ({run['name']})" if len(runs) > 1 else method
            axis.errorbar(labelled, dice, std, marker="o", capsize=3, label=label)
    ticks = sorted({row["labelled"] for run in runs for row in run["metrics"]["summary"]})
    axis.set_xscale("log")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.set(xlabel="labelled patients", ylabel="mean Dice")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def dice_by_steps(method):
    """{labelled: {steps: mean Dice}} of the kept runs length_METHOD_STEPS (seed 0, validation)."""
    dice = {}
    for folder in sorted((HERE / "runs").glob(f"length_{method}_*")):
        run = read_run(folder)
        for row in run["metrics"]["summary"]:
            if row["method"] == method:
                of_labelled = dice.setdefault(row["labelled"], {})
                of_labelled[run["options"]["steps"]] = row["mean_dice"]["mean"]
    return dice


def draw_length(path):
    """length.png: what is left of Pix2Rep's gain, the longer the baseline is trained.

    Pix2Rep at the length that is best for it, the baseline at each of its lengths.
    """
    scratch = dice_by_steps("scratch")
    pix2rep = dice_by_steps("pix2rep")
    figure, axis = new_axis()
    axis.axvspan(300, 3300, color="tab:gray", alpha=.15, lw=0)
    axis.text(1000, .96, "updates of others' baselines", fontsize=7, ha="center", va="top",
              transform=axis.get_xaxis_transform())                # y as a share of the axis
    for labelled in sorted(scratch.keys() & pix2rep.keys()):
        best = max(pix2rep[labelled].values())
        steps = sorted(scratch[labelled])
        gain = [100 * (best - scratch[labelled][s]) for s in steps]
        axis.semilogx(steps, gain, marker="o", label=f"{labelled} labelled")
    ticks = sorted({s for of_labelled in scratch.values() for s in of_labelled})
    axis.set_xticks(ticks, ticks)
    axis.axhline(0, color="black", lw=.8)
    axis.minorticks_off()
    axis.set(xlabel="updates of the baseline", ylabel="gain of Pix2Rep, Dice points",
             title="gain against updates of the baseline")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def keep(folder):
    """Copy the small files of a finished run to results/runs/, paths of data as path/to/NAME."""
    options = read_run(folder)["options"]
    kept = HERE / "runs" / folder.name
    kept.mkdir(parents=True, exist_ok=True)
    there = [name for name in KEPT_TOO if (folder / name).exists()]
    texts = {name: read_text(folder / name) for name in [*KEPT, *there]}
    for path in [options["data"], *options.get("pretrain_data", [])]:
        if path:                                                   # None: the phantom
            short = f"path/to/{Path(path).name}"
            whole = rf"(?<![\w./-]){re.escape(path)}(?![\w./-])"   # not a part of another path
            for name in ("options.json", "run.txt"):
                texts[name] = re.sub(whole, short, texts[name])
    for name, text in texts.items():
        (kept / name).write_text(text)


def print_pair(*words):
    """One row's gain over another's, for every number of labelled patients that both have."""
    if len(words) != 4:
        raise RunError("--pair needs RUN METHOD RUN METHOD")
    folder, method, base_folder, base_method = words
    ours = read_run(Path(folder))
    base = read_run(Path(base_folder))
    comparable([ours, base])
    for labelled in sorted({row["labelled"] for row in ours["metrics"]["summary"]}):
        print(f"{labelled} labelled: {pair_cell(ours, method, base, base_method, labelled)}")


def pages():
    """The README and the pages of results/."""
    return [HERE.parent / "README.md", *sorted(HERE.glob("*.md"))]


def rewritten(page):
    """The text of a page with its tables made from results/runs/."""
    def fresh(found):
        start, kind, numbers, content, end = found.groups()
        labelled = [int(n) for n in numbers.split()]
        if kind == "dice":
            made = against_labelled(labelled, content, 1, dice_cell)
        elif kind == "pairs":
            made = against_labelled(labelled, content, 2, pair_cell)
        elif kind == "needs":
            made = needs_table(labelled, content)
        elif kind == "registration":
            made = registration_table(content)
        elif kind == "commands":
            made = commands(content.split())
        else:
            made = table([read_run(HERE / "runs" / name) for name in content.split()])
        return start + made + end
    return TABLE.sub(fresh, page.read_text())


def main(words):
    if words == ["--check"]:
        wrong = [page.name for page in pages() if rewritten(page) != page.read_text()]
        if wrong:
            raise RunError(f"{', '.join(wrong)}: not what the runs say; "
                           "run python results/tables.py")
        return
    if words[:1] == ["--pair"]:
        print_pair(*words[1:])
        return
    if words[:1] == ["--keep"]:
        for word in words[1:]:
            keep(Path(word))
        return
    if words:
        runs = [read_run(Path(word)) for word in words]
        print(table(runs), end="")
        draw(runs, "tables.png")
        print("drawn: tables.png")
        return
    for page in pages():
        page.write_text(rewritten(page))
    if dice_by_steps("scratch") and dice_by_steps("pix2rep"):
        draw_length(HERE / "figures/length.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
