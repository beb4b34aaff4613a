/* check_refs.c: how many references each cluster has, and which L2 tables there are, in memory that follows what there is. See check.h. */
#define _GNU_SOURCE
#include "check.h"

#include <stdlib.h>

/* ---- maps ---- */

static size_t slot_of(const struct map *map, uint64_t key)
{
    uint64_t hash = key * UINT64_C(0x9e3779b97f4a7c15);
    size_t slot = (size_t)(hash >> 20) & (map->slot_count - 1);
    while (map->slots[slot] && map->keys[map->slots[slot] - 1] != key)
        slot = (slot + 1) & (map->slot_count - 1);
    return slot;
}

uint32_t map_find(const struct map *map, uint64_t key)
{
    return map->slot_count ? map->slots[slot_of(map, key)] - 1 : NOT_THERE;
}

static int over_the_bound(struct checker *c)
{
    found(c, FL_FOUND_ERROR, NOWHERE, NOWHERE, "references are scattered so widely that counting them takes more than %llu MiB of memory",
          (unsigned long long)(c->memory_limit >> 20));
    return -ELOOP;
}

/* Twice as large. */
static int map_grow(struct checker *c, struct map *map)
{
    size_t capacity = map->capacity ? 2 * map->capacity : 64, slot_count = 2 * capacity;
    uint64_t before = map->capacity * (map->value_size + sizeof *map->keys) + map->slot_count * sizeof *map->slots;
    uint64_t after = capacity * (map->value_size + sizeof *map->keys) + slot_count * sizeof *map->slots;
    if (c->memory - before + after > c->memory_limit || capacity >= NOT_THERE)
        return over_the_bound(c);
    char *values = realloc(map->values, capacity * map->value_size);
    if (values)
        map->values = values;
    uint64_t *keys = realloc(map->keys, capacity * sizeof *keys);
    if (keys)
        map->keys = keys;
    uint32_t *slots = calloc(slot_count, sizeof *slots);
    if (!values || !keys || !slots) {
        free(slots);
        return no_memory(c);
    }
    free(map->slots);
    map->slots = slots;
    map->slot_count = slot_count;
    map->capacity = capacity;
    for (size_t i = 0; i < map->count; i++)
        slots[slot_of(map, keys[i])] = (uint32_t)i + 1;
    c->memory += after - before;
    return 0;
}

int map_add(struct checker *c, struct map *map, uint64_t key, uint32_t *number)
{
    uint32_t there = map_find(map, key);
    if (there == NOT_THERE) {
        int rc = map->count == map->capacity ? map_grow(c, map) : 0;
        if (rc < 0)
            return rc;
        there = (uint32_t)map->count++;
        map->keys[there] = key;
        memset(map->values + there * map->value_size, 0, map->value_size);
        map->slots[slot_of(map, key)] = there + 1;
    }
    *number = there;
    return 0;
}

static void map_free(struct map *map)
{
    free(map->keys);
    free(map->values);
    free(map->slots);
    map->keys = NULL;
    map->values = NULL;
    map->slots = NULL;
    map->count = map->capacity = map->slot_count = 0;
}

void refs_free(struct checker *c)
{
    map_free(&c->pages);
    map_free(&c->tables);
    c->last_page = 0;
    c->memory = 0;
}

/* ---- counts ---- */

struct page *find_page(struct checker *c, uint64_t cluster)
{
    uint64_t key = cluster / PAGE_CLUSTERS;
    if (!c->last_page || c->pages.keys[c->last_page - 1] != key) {
        uint32_t number = map_find(&c->pages, key);
        if (number == NOT_THERE)
            return NULL;
        c->last_page = number + 1;
    }
    return page_at(c, c->last_page - 1);
}

uint32_t references(struct checker *c, uint64_t cluster)
{
    struct page *page = find_page(c, cluster);
    return page ? page->count[cluster % PAGE_CLUSTERS] : 0;
}

int refs_add(struct checker *c, uint64_t offset, uint64_t length, uint32_t n)
{
    uint64_t cluster = cluster_of(c, offset), last = cluster_of(c, offset + length - 1);
    while (cluster <= last) {
        uint64_t end = MIN(last, cluster | (PAGE_CLUSTERS - 1));
        struct page *page = find_page(c, cluster);
        if (!page) {
            uint32_t number;
            int rc = map_add(c, &c->pages, cluster / PAGE_CLUSTERS, &number);
            if (rc < 0)
                return rc;
            c->last_page = number + 1;
            page = page_at(c, number);
        }
        for (; cluster <= end; cluster++) {
            uint32_t *count = &page->count[cluster % PAGE_CLUSTERS];
            *count = *count > UINT32_MAX - n ? UINT32_MAX : *count + n;
        }
    }
    c->clusters = MAX(c->clusters, last + 1);
    return 0;
}

void refs_remove(struct checker *c, uint64_t offset, uint64_t length)
{
    uint64_t last = cluster_of(c, offset + length - 1);
    for (uint64_t cluster = cluster_of(c, offset); cluster <= last; cluster++) {
        struct page *page = find_page(c, cluster);
        uint32_t *count = page ? &page->count[cluster % PAGE_CLUSTERS] : NULL;
        if (count && *count > 0 && *count < UINT32_MAX)
            --*count;
    }
}

static int by_key(const void *a, const void *b, void *keys)
{
    uint64_t x = ((uint64_t *)keys)[*(const uint32_t *)a], y = ((uint64_t *)keys)[*(const uint32_t *)b];
    return x < y ? -1 : x > y;
}

int pages_sorted(struct checker *c, uint32_t **numbers)
{
    uint32_t *sorted = malloc(MAX(c->pages.count, (size_t)1) * sizeof *sorted);
    if (!sorted)
        return no_memory(c);
    for (size_t i = 0; i < c->pages.count; i++)
        sorted[i] = (uint32_t)i;
    qsort_r(sorted, c->pages.count, sizeof *sorted, by_key, c->pages.keys);
    *numbers = sorted;
    return 0;
}
