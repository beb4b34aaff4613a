/* io_space.c: zeros, discards, and where the data is: what concerns an image's space rather than its bytes. */
#define _GNU_SOURCE
#include "io.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define ZERO_BLOCK (64u << 10)
#define ZERO_BLOCKS 64
#define ZERO_PIECE ((uint64_t)ZERO_BLOCK * ZERO_BLOCKS)

/* Never written to: it costs no memory but the page of zeros that all processes share. */
static char zeros[ZERO_BLOCK] __attribute__((aligned(4096)));

static int write_zeros(struct io *io, uint64_t count, uint64_t offset, fl_error *error)
{
    struct iovec iov[ZERO_BLOCKS];
    int rc = 0;
    while (rc == 0 && count > 0) {
        /* pieces that end on a boundary, so that a direct image has one unaligned edge and not one for each piece */
        uint64_t piece = MIN(count, ZERO_PIECE - (offset & (ZERO_BLOCK - 1)));
        uint64_t left = piece;
        int used = 0;
        while (left > 0) {
            size_t n = (size_t)MIN(left, (uint64_t)ZERO_BLOCK - (used == 0 ? offset & (ZERO_BLOCK - 1) : 0));
            iov[used++] = (struct iovec){ zeros, n };
            left -= n;
        }
        rc = io_writev(io, iov, used, offset, (size_t)piece, error);
        count -= piece;
        offset += piece;
    }
    return rc;
}

/* Does this errno mean that the storage can't do such a thing, now or ever? */
static bool unsupported(int code)
{
    return code == EOPNOTSUPP || code == ENOSYS || code == ENOTTY || code == ENODEV;
}

/* fallocate or the ioctl for whole units, retried. `never`: where to remember that it is not known here. 1: not done, try something
   else; EINVAL and EFBIG (beyond the largest file) are that for this range only. */
static int attempt(struct io *io, int mode, unsigned long request, atomic_bool *never, uint64_t count, uint64_t offset)
{
    uint64_t range[2] = { offset, count };
    int rc;
    if (atomic_load_explicit(never, memory_order_relaxed))
        return 1;
    atomic_store_explicit(&io->data_to, 0, memory_order_relaxed);      /* there may be a hole now */
    if (io->direct_fd >= 0)                     /* not beside a write to a part of a block: see io_direct.c */
        pthread_rwlock_rdlock(&io->edges);
    do {
        rc = request ? ioctl(io->fd, request, range) : fallocate(io->fd, mode, (off_t)offset, (off_t)count);
        rc = rc < 0 ? -errno : 0;
    } while (rc == -EINTR);
    if (io->direct_fd >= 0)
        pthread_rwlock_unlock(&io->edges);
    if (rc < 0 && unsupported(-rc)) {
        atomic_store_explicit(never, true, memory_order_relaxed);
        return 1;
    }
    return rc == -EINVAL || rc == -EFBIG ? 1 : rc;
}

/* Whole units, without writing them. 1: not done. */
static int zero_units(struct io *io, uint64_t count, uint64_t offset)
{
    if (io->device)
        return attempt(io, 0, BLKZEROOUT, &io->no_zeroout, count, offset);
    int rc = attempt(io, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, &io->no_punch, count, offset);
    return rc == 1 ? attempt(io, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, &io->no_zero_range, count, offset) : rc;
}

static int discard_units(struct io *io, uint64_t count, uint64_t offset)
{
    if (io->device)
        return attempt(io, 0, BLKDISCARD, &io->no_discard, count, offset);
    return attempt(io, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, &io->no_punch, count, offset);
}

/* In what units the two above may be used. A file system zeroes parts of pages in the page cache, which a direct image keeps clean. */
static uint64_t space_unit(const struct io *io)
{
    if (io->device)
        return io->block;
    return io->direct_fd < 0 ? 1 : MAX(io->alignment, 4096u);
}

/* Is `end` where the file ends? Not so when somebody made it longer since it was opened. */
static bool is_end_of_file(const struct io *io, uint64_t end)
{
    struct stat st;
    return !io->device && end == io->size && fstat(io->fd, &st) == 0 && (uint64_t)st.st_size <= io->size;
}

/* The whole units in a range; start == end: none. A file's last block is freed only when it is punched as a whole, so a range that
   reaches the file's end goes on to the end of that block: *end can be beyond the range. */
static void whole_units(const struct io *io, uint64_t count, uint64_t offset, uint64_t *start, uint64_t *end)
{
    uint64_t unit = space_unit(io);
    *start = align_up(offset, unit);
    *end = align_down(offset + count, unit);
    if (((offset + count) & (io->block - 1)) && is_end_of_file(io, offset + count))
        *end = align_up(offset + count, MAX(unit, io->block));
    if (*start >= *end)
        *start = *end = offset;
}

/* What whole_units left of the range on both sides. */
static int write_zero_edges(struct io *io, uint64_t count, uint64_t offset, uint64_t start, uint64_t end, fl_error *error)
{
    int rc = write_zeros(io, start - offset, offset, error);
    return rc == 0 && end < offset + count ? write_zeros(io, offset + count - end, end, error) : rc;
}

int io_zero(struct io *io, uint64_t count, uint64_t offset, fl_error *error)
{
    uint64_t start, end;
    int rc = 1;
    whole_units(io, count, offset, &start, &end);
    if (start < end)
        rc = zero_units(io, end - start, start);
    if (rc == 1)
        return write_zeros(io, count, offset, error);
    if (rc < 0)
        return fail(error, -rc, FL_SIDE_NONE, offset, count, "cannot zero %llu bytes at %llu of image '%s'",
                    (unsigned long long)count, (unsigned long long)offset, io->name);
    return write_zero_edges(io, count, offset, start, end, error);
}

int io_discard(struct io *io, uint64_t count, uint64_t offset, fl_error *error)
{
    uint64_t start, end;
    int rc = 0;
    whole_units(io, count, offset, &start, &end);
    if (start < end)
        rc = discard_units(io, end - start, start);
    if (rc < 0)
        return fail(error, -rc, FL_SIDE_NONE, offset, count, "cannot discard %llu bytes at %llu of image '%s'",
                    (unsigned long long)count, (unsigned long long)offset, io->name);
    if (io->device || (rc == 1 && !io_punches(io)))
        return 0;
    /* as long as io_punches is true, the range reads as zeros: the edges too, and what could not be punched for once */
    return rc == 1 ? write_zeros(io, count, offset, error) : write_zero_edges(io, count, offset, start, end, error);
}

bool io_punch(struct io *io, uint64_t count, uint64_t offset)
{
    uint64_t unit = space_unit(io), start = align_up(offset, unit), end = align_down(offset + count, unit);
    return start < end && discard_units(io, end - start, start) == 0;
}

bool io_punches(struct io *io)
{
    return !io->device && !atomic_load_explicit(&io->no_punch, memory_order_relaxed);
}

uint64_t io_allocated(struct io *io)
{
    struct stat st;
    if (io->device || fstat(io->fd, &st) < 0)
        return io->size;
    return (uint64_t)st.st_blocks * 512;
}

/* ext4 looks for the place of a buffered write page by page. Where it has a range's place already, the write takes a quarter less time, and flushing it no more.
   XFS gains nothing, btrfs would no longer compress, and tmpfs would fill the memory with zeros. */
bool io_reserve(struct io *io, uint64_t count, uint64_t offset)
{
    int reserves = atomic_load_explicit(&io->reserves, memory_order_relaxed);
    if (!reserves) {            /* once: where the file is on a server, that is asked */
        struct statfs fs;
        reserves = !io->device && io->direct_fd < 0 && fstatfs(io->fd, &fs) == 0 && fs.f_type == EXT4_SUPER_MAGIC ? 1 : -1;
        atomic_store_explicit(&io->reserves, reserves, memory_order_relaxed);
    }
    return reserves > 0 && fallocate(io->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)count) == 0;
}

/* ---- extents ---- */

/* The extent at `at`, of which *end is the end: enum fl_kind or -code. `data_here`: a hole was just found to end there. */
static int extent_at(struct io *io, uint64_t at, uint64_t limit, bool data_here, uint64_t *end, fl_error *error)
{
    *end = limit;
    if (io->device)
        return FL_DATA;
    off_t data = data_here ? (off_t)at : lseek(io->fd, (off_t)at, SEEK_DATA);
    if (data < 0 && errno == ENXIO) {
        /* no data up to the file's end: a hole, unless the end is not where it was */
        struct stat st;
        if (fstat(io->fd, &st) < 0)
            return fail(error, errno, FL_SIDE_NONE, at, limit - at, "cannot look at image '%s'", io->name);
        if ((uint64_t)st.st_size < limit)
            return io_fail_truncated(io, (uint64_t)st.st_size, at, limit - at, error);
        return FL_ZERO;
    }
    if (data < 0 && errno != EINVAL && !unsupported(errno))
        return fail(error, errno, FL_SIDE_NONE, at, limit - at, "cannot find the data from %llu on in image '%s'",
                    (unsigned long long)at, io->name);
    if (data < 0 || (uint64_t)data < at)
        return FL_DATA;                         /* not known here: anything may be there */
    if ((uint64_t)data > at) {
        *end = MIN((uint64_t)data, limit);
        return FL_ZERO;
    }
    uint64_t known = atomic_load_explicit(&io->data_to, memory_order_relaxed);
    if (at >= atomic_load_explicit(&io->data_from, memory_order_relaxed) && at < known && !data_here) {
        *end = MIN(known, limit);
        return FL_DATA;
    }
    off_t hole = lseek(io->fd, (off_t)at, SEEK_HOLE);
    if (hole <= data && data_here)
        return extent_at(io, at, limit, false, end, error);     /* it was changed meanwhile */
    if (hole > data) {                          /* else it was changed meanwhile: all data is never wrong */
        *end = MIN((uint64_t)hole, limit);
        if ((uint64_t)hole > limit) {           /* whoever asks in small steps would make the kernel look for the same end again and again */
            atomic_store_explicit(&io->data_from, at, memory_order_relaxed);
            atomic_store_explicit(&io->data_to, (uint64_t)hole, memory_order_relaxed);
        }
    }
    return FL_DATA;
}

/* One look, and none for the end of the data: finding that takes some file systems as long as there is data, tmpfs looks at each page. */
uint64_t io_next_data(struct io *io, uint64_t offset, uint64_t end)
{
    struct stat st;
    if (io->device)
        return offset;
    off_t data = lseek(io->fd, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno == ENXIO && fstat(io->fd, &st) == 0 && (uint64_t)st.st_size >= end)
        return end;
    return data > (off_t)offset ? MIN((uint64_t)data, end) : offset;
}

int io_extents(struct io *io, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    const uint64_t limit = offset + length;
    uint64_t at = offset, end;
    size_t n = 0;
    while (at < limit) {
        int kind = extent_at(io, at, limit, n > 0 && extents[n - 1].kind == FL_ZERO, &end, error);
        if (kind < 0)
            return kind;
        if (n > 0 && extents[n - 1].kind == kind)
            extents[n - 1].length += end - at;
        else if (n == max)
            break;
        else
            extents[n++] = (fl_extent){ at, end - at, kind };
        at = end;
    }
    *found = n;
    return 0;
}
