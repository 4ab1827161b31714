"""What the tools share that train many models, each in a folder of its own, and go on where they were stopped."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dq  # noqa: E402


def split_flags(argv):
    """A command line, None for that of this process -> the words in front of the first --, and the flags behind it."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1:]


def refuse(flags, *names):
    """Flags for a trainer can't be those that the command sets itself. UserError if one is, or abbreviates one."""
    for flag in (flag.split("=")[0] for flag in flags if len(flag) > 2):
        taken = [name for name in names if name.startswith(flag)]            # argparse takes abbreviations
        dq.require(not taken, f"{flag} can't stand behind --: {', '.join(taken)} is set for each run")


def flags_to_end(path, steps):
    """For a trainer whose checkpoint is `path`: [] if there is none, ["--resume"], or None if its run is finished.

    UserError if that is a run of another length: the learning rate of its last steps is another, too.
    """
    if not path.exists():
        return []
    held = dq.load_checkpoint(path, f"dq-{path.stem}")
    then = held.get("settings", {}).get("steps")
    dq.require(then == steps, f"{path} is of a run of {then} steps, not {steps}; name another folder")
    return None if held["step"] == steps else ["--resume"]
