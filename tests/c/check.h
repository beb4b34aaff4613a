/* check.h: what the C tests share: checks that name their place and end the program, a seeded generator, and counts of what leaks.
 *
 * A failed check ends the process at once (_exit, so that no destructor hides it): these programs run one scenario each.
 */
#ifndef CHECK_H
#define CHECK_H

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fleece.h"

#define MILLISECOND 1000000ull
#define SECOND 1000000000ull

#ifndef SLOWDOWN
#define SLOWDOWN 1ull           /* how much longer things may take in this flavour of the program; the Makefile says */
#endif

static _Thread_local fl_error why __attribute__((unused));      /* what every checked call of this thread fills on failure */

__attribute__((format(printf, 4, 5), noreturn, unused))
static void check_failed(const char *file, int line, const char *what, const char *format, ...)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    va_list args;
    pthread_mutex_lock(&once);          /* never unlocked: the first failure is the one that is printed */
    fprintf(stderr, "%s:%d: failed: %s:", file, line, what);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(NULL);
    _exit(1);
}

/* CHECK(condition) or CHECK(condition, format, ...): the format says what the values were. */
#define CHECK(condition, ...) do { if (!(condition)) check_failed(__FILE__, __LINE__, #condition, " " __VA_ARGS__); } while (0)

/* EXPECT(wanted, call): the call, which passes &why, returns -wanted; the error that it fills names the same code. */
#define EXPECT(wanted, call) do { \
        memset(&why, 0, sizeof why); \
        int rc_ = (call), want_ = (wanted); \
        if (rc_ != -want_) \
            check_failed(__FILE__, __LINE__, #call, " returned %d (%s: %s), wanted %d (%s)", \
                         rc_, fl_strerror(-rc_), why.text, -want_, fl_strerror(want_)); \
        if (rc_ && why.code != rc_) \
            check_failed(__FILE__, __LINE__, #call, " returned %d, but its error says %d (%s)", rc_, why.code, why.text); \
    } while (0)
#define MUST(call) EXPECT(0, call)

static inline uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static inline void sleep_ns(uint64_t ns)
{
    struct timespec t = { (time_t)(ns / SECOND), (long)(ns % SECOND) };
    while (nanosleep(&t, &t))
        ;
}

/* splitmix64: one uint64_t of state, any seed is good. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 <= result < n */
static inline uint64_t below(uint64_t *state, uint64_t n) { return next_random(state) % n; }
static inline int chance(uint64_t *state, unsigned percent) { return below(state, 100) < percent; }

/* Entries of /proc/self/task or /proc/self/fd (the descriptor of the directory itself is not counted). */
__attribute__((unused)) static int count_entries(const char *directory)
{
    int n = 0;
    DIR *d = opendir(directory);
    CHECK(d, "%s", directory);
    char own[16];
    snprintf(own, sizeof own, "%d", dirfd(d));
    for (struct dirent *e; (e = readdir(d)) != NULL; )
        n += e->d_name[0] != '.' && strcmp(e->d_name, own) != 0;
    closedir(d);
    return n;
}

static inline void *thread_that_ends(void *argument) { return argument; }

/* A sanitizer starts a thread of its own along with the first one. */
__attribute__((unused)) static void start_first_thread(void)
{
    pthread_t first;
    CHECK(pthread_create(&first, NULL, thread_that_ends, NULL) == 0 && pthread_join(first, NULL) == 0, "no thread");
}

/* How many threads there are before a test starts any. One that was joined is in the list for a moment longer. */
__attribute__((unused)) static int tasks_at_start(void)
{
    start_first_thread();
    int least = count_entries("/proc/self/task");
    for (int i = 0; i < 20; i++) {
        sleep_ns(MILLISECOND);
        int now = count_entries("/proc/self/task");
        least = now < least ? now : least;
    }
    return least;
}

/* Threads end by themselves, a little after the close that told them to: wait up to `limit` for the count to come down to `n`. */
__attribute__((unused)) static void check_comes_down(const char *directory, int n, uint64_t limit)
{
    uint64_t deadline = clock_ns() + limit;
    int now;
    while ((now = count_entries(directory)) > n && clock_ns() < deadline)
        sleep_ns(2 * MILLISECOND);
    CHECK(now <= n, "%s has %d entries, %d at the start: something was left behind", directory, now, n);
}

#endif
