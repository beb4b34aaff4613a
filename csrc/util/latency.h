/* latency.h: a histogram of durations that many threads add to: eight buckets for each doubling, exact below 8 ns. */
#ifndef FL_LATENCY_H
#define FL_LATENCY_H

#include "util.h"

struct latency {
    atomic_uint_least64_t max;                      /* ns */
    atomic_uint_least64_t counts[FL_LATENCY_BUCKETS];
};

void latency_add(struct latency *latency, uint64_t ns);
/* Copy it into counts[FL_LATENCY_BUCKETS] and *max; returns the sum of the counts. */
uint64_t latency_read(struct latency *latency, uint64_t *counts, uint64_t *max);

#endif
