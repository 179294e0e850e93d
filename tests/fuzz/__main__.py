"""``make fuzz``: each harness under atheris for a while, led by the coverage of our packages.

    python -m tests.fuzz [--seconds N] [--keep] [NAME …]

Each line of figures ends with the coverage, lines and branches, of the modules that a harness is for
(``DRIVES``), by its corpus and what it has found so far. What is found besides is gone on from the next time
(``build/fuzz/NAME``). A finding ends the run: its bytes are printed, and belong into the corpus with the
mending. ``--keep`` adds to the corpus what reaches branches that the corpus did not.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = Path("build/fuzz")
PACKAGES = ("protocol", "storage", "api", "targetd")
RSS_LIMIT_MB = 1024
"""The process with all of it instrumented takes some 250."""
HANG_S = 10
MAX_LENGTH = 8192
"""Bytes of an input: some forty PDUs, or sixteen requests of text."""
CHILD, COVERED = "--child", "--covered"


def child(name: str, options: list[str]) -> None:
    """In a process of its own: libFuzzer never returns."""
    import atheris

    with atheris.instrument_imports(include=list(PACKAGES)):
        from tests.fuzz.harnesses import HARNESSES
    atheris.Setup([name, *options], HARNESSES[name])
    atheris.Fuzz()


def covered(name: str) -> None:
    """In a process of its own: print per cent of the branches and lines that the inputs there are reach."""
    import coverage

    measured = coverage.Coverage(branch=True, source=["protocol", "targetd", "api"], data_file=None)
    measured.start()
    from tests.fuzz.harnesses import DRIVES, HARNESSES, seeds

    for data in [*seeds(name), *(path.read_bytes() for path in sorted((BUILD / name).glob("*")))]:
        HARNESSES[name](data)
    measured.stop()
    print(f"{measured.report(include=DRIVES[name].split(), file=io.StringIO()):.0f}")


def fuzz(name: str, seconds: int) -> tuple[bool, str]:
    """(whether nothing was found, one line of figures)."""
    from tests.fuzz.harnesses import DRIVES, seeds

    found = BUILD / name
    found.mkdir(parents=True, exist_ok=True)
    options = (
        f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-max_len={MAX_LENGTH}", f"-artifact_prefix={found}-", "-print_final_stats=1",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", CHILD, name, *options, str(found), corpus],
            capture_output=True, check=False, env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
    log = done.stderr.decode("utf-8", "replace")
    (BUILD / f"{name}.log").write_text(log, encoding="utf-8")
    figures = dict(re.findall(r"stat::(\w+):\s*(\d+)", log))
    edges = re.findall(r"cov: (\d+)", log)
    line = (
        f"{name:16} {int(figures.get('number_of_executed_units', 0)):>9} executions, "
        f"{edges[-1] if edges else 0:>6} edges, {figures.get('peak_rss_mb', '?'):>4} MiB, "
        f"{len(list(found.iterdir())):>5} inputs"
    )
    if not done.returncode:
        line += f", {_covered(name)} % of {DRIVES[name]}"
    else:
        line += "\n" + done.stdout.decode("utf-8", "replace")[-4000:] + log[-2000:]
        for artifact in sorted(BUILD.glob(f"{name}-*")):
            line += f"\n{artifact.name}: {artifact.read_bytes().hex()}"
    return not done.returncode, line


def _covered(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", COVERED, name], capture_output=True, check=True, text=True
    )
    return done.stdout.split()[-1]


def keep(name: str) -> int:
    """Add to the corpus what goes where nothing in it goes, short inputs first; how many that were."""
    import coverage

    from tests.fuzz.harnesses import CORPUS, HARNESSES, seeds

    harness, corpus = HARNESSES[name], seeds(name)
    measured = coverage.Coverage(branch=True, source=["protocol", "targetd", "api"], data_file=None)

    def arcs(data: bytes) -> set[tuple[str, int, int]]:
        measured.erase()
        measured.start()
        try:
            harness(data)
        finally:
            measured.stop()
        data_of = measured.get_data()
        return {(file, *arc) for file in data_of.measured_files() for arc in data_of.arcs(file) or ()}

    seen: set[tuple[str, int, int]] = set()
    for seed in corpus:
        seen |= arcs(seed)
    before = len(corpus)
    for path in sorted((BUILD / name).iterdir(), key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        found = arcs(data)
        if found - seen:
            seen |= found
            corpus.append(data)
    texts = ",\n".join(json.dumps(data.hex()) for data in corpus)
    (CORPUS / f"{name}.json").write_text(f"[\n{texts}\n]\n", encoding="utf-8")
    return len(corpus) - before


def main() -> int:
    """See the module."""
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == [COVERED]:
        covered(sys.argv[2])
        return 0
    from tests.fuzz.harnesses import HARNESSES

    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *HARNESSES], metavar="NAME", help="all by default")
    parser.add_argument("--seconds", type=int, default=300, help="for each harness")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reaches more branches")
    options = parser.parse_args()
    well = True
    for name in options.names or HARNESSES:
        passed, line = fuzz(name, options.seconds)
        print(line, flush=True)
        well = well and passed
        if options.keep and passed:
            print(f"{name:16} {keep(name)} inputs more in the corpus", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
