/* allocate.h: what the files that count, take and free the clusters of the file share. All of it is called under `alloc`. */
#ifndef FL_QCOW2_ALLOCATE_H
#define FL_QCOW2_ALLOCATE_H

#include "driver.h"

static inline uint64_t region_of(const struct qcow2 *q, uint64_t cluster) { return cluster >> q->region_bits; }
static inline uint64_t in_region(const struct qcow2 *q, uint64_t cluster) { return cluster & ((UINT64_C(1) << q->region_bits) - 1); }

/* ---- refcount.c ---- */

uint64_t count_load(const struct slice *slice, unsigned order, uint64_t i);
void count_store(struct slice *slice, unsigned order, uint64_t i, uint64_t n);      /* under `lock` too; cache_dirty is the caller's */
/* The slice that has the refcount of a cluster, pinned; NULL: no block describes it, so it is free. */
int count_slice(struct qcow2 *q, uint64_t cluster, struct slice **slice, fl_error *error);
/* `count` clusters of one region. */
void count_set(struct qcow2 *q, struct slice *slice, uint64_t cluster, uint64_t count, uint64_t n);
void note_free(struct qcow2 *q, uint64_t cluster);     /* something in its region became free */
/* Would clusters from `first` on be on the header or a table? Then the refcounts are wrong, whatever else is: -FL_EFORMAT. */
int check_not_a_table(struct qcow2 *q, uint64_t first, uint64_t count, fl_error *error);

/* ---- allocate.c ---- */

/* As alloc_clusters, alloc_in_a_row and alloc_undo. */
int take_clusters(struct qcow2 *q, uint64_t want, struct run *got, bool *fresh, fl_error *error);
int take_in_a_row(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error);
int take_back(struct qcow2 *q, struct run run, fl_error *error);
/* Take up to `want` clusters at the tail, in a row, all with their blocks. At least one. */
int take_at_tail(struct qcow2 *q, uint64_t want, struct run *got, fl_error *error);

/* ---- area.c ---- */

void area_keep_out(struct qcow2 *q, uint64_t cluster);  /* nothing more is put into this cluster */
void area_close(struct qcow2 *q);

#endif
