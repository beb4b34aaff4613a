/* util.h: small things that every layer uses: checked sums, alignment, time, zero detection, and the one way to fail. */
#ifndef FL_UTIL_H
#define FL_UTIL_H

#include <errno.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "../fleece.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CACHE_LINE 64
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

static inline bool is_power_of_two(uint64_t n) { return n && !(n & (n - 1)); }
/* `unit` is a power of two; the caller knows that the sum does not overflow (disk sizes are below 2^63). */
static inline uint64_t align_down(uint64_t n, uint64_t unit) { return n & ~(unit - 1); }
static inline uint64_t align_up(uint64_t n, uint64_t unit) { return (n + unit - 1) & ~(unit - 1); }
static inline uint64_t div_up(uint64_t n, uint64_t d) { return n / d + (n % d != 0); }

/* Is [offset, offset + count) inside [0, size)? Cannot overflow. */
static inline bool in_range(uint64_t count, uint64_t offset, uint64_t size)
{
    return offset <= size && count <= size - offset;
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* a + b that stops at the end of time instead of wrapping (a timeout added to a clock). */
static inline uint64_t add_sat(uint64_t a, uint64_t b) { return a + b < a ? UINT64_MAX : a + b; }

static inline bool is_zero(const void *p, size_t n)
{
    const unsigned char *c = p;
    return n == 0 || (!c[0] && !memcmp(c, c + 1, n - 1));
}

/* A full barrier: orders the stores before it against the loads after it, on every processor, and against the memory accesses that
   the kernel makes for us in the system calls on either side. */
static inline void full_fence(void) { atomic_thread_fence(memory_order_seq_cst); }

/* Fill `error` (if not NULL) and return -code, so that a failure is one line: return fail(error, EIO, side, offset, length, "...", ...);
   code is positive. When errno-like, ": <name>" is not added to the text: the bindings do that. */
int fail(fl_error *error, int code, int side, uint64_t offset, uint64_t length, const char *format, ...)
    __attribute__((format(printf, 6, 7)));

#include <pthread.h>
/* A mutex that is held for less time than it takes to sleep and be woken: who finds it locked spins for a moment first, where the
   C library can (glibc; elsewhere it is the plain sort). */
int mutex_init_spinning(pthread_mutex_t *mutex);
/* CLOCK_MONOTONIC condition variables: all timed waits of the project use these. */
int cond_init(pthread_cond_t *cond);
/* Wait until signalled or until `deadline` (now_ns time). false: it passed. The caller checks its predicate either way. */
bool cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline);

/* The end of this slice of an interruptible wait that may last until `deadline`. */
uint64_t slice_end(uint64_t deadline);
/* True when this thread is the one that takes interrupts and the hook asks to stop. Calls foreign code: hold no lock. */
bool interrupted(void);

/* Start a detached thread with all signals but SIGBUS blocked. 0 or -errno. */
int thread_start(void *(*body)(void *), void *argument, const char *name);

/* Changes at fork in the child: what was made in an earlier generation belongs to the parent. */
extern unsigned fl_generation;

#endif
