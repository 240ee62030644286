"""From the papers to the code: the index at the end of each method's page, and the lists of
course/README.md, written from the comments of the scripts and from course.toml.

    python course/index.py            write them anew
    python course/index.py --check    exit code 1 where a page differs

A comment or docstring that holds a tag of course.toml, as "(9)" or "Fig. 2", makes a line of the
index; the docstring at the top of a script does not count.
"""
import ast
import io
import re
import sys
import tokenize

from exercise import HERE, ROOT, CourseError, course, read, shown


def notes(source):
    """The comments and docstrings of a script, but the one at its top: [(line number, text)]."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append((token.start[0], token.string))
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            first = node.body[0]
            for number in range(first.lineno, first.end_lineno + 1):
                found.append((number, lines[number - 1]))
    return sorted(found)


def name_at(tree, number):
    """The function or class in which a line stands, or "" outside."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.lineno <= number <= node.end_lineno:
                return node.name
    return ""


def places(script, source, found, tag):
    """Where a tag, as "(9)" or "Fig. 2", stands in a script's notes `found`: linked lines.

    With the function in which they stand. Raises CourseError if the tag is nowhere.
    """
    tree = ast.parse(source)
    by_name = {}
    for number, text in found:
        if re.search(rf"{re.escape(tag)}(?!\d)", text):
            name = name_at(tree, number)
            link = f"[{number}](../{script}.py#L{number})"
            by_name.setdefault(f"`{name}` " if name else "", []).append(link)
    if not by_name:
        raise CourseError(f"{script}.py: no comment has {tag}; mend the comment or course.toml")
    return "; ".join(name + ", ".join(links) for name, links in by_name.items())


def index_of(paper):
    """The index of a paper, Markdown: what the code has, with its lines, and what it has not."""
    script = paper["script"]
    source = read(ROOT, script)
    found = notes(source)
    lines = [paper["about"].strip(), "", "| of the paper | what it is | lines of the script |",
             "| --- | --- | --- |"]
    for label, tag, what in paper["has"]:
        lines.append(f"| {label} | {what} | {places(script, source, found, tag)} |")
    lines += ["", "Not in the code:", ""]
    for label, why in paper["has_not"]:
        lines.append(f"- {label}: {why}")
    return "\n".join(lines)


def exercise_table():
    """The list of exercises of course/README.md, Markdown."""
    lines = ["| exercise | minutes | what it teaches | to open |", "| --- | --- | --- | --- |"]
    for e in course()["exercise"]:
        lines.append(f"| `{e['name']}` | {e['minutes']} | {e['teaches']} | {e['paper']} |")
    return "\n".join(lines)


def bug_table():
    """The list of bugs of course/README.md, Markdown: what they do, not what they are."""
    lines = ["| bug | minutes | symptom |", "| --- | --- | --- |"]
    for number, bug in enumerate(course()["bug"], 1):
        lines.append(f"| {number} | {bug['minutes']} | {bug['symptom']} |")
    return "\n".join(lines)


def written(page, name, text):
    """A page's text with `text` between the markers of this name. Raises CourseError."""
    old = page.read_text()
    pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise CourseError(f"{shown(page)}: has no place for {name}, or more than one")

    def between(found):
        return f"{found[1]}{text}\n{found[2]}"

    return pattern.sub(between, old)


def index(only_check=False):
    """Write the index of every page and the lists of course/README.md; or say which differ."""
    blocks = [(ROOT / paper["page"], "index", index_of(paper)) for paper in course()["paper"]]
    blocks.append((HERE / "README.md", "exercises", exercise_table()))
    blocks.append((HERE / "README.md", "bugs", bug_table()))
    differ = 0
    for page, name, text in blocks:
        new = written(page, name, text)
        if new != page.read_text():
            differ += 1
            print(f"{shown(page)}: {name} " + ("differs" if only_check else "written"))
            if not only_check:
                page.write_text(new)
    return int(only_check and differ > 0)


def main(words):
    """Write or check all pages; returns the exit code."""
    try:
        if words not in ([], ["--check"]):
            raise CourseError(f"{' '.join(words)}: not understood; use --check or nothing")
        return index(only_check=words == ["--check"])
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
