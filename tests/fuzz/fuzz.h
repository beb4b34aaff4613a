/* fuzz.h: what an input is: how to use the image, then the image.
 *
 *   byte 0      bits 0, 1: FL_REPAIR_... to try; bit 2: open it for writing; bits 3, 4: where backing files may be: 0 or 3: as by default,
 *               1: below the image's directory, said out loud, 2: nowhere
 *   byte 1      the file is made this long, as a power of two, if that is longer (a sparse file that claims exabytes)
 *   bytes 2-7   seed of the operations
 *   bytes 8-15  reserved
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

#define SCRIPT 16u

/* Big-endian; 0 beyond the end. */
static inline uint64_t get_number(const uint8_t *bytes, size_t size, uint64_t at, unsigned width)
{
    uint64_t value = 0;
    if (at > size || size - at < width)
        return 0;
    for (unsigned i = 0; i < width; i++)
        value = value << 8 | bytes[at + i];
    return value;
}

static inline uint64_t next_random(uint64_t *state)         /* splitmix64 */
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

#endif
