/* io_lock.c: image locking, understood by QEMU.
 *
 * Each permission has two bytes in the file (far inside or beyond it, it does not matter: a lock has nothing to do with the data).
 * Whoever uses a permission holds a shared lock on its byte from 100 on; whoever does not let others use it holds one on its
 * byte from 200 on. First one's own locks are taken, then one looks whether somebody has locks that contradict them. As each locks
 * before it looks, at least one of two that come at the same moment sees the other (and maybe both do, and both give up).
 *
 *                        uses                        lets others
 *   open for writing     read, write, resize         read, write-unchanged
 *   open for reading     read                        read, write-unchanged
 *
 * So any number may read, and nobody reads while another writes: it would see a mixture of old and new. A program that knows what
 * it does opens with `share`, which locks nothing.
 *
 * The locks are those of the open file description, not of the process: a second open in one process conflicts like any other, and
 * another library that opens and closes the file does not drop ours. They live until every copy of the descriptor is closed, those
 * in forked children too; that is why they are given back by hand.
 */
#define _GNU_SOURCE
#include "io.h"

#include <fcntl.h>

enum { PERM_READ, PERM_WRITE, PERM_WRITE_UNCHANGED, PERM_RESIZE, PERMS };

#define USED(perm)      (100 + (perm))
#define UNSHARED(perm)  (200 + (perm))
#define BIT(perm)       (1u << (perm))

static const unsigned reader_uses = BIT(PERM_READ);
static const unsigned writer_uses = BIT(PERM_READ) | BIT(PERM_WRITE) | BIT(PERM_RESIZE);
static const unsigned not_shared = BIT(PERM_WRITE) | BIT(PERM_RESIZE);

static int set_lock(int fd, short type, off_t start, off_t length)
{
    struct flock lock = { .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length };
    int rc;
    do {
        rc = fcntl(fd, F_OFD_SETLK, &lock);
    } while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : 0;
}

/* Does anybody else hold a lock on this byte? 1, 0 or -errno. Asking for a write lock needs no file that is open for writing. */
static int held_by_others(int fd, off_t byte)
{
    struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
    int rc;
    do {
        rc = fcntl(fd, F_OFD_GETLK, &lock);
    } while (rc < 0 && errno == EINTR);
    return rc < 0 ? -errno : lock.l_type != F_UNLCK;
}

/* A lock that is refused is somebody's exclusive lock; any other failure means that there are no such locks here. */
static int take(int fd, unsigned uses)
{
    int rc = 0;
    for (int perm = 0; perm < PERMS && rc == 0; perm++) {
        if (uses & BIT(perm))
            rc = set_lock(fd, F_RDLCK, USED(perm), 1);
        if (rc == 0 && not_shared & BIT(perm))
            rc = set_lock(fd, F_RDLCK, UNSHARED(perm), 1);
    }
    return rc;
}

/* The permission that is in the way, by -1 - perm for one that others use and 1 + perm for one that others do not let us use; 0: none. */
static int find_conflict(int fd, unsigned uses)
{
    for (int perm = 0; perm < PERMS; perm++)
        if (not_shared & BIT(perm) && held_by_others(fd, USED(perm)) == 1)
            return -1 - perm;
    for (int perm = 0; perm < PERMS; perm++)
        if (uses & BIT(perm) && held_by_others(fd, UNSHARED(perm)) == 1)
            return 1 + perm;
    return 0;
}

int io_lock(struct io *io, fl_error *error)
{
    unsigned uses = io->writable ? writer_uses : reader_uses;
    int rc = take(io->fd, uses);
    int conflict = 0;

    if (rc == 0 && (conflict = find_conflict(io->fd, uses)) == 0) {
        io->locked = true;
        return 0;
    }
    io_unlock(io);
    if (rc != 0 && rc != -EAGAIN && rc != -EACCES)
        return 0;                               /* no locks on this file system */
    return fail(error, FL_ELOCKED, FL_SIDE_NONE, 0, 0,
                "image '%s' is in use: another program, or another open in this one, has it open%s; "
                "close it there, or open it with share to take no lock and use it all the same",
                io->name, conflict < 0 ? " for writing" : "");
}

void io_unlock(struct io *io)
{
    set_lock(io->fd, F_UNLCK, USED(0), UNSHARED(PERMS) - USED(0));
    io->locked = false;
}
