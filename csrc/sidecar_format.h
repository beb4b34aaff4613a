/* sidecar_format.h: what a file of dirty bitmaps holds, as structs and as bytes. docs/bitmap-format.md describes it for other programs.
 *
 *   sidecar_format.c      header and records: to bytes, from bytes, and what a valid one is
 *   sidecar_identity.c    which disk it is, and whether somebody else changed it
 *   sidecar_area.c        the bits of one bitmap: where they are, reading, writing and checking them
 *   sidecar.c             the open file: its header, marks that reach it before the guest's write does
 */
#ifndef FL_SIDECAR_FORMAT_H
#define FL_SIDECAR_FORMAT_H

#include "bitmap.h"

#define SIDECAR_SLOT_BYTES (UINT64_C(1) << 20)  /* the header is there twice, at 0 and at this offset */
#define SIDECAR_ALIVE_AT (2 * SIDECAR_SLOT_BYTES)       /* a page that says when the disk was last written */
#define SIDECAR_ALIGNMENT UINT64_C(65536)       /* of areas: no page of any processor is larger */
#define SIDECAR_AREAS_AT (SIDECAR_ALIVE_AT + SIDECAR_ALIGNMENT)
#define SIDECAR_HEADER_BYTES 512u
#define SIDECAR_RECORD_BYTES 512u
#define SIDECAR_MAX_BITMAPS ((SIDECAR_SLOT_BYTES - SIDECAR_HEADER_BYTES) / SIDECAR_RECORD_BYTES)
#define SIDECAR_MIN_GRANULARITY UINT64_C(4096)
#define SIDECAR_MAX_GRANULARITY (UINT64_C(2) << 30)

enum sidecar_state { SIDECAR_CLEAN, SIDECAR_IN_USE };

/* Why a bitmap can't be trusted. Numbers of the format. */
enum sidecar_reason {
    REASON_NONE, REASON_CRASH, REASON_WRITTEN, REASON_RESIZED, REASON_OTHER_DISK, REASON_STORAGE, REASON_DAMAGED, REASON_COPIED, REASON_UNFINISHED, REASONS
};
const char *sidecar_reason(uint32_t reason);    /* a sentence's end for people; never NULL */

enum { KNOWN_BIRTH = 1, KNOWN_GENERATION = 2, KNOWN_FILE_SYSTEM = 4, KNOWN_SERIAL = 8, KNOWN_DISKSEQ = 16, KNOWN_WRITTEN = 32 };

struct stamp { int64_t seconds; uint32_t nanoseconds; };

struct sidecar_identity {
    bool device;                        /* a block device */
    uint64_t size;                      /* of the disk: what the guest sees */
    uint32_t known;                     /* which of those marked * were found out */
    uint64_t number;                    /* a file: of the device that it is on, a device: its own; valid until the next boot */
    uint64_t inode;                     /* a file's */
    uint64_t generation;                /* * of the inode */
    uint64_t file_system;               /* * */
    struct stamp birth;                 /* * */
    struct stamp changed, modified;     /* a file's times */
    uint64_t diskseq;                   /* * a device's, which no other one has until the next boot */
    uint64_t written;                   /* * sectors that were written to or discarded from the device since the boot */
    char serial[200];                   /* * a device's name for life */
};

struct sidecar_header {
    uint64_t generation;                /* counts up with each change */
    unsigned char uuid[16], session[16], boot[16];
    enum sidecar_state state;
    uint64_t own_inode;                 /* of the file that this is in */
    struct sidecar_identity disk;
    uint32_t count;
};

enum { RECORD_ENABLED = 1, RECORD_INCONSISTENT = 2, RECORD_WRITE_INTENT = 4, RECORD_FLAGS = 7 };

struct sidecar_record {
    char name[256];
    unsigned char uuid[16];
    uint64_t granularity, bits;
    uint32_t flags;                     /* RECORD_... */
    enum sidecar_reason reason;         /* when inconsistent */
    uint64_t area[2];                   /* file offsets */
    uint32_t counts;                    /* bit i: area[i] counts; the bitmap is the union of those */
    uint32_t checksum;                  /* of the one area that counts, in a clean file */
};

uint32_t sidecar_crc(uint32_t crc, const void *data, size_t length);    /* CRC-32C; begin with 0 */
/* The bytes of one area. */
uint64_t sidecar_area_bytes(uint64_t bits);

static inline size_t sidecar_header_bytes(uint32_t count) { return SIDECAR_HEADER_BYTES + (size_t)count * SIDECAR_RECORD_BYTES; }
/* Into `buffer` of sidecar_header_bytes(header->count). */
void sidecar_encode(const struct sidecar_header *header, const struct sidecar_record *const *records, unsigned char *buffer);

/* How many bytes the header in the first SIDECAR_HEADER_BYTES of a slot has, with its records; 0: there is none. `*version`: 0 or what it says. */
size_t sidecar_decode_length(const unsigned char *first, uint32_t *version);
/* A whole one, of that length. `records` has room for header->count, which the caller got by decoding with records NULL. false: it is damaged. */
bool sidecar_decode(const unsigned char *buffer, size_t length, struct sidecar_header *header, struct sidecar_record *records);

/* ---- sidecar_identity.c ---- */

/* What can be found out about an open file or device. 0 or -errno. */
int sidecar_identify(int fd, uint64_t size, struct sidecar_identity *identity);
/* Is `now` the disk that was recorded, as it was then? `clean`: nobody had it in use then; else `alive` is when it was last written by who had it. */
enum sidecar_reason sidecar_compare(const struct sidecar_identity *then, const struct sidecar_identity *now, bool same_boot, bool clean, int64_t alive);
/* Wait (a few milliseconds) until a change of the file would get another time than its last one. */
void sidecar_let_time_pass(const struct sidecar_identity *identity);
bool sidecar_boot_id(unsigned char id[16]);     /* false: not known; all zeros */
bool sidecar_random(unsigned char id[16]);      /* a new UUID */

/* ---- sidecar_area.c: none of these maps anything, so storage that fails is an error code; all return 0 or -errno ---- */

/* No bit is set. Only the pages' bytes are written: nothing looks at the bits of an untouched page. */
int area_clear(int fd, uint64_t at, uint64_t bits);
/* A page of zeros where no bit was set before, so that a later store needs no space. */
int area_touch(int fd, uint64_t at, uint64_t bits, uint64_t page);
/* Set in `into` (NULL: nowhere) what is set there; `*crc`: the checksum. -EBADMSG: it holds what no bitmap can. */
int area_read(int fd, uint64_t at, uint64_t bits, struct bitmap *into, uint32_t *crc);
/* Write a whole bitmap, which does not change meanwhile. */
int area_write(int fd, uint64_t at, const struct bitmap *bitmap);
int write_whole(int fd, const void *data, size_t length, uint64_t at);
int read_whole(int fd, void *data, size_t length, uint64_t at);        /* -ENODATA where the file ends before */

#endif
