/* extents.c: where the data of the disk is: fl_image_extents and fl_image_map, through the backing chain. */
#define _GNU_SOURCE
#include "driver.h"

/* What a look says about [offset, offset + length), taken under the epoch; nobody reads the file for it. */
static int look(struct qcow2 *q, uint64_t offset, uint64_t length, struct place *place, fl_error *error)
{
    unsigned pass = epoch_enter(&q->epoch);
    int rc = map_look(q, offset, length, place, error);
    epoch_leave(&q->epoch, pass);
    return rc;
}

/* The part of an unallocated range that the backing file has; 0: it reads as zeros. */
static uint64_t in_backing(const struct qcow2 *q, uint64_t offset, uint64_t length)
{
    if (!q->backing || offset >= q->backing->size)
        return 0;
    return MIN(length, q->backing->size - offset);
}

static bool add_extent(fl_extent *extents, size_t max, size_t *n, uint64_t offset, uint64_t length, int kind)
{
    if (*n > 0 && extents[*n - 1].kind == kind)
        extents[*n - 1].length += length;
    else if (*n == max)
        return false;
    else
        extents[(*n)++] = (fl_extent){ offset, length, kind };
    return true;
}

/* Two that touch are one when they say the same, and their bytes in the file follow each other. */
static bool add_mapping(fl_mapping *mappings, size_t max, size_t *n, const fl_mapping *m)
{
    fl_mapping *last = *n > 0 ? &mappings[*n - 1] : NULL;
    if (last && last->flags == m->flags && last->depth == m->depth &&
        (!(m->flags & FL_MAP_OFFSET) || last->host_offset + last->length == m->host_offset)) {
        last->length += m->length;
        return true;
    }
    if (*n == max)
        return false;
    mappings[(*n)++] = *m;
    return true;
}

static fl_mapping mapping_of(const struct place *place, uint64_t offset)
{
    fl_mapping m = { .offset = offset, .length = place->length };
    switch (place->state) {
    case UNALLOCATED:
        m.flags = FL_MAP_ZERO;
        break;
    case ZERO:
        m.flags = FL_MAP_ZERO | FL_MAP_ALLOCATED;
        break;
    case MAPPED:
        m.flags = FL_MAP_DATA | FL_MAP_ALLOCATED | FL_MAP_OFFSET;
        m.host_offset = place->host;
        break;
    case COMPRESSED:
        m.flags = FL_MAP_DATA | FL_MAP_ALLOCATED | FL_MAP_COMPRESSED;
        break;
    }
    return m;
}

int map_map(fl_image *image, uint64_t offset, uint64_t length, fl_mapping *mappings, size_t max, size_t *found, fl_error *error)
{
    struct qcow2 *q = qcow2_of(image);
    const uint64_t end = offset + length;
    fl_mapping below[64];
    size_t n = 0;
    bool room = true;
    while (offset < end && room) {
        struct place place;
        int rc = look(q, offset, end - offset, &place, error);
        if (rc < 0)
            return rc;
        uint64_t step = place.length, backed = place.state == UNALLOCATED ? in_backing(q, offset, step) : 0;
        if (backed) {
            size_t count;
            if ((rc = image_map(q->backing, offset, backed, below, 64, &count, error)) < 0)
                return rc;
            step = 0;
            for (size_t i = 0; i < count && room; i++) {
                below[i].depth += !!(below[i].flags & FL_MAP_ALLOCATED);
                room = add_mapping(mappings, max, &n, &below[i]);
                step += room ? below[i].length : 0;
            }
        } else {
            fl_mapping m = mapping_of(&place, offset);
            room = add_mapping(mappings, max, &n, &m);
        }
        offset += step;
    }
    *found = n;
    return 0;
}

int map_extents(fl_image *image, uint64_t offset, uint64_t length, fl_extent *extents, size_t max, size_t *found, fl_error *error)
{
    const uint64_t end = offset + length;
    fl_mapping mappings[64];
    size_t n = 0;
    bool room = true;
    while (offset < end && room) {
        size_t count;
        int rc = map_map(image, offset, end - offset, mappings, MIN(64, max - n + 1), &count, error);   /* not far beyond what there is room for */
        if (rc < 0)
            return rc;
        for (size_t i = 0; i < count && room; i++) {
            room = add_extent(extents, max, &n, offset, mappings[i].length, mappings[i].flags & FL_MAP_DATA ? FL_DATA : FL_ZERO);
            offset += mappings[i].length;
        }
    }
    *found = n;
    return 0;
}
