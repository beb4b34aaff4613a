/* sidecar_format.c: header and records of a file of dirty bitmaps, to bytes and from bytes. Whatever the bytes are: nothing is trusted that was not checked. */
#define _GNU_SOURCE
#include "sidecar_format.h"

#include <stdlib.h>

static const unsigned char magic[8] = { 'F', 'L', 'E', 'E', 'C', 'E', 'B', 'M' };
#define VERSION 1u

static const char *const reasons[REASONS] = {
    [REASON_NONE] = "it is consistent",
    [REASON_CRASH] = "the machine went down while it was in use, and it is not in write-intent mode",
    [REASON_WRITTEN] = "another program wrote to the image meanwhile",
    [REASON_RESIZED] = "the image has another size than before",
    [REASON_OTHER_DISK] = "the image is another file or device than before (a copy, perhaps)",
    [REASON_STORAGE] = "a write to the disk could not be noted in the file of the bitmaps",
    [REASON_DAMAGED] = "its bits are damaged",
    [REASON_COPIED] = "the file of the bitmaps is a copy, made while they were in use",
    [REASON_UNFINISHED] = "the program ended while it was being added or cleared",
};

const char *sidecar_reason(uint32_t reason)
{
    return reason < REASONS && reasons[reason] ? reasons[reason] : "the reason is not known";
}

uint32_t sidecar_crc(uint32_t crc, const void *data, size_t length)
{
    static _Atomic uint32_t table[256];         /* filled by whoever comes first; the others write the same */
    if (!atomic_load_explicit(&table[255], memory_order_acquire))
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; bit++)
                value = value >> 1 ^ (value & 1 ? 0x82f63b78u : 0);
            atomic_store_explicit(&table[i], value, memory_order_release);
        }
    const unsigned char *p = data;
    crc = ~crc;
    while (length--)
        crc = crc >> 8 ^ atomic_load_explicit(&table[(crc ^ *p++) & 255], memory_order_relaxed);
    return ~crc;
}

uint64_t sidecar_area_bytes(uint64_t bits) { return align_up(bitmap_memory(bits), SIDECAR_ALIGNMENT); }

/* ---- numbers, little-endian ---- */

static void put(unsigned char *p, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        p[i] = (unsigned char)(value >> 8 * i);
}

static uint64_t get(const unsigned char *p, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)p[i] << 8 * i;
    return value;
}

static void put_stamp(unsigned char *p, struct stamp stamp)
{
    put(p, (uint64_t)stamp.seconds, 8);
    put(p + 8, stamp.nanoseconds, 4);
}

static struct stamp get_stamp(const unsigned char *p)
{
    return (struct stamp){ (int64_t)get(p, 8), (uint32_t)get(p + 8, 4) };
}

/* Offsets of the fields. */
enum {
    H_MAGIC = 0, H_VERSION = 8, H_LENGTH = 12, H_CRC = 16, H_STATE = 20, H_GENERATION = 24, H_UUID = 32, H_SESSION = 48, H_BOOT = 64, H_COUNT = 80,
    H_DEVICE = 84, H_SIZE = 88, H_NUMBER = 96, H_INODE = 104, H_INODE_GENERATION = 112, H_FILE_SYSTEM = 120, H_BIRTH = 128, H_MODIFIED = 144,
    H_CHANGED = 160, H_DISKSEQ = 176, H_WRITTEN = 184, H_KNOWN = 192, H_OWN_INODE = 200, H_SERIAL = 208,
    R_NAME_LENGTH = 0, R_FLAGS = 4, R_NAME = 8, R_UUID = 264, R_GRANULARITY = 280, R_BITS = 288, R_AREA = 296, R_COUNTS = 312, R_REASON = 316, R_CRC = 320,
};

void sidecar_encode(const struct sidecar_header *header, const struct sidecar_record *const *records, unsigned char *buffer)
{
    const struct sidecar_identity *disk = &header->disk;
    size_t length = sidecar_header_bytes(header->count);
    memset(buffer, 0, length);
    memcpy(buffer + H_MAGIC, magic, sizeof magic);
    put(buffer + H_VERSION, VERSION, 4);
    put(buffer + H_LENGTH, length, 4);
    put(buffer + H_STATE, header->state, 4);
    put(buffer + H_GENERATION, header->generation, 8);
    memcpy(buffer + H_UUID, header->uuid, 16);
    memcpy(buffer + H_SESSION, header->session, 16);
    memcpy(buffer + H_BOOT, header->boot, 16);
    put(buffer + H_COUNT, header->count, 4);
    put(buffer + H_DEVICE, disk->device, 4);
    put(buffer + H_SIZE, disk->size, 8);
    put(buffer + H_NUMBER, disk->number, 8);
    put(buffer + H_INODE, disk->inode, 8);
    put(buffer + H_INODE_GENERATION, disk->generation, 8);
    put(buffer + H_FILE_SYSTEM, disk->file_system, 8);
    put_stamp(buffer + H_BIRTH, disk->birth);
    put_stamp(buffer + H_MODIFIED, disk->modified);
    put_stamp(buffer + H_CHANGED, disk->changed);
    put(buffer + H_DISKSEQ, disk->diskseq, 8);
    put(buffer + H_WRITTEN, disk->written, 8);
    put(buffer + H_KNOWN, disk->known, 4);
    put(buffer + H_OWN_INODE, header->own_inode, 8);
    memcpy(buffer + H_SERIAL, disk->serial, sizeof disk->serial);
    for (uint32_t i = 0; i < header->count; i++) {
        const struct sidecar_record *record = records[i];
        unsigned char *p = buffer + sidecar_header_bytes(i);
        size_t name = strlen(record->name);
        put(p + R_NAME_LENGTH, name, 4);
        put(p + R_FLAGS, record->flags, 4);
        memcpy(p + R_NAME, record->name, name);
        memcpy(p + R_UUID, record->uuid, 16);
        put(p + R_GRANULARITY, record->granularity, 8);
        put(p + R_BITS, record->bits, 8);
        put(p + R_AREA, record->area[0], 8);
        put(p + R_AREA + 8, record->area[1], 8);
        put(p + R_COUNTS, record->counts, 4);
        put(p + R_REASON, record->reason, 4);
        put(p + R_CRC, record->checksum, 4);
    }
    put(buffer + H_CRC, sidecar_crc(0, buffer, length), 4);     /* over the whole, with this field 0 */
}

size_t sidecar_decode_length(const unsigned char *first, uint32_t *version)
{
    *version = 0;
    if (memcmp(first + H_MAGIC, magic, sizeof magic))
        return 0;
    *version = (uint32_t)get(first + H_VERSION, 4);
    uint64_t count = get(first + H_COUNT, 4);
    if (*version != VERSION || count > SIDECAR_MAX_BITMAPS || get(first + H_LENGTH, 4) != sidecar_header_bytes((uint32_t)count))
        return 0;
    return sidecar_header_bytes((uint32_t)count);
}

static bool decode_record(const unsigned char *p, uint64_t size, struct sidecar_record *record)
{
    uint64_t name = get(p + R_NAME_LENGTH, 4), reason = get(p + R_REASON, 4);
    memset(record, 0, sizeof *record);
    if (name == 0 || name >= sizeof record->name || memchr(p + R_NAME, 0, name))
        return false;
    memcpy(record->name, p + R_NAME, name);
    memcpy(record->uuid, p + R_UUID, 16);
    record->granularity = get(p + R_GRANULARITY, 8);
    record->bits = get(p + R_BITS, 8);
    record->flags = (uint32_t)get(p + R_FLAGS, 4);
    record->area[0] = get(p + R_AREA, 8);
    record->area[1] = get(p + R_AREA + 8, 8);
    record->counts = (uint32_t)get(p + R_COUNTS, 4);
    record->checksum = (uint32_t)get(p + R_CRC, 4);
    if (reason >= REASONS || record->flags & ~RECORD_FLAGS || (record->counts != 1 && record->counts != 2 && record->counts != 3))
        return false;
    record->reason = (enum sidecar_reason)reason;
    if (!is_power_of_two(record->granularity) || record->granularity < SIDECAR_MIN_GRANULARITY || record->granularity > SIDECAR_MAX_GRANULARITY)
        return false;
    if (record->bits != div_up(size, record->granularity))
        return false;
    for (int i = 0; i < 2; i++)
        if (record->area[i] % SIDECAR_ALIGNMENT || record->area[i] < SIDECAR_AREAS_AT || record->area[i] > (uint64_t)INT64_MAX - sidecar_area_bytes(record->bits))
            return false;
    return true;
}

struct place { uint64_t at, end; };

static int by_place(const void *a, const void *b)
{
    const struct place *x = a, *y = b;
    return (x->at > y->at) - (x->at < y->at);
}

/* Do areas overlap, or are two bitmaps of one name? */
static bool collide(const struct sidecar_record *records, uint32_t count)
{
    struct place *places = calloc(2 * (size_t)count + 1, sizeof *places);
    if (!places)
        return true;
    bool bad = false;
    for (uint32_t i = 0; i < 2 * count; i++)
        places[i] = (struct place){ records[i / 2].area[i % 2], records[i / 2].area[i % 2] + sidecar_area_bytes(records[i / 2].bits) };
    qsort(places, 2 * (size_t)count, sizeof *places, by_place);
    for (uint32_t i = 0; i + 1 < 2 * count; i++)
        bad |= places[i].end > places[i + 1].at;
    free(places);
    for (uint32_t i = 0; i < count && !bad; i++)
        for (uint32_t j = 0; j < i && !bad; j++)
            bad = !strcmp(records[i].name, records[j].name);
    return bad;
}

bool sidecar_decode(const unsigned char *buffer, size_t length, struct sidecar_header *header, struct sidecar_record *records)
{
    unsigned char first[SIDECAR_HEADER_BYTES];
    uint32_t version;
    if (length < sizeof first)
        return false;
    memcpy(first, buffer, sizeof first);
    if (sidecar_decode_length(first, &version) != length)
        return false;
    put(first + H_CRC, 0, 4);
    if (sidecar_crc(sidecar_crc(0, first, sizeof first), buffer + sizeof first, length - sizeof first) != get(buffer + H_CRC, 4))
        return false;
    memset(header, 0, sizeof *header);
    struct sidecar_identity *disk = &header->disk;
    uint64_t state = get(first + H_STATE, 4);
    if (state > SIDECAR_IN_USE)
        return false;
    header->state = (enum sidecar_state)state;
    header->generation = get(first + H_GENERATION, 8);
    memcpy(header->uuid, first + H_UUID, 16);
    memcpy(header->session, first + H_SESSION, 16);
    memcpy(header->boot, first + H_BOOT, 16);
    header->count = (uint32_t)get(first + H_COUNT, 4);
    header->own_inode = get(first + H_OWN_INODE, 8);
    disk->device = get(first + H_DEVICE, 4) != 0;
    disk->size = get(first + H_SIZE, 8);
    disk->number = get(first + H_NUMBER, 8);
    disk->inode = get(first + H_INODE, 8);
    disk->generation = get(first + H_INODE_GENERATION, 8);
    disk->file_system = get(first + H_FILE_SYSTEM, 8);
    disk->birth = get_stamp(first + H_BIRTH);
    disk->modified = get_stamp(first + H_MODIFIED);
    disk->changed = get_stamp(first + H_CHANGED);
    disk->diskseq = get(first + H_DISKSEQ, 8);
    disk->written = get(first + H_WRITTEN, 8);
    disk->known = (uint32_t)get(first + H_KNOWN, 4);
    memcpy(disk->serial, first + H_SERIAL, sizeof disk->serial);
    if (disk->size > (uint64_t)INT64_MAX || memchr(disk->serial, 0, sizeof disk->serial) == NULL)
        return false;
    if (!records)
        return true;
    for (uint32_t i = 0; i < header->count; i++)
        if (!decode_record(buffer + sidecar_header_bytes(i), disk->size, &records[i]))
            return false;
    return !collide(records, header->count);
}
