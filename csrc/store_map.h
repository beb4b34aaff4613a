/* store_map.h: from cluster to the place that holds its old data. Its size follows what is saved, not the disk. No lock of its own.
 *
 * 256 small hash tables instead of one, so that growing one moves a 256th of the entries: under the store's lock nobody notices. Runs of 64 clusters
 * stay together. The hash is seeded at random: a guest cannot choose clusters that collide.
 */
#ifndef FL_STORE_MAP_H
#define FL_STORE_MAP_H

#include "util/util.h"

/* A place: bit 0: in the file, else in memory; bits 1 to 31: the number of the slot there, plus 1; bits 32 to 63, in the file: the checksum. */
#define PLACE_NONE 0u
#define PLACE_MOST_SLOTS 0x7ffffffeu
static inline uint64_t place_memory(uint32_t slot) { return ((uint64_t)slot + 1) << 1; }
static inline uint64_t place_file(uint32_t slot, uint32_t sum) { return (uint64_t)sum << 32 | ((uint64_t)slot + 1) << 1 | 1; }
static inline bool place_is_file(uint64_t place) { return place & 1; }
static inline uint32_t place_slot(uint64_t place) { return ((uint32_t)place >> 1) - 1; }
static inline uint32_t place_sum(uint64_t place) { return (uint32_t)(place >> 32); }

#define MAP_TABLES 256

struct map_entry { uint64_t key, place; };      /* key: cluster + 1; 0: free */

struct map {
    uint64_t seed;
    struct map_table { struct map_entry *entries; uint64_t size, used; } tables[MAP_TABLES];    /* size: a power of two, or 0 */
};

void map_init(struct map *map);
void map_destroy(struct map *map);              /* forgets everything; the map is empty and usable */
uint64_t map_get(const struct map *map, uint64_t cluster);
void map_expect(const struct map *map, uint64_t cluster);   /* it is looked up soon: its entry is brought into the cache */
int map_put(struct map *map, uint64_t cluster, uint64_t place);         /* adds or replaces; -ENOMEM only when it adds */
uint64_t map_remove(struct map *map, uint64_t cluster);                 /* the place it had, or PLACE_NONE */

#endif
