/* export_fuse_none.c: the calls of a mount where this was built without libfuse3. */
#ifndef FLEECE_FUSE
#include "util/util.h"

static int none(fl_error *error)
{
    return fail(error, ENOSYS, FL_SIDE_NONE, 0, 0, "pyfleece was built without libfuse3, so it cannot mount: install libfuse3-dev (or fuse3-devel) and "
                "pkg-config, then build pyfleece anew");
}

int fl_mount_start(const char *mountpoint, fl_disk *const *disks, const char *const *names, size_t count, const fl_mount_options *options,
                   fl_mount **mount, fl_error *error)
{
    (void)mountpoint, (void)disks, (void)names, (void)count, (void)options, (void)mount;
    return none(error);
}

/* Nobody has an fl_mount. */

int fl_mount_show(fl_mount *mount, const char *cut, fl_snapshot *const *snapshots, fl_error *error)
{
    (void)mount, (void)cut, (void)snapshots;
    return none(error);
}

int fl_mount_hide(fl_mount *mount, const char *cut, fl_error *error)
{
    (void)mount, (void)cut;
    return none(error);
}

int fl_mount_next_request(fl_mount *mount, uint64_t timeout, fl_mount_request *request, fl_error *error)
{
    (void)mount, (void)timeout, (void)request;
    return none(error);
}

int fl_mount_answer(fl_mount *mount, uint64_t id, int code, const char *story, fl_error *error)
{
    (void)mount, (void)id, (void)code, (void)story;
    return none(error);
}

int fl_mount_next_failure(fl_mount *mount, uint64_t timeout, fl_mount_failure *failure, fl_error *error)
{
    (void)mount, (void)timeout, (void)failure;
    return none(error);
}

int fl_mount_open_files(fl_mount *mount, uint64_t *count, fl_error *error)
{
    (void)mount, (void)count;
    return none(error);
}

int fl_mount_wait(fl_mount *mount, uint64_t timeout, fl_error *error)
{
    (void)mount, (void)timeout;
    return none(error);
}

int fl_mount_close(fl_mount *mount, fl_error *error)
{
    (void)mount;
    return none(error);
}

void fl_mount_free(fl_mount *mount) { (void)mount; }

#endif
