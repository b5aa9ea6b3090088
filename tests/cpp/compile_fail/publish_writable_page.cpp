// SPDX-License-Identifier: MIT
// What is still being written cannot be found.
// expect: SealedPage
#include "scheduler/prefix_index.h"

namespace tokenspeed {
#ifdef MUST_FAIL
void enter(PrefixIndex& index, const WritablePage& page, std::span<const int32_t> tokens) {
    index.publish(page, Hash128{}, Hash128{}, tokens, false);
}
#else
void enter(PrefixIndex& index, const SealedPage& page, std::span<const int32_t> tokens) {
    index.publish(page, Hash128{}, Hash128{}, tokens, false);
}
#endif
}  // namespace tokenspeed
