/* Lets a tracer with a fixed buffer save and restore a processor state that is larger than it.
 *
 * User-mode Linux keeps a process' extended state (NT_X86_XSTATE) in 2,696 bytes, which is what processors
 * needed up to AVX-512 and protection keys. Where the host's state is larger (11,008 bytes with AMX), the
 * kernel refuses to set a part of it: "ptrace set fp regs failed, errno = 14". Preloaded, this stands before
 * ptrace(2): it sets all of the state, of which the tracer's buffer is the beginning.
 *
 * What does not fit into that buffer is in its initial state afterwards, and is not lost by it: a guest cannot
 * use it. (A process has to ask for AMX by arch_prctl(2), which user-mode Linux refuses.)
 *
 * The layout is that of XSAVE in its standard form (Intel SDM volume 1, 13.4): at byte 512 a mask of the
 * components that are not in their initial state. Where each lies is asked of the processor (leaf 0Dh).
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

#define HEADER 512
#define HEADER_LENGTH 64
#define LEGACY 3 /* x87 and SSE: before the header */

typedef long ptrace_call(int, ...);

static ptrace_call *next;
static size_t length;
static _Thread_local char *state;

/* The components that lie wholly in the first `room` bytes. */
static uint64_t held_by(size_t room)
{
    static uint64_t held;
    static size_t asked;
    unsigned size, offset, c, d;

    if (asked == room) /* CPUID takes 20 microseconds in a virtual machine */
        return held;
    asked = room;
    held = LEGACY;
    for (unsigned number = 2; number < 63; number++) {
        if (!__get_cpuid_count(0x0d, number, &size, &offset, &c, &d))
            break;
        if (size && offset && offset + (size_t)size <= room)
            held |= 1ULL << number;
    }
    return held;
}

/* Finds out how long the whole state is, and makes room for it: once, for this is done with each switch
 * between processes. The kernel fills what it is given, so a buffer that is not full has everything. */
static int measure(int pid)
{
    for (size_t room = 16384; !length; room *= 2) {
        struct iovec all = {malloc(room), room};
        long got = all.iov_base ? next(PTRACE_GETREGSET, pid, (void *)NT_X86_XSTATE, &all) : -1;

        free(all.iov_base);
        if (got < 0)
            return -1;
        if (all.iov_len < room)
            length = all.iov_len;
    }
    if (!state)
        state = malloc(length);
    return state ? 0 : -1;
}

static long set(int pid, struct iovec *given)
{
    struct iovec all;
    uint64_t mask;

    if (measure(pid) < 0)
        return -1;
    if (given->iov_len >= length || given->iov_len < HEADER + HEADER_LENGTH)
        return next(PTRACE_SETREGSET, pid, (void *)NT_X86_XSTATE, given);
    memset(state, 0, length);
    memcpy(state, given->iov_base, given->iov_len);
    memcpy(&mask, state + HEADER, sizeof mask);
    mask &= held_by(given->iov_len);
    memcpy(state + HEADER, &mask, sizeof mask);
    all.iov_base = state;
    all.iov_len = length;
    return next(PTRACE_SETREGSET, pid, (void *)NT_X86_XSTATE, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list more;
    int pid;
    void *address, *data;

    va_start(more, request);
    pid = va_arg(more, int);
    address = va_arg(more, void *);
    data = va_arg(more, void *);
    va_end(more);
    if (!next)
        next = (ptrace_call *)dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE)
        return set(pid, data);
    return next(request, pid, address, data);
}
