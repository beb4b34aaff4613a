/* io_direct.c: direct transfers (O_DIRECT) for callers who align nothing.
 *
 * The kernel wants offsets, lengths and addresses of direct transfers aligned. Here:
 *   - Whole blocks from aligned memory go straight through; from other memory, through a bounce buffer of bounded size.
 *   - Reads of parts of blocks read the whole blocks into the bounce buffer. At the end of a file that ends inside a block the
 *     kernel returns what there is.
 *   - Writes of parts of blocks go through a second, buffered descriptor of the same file. The page cache reads the rest of the block, and
 *     knows where the file ends; then it is told to write the page out at once, so that later direct transfers meet a clean cache.
 *
 * The page cache alone does not make the last safe. Between its reading of a block and its writing it back, a direct write to the
 * neighbouring bytes would be overwritten with what was there before: an update lost without an error. The kernel looks after the
 * cache before and after each direct write, but promises nothing to the two at once. So `edges` keeps them apart: writers of parts of
 * blocks hold it exclusively until the page is clean, and writers of whole blocks (and what punches or zeroes them) hold it shared.
 * Readers need it not: all the states of the block that they can meet hold every finished write. The lock prefers writers of
 * parts, or a busy guest would starve them.
 *
 * Only this descriptor's writers are kept apart; that nobody else writes the file is what the locks are for.
 */
#define _GNU_SOURCE
#include "io.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define BOUNCE_SIZE (1u << 20)          /* memory that one transfer takes at most */
#define DEFAULT_ALIGNMENT 4096u
#define LARGEST_ALIGNMENT (1u << 16)

/* ---- opening ---- */

/* statx tells the alignments from Linux 6.1 on. The fields are younger than the structure, whose size is fixed: they are read by
   their place, so that this builds with any headers. */
#define WANT_DIOALIGN 0x2000u
#define DIO_MEM_ALIGN_AT 0x98
#define DIO_OFFSET_ALIGN_AT 0x9c

/* 0; -EOPNOTSUPP: it says that it can't be done; -ENOSYS: nothing is said. */
static int ask_statx(int fd, uint32_t *memory, uint32_t *offset)
{
    struct statx st;
    _Static_assert(sizeof st == 256, "struct statx is 256 bytes");
    memset(&st, 0, sizeof st);
    if (statx(fd, "", AT_EMPTY_PATH, WANT_DIOALIGN, &st) < 0 || !(st.stx_mask & WANT_DIOALIGN))
        return -ENOSYS;
    memcpy(memory, (char *)&st + DIO_MEM_ALIGN_AT, sizeof *memory);
    memcpy(offset, (char *)&st + DIO_OFFSET_ALIGN_AT, sizeof *offset);
    if (*memory == 0 || *offset == 0)
        return -EOPNOTSUPP;
    return is_power_of_two(*memory) && is_power_of_two(*offset) && MAX(*memory, *offset) <= LARGEST_ALIGNMENT ? 0 : -ENOSYS;
}

static int find_alignments(struct io *io)
{
    uint32_t memory, offset;
    int rc = ask_statx(io->direct_fd, &memory, &offset);
    if (rc == -EOPNOTSUPP)
        return rc;
    if (rc < 0) {
        offset = io->device ? io->block : MAX(DEFAULT_ALIGNMENT, MIN(io->block, LARGEST_ALIGNMENT));
        memory = MAX(DEFAULT_ALIGNMENT, offset);
    }
    io->alignment = offset;
    io->memory_alignment = memory;
    return 0;
}

/* Open what `fd` has open a second time; `path` serves where there is no /proc. */
static int reopen(int fd, const char *path, int flags)
{
    char link[40];
    struct stat a, b;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = open(link, flags | O_CLOEXEC);
    if (again < 0 && errno == ENOENT)
        again = open(path, flags | O_CLOEXEC);
    if (again < 0)
        return -errno;
    if (fstat(fd, &a) < 0 || fstat(again, &b) < 0 || a.st_dev != b.st_dev || a.st_ino != b.st_ino || a.st_rdev != b.st_rdev) {
        close(again);
        return -ESTALE;                         /* somebody put another file there */
    }
    return again;
}

int io_direct_open(struct io *io, const char *path, fl_error *error)
{
    pthread_rwlockattr_t attributes;
    int fd = reopen(io->fd, path, (io->writable ? O_RDWR : O_RDONLY) | O_DIRECT);
    if (fd >= 0) {
        io->direct_fd = fd;
        int rc = find_alignments(io);
        if (rc == 0 && (rc = -pthread_rwlockattr_init(&attributes)) == 0) {
            pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
            rc = -pthread_rwlock_init(&io->edges, &attributes);
            pthread_rwlockattr_destroy(&attributes);
        }
        if (rc == 0)
            return 0;
        close(fd);
        io->direct_fd = -1;
        fd = rc;
    }
    if (fd == -EINVAL || fd == -EOPNOTSUPP)
        return fail(error, EOPNOTSUPP, FL_SIDE_NONE, 0, 0,
                    "the file system of image '%s' does not support direct I/O: open it without direct", io->name);
    return fail(error, -fd, FL_SIDE_NONE, 0, 0, "cannot open image '%s' for direct I/O", io->name);
}

/* ---- transfers ---- */

/* Can the next `length` bytes go to the kernel as they are? */
static bool memory_is_aligned(const struct io *io, const struct iov_cursor *cursor, size_t length)
{
    struct iov_cursor c = *cursor;
    struct iovec v;
    size_t n;
    for (; length > 0; length -= n) {
        iov_next(&c, length, &v, 1, &n);
        if (((uintptr_t)v.iov_base & (io->memory_alignment - 1)) || (v.iov_len & (io->alignment - 1)))
            return false;
        iov_advance(&c, n);
    }
    return true;
}

/* Copy between memory in one piece and the cursor, which moves on. */
static void copy_out(struct iov_cursor *cursor, const char *from, size_t length)
{
    struct iovec v;
    size_t n;
    for (; length > 0; length -= n, from += n) {
        iov_next(cursor, length, &v, 1, &n);
        memcpy(v.iov_base, from, n);
        iov_advance(cursor, n);
    }
}

static void copy_in(char *to, struct iov_cursor *cursor, size_t length)
{
    struct iovec v;
    size_t n;
    for (; length > 0; length -= n, to += n) {
        iov_next(cursor, length, &v, 1, &n);
        memcpy(to, v.iov_base, n);
        iov_advance(cursor, n);
    }
}

static char *bounce_new(const struct io *io, size_t size)
{
    void *p;
    return posix_memalign(&p, MAX(io->memory_alignment, DEFAULT_ALIGNMENT), size) == 0 ? p : NULL;
}

/* As io_read_all with the direct descriptor, offset and length aligned. A count that is not whole blocks is the file's end; going on from
   there is refused. */
static int direct_read_all(struct io *io, struct iov_cursor *cursor, uint64_t offset, size_t length, size_t *done)
{
    int rc = io_read_all(io->direct_fd, cursor, offset, length, done);
    return rc == -EINVAL && (*done & (io->alignment - 1)) ? 0 : rc;
}

int io_direct_readv(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, size_t *moved, fl_error *error)
{
    const uint64_t align = io->alignment;
    const uint64_t end = offset + length;
    struct iov_cursor cursor = { iov, count, 0 };
    uint64_t at = offset;
    size_t done = 0;
    char *bounce = NULL;
    int rc = 0;

    if (((offset | length) & (align - 1)) == 0 && memory_is_aligned(io, &cursor, length)) {
        rc = direct_read_all(io, &cursor, offset, length, &done);
        at += done;
        goto out;
    }
    size_t size = (size_t)MIN((uint64_t)BOUNCE_SIZE, align_up(end, align) - align_down(offset, align));
    bounce = bounce_new(io, size);
    if (!bounce) {
        rc = -ENOMEM;
        goto out;
    }
    while (at < end) {
        uint64_t start = align_down(at, align);
        size_t want = (size_t)MIN((uint64_t)size, align_up(end, align) - start);
        size_t head = (size_t)(at - start);
        struct iovec v = { bounce, want };
        struct iov_cursor c = { &v, 1, 0 };
        rc = direct_read_all(io, &c, start, want, &done);
        if (rc < 0 || done <= head)
            break;
        size_t got = (size_t)MIN((uint64_t)(done - head), end - at);
        copy_out(&cursor, bounce + head, got);
        at += got;
        if (done < want)
            break;
    }
out:
    free(bounce);
    if (rc < 0)
        return io_fail_read(io, -rc, offset, length, error);
    *moved = (size_t)(at - offset);
    return 0;
}

void io_direct_end(struct io *io)
{
    if (io->direct_fd < 0)
        return;
    close(io->direct_fd);
    pthread_rwlock_destroy(&io->edges);
    io->direct_fd = -1;
    io->alignment = io->memory_alignment = 1;
}

/* Make the page cache write the range out: see above. Not for durability, which is io_flush's. */
static int write_out(struct io *io, uint64_t offset, size_t length)
{
    int rc = sync_file_range(io->fd, (off_t)offset, (off_t)length,
                             SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    if (rc < 0 && (errno == ENOSYS || errno == EINVAL || errno == ESPIPE || errno == EINTR)) {
        do {
            rc = fdatasync(io->fd);
        } while (rc < 0 && errno == EINTR);
    }
    return rc < 0 ? -errno : 0;
}

/* Parts of blocks: through the page cache, alone. */
static int write_part(struct io *io, struct iov_cursor *cursor, uint64_t offset, size_t length)
{
    pthread_rwlock_wrlock(&io->edges);
    int rc = io_write_all(io->fd, cursor, offset, length);
    int rc2 = write_out(io, offset, length);    /* also after a failure: something may have been written */
    pthread_rwlock_unlock(&io->edges);
    return rc < 0 ? rc : rc2;
}

/* Whole blocks. `edges` is not held while a bounce buffer is filled. */
static int write_blocks(struct io *io, struct iov_cursor *cursor, uint64_t offset, size_t length)
{
    char *bounce = NULL;
    size_t size = (size_t)MIN((uint64_t)BOUNCE_SIZE, (uint64_t)length);
    int rc = 0;
    if (memory_is_aligned(io, cursor, length))
        size = length;
    else if (!(bounce = bounce_new(io, size)))
        return -ENOMEM;
    while (rc == 0 && length > 0) {
        size_t n = MIN(size, length);
        struct iovec v = { bounce, n };
        struct iov_cursor c = { &v, 1, 0 };
        if (bounce)
            copy_in(bounce, cursor, n);
        pthread_rwlock_rdlock(&io->edges);
        rc = io_write_all(io->direct_fd, bounce ? &c : cursor, offset, n);
        pthread_rwlock_unlock(&io->edges);
        offset += n;
        length -= n;
    }
    free(bounce);
    return rc;
}

int io_direct_writev(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error)
{
    const uint64_t align = io->alignment;
    const uint64_t end = offset + length;
    const uint64_t first = MIN(align_up(offset, align), end);           /* [first, last): whole blocks */
    const uint64_t last = MAX(align_down(end, align), first);
    struct iov_cursor cursor = { iov, count, 0 };
    int rc = 0;
    if (offset < first)
        rc = write_part(io, &cursor, offset, (size_t)(first - offset));
    if (rc == 0 && first < last)
        rc = write_blocks(io, &cursor, first, (size_t)(last - first));
    if (rc == 0 && last < end)
        rc = write_part(io, &cursor, last, (size_t)(end - last));
    return rc < 0 ? io_fail_write(io, -rc, offset, length, error) : 0;
}
