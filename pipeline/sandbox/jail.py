"""What a process that looks at hostile bytes gives up for good: core dumps, files, memory beyond a cap, system calls.

It knows nothing of pictures. Limits hold on any Unix, the filter of system calls on Linux on x86-64 and 64-bit ARM.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import struct
import sys


def confine(memory_mb: int) -> bool:
    """Give up what decoding does not need; True if system calls are filtered as well."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 8),
        (resource.RLIMIT_AS, memory_mb << 20),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    return _filter_system_calls()


# read, write, close, fstat, (p)poll, lseek, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask, rt_sigreturn,
# sched_yield, mremap, madvise, setitimer, getpid, sendto, recvfrom, sendmsg, recvmsg, exit, gettimeofday, getrusage,
# sysinfo, sigaltstack, futex, sched_getaffinity, restart_syscall, clock_gettime, exit_group, getrandom, rseq
_CALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 38, 39, 44, 45, 46, 47, 60, 96, 98,
                            99, 131, 202, 204, 219, 228, 231, 318, 334)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 73, 62, 222, 226, 215, 214, 134, 135, 139, 124, 216, 233, 103, 172, 206,
                             207, 211, 212, 93, 169, 165, 179, 132, 98, 123, 128, 113, 94, 278, 293)),
}  # fmt: skip


def _filter_system_calls() -> bool:
    """Allow only `_CALLS` by seccomp(2), all others fail with EPERM; False where there is no such filter."""
    if not sys.platform.startswith("linux") or platform.machine() not in _CALLS:
        return False
    architecture, allowed = _CALLS[platform.machine()]
    kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(equal, len(allowed) - i, 0, call) for i, call in enumerate(allowed)]
    code += [(give, 0, 0, deny), (give, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in code))
    header = struct.pack("@HP", len(code), ctypes.addressof(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    prctl(no_new_privileges, 1, None, 0, 0)
    return bool(prctl(set_seccomp, mode_filter, header, 0, 0) == 0)
