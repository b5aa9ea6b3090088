// SPDX-License-Identifier: MIT
// Asks for large memory pages under what is read from end to end. Knows memory, not what is in it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tokenspeed::cpu {

// A wish: nothing depends on its being granted. Memory under 4 MiB is left as it is.
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

}  // namespace tokenspeed::cpu
