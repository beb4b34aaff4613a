/* storage.h: storage that is slow, fails and is watched, below everything: this program's own transfers, fdatasync and fallocate are called by the library in
 * place of the C library's. Include it in one file of a program.
 */
#ifndef STORAGE_H
#define STORAGE_H

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "check.h"

static atomic_uint storage_delays;      /* of 1000 transfers, how many give way to other threads for a while, before or after */
static atomic_uint storage_fails;       /* of 1000 calls, how many fail */
static atomic_int storage_error;        /* with what */
static atomic_bool storage_hangs;       /* writes wait for it to become false: */
static _Thread_local bool storage_hangs_me;     /* only those of this thread do */
static atomic_ullong storage_reads_hang_from = UINT64_MAX;      /* those of such threads, from this offset on, wait for it to become greater */
static atomic_bool storage_cannot_punch, storage_cannot_sync;
static atomic_uint storage_hanging, storage_syncs, storage_punches, storage_failed;

/* Called, if set, before a sync (with SYNC_BEGINS), after it, and after a transfer or a punch that was done. */
enum storage_event { STORAGE_WRITE, STORAGE_PUNCH, STORAGE_SYNC_BEGINS, STORAGE_SYNC };
static void (*storage_watch)(enum storage_event event, const struct iovec *iov, int count, uint64_t offset, uint64_t length);

static uint64_t storage_random(void)
{
    static atomic_ullong next = 1;
    static _Thread_local uint64_t state;
    if (!state)
        state = atomic_fetch_add(&next, 1) * 0x9e3779b97f4a7c15u;
    return next_random(&state);
}

static void storage_delay(void)
{
    unsigned odds = atomic_load_explicit(&storage_delays, memory_order_relaxed);
    if (odds && storage_random() % 1000 < odds) {
        if (storage_random() % 4)
            sched_yield();
        else
            sleep_ns(storage_random() % 300000);
    }
}

static bool storage_refuses(void)
{
    unsigned odds = atomic_load_explicit(&storage_fails, memory_order_relaxed);
    if (!odds || storage_random() % 1000 >= odds)
        return false;
    atomic_fetch_add(&storage_failed, 1);
    errno = atomic_load(&storage_error);
    return true;
}

ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset)
{
    storage_delay();
    if (storage_hangs_me && (uint64_t)offset >= atomic_load(&storage_reads_hang_from)) {
        atomic_fetch_add(&storage_hanging, 1);
        while ((uint64_t)offset >= atomic_load(&storage_reads_hang_from))
            sleep_ns(MILLISECOND);
        atomic_fetch_sub(&storage_hanging, 1);
    }
    if (storage_refuses())
        return -1;
    ssize_t n = syscall(SYS_preadv, fd, iov, (long)count, (long)offset, (long)((uint64_t)offset >> 32));
    storage_delay();
    return n;
}

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
    storage_delay();
    if (atomic_load(&storage_hangs) && storage_hangs_me) {
        atomic_fetch_add(&storage_hanging, 1);
        while (atomic_load(&storage_hangs))
            sleep_ns(MILLISECOND);
        atomic_fetch_sub(&storage_hanging, 1);
    }
    if (storage_refuses())
        return -1;
    ssize_t n = syscall(SYS_pwritev, fd, iov, (long)count, (long)offset, (long)((uint64_t)offset >> 32));
    if (storage_watch && n > 0)
        storage_watch(STORAGE_WRITE, iov, count, (uint64_t)offset, (uint64_t)n);
    storage_delay();
    return n;
}

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    struct iovec iov = { buffer, length };
    return preadv(fd, &iov, 1, offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    struct iovec iov = { (void *)(uintptr_t)buffer, length };
    return pwritev(fd, &iov, 1, offset);
}

int fdatasync(int fd)
{
    if (storage_watch)
        storage_watch(STORAGE_SYNC_BEGINS, NULL, 0, 0, 0);
    storage_delay();
    atomic_fetch_add(&storage_syncs, 1);
    (void)fd;                           /* these tests pull no plugs */
    if (atomic_load(&storage_cannot_sync)) {
        errno = EIO;
        return -1;
    }
    if (storage_refuses())
        return -1;
    if (storage_watch)
        storage_watch(STORAGE_SYNC, NULL, 0, 0, 0);
    return 0;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    storage_delay();
    atomic_fetch_add(&storage_punches, 1);
    if (atomic_load(&storage_cannot_punch)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    if (storage_refuses())
        return -1;
    int rc = (int)syscall(SYS_fallocate, fd, (long)mode, (long)offset, (long)length);
    if (storage_watch && rc == 0)
        storage_watch(STORAGE_PUNCH, NULL, 0, (uint64_t)offset, (uint64_t)length);
    return rc;
}

#endif
