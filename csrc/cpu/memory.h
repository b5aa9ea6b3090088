// SPDX-License-Identifier: MIT
// What is asked of the operating system and the C library. Knows memory, not what is in it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace tokenspeed::cpu {

// Large memory pages under what is read from end to end. A wish: nothing depends on its being
// granted. Memory under 4 MiB is left as it is.
inline void advise_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHuge * kHuge;
    if (bytes >= 2 * kHuge && begin < end) {
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#else
    (void)memory;
    (void)bytes;
#endif
}

// What a step frees the next one allocates again: memory that went back in between would be cleared
// and mapped anew, page by page. Of the whole process; blocks over 32 MiB still go back.
inline void keep_freed_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 512 << 20);
#endif
}

}  // namespace tokenspeed::cpu
