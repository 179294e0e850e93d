/* Has ptrace(2) behave as on a processor with AMX, for a test of xstate.c on any other: the extended state is
 * 11,008 bytes, and whoever sets less is refused. Preloaded behind xstate.so, where that finds the kernel.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

#define WIDE 11008

long ptrace(enum __ptrace_request request, ...)
{
    static long (*next)(int, ...);
    va_list more;
    int pid;
    void *address, *data;

    va_start(more, request);
    pid = va_arg(more, int);
    address = va_arg(more, void *);
    data = va_arg(more, void *);
    va_end(more);
    if (!next)
        next = (long (*)(int, ...))dlsym(RTLD_NEXT, "ptrace");
    if ((long)address == NT_X86_XSTATE && request == PTRACE_SETREGSET) {
        if (((struct iovec *)data)->iov_len < WIDE) {
            errno = EFAULT;
            return -1;
        }
    }
    if ((long)address == NT_X86_XSTATE && request == PTRACE_GETREGSET) {
        struct iovec *given = data;
        size_t room = given->iov_len < WIDE ? given->iov_len : WIDE;
        long result = next(request, pid, address, data);

        if (result == 0 && given->iov_len < room) {
            memset((char *)given->iov_base + given->iov_len, 0, room - given->iov_len);
            given->iov_len = room;
        }
        return result;
    }
    return next(request, pid, address, data);
}
