"""Plays the README's dialogues: each command as it stands there, each line it promises.
First it looks for each function and option that the README names.

    python3 .ci/dialogues.py      beside the scripts; needs paho-mqtt, curl, Mosquitto

A dialogue is a block of the README with `$ command` lines, each followed by the lines
that the user then sees: in this terminal, or in the city's log. They may come in any
order, and other lines between them (also where there is no "..."). What differs from
run to run (the clock, request ids, measured times) is not compared.
"""

import functools
import importlib
import pathlib
import re
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent.parent
README = HERE.joinpath("README.md").read_text("utf-8")
LOG = pathlib.Path("/tmp/city.log")
DEADLINE = 30       # s for the lines that a command promises
STARTED = 2         # s without a new line: then what was started has said all
MARK = "--- that was all ---"


def section(title):
    return README.split(f"# {title}\n")[1].split("\n#")[0]


def blocks(title):
    return re.findall(r"^```\n(.*?)^```", section(title), re.M | re.S)


def like(line):
    """The line, without what differs from run to run."""
    line = re.sub(r"\d\d:\d\d:\d\d", "CLOCK", line)
    line = re.sub(r"(http|car\d)-[0-9a-f]{5,}", r"\1-ID", line)
    line = re.sub(r'"life": \d+', '"life": N', line)
    line = re.sub(r"\(range [\d.]+ km\)", "RANGE", line)
    line = re.sub(r" +[\d.]+ ms| [\d.]+ s: \d+ a second", " TIME", line)
    return line.rstrip()


def check_names():
    """In the tables of who decides what, and of where to look for an exercise."""
    sys.path.insert(0, str(HERE))
    text = section("Who decides what") + section("Exercises")
    found = re.findall(r"`(\w+)\.py`(?: \||:) ((?:`[\w.]+`[^`|;]*)+)", text)
    for module, names in found:
        for name in re.findall(r"`([\w.]+)`", names):
            functools.reduce(getattr, name.split("."), importlib.import_module(module))
    assert len(found) > 30, found


def check_options():
    known = {"--help"}
    for script in sorted(HERE.glob("*.py")):
        if script.name != "ring.py":
            told = subprocess.run([sys.executable, script, "--help"], text=True,
                                  capture_output=True, check=True).stdout
            known |= {*re.findall("--[a-z][a-z-]*", told)}
    listed = {*re.findall("--[a-z][a-z-]*", section("Command lines"))}
    assert listed == known, listed ^ known


class Terminal:
    """A shell, and all that was printed in it or written to the city's log."""

    def __init__(self):
        LOG.write_text("")
        self.printed = []
        self.shell = subprocess.Popen(["bash"], text=True, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, command):
        """Run it, and take what it, or another one in the background, has printed."""
        self.shell.stdin.write(f"{command}\necho; echo '{MARK}'\n")
        self.shell.stdin.flush()
        for line in iter(self.shell.stdout.readline, f"{MARK}\n"):
            self.printed.append(line)

    def seen(self):
        self.run(":")
        return [like(line) for line in [*self.printed, *LOG.open()] if line.strip()]

    def sees(self, wanted, before):
        """Wait until each of these lines is there that often more than before."""
        end = time.monotonic() + DEADLINE
        while True:
            seen = self.seen()
            missing = [line for line in wanted
                       if seen.count(line) < before.count(line) + wanted.count(line)]
            if not missing:
                return
            if time.monotonic() > end:
                told = "\n".join(seen[-100:])
                raise SystemExit(f"never seen: {missing}; but\n{told}")
            time.sleep(0.1)

    def rests(self):
        """Wait, as a reader does after a start, until all is said."""
        size = 0
        since = time.monotonic()
        while time.monotonic() < since + STARTED or size == 0:
            if LOG.stat().st_size != size:
                size = LOG.stat().st_size
                since = time.monotonic()
            time.sleep(0.1)

    def plays(self, block):
        later = []      # lines that a command in the background will print
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *wanted = part.splitlines()
            wanted = [like(line) for line in wanted if line != "..."]
            before = self.seen()
            print("$", command, flush=True)
            if command.endswith("-C 1"):        # it listens, while the next one speaks
                self.run(command + " &")
                self.rests()
                later = wanted
                continue
            self.run(command)
            if command.endswith("=$!"):
                self.rests()
            self.sees(wanted + later, before)
            later = []


def play(set_up, end, stories, key=""):
    terminal = Terminal()
    terminal.run('curl() { command curl -sS "$@"; }')       # without its progress bar
    terminal.run(key)
    terminal.run(set_up)
    try:
        terminal.rests()
        for story in stories:
            terminal.plays(story)
    finally:
        terminal.run(f"{end}\nkill $(jobs -p); wait")
    assert "Traceback" not in LOG.read_text(), LOG.read_text()


def main():
    check_names()
    check_options()
    set_up, *drills = blocks("Break it")
    [end] = re.findall(r"At the very end:\s+`(.*)`", section("Break it"))
    [key] = blocks("The key")
    play(set_up, end, [*blocks("Ask by hand"), *blocks("Rush hour")])
    play(set_up, end, drills)
    play(set_up, end, [key], key.splitlines()[0].removeprefix("$ "))


if __name__ == "__main__":
    main()
