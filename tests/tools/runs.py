"""Shared by the tools that train many models, each in a separate folder, and that resume where they were stopped."""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dq  # noqa: E402


def split_flags(argv):
    """A command line (None: this process's) -> the arguments before the first --, and the flags after it."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1:]


def refuse(flags, *names):
    """UserError if one of the flags for a trainer is, or abbreviates, a flag that the command sets itself."""
    for flag in (flag.split("=")[0] for flag in flags if len(flag) > 2):
        taken = [name for name in names if name.startswith(flag)]            # argparse accepts abbreviations
        dq.require(not taken, f"{flag} can't stand behind --: {', '.join(taken)} is set for each run")


def flags_to_end(path, steps):
    """For the trainer that writes the checkpoint `path`: [] to start, ["--resume"], or None if the run is finished.

    UserError if that run has another length, because its learning-rate schedule then differs, too.
    """
    if not path.exists():
        return []
    held = dq.load_checkpoint(path, f"dq-{path.stem}")
    planned = held.get("settings", {}).get("steps")
    dq.require(planned == steps, f"{path} is of a run of {planned} steps, not {steps}; name another folder")
    return None if held["step"] == steps else ["--resume"]


def read_log(path):
    """The lines of a log as dicts, without those that a crash or an editor damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if re.fullmatch(r'\{"step": \d.*\}', line)]
