/* export_fuse_story.c: what failed, and what went on: errnos, extended attributes, the queue of failures, statistics. */
#define _GNU_SOURCE
#ifdef FLEECE_FUSE
#include "export_fuse.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#define ERROR_ATTRIBUTE "user.pyfleece.error"
#define STATS_ATTRIBUTE "user.pyfleece.stats"
#define COMMIT_ATTRIBUTE "user.pyfleece.commit"
#define TOLD_AGAIN_NS UINT64_C(10000000000)     /* the same failure of the same file is told again after this time */

int story_errno(int rc)
{
    switch (-rc) {
    case FL_EDISCARDED:
    case FL_EOUTSIDE:
        return ENODATA;
    case FL_ECLOSED:
    case FL_EFORKED:
        return ESTALE;
    case FL_ELOCKED:
        return EBUSY;
    case FL_ERANGE:
        return EINVAL;
    case ENOSYS:
        return EOPNOTSUPP;
    default:                    /* broken, lost, truncated, ... */
        return -rc > 0 && -rc < 512 ? -rc : EIO;
    }
}

/* ---- the queue of failures ---- */

/* Whoever reads what was never there, or is gone, does so by mistake: nothing is wrong with the storage or the snapshot. */
static bool is_telling(int rc)
{
    return rc != -FL_EDISCARDED && rc != -FL_EOUTSIDE && rc != -FL_ECLOSED;
}

static void path_of(const struct file *file, char *out, size_t size)
{
    if (file->shot)
        snprintf(out, size, SNAP_NAME "/%s/%s", file->shot->name, file->name);
    else
        snprintf(out, size, "%s", file->name);
}

/* Under the lock. */
static void tell(fl_mount *mount, struct file *file, const fl_error *error)
{
    uint64_t now = now_ns();
    if (file->told_code == error->code && now < file->told_at + TOLD_AGAIN_NS) {
        file->left_out++;
        return;
    }
    if (mount->failure_count == FAILURES_KEPT) {
        mount->failures_dropped++;
        return;
    }
    fl_mount_failure *failure = &mount->failures[(mount->first_failure + mount->failure_count++) % FAILURES_KEPT];
    path_of(file, failure->path, sizeof failure->path);
    failure->error = *error;
    failure->left_out = file->left_out;
    file->told_code = error->code;
    file->told_at = now;
    file->left_out = 0;
    pthread_cond_broadcast(&mount->changed);
}

void story_fail(fuse_req_t req, struct file *file, int rc, const fl_error *error)
{
    fl_mount *mount = mount_of(req);
    pthread_mutex_lock(&mount->lock);
    file->story = *error;
    if (is_telling(rc))
        tell(mount, file, error);
    pthread_mutex_unlock(&mount->lock);
    fuse_reply_err(req, story_errno(rc));
}

void story_of_snap(fl_mount *mount, int code, const char *text)
{
    fl_error story = { .code = 0 };
    if (code)
        fail(&story, code, FL_SIDE_NONE, 0, 0, "%.390s", text ? text : fl_strerror(code));
    story.cause = 0;            /* the text has it */
    pthread_mutex_lock(&mount->lock);
    mount->snap_story = story;
    pthread_mutex_unlock(&mount->lock);
}

/* Under the lock. */
static bool take_failure(fl_mount *mount, fl_mount_failure *out)
{
    if (mount->failure_count) {
        *out = mount->failures[mount->first_failure];
        mount->first_failure = (mount->first_failure + 1) % FAILURES_KEPT;
        mount->failure_count--;
        return true;
    }
    if (mount->failures_dropped) {
        memset(out, 0, sizeof *out);
        fail(&out->error, EIO, FL_SIDE_NONE, 0, 0, "more failed than was fetched in time");
        out->error.cause = 0;
        out->left_out = mount->failures_dropped;
        mount->failures_dropped = 0;
        return true;
    }
    return false;
}

int fl_mount_next_failure(fl_mount *mount, uint64_t timeout, fl_mount_failure *failure, fl_error *error)
{
    uint64_t deadline = add_sat(now_ns(), timeout);
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&mount->lock);
    while (!take_failure(mount, failure) && rc == 0) {
        if (mount->closing || mount->ended)
            rc = fail(error, FL_EEND, FL_SIDE_NONE, 0, 0, "it is unmounted");
        else if (now_ns() >= deadline)
            rc = fail(error, FL_ERUNNING, FL_SIDE_NONE, 0, 0, "nothing failed");
        else
            cond_wait_until(&mount->changed, &mount->lock, MIN(deadline, UINT64_MAX / 2));
    }
    pthread_mutex_unlock(&mount->lock);
    gate_leave(&mount->gate);
    return rc;
}

/* ---- extended attributes. They are not listed, so that programs that copy attributes leave them behind ---- */

/* The story as a sentence; empty: there is none. */
static void story_text(fl_mount *mount, const fl_error *story, char *out, size_t size)
{
    pthread_mutex_lock(&mount->lock);
    fl_error copy = *story;
    pthread_mutex_unlock(&mount->lock);
    *out = 0;
    if (copy.code && copy.cause > 0 && copy.cause < FL_EBROKEN)
        snprintf(out, size, "%s: %s", copy.text, fl_strerror(copy.cause));
    else if (copy.code)
        snprintf(out, size, "%s", copy.text);
}

static const struct { const char *name; size_t offset; } counters[] = {
#define COUNTER(name) { #name, offsetof(fl_stats, name) }
    COUNTER(clusters_saved), COUNTER(bytes_copied), COUNTER(zero_clusters), COUNTER(clusters_lost), COUNTER(clusters_discarded),
    COUNTER(staged_bytes), COUNTER(staged_peak), COUNTER(fleecing_bytes), COUNTER(fleecing_peak), COUNTER(bytes_spilled), COUNTER(spill_errors),
    COUNTER(room_waits), COUNTER(room_timeouts), COUNTER(claim_waits), COUNTER(reads_repeated), COUNTER(latency_count),
#undef COUNTER
};

/* JSON, of less than 2 KiB. 0 or a negative code. */
static int stats_text(fl_snapshot *snapshot, char *out, size_t size)
{
    fl_stats stats;
    fl_error error;
    int rc = fl_snapshot_stats(snapshot, &stats, &error);
    if (rc)
        return rc;
    const char *state = fl_snapshot_check(snapshot, NULL) ? "broken" : "live";
    size_t used = (size_t)snprintf(out, size, "{\"state\": \"%s\", \"size\": %llu, \"cluster_size\": %u, \"incremental\": %s, \"whole\": %s", state,
                                   (unsigned long long)snapshot->size, snapshot->cluster_size, snapshot->incremental ? "true" : "false",
                                   snapshot->bounded ? "false" : "true");
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        used += (size_t)snprintf(out + used, size - used, ", \"%s\": %llu", counters[i].name,
                                 (unsigned long long)*(const uint64_t *)((const char *)&stats + counters[i].offset));
    snprintf(out + used, size - used, ", \"latency_max_ns\": %llu}", (unsigned long long)stats.latency_max);
    return 0;
}

static void reply_text(fuse_req_t req, const char *text, size_t size)
{
    size_t length = strlen(text);
    if (length == 0)
        fuse_reply_err(req, ENODATA);
    else if (size == 0)
        fuse_reply_xattr(req, length);
    else if (size < length)
        fuse_reply_err(req, ERANGE);
    else
        fuse_reply_buf(req, text, length);
}

static void on_getxattr(fuse_req_t req, fuse_ino_t node, const char *name, size_t size)
{
    fl_mount *mount = mount_of(req);
    char text[2048] = "";
    if (strcmp(name, ERROR_ATTRIBUTE) != 0 && strcmp(name, STATS_ATTRIBUTE) != 0) {
        fuse_reply_err(req, ENODATA);
        return;
    }
    bool wants_stats = strcmp(name, STATS_ATTRIBUTE) == 0;
    struct file *file = tree_file(mount, node);
    if (node == SNAP_NODE && !wants_stats)
        story_text(mount, &mount->snap_story, text, sizeof text);
    else if (file && !wants_stats)
        story_text(mount, &file->story, text, sizeof text);
    int rc = file && file->snapshot && wants_stats ? stats_text(file->snapshot, text, sizeof text) : 0;
    if (!file && node >= FIRST_NODE) {          /* a directory of .snap, or what was one */
        struct shot *shot = tree_shot(mount, node);
        rc = shot ? 0 : -ESTALE;
        shot_unref(shot);
    }
    if (file)
        shot_unref(file->shot);
    if (rc)
        fuse_reply_err(req, story_errno(rc));
    else
        reply_text(req, text, size);
}

static void on_listxattr(fuse_req_t req, fuse_ino_t node, size_t size)
{
    (void)node;
    if (size == 0)
        fuse_reply_xattr(req, 0);
    else
        fuse_reply_buf(req, NULL, 0);
}

/* Of a directory in .snap: "the incremental backup that was made of this is good". */
static void on_setxattr(fuse_req_t req, fuse_ino_t node, const char *name, const char *value, size_t size, int flags)
{
    struct shot *shot = strcmp(name, COMMIT_ATTRIBUTE) == 0 ? tree_shot(mount_of(req), node) : NULL;
    int rc = 0;
    (void)value, (void)size, (void)flags;
    if (!shot || shot->node != node) {
        shot_unref(shot);
        fuse_reply_err(req, EOPNOTSUPP);
        return;
    }
    for (size_t i = 0; i < shot->count && rc == 0; i++)
        rc = fl_snapshot_commit(shot->files[i].snapshot, NULL);
    shot_unref(shot);
    fuse_reply_err(req, rc ? story_errno(rc) : 0);
}

static void on_removexattr(fuse_req_t req, fuse_ino_t node, const char *name)
{
    (void)node, (void)name;
    fuse_reply_err(req, EOPNOTSUPP);
}

void story_operations(struct fuse_lowlevel_ops *operations)
{
    operations->getxattr = on_getxattr;
    operations->listxattr = on_listxattr;
    operations->setxattr = on_setxattr;
    operations->removexattr = on_removexattr;
}

#endif
