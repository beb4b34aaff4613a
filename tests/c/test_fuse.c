/* test_fuse.c: a mount, hammered by threads, for the sanitizers.
 *
 * PROGRAM DIRECTORY
 *
 * The program serves; a child of it, forked first, uses the mount: a process that fails while its own threads wait for its own mount could not
 * even be killed. In the server one thread makes the cuts that mkdir asks for. In the child writers have a part of the disk each and compare what
 * they read with what they wrote; cutters make snapshots with mkdir, read them twice, look for holes, punch them, and remove them; one reads until
 * an injected fault hits it. Then the mount is closed under all of them, with files open.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>

#include "check.h"

#define SIZE (8ull << 20)
#define CLUSTER 4096ull
#define WRITERS 4
#define CUTTERS 2
#define PART (SIZE / WRITERS)

static const char *directory;
static char mountpoint[512];
static fl_image *raw, *source;
static fl_disk *disk;
static fl_mount *mount;
static atomic_uint failures;

/* Between the server and the child. */
static struct { atomic_bool mounted, stop; atomic_uint cuts, writes; } *both;

static char *path_of(char *out, const char *format, ...)
{
    va_list args;
    int used = sprintf(out, "%s/", mountpoint);
    va_start(args, format);
    vsprintf(out + used, format, args);
    va_end(args);
    return out;
}

/* ---- who makes the cuts ---- */

struct cut { struct cut *next; char name[256]; fl_snapshot *snapshot; };

static int make(struct cut **list, const char *name)
{
    struct cut *cut = calloc(1, sizeof *cut);
    fl_snapshot_options options = { .cluster_size = CLUSTER, .cbw_timeout = SECOND, .stage_size = SIZE };
    CHECK(cut);
    strcpy(cut->name, name);
    int rc = fl_snapshot_cut(&disk, &options, 1, &cut->snapshot, &why);
    if (rc == 0 && (rc = fl_mount_show(mount, name, &cut->snapshot, &why)) != 0)
        fl_snapshot_free(cut->snapshot);
    if (rc) {
        free(cut);
        return EIO;
    }
    cut->next = *list;
    *list = cut;
    return 0;
}

static int drop(struct cut **list, const char *name)
{
    struct cut **link = list;
    while (*link && strcmp((*link)->name, name) != 0)
        link = &(*link)->next;
    struct cut *cut = *link;
    if (!cut)
        return ENOENT;
    *link = cut->next;
    fl_mount_hide(mount, name, NULL);   /* fails when the mount is being closed */
    MUST(fl_snapshot_close(cut->snapshot, &why));
    fl_snapshot_free(cut->snapshot);
    free(cut);
    return 0;
}

static void *serve_cuts(void *argument)
{
    struct cut *list = NULL;
    fl_mount_request request;
    (void)argument;
    while (fl_mount_next_request(mount, UINT64_MAX, &request, NULL) == 0) {
        int code = request.kind == FL_MOUNT_MKDIR ? make(&list, request.name) : drop(&list, request.name);
        fl_mount_answer(mount, request.id, code, "as the test says", NULL);
    }
    while (list)
        drop(&list, list->name);
    return NULL;
}

static void *serve_failures(void *argument)
{
    fl_mount_failure failure;
    (void)argument;
    while (fl_mount_next_failure(mount, UINT64_MAX, &failure, NULL) == 0) {
        CHECK(strcmp(failure.path, "vm.raw") == 0 && failure.error.cause == EIO, "%s: %s", failure.path, failure.error.text);
        atomic_fetch_add(&failures, 1);
    }
    return NULL;
}

/* ---- who uses the files ---- */

/* What a system call on the mount returned is not what it should be: because the mount was closed? Then it failed so, or did only a part. */
static bool over(ssize_t returned)
{
    bool ended = returned >= 0 || errno == ENOTCONN || errno == ECONNABORTED || errno == ESTALE || errno == ENOENT;
    return ended && atomic_load(&both->stop);
}

#define MUST_BE_OVER(returned) CHECK(over(returned), "it returned %zd: %s", (ssize_t)(returned), strerror(errno))

static void *write_part(void *argument)
{
    uint64_t base = (uintptr_t)argument * PART, seed = (uintptr_t)argument;
    char path[640];
    unsigned char *model = calloc(1, PART), *buffer = malloc(PART);
    int fd = open(path_of(path, "vm.raw"), O_RDWR);
    CHECK(fd >= 0 && model && buffer, "%s", strerror(errno));
    while (!atomic_load(&both->stop)) {
        uint64_t offset = below(&seed, PART), count = 1 + below(&seed, PART - offset < 200000 ? PART - offset : 200000);
        ssize_t rc;
        if (chance(&seed, 20)) {
            memset(model + offset, 0, count);
            rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(base + offset), (off_t)count);
            rc = rc == 0 ? (ssize_t)count : rc;
        } else {
            memset(model + offset, (int)below(&seed, 256), count);
            rc = pwrite(fd, model + offset, count, (off_t)(base + offset));
        }
        if (rc == (ssize_t)count)
            rc = pread(fd, buffer, count, (off_t)(base + offset));
        if (rc != (ssize_t)count) {
            MUST_BE_OVER(rc);
            break;
        }
        CHECK(memcmp(buffer, model + offset, count) == 0);
        atomic_fetch_add(&both->writes, 1);
    }
    close(fd);
    free(model);
    free(buffer);
    return NULL;
}

/* false: the mount is over. */
static bool look_at_snapshot(const char *name, char *first, char *second)
{
    char path[640], attribute[4096];
    int fd = open(path_of(path, ".snap/%s/vm.raw", name), O_RDWR);
    ssize_t rc = fd;
    bool good = fd >= 0 &&
                (rc = pread(fd, first, SIZE, 0)) == (ssize_t)SIZE &&
                (rc = lseek(fd, 0, SEEK_HOLE)) >= 0 &&
                (rc = pread(fd, second, SIZE, 0)) == (ssize_t)SIZE;
    if (good)
        CHECK(memcmp(first, second, SIZE) == 0, "a snapshot changed");
    good = good && (rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, SIZE / 2)) == 0;
    if (good)
        CHECK(pread(fd, first, 1, 0) < 0 && (errno == ENODATA || over(-1)), "%s", strerror(errno));
    good = good && (rc = fgetxattr(fd, "user.pyfleece.stats", attribute, sizeof attribute)) > 0;
    if (!good)
        MUST_BE_OVER(rc);
    if (fd >= 0)
        close(fd);
    return good;
}

static void *cut_and_look(void *argument)
{
    char name[64], path[640], *first = malloc(SIZE), *second = malloc(SIZE);
    CHECK(first && second);
    for (unsigned i = 0; !atomic_load(&both->stop); i++) {
        sprintf(name, "%lu-%u", (unsigned long)(uintptr_t)argument, i);
        if (mkdir(path_of(path, ".snap/%s", name), 0755)) {
            MUST_BE_OVER(-1);
            break;
        }
        if (!look_at_snapshot(name, first, second))
            break;
        if (rmdir(path_of(path, ".snap/%s", name))) {
            MUST_BE_OVER(-1);
            break;
        }
        atomic_fetch_add(&both->cuts, 1);
    }
    free(first);
    free(second);
    return NULL;
}

static void find_the_fault(void)
{
    char path[640], byte, story[512];
    int fd = open(path_of(path, "vm.raw"), O_RDWR);
    CHECK(fd >= 0, "%s", strerror(errno));
    CHECK(pread(fd, &byte, 1, SIZE - 1) < 0 && errno == EIO, "%s", strerror(errno));
    CHECK(pread(fd, &byte, 1, SIZE - 1) == 1);
    ssize_t length = fgetxattr(fd, "user.pyfleece.error", story, sizeof story - 1);
    CHECK(length > 0, "%s", strerror(errno));
    story[length] = 0;
    CHECK(strstr(story, "Input/output error"), "%s", story);
    close(fd);
}

static void use_the_mount(void)
{
    pthread_t threads[WRITERS + CUTTERS];
    char path[640];
    while (!atomic_load(&both->mounted))
        sleep_ns(MILLISECOND);
    if (atomic_load(&both->stop))
        _exit(0);
    find_the_fault();
    int fd = open(path_of(path, "vm.raw"), O_RDWR);
    CHECK(fd >= 0, "%s", strerror(errno));
    for (uintptr_t i = 0; i < WRITERS + CUTTERS; i++)
        CHECK(pthread_create(&threads[i], NULL, i < WRITERS ? write_part : cut_and_look, (void *)i) == 0);
    for (int i = 0; i < WRITERS + CUTTERS; i++)
        pthread_join(threads[i], NULL);
    ssize_t rc;
    while ((rc = pread(fd, path, 1, 0)) == 1)       /* the threads may have seen the stop before the end */
        sleep_ns(MILLISECOND);
    CHECK(rc < 0 && (errno == ENOTCONN || errno == ECONNABORTED), "%s", strerror(errno));
    _exit(0);
}

static void check_child(pid_t child, int options)
{
    int status = 0;
    pid_t ended = waitpid(child, &status, options);
    CHECK(ended >= 0 && (ended == 0 || (WIFEXITED(status) && WEXITSTATUS(status) == 0)), "the child ended with status %d", status);
    CHECK(ended == child || options, "the child is still there");
}

static bool start(void)
{
    const char *name = "vm.raw";
    fl_mount_options options = { .threads = 8 };
    fl_fault fault = { .ops = FL_OP_READ, .action = FL_FAULT_ERROR, .err = EIO, .nth = 1, .times = 1, .offset = SIZE - 1, .length = 1 };
    MUST(fl_image_create_nameless(directory, SIZE, &raw, &why));
    MUST(fl_image_faulty(raw, &source, &why));
    MUST(fl_fault_add(source, &fault, &why));
    MUST(fl_disk_open(source, &disk, &why));
    CHECK(mkdir(mountpoint, 0755) == 0 || errno == EEXIST, "%s", strerror(errno));
    int rc = fl_mount_start(mountpoint, &disk, &name, 1, &options, &mount, &why);
    if (rc == -ENOSYS || rc == -EPERM || rc == -EACCES || rc == -ENOENT || rc == -ENODEV)
        printf("SKIP: a mount is needed: %s\n", why.text);
    else
        CHECK(rc == 0, "%s", why.text);
    atomic_store(&both->stop, rc != 0);
    atomic_store(&both->mounted, true);
    return rc == 0;
}


static void finish(void)
{
    fl_mount_free(mount);
    MUST(fl_disk_close(disk, &why));
    fl_disk_free(disk);
    fl_image_free(source);
    fl_image_free(raw);
    CHECK(rmdir(mountpoint) == 0, "%s", strerror(errno));
}

int main(int argc, char **argv)
{
    CHECK(argc == 2 && strlen(argv[1]) < 400, "usage: %s DIRECTORY", argv[0]);
    directory = argv[1];
    sprintf(mountpoint, "%s/mount", directory);
    both = mmap(NULL, sizeof *both, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(both != MAP_FAILED);
    pid_t child = fork();
    CHECK(child >= 0, "%s", strerror(errno));
    if (child == 0)
        use_the_mount();
    pthread_t cutter, teller;
    int threads_before = tasks_at_start(), files_before = count_entries("/proc/self/fd");
    uint64_t open_files;
    if (!start()) {
        check_child(child, 0);
        finish();
        return 0;
    }
    CHECK(pthread_create(&cutter, NULL, serve_cuts, NULL) == 0 && pthread_create(&teller, NULL, serve_failures, NULL) == 0);
    uint64_t deadline = clock_ns() + 60 * SECOND;
    while (atomic_load(&both->cuts) < 6 || atomic_load(&both->writes) < 400 || atomic_load(&failures) < 1) {
        CHECK(clock_ns() < deadline, "%u cuts, %u writes, %u failures told", atomic_load(&both->cuts), atomic_load(&both->writes),
              atomic_load(&failures));
        check_child(child, WNOHANG);
        sleep_ns(MILLISECOND);
    }
    MUST(fl_mount_open_files(mount, &open_files, &why));
    CHECK(open_files >= 1);
    EXPECT(FL_ERUNNING, fl_mount_wait(mount, 0, &why));
    atomic_store(&both->stop, true);
    MUST(fl_mount_close(mount, &why));
    MUST(fl_mount_close(mount, &why));
    MUST(fl_mount_wait(mount, 0, &why));
    EXPECT(FL_ECLOSED, fl_mount_open_files(mount, &open_files, &why));
    check_child(child, 0);
    pthread_join(cutter, NULL);
    pthread_join(teller, NULL);
    finish();
    check_comes_down("/proc/self/task", threads_before, SLOWDOWN * SECOND);
    check_comes_down("/proc/self/fd", files_before, SLOWDOWN * SECOND);
    printf("%u cuts, %u writes\n", atomic_load(&both->cuts), atomic_load(&both->writes));
    return 0;
}
