/* util.c: failing, waiting, threads, and noticing a fork. */
#define _GNU_SOURCE
#include "util.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>

unsigned fl_generation;

static int (*interrupt_hook)(void);
static unsigned long interrupt_thread;

static void in_child(void)
{
    fl_generation++;
    interrupt_hook = NULL;
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

void fl_set_interrupt(int (*hook)(void), unsigned long thread)
{
    interrupt_hook = hook;
    interrupt_thread = thread;
}

#define SLICE_NS 50000000u

uint64_t slice_end(uint64_t deadline)
{
    return MIN(deadline, add_sat(now_ns(), SLICE_NS));
}

bool interrupted(void)
{
    return interrupt_hook && interrupt_thread == (unsigned long)pthread_self() && interrupt_hook() != 0;
}

int fail(fl_error *error, int code, int side, uint64_t offset, uint64_t length, const char *format, ...)
{
    if (error) {
        va_list args;
        error->code = -code;
        error->cause = code;
        error->side = side;
        error->offset = offset;
        error->length = length;
        va_start(args, format);
        vsnprintf(error->text, sizeof error->text, format, args);
        va_end(args);
    }
    return -code;
}

int mutex_init_spinning(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t attr;
    int rc = pthread_mutexattr_init(&attr);
    if (rc)
        return -rc;
#ifdef __GLIBC__
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
#endif
    rc = pthread_mutex_init(mutex, &attr);
    pthread_mutexattr_destroy(&attr);
    return -rc;
}

int cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;
    int rc = pthread_condattr_init(&attr);
    if (rc)
        return -rc;
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    rc = pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
    return -rc;
}

bool cond_wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline)
{
    struct timespec t = { .tv_sec = (time_t)(deadline / 1000000000u), .tv_nsec = (long)(deadline % 1000000000u) };
    return pthread_cond_timedwait(cond, mutex, &t) != ETIMEDOUT;
}

int thread_start(void *(*body)(void *), void *argument, const char *name)
{
    pthread_t thread;
    sigset_t all, old;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);    /* a thread that may mark a dirty bitmap in its file: see guard.c; a blocked one would end the process */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        return -rc;
    pthread_setname_np(thread, name);
    pthread_detach(thread);
    return 0;
}

static const char *const own_names[] = {
    "snapshot broken", "already discarded", "lost", "outside the dirty bitmap", "beyond the end", "closed",
    "belongs to the parent process", "in use", "bad format", "truncated", "cancelled", "interrupted", "no more chunks", "still running", "inconsistent dirty bitmap",
};

const char *fl_strerror(int code)
{
    int positive = code < 0 ? -code : code;
    if (positive >= FL_EBROKEN && positive <= FL_EINCONSISTENT)
        return own_names[positive - FL_EBROKEN];
    const char *name = strerrordesc_np(positive);
    return name ? name : "unknown error";
}
