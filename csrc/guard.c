/* guard.c: see guard.h. What the handler does is safe in a signal handler: atomic loads, system calls, and nothing that takes a lock. */
#define _GNU_SOURCE
#include "guard.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;        /* protects which guards are free, and `before` */
static _Atomic(struct guard *) guards;
static struct sigaction before;         /* the handler that was there when ours was put in front */
static uintptr_t page_size;

/* This thread is in the handler that was there before, which may in turn call the one that it found: ours. Initial-exec: a handler must not allocate. */
static _Thread_local __attribute__((tls_model("initial-exec"))) bool passing_on;

/* The fault at `address` was in a guarded mapping, and its page can be used from now on. */
static bool replace_page(uintptr_t address)
{
    for (struct guard *guard = atomic_load(&guards); guard; guard = guard->next) {
        if (address < atomic_load(&guard->begin) || address >= atomic_load(&guard->end))
            continue;
        atomic_store(&guard->failed, true);     /* first: whoever stores into the new page finds it set */
        void *page = (void *)(address & ~(page_size - 1));
        return mmap(page, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page;
    }
    return false;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    int saved = errno;
    bool ours = info->si_code > 0 && replace_page((uintptr_t)info->si_addr);
    errno = saved;
    if (ours)
        return;
    bool function = before.sa_flags & SA_SIGINFO || (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN);
    if (function && !passing_on) {
        passing_on = true;
        if (before.sa_flags & SA_SIGINFO)
            before.sa_sigaction(signal_number, info, context);
        else
            before.sa_handler(signal_number);
        passing_on = false;
        return;
    }
    signal(SIGBUS, SIG_DFL);    /* back at the instruction that failed, it happens again, and ends the process as if we were not there */
    if (info->si_code <= 0)
        raise(SIGBUS);          /* sent by a process: it does not come again by itself */
}

/* Under the lock. Also when somebody replaced ours since. */
static int install(void)
{
    struct sigaction now, ours = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
    if (sigaction(SIGBUS, NULL, &now))
        return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigbus)
        return 0;
    page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    before = now;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

int guard_add(void *memory, size_t length, struct guard **out)
{
    pthread_mutex_lock(&lock);
    int rc = install();
    struct guard *guard = atomic_load(&guards);
    while (rc == 0 && guard && atomic_load(&guard->end))
        guard = guard->next;
    if (rc == 0 && !guard) {
        guard = calloc(1, sizeof *guard);
        if (guard) {
            guard->next = atomic_load(&guards);
            atomic_store(&guards, guard);
        } else {
            rc = -ENOMEM;
        }
    }
    if (rc == 0) {
        atomic_store(&guard->failed, false);
        atomic_store(&guard->begin, (uintptr_t)memory);
        atomic_store(&guard->end, (uintptr_t)memory + length);
        *out = guard;
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

void guard_remove(struct guard *guard)
{
    if (!guard)
        return;
    pthread_mutex_lock(&lock);
    atomic_store(&guard->begin, 0);
    atomic_store(&guard->end, 0);
    pthread_mutex_unlock(&lock);
}
