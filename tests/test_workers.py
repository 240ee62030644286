"""--workers, several rows at once, and --rows, some rows of the table: the same numbers."""
import json
import signal
import subprocess
import time

import pytest
from conftest import command, options, refused, run, written

import common
import sal

WORDS = ["--labelled", 1, 2, "--seeds", 0, 1]


def test_workers_give_the_same_numbers(finished, phantom):
    """Two processes of one thread, and one: the same file to the byte, rows in the same order."""
    out, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), *WORDS, "--out", "workers"]
    done = run("sal", *words, "--workers", 2, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "2 workers, 1 threads each" in done.stdout
    made = work / "workers"
    assert (made / "per_volume.csv").read_text() == (out / "per_volume.csv").read_text()
    rows = json.loads((made / "metrics.json").read_text())["rows"]
    assert rows == json.loads((out / "metrics.json").read_text())["rows"]
    assert not list(made.glob("finetuning*"))                      # nothing half done is left
    phases = {json.loads(line)["phase"] for line in (made / "log.jsonl").read_text().splitlines()}
    assert {"pretrain", "scratch_n1_s0", "sal_n2_s1"} <= phases    # workers log as well


def test_workers_killed_and_resumed(finished, phantom):
    """Killed in the middle of its rows: its workers end, too, and a resumed run has all rows."""
    out, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), *WORDS, "--save-every", 1]
    words += ["--out", "killed_workers"]
    killed = work / "killed_workers"
    process = subprocess.Popen(command("sal", *words, "--workers", 2), cwd=work,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not done_rows(killed) and process.poll() is None:
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert holds_still(killed)                                     # a step is enough for a worker
    assert len(done_rows(killed)) < 8
    done = run("sal", *words, "--workers", 2, "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    assert (killed / "per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


def holds_still(folder):
    """Whether within a minute nothing is written to its checkpoints for 3 s."""
    before = None
    since = time.monotonic()
    end = since + 60
    while time.monotonic() < end:
        now = {f.name: written(f) for f in folder.glob("*.pt")}
        if now != before:
            since = time.monotonic()
        elif time.monotonic() - since > 3:
            return True
        before = now
        time.sleep(.25)
    return False


def done_rows(folder):
    """The checkpoints of the rows that are done."""
    return [*folder.glob("scratch_n?_s?.pt"), *folder.glob("sal_n?_s?.pt")]


def test_a_worker_knows_its_parent_by_its_claims(phantom, tmp_path):
    """Not by asking who the parent is: it may have been killed while the worker was starting."""
    claims = tmp_path / "rows-4711-abc"
    words = ["--data", str(phantom), *options("sal"), "--claims", str(claims)]
    worker = common.Run(common.parse_options("sal", "", sal.OPTIONS, words))
    assert worker.parent == 4711


def test_a_worker_that_fails_ends_the_run(finished, phantom):
    _, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), "--lr", "1e38", "--out", "wrong"]
    done = run("sal", *words, "--workers", 2, "--rows", "scratch", cwd=work)
    refused(done, "--workers: one has stopped", "--resume")


def test_rows_of_the_table(finished, phantom):
    """--rows scratch trains the baseline alone, without pre-training; others can follow."""
    out, work, _ = finished("sal")
    words = ["--data", phantom, *options("sal"), *WORDS, "--out", "some"]
    done = run("sal", *words, "--rows", "scratch", cwd=work)
    assert done.returncode == 0, done.stderr
    assert not (work / "some/pretrained.pt").exists()
    methods = {r["method"] for r in json.loads((work / "some/metrics.json").read_text())["rows"]}
    assert methods == {"scratch"}
    done = run("sal", *words, "--rows", "sal", "--resume", cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "some/per_volume.csv").read_text() == (out / "per_volume.csv").read_text()


@pytest.mark.parametrize("words, message", [
    (["--rows", "macl"], "--rows macl: is no row of this run; use some of scratch, sal"),
    (["--workers", 0], "--workers"),
])
def test_bad_rows_and_workers(words, message, phantom, tmp_path):
    done = run("sal", "--data", phantom, *options("sal"), *words, "--out", "o", cwd=tmp_path)
    refused(done, message)
    assert not (tmp_path / "o").exists()
