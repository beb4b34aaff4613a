/* io.c: opening files and block devices, and transfers that are all or nothing. See io.h. */
#define _GNU_SOURCE
#include "io.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE_LIMIT ((uint64_t)INT64_MAX)

/* ---- vectors ---- */

int iov_next(const struct iov_cursor *cursor, size_t limit, struct iovec *out, int max, size_t *bytes)
{
    size_t skip = cursor->skip, sum = 0;
    int used = 0;
    for (int i = 0; i < cursor->count && used < max && sum < limit; i++, skip = 0) {
        size_t length = MIN(cursor->iov[i].iov_len - skip, limit - sum);
        if (length == 0)
            continue;
        out[used].iov_base = (char *)cursor->iov[i].iov_base + skip;
        out[used++].iov_len = length;
        sum += length;
    }
    *bytes = sum;
    return used;
}

void iov_advance(struct iov_cursor *cursor, size_t bytes)
{
    while (bytes > 0 && bytes >= cursor->iov->iov_len - cursor->skip) {
        bytes -= cursor->iov->iov_len - cursor->skip;
        cursor->iov++;
        cursor->count--;
        cursor->skip = 0;
    }
    cursor->skip += bytes;
}

/* ---- transfers ---- */

/* One system call's worth of a vector. One that fits is passed as it is; one that was entered in the middle, has more bytes than are wanted, or
   begins with nothing but empty entries, is copied in part. Returns what moved; -1: see errno. */
static ssize_t transfer_vector(bool write, int fd, const struct iov_cursor *cursor, uint64_t offset, size_t length)
{
    struct iovec copy[64];
    const struct iovec *iov = cursor->iov;
    int count = MIN(cursor->count, IOV_MAX);
    size_t sum = 0;
    for (int i = 0; i < count && sum <= length; i++)
        sum += iov[i].iov_len;
    if (cursor->skip || sum > length || sum == 0) {
        count = iov_next(cursor, length, copy, 64, &sum);
        iov = copy;
    }
    return write ? pwritev(fd, iov, count, (off_t)offset) : preadv(fd, iov, count, (off_t)offset);
}

/* One system call's worth, or -errno. Nearly all transfers are of one buffer, and to a small one each call and each line of code on the way shows: the
   kernel's own share of a write is all that comes between two uses of it. */
static inline ssize_t transfer_some(bool write, int fd, const struct iov_cursor *cursor, uint64_t offset, size_t length)
{
    ssize_t n;
    do {
        if (LIKELY(cursor->count == 1)) {
            char *from = (char *)cursor->iov->iov_base + cursor->skip;
            n = write ? pwrite(fd, from, length, (off_t)offset) : pread(fd, from, length, (off_t)offset);
        } else {
            n = transfer_vector(write, fd, cursor, offset, length);
        }
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

int io_read_all(int fd, struct iov_cursor *cursor, uint64_t offset, size_t length, size_t *done)
{
    *done = 0;
    while (*done < length) {
        ssize_t n = transfer_some(false, fd, cursor, offset + *done, length - *done);
        if (n < 0)
            return (int)n;
        if (n == 0)
            break;
        iov_advance(cursor, (size_t)n);
        *done += (size_t)n;
    }
    return 0;
}

int io_write_all(int fd, struct iov_cursor *cursor, uint64_t offset, size_t length)
{
    size_t done = 0;
    while (done < length) {
        ssize_t n = transfer_some(true, fd, cursor, offset + done, length - done);
        if (n < 0)
            return (int)n;
        if (n == 0)
            return -EIO;                        /* no error and no progress: not again and again */
        iov_advance(cursor, (size_t)n);
        done += (size_t)n;
    }
    return 0;
}

int io_fail_read(struct io *io, int code, uint64_t offset, size_t length, fl_error *error)
{
    return fail(error, code, FL_SIDE_NONE, offset, length, "cannot read %zu bytes at %llu of image '%s'",
                length, (unsigned long long)offset, io->name);
}

int io_fail_write(struct io *io, int code, uint64_t offset, size_t length, fl_error *error)
{
    return fail(error, code, FL_SIDE_NONE, offset, length, "cannot write %zu bytes at %llu of image '%s'",
                length, (unsigned long long)offset, io->name);
}

int io_fail_truncated(struct io *io, uint64_t end, uint64_t offset, uint64_t length, fl_error *error)
{
    struct stat st;
    uint64_t known = atomic_load(&io->ends_at);
    /* A read that began behind the end knows only that; and once somebody has made the file longer, nobody can tell any more where it ended. */
    if (!io->device && fstat(io->fd, &st) == 0)
        end = MIN(end, (uint64_t)st.st_size);
    while (end < known && !atomic_compare_exchange_weak(&io->ends_at, &known, end))
        ;
    return fail(error, FL_ETRUNCATED, FL_SIDE_NONE, offset, length, "image '%s' ended at %llu, %llu expected: was it truncated?",
                io->name, (unsigned long long)end, (unsigned long long)io->size);
}

/* The bytes that came, by way of *done: fewer than `length` when the file ends before. */
static int read_through_cache(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, size_t *done,
                              fl_error *error)
{
    struct iov_cursor cursor = { iov, count, 0 };
    int rc = io_read_all(io->fd, &cursor, offset, length, done);
    return rc < 0 ? io_fail_read(io, -rc, offset, length, error) : 0;
}

int io_readv(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    size_t done;
    int rc = io->direct_fd >= 0 ? io_direct_readv(io, iov, count, offset, length, &done, error) :
                                  read_through_cache(io, iov, count, offset, length, &done, error);
    if (rc == 0 && done < length)
        return io_fail_truncated(io, offset + done, offset, length, error);
    return rc;
}

static void zero_rest(const struct iovec *iov, int count, size_t done, size_t length)
{
    struct iov_cursor cursor = { iov, count, 0 };
    struct iovec v;
    size_t n;
    iov_advance(&cursor, done);
    for (; done < length; done += n) {
        iov_next(&cursor, length - done, &v, 1, &n);
        memset(v.iov_base, 0, n);
        iov_advance(&cursor, n);
    }
}

int io_read_padded(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    uint64_t reached = atomic_load_explicit(&io->reached, memory_order_relaxed);       /* before the read: others make the file longer */
    size_t done;
    int rc = io->direct_fd >= 0 ? io_direct_readv(io, iov, count, offset, length, &done, error) :
                                  read_through_cache(io, iov, count, offset, length, &done, error);
    if (rc == 0 && done < length) {
        if (UNLIKELY(offset + done < reached))
            return io_fail_truncated(io, offset + done, offset, length, error);
        zero_rest(iov, count, done, length);
    }
    return rc;
}

void io_reaches(struct io *io, uint64_t end)
{
    uint64_t reached = atomic_load_explicit(&io->reached, memory_order_relaxed);
    while (end > reached && !atomic_compare_exchange_weak(&io->reached, &reached, end))
        ;
}

int io_read_metadata(struct io *io, void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    struct iovec v = { buffer, length };
    size_t done;
    int rc = read_through_cache(io, &v, 1, offset, length, &done, error);
    if (rc == 0 && done < length)
        memset((char *)buffer + done, 0, length - done);
    return rc;
}

int io_write_metadata(struct io *io, const void *buffer, size_t length, uint64_t offset, fl_error *error)
{
    struct iovec v = { (void *)(uintptr_t)buffer, length };
    return io_writev_metadata(io, &v, 1, offset, length, error);
}

int io_writev_metadata(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    struct iov_cursor cursor = { iov, count, 0 };
    int rc = io_write_all(io->fd, &cursor, offset, length);
    return rc < 0 ? io_fail_write(io, -rc, offset, length, error) : 0;
}

int io_writev(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    if (io->direct_fd >= 0)
        return io_direct_writev(io, iov, count, offset, length, error);
    struct iov_cursor cursor = { iov, count, 0 };
    int rc = io_write_all(io->fd, &cursor, offset, length);
    return rc < 0 ? io_fail_write(io, -rc, offset, length, error) : 0;
}

/* A flush that fails loses what was buffered, and the kernel tells so only once: the next flush would succeed and mean nothing. So the
   failure is kept. Direct writes have no such debt. */
int io_flush(struct io *io, fl_error *error)
{
    int code = atomic_load(&io->flush_error);
    if (code == 0) {
        int rc;
        do {
            rc = fdatasync(io->fd);
        } while (rc < 0 && errno == EINTR);
        if (rc == 0)
            return 0;
        code = errno;
        if (io->direct_fd < 0)
            atomic_store(&io->flush_error, code);
        return fail(error, code, FL_SIDE_NONE, 0, 0, "cannot flush image '%s'", io->name);
    }
    return fail(error, code, FL_SIDE_NONE, 0, 0, "an earlier flush of image '%s' failed: writes may be lost", io->name);
}

/* ---- opening ---- */

static void reset(struct io *io, const char *name, bool writable)
{
    memset(io, 0, sizeof *io);
    atomic_init(&io->ends_at, UINT64_MAX);
    io->fd = io->direct_fd = -1;
    io->writable = writable;
    io->alignment = io->memory_alignment = 1;
    io->generation = fl_generation;
    io->name = name;
}

static const char *kind_name(mode_t mode)
{
    return S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a pipe" : S_ISCHR(mode) ? "a character device" :
           S_ISSOCK(mode) ? "a socket" : "of an unknown kind";
}

/* What may be opened at all. Asked before opening, as opening can have effects (and wait), and again of what was opened. */
static int check_kind(const struct io *io, mode_t mode, fl_error *error)
{
    if (S_ISREG(mode) || S_ISBLK(mode))
        return 0;
    return fail(error, S_ISDIR(mode) ? EISDIR : EINVAL, FL_SIDE_NONE, 0, 0,
                "'%s' is %s, and an image is a regular file or a block device", io->name, kind_name(mode));
}

/* Kernels differ: some refuse to open a read-only device for writing, with one of several codes, others let the writes fail. */
static bool device_is_read_only(int fd)
{
    int read_only = 0;
    return ioctl(fd, BLKROGET, &read_only) == 0 && read_only;
}

static int fail_open(struct io *io, int code, const char *path, mode_t mode, fl_error *error)
{
    if (io->writable && S_ISBLK(mode)) {
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd >= 0) {
            if (device_is_read_only(fd))
                code = EROFS;
            close(fd);
        }
    }
    if (code == EROFS)
        return fail(error, code, FL_SIDE_NONE, 0, 0, "image '%s' is read-only and cannot be opened for writing", io->name);
    return fail(error, code, FL_SIDE_NONE, 0, 0, "cannot open image '%s' for %s", io->name, io->writable ? "writing" : "reading");
}

/* Size and block of what is open. */
static int measure(struct io *io, fl_error *error)
{
    struct stat st;
    uint64_t size, block;
    if (fstat(io->fd, &st) < 0)
        return fail(error, errno, FL_SIDE_NONE, 0, 0, "cannot look at image '%s'", io->name);
    io->device = S_ISBLK(st.st_mode);
    if (io->device) {
        int sector = 0;
        if (ioctl(io->fd, BLKGETSIZE64, &size) < 0 || ioctl(io->fd, BLKSSZGET, &sector) < 0)
            return fail(error, errno, FL_SIDE_NONE, 0, 0, "cannot get the size of block device '%s'", io->name);
        block = (uint64_t)sector;
        if (is_power_of_two(block))
            size = align_down(size, block);     /* a loop device may end inside a sector, which then nobody can read or write */
    } else {
        size = (uint64_t)st.st_size;
        block = (uint64_t)st.st_blksize;
    }
    if (size > SIZE_LIMIT)
        return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "image '%s' is larger than 2^63 - 1 bytes", io->name);
    io->size = size;
    atomic_store(&io->reached, io->device ? 0 : size);
    io->block = is_power_of_two(block) && block >= 512 && block <= UINT32_MAX ? (uint32_t)block : 4096;
    return 0;
}

/* The rest of opening, once fd is open. */
static int set_up(struct io *io, const char *path, bool direct, bool share, fl_error *error)
{
    int rc = measure(io, error);
    if (rc == 0 && io->device && io->writable && device_is_read_only(io->fd))
        rc = fail(error, EROFS, FL_SIDE_NONE, 0, 0, "block device '%s' is read-only and cannot be opened for writing", io->name);
    if (rc == 0 && !share)
        rc = io_lock(io, error);
    if (rc == 0 && direct)
        rc = io_direct_open(io, path, error);
    return rc;
}

int io_open(struct io *io, const char *path, const char *name, bool writable, bool direct, bool share, fl_error *error)
{
    struct stat st = { 0 };
    int rc;
    reset(io, name, writable);
    if (stat(path, &st) < 0)
        return fail_open(io, errno, path, 0, error);
    if ((rc = check_kind(io, st.st_mode, error)) < 0)
        return rc;
    /* not to hang, should it have become a pipe since */
    io->fd = open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (io->fd < 0)
        return fail_open(io, errno, path, st.st_mode, error);
    if (fstat(io->fd, &st) < 0)
        rc = fail_open(io, errno, path, 0, error);
    else
        rc = check_kind(io, st.st_mode, error);
    if (rc == 0) {
        fcntl(io->fd, F_SETFL, fcntl(io->fd, F_GETFL) & ~O_NONBLOCK);
        rc = set_up(io, path, direct, share, error);
    }
    if (rc < 0)
        io_close(io);
    return rc;
}

/* Refuse sizes that no file has before anything is made. */
static int check_new_size(const struct io *io, uint64_t size, fl_error *error)
{
    if (size <= SIZE_LIMIT)
        return 0;
    return fail(error, EFBIG, FL_SIDE_NONE, 0, 0, "cannot make image '%s' of %llu bytes: 2^63 - 1 is the most",
                io->name, (unsigned long long)size);
}

static int set_size(struct io *io, uint64_t size, fl_error *error)
{
    int rc;
    do {
        rc = ftruncate(io->fd, (off_t)size);
    } while (rc < 0 && errno == EINTR);
    if (rc == 0)
        return 0;
    return fail(error, errno, FL_SIDE_NONE, 0, 0, "cannot make image '%s' %llu bytes large", io->name, (unsigned long long)size);
}

uint64_t io_length(struct io *io)
{
    struct stat st;
    return io->device || fstat(io->fd, &st) < 0 ? io->size : (uint64_t)st.st_size;
}

int io_set_length(struct io *io, uint64_t length, fl_error *error)
{
    if (!io->device)
        return length > SIZE_LIMIT ? check_new_size(io, length, error) : set_size(io, length, error);
    if (length <= io->size)
        return 0;
    return fail(error, ENOSPC, FL_SIDE_NONE, 0, 0, "block device '%s' has %llu bytes, %llu are needed", io->name,
                (unsigned long long)io->size, (unsigned long long)length);
}

/* Is `path` still the file that is open? */
static bool names(const char *path, int fd)
{
    struct stat a, b;
    return stat(path, &a) == 0 && fstat(fd, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

int io_create(struct io *io, const char *path, const char *name, uint64_t size, bool direct, bool share, fl_error *error)
{
    reset(io, name, true);
    int rc = check_new_size(io, size, error);
    if (rc < 0)
        return rc;
    /* without O_DIRECT: a file system that does not know it makes the file and then fails to open it */
    io->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (io->fd < 0)
        return fail(error, errno, FL_SIDE_NONE, 0, 0, "cannot create image '%s'", name);
    rc = set_size(io, size, error);
    if (rc == 0)
        rc = set_up(io, path, direct, share, error);
    if (rc < 0) {
        if (names(path, io->fd))
            unlink(path);
        io_close(io);
    }
    return rc;
}

int io_create_nameless(struct io *io, const char *directory, const char *name, uint64_t size, fl_error *error)
{
    reset(io, name, true);
    int rc = check_new_size(io, size, error);
    if (rc < 0)
        return rc;
    io->fd = open(directory, O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);    /* O_EXCL: it can't be given a name later */
    if (io->fd < 0) {
        int code = errno;
        struct stat st;
        /* kernels and file systems that do not know O_TMPFILE take it for an attempt to write to a directory */
        if (code == EOPNOTSUPP || (code == EISDIR && stat(directory, &st) == 0 && S_ISDIR(st.st_mode)))
            return fail(error, EOPNOTSUPP, FL_SIDE_NONE, 0, 0,
                        "the file system of directory '%.200s' cannot have nameless files (O_TMPFILE): "
                        "choose another directory, or give a path", directory);
        return fail(error, code, FL_SIDE_NONE, 0, 0, "cannot create a nameless image in directory '%.200s'", directory);
    }
    rc = set_size(io, size, error);
    if (rc == 0)
        rc = set_up(io, NULL, false, true, error);
    if (rc < 0)
        io_close(io);
    return rc;
}

void io_close(struct io *io)
{
    bool mine = io->generation == fl_generation;
    if (io->fd < 0)
        return;
    if (io->locked && mine)
        io_unlock(io);
    if (io->direct_fd >= 0) {
        close(io->direct_fd);
        if (mine)
            pthread_rwlock_destroy(&io->edges);
    }
    close(io->fd);
    io->fd = io->direct_fd = -1;
}
