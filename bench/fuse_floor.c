/* fuse_floor.c: the least that a file system in user space can do for a guest's disk: one file, whose reads and writes are the system calls of
 * another file. No snapshots, no errors that tell anything. What a mount can't be faster than.
 *
 *     fuse_floor FILE MOUNTPOINT          serves MOUNTPOINT/disk.raw, by one thread, until it is unmounted or killed
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 34
#include <fuse_lowlevel.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME "disk.raw"
#define NODE 2
#define LARGEST_IO (1u << 20)

static int fd;
static char *buffer;

static int fill(fuse_ino_t node, struct stat *st)
{
    memset(st, 0, sizeof *st);
    st->st_ino = node;
    st->st_mode = node == NODE ? S_IFREG | 0600 : S_IFDIR | 0700;
    st->st_nlink = 1;
    if (node == NODE)
        st->st_size = lseek(fd, 0, SEEK_END);
    return node == NODE || node == FUSE_ROOT_ID ? 0 : ENOENT;
}

static void on_init(void *data, struct fuse_conn_info *connection)
{
    (void)data;
    connection->max_write = connection->max_read = LARGEST_IO;
}

static void on_getattr(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
    struct stat st;
    int code = fill(node, &st);
    (void)info;
    if (code)
        fuse_reply_err(req, code);
    else
        fuse_reply_attr(req, &st, 1000);
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry = { .ino = NODE, .attr_timeout = 1000, .entry_timeout = 1000 };
    if (parent != FUSE_ROOT_ID || strcmp(name, NAME)) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    fill(NODE, &entry.attr);
    fuse_reply_entry(req, &entry);
}

static void on_open(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
    (void)node;
    info->direct_io = 1;
    fuse_reply_open(req, info);
}

static void on_read(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *info)
{
    ssize_t n = pread(fd, buffer, size < LARGEST_IO ? size : LARGEST_IO, offset);
    (void)node, (void)info;
    if (n < 0)
        fuse_reply_err(req, errno);
    else
        fuse_reply_buf(req, buffer, (size_t)n);
}

static void on_write(fuse_req_t req, fuse_ino_t node, const char *data, size_t size, off_t offset, struct fuse_file_info *info)
{
    ssize_t n = pwrite(fd, data, size, offset);
    (void)node, (void)info;
    if (n < 0)
        fuse_reply_err(req, errno);
    else
        fuse_reply_write(req, (size_t)n);
}

int main(int argc, char **argv)
{
    static const struct fuse_lowlevel_ops operations = {
        .init = on_init, .getattr = on_getattr, .lookup = on_lookup, .open = on_open, .read = on_read, .write = on_write,
    };
    char *words[] = { argv[0], "-omax_read=1048576" };
    struct fuse_args arguments = FUSE_ARGS_INIT(2, words);
    if (argc != 3 || (fd = open(argv[1], O_RDWR)) < 0 || !(buffer = aligned_alloc(4096, LARGEST_IO))) {
        fprintf(stderr, "usage: fuse_floor FILE MOUNTPOINT\n");
        return 2;
    }
    struct fuse_session *session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
    if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[2]))
        return 1;
    fuse_session_loop(session);
    fuse_session_unmount(session);
    fuse_session_destroy(session);
    return 0;
}
