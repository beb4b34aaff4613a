/* store_map.c: see store_map.h. Linear probing, removal by moving later entries back, load between 1/8 and 1/2. */
#define _GNU_SOURCE
#include "store_map.h"

#include <stdlib.h>
#include <sys/random.h>

#define SMALLEST 64

static uint64_t mix(uint64_t x)
{
    x ^= x >> 32;
    x *= UINT64_C(0x9e3779b97f4a7c15);
    x ^= x >> 29;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 32;
}

void map_init(struct map *map)
{
    memset(map, 0, sizeof *map);
    if (getrandom(&map->seed, sizeof map->seed, GRND_NONBLOCK) != sizeof map->seed)
        map->seed = now_ns();
}

void map_destroy(struct map *map)
{
    for (int i = 0; i < MAP_TABLES; i++) {
        free(map->tables[i].entries);
        memset(&map->tables[i], 0, sizeof map->tables[i]);
    }
}

static uint64_t group_hash(const struct map *map, uint64_t cluster)
{
    return mix((cluster >> 6) ^ map->seed);
}

static const struct map_table *table_of(const struct map *map, uint64_t cluster)
{
    return &map->tables[group_hash(map, cluster) % MAP_TABLES];
}

/* Where `cluster` belongs in a table of `size` entries. */
static uint64_t home(const struct map *map, uint64_t cluster, uint64_t size)
{
    return ((group_hash(map, cluster) >> 8) + (cluster & 63)) & (size - 1);
}

/* The index of cluster's entry, or of the free one where it would go. The table is not full. */
static uint64_t find(const struct map *map, const struct map_table *table, uint64_t cluster)
{
    uint64_t i = home(map, cluster, table->size);
    while (table->entries[i].key != 0 && table->entries[i].key != cluster + 1)
        i = (i + 1) & (table->size - 1);
    return i;
}

static int resize(const struct map *map, struct map_table *table, uint64_t size)
{
    struct map_table new = { .entries = calloc(size, sizeof *new.entries), .size = size, .used = table->used };
    if (!new.entries)
        return -ENOMEM;
    for (uint64_t i = 0; i < table->size; i++)
        if (table->entries[i].key)
            new.entries[find(map, &new, table->entries[i].key - 1)] = table->entries[i];
    free(table->entries);
    *table = new;
    return 0;
}

uint64_t map_get(const struct map *map, uint64_t cluster)
{
    const struct map_table *table = table_of(map, cluster);
    return table->size ? table->entries[find(map, table, cluster)].place : PLACE_NONE;
}

void map_expect(const struct map *map, uint64_t cluster)
{
    const struct map_table *table = table_of(map, cluster);
    if (table->size)
        __builtin_prefetch(&table->entries[home(map, cluster, table->size)], 1);
}

int map_put(struct map *map, uint64_t cluster, uint64_t place)
{
    struct map_table *table = (struct map_table *)table_of(map, cluster);
    if (table->size) {
        struct map_entry *entry = &table->entries[find(map, table, cluster)];
        if (entry->key) {
            entry->place = place;
            return 0;
        }
    }
    if ((table->used + 1) * 2 > table->size) {
        int rc = resize(map, table, table->size ? table->size * 2 : SMALLEST);
        if (rc)
            return rc;
    }
    table->entries[find(map, table, cluster)] = (struct map_entry){ cluster + 1, place };
    table->used++;
    return 0;
}

uint64_t map_remove(struct map *map, uint64_t cluster)
{
    struct map_table *table = (struct map_table *)table_of(map, cluster);
    if (!table->size)
        return PLACE_NONE;
    uint64_t hole = find(map, table, cluster), mask = table->size - 1, place = table->entries[hole].place;
    if (!table->entries[hole].key)
        return PLACE_NONE;
    /* Close the gap: an entry behind it moves into it unless that would put it before its home. */
    for (uint64_t i = (hole + 1) & mask; table->entries[i].key; i = (i + 1) & mask) {
        uint64_t wanted = home(map, table->entries[i].key - 1, table->size);
        if (((i - wanted) & mask) >= ((i - hole) & mask)) {
            table->entries[hole] = table->entries[i];
            hole = i;
        }
    }
    table->entries[hole] = (struct map_entry){ 0, PLACE_NONE };
    table->used--;
    if (table->used == 0) {
        free(table->entries);
        memset(table, 0, sizeof *table);
    } else if (table->size > SMALLEST && table->used * 8 < table->size) {
        resize(map, table, table->size / 4);    /* no memory for that: it stays as it is */
    }
    return place;
}
