// SPDX-License-Identifier: MIT
// What nobody wrote cannot be sealed, hence not published.
// expect: FreePage
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
SealedPage seal(PagePool& pool, FreePage page, const Settled& proof) {
    return pool.seal(std::move(page), proof);
}
#else
SealedPage seal(PagePool& pool, WritablePage page, const Settled& proof) {
    return pool.seal(std::move(page), proof);
}
#endif
}  // namespace tokenspeed
