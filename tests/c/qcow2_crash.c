/* qcow2_crash.c: random operations on a qcow2 image, and a log of what they ask of the file: what a crash test replays.
 *
 *     qcow2_crash IMAGE LOG [--seed N] [--operations N] [--threads N] [--cache BYTES] [--direct] [--reopen [--grow BYTES]]
 *                 [--marks-only] [--first-id N]
 *
 * The log has, in the order in which they took effect, the changes of the file with their data (pwrite, pwritev, fallocate, ftruncate),
 * the begin and the end of each fdatasync or fsync, and the begin and the end of each operation of this program. Operations that run at the
 * same time never share a sector, but often a cluster. A sector that an operation writes tells its own number and that of the operation.
 *
 * --reopen: the image is closed and opened again a few times, and each time made larger, by --grow.
 *
 * --marks-only: the log has the operations only, and goes to the kernel at once: for a run that is going to be killed. Then the file is
 * what it is, syncs are real, and it runs until it is killed. Otherwise syncs are logged, and not done.
 *
 * The functions of the C library that change a file are defined here, so that the driver's calls come here, and go on as system calls.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "check.h"
#include "image.h"

#define SECTOR 512u

/* ---- the log ---- */

enum event { EV_WRITE = 1, EV_ZERO, EV_LENGTH, EV_ALLOCATE, EV_SYNC_BEGIN, EV_SYNC_END, EV_BEGIN, EV_END, EV_CLOSE };

struct record {                 /* little-endian, as x86 and arm64 are; followed by `bytes` bytes */
    uint32_t kind, bytes;
    uint64_t id, offset, length;
};

static int log_fd = -1;
static bool marks_only, direct;
static dev_t image_device;
static ino_t image_inode;
static bool recording;          /* the image is known */
static bool lingers;
static unsigned seed = 1;
/* Held from before a change of the file until it is in the log. */
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t next_id = 1;

static void log_raw(const void *data, size_t length)
{
    for (const char *p = data; length != 0;) {
        ssize_t done = syscall(SYS_write, log_fd, p, length);
        CHECK(done > 0, "the log: %s", strerror(errno));
        p += done;
        length -= (size_t)done;
    }
}

/* Needs log_lock. */
static void log_record(enum event kind, uint64_t id, uint64_t offset, uint64_t length, const struct iovec *iov, int count)
{
    struct record record = { kind, 0, id, offset, length };
    struct iovec all[16] = { { &record, sizeof record } };
    size_t left = iov ? length : 0;
    int used = 1;
    for (int i = 0; i < count && left != 0 && used < 16; i++) {
        size_t n = iov[i].iov_len < left ? iov[i].iov_len : left;
        all[used++] = (struct iovec){ iov[i].iov_base, n };
        left -= n;
    }
    CHECK(left == 0 || used == 16, "a vector shorter than what was written");
    record.bytes = iov ? (uint32_t)length : 0;
    if (used < 16) {
        size_t total = sizeof record + record.bytes;
        ssize_t done = syscall(SYS_writev, log_fd, all, used);
        CHECK(done == (ssize_t)total, "the log: %zd of %zu bytes: %s", done, total, strerror(errno));
        return;
    }
    log_raw(&record, sizeof record);
    left = record.bytes;
    for (int i = 0; left != 0; i++) {
        size_t n = iov[i].iov_len < left ? iov[i].iov_len : left;
        log_raw(iov[i].iov_base, n);
        left -= n;
    }
}

static void mark(enum event kind, uint64_t id, uint64_t offset, uint64_t length)
{
    pthread_mutex_lock(&log_lock);
    log_record(kind, id, offset, length, NULL, 0);
    pthread_mutex_unlock(&log_lock);
}

static bool is_image(int fd)
{
    struct stat st;
    return recording && !marks_only && fstat(fd, &st) == 0 && st.st_dev == image_device && st.st_ino == image_inode;
}

/* Where there are several threads: now and then the others get ahead of one that is about to write. */
static void linger(void)
{
    static _Thread_local uint64_t state;
    if (!lingers)
        return;
    if (state == 0)
        state = seed + (uintptr_t)&state;
    if (next_random(&state) % 4 == 0)
        sleep_ns(next_random(&state) % 100000);
}

/* ---- what the driver calls ---- */

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
    if (!is_image(fd))
        return syscall(SYS_pwritev, fd, iov, count, offset, 0);
    linger();
    pthread_mutex_lock(&log_lock);
    ssize_t done = syscall(SYS_pwritev, fd, iov, count, offset, 0);
    int code = errno;
    if (done > 0)
        log_record(EV_WRITE, 0, (uint64_t)offset, (uint64_t)done, iov, count);
    pthread_mutex_unlock(&log_lock);
    errno = code;
    return done;
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    struct iovec iov = { (void *)(uintptr_t)buffer, length };
    return pwritev(fd, &iov, 1, offset);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    if (!is_image(fd))
        return (int)syscall(SYS_fallocate, fd, mode, offset, length);
    pthread_mutex_lock(&log_lock);
    int rc = (int)syscall(SYS_fallocate, fd, mode, offset, length);
    int code = errno;
    if (rc == 0) {
        bool keeps_size = mode & FALLOC_FL_KEEP_SIZE;
        if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
            log_record(EV_ZERO, keeps_size, (uint64_t)offset, (uint64_t)length, NULL, 0);
        else if (!keeps_size)
            log_record(EV_ALLOCATE, 0, (uint64_t)offset, (uint64_t)length, NULL, 0);
    }
    pthread_mutex_unlock(&log_lock);
    errno = code;
    return rc;
}

int ftruncate(int fd, off_t length)
{
    if (!is_image(fd))
        return (int)syscall(SYS_ftruncate, fd, length);
    pthread_mutex_lock(&log_lock);
    int rc = (int)syscall(SYS_ftruncate, fd, length);
    int code = errno;
    if (rc == 0)
        log_record(EV_LENGTH, 0, 0, (uint64_t)length, NULL, 0);
    pthread_mutex_unlock(&log_lock);
    errno = code;
    return rc;
}

static int sync_file(int fd, long number)
{
    if (!is_image(fd))
        return (int)syscall(number, fd);
    uint64_t id = atomic_fetch_add(&next_id, 1);
    mark(EV_SYNC_BEGIN, id, 0, 0);
    sched_yield();                                      /* what other threads write now may be synced or not */
    mark(EV_SYNC_END, id, 0, 0);
    return 0;
}

int fdatasync(int fd)
{
    return sync_file(fd, SYS_fdatasync);
}

int fsync(int fd)
{
    return sync_file(fd, SYS_fsync);
}

/* ---- operations ---- */

enum operation { OP_WRITE = 1, OP_ZERO, OP_DISCARD, OP_COMPRESSED, OP_FLUSH };

static fl_image *image;
static uint64_t disk_size;
static uint32_t cluster_size;
static uint64_t operations = 500;
static _Atomic uint64_t operations_begun;
/* Sectors that an operation changes now. */
static pthread_mutex_t busy_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char *busy;     /* protected by busy_lock */

static uint64_t draw(uint64_t *state, uint64_t below)
{
    *state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (z ^ (z >> 31)) % below;
}

static bool claim(uint64_t first, uint64_t end)
{
    pthread_mutex_lock(&busy_lock);
    bool free = memchr(busy + first, 1, end - first) == NULL;
    if (free)
        memset(busy + first, 1, end - first);
    pthread_mutex_unlock(&busy_lock);
    return free;
}

static void release(uint64_t first, uint64_t end)
{
    pthread_mutex_lock(&busy_lock);
    memset(busy + first, 0, end - first);
    pthread_mutex_unlock(&busy_lock);
}

static void fill(void *buffer, uint64_t first, uint64_t end, uint64_t id)
{
    uint64_t *word = buffer;
    for (uint64_t sector = first; sector < end; sector++)
        for (unsigned i = 0; i < SECTOR / 16; i++) {
            *word++ = sector;
            *word++ = id;
        }
}

/* One call, between its marks. `length` of the mark begins with what it is. */
static void perform(enum operation operation, uint64_t first, uint64_t end, void *buffer)
{
    uint64_t id = atomic_fetch_add(&next_id, 1), offset = first * SECTOR, count = (end - first) * SECTOR;
    int rc = 0;
    if (operation == OP_WRITE || operation == OP_COMPRESSED)
        fill(buffer, first, end, id);
    mark(EV_BEGIN, id, offset, count << 8 | operation);
    switch (operation) {
    case OP_WRITE: rc = fl_image_pwrite(image, buffer, count, offset, &why); break;
    case OP_ZERO: rc = fl_image_zero(image, count, offset, &why); break;
    case OP_DISCARD: rc = fl_image_discard(image, count, offset, &why); break;
    case OP_COMPRESSED: rc = fl_image_write_compressed(image, buffer, count, offset, &why); break;
    case OP_FLUSH: rc = fl_image_flush(image, &why); break;
    }
    CHECK(rc == 0 || (operation == OP_DISCARD && rc == -EOPNOTSUPP), "operation %d at %llu, %llu bytes: %d, %s", operation,
          (unsigned long long)offset, (unsigned long long)count, rc, why.text);
    mark(EV_END, id, offset, count << 8 | operation);
}

/* Draw a range of sectors, about `length` of them; whole clusters when `whole`. */
static void draw_range(uint64_t *state, uint64_t length, bool whole, uint64_t *first, uint64_t *end)
{
    uint64_t sectors = disk_size / SECTOR, unit = whole ? cluster_size / SECTOR : 1;
    length = length < sectors ? length : sectors;
    *first = draw(state, 3) == 0 ? draw(state, sectors) : sectors / 3 + draw(state, sectors / 8 + 1);
    *first -= *first % unit;
    *end = *first + (whole ? (length + unit - 1) / unit * unit : length);
    *end = *end < sectors ? *end : sectors;
}

static void *worker(void *argument)
{
    uint64_t state = seed * UINT64_C(1000003) + (uintptr_t)argument, sectors = disk_size / SECTOR, first, end, last_first = 0, last_end = 0;
    uint64_t per_cluster = cluster_size / SECTOR;
    void *buffer = malloc(disk_size);
    CHECK(buffer != NULL, "memory");
    while (marks_only || atomic_fetch_add(&operations_begun, 1) < operations) {
        uint64_t kind = draw(&state, 100);
        if (kind < 8) {
            perform(OP_FLUSH, 0, 0, buffer);
            continue;
        }
        if (kind < 14 && last_end > last_first) {       /* in place, most likely: a flush has the data to think of, and no table */
            if (claim(last_first, last_end)) {
                perform(OP_WRITE, last_first, last_end, buffer);
                release(last_first, last_end);
                perform(OP_FLUSH, 0, 0, buffer);
            }
            continue;
        }
        uint64_t length = 1 + draw(&state, draw(&state, 4) == 0 ? 12 * per_cluster : 2 * per_cluster + 4);
        bool whole = kind >= 92 || draw(&state, 3) == 0;
        draw_range(&state, kind == 14 ? sectors / 3 : length, whole, &first, &end);
        if (!claim(first, end))
            continue;
        if (kind < 62) {
            perform(OP_WRITE, first, end, buffer);
            last_first = first;
            last_end = end;
        } else if (kind < 72) {
            perform(OP_ZERO, first, end, buffer);
        } else if (kind < 92) {
            perform(OP_DISCARD, first, end, buffer);
        } else {
            perform(OP_DISCARD, first, end, buffer);    /* compressed data is for clusters that are not allocated */
            perform(OP_COMPRESSED, first, end, buffer);
        }
        release(first, end);
    }
    free(buffer);
    return NULL;
}

static void open_image(const char *path, uint64_t cache)
{
    fl_image_options options = { .format = "qcow2", .writable = 1, .cache_size = cache, .direct = direct };
    int rc = fl_image_open(path, &options, &image, &why);
    CHECK(rc == 0, "cannot open: %d, %s", rc, why.text);
}

static void close_image(void)
{
    int rc = fl_image_close(image, &why);
    CHECK(rc == 0, "cannot close: %d, %s", rc, why.text);
    fl_image_free(image);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        { "seed", 1, NULL, 's' }, { "operations", 1, NULL, 'o' }, { "threads", 1, NULL, 't' }, { "cache", 1, NULL, 'c' },
        { "marks-only", 0, NULL, 'm' }, { "reopen", 0, NULL, 'r' }, { "first-id", 1, NULL, 'f' },
        { "grow", 1, NULL, 'g' }, { "direct", 0, NULL, 'd' }, { NULL, 0, NULL, 0 },
    };
    unsigned threads = 1;
    uint64_t cache = 0, grow = 0;
    bool reopen = false;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;)
        switch (option) {
        case 's': seed = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'o': operations = strtoull(optarg, NULL, 0); break;
        case 't': threads = (unsigned)strtoul(optarg, NULL, 0); break;
        case 'c': cache = strtoull(optarg, NULL, 0); break;
        case 'd': direct = true; break;
        case 'g': grow = strtoull(optarg, NULL, 0); break;
        case 'f': atomic_store(&next_id, strtoull(optarg, NULL, 0)); break;
        case 'm': marks_only = true; break;
        case 'r': reopen = true; break;
        default: return 2;
        }
    if (argc - optind != 2 || threads < 1 || threads > 64) {
        fprintf(stderr, "usage: qcow2_crash IMAGE LOG [options]\n");
        return 2;
    }
    const char *path = argv[optind];
    struct stat st;
    CHECK(stat(path, &st) == 0, "%s: %s", path, strerror(errno));
    image_device = st.st_dev;
    image_inode = st.st_ino;
    log_fd = open(argv[optind + 1], O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
    CHECK(log_fd >= 0, "the log: %s", strerror(errno));
    recording = true;

    lingers = threads > 1;
    uint64_t left = operations;
    for (unsigned round = 0; round < (reopen ? 4u : 1u); round++) {
        open_image(path, cache);
        fl_image_info info;
        MUST(fl_image_info_get(image, &info, &why));
        if (grow)
            MUST(fl_image_grow(image, info.size + grow, &why));
        CHECK(fl_image_info_get(image, &info, NULL) == 0, "info");
        disk_size = info.size;
        cluster_size = info.cluster_size;
        CHECK(disk_size % SECTOR == 0 && disk_size >= 16 * SECTOR, "a disk of %llu bytes", (unsigned long long)disk_size);
        busy = calloc(1, disk_size / SECTOR + 1);
        CHECK(busy != NULL, "memory");
        operations = reopen ? left / 4 : left;
        atomic_store(&operations_begun, 0);
        pthread_t ids[64];
        for (unsigned i = 0; i < threads; i++)
            CHECK(pthread_create(&ids[i], NULL, worker, (void *)(uintptr_t)(i + 1000 * round)) == 0, "a thread");
        for (unsigned i = 0; i < threads; i++)
            pthread_join(ids[i], NULL);
        close_image();
        mark(EV_CLOSE, round, 0, 0);
        free(busy);
    }
    return 0;
}
