/* sidecar_internal.h: between sidecar.c and sidecar_open.c. */
#ifndef FL_SIDECAR_INTERNAL_H
#define FL_SIDECAR_INTERNAL_H

#include "sidecar.h"

/* Fill `error` with "`what` the file of dirty bitmaps ...", and return rc. */
int sidecar_error(const struct sidecar *sidecar, int rc, const char *what, fl_error *error);
/* Write header and records as they are in memory, with the next generation. Under the lock. */
int sidecar_write_header(struct sidecar *sidecar, bool sync);
/* Find places for the areas of a bitmap. It need not be in the list. */
void kept_place(struct kept *kept);
uint64_t sidecar_find_room(const struct sidecar *sidecar, uint64_t bytes, uint64_t taken_at, uint64_t taken_bytes);
int kept_map(struct kept *kept);
void kept_unmap(struct kept *kept);

#endif
