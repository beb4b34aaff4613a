/* io.h: one regular file or block device, opened, locked, and read and written whole. The formats stand on this; nothing else in the
 * library calls the kernel about an image.
 *
 * io.c           opening, and transfers that are all or nothing
 * io_lock.c      the locks that keep two programs from one image
 * io_direct.c    O_DIRECT for callers who align nothing
 * io_space.c     zeros, discards, and where the data is
 * io_clone.c     two files that share blocks
 */
#ifndef FL_IO_H
#define FL_IO_H

#include <sys/types.h>
#include <sys/uio.h>

#include "util/util.h"

_Static_assert(sizeof(off_t) == 8, "build with 64-bit file offsets");

struct io {
    /* fixed after opening */
    int fd;                     /* goes through the page cache; carries the locks; -1: closed */
    int direct_fd;              /* the same file with O_DIRECT; -1: buffered only */
    bool device;                /* a block device */
    bool writable;
    bool locked;                /* holds locks that closing gives back */
    uint64_t size;
    uint32_t block;             /* in what the storage allocates: a file system's block, or a device's sector; a power of two */
    uint32_t alignment;         /* what offsets and lengths of direct transfers must be multiples of; 1 when buffered */
    uint32_t memory_alignment;  /* and addresses */
    unsigned generation;        /* of the process that opened it: see fl_generation */
    const char *name;           /* for messages; the caller's, and outlives this */

    /* atomic: what turned out not to work here, so as not to try it again */
    atomic_bool no_punch, no_zero_range, no_zeroout, no_discard;
    atomic_int reserves;        /* does io_reserve do anything: 1, -1: no, 0: nobody has asked yet */
    _Atomic uint64_t ends_at;   /* the least end that was met where there should have been more; UINT64_MAX: none. It never grows again */
    _Atomic uint64_t reached;   /* the file is at least so long: its length at opening, and what io_reaches said since */
    _Atomic uint64_t data_from, data_to;        /* a file: between them there was data when we last looked, and we made no hole since. Not set together, as data
                                                   that is none does no harm */
    atomic_int flush_error;     /* positive errno of a flush that lost buffered writes; 0: none did */

    pthread_rwlock_t edges;     /* direct only, see io_direct.c: held shared to write whole blocks, exclusively to write parts of blocks */
};

/* Open a regular file or block device, and lock it unless `share`. -EINVAL for other kinds of files, -EROFS, -FL_ELOCKED, -errno.
   On failure `io` needs no io_close. */
int io_open(struct io *io, const char *path, const char *name, bool writable, bool direct, bool share, fl_error *error);
/* A new sparse file, which must not exist; none is left behind on failure. */
int io_create(struct io *io, const char *path, const char *name, uint64_t size, bool direct, bool share, fl_error *error);
/* A new sparse file without a name, buffered and not locked: nobody else can open it. */
int io_create_nameless(struct io *io, const char *directory, const char *name, uint64_t size, fl_error *error);
/* Gives the locks back and closes the files. In a forked child it only closes the child's copies: the locks are the parent's. */
void io_close(struct io *io);

/* All or nothing; the range is inside the file and not empty, and `iov` adds up to `length`. -FL_ETRUNCATED, -errno. */
int io_readv(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
int io_writev(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
int io_flush(struct io *io, fl_error *error);

/* For formats whose file grows (`size` stays what it was at opening). */
/* As io_readv; what is beyond the end of the file reads as zeros. -FL_ETRUNCATED: the file ended before `reached`. */
int io_read_padded(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
/* The same, through the page cache even where transfers are direct. Not for blocks that hold data which is transferred directly. */
int io_read_metadata(struct io *io, void *buffer, size_t length, uint64_t offset, fl_error *error);
int io_write_metadata(struct io *io, const void *buffer, size_t length, uint64_t offset, fl_error *error);
int io_writev_metadata(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);
void io_reaches(struct io *io, uint64_t end);  /* something was written up to there */
uint64_t io_length(struct io *io);      /* bytes of the file now; of a device, its size */
int io_set_length(struct io *io, uint64_t length, fl_error *error);     /* -ENOSPC: the device is smaller */
/* Give the space of exactly these bytes back, whoever writes beside them; they then read as zeros, or as before. false: not done. */
bool io_punch(struct io *io, uint64_t count, uint64_t offset);
/* From now on transfers go through the page cache. Before the first transfer only. */
void io_direct_end(struct io *io);

/* The range reads as zeros afterwards, and its space is given back where that is possible. */
int io_zero(struct io *io, uint64_t count, uint64_t offset, fl_error *error);
/* Give the space back where that is possible; else success and nothing. While io_punches the range reads as zeros afterwards. */
int io_discard(struct io *io, uint64_t count, uint64_t offset, fl_error *error);
/* Does io_discard give space back and leave zeros? True of files until it turned out not to work. */
bool io_punches(struct io *io);
/* The contract of fl_image_extents. */
uint64_t io_next_data(struct io *io, uint64_t offset, uint64_t end);      /* image_next_data */
int io_extents(struct io *io, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error);
uint64_t io_allocated(struct io *io);   /* bytes */
/* The contract of the reserve of image_ops. */
bool io_reserve(struct io *io, uint64_t count, uint64_t offset);
/* Start with what io_clone of the range has to wait for, while nobody has to wait for us. It may do nothing. */
void io_write_back(struct io *io, uint64_t offset, uint64_t length);
/* The contract of the clone of image_ops. */
int io_clone(struct io *io, uint64_t offset, uint64_t length, struct io *target);

/* ---- between the files of this layer ---- */

/* A place in a vector that somebody else owns. */
struct iov_cursor {
    const struct iovec *iov;
    int count;                  /* entries left, the current one included */
    size_t skip;                /* bytes of the current entry that are done */
};

/* Describe the next `limit` bytes in at most `max` entries of `out`; returns how many were used and stores how many bytes they have. The
   cursor stays. The vector has at least `limit` bytes from the cursor on, and `limit` is not 0. */
int iov_next(const struct iov_cursor *cursor, size_t limit, struct iovec *out, int max, size_t *bytes);
void iov_advance(struct iov_cursor *cursor, size_t bytes);

/* Transfer between `fd` and [offset, offset + length) from the cursor on, which moves on; continued until it is done. A read may end
   early at the file's end: *done then says how many bytes came. Returns 0 or -errno, and no text. */
int io_read_all(int fd, struct iov_cursor *cursor, uint64_t offset, size_t length, size_t *done);
int io_write_all(int fd, struct iov_cursor *cursor, uint64_t offset, size_t length);

int io_fail_read(struct io *io, int code, uint64_t offset, size_t length, fl_error *error);      /* code is positive */
int io_fail_write(struct io *io, int code, uint64_t offset, size_t length, fl_error *error);
int io_fail_truncated(struct io *io, uint64_t end, uint64_t offset, uint64_t length, fl_error *error);

/* io_lock.c. 0 (also where the file system has no locks) or -FL_ELOCKED, with no lock left held. */
int io_lock(struct io *io, fl_error *error);
void io_unlock(struct io *io);

/* io_direct.c. Open direct_fd beside fd, and find out the alignments. */
int io_direct_open(struct io *io, const char *path, fl_error *error);
int io_direct_readv(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, size_t *moved,
                    fl_error *error);           /* *moved < length: the file ends there */
int io_direct_writev(struct io *io, const struct iovec *iov, int count, uint64_t offset, size_t length, fl_error *error);

#endif
