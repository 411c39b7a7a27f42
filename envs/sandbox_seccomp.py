"""The system calls that sandboxed code is refused, as a seccomp filter.

A list of what is denied, because what Python needs differs between versions and libraries: it
makes the other walls thicker, and takes the network away where there are no namespaces.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from .sandbox_walls import check, libc

# Ways into the kernel that no ordinary program needs, and `socket`, in every sandbox.
_DENIED = [
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "kcmp",
    "pidfd_getfd",
    "unshare",
    "setns",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "move_mount",
    "fsopen",
    "open_tree",
    "fsmount",
    "fspick",
    "fsconfig",
    "mount_setattr",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "keyctl",
    "add_key",
    "request_key",
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "kexec_file_load",
    "reboot",
    "swapon",
    "swapoff",
    "acct",
    "quotactl",
    "settimeofday",
    "clock_settime",
    "adjtimex",
    "clock_adjtime",
    "sethostname",
    "setdomainname",
    "open_by_handle_at",
    "name_to_handle_at",
    "memfd_create",
    "memfd_secret",
    "shmget",
    "shmat",
    "msgget",
    "semget",
    "mq_open",
    "socket",
    "syslog",
    "fanotify_init",
    "lookup_dcookie",
    "vhangup",
    "iopl",
    "ioperm",
    "modify_ldt",
    "process_madvise",
    "process_mrelease",
]

# Where no namespaces part it from other processes: no process but itself, nor what Landlock
# leaves open.
_DENIED_ALONE = [
    "fork",
    "vfork",
    "execve",
    "execveat",
    "setsid",
    "setpgid",
    "tkill",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "pidfd_send_signal",
    "pidfd_open",
    "prlimit64",
    "setpriority",
    "sched_setaffinity",
    "sched_setscheduler",
    "ioprio_set",
    "migrate_pages",
    "move_pages",
    "chmod",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "chown",
    "fchown",
    "lchown",
    "fchownat",
    "utime",
    "utimes",
    "futimesat",
    "utimensat",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
    "removexattr",
    "lremovexattr",
    "fremovexattr",
    "setxattrat",
    "removexattrat",
    "file_setattr",
    "inotify_init",
    "inotify_init1",
    "fcntl_lease",
]

_X86_64 = """
    ptrace 101 process_vm_readv 310 process_vm_writev 311 kcmp 312 pidfd_getfd 438 unshare 272
    setns 308 mount 165 umount2 166 pivot_root 155 chroot 161 move_mount 429 fsopen 430 open_tree
    428 fsmount 432 fspick 433 fsconfig 431 mount_setattr 442 bpf 321 perf_event_open 298
    userfaultfd 323 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 keyctl 250 add_key
    248 request_key 249 init_module 175 finit_module 313 delete_module 176 kexec_load 246
    kexec_file_load 320 reboot 169 swapon 167 swapoff 168 acct 163 quotactl 179 settimeofday 164
    clock_settime 227 adjtimex 159 clock_adjtime 305 sethostname 170 setdomainname 171
    open_by_handle_at 304 name_to_handle_at 303 memfd_create 319 memfd_secret 447 shmget 29 shmat
    30 msgget 68 semget 64 mq_open 240 socket 41 syslog 103 fanotify_init 300 lookup_dcookie 212
    vhangup 153 iopl 172 ioperm 173 modify_ldt 154 process_madvise 440 process_mrelease 448 kill 62
    tkill 200 tgkill 234 rt_sigqueueinfo 129 rt_tgsigqueueinfo 297 pidfd_send_signal 424 pidfd_open
    434 setsid 112 setpgid 109 fork 57 vfork 58 clone 56 clone3 435 execve 59 execveat 322 chmod 90
    fchmod 91 fchmodat 268 fchmodat2 452 chown 92 fchown 93 lchown 94 fchownat 260 utime 132 utimes
    235 futimesat 261 utimensat 280 setxattr 188 lsetxattr 189 fsetxattr 190 removexattr 197
    lremovexattr 198 fremovexattr 199 setxattrat 463 removexattrat 466 file_setattr 469 prlimit64
    302 setpriority 141 sched_setaffinity 203 sched_setscheduler 144 migrate_pages 256 move_pages
    279 ioprio_set 251 inotify_init 253 inotify_init1 294
"""
_AARCH64 = """
    ptrace 117 process_vm_readv 270 process_vm_writev 271 kcmp 272 pidfd_getfd 438 unshare 97 setns
    268 mount 40 umount2 39 pivot_root 41 chroot 51 move_mount 429 fsopen 430 open_tree 428 fsmount
    432 fspick 433 fsconfig 431 mount_setattr 442 bpf 280 perf_event_open 241 userfaultfd 282
    io_uring_setup 425 io_uring_enter 426 io_uring_register 427 keyctl 219 add_key 217 request_key
    218 init_module 105 finit_module 273 delete_module 106 kexec_load 104 kexec_file_load 294 reboot
    142 swapon 224 swapoff 225 acct 89 quotactl 60 settimeofday 170 clock_settime 112 adjtimex 171
    clock_adjtime 266 sethostname 161 setdomainname 162 open_by_handle_at 265 name_to_handle_at 264
    memfd_create 279 memfd_secret 447 shmget 194 shmat 196 msgget 186 semget 190 mq_open 180 socket
    198 syslog 116 fanotify_init 262 lookup_dcookie 18 vhangup 58 process_madvise 440
    process_mrelease 448 kill 129 tkill 130 tgkill 131 rt_sigqueueinfo 138 rt_tgsigqueueinfo 240
    pidfd_send_signal 424 pidfd_open 434 setsid 157 setpgid 154 clone 220 clone3 435 execve 221
    execveat 281 fchmod 52 fchmodat 53 fchmodat2 452 fchown 55 fchownat 54 utimensat 88 setxattr 5
    lsetxattr 6 fsetxattr 7 removexattr 14 lremovexattr 15 fremovexattr 16 setxattrat 463
    removexattrat 466 file_setattr 469 prlimit64 261 setpriority 140 sched_setaffinity 122
    sched_setscheduler 119 migrate_pages 238 move_pages 239 ioprio_set 30 inotify_init1 26
"""


def _table(text: str) -> dict[str, int]:
    words = text.split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


_NUMBERS = {"x86_64": _table(_X86_64), "aarch64": _table(_AARCH64)}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# <linux/sched.h>: mount, cgroup, uts, ipc, user, pid and net namespaces
_NEW_NAMESPACE = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
_CLONE_THREAD = 0x10000
# <linux/bpf_common.h>, <linux/seccomp.h>; offsets into struct seccomp_data
_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_PR_SET_SECCOMP = 22


def refuse_system_calls(alone: bool) -> None:
    """Install the filter in this process, for good. `alone`: refuse also what reaches, or makes,
    other processes.

    Raises:
        OSError: the kernel takes no filter, or the machine is neither x86-64 nor 64-bit ARM.
    """
    machine = os.uname().machine
    if machine not in _NUMBERS or sys.byteorder != "little":
        raise OSError(f"seccomp: the system calls of {machine} are not known")
    program = b"".join(_filter(machine, alone))
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    check(libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(head), 0, 0), "seccomp")


def _filter(machine: str, alone: bool) -> list[bytes]:
    numbers = _NUMBERS[machine]
    refuse, allow = _op(_RETURN, _ERRNO | _EPERM), _op(_RETURN, _ALLOW)
    code = [
        _op(_LOAD, _ARCH),
        _op(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
        _op(_AT_LEAST, 0x40000000, 0, 1),  # the other ABI of x86-64, with numbers of its own
        refuse,
        # Its flags are out of a filter's sight: the C library then takes `clone`.
        _op(_EQUAL, numbers["clone3"], 0, 1),
        _op(_RETURN, _ERRNO | _ENOSYS),
    ]
    for name in _DENIED + _DENIED_ALONE * alone:
        if name in numbers:
            code += [_op(_EQUAL, numbers[name], 0, 1), refuse]
    if alone:
        for name in ("kill", "tgkill"):  # itself it may signal
            code += [_op(_EQUAL, numbers[name], 0, 4), _op(_LOAD, _FIRST_ARGUMENT)]
            code += [_op(_EQUAL, os.getpid(), 0, 1), allow, refuse]
    # New threads, not new namespaces; new processes only where they are not `alone`.
    code += [_op(_EQUAL, numbers["clone"], 0, 4 + alone), _op(_LOAD, _FIRST_ARGUMENT)]
    code += [_op(_ANY_OF, _NEW_NAMESPACE, 1, 0)]
    code += [_op(_ANY_OF, _CLONE_THREAD, 1, 0)] * alone
    return [*code, *([allow, refuse] if not alone else [refuse, allow]), allow]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
