// SPDX-License-Identifier: MIT
// Pages go back when their handle dies, and in no other way.
// expect: private
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
int free_pages(PagePool& pool, const SealedPage& page) {
    pool.put_back(page.id());
    return page.id();
}
#else
int free_pages(PagePool& pool, const SealedPage& page) {
    pool.num_free();
    return page.id();
}
#endif
}  // namespace tokenspeed
