/* guard.h: memory that is mapped from a file may fail when it is touched: the file was cut off, its storage died, a copying file system is full. The kernel then
 * sends SIGBUS, which would end the process, and with it the guest. A guarded mapping goes on instead: the page that failed becomes a page of zeros that
 * belongs to nobody, and the guard remembers that it did. Whoever stores into the mapping asks guard_failed() afterwards.
 *
 * The library's handler is put in front of the one that is there when the first mapping is guarded; faults elsewhere go to that one.
 */
#ifndef FL_GUARD_H
#define FL_GUARD_H

#include "util/util.h"

struct guard {
    struct guard *next;                 /* fixed: guards are never freed, since a handler may walk the list at any time; they are used again */
    _Atomic uintptr_t begin, end;       /* the mapping; 0, 0: this guard is free */
    atomic_bool failed;
};

/* Guard [memory, memory + length), which is mapped in whole pages. -ENOMEM, -errno. */
int guard_add(void *memory, size_t length, struct guard **guard);
void guard_remove(struct guard *guard);         /* before the mapping goes; NULL: nothing. Nobody may touch the mapping any more */

/* Was a page of it lost? To be asked after a store: what this thread stored before is seen. */
static inline bool guard_failed(const struct guard *guard)
{
    return UNLIKELY(atomic_load_explicit(&guard->failed, memory_order_acquire));
}

#endif
