"""What runs on the simulator reaches the lines of the CUDA kernels."""

import gzip
import json
import subprocess
import sys

import pytest
import simulator

pytestmark = pytest.mark.skipif(bool(simulator.missing()), reason=simulator.missing())

LEAST = 0.95


def lines_of_kernels(library):
    """How often each line of csrc/cuda ran, by file: in any instance of a template, and in any translation unit."""
    counts = {}
    for notes in library.parent.rglob("*.gcda"):
        command = ["gcov", "--json-format", "--stdout", str(notes)]
        done = subprocess.run(command, capture_output=True, check=True, cwd=library.parent)
        text = gzip.decompress(done.stdout) if done.stdout[:2] == b"\x1f\x8b" else done.stdout
        for record in text.decode().splitlines():
            for file in json.loads(record)["files"]:
                if "/csrc/cuda/" not in file["file"] or file["file"].endswith(".cpp"):
                    continue
                name = file["file"].split("/csrc/")[1]
                lines = counts.setdefault(name, {})
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] = lines.get(number, 0) + line["count"]
    return counts


def test_almost_every_line_of_the_kernels_runs():
    library = simulator.build("coverage")
    for old in library.parent.rglob("*.gcda"):
        old.unlink()
    done = simulator.run("coverage", sys.executable, simulator.EXERCISE, library)
    assert done.returncode == 0, done.stdout
    counts = lines_of_kernels(library)
    missed = {
        name: sorted(line for line, count in lines.items() if count == 0) for name, lines in sorted(counts.items())
    }
    total = sum(len(lines) for lines in counts.values())
    ran = total - sum(len(lines) for lines in missed.values())
    listed = "\n".join(f"csrc/{name}: {lines}" for name, lines in missed.items() if lines)
    assert total > 500
    assert ran / total >= LEAST, f"{ran} of {total} lines ran; not these:\n{listed}"
