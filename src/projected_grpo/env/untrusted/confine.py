"""What the kernel can take away from a completion's process, each part used where it is granted.

The template takes namespaces for itself and its jobs (`Surroundings`); each job then gives up the rest (`confine`): its
user, the file system, capabilities, files outside its directory (Landlock, for kernels without user namespaces) and the
system calls that a solution has no use for (seccomp: processes, sockets, other processes' memory and signals).

Sources of the numbers: linux/audit.h, linux/seccomp.h, linux/filter.h, linux/landlock.h and the system call tables of
x86_64 and of the generic table that aarch64 uses. On any other processor there is no filter, and `isolation` says so.
"""

import ctypes
import os
import resource
import signal
import struct
import time

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
CLONE_NEWNET, CLONE_NEWIPC = 0x40000000, 0x08000000
CLONE_THREAD = 0x00010000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV, MNT_DETACH = 0x4000, 1 << 18, 2, 4, 2

libc = ctypes.CDLL(None, use_errno=True)
python_api = ctypes.PyDLL(None, use_errno=True)
"""The same functions, called without giving up the interpreter's lock."""


# --- system calls that a solution has no use for --------------------------------------------------------------------

ARCHITECTURES = {  # machine: (AUDIT_ARCH value, index into the tables below)
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
}
DENIED = {  # name: (x86_64, aarch64); None where the machine has no such call
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "flock": (73, 32),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "truncate": (76, 45),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "io_setup": (206, 0),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "sync": (162, 81),
    "syncfs": (306, 267),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_unlink": (241, 181),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "iopl": (172, None),
    "ioperm": (173, None),
}
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
SENDTO, FCNTL, IOCTL = (44, 206), (72, 25), (16, 29)
OWNERS = {"fcntl": (8, 10, 15), "ioctl": (0x8901, 0x8902)}
"""Commands that make the kernel signal some process: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP."""
X32_BIT = 0x40000000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS
NUMBER, ARCH, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data; the low halves
ADDRESS = (48, 52)  # both halves of the fifth argument


class Filter:
    """The seccomp program. A job may signal one process only, its own."""

    def __init__(self, machine):
        """Raises KeyError for a processor without a table."""
        arch, column = ARCHITECTURES[machine]
        program = [(LOAD, 0, 0, ARCH), (JUMP_EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, NUMBER)]
        if column == 0:
            program += [(JUMP_AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, REFUSE)]
        for numbers in DENIED.values():
            if numbers[column] is not None:
                program += [(JUMP_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE)]
        program += [(JUMP_EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ABSENT)]  # the C library falls back to clone
        program += [(JUMP_EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (JUMP_SET, 0, 1, CLONE_THREAD)]
        program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
        self.own = []
        for numbers, commands in ((FCNTL, OWNERS["fcntl"]), (IOCTL, OWNERS["ioctl"])):
            refusals = [step for c in commands for step in ((JUMP_EQUAL, 0, 1, c), (RETURN, 0, 0, REFUSE))]
            program += [(JUMP_EQUAL, 0, 2 + len(refusals), numbers[column]), (LOAD, 0, 0, SECOND_ARGUMENT), *refusals]
            program += [(RETURN, 0, 0, ALLOW)]
        program += [(JUMP_EQUAL, 0, 6, SENDTO[column])]  # without an address it is what a socket pair needs
        for half in ADDRESS:
            program += [(LOAD, 0, 0, half), (JUMP_EQUAL, 1, 0, 0), (RETURN, 0, 0, REFUSE)]
        program += [(LOAD, 0, 0, NUMBER), (JUMP_EQUAL, 0, 1, SENDTO[column]), (RETURN, 0, 0, ALLOW)]
        for number, zero in ((KILL, True), (TGKILL, False), (PRLIMIT, True)):
            targets = [(JUMP_EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)] if zero else []  # kill(0): its own group
            targets += [(JUMP_EQUAL, 0, 1, None), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
            program += [(JUMP_EQUAL, 0, 1 + len(targets), number[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
            self.own += [len(program) + i for i, step in enumerate(targets) if step[3] is None]
            program += targets
        program += [(RETURN, 0, 0, ALLOW)]
        steps = (struct.pack("=HBBI", code, yes, no, k or 0) for code, yes, no, k in program)
        self.buffer = ctypes.create_string_buffer(b"".join(steps), 8 * len(program))
        self.header = ctypes.create_string_buffer(
            struct.pack("@HP", len(program), ctypes.addressof(self.buffer)), struct.calcsize("@HP")
        )

    def allow_signals_to(self, pid):
        for index in self.own:
            struct.pack_into("=I", self.buffer, 8 * index + 4, pid)

    def install(self):
        """0 where the kernel took it; needs no_new_privs."""
        return python_api.prctl(PR_SET_SECCOMP, 2, self.header, 0, 0)


# --- Landlock: files, TCP and signals, without any right needed ------------------------------------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = 1, 2, 3, 4, 5, 7, 8, 14


def landlock_version():
    """0 where the kernel has none."""
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def landlock_ruleset(version, directory):
    """A descriptor of rules: files under one directory only (None: no word about files, where the root is empty), no
    TCP (from version 4), no signal to outside (from 6); -1 where there is nothing to forbid."""
    known = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # number of file system rights of that version
    net, scope = (0x3 if version >= 4 else 0), (0x3 if version >= 6 else 0)
    handled = 0 if directory is None else (1 << known) - 1
    attributes = struct.pack("=QQQ", handled, net, scope)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0 or directory is None:
        return ruleset
    rights = (WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE)
    allowed = sum(1 << right for right in rights if right < known)
    directory_fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, directory_fd), 0)
    os.close(directory_fd)
    return ruleset


# --- the template's surroundings, and what each job gives up ---------------------------------------------------------


class Surroundings:
    """Namespaces of the template, and what its jobs may be put into; `isolation` names what there is."""

    def __init__(self, directory, uid, rlimits):
        """`directory`: the jobs' own, by path. `uid`: their user where this process is root."""
        self.directory, self.uid, self.rlimits = directory, uid, rlimits
        self.root, self.isolation, self.untouched = os.getuid() == 0, [], None
        self.namespaces()
        self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.may_unshare_pid = probe(lambda: libc.unshare(CLONE_NEWPID) == 0)
        self.may_chroot = probe(lambda: os.chroot("/") is None)
        self.may_setuid = self.root and probe(lambda: os.setresuid(65534, 65534, 65534) is None)
        self.counted_apart = self.may_setuid or "user namespace" in self.isolation
        self.landlock_version = landlock_version()
        machine = os.uname().machine
        self.filter = Filter(machine) if machine in ARCHITECTURES else None
        if self.filter is not None and not probe(lambda: no_new_privileges() and self.filter.install() == 0):
            self.filter = None
        if self.filter is not None:
            self.filter.allow_signals_to(1)  # what a job is in a namespace of its own
        self.isolation += ["process namespace"] * self.may_unshare_pid + ["empty root"] * self.may_chroot
        self.isolation += ["own user"] * self.may_setuid
        self.isolation += ["own disk"] * self.mounted
        self.isolation += ["system call filter"] * (self.filter is not None)
        self.isolation += [f"landlock {self.landlock_version}"] * (self.landlock_version > 0)
        self.ruleset = -1

    def namespaces(self):
        uid, gid = os.getuid(), os.getgid()
        flags = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS
        if self.root:
            granted = libc.unshare(flags) == 0
        else:
            granted = libc.unshare(CLONE_NEWUSER | flags) == 0
            if granted:
                write_text("/proc/self/setgroups", "deny")
                write_text("/proc/self/uid_map", f"{uid} {uid} 1")
                write_text("/proc/self/gid_map", f"{gid} {gid} 1")
                self.isolation.append("user namespace")
        if granted:
            self.isolation.append("no network")
        self.mounted = granted and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0 and self.mount()

    def mount(self):
        """A file system in memory, with a size, for the jobs' directory."""
        owner = f",uid={self.uid},gid={self.uid}" if self.root else ""
        options = f"size=32m,nr_inodes=4096,mode=0700{owner}".encode()
        self.untouched = None
        return libc.mount(b"job", self.directory.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options) == 0

    @property
    def alone(self):
        """Whether a job cannot leave a process behind: none can be made, or all end with the namespace's first."""
        return self.may_unshare_pid or self.filter is not None

    def state(self):
        """What the jobs' directory looks like: its size grows with its entries, nobody can set its time of change."""
        try:
            found = os.stat(self.directory)
            entries = 0 if self.mounted else len(os.listdir(self.directory))
            return found.st_ino, found.st_size, entries, found.st_ctime_ns, found.st_mode
        except OSError:
            return None

    def renew(self):
        """An empty directory after a job; False where the trusted side has to see to it."""
        if self.state() == self.untouched:
            return True
        if not self.mounted:
            self.untouched = None
            return False
        libc.umount2(self.directory.encode(), MNT_DETACH)
        self.mounted = self.mount()
        time.sleep(0.011)  # a tick of the coarsest clock: what happens from now on has another time
        return self.mounted

    def fork(self):
        """A child, in a process namespace of its own where that may be; 0 in the child.

        The C library's fork and not os.fork, whose handlers for threads, locks and generators this process of one
        thread does not need: they cost a quarter of a millisecond.
        """
        if self.untouched is None:
            self.untouched = self.state()
            self.restrict()
        if not self.may_unshare_pid:
            return checked(python_api.fork())
        libc.unshare(CLONE_NEWPID)
        pid = checked(python_api.fork())
        if pid:
            libc.setns(self.pid_namespace, CLONE_NEWPID)
        return pid

    def restrict(self):
        """Make the steps of `confine` ready for the directory as it is now."""
        if self.ruleset >= 0:
            os.close(self.ruleset)
        self._steps = self.steps()

    def steps(self):
        """What a job gives up, as calls of the C library; the order matters, since each takes a right away.

        Made ready here, in the template: in the job's process every object that is touched costs a page fault, and
        these are most of the price of a fresh process.
        """
        steps = [(python_api.chdir, self.directory.encode())]
        if self.may_chroot:
            steps.append((python_api.chroot, b"."))
        for name, value in self.rlimits.items():
            number = getattr(resource, name)
            if number != resource.RLIMIT_NPROC or self.counted_apart:
                # Otherwise it would count the trainer's own threads.
                steps.append((python_api.setrlimit, number, struct.pack("@LL", value, value)))
        if self.may_setuid:
            steps.append((python_api.setgroups, ctypes.c_size_t(0), None))
            steps.append((python_api.setresgid, self.uid, self.uid, self.uid))
            steps.append((python_api.setresuid, self.uid, self.uid, self.uid))
        prctl = python_api.prctl
        steps.append((prctl, PR_SET_DUMPABLE, 0, 0, 0, 0))
        steps.append((prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        steps.append((prctl, PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0))
        steps.append((python_api.capset, struct.pack("=II", 0x20080522, 0), bytes(24)))
        if self.landlock_version:
            self.ruleset = landlock_ruleset(self.landlock_version, None if self.may_chroot else self.directory)
            if self.ruleset >= 0:
                steps.append((python_api.syscall, RESTRICT_SELF, self.ruleset, 0))
        return steps

    def confine(self):
        """In a job's process: give up what a completion must not have. Raises OSError where a step fails."""
        for function, *arguments in self._steps:
            checked(function(*arguments))
        if self.filter is not None:
            if not self.may_unshare_pid:
                self.filter.allow_signals_to(os.getpid())
            checked(self.filter.install())


def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def probe(attempt):
    """Whether `attempt` succeeds, tried in a child so that this process keeps its rights."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if attempt() else 1)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def no_new_privileges():
    return libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0


def write_text(path, text):
    with open(path, "w") as file:
        file.write(text)
