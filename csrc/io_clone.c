/* io_clone.c: two files that share blocks, until one of them is written to: what `cp --reflink` does, for a range. */
#define _GNU_SOURCE
#include "io.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Does this errno mean that these two files can't ever share blocks? Nothing was changed then. */
static bool never(int code)
{
    switch (code) {
    case EOPNOTSUPP: case ENOTTY: case ENOSYS:          /* the file system can't */
    case EXDEV:                                         /* they are on two */
    case ETXTBSY: case EPERM: case EACCES: case EBADF: case EISDIR:         /* swap files, immutable or append-only ones */
        return true;
    default:
        return false;
    }
}

int io_clone(struct io *io, uint64_t offset, uint64_t length, struct io *target)
{
    struct file_clone_range range = { .src_fd = io->fd, .src_offset = offset, .src_length = length, .dest_offset = offset };
    int rc;
    if (io->device || target->device || target->direct_fd >= 0)         /* direct: see io_direct.c, what it does beside its writes */
        return -EOPNOTSUPP;
    do {
        rc = ioctl(target->fd, FICLONERANGE, &range);
    } while (rc < 0 && errno == EINTR);
    return rc == 0 ? 0 : never(errno) ? -EOPNOTSUPP : -errno;
}
