/* export_fuse_tree.c: names: what there is to be looked up and listed, what .snap shows, and the requests for cuts. */
#define _GNU_SOURCE
#ifdef FLEECE_FUSE
#include "export_fuse.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define NAMES_KEPT 3600.0       /* s: how long the kernel need not ask again: disks do not come and go */
#define ATTRIBUTES_KEPT 1.0     /* mtimes and modes */
#define BLOCK 512

/* ---- names ---- */

static bool good_name(const char *name)
{
    return *name && strlen(name) <= 255 && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

static size_t stem_length(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot && dot != name ? (size_t)(dot - name) : strlen(name);
}

/* The name of disk i's .changed file, into `out` of 256 + sizeof suffix bytes. */
static void changed_name(const char *const *names, size_t count, size_t i, char *out)
{
    size_t length = stem_length(names[i]);
    sprintf(out, "%.*s" CHANGED_SUFFIX, (int)length, names[i]);
    bool taken = false;
    for (size_t j = 0; j < count && !taken; j++)
        taken = strcmp(names[j], out) == 0 || (j != i && stem_length(names[j]) == length && memcmp(names[j], names[i], length) == 0);
    if (taken)
        sprintf(out, "%s" CHANGED_SUFFIX, names[i]);
}

static int check_names(const char *const *names, size_t count, fl_error *error)
{
    char changed[256 + sizeof CHANGED_SUFFIX];
    if (count == 0)
        return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "a mount has one disk at least");
    for (size_t i = 0; i < count; i++) {
        if (!good_name(names[i]) || strcmp(names[i], SNAP_NAME) == 0)
            return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "'%.300s' cannot be the name of a disk's file", names[i]);
        for (size_t j = 0; j < i; j++)
            if (strcmp(names[i], names[j]) == 0)
                return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "two disks are called '%.300s'", names[i]);
    }
    for (size_t i = 0; i < count; i++) {
        changed_name(names, count, i, changed);
        bool bad = strlen(changed) > 255;
        for (size_t j = 0; j < count; j++)
            bad = bad || strcmp(names[j], changed) == 0;
        if (bad)
            return fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "'%.200s': its incremental could not be called '%.200s': choose another name", names[i], changed);
    }
    return 0;
}

int tree_init(fl_mount *mount, fl_disk *const *disks, const char *const *names, size_t count, fl_error *error)
{
    int rc = check_names(names, count, error);
    if (rc)
        return rc;
    mount->last_shot = &mount->shots;
    mount->last_request = &mount->requests;
    mount->next_node = FIRST_NODE + count;
    mount->root = (struct attributes){ S_IFDIR | 0755, geteuid(), getegid() };
    mount->snap = mount->root;
    mount->disks = calloc(count, sizeof *mount->disks);
    mount->changed_names = calloc(count, sizeof *mount->changed_names);
    mount->names = malloc(count * 2 * 256);
    if (!mount->disks || !mount->changed_names || !mount->names)
        return fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory for the files of a mount");
    for (size_t i = 0; i < count; i++) {
        struct file *file = &mount->disks[i];
        char changed[256 + sizeof CHANGED_SUFFIX];
        rc = disk_use(disks[i], error);
        if (rc)
            return rc;
        changed_name(names, count, i, changed);
        file->name = strcpy(mount->names + i * 512, names[i]);
        mount->changed_names[i] = strcpy(mount->names + i * 512 + 256, changed);
        file->kind = DISK_FILE;
        file->node = FIRST_NODE + i;
        file->disk = disks[i];
        file->size = fl_disk_size(disks[i]);
        file->attributes = (struct attributes){ S_IFREG | 0600, geteuid(), getegid() };
        atomic_init(&file->changed, mount->started.tv_sec * 1000000000 + mount->started.tv_nsec);
        mount->disk_count++;
    }
    return 0;
}

/* ---- shots ---- */

void shot_unref(struct shot *shot)
{
    if (!shot || atomic_fetch_sub(&shot->references, 1) != 1)
        return;
    for (size_t i = 0; i < shot->count; i++)
        if (shot->files[i].kind == SNAPSHOT_FILE)
            snapshot_unref(shot->files[i].snapshot);
    free(shot);
}

/* Under the lock: the link to the one that is shown with this name, or this node; else the last link. */
static struct shot **find_shot(fl_mount *mount, const char *name, fuse_ino_t node)
{
    struct shot **link = &mount->shots;
    while (*link && (name ? strcmp((*link)->name, name) != 0 : node < (*link)->node || node > (*link)->node + (*link)->count))
        link = &(*link)->next;
    return link;
}

static struct shot *take_shot(fl_mount *mount, const char *name, fuse_ino_t node)
{
    pthread_mutex_lock(&mount->lock);
    struct shot *shot = *find_shot(mount, name, node);
    if (shot)
        atomic_fetch_add(&shot->references, 1);
    pthread_mutex_unlock(&mount->lock);
    return shot;
}

struct shot *tree_shot(fl_mount *mount, fuse_ino_t node)
{
    return take_shot(mount, NULL, node);
}

struct file *tree_file(fl_mount *mount, fuse_ino_t node)
{
    if (node < FIRST_NODE + mount->disk_count)
        return node < FIRST_NODE ? NULL : &mount->disks[node - FIRST_NODE];
    struct shot *shot = tree_shot(mount, node);
    if (shot && node == shot->node) {
        shot_unref(shot);
        return NULL;
    }
    return shot ? &shot->files[node - shot->node - 1] : NULL;
}

static void add_file(fl_mount *mount, struct shot *shot, size_t disk, fl_snapshot *snapshot, enum file_kind kind)
{
    struct file *file = &shot->files[shot->count++];
    *file = (struct file){ .kind = kind, .name = kind == CHANGED_FILE ? mount->changed_names[disk] : mount->disks[disk].name,
                           .shot = shot, .disk = mount->disks[disk].disk, .snapshot = snapshot, .size = snapshot->size };
    file->allocated = MIN(disk_allocated(file->disk), kind == CHANGED_FILE ? snapshot_total(snapshot) : file->size);
    file->attributes = mount->disks[disk].attributes;
    atomic_init(&file->changed, shot->time.tv_sec * 1000000000 + shot->time.tv_nsec);
}

int fl_mount_show(fl_mount *mount, const char *cut, fl_snapshot *const *snapshots, fl_error *error)
{
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc;
    struct shot *shot = calloc(1, sizeof *shot + 2 * mount->disk_count * sizeof(struct file));
    if (!shot) {
        rc = fail(error, ENOMEM, FL_SIDE_NONE, 0, 0, "no memory to show a snapshot");
        goto out;
    }
    atomic_init(&shot->references, 1);
    clock_gettime(CLOCK_REALTIME_COARSE, &shot->time);
    if (!good_name(cut)) {
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "'%.300s' cannot be the name of a snapshot", cut);
        goto out;
    }
    strcpy(shot->name, cut);
    for (size_t i = 0; i < mount->disk_count; i++) {
        if (!snapshots[i])
            continue;
        if (snapshots[i]->size != mount->disks[i].size) {
            rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "the snapshot that is to be shown as %.200s is of another disk", mount->disks[i].name);
            goto out;
        }
        add_file(mount, shot, i, snapshot_ref(snapshots[i]), SNAPSHOT_FILE);
        if (snapshots[i]->incremental)
            add_file(mount, shot, i, snapshots[i], CHANGED_FILE);
    }
    pthread_mutex_lock(&mount->lock);
    if (mount->closing) {
        rc = fail(error, FL_ECLOSED, FL_SIDE_NONE, 0, 0, "the mount is closed");
    } else if (*find_shot(mount, cut, 0)) {
        rc = fail(error, EEXIST, FL_SIDE_NONE, 0, 0, "there is a snapshot '%.300s' already", cut);
    } else {
        shot->attributes = mount->snap;
        shot->node = mount->next_node;
        mount->next_node += shot->count + 1;
        for (size_t i = 0; i < shot->count; i++)
            shot->files[i].node = shot->node + 1 + i;
        *mount->last_shot = shot;
        mount->last_shot = &shot->next;
        shot = NULL;
    }
    pthread_mutex_unlock(&mount->lock);
out:
    shot_unref(shot);
    gate_leave(&mount->gate);
    return rc;
}

/* Under the lock. */
static struct shot *unlink_shot(fl_mount *mount, struct shot **link)
{
    struct shot *shot = *link;
    *link = shot->next;
    if (!shot->next)
        mount->last_shot = link;
    return shot;
}

int fl_mount_hide(fl_mount *mount, const char *cut, fl_error *error)
{
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&mount->lock);
    struct shot **link = find_shot(mount, cut, 0);
    struct shot *shot = *link ? unlink_shot(mount, link) : NULL;
    pthread_mutex_unlock(&mount->lock);
    if (!shot)
        rc = fail(error, ENOENT, FL_SIDE_NONE, 0, 0, "there is no snapshot '%.300s'", cut);
    shot_unref(shot);
    gate_leave(&mount->gate);
    return rc;
}

/* ---- attributes ---- */

static void fill_directory(struct stat *stat, fuse_ino_t node, const struct attributes *attributes, const struct timespec *time, unsigned links)
{
    memset(stat, 0, sizeof *stat);
    stat->st_ino = node;
    stat->st_mode = attributes->mode;
    stat->st_uid = attributes->uid;
    stat->st_gid = attributes->gid;
    stat->st_nlink = links;
    stat->st_blksize = 4096;
    stat->st_atim = stat->st_mtim = stat->st_ctim = *time;
}

static void fill_file(fl_mount *mount, struct stat *stat, struct file *file)
{
    int64_t ns = atomic_load_explicit(&file->changed, memory_order_relaxed);
    struct timespec time = { ns / 1000000000, ns % 1000000000 };
    pthread_mutex_lock(&mount->lock);
    struct attributes attributes = file->attributes;
    pthread_mutex_unlock(&mount->lock);
    fill_directory(stat, file->node, &attributes, &time, 1);
    stat->st_size = (off_t)file->size;
    stat->st_blocks = (blkcnt_t)div_up(file->kind == DISK_FILE ? disk_allocated(file->disk) : file->allocated, BLOCK);
}

/* 0 or a positive errno. */
static int fill(fl_mount *mount, fuse_ino_t node, struct stat *stat)
{
    if (node == FUSE_ROOT_ID || node == SNAP_NODE) {
        pthread_mutex_lock(&mount->lock);
        unsigned links = 2;
        for (const struct shot *shot = mount->shots; shot && node == SNAP_NODE; shot = shot->next)
            links++;
        struct attributes attributes = node == SNAP_NODE ? mount->snap : mount->root;
        pthread_mutex_unlock(&mount->lock);
        fill_directory(stat, node, &attributes, &mount->started, node == SNAP_NODE ? links : 3);
        return 0;
    }
    struct file *file = tree_file(mount, node);
    if (file) {
        fill_file(mount, stat, file);
        shot_unref(file->shot);
        return 0;
    }
    struct shot *shot = tree_shot(mount, node);
    if (!shot)
        return ESTALE;
    fill_directory(stat, node, &shot->attributes, &shot->time, 2);
    shot_unref(shot);
    return 0;
}

static void on_getattr(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
    struct stat stat;
    int rc;
    if (info) {                 /* of an open file, which may not be shown any more */
        rc = 0;
        fill_file(mount_of(req), &stat, handle_of(info)->file);
    } else {
        rc = fill(mount_of(req), node, &stat);
    }
    if (rc)
        fuse_reply_err(req, rc);
    else
        fuse_reply_attr(req, &stat, ATTRIBUTES_KEPT);
}

/* Modes and owners of what lasts can be changed, so that a guest's user may open its disk; snapshots take them over. Times are ours. */
static void on_setattr(fuse_req_t req, fuse_ino_t node, struct stat *wanted, int set, struct fuse_file_info *info)
{
    fl_mount *mount = mount_of(req);
    struct file *file = node >= FIRST_NODE && node < FIRST_NODE + mount->disk_count ? &mount->disks[node - FIRST_NODE] : NULL;
    struct attributes *attributes = file ? &file->attributes : node == FUSE_ROOT_ID ? &mount->root : node == SNAP_NODE ? &mount->snap : NULL;
    if ((set & FUSE_SET_ATTR_SIZE) && !(file && (uint64_t)wanted->st_size == file->size)) {
        fuse_reply_err(req, EPERM);
        return;
    }
    if (set & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) {
        if (!attributes) {
            fuse_reply_err(req, EPERM);
            return;
        }
        pthread_mutex_lock(&mount->lock);
        if (set & FUSE_SET_ATTR_MODE)
            attributes->mode = (attributes->mode & S_IFMT) | (wanted->st_mode & 0777);
        if (set & FUSE_SET_ATTR_UID)
            attributes->uid = wanted->st_uid;
        if (set & FUSE_SET_ATTR_GID)
            attributes->gid = wanted->st_gid;
        pthread_mutex_unlock(&mount->lock);
    }
    on_getattr(req, node, info);
}

static void on_statfs(fuse_req_t req, fuse_ino_t node)
{
    fl_mount *mount = mount_of(req);
    struct statvfs found = { .f_bsize = 4096, .f_frsize = 4096, .f_namemax = 255 };
    (void)node;
    for (size_t i = 0; i < mount->disk_count; i++)
        found.f_blocks += div_up(mount->disks[i].size, 4096);
    found.f_files = mount->disk_count;
    fuse_reply_statfs(req, &found);
}

/* ---- lookup and listing ---- */

static void reply_entry(fuse_req_t req, fuse_ino_t node, bool lasts)
{
    struct fuse_entry_param entry = { .ino = node, .attr_timeout = ATTRIBUTES_KEPT, .entry_timeout = lasts ? NAMES_KEPT : 0 };
    int rc = fill(mount_of(req), node, &entry.attr);
    if (rc)
        fuse_reply_err(req, ENOENT);        /* it went away meanwhile */
    else
        fuse_reply_entry(req, &entry);
}

static fuse_ino_t find_in_shot(fl_mount *mount, fuse_ino_t parent, const char *name)
{
    fuse_ino_t found = 0;
    struct shot *shot = tree_shot(mount, parent);
    for (size_t i = 0; shot && shot->node == parent && i < shot->count && !found; i++)
        if (strcmp(shot->files[i].name, name) == 0)
            found = shot->files[i].node;
    shot_unref(shot);
    return found;
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    fl_mount *mount = mount_of(req);
    fuse_ino_t found = 0;
    if (strlen(name) > 255) {
        fuse_reply_err(req, ENAMETOOLONG);
        return;
    }
    if (parent == FUSE_ROOT_ID) {
        if (strcmp(name, SNAP_NAME) == 0)
            found = SNAP_NODE;
        for (size_t i = 0; i < mount->disk_count && !found; i++)
            if (strcmp(mount->disks[i].name, name) == 0)
                found = mount->disks[i].node;
    } else if (parent == SNAP_NODE) {
        struct shot *shot = take_shot(mount, name, 0);
        found = shot ? shot->node : 0;
        shot_unref(shot);
    } else {
        found = find_in_shot(mount, parent, name);
    }
    if (found)
        reply_entry(req, found, parent == FUSE_ROOT_ID);
    else
        fuse_reply_err(req, ENOENT);
}

struct listing { fuse_req_t req; char *buffer; size_t room, used; bool full; };

/* `next`: the offset at which a listing goes on after this entry. */
static void list(struct listing *listing, const char *name, fuse_ino_t node, mode_t mode, uint64_t next)
{
    struct stat stat = { .st_ino = node, .st_mode = mode };
    if (listing->full)
        return;
    size_t size = fuse_add_direntry(listing->req, listing->buffer + listing->used, listing->room - listing->used, name, &stat, (off_t)next);
    if (size > listing->room - listing->used)
        listing->full = true;
    else
        listing->used += size;
}

/* Offsets: 1 and 2 after "." and "..", then the number of the node that was listed last. Nodes are in the order of their numbers, so what comes
   and goes meanwhile disturbs nothing. */
static void on_readdir(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *info)
{
    fl_mount *mount = mount_of(req);
    struct listing listing = { .req = req, .buffer = fuse_worker->payload, .room = MIN(size, LARGEST_IO) };
    uint64_t after = (uint64_t)offset;
    (void)info;
    if (after < 1)
        list(&listing, ".", node, S_IFDIR, 1);
    if (after < 2)
        list(&listing, "..", FUSE_ROOT_ID, S_IFDIR, 2);
    if (node == FUSE_ROOT_ID) {
        if (after < 3)
            list(&listing, SNAP_NAME, SNAP_NODE, S_IFDIR, 3);
        for (size_t i = 0; i < mount->disk_count; i++)
            if (mount->disks[i].node > after)
                list(&listing, mount->disks[i].name, mount->disks[i].node, S_IFREG, mount->disks[i].node);
    } else if (node == SNAP_NODE) {
        pthread_mutex_lock(&mount->lock);
        for (const struct shot *shot = mount->shots; shot; shot = shot->next)
            if (shot->node > after)
                list(&listing, shot->name, shot->node, S_IFDIR, shot->node);
        pthread_mutex_unlock(&mount->lock);
    } else {
        struct shot *shot = tree_shot(mount, node);
        for (size_t i = 0; shot && i < shot->count; i++)
            if (shot->files[i].node > after)
                list(&listing, shot->files[i].name, shot->files[i].node, S_IFREG, shot->files[i].node);
        shot_unref(shot);
    }
    fuse_reply_buf(req, listing.buffer, listing.used);
}

/* ---- requests ---- */

static void put_aside(fuse_req_t req, int kind, const char *name)
{
    fl_mount *mount = mount_of(req);
    struct request *request = calloc(1, sizeof *request);
    int rc = request ? 0 : ENOMEM;
    pthread_mutex_lock(&mount->lock);
    if (rc == 0 && mount->closing)
        rc = ENOTCONN;
    if (rc == 0) {
        bool shown = *find_shot(mount, name, 0) != NULL;
        rc = kind == FL_MOUNT_MKDIR ? (shown ? EEXIST : 0) : (shown ? 0 : ENOENT);
    }
    if (rc == 0) {
        request->fuse = req;
        request->what.id = ++mount->next_id;
        request->what.kind = kind;
        strcpy(request->what.name, name);
        *mount->last_request = request;
        mount->last_request = &request->next;
        pthread_cond_broadcast(&mount->changed);
        request = NULL;
    }
    pthread_mutex_unlock(&mount->lock);
    free(request);
    if (rc)
        fuse_reply_err(req, rc);
}

/* The kernel lets no '/', NUL, "." or ".." through, and no name that is too long for it (1024); what is left to check is the length. */
static void on_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    (void)mode;
    if (parent != SNAP_NODE)
        fuse_reply_err(req, EPERM);
    else if (strlen(name) > 255)
        fuse_reply_err(req, ENAMETOOLONG);
    else
        put_aside(req, FL_MOUNT_MKDIR, name);
}

static void on_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    if (parent != SNAP_NODE)
        fuse_reply_err(req, EPERM);
    else if (strlen(name) > 255)
        fuse_reply_err(req, ENAMETOOLONG);
    else
        put_aside(req, FL_MOUNT_RMDIR, name);
}

int fl_mount_next_request(fl_mount *mount, uint64_t timeout, fl_mount_request *out, fl_error *error)
{
    uint64_t deadline = add_sat(now_ns(), timeout);
    struct request *request = NULL;
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&mount->lock);
    for (;;) {
        for (request = mount->requests; request && request->taken; request = request->next)
            ;
        if (request || mount->closing || mount->ended || now_ns() >= deadline)
            break;
        cond_wait_until(&mount->changed, &mount->lock, MIN(deadline, UINT64_MAX / 2));
    }
    if (request && !mount->closing) {
        request->taken = true;
        *out = request->what;
    } else if (mount->closing || mount->ended) {
        rc = fail(error, FL_EEND, FL_SIDE_NONE, 0, 0, "it is unmounted");
    } else {
        rc = fail(error, FL_ERUNNING, FL_SIDE_NONE, 0, 0, "nobody asks for a cut, or for the end of one");
    }
    pthread_mutex_unlock(&mount->lock);
    gate_leave(&mount->gate);
    return rc;
}

/* Under the lock. */
static struct request *unlink_request(fl_mount *mount, struct request **link)
{
    struct request *request = *link;
    *link = request->next;
    if (!request->next)
        mount->last_request = link;
    return request;
}

int fl_mount_answer(fl_mount *mount, uint64_t id, int code, const char *story, fl_error *error)
{
    int rc = gate_pass(&mount->gate, "mount", error);
    if (rc)
        return rc;
    pthread_mutex_lock(&mount->lock);
    struct request **link = &mount->requests;
    while (*link && !((*link)->what.id == id && (*link)->taken))
        link = &(*link)->next;
    struct request *request = *link ? unlink_request(mount, link) : NULL;
    struct shot *shot = request && request->what.kind == FL_MOUNT_MKDIR ? *find_shot(mount, request->what.name, 0) : NULL;
    fuse_ino_t node = shot ? shot->node : 0;
    pthread_mutex_unlock(&mount->lock);
    if (!request) {
        rc = fail(error, EINVAL, FL_SIDE_NONE, 0, 0, "nobody waits for this answer any more");
    } else {
        story_of_snap(mount, code, story);
        if (code)
            fuse_reply_err(request->fuse, story_errno(-code));
        else if (request->what.kind == FL_MOUNT_RMDIR)
            fuse_reply_err(request->fuse, 0);
        else
            reply_entry(request->fuse, node, false);
    }
    free(request);
    gate_leave(&mount->gate);
    return rc;
}

/* ---- what does not exist here ---- */

static void on_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    (void)parent, (void)name;
    fuse_reply_err(req, EPERM);
}

static void on_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent, const char *new_name, unsigned flags)
{
    (void)parent, (void)name, (void)new_parent, (void)new_name, (void)flags;
    fuse_reply_err(req, EPERM);
}

static void on_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t device)
{
    (void)parent, (void)name, (void)mode, (void)device;
    fuse_reply_err(req, EPERM);
}

static void on_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *info)
{
    (void)parent, (void)name, (void)mode, (void)info;
    fuse_reply_err(req, EPERM);
}

static void on_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
    (void)target, (void)parent, (void)name;
    fuse_reply_err(req, EPERM);
}

static void on_link(fuse_req_t req, fuse_ino_t node, fuse_ino_t parent, const char *name)
{
    (void)node, (void)parent, (void)name;
    fuse_reply_err(req, EPERM);
}

/* ---- all of it ---- */

void tree_operations(struct fuse_lowlevel_ops *operations)
{
    operations->lookup = on_lookup;
    operations->getattr = on_getattr;
    operations->setattr = on_setattr;
    operations->statfs = on_statfs;
    operations->readdir = on_readdir;
    operations->mkdir = on_mkdir;
    operations->rmdir = on_rmdir;
    operations->unlink = on_unlink;
    operations->rename = on_rename;
    operations->mknod = on_mknod;
    operations->create = on_create;
    operations->symlink = on_symlink;
    operations->link = on_link;
}

void tree_end(fl_mount *mount)
{
    for (;;) {
        pthread_mutex_lock(&mount->lock);
        struct request *request = mount->requests ? unlink_request(mount, &mount->requests) : NULL;
        struct shot *shot = mount->shots ? unlink_shot(mount, &mount->shots) : NULL;
        pthread_mutex_unlock(&mount->lock);
        if (!request && !shot)
            return;
        if (request)
            fuse_reply_err(request->fuse, ENOTCONN);
        free(request);
        for (size_t i = 0; shot && i < shot->count; i++)
            fl_snapshot_close(shot->files[i].snapshot, NULL);
        shot_unref(shot);
    }
}

void tree_destroy(fl_mount *mount)
{
    for (size_t i = 0; i < mount->disk_count; i++)
        disk_unref(mount->disks[i].disk);
    free(mount->disks);
    free(mount->changed_names);
    free(mount->names);
}

#endif
