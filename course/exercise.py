"""Exercises that grade themselves, and bugs to find.

    python course/exercise.py                     list the exercises and the bugs
    python course/exercise.py start NAME          a copy of the scripts without that function
    python course/exercise.py check NAME          which properties of your function hold
    python course/exercise.py bug N               a copy of the scripts with one planted bug
    python course/exercise.py check bug N         whether it is gone

Copies lie in course/mine/NAME and course/mine/bug_N, which git does not track. `check` runs tests
of tests/ on the scripts there. Exit code 0: all hold; 1: some do not; 2: bad use, one line says
what. What there is stands in course.toml, with the planted bugs and so their answers.
"""
import ast
import importlib
import io
import re
import shutil
import sys
import textwrap
import tomllib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MINE = HERE / "mine"
SCRIPTS = ["data", "common", "sal", "pix2rep", "macl", "cct_r"]


class CourseError(Exception):
    """Something that a student can mend: one line says what is wrong and what to do."""


def course():
    """The content of course.toml: lists `exercise`, `bug` and `paper` of dicts."""
    return tomllib.loads((HERE / "course.toml").read_text())


def find_exercise(name):
    """The exercise of this name. Raises CourseError."""
    for exercise in course()["exercise"]:
        if exercise["name"] == name:
            return exercise
    raise CourseError(f"{name}: no such exercise; `python course/exercise.py` lists them")


def find_bug(number):
    """The bug of this number, as typed. Raises CourseError."""
    bugs = course()["bug"]
    if not number.isdecimal() or not 1 <= int(number) <= len(bugs):
        raise CourseError(f"bug {number}: no such bug; use 1 to {len(bugs)}")
    return bugs[int(number) - 1]


# -------------------------------------------------------------------- copies: blanks and plants


def find_function(tree, path):
    """The node of a function, as ["f"], or of a method, as ["Class", "f"]; None if not there."""
    for name in path:
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [n for n in tree.body if isinstance(n, kinds) and n.name == name]
        if not found:
            return None
        tree = found[0]
    return tree


def blanked(source, exercise):
    """A script's text without the body of the exercise's function.

    Signature and docstring stay; the exercise's formula, if it has one, follows as a comment.
    Raises CourseError if the function is not there.
    """
    path = exercise["name"].split(".")[1:]
    function = find_function(ast.parse(source), path)
    if function is None:
        raise CourseError(f"{exercise['name']}: the script has no such function; mend course.toml")
    first = function.body[0]                                       # the docstring
    indent = " " * first.col_offset
    body = [f"{indent}# {line}".rstrip() for line in exercise.get("formula", "").splitlines()]
    body.append(f'{indent}raise NotImplementedError("to be written")')
    lines = source.splitlines()
    lines[first.end_lineno:function.end_lineno] = body
    return "\n".join(lines) + "\n"


def planted(source, change):
    """A script's text with one piece exchanged. Raises CourseError unless it is there once."""
    count = source.count(change["right"])
    if count != 1:
        raise CourseError(f"{change['script']}.py has {count} times, not once, what the bug "
                          f"replaces ({change['right'].strip()[:50]!r}); mend course.toml")
    return source.replace(change["right"], change["wrong"])


def copy_scripts(name, changed):
    """Make course/mine/NAME: all scripts, those of `changed` {script: text} with that text.

    Made under another name first, so that nothing half made is left. Raises CourseError if it is
    there already, or cannot be written.
    """
    folder = MINE / name
    if folder.exists():
        raise CourseError(f"{shown(folder)}: is there already and may hold your work; nothing was "
                          "changed. Move it away or remove it to start again")
    partial = MINE / f"{name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for script in dict.fromkeys([*SCRIPTS, *changed]):
            text = changed.get(script) or read(ROOT, script)
            (partial / f"{script}.py").write_text(text)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CourseError(f"{partial}: cannot be written ({error.strerror})") from None
    return folder


def read(folder, script):
    """The text of a script."""
    return (folder / f"{script}.py").read_text()


def shown(path):
    """A path as a student types it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def start(name):
    """Copy the scripts, one function blank."""
    exercise = find_exercise(name)
    script = name.split(".")[0]
    folder = copy_scripts(name, {script: blanked(read(ROOT, script), exercise)})
    file = folder / f"{script}.py"
    line = 1 + file.read_text()[:file.read_text().index("NotImplementedError(")].count("\n")
    print(f"{name}, about {exercise['minutes']} minutes: {exercise['teaches']}\n"
          f"paper: {exercise['paper']}\n"
          f"write the body at {shown(file)}:{line}, then\n"
          f"    python course/exercise.py check {name}")
    return 0


def start_bug(number):
    """Copy the scripts, one bug planted; print what it does, not what it is."""
    bug = find_bug(number)
    changed = {}
    for change in bug["change"]:
        script = change["script"]
        changed[script] = planted(changed.get(script) or read(ROOT, script), change)
    if "tool" in bug:
        changed["measure"] = bug["tool"]
    folder = copy_scripts(f"bug_{number}", changed)
    print(f"bug {number}, about {bug['minutes']} minutes, in {shown(folder)}\n"
          f"symptom: {bug['symptom']}\n"
          f"measure:\n{indented(bug['measure'])}\n"
          f"name the line, mend it there, then\n    python course/exercise.py check bug {number}")
    return 0


def indented(text):
    """The lines of a text, four blanks before each."""
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())


# --------------------------------------------------------------------------------------- checks


def is_ours(module):
    """Whether a module's name is that of a script or of a file of tests/."""
    return module in SCRIPTS or module == "conftest" or module.startswith("test_")


@contextmanager
def scripts_of(folder):
    """Inside, `import sal` and the like find the files of this folder, also in the tests."""
    kept = {name: module for name, module in sys.modules.items() if is_ours(name)}
    path = list(sys.path)
    for name in kept:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        for name in SCRIPTS:
            load(name, folder)
        yield
    finally:
        for name in [name for name in sys.modules if is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)
        sys.path[:] = path


def load(name, folder):
    """Import a script of the folder. Raises CourseError where it does not parse or run."""
    file = folder / f"{name}.py"
    writes = sys.dont_write_bytecode
    sys.dont_write_bytecode = True                                 # a file saved twice in a second
    try:
        importlib.import_module(name)
    except SyntaxError as error:
        raise CourseError(f"{shown(file)}, line {error.lineno}: does not parse ({error.msg}); "
                          "nothing was checked") from None
    except Exception as error:
        raise CourseError(f"{shown(file)}: cannot be imported ({type(error).__name__}: "
                          f"{first_line(error)}); nothing was checked") from None
    finally:
        sys.dont_write_bytecode = writes


class Watch:
    """A plugin for pytest that keeps the first failure of every test, by the test's name."""
    def __init__(self):
        self.ran = set()
        self.failed = {}
        self.broken = []                                           # test files that do not load

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(str(report.longrepr).strip().splitlines()[-1])

    def pytest_runtest_setup(self, item):
        sys.modules["torch"].manual_seed(0)                        # the same numbers every time

    def pytest_runtest_makereport(self, item, call):
        name = f"{item.path.name}::{item.originalname}"
        self.ran.add(name)
        if call.excinfo:
            self.failed.setdefault(name, call.excinfo)


def run_tests(folder, tests):
    """Run tests, as "test_sal.py::test_x", on the scripts of a folder: {test: its failure}."""
    import pytest                                                  # here: `start` needs no pytest
    watch = Watch()
    words = [str(ROOT / "tests" / test) for test in dict.fromkeys(tests)]
    quiet = io.StringIO()                                          # what pytest itself prints
    with scripts_of(folder), redirect_stdout(quiet), redirect_stderr(quiet):
        pytest.main([*words, "-q", "--capture=sys", "-p", "no:cacheprovider"], plugins=[watch])
    if watch.broken:
        raise CourseError(f"{shown(folder)}: the tests do not load with these scripts "
                          f"({watch.broken[0].removeprefix('E ').strip()}); is the function still "
                          "there, or the copy older than the tests?")
    gone = set(tests) - watch.ran
    if gone:
        raise CourseError(f"{min(gone)}: did not run; is it still in tests/? Mend course.toml")
    return watch.failed


def first_line(error):
    """The first line of an exception's message, short."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:160]


NUMBER = r"(-?[\d.]+(?:e[-+]\d+)?|nan|-?inf)"


def compared(message):
    """What an assertion of two numbers says, in plain words; "" if it is none."""
    first = message.splitlines()[0] if message else ""
    found = re.match(rf"assert {NUMBER} (==|<|>|<=|>=) {NUMBER}( |$)", first)
    if not found:
        return ""
    got = float(found[1])
    right = float(found[3])
    if found[2] != "==":
        return f"yours {got:.4g}, it should be {found[2]} {right:.4g}"
    words = f"yours {got:.4g}, right {right:.4g}"
    ratio = got / right if right else 0
    if ratio and abs(ratio + 1) < 1e-3:
        return f"{words}: the sign is turned"
    for times, more in ((ratio, "times"), (1 / ratio if ratio else 0, "times too small, not")):
        if 1.5 < times < 1e6 and abs(times - round(times)) < 1e-3 * times:
            if more == "times":
                return (f"{words}: {round(times)} times as large. A sum where a mean belongs, or "
                        "a factor?")
            return f"{words}: {round(times)} times too small. A mean too many, or a factor?"
    return words


def explained(failure, folder, function):
    """Why a test failed, in plain words: two numbers, what it asks, or where the file stops.

    function: the name of the function that the student writes; "" for a bug.
    """
    error = failure.value
    own = [entry for entry in failure.traceback if Path(entry.path).is_relative_to(folder)]
    own = [entry for entry in own if entry.name == function] or own
    where = f"line {own[-1].lineno + 1} of your {Path(own[-1].path).name}" if own else "the test"
    if isinstance(error, NotImplementedError):
        return f"not written yet, {where}"
    if isinstance(error, AssertionError):
        asked = str(failure.traceback[-1].statement).strip().splitlines()[0]
        return compared(str(error)) or f"does not hold: {asked}"
    if type(error).__name__ == "Failed":                           # of pytest.raises
        return first_line(error)
    words = f"{where} stops: {type(error).__name__}: {first_line(error)}"
    if re.search(r"shape|size|dimension|broadcast", str(error)):
        words += " (do the axes stand where you think? a transpose, a missing axis?)"
    return words


def report(folder, checks, function=""):
    """Run the checks [property, test, words] on a folder, print each; returns how many fail.

    function: what the student writes; "" for a bug, where the words of what fails would name it.
    """
    failed = run_tests(folder, [test for _, test, _ in checks])
    if failed and all(isinstance(f.value, NotImplementedError) for f in failed.values()):
        print(explained(next(iter(failed.values())), folder, function))
        return len(failed)
    for kind, test, words in checks:
        if test not in failed:
            print(f"  holds  {kind}: {words}")
            continue
        why = explained(failed[test], folder, function)
        if not function:
            words = "not yet"
            why = "" if isinstance(failed[test].value, AssertionError) else why
        print(f"  FAILS  {kind}: {words}")
        if why:
            print(f"         {why}")
    return sum(test in failed for _, test, _ in checks)


def begun(name, command):
    """The folder of an exercise or bug that was started. Raises CourseError if it was not."""
    folder = MINE / name
    missing = [script for script in SCRIPTS if not (folder / f"{script}.py").is_file()]
    if missing:
        raise CourseError(f"{shown(folder / missing[0])}.py: is not there; begin with "
                          f"`python course/exercise.py {command}`")
    return folder


def check(name):
    """Say which properties of the student's function hold; 0 only if all do."""
    exercise = find_exercise(name)
    folder = begun(name, f"start {name}")
    count = report(folder, exercise["checks"], name.split(".")[-1])
    total = len(exercise["checks"])
    print(f"{total - count} of {total} hold" + ("; done." if not count else "."))
    return int(count > 0)


def check_bug(number):
    """Say whether a bug is gone, and then what it was and where it was seen."""
    bug = find_bug(number)
    folder = begun(f"bug_{number}", f"bug {number}")
    if report(folder, bug["checks"]):
        print("not mended yet.")
        return 1
    print(f"gone. It was: {bug['name']}\nseen: {bug['seen']}")
    return 0


# ----------------------------------------------------------------------------------------- main


def show():
    """List the exercises and bugs; "begun" where there is a copy in course/mine."""
    print("exercises: start NAME, check NAME")
    for exercise in course()["exercise"]:
        show_one(exercise["name"], exercise["minutes"], exercise["teaches"], exercise["name"])
    print("bugs: bug N, check bug N")
    for number, bug in enumerate(course()["bug"], 1):
        show_one(f"bug {number}", bug["minutes"], bug["symptom"], f"bug_{number}")
    return 0


def show_one(name, minutes, text, folder):
    """An exercise or a bug of the list, longer texts below each other."""
    state = "begun" if (MINE / folder).exists() else ""
    line = f"  {minutes:2} min {state:5}  {name}: {text}"
    print(textwrap.fill(line, 100, subsequent_indent=" " * 16))


def main(words):
    """Do what the words of the command line say; returns the exit code."""
    try:
        match words:
            case []:
                return show()
            case ["-h" | "--help"]:
                print(__doc__.strip())
                return 0
            case ["start", name]:
                return start(name)
            case ["check", "bug", number]:
                return check_bug(number)
            case ["check", name]:
                return check(name)
            case ["bug", number]:
                return start_bug(number)
        raise CourseError(f"{' '.join(words)}: not understood; use start NAME, check NAME, bug N, "
                          "check bug N, or nothing for the list")
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
