/* test_invariants_clone.c: I3 where a backup shares blocks with the source: what was cloned is looked at again, as what was read is.
 *
 * FICLONERANGE is this program's own: it moves the bytes, on any file system, and before it does so it calls `meanwhile`, so the clone has what
 * the guest wrote there. Some clones fail, and some of these when half is done.
 */
#define _GNU_SOURCE
#include <linux/fs.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "rig.h"

#define SIZE (512 * CLUSTER + 100)
#define ZEROS 8                         /* clusters from here on are zeros at the cut, and no hole */
#define ZEROS_END 12
#define GRANULARITY (32 * CLUSTER)

static struct { fl_image *source, *target; fl_disk *disk; fl_snapshot *snapshot; } c;
static void (*meanwhile)(void);         /* once, before the next clone */
static int refuses;                     /* errno of each clone; 0: they work */
static bool half;                       /* what fails did half of it */
static atomic_uint clones;

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request != FICLONERANGE)
        return (int)syscall(SYS_ioctl, fd, request, argument);
    const struct file_clone_range *range = argument;
    atomic_fetch_add(&clones, 1);
    void (*hook)(void) = meanwhile;
    meanwhile = NULL;
    if (hook)
        hook();
    uint64_t length = !refuses ? range->src_length : half ? range->src_length / 2 : 0;
    char *bytes = malloc(range->src_length);
    CHECK(bytes);
    CHECK(pread((int)range->src_fd, bytes, length, (off_t)range->src_offset) == (ssize_t)length);
    CHECK(pwrite(fd, bytes, length, (off_t)range->dest_offset) == (ssize_t)length);
    free(bytes);
    errno = refuses;
    return refuses ? -1 : 0;
}

static uint8_t at_the_cut(uint64_t offset)
{
    return offset / CLUSTER >= ZEROS && offset / CLUSTER < ZEROS_END ? 0 : old_byte(offset);
}

static void begin(int policy, uint64_t stage)
{
    uint8_t *p = malloc(SIZE);
    CHECK(p);
    for (uint64_t i = 0; i < SIZE; i++)
        p[i] = at_the_cut(i);
    MUST(fl_image_create_nameless(directory, SIZE, &c.source, &why));
    MUST(fl_image_create_nameless(directory, SIZE, &c.target, &why));
    MUST(fl_image_pwrite(c.source, p, SIZE, 0, &why));
    free(p);
    MUST(fl_disk_open(c.source, &c.disk, &why));
    fl_snapshot_options options = { .cluster_size = CLUSTER, .on_cbw_error = policy, .stage_size = stage };
    MUST(fl_snapshot_cut(&c.disk, &options, 1, &c.snapshot, &why));
}

/* Back up; it ends with -code. */
static fl_progress back_up(int code, bool skip_lost)
{
    fl_backup_options options = { .granularity = GRANULARITY, .workers = 1, .discard = 1, .target_is_zero = 1, .reflink = 1, .skip_lost = skip_lost };
    fl_backup *job;
    fl_progress progress;
    MUST(fl_backup_start(c.snapshot, c.target, &options, &job, &why));
    int rc = fl_backup_wait(job, 20 * SECOND, &why);
    CHECK(rc == -code, "the backup ended with %d (%s), not %d", rc, why.text, -code);
    MUST(fl_backup_progress(job, &progress, &why));
    CHECK(code || progress.done == SIZE, "%" PRIu64 " done", progress.done);
    fl_backup_free(job);
    return progress;
}

/* The target is what the disk was at the cut, but for clusters [lost, lost_end), which are zeros. */
static void check_target(uint64_t lost, uint64_t lost_end)
{
    uint8_t *p = malloc(SIZE);
    CHECK(p);
    MUST(fl_image_pread(c.target, p, SIZE, 0, &why));
    for (uint64_t i = 0; i < SIZE; i++) {
        uint8_t want = i / CLUSTER >= lost && i / CLUSTER < lost_end ? 0 : at_the_cut(i);
        CHECK(p[i] == want, "the target holds %02x at %" PRIu64 ", not %02x", p[i], i, want);
    }
    free(p);
}

static void finish_all(void)
{
    MUST(fl_snapshot_close(c.snapshot, &why));
    fl_snapshot_free(c.snapshot);
    MUST(fl_disk_close(c.disk, &why));
    fl_disk_free(c.disk);
    fl_image_free(c.source);
    fl_image_free(c.target);
}

static void overwrite(uint64_t first, uint64_t count)
{
    uint8_t *p = malloc(count * CLUSTER);
    CHECK(p);
    memset(p, NEW, count * CLUSTER);
    MUST(fl_disk_pwrite(c.disk, p, count * CLUSTER, first * CLUSTER, &why));
    free(p);
}

TEST(clone_all)
{
    begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
    fl_progress progress = back_up(0, false);
    CHECK(progress.reflinked_bytes == SIZE && progress.data_bytes == SIZE, "%" PRIu64 " shared", progress.reflinked_bytes);
    CHECK(atomic_load(&clones) == 3, "%u clones of 1 MiB at most", atomic_load(&clones));
    check_target(0, 0);
    finish_all();
}

/* Also zeros: the copy does not write them, so they are not there by themselves. */
static void save_some(void)
{
    overwrite(20, 3);
    overwrite(ZEROS + 1, 2);
    MUST(fl_disk_zero(c.disk, 5 * CLUSTER, 100 * CLUSTER, &why));
    MUST(fl_disk_discard(c.disk, CLUSTER, 40 * CLUSTER, &why));
    overwrite(511, 1);
}

TEST(i3_cloned_and_saved_meanwhile)
{
    begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
    meanwhile = save_some;
    fl_progress progress = back_up(0, false);
    CHECK(progress.reflinked_bytes > 0 && progress.reflinked_bytes < SIZE, "%" PRIu64 " shared", progress.reflinked_bytes);
    check_target(0, 0);
    finish_all();
}

static void save_the_middle(void) { overwrite(200, 3); }

/* What was before it is good. */
TEST(i3_cloned_of_which_a_part_is_saved_meanwhile)
{
    begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
    meanwhile = save_the_middle;
    fl_progress progress = back_up(0, false);
    CHECK(progress.reflinked_bytes >= 200 * CLUSTER && progress.reflinked_bytes <= SIZE - 3 * CLUSTER, "%" PRIu64 " shared", progress.reflinked_bytes);
    check_target(0, 0);
    finish_all();
}

static void release_some(void)
{
    MUST(fl_snapshot_discard(c.snapshot, 4 * CLUSTER, 50 * CLUSTER, &why));
    overwrite(50, 4);
}

TEST(i3_cloned_and_released_meanwhile)
{
    begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
    meanwhile = release_some;
    back_up(FL_EDISCARDED, false);
    finish_all();
}

TEST(i3_cloned_and_released_meanwhile_is_left_out)
{
    begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
    meanwhile = release_some;
    CHECK(back_up(0, true).lost_bytes == 4 * CLUSTER);
    check_target(50, 54);
    finish_all();
}

static void too_much_for_the_stage(void)
{
    overwrite(60, 1);
    overwrite(61, 2);
}

TEST(i3_cloned_and_lost_meanwhile)
{
    begin(FL_LOSE_RANGE, CLUSTER);
    meanwhile = too_much_for_the_stage;
    CHECK(back_up(0, true).lost_bytes == 2 * CLUSTER);
    check_target(61, 63);
    finish_all();
}

TEST(i3_cloned_and_broken_meanwhile)
{
    begin(FL_BREAK_SNAPSHOT, CLUSTER);
    meanwhile = too_much_for_the_stage;
    back_up(FL_EBROKEN, false);
    finish_all();
}

/* A clone that fails is a copy, and two files that can't share blocks are asked once. */
TEST(clone_refused)
{
    static const int codes[] = { EOPNOTSUPP, EXDEV, ETXTBSY, EINVAL, ENOSPC };
    for (unsigned i = 0; i < sizeof codes / sizeof *codes; i++) {
        begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
        refuses = codes[i];
        atomic_store(&clones, 0);
        CHECK(back_up(0, false).reflinked_bytes == 0);
        CHECK(atomic_load(&clones) == 1, "%u clones", atomic_load(&clones));
        check_target(0, 0);
        finish_all();
    }
}

/* What half a clone brought of the guest's new bytes does not stay. */
TEST(i3_half_cloned)
{
    begin(FL_BREAK_SNAPSHOT, 64 * CLUSTER);
    refuses = EIO;
    half = true;
    meanwhile = save_some;
    CHECK(back_up(0, false).reflinked_bytes == 0);
    check_target(0, 0);
    finish_all();
}
