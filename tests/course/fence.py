"""The sandbox of a worker, by the kernel: it writes into its own folder and reads Python's files, and nothing else.

Three parts, each where the system has it. Landlock (Linux 5.13 or newer) limits which files a process can open. A
seccomp filter refuses to start programs, to fork, and to use sockets, signals and shared memory. A worker of root also
becomes a user of its own. None of them can be undone by the process, and none needs a package or a privilege.
"""
import contextlib
import ctypes
import os
import platform
import struct
import sysconfig
from pathlib import Path

# system calls that a worker is refused: numbers on x86_64, on aarch64 (None: there is no such call)
REFUSED = dict(
    fork=(57, None), vfork=(58, None), execve=(59, 221), execveat=(322, 281), unshare=(272, 97), setns=(308, 268),
    kill=(62, 129), tkill=(200, 130), tgkill=(234, 131), rt_sigqueueinfo=(129, 138), rt_tgsigqueueinfo=(297, 240),
    pidfd_send_signal=(424, 424), ptrace=(101, 117), process_vm_readv=(310, 270), process_vm_writev=(311, 271),
    socket=(41, 198), io_uring_setup=(425, 425), shmget=(29, 194), msgget=(68, 186), semget=(64, 190),
    mq_open=(240, 180), add_key=(248, 217), request_key=(249, 218), keyctl=(250, 219), bpf=(321, 280),
    chmod=(90, None), fchmod=(91, 52), fchmodat=(268, 53), fchmodat2=(452, 452), chown=(92, None), fchown=(93, 55),
    lchown=(94, None), fchownat=(260, 54), utime=(132, None), utimes=(235, None), futimesat=(261, None),
    utimensat=(280, 88), setxattr=(188, 5), lsetxattr=(189, 6), fsetxattr=(190, 7))
CPUS = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}      # column above, architecture, clone
CLONE3, CLONE_THREAD, DENY, NO_SUCH_CALL, ALLOW = 435, 0x10000, 0x50001, 0x50026, 0x7FFF0000
READ, WRITE = 4 | 8, 2                                                       # Landlock's names: files, folders; files


def call(*args):
    """A system call, or prctl if the first argument is that word."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.prctl(*args[1:]) if args[0] == "prctl" else libc.syscall(*args)
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def landlock_version():
    """0 where the kernel has no Landlock."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return call(444, None, 0, 1) if platform.system() == "Linux" and platform.machine() in CPUS else 0
    return 0


def pythons_folders():
    """What a worker has to read: the standard library, packages, shared libraries."""
    import numpy
    import torch
    paths, base = sysconfig.get_paths(), sysconfig.get_config_var("installed_base")
    found = [*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), os.path.dirname(os.__file__),
             Path(torch.__file__).parents[1], Path(numpy.__file__).parents[1], "/lib", "/lib64", "/usr/lib",
             "/usr/lib64", "/usr/local/lib", Path(base) / "lib", "/etc/ld.so.cache"]
    return list(dict.fromkeys(os.path.realpath(each) for each in found if os.path.exists(each)))


def open_to_all(path):
    """Whether other users can read a file: its permissions and those of the folders above it."""
    path = Path(path).resolve()
    return bool(path.stat().st_mode & 4) and all(each.stat().st_mode & 1 for each in path.parents)


def others_can_read_python():
    return all(open_to_all(each) for each in pythons_folders() if not os.path.isfile(each))


def gap(project):
    """Why submissions are not fenced on this machine, in one line; "" if they are."""
    inside = [each for each in pythons_folders() if (project / "dq.py").is_relative_to(each) or (
        landlock_version() and os.path.exists(os.path.join(each, "dq.py")))]
    if inside:
        return f"{inside[0]}, which every program has to read, holds a dq.py"
    if landlock_version():
        return ""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not others_can_read_python():
        return ("this system has no Landlock (Linux 5.13 or newer), and only root can take another user, for whom "
                "Python's packages must be readable")
    return f"this system has no Landlock, and all users can read {project}" if open_to_all(project / "dq.py") else ""


def landlock(folder):
    """From now on: write below `folder`, read there and in Python's folders."""
    version = landlock_version()
    files = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    rules = struct.pack("QQQ", files, 3, 3)[:8 if version < 4 else 16 if version < 6 else 24]  # also TCP; signals
    ruleset = call(444, rules, len(rules), 0)
    allowed = [(folder, files), *((each, READ) for each in pythons_folders()),
               *((each, 4) for each in ("/dev/urandom", "/dev/zero", "/proc/cpuinfo")), ("/dev/null", 4 | WRITE)]
    for path, rights in allowed:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call(445, ruleset, 1, struct.pack("=Qi", rights & (files if os.path.isdir(path) else 4 | WRITE), handle), 0)
        os.close(handle)
    call("prctl", 38, 1, 0, 0, 0)                                            # no new privileges
    call(446, ruleset, 0)
    os.close(ruleset)


def seccomp():
    """From now on the REFUSED system calls fail, and those that start a process; threads may be started."""
    column, architecture, clone = CPUS[platform.machine()]
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (6, 0, 0, DENY),   # another architecture: refused
             (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), (6, 0, 0, DENY),     # the number of the call
             (0x15, 0, 1, CLONE3), (6, 0, 0, NO_SUCH_CALL)]                  # the C library then takes `clone`
    for numbers in REFUSED.values():
        steps += [(0x15, 0, 1, numbers[column]), (6, 0, 0, DENY)] * (numbers[column] is not None)
    steps += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 1, 0, CLONE_THREAD), (6, 0, 0, DENY), (6, 0, 0, ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", 38, 1, 0, 0, 0)
    call("prctl", 22, 2, struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)), 0, 0)


def other_user(folder):
    """From now on a user without any rights, the owner of `folder`; Landlock, where it is, says what it can read."""
    user = 50_000 + os.getpid() % 10_000
    for path in (folder, *Path(folder).rglob("*")):
        os.chown(path, user, user)
    keeps = landlock_version() and not others_can_read_python()
    call("prctl", 8, int(bool(keeps)), 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    right = 1 << 2 if keeps else 0                                           # to read, whoever owns it
    call(126 if platform.machine() == "x86_64" else 91, struct.pack("II", 0x20080522, 0),
         struct.pack("6I", right, right, 0, 0, 0, 0))


def close(folder):
    """All that the system has. OSError if a part of it fails that should work here."""
    if hasattr(os, "geteuid") and os.geteuid() == 0 and (landlock_version() or others_can_read_python()):
        try:
            other_user(folder)
        except OSError:                                                      # a container's root may have no such right
            if not landlock_version():
                raise
    if landlock_version():
        landlock(folder)
        seccomp()
