/* sidecar_identity.c: which disk a file of dirty bitmaps belongs to, and whether anybody else wrote to it since. As far as a kernel tells. */
#define _GNU_SOURCE
#include "sidecar_format.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR(0x12, 128, uint64_t)
#endif

/* After a kill the image's last change may be this much later than the last mark of a writer: a write takes its time. After a crash the mark on
   stable storage may be older than the last one by what the kernel keeps in memory. Seconds. */
#define SLACK_KILLED 10
#define SLACK_CRASHED 120

bool sidecar_random(unsigned char id[16])
{
    if (getrandom(id, 16, 0) != 16)
        return false;
    id[6] = (unsigned char)((id[6] & 15) | 0x40);
    id[8] = (unsigned char)((id[8] & 63) | 0x80);
    return true;
}

/* The first line of a file, without its end. */
static bool read_line(const char *path, char *line, size_t size)
{
    FILE *file = fopen(path, "re");
    bool ok = file && fgets(line, (int)size, file);
    if (file)
        fclose(file);
    if (ok)
        line[strcspn(line, "\n")] = 0;
    return ok && *line;
}

bool sidecar_boot_id(unsigned char id[16])
{
    char line[64];
    unsigned n = 0;
    memset(id, 0, 16);
    if (!read_line("/proc/sys/kernel/random/boot_id", line, sizeof line))
        return false;
    for (const char *p = line; *p && n < 32; p++) {
        unsigned digit = *p >= '0' && *p <= '9' ? (unsigned)(*p - '0') : *p >= 'a' && *p <= 'f' ? (unsigned)(*p - 'a') + 10 : 16;
        if (digit < 16) {
            id[n / 2] = (unsigned char)(id[n / 2] | digit << (n % 2 ? 0 : 4));
            n++;
        }
    }
    return n == 32;
}

static void identify_file(int fd, const struct stat *st, struct sidecar_identity *identity)
{
    struct statx sx;
    struct statfs sfs;
    uint64_t file_system = 0;
    long generation = 0;
    identity->number = (uint64_t)st->st_dev;
    identity->inode = st->st_ino;
    identity->modified = (struct stamp){ st->st_mtim.tv_sec, (uint32_t)st->st_mtim.tv_nsec };
    identity->changed = (struct stamp){ st->st_ctim.tv_sec, (uint32_t)st->st_ctim.tv_nsec };
    if (statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &sx) == 0 && sx.stx_mask & STATX_BTIME) {
        identity->birth = (struct stamp){ sx.stx_btime.tv_sec, sx.stx_btime.tv_nsec };
        identity->known |= KNOWN_BIRTH;
    }
    if (ioctl(fd, FS_IOC_GETVERSION, &generation) == 0) {
        identity->generation = (uint32_t)generation;    /* file systems fill in an int */
        identity->known |= KNOWN_GENERATION;
    }
    if (fstatfs(fd, &sfs) == 0) {
        memcpy(&file_system, &sfs.f_fsid, MIN(sizeof file_system, sizeof sfs.f_fsid));
        identity->file_system = file_system;
        if (file_system)
            identity->known |= KNOWN_FILE_SYSTEM;
    }
}

static void identify_device(int fd, const struct stat *st, struct sidecar_identity *identity)
{
    static const char *const names[] = { "dm/uuid", "wwid", "device/wwid", "device/serial", "serial", "../wwid", "../device/wwid", "../device/serial", "../serial" };
    char path[128], line[160] = "", part[24] = "0";
    unsigned long long fields[17] = { 0 };
    unsigned n = 0;
    identity->number = (uint64_t)st->st_rdev;
    if (ioctl(fd, BLKGETDISKSEQ, &identity->diskseq) == 0)
        identity->known |= KNOWN_DISKSEQ;
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/partition", major(st->st_rdev), minor(st->st_rdev));
    if (!read_line(path, part, sizeof part))
        strcpy(part, "0");
    for (size_t i = 0; i < sizeof names / sizeof *names && !(identity->known & KNOWN_SERIAL); i++) {
        if (!strcmp(part, "0") && !strncmp(names[i], "../", 3))
            break;                      /* the directory above is the disk only for a partition */
        snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%s", major(st->st_rdev), minor(st->st_rdev), names[i]);
        if (read_line(path, line, sizeof line)) {
            snprintf(identity->serial, sizeof identity->serial, "%s, partition %s", line, part);
            identity->known |= KNOWN_SERIAL;
        }
    }
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/stat", major(st->st_rdev), minor(st->st_rdev));
    FILE *file = fopen(path, "re");
    while (file && n < 17 && fscanf(file, "%llu", &fields[n]) == 1)
        n++;
    if (file)
        fclose(file);
    if (n >= 7) {
        identity->written = fields[6] + (n >= 14 ? fields[13] : 0);     /* sectors written; sectors discarded */
        identity->known |= KNOWN_WRITTEN;
    }
}

int sidecar_identify(int fd, uint64_t size, struct sidecar_identity *identity)
{
    struct stat st;
    if (fd < 0)
        return -ENOTSUP;
    if (fstat(fd, &st))
        return -errno;
    memset(identity, 0, sizeof *identity);
    identity->size = size;
    identity->device = S_ISBLK(st.st_mode);
    if (identity->device)
        identify_device(fd, &st, identity);
    else
        identify_file(fd, &st, identity);
    return 0;
}

static bool same_stamp(struct stamp a, struct stamp b) { return a.seconds == b.seconds && a.nanoseconds == b.nanoseconds; }

static bool same_file(const struct sidecar_identity *then, const struct sidecar_identity *now, uint32_t known, bool same_boot)
{
    return then->inode == now->inode && (!same_boot || then->number == now->number)
           && (!(known & KNOWN_BIRTH) || same_stamp(then->birth, now->birth))
           && (!(known & KNOWN_GENERATION) || then->generation == now->generation)
           && (!(known & KNOWN_FILE_SYSTEM) || then->file_system == now->file_system);
}

/* A device without a name for life can be recognised until the next boot only. */
static bool same_device(const struct sidecar_identity *then, const struct sidecar_identity *now, uint32_t known, bool same_boot)
{
    if (known & KNOWN_SERIAL)
        return !strcmp(then->serial, now->serial);
    return same_boot && then->number == now->number && (!(known & KNOWN_DISKSEQ) || then->diskseq == now->diskseq);
}

enum sidecar_reason sidecar_compare(const struct sidecar_identity *then, const struct sidecar_identity *now, bool same_boot, bool clean, int64_t alive)
{
    uint32_t known = then->known & now->known;
    if (then->device != now->device || !(now->device ? same_device : same_file)(then, now, known, same_boot))
        return REASON_OTHER_DISK;
    if (then->size != now->size)
        return REASON_RESIZED;
    if (now->device)
        return clean && same_boot && known & KNOWN_WRITTEN && then->written != now->written ? REASON_WRITTEN : REASON_NONE;
    /* Not the time of the last change of the inode: it moves when the file is renamed, or given to another user. */
    if (clean)
        return same_stamp(then->modified, now->modified) ? REASON_NONE : REASON_WRITTEN;
    return now->modified.seconds > alive + (same_boot ? SLACK_KILLED : SLACK_CRASHED) ? REASON_WRITTEN : REASON_NONE;
}

void sidecar_let_time_pass(const struct sidecar_identity *identity)
{
    struct timespec now, tick = { 0, 1000000 };
    for (int i = 0; i < 50 && !identity->device; i++) {
        clock_gettime(CLOCK_REALTIME_COARSE, &now);     /* what files are stamped with, by kernels that have nothing finer */
        if (now.tv_sec != identity->modified.seconds || now.tv_nsec != (long)identity->modified.nanoseconds)
            if (now.tv_sec > identity->modified.seconds || (now.tv_sec == identity->modified.seconds && now.tv_nsec > (long)identity->modified.nanoseconds))
                return;
        nanosleep(&tick, NULL);
    }
}
