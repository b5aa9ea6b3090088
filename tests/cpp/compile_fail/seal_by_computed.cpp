// SPDX-License-Identifier: MIT
// Computed positions may hold drafts that were rejected: only settled ones seal a page.
// expect: Committed
#include "scheduler/pages.h"

namespace tokenspeed {
void seal(PageList& pages, PagePool& pool, const Committed& proof, int num_rejected) {
#ifdef MUST_FAIL
    pages.seal_full(pool, proof, 4);
    (void)num_rejected;
#else
    pages.seal_full(pool, proof.settled(num_rejected), 4);
#endif
}
}  // namespace tokenspeed
